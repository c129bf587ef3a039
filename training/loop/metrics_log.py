"""The log of a run: metrics.jsonl always, and trackers through Accelerate where they are asked for."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ..arguments import RunArguments, TrainArguments
from ..measuring.machine import memory_gib
from .checkpoints import replace_durably


# In the output folder, for what trackers write here.
TRACKER_FOLDER = "trackers"
# What the trackers that name runs call the name.
RUN_NAMES = {
    **{"wandb": "name", "trackio": "name", "mlflow": "run_name"},
    **{"swanlab": "experiment_name", "clearml": "task_name"},
}


def tracker_settings(run: RunArguments) -> dict[str, Any]:
    """Arguments of the Accelerator for the trackers of a run.

    Raises: ValueError for a tracker that is not installed, which Accelerate would silently leave out.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    missing = [name for name in run.trackers if name not in available]
    if missing:
        raise ValueError(
            f"`--trackers` names {missing}, which is not installed or not known: install it, or take "
            f"one of {available}."
        )
    return (
        {"log_with": run.trackers, "project_dir": str(Path(run.output_dir) / TRACKER_FOLDER)} if run.trackers else {}
    )


def start_trackers(accelerator: Accelerator, arguments: TrainArguments) -> None:
    """Start the trackers of a run, with the names of project and run, and give them its settings."""
    run = arguments.run
    name = run.tracker_run or Path(run.output_dir).resolve().name
    names = {str(tracker): {RUN_NAMES[tracker]: name} for tracker in run.trackers if tracker in RUN_NAMES}
    accelerator.init_trackers(run.tracker_project, **({"init_kwargs": names} if names else {}))
    settings = {key: x if isinstance(x, (int, float, str)) else str(x) for key, x in arguments.as_dict().items()}
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":  # which would write hyperparameters as one more run
            if accelerator.is_main_process:
                tracker.writer.add_text("settings", "\n".join(f"    {key}: {x}" for key, x in settings.items()))
        else:
            tracker.store_init_configuration(settings)


class MetricsLog:
    """A file with one JSON object in each line, written by the main process, and the trackers.

    Args:
        path: of the file.
        accelerator: has the trackers.
        arguments: settings of the run.
    """

    def __init__(self, path: Path, accelerator: Accelerator, arguments: TrainArguments) -> None:
        self.path = path
        self.accelerator = accelerator
        self.has_complained = False
        if accelerator.log_with:
            self._try(lambda: start_trackers(accelerator, arguments))

    def drop_after(self, step: int, keeps_evaluation: bool) -> None:
        """Drop what a resumed run will write again.

        Args:
            step: the last one that stays.
            keeps_evaluation: whether the evaluation at `step` stays too.
        """
        if not self.accelerator.is_main_process or not self.path.exists():
            return
        kept, num_strange = [], 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line)
                at, is_evaluation = int(entry["step"]), "learning_rate" not in entry
            except (ValueError, TypeError, KeyError, IndexError):
                num_strange += bool(line.strip())  # half a line, written when the run was killed, or one of a person
                continue
            if at < step or (at == step and (keeps_evaluation or not is_evaluation)):
                kept.append(line.rstrip(b"\n") + b"\n")
        if num_strange:
            sys.stderr.write(
                f"{num_strange} line{'s' if num_strange > 1 else ''} of {self.path.name} "
                f"{'were' if num_strange > 1 else 'was'} not one of this trainer, and left out.\n"
            )
        replace_durably(self.path, b"".join(kept))

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line. A log that fails is reported once, and training continues."""
        if not self.accelerator.is_main_process:
            return
        self._try(lambda: self._append(json.dumps(entry)))
        if self.accelerator.log_with:
            numbers = {name: x for name, x in entry.items() if isinstance(x, (int, float)) and name != "step"}
            self._try(lambda: self.accelerator.log(numbers, step=entry["step"]))

    def _append(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{line}\n")

    def _try(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker may raise
            if not self.has_complained:
                sys.stderr.write(f"Logging failed, and will be tried again in silence: {error!r}\n")
            self.has_complained = True


class LogWindow:
    """Sums since the last line of the log. The loss stays on the device until it is read: reading waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), device=device)
        self.num_steps = 0
        self.num_images = 0
        self.data_seconds = 0.0
        self.start = time.perf_counter()  # later by what evaluation and checkpoints take

    def add(self, loss: torch.Tensor) -> None:
        """Count a step that was not skipped."""
        self.loss_sum += loss
        self.num_steps += 1

    def mean_loss(self) -> float:
        """Mean loss of this process; NaN without a step."""
        return self.loss_sum.item() / self.num_steps if self.num_steps else float("nan")

    def summarize(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean loss over all processes, speed, share of the time spent waiting for images, and peak memory."""
        loss = accelerator.reduce(self.loss_sum, "sum").item() / accelerator.num_processes if self.num_steps else 0.0
        seconds = time.perf_counter() - self.start
        return {
            "loss": loss / self.num_steps if self.num_steps else float("nan"),
            "images_per_second": self.num_images / seconds,
            "data_wait": self.data_seconds / seconds,
            "memory_gib": memory_gib(accelerator.device),
        }
