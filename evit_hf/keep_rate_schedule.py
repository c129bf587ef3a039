"""The paper's keep-rate schedule: a pure function of the optimizer step, and a callback for `transformers.Trainer`."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


KeepRate = float | list[float]


def scheduled_keep_rate(
    step: int, keep_rate: float | Sequence[float], dense_steps: int, shrink_steps: int
) -> KeepRate:
    """Keep rate of one optimizer step: 1.0 at first, then a cosine down to `keep_rate`, then constant.

    With t = step - dense_steps and T = shrink_steps: keep_rate + (1 - keep_rate) * (1 + cos(pi * t / T)) / 2.

    Args:
        step: optimizer steps done so far; 0 for the first step.
        keep_rate: target in (0, 1], one number or one for each reorganization layer.
        dense_steps: optimizer steps at keep rate 1.0. The paper: 10 epochs of 300; 0 in fine-tuning.
        shrink_steps: optimizer steps from 1.0 to the target. The paper: 100 epochs of 300; 0 in fine-tuning, where the
            target holds from the first step.

    Returns: a number, or a list if `keep_rate` is one.

    Raises: ValueError for a negative number of steps.

    Source: https://github.com/youweiliang/evit/blob/5ca95a7/helpers.py (`adjust_keep_rate`), which has one rate for
        all layers; here each layer has its own target.
    """
    if min(step, dense_steps, shrink_steps) < 0:
        raise ValueError(
            "`step`, `dense_steps` and `shrink_steps` must not be negative, got "
            f"{step}, {dense_steps}, {shrink_steps}: pass 0 for no such phase."
        )
    if not isinstance(keep_rate, (int, float)):
        return [_scheduled(step, rate, dense_steps, shrink_steps) for rate in keep_rate]
    return _scheduled(step, keep_rate, dense_steps, shrink_steps)


def _scheduled(step: int, keep_rate: float, dense_steps: int, shrink_steps: int) -> float:
    if step < dense_steps:
        return 1.0
    shrink_step = step - dense_steps
    if shrink_step >= shrink_steps:
        return float(keep_rate)
    return keep_rate + (1 - keep_rate) * (1 + math.cos(math.pi * shrink_step / shrink_steps)) / 2


def rounded_keep_rate(rate: float | Sequence[float], keep_rate: float | Sequence[float], levels: int) -> KeepRate:
    """Scheduled keep rate, rounded up to one of `levels` evenly spaced rates above the target, or the target itself.

    A schedule in few levels has few numbers of tokens: a compiled model is compiled once for each.

    Args:
        rate: what `scheduled_keep_rate` returned.
        keep_rate: target of the schedule, one number or one for each reorganization layer.
        levels: number of rates above the target; the highest is 1.0.

    Returns: a number, or a list if `keep_rate` is one. With target 0.6 and 4 levels 0.65 becomes 0.7.
    """
    if isinstance(keep_rate, (int, float)):
        if not isinstance(rate, (int, float)):
            raise ValueError("`rate` is a list, but the target `keep_rate` is one number: pass one of each.")
        return _rounded(rate, keep_rate, levels)
    rates = [rate] * len(keep_rate) if isinstance(rate, (int, float)) else rate
    return [_rounded(x, target, levels) for x, target in zip(rates, keep_rate, strict=True)]


def _rounded(rate: float, keep_rate: float, levels: int) -> float:
    if keep_rate == 1.0:
        return 1.0
    # The small number keeps a rate that is a level at that level, whatever the rounding of the division.
    level = math.ceil((rate - keep_rate) / (1 - keep_rate) * levels - 1e-9)
    return keep_rate + (1 - keep_rate) * level / levels if level else float(keep_rate)


@dataclass(frozen=True)
class KeepRateSchedule:
    """The keep rate of every optimizer step of a training.

    Args:
        target: keep rate at the end, one number or one for each reorganization layer.
        dense_steps: see `scheduled_keep_rate`.
        shrink_steps: see `scheduled_keep_rate`.
        levels: see `rounded_keep_rate`; None does not round.
        range: (lowest, highest) target: each step draws its own between them, of `levels` + 1 evenly spaced ones if
            there are levels. None takes `target`.
        seed: of the draws; with the same seed a step draws the same target on every process and after resuming.
    """

    target: KeepRate
    dense_steps: int = 0
    shrink_steps: int = 0
    levels: int | None = None
    range: tuple[float, float] | None = None
    seed: int = 0

    @classmethod
    def in_epochs(
        cls, target: KeepRate, dense_epochs: float, shrink_epochs: float, steps_per_epoch: int, **settings: Any
    ) -> "KeepRateSchedule":
        """Build a schedule whose phases are given in epochs, fractions allowed.

        Args:
            target: see the class.
            dense_epochs: epochs at keep rate 1.0.
            shrink_epochs: epochs from 1.0 to the target.
            steps_per_epoch: optimizer steps.
            **settings: `levels`, `range`, `seed`.
        """
        dense_steps, shrink_steps = round(dense_epochs * steps_per_epoch), round(shrink_epochs * steps_per_epoch)
        return cls(target, dense_steps, shrink_steps, **settings)

    def at(self, step: int) -> KeepRate:
        """Keep rate of an optimizer step: drawn from the range if there is one, then scheduled, then rounded.

        Args:
            step: optimizer steps done so far.
        """
        if self.range is None:
            return self._towards(self.target, step)
        low, high = self.range
        share = random.Random(f"keep rate of {self.seed}, {step}").random()
        if self.levels:
            share = math.floor(share * (self.levels + 1)) / self.levels
        return self._towards(low + (high - low) * share, step)

    def highest_from(self, step: int) -> KeepRate:
        """Highest keep rate of this step and all later ones, at which they need the most memory."""
        return self._towards(self.target if self.range is None else self.range[1], step)  # it never rises

    def _towards(self, target: KeepRate, step: int) -> KeepRate:
        rate = scheduled_keep_rate(step, target, self.dense_steps, self.shrink_steps)
        return rounded_keep_rate(rate, target, self.levels) if self.levels else rate


class KeepRateCallback(TrainerCallback):
    """Train an EViT with `transformers.Trainer` under the paper's keep-rate schedule.

    Each optimizer step trains at its scheduled rate; evaluation and saved configurations always have the target,
    `model.config.keep_rate`. The rate depends only on the global step, so a resumed run continues where it stopped.

    Args:
        dense_epochs: epochs at keep rate 1.0, fractions allowed. The paper's default is 10, of 300.
        shrink_epochs: epochs from 1.0 to the target. The paper's default is 100, of 300.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[KeepRateCallback(1, 10)])
    """

    def __init__(self, dense_epochs: float = 10, shrink_epochs: float = 100) -> None:
        if min(dense_epochs, shrink_epochs) < 0:
            raise ValueError(
                f"`dense_epochs` and `shrink_epochs` must not be negative, got {dense_epochs} and {shrink_epochs}: "
                "pass 0 for no such phase."
            )
        self.dense_epochs = dense_epochs
        self.shrink_epochs = shrink_epochs
        self.steps_per_epoch: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the optimizer steps of an epoch."""
        for module in _scheduled_modules(kwargs["model"]):  # refuse other models before the first step
            if module.config.keep_rate is None:
                raise ValueError(
                    f"KeepRateCallback schedules a keep rate, but the model has `macs` {module.config.macs}: call "
                    "`reorganize(model, keep_rate=0.7)` first, or leave out the callback."
                )
        batches = kwargs["train_dataloader"]
        try:
            num_batches = len(batches)
        except TypeError:
            raise ValueError(
                "KeepRateCallback counts in epochs, but the training data has no length: use a map-style dataset."
            ) from None
        self.steps_per_epoch = math.ceil(num_batches / args.gradient_accumulation_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the rate at which this optimizer step trains."""
        for module in _scheduled_modules(kwargs["model"]):
            module.training_keep_rate = self.keep_rate(state.global_step, module.config.keep_rate)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the keep rate of the previous step to the training log."""
        model = kwargs.get("model")
        if model is None or logs is None or "loss" not in logs:
            return
        rate = self.keep_rate(max(state.global_step - 1, 0), _scheduled_modules(model)[0].config.keep_rate)
        logs["keep_rate"] = rate
        if state.log_history:
            history: list[dict[str, Any]] = state.log_history  # Transformers' annotation lacks the list
            history[-1]["keep_rate"] = rate

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the schedule: training without it uses the target."""
        for module in _scheduled_modules(kwargs["model"]):
            module.training_keep_rate = None

    def keep_rate(self, step: int, target: KeepRate) -> KeepRate:
        """Scheduled rate of an optimizer step, see `KeepRateSchedule`.

        Args:
            step: optimizer steps done so far.
            target: the model's own keep rate.

        Raises: RuntimeError before training has begun, as epochs have no length yet.
        """
        if self.steps_per_epoch is None:
            raise RuntimeError("Epochs have no length before training begins: call `on_train_begin` first.")
        schedule = KeepRateSchedule.in_epochs(target, self.dense_epochs, self.shrink_epochs, self.steps_per_epoch)
        return schedule.at(step)


def _scheduled_modules(model: nn.Module) -> list[Any]:
    """The EViT backbones inside a model, however it is wrapped (DDP, PEFT, remote code)."""
    modules = [module for module in model.modules() if hasattr(module, "training_keep_rate")]
    if not modules:
        raise ValueError(
            f"KeepRateCallback needs an EViT model, got {type(model).__name__}: "
            "load it with `EViTForImageClassification`."
        )
    return modules


__all__ = ["KeepRate", "KeepRateCallback", "KeepRateSchedule", "rounded_keep_rate", "scheduled_keep_rate"]
