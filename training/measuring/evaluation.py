"""Accuracy, GMACs and images per second of a model at one or several keep rates."""

import functools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from evit_hf.profiling import MacsFormula

from ..learning.teachers import Oracle
from ..screen import bar
from ..settings import Macs, budget_in_words, budget_of
from .machine import device_name
from .metrics import ClassificationCounts, MultiLabelCounts, binomial_standard_error
from .timing import Variant, alternate


KeepRate = float | Sequence[float] | Macs | None
# What `main_score` names, for the axis of a figure.
SCORE_TITLES = {"top1": "top-1 accuracy, %", "micro_f1": "micro F1, %"}


@dataclass(frozen=True)
class Measurement:
    """One set of weights at one keep rate, or at a share of the dense model's operations.

    Args:
        keep_rate: a number, one for each reorganization layer, or a share of operations.
        metrics: what `evaluate` returns.
        gmacs: of an image.
        images_per_second: median.
        device: name of the device.
        dtype: of the weights in the measurement of speed, and of autocast where it is on.
        batch_size: images of a batch in the measurement of speed.
        image_size: height and width, in pixels.
    """

    keep_rate: KeepRate
    metrics: dict[str, Any]
    gmacs: float
    images_per_second: float
    device: str
    dtype: str
    batch_size: int
    image_size: tuple[int, int]

    @property
    def name(self) -> str:
        """The keep rate or share of operations in words."""
        return "dense" if self.keep_rate == 1.0 else str(self.keep_rate)

    def as_json(self) -> dict[str, Any]:
        """One flat object for results.json and evaluation.json."""
        rest = {name: value for name, value in vars(self).items() if name not in ("keep_rate", "metrics")}
        return {**budget_of(self.keep_rate), **self.metrics, **rest, "image_size": list(self.image_size)}


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Iterable[dict[str, torch.Tensor]],
    keep_rate: KeepRate = None,
    oracle: Oracle | None = None,
) -> dict[str, Any]:
    """Evaluate a model, each image counted once on any number of processes.

    Args:
        accelerator: adds up the counts.
        model: left in the mode it was in.
        loader: see `evaluation_loader`.
        keep_rate: instead of the model's own; a share of operations too.
        oracle: chooses the tokens instead of the model's own attention.

    Returns: see `ClassificationCounts.summarize` and `MultiLabelCounts.summarize`.
    """
    # Without the wrapper that connects processes: it would wait for them in every forward.
    network = accelerator.unwrap_model(model)
    was_training = network.training
    network.eval()
    is_multi_label = network.config.problem_type == "multi_label_classification"
    counts_class = MultiLabelCounts if is_multi_label else ClassificationCounts
    counts = counts_class(network.config.num_labels, accelerator.device)
    title = "evaluating" if keep_rate is None else f"evaluating at {budget_in_words(keep_rate)}"
    for batch in bar(loader, desc=title, unit="batch", leave=False):
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        scores = oracle(batch["pixel_values"]) if oracle is not None else None
        logits = network(batch["pixel_values"], patch_scores=scores, **budget_of(keep_rate)).logits
        counts.add(logits, batch["labels"], batch["is_counted"])
        counts.counts["num_bad_images"] += batch["is_bad"].sum()
    network.train(was_training)
    return counts.summarize(accelerator)


def main_score(metrics: dict[str, Any]) -> tuple[str, float]:
    """Name and value of the metric that says which model is better: top-1, or micro F1 with several labels."""
    name = "top1" if "top1" in metrics else "micro_f1"
    return name, metrics[name]


@torch.no_grad()
def images_per_second(
    model: nn.Module,
    pixel_values: torch.Tensor,
    keep_rates: Sequence[KeepRate],
    rounds: int = 20,
) -> list[float]:
    """Speed of one model at several keep rates, in images per second: medians over rounds that alternate the rates.

    Args:
        model: left in the mode it was in.
        pixel_values: (batch_size, num_channels, height, width), on the model's device.
        keep_rates: what to compare, shares of operations too.
        rounds: measured rounds, after two that warm up.

    Returns: one number for each keep rate.
    """
    was_training = model.training
    model.eval()
    variants = [
        Variant(str(rate), functools.partial(model, pixel_values, **budget_of(rate)), 0, 0) for rate in keep_rates
    ]
    seconds = alternate(variants, pixel_values.device, rounds)
    model.train(was_training)
    return [len(pixel_values) / statistics.median(times) for times in seconds]


def compare_keep_rates(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Iterable[dict[str, torch.Tensor]],
    keep_rates: Sequence[KeepRate],
    timed_model: nn.Module | None = None,
) -> list[Measurement]:
    """Accuracy, cost and speed of one set of weights at several keep rates.

    Args:
        accelerator: see `evaluate`.
        model: as in training.
        loader: evaluation images; its first batch is used for the timing.
        keep_rates: what to compare, for example [1.0, 0.7] or [1.0, Macs(0.66)].
        timed_model: the same network by itself, which only the main process times; by default `model`.

    Returns: a measurement for each keep rate.
    """
    network = accelerator.unwrap_model(model) if timed_model is None else timed_model
    pixel_values = next(iter(loader))["pixel_values"].to(network.device)
    speeds = [float("nan")] * len(keep_rates)
    if accelerator.is_main_process:  # no other process disturbs the timing
        speeds = images_per_second(network, pixel_values, keep_rates)
    accelerator.wait_for_everyone()
    height, width = pixel_values.shape[-2:]
    dtype = str(network.dtype).removeprefix("torch.")
    if timed_model is None and accelerator.mixed_precision != "no":  # which stays around the forward
        dtype += f" with {accelerator.mixed_precision} autocast"
    # Only by the main process: one forward pass may be counted.
    formula = MacsFormula.of(network, (height, width)) if accelerator.is_main_process else None
    return [
        Measurement(
            keep_rate=keep_rate,
            metrics=evaluate(accelerator, model, loader, keep_rate),
            gmacs=float("nan") if formula is None else formula(**budget_of(keep_rate)) / 1e9,
            images_per_second=speed,
            device=device_name(network.device),
            dtype=dtype,
            batch_size=len(pixel_values),
            image_size=(height, width),
        )
        for keep_rate, speed in zip(keep_rates, speeds, strict=True)
    ]


def comparison_table(results: Sequence[Measurement]) -> str:
    """The results of `compare_keep_rates` as text, one line for each keep rate, the first one as the baseline."""
    first = results[0]
    has_top1 = "top1" in first.metrics
    columns = {"top1": "top-1 %", "top5": "top-5 %"} if has_top1 else {"micro_f1": "F1 %", "exact_match": "all %"}
    lines = [
        f"{first.metrics['num_images']} images, {first.device}, {first.dtype}, batch {first.batch_size}, "
        f"{first.image_size[0]}x{first.image_size[1]} pixels",
        f"{'keep rate':<20}{''.join(f'{title:>9}' for title in columns.values())}"
        f"{'GMACs':>10}{'MACs':>8}{'images/s':>10}{'speed':>8}",
    ]
    for result in results:
        name = "1.0 (dense ViT)" if result.keep_rate == 1.0 else result.name
        lines.append(
            f"{name:<20}{''.join(f'{100 * result.metrics[column]:>9.2f}' for column in columns)}{result.gmacs:>10.4f}"
            f"{result.gmacs / first.gmacs:>7.2f}x{result.images_per_second:>10.0f}"
            f"{result.images_per_second / first.images_per_second:>7.2f}x"
        )
    return "\n".join(lines)


def draw_tradeoff(results: Sequence[Measurement], path: Path) -> None:
    """Draw the main score against GMACs, one point for each keep rate, with the standard error of an accuracy.

    The axis of the score covers at least eight standard errors, so that one image more or less stays a small step.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    name, _ = main_score(results[0].metrics)
    results = sorted(results, key=lambda result: result.gmacs)
    num_images = results[0].metrics["num_images"]
    gmacs, scores = [result.gmacs for result in results], [100 * result.metrics[name] for result in results]
    errors = [100 * binomial_standard_error(score / 100, num_images) for score in scores]
    axes.errorbar(gmacs, scores, errors if name == "top1" else None, marker="o", capsize=4)
    for result, x, y, error in zip(results, gmacs, scores, errors, strict=True):
        above = y + error if name == "top1" else y
        axes.annotate(result.name, (x, above), textcoords="offset points", xytext=(0, 5), ha="center", fontsize=11)
    middle, half = (max(scores) + min(scores)) / 2, (max(scores) - min(scores)) / 2
    half = max(1.5 * (half + max(errors)), 4 * max(errors), 0.5)
    high = min(middle + half, 100 + 0.2 * half)
    axes.set_ylim(high - 2 * half, high)
    axes.margins(x=0.1)
    axes.set_xlabel("GMACs of an image", fontsize=12)
    axes.set_ylabel(SCORE_TITLES[name], fontsize=12)
    bars = ", bars: 1 standard error" if name == "top1" else ""
    axes.set_title(f"{num_images} images; labels: keep rate or macs{bars}", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
