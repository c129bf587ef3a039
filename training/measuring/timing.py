"""Honest measurements: variants take turns in one process, answers are checked, and no rate beats the machine."""

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..screen import bar


# A rate above the measured peak by more than this is an error of the measurement; packed weights gain up to 15 %.
PEAK_MARGIN = 1.25


class MeasurementError(RuntimeError):
    """A variant that answers wrongly, or faster than the machine can multiply."""

    status = 3


@dataclass
class Variant:
    """One thing to time.

    Args:
        name: in the table.
        run: does the work once and returns the logits, or None where there is nothing to compare.
        nominal_macs: multiply-accumulate operations of an image by the paper's count.
        executed_macs: those that are actually run.
        keep_rate: for the table.
        is_exact: whether the answer is the reference's up to rounding; quantized variants are not.
        model: of a training step, the network.
        forward: of a training step, only its forward, which returns the loss.
        relative_error: of the answer or the loss, once it was checked.
    """

    name: str
    run: Callable[[], torch.Tensor | None]
    nominal_macs: int
    executed_macs: int
    keep_rate: Any = None
    is_exact: bool = True
    model: torch.nn.Module | None = None
    forward: Callable[[], torch.Tensor] | None = None
    relative_error: float | None = None


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clock(name: str) -> Callable[[], float]:
    """Seconds of the wall, or of this process on all of its threads, which other work on the machine does not add to.

    Raises: ValueError for an unknown name.
    """
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    if name not in clocks:
        raise ValueError(f"`--clock` must be one of {', '.join(clocks)}, got {name!r}.")
    return clocks[name]


def alternate(
    variants: Sequence[Variant],
    device: torch.device,
    rounds: int = 11,
    warmup_rounds: int = 2,
    clock_name: str = "wall",
    seed: int = 0,
) -> list[list[float]]:
    """Time the variants in turn, in a new random order each round, so that what disturbs one disturbs all.

    Args:
        variants: what to time.
        device: waited for before and after each run.
        rounds: measured rounds.
        warmup_rounds: before them.
        clock_name: "wall" or "cpu", see `clock`.
        seed: of the orders.

    Returns: for each variant its seconds in each measured round.
    """
    now = clock(clock_name)
    seconds: list[list[float]] = [[] for _ in variants]
    shuffler = random.Random(seed)
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in bar(range(-warmup_rounds, rounds), desc="measuring speed", unit="round", leave=False):
            for i in shuffler.sample(range(len(variants)), len(variants)):
                synchronize(device)
                start = now()
                variants[i].run()
                synchronize(device)
                if number >= 0:
                    seconds[i].append(now() - start)
    finally:
        if collects:
            gc.enable()
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def check_answers(variants: Sequence[Variant], reference: Callable[[Any], torch.Tensor], tolerance: float) -> None:
    """Make sure, before anything is timed, that each variant computes what it claims to.

    Args:
        variants: each is run once; its answer is kept as `relative_error`.
        reference: logits for a keep rate, from the slowest and plainest implementation.
        tolerance: of the relative error, the norm of the difference over the norm of the reference.

    Raises: MeasurementError naming the variant.
    """
    for variant in variants:
        answer = variant.run()
        if answer is None:
            continue
        expected = reference(variant.keep_rate).float().cpu()
        answer = answer.detach().float().cpu()
        error = float("inf")
        if answer.shape == expected.shape:
            error = ((answer - expected).norm() / expected.norm()).item()
        variant.relative_error = error
        limit = tolerance if variant.is_exact else 0.5
        if not error <= limit:
            raise MeasurementError(
                f"`{variant.name}` differs from the reference by {error:.2g} (relative), allowed are {limit:g}: "
                "it computes something else, and its time means nothing."
            )


def check_rate(variant: Variant, batch_size: int, seconds: float, peak: float, passes: int = 1) -> float:
    """Rate of a variant in GFLOP/s, which the machine's measured peak bounds.

    Args:
        variant: its executed operations count, two for each multiply-accumulate.
        batch_size: images of a run.
        seconds: of a run.
        peak: in GFLOP/s, see `matmul_peak`.
        passes: forward passes that a run counts as: 3 with the backward pass.

    Raises: MeasurementError if it is beyond the peak: a stale model was once timed as twice as fast as possible.
    """
    rate = 2 * variant.executed_macs * batch_size * passes / seconds / 1e9
    if variant.is_exact and rate > PEAK_MARGIN * peak:
        raise MeasurementError(
            f"`{variant.name}` seems to run at {rate:.0f} GFLOP/s, but this machine multiplies matrices at {peak:.0f} "
            "at most: what was timed cannot be the whole work."
        )
    return rate


def matmul_peak(device: torch.device, dtype: torch.dtype, clock_name: str = "wall", seconds: float = 0.5) -> float:
    """Highest rate of large square matrix products, in GFLOP/s, on the threads that PyTorch has.

    Args:
        device: to measure.
        dtype: of the matrices.
        clock_name: as for the variants.
        seconds: to spend on each size.
    """
    now, best = clock(clock_name), 0.0
    sizes = (1024, 1536, 2048) if device.type == "cpu" else (4096, 8192)
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            synchronize(device)
            start = now()
            a @ b
            synchronize(device)
            best = max(best, 2 * size**3 / max(now() - start, 1e-9) / 1e9)
    return best


def peak_memory_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """Memory that one run needs at its peak beyond what was in use before, in MiB.

    On a GPU from PyTorch's allocator. On Linux from the resident memory of the process, whose high-water mark is
    reset first; None where that cannot be done.
    """
    synchronize(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and a run that reuses it would seem free
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_kib("VmRSS")
        run()
        return max(0, _resident_kib("VmHWM") - before) / 1024
    except (OSError, KeyError, AttributeError):
        return None


def _resident_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0])


def saved_activations_mib(model: torch.nn.Module, forward: Callable[[], Any]) -> float:
    """Memory of the tensors that a forward keeps for backward, each storage counted once, without weights, in MiB."""
    storages: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(storages.values()) / 2**20
