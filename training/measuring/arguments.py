"""Settings of `evit benchmark` and `evit tune`, apart from what measures, so that usage errors are quick."""

import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal

from ..settings import (
    AT_LEAST_ONE,
    KEEP_RATE,
    Accepted,
    flag,
    json_setting,
    macs_list_setting,
    quiet_setting,
    setting,
)


CLOCK = Accepted("one of wall, cpu", lambda value: value in ("wall", "cpu"))
CLOCK_HELP = "wall, or cpu: this process's time on all threads, to which other work on the machine does not add."
TIMED = ("inference", "training")


@dataclass
class BenchmarkArguments:
    """What to measure, how, and where to write it."""

    keep_rates: list[float] = setting(
        [1.0, 0.7, 0.5], "Keep rates of the EViT variants, in (0, 1]; with --schedule the lowest one.", KEEP_RATE
    )
    macs: list[float] | None = macs_list_setting(modes=TIMED)
    batch_sizes: list[int] = setting([1, 8], "Images of a batch.", AT_LEAST_ONE)
    image_sizes: list[int] | None = setting(None, "Pixels; by default those of the model.", AT_LEAST_ONE, modes=TIMED)
    backends: list[str] = setting(
        ["sdpa"],
        "sdpa, sdpa-mkl (without oneDNN's linear layers), eager, compile-layers, compile, compile-freezing, "
        "compile-reduce-overhead, compile-max-autotune, torch-export, aoti, onnx, onnx-int8, openvino.",
        modes=TIMED,
    )
    baselines: list[str] | None = setting(
        None,
        "Dense ViTs with the same weights in eager code: timm, timm-unfused, transformers, transformers-eager; by "
        "default all, of other families than ViT those of Transformers; `none` for none, then keep rate 1.0 comes "
        "first.",
        modes=TIMED,
    )
    dtypes: list[str] = setting(["float32"], "float32, float16, bfloat16.")
    device: str | None = setting(None, "cpu, cuda, mps ...; by default the best there is.")
    threads: list[int] | None = setting(None, "Numbers of CPU threads; by default PyTorch's.", AT_LEAST_ONE)
    rounds: int = setting(
        11, "Measured rounds, after two that warm up; each times every variant once.", AT_LEAST_ONE, modes=TIMED
    )
    clock: str = setting("wall", CLOCK_HELP, CLOCK, modes=TIMED)
    training: bool = setting(False, "Time forward, backward and AdamW step instead of inference.")
    schedule: bool = setting(
        False, "Train through a schedule of keep rates instead, with each way to compile: graphs, waiting, speed."
    )
    inattentive_tokens: Literal["fused", "dropped", "counted"] | None = setting(
        None,
        "What becomes of the inattentive tokens: fused, dropped or counted by the kept ones; by default the model's.",
    )
    output_dir: str | None = setting(None, "Folder for benchmark.json and benchmark.png, or schedule.json.")
    json: bool = json_setting()
    quiet: bool = quiet_setting()

    def check_mode(self, given: Collection[str]) -> None:
        """Refuse what the mode would ignore.

        Args:
            given: names of the settings on the command line.

        Raises: ValueError naming a flag.
        """
        if self.training and self.schedule:
            raise ValueError("`--schedule` trains already: leave out `--training`.")
        mode = "schedule" if self.schedule else "training" if self.training else "inference"
        for one in fields(self):
            if one.name in given and mode not in one.metadata.get("modes", (mode,)):
                raise ValueError(f"`{flag(one.name)}` is not used with `--{mode}`: leave it out.")
            value = getattr(self, one.name)
            if mode == "schedule" and one.name in given and isinstance(value, list) and len(value) > 1:
                raise ValueError(f"`{flag(one.name)}` takes one value with `--schedule`, got {len(value)}.")


@dataclass
class TuneArguments:
    """How to search, and where to write what was found."""

    judge: Literal["dense", "labels"] | None = setting(
        None,
        "What settings are judged by: the dense model's answers, which needs no labels, or the labels. By default "
        "dense for a model that was not trained to lose tokens, labels for others. With dense, tokens are counted.",
    )
    images: int = setting(256, "Calibration images from the evaluation split.", AT_LEAST_ONE)
    batch_size: int = setting(1, "Images of a batch whose time is measured.", AT_LEAST_ONE)
    device: str | None = setting(None, "cpu, cuda, mps ...; by default the best there is.")
    threads: int | None = setting(None, "CPU threads; by default PyTorch's.", AT_LEAST_ONE)
    rounds: int = setting(11, "Measured rounds, after two that warm up.", AT_LEAST_ONE)
    clock: str = setting("wall", CLOCK_HELP, CLOCK)
    save: str | None = setting(None, "Folder for the model with the layers and keep rates that were found.")
    output_dir: str | None = setting(None, "Folder for tune.json.")
    json: bool = json_setting()
    quiet: bool = quiet_setting()


@dataclass(frozen=True)
class Target:
    """A budget for `evit tune`.

    Args:
        kind: "share" of the dense operations, "gmacs", or "ms" for a batch.
        amount: of that.
    """

    kind: str
    amount: float


def parse_target(text: str) -> Target:
    """A target such as 0.6, 2.5gmacs or 40ms.

    Raises: ValueError for anything else.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(gmacs|ms)?", text.strip().lower())
    kind = (match.group(2) or "share") if match else ""
    if not match or float(match.group(1)) <= 0 or (kind == "share" and float(match.group(1)) >= 1):
        raise ValueError(
            "`TARGET` must be a share of the dense operations below 1 (0.6), an amount of them (2.5gmacs) or a time "
            f"for one batch (40ms), got {text!r}."
        )
    return Target(kind, float(match.group(1)))
