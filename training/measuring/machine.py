"""The machine that a command runs on: device, memory, launcher, date and package versions."""

import datetime
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from accelerate import Accelerator


# Whose versions a report of a measurement names.
PACKAGES = ("torch", "transformers", "timm", "onnxruntime", "openvino", "evit-hf")


def best_device(name: str | None = None) -> torch.device:
    """The device of that name; without one the accelerator if there is one, else the CPU."""
    if name:
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def accelerator_on(name: str | None = None, **options: Any) -> "Accelerator":
    """An Accelerator on a kind of device, see `best_device`.

    Args:
        name: for example "cpu" or "cuda".
        **options: of the Accelerator.

    Raises: ValueError for one device of several: each process takes the one of its own number.
    """
    from accelerate import Accelerator

    device = best_device(name)
    if device.index is not None:
        raise ValueError(
            f"`--device` must be a kind of device, such as {device.type}, got {name}: choose one of several with "
            "CUDA_VISIBLE_DEVICES."
        )
    return Accelerator(cpu=device.type == "cpu", **options)


def end_training(accelerator: "Accelerator") -> None:
    """End trackers and the process group, as Accelerate does; a group of CPUs ends with its processes.

    To destroy a gloo group makes every tenth run on PyTorch 2.7 hang for ever.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        for tracker in accelerator.trackers:
            tracker.finish()
    else:
        accelerator.end_training()


def device_name(device: torch.device) -> str:
    """Name of the device for a report, with the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def machine(device: torch.device, packages: Iterable[str]) -> dict[str, Any]:
    """What was measured on, and when."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    date = datetime.datetime.now().astimezone().date().isoformat()
    return {"device": device_name(device), "cpu": cpu, "date": date, "versions": package_versions(packages)}


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those of the packages that are installed."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the device, or of this process where it is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        info = psutil.Process().memory_info()
        return getattr(info, "peak_wset", info.rss) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux, in bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


# Settings of `accelerate launch`, which arrive as variables: the value that asks for nothing, and our flag.
LAUNCHER_SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": ("no", "--mixed-precision"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--gradient-accumulation-steps"),
}


def check_launcher(mixed_precision: str, environment: Mapping[str, str] = os.environ) -> None:
    """Check that `accelerate launch` asks for nothing that a command is not told itself, and would leave out.

    Args:
        mixed_precision: of the command.
        environment: of this process.

    Raises: ValueError naming the flag that says it.
    """
    for name, (nothing, flag) in LAUNCHER_SETTINGS.items():
        asked = environment.get(name, nothing).lower()
        if asked in (nothing, "", "auto") or (flag == "--mixed-precision" and asked == mixed_precision):
            continue
        option = name.removeprefix("ACCELERATE_").lower()
        raise ValueError(
            f"`accelerate launch`, or its configuration file, asks for {option} {asked}, which this command would not "
            f"do: leave it out there, and say it with the command's own `{flag}`."
        )
