"""The paper's keep-rate schedule: a pure function of the optimizer step, and a callback for `transformers.Trainer`."""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def scheduled_keep_rate(
    step: int, keep_rate: float | Sequence[float], dense_steps: int, shrink_steps: int
) -> float | list[float]:
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

    Source: https://github.com/youweiliang/evit/blob/5ca95a7/helpers.py (`adjust_keep_rate`), which knows one rate for
        all layers; here each layer has its own target.
    """
    if min(step, dense_steps, shrink_steps) < 0:
        raise ValueError(
            "`step`, `dense_steps` and `shrink_steps` must not be negative, got "
            f"{step}, {dense_steps}, {shrink_steps}: pass 0 for no such phase."
        )
    if isinstance(keep_rate, (list, tuple)):
        return [scheduled_keep_rate(step, rate, dense_steps, shrink_steps) for rate in keep_rate]
    if step < dense_steps:
        return 1.0
    shrink_step = step - dense_steps
    if shrink_step >= shrink_steps:
        return float(keep_rate)
    return keep_rate + (1 - keep_rate) * (1 + math.cos(math.pi * shrink_step / shrink_steps)) / 2


def rounded_keep_rate(
    rate: float | Sequence[float], keep_rate: float | Sequence[float], levels: int
) -> float | list[float]:
    """Scheduled keep rate, rounded up to one of `levels` evenly spaced rates above the target, or the target itself.

    A schedule in few levels has few numbers of tokens: a compiled model is compiled once for each.

    Args:
        rate: what `scheduled_keep_rate` returned.
        keep_rate: target of the schedule, one number or one for each reorganization layer.
        levels: number of rates above the target; the highest is 1.0.

    Returns: a number, or a list if `keep_rate` is one. With target 0.6 and 4 levels 0.65 becomes 0.7.
    """
    if isinstance(keep_rate, (list, tuple)):
        rates = rate if isinstance(rate, (list, tuple)) else [rate] * len(keep_rate)
        return [rounded_keep_rate(x, target, levels) for x, target in zip(rates, keep_rate, strict=True)]
    if keep_rate == 1.0:
        return 1.0
    # The small number keeps a rate that is a level at that level, whatever the rounding of the division.
    level = math.ceil((rate - keep_rate) / (1 - keep_rate) * levels - 1e-9)
    return keep_rate + (1 - keep_rate) * level / levels if level else float(keep_rate)


class KeepRateCallback(TrainerCallback):
    """Train an EViT with `transformers.Trainer` under the paper's keep-rate schedule.

    Each optimizer step trains at its scheduled rate; evaluation and saved configurations always have the target,
    `model.config.keep_rate`. The rate depends on the global step alone, so a resumed run goes on where it stopped.

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
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Count the optimizer steps of an epoch."""
        _scheduled_modules(model)  # refuse other models before the first step
        batches = kwargs["train_dataloader"]
        try:
            num_batches = len(batches)
        except TypeError:
            raise ValueError(
                "KeepRateCallback counts in epochs, but the training data has no length: use a map-style dataset."
            ) from None
        self.steps_per_epoch = math.ceil(num_batches / args.gradient_accumulation_steps)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Set the rate at which this optimizer step trains."""
        for module in _scheduled_modules(model):
            module.training_keep_rate = self.keep_rate(state.global_step, module.config.keep_rate)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the keep rate of the step before to the training log."""
        model = kwargs.get("model")
        if model is None or logs is None or "loss" not in logs:
            return
        rate = self.keep_rate(max(state.global_step - 1, 0), _scheduled_modules(model)[0].config.keep_rate)
        logs["keep_rate"] = rate
        if state.log_history:
            state.log_history[-1]["keep_rate"] = rate

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """End the schedule: whoever trains on without it trains at the target."""
        for module in _scheduled_modules(model):
            module.training_keep_rate = None

    def keep_rate(self, step: int, target: float | Sequence[float]) -> float | list[float]:
        """Scheduled rate of an optimizer step, see `scheduled_keep_rate`."""
        dense_steps = round(self.dense_epochs * self.steps_per_epoch)
        shrink_steps = round(self.shrink_epochs * self.steps_per_epoch)
        return scheduled_keep_rate(step, target, dense_steps, shrink_steps)


def _scheduled_modules(model: nn.Module) -> list[nn.Module]:
    """The EViT backbones inside a model, however it is wrapped (DDP, PEFT, remote code)."""
    modules = [module for module in model.modules() if hasattr(module, "training_keep_rate")]
    if not modules:
        raise ValueError(
            f"KeepRateCallback needs an EViT model, got {type(model).__name__}: "
            "load it with `EViTForImageClassification`."
        )
    return modules


__all__ = ["KeepRateCallback", "rounded_keep_rate", "scheduled_keep_rate"]
