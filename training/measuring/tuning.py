"""Layers and keep rates for a budget, without retraining: `evit benchmark MODEL --tune TARGET --dataset DATA`.

A greedy search. All layers but the first and the last may reorganize; it begins with the dense model and, step by
step, lowers the keep rate of the layer where an operation saved costs least on the calibration images, until the
target is met. One rate for the layers that the paper takes is measured too, and the better of the two wins.
"""

import copy
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evit_hf import EViTPreTrainedModel
from evit_hf.configuration_evit import default_reorganization_layers
from evit_hf.profiling import num_macs

from ..arguments import DataArguments
from .timing import Variant, alternate


if TYPE_CHECKING:
    from .benchmark import BenchmarkArguments


STEP = 0.1
LOWEST_KEEP_RATE = 0.3


def tune(name: str, arguments: "BenchmarkArguments", data: DataArguments) -> dict[str, Any]:
    """Search, report, and save where asked.

    Args:
        name: folder or Hub id of a trained classifier.
        arguments: `tune`, `tune_images`, `save`, `output_dir`, `batch_sizes[0]`, `device`, `threads[0]`.
        data: calibration images with labels, from the evaluation split.

    Returns: {"target", "dense", "tuned", "paper_layers", "chosen"}; each candidate with `reorganization_layers`,
        `keep_rate`, `gmacs`, `ms`, `loss` and `accuracy`.

    Raises: ValueError for a target that cannot be read or reached.
    """
    from transformers import AutoImageProcessor

    from ..data.loaders import batches
    from ..data.splits import load_evaluation_split, with_classes_of
    from ..learning.models import load_classifier
    from .machine import best_device

    kind, amount = parse_target(arguments.tune)
    device = torch.device(arguments.device) if arguments.device else best_device()
    if arguments.threads:
        torch.set_num_threads(arguments.threads[0])
    model = load_classifier(name).eval().to(device)
    if model.config.problem_type == "multi_label_classification":
        raise ValueError("`--tune` weighs layers by cross-entropy, and this model can give several labels.")
    splits = with_classes_of(model, load_evaluation_split(data))
    processor = AutoImageProcessor.from_pretrained(name)
    calibration = [
        (images.to(device), labels.to(device))
        for images, labels in batches(splits, "evaluation", processor, arguments.tune_images)
    ]
    dense_macs = num_macs(model.config, 1.0)

    def milliseconds(settings: Sequence[dict[int, float]]) -> list[float]:
        images = calibration[0][0]
        images = images.repeat(-(-arguments.batch_sizes[0] // len(images)), 1, 1, 1)[: arguments.batch_sizes[0]]
        return measured_milliseconds(model, images, settings, device, arguments.rounds, arguments.clock)

    cost, budget = cost_and_budget(model, kind, amount, milliseconds)
    say = sys.stdout.write
    say(f"Target {arguments.tune}: at most {budget / 1e9:.3f} GMACs of {dense_macs / 1e9:.3f}.\n")
    tuned = greedy(model, calibration, cost, budget, lambda line: say(f"{line}\n"))
    paper = uniform(model, cost, budget)
    candidates = {"dense": {}, "tuned": tuned, **({"paper_layers": paper} if paper else {})}
    times = milliseconds(list(candidates.values()))
    report: dict[str, Any] = {"target": arguments.tune, "num_images": sum(len(labels) for _, labels in calibration)}
    for (key, rates), time in zip(candidates.items(), times, strict=True):
        loss, accuracy = loss_and_accuracy(model, calibration, rates)
        report[key] = {
            "reorganization_layers": sorted(rates),
            "keep_rate": [rates[layer] for layer in sorted(rates)],
            "gmacs": cost(rates) / 1e9,
            "ms": time,
            "loss": loss,
            "accuracy": accuracy,
        }
        say(
            f"{key}: layers {sorted(rates)}, keep rates {report[key]['keep_rate']}, {cost(rates) / 1e9:.3f} GMACs, "
            f"{time:.1f} ms for {arguments.batch_sizes[0]} images, loss {loss:.4f}, accuracy {100 * accuracy:.2f} %\n"
        )
    report["chosen"] = min((key for key in candidates if key != "dense"), key=lambda key: report[key]["loss"])
    if kind == "ms" and report[report["chosen"]]["ms"] > 1.05 * amount:
        raise ValueError(
            f"The target of {amount} ms was missed: {report[report['chosen']]['ms']:.1f} ms. Times do not follow "
            "operations that far on this device: try larger batches, or a target in GMACs."
        )
    say(f"Chosen: {report['chosen']}\n")
    if arguments.output_dir:
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(arguments.output_dir) / "tune.json").write_text(json.dumps(report, indent=2) + "\n")
    if arguments.save:
        apply(model, candidates[report["chosen"]])
        model.save_pretrained(arguments.save)
        processor.save_pretrained(arguments.save)
        say(f"Saved the model with these settings in {arguments.save}.\n")
    return report


def parse_target(text: str) -> tuple[str, float]:
    """Kind ("share", "gmacs" or "ms") and amount of a target such as 0.6, 2.5gmacs or 40ms.

    Raises: ValueError for anything else.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(gmacs|ms)?", text.strip().lower())
    kind = (match.group(2) or "share") if match else ""
    if not match or float(match.group(1)) <= 0 or (kind == "share" and float(match.group(1)) >= 1):
        raise ValueError(
            f"`--tune` must be a share of the dense operations below 1 (0.6), an amount of them (2.5gmacs) or a time "
            f"for one batch (40ms), got {text!r}."
        )
    return kind, float(match.group(1))


def cost_and_budget(
    model: EViTPreTrainedModel,
    kind: str,
    amount: float,
    milliseconds: Callable[[Sequence[dict[int, float]]], list[float]],
) -> tuple[Callable[[dict[int, float]], float], float]:
    """Operations of a setting as a function, and how many of them the target allows.

    A time becomes operations along a line through three measured points: dense, 0.7 and 0.5 in the paper's layers.

    Raises: ValueError for a target beyond reach.
    """

    def cost(rates: dict[int, float]) -> float:
        config = copy.deepcopy(model.config)
        set_rates(config, rates)
        return num_macs(config)

    dense, lowest = cost({}), cost({layer: LOWEST_KEEP_RATE for layer in candidate_layers(model)})
    budget = {"share": amount * dense, "gmacs": amount * 1e9}.get(kind)
    if budget is None:
        layers = default_reorganization_layers(model.config.num_hidden_layers)
        points = [{}, *({layer: rate for layer in layers} for rate in (0.7, 0.5))]
        times, costs = milliseconds(points), [cost(point) for point in points]
        slope, intercept = statistics.linear_regression(times, costs)
        budget = slope * amount + intercept
    if budget >= dense:
        raise ValueError("The dense model meets this target already: there is nothing to tune.")
    if budget < lowest:
        raise ValueError(
            f"No setting gets there: the lowest keep rates cost {lowest / 1e9:.3f} GMACs, the target allows "
            f"{budget / 1e9:.3f}. Take a smaller model or smaller images."
        )
    return cost, budget


def candidate_layers(model: EViTPreTrainedModel) -> list[int]:
    """Layers that may reorganize: in the first one the class token has not looked at anything yet."""
    return list(range(1, model.config.num_hidden_layers - 1)) or [0]


def greedy(
    model: EViTPreTrainedModel,
    calibration: list,
    cost: Callable[[dict[int, float]], float],
    budget: float,
    say: Callable[[str], Any],
) -> dict[int, float]:
    """Keep rates by layer that meet the budget, found step by step."""
    rates: dict[int, float] = {}
    loss, spent = loss_and_accuracy(model, calibration, rates)[0], cost(rates)
    while spent > budget:
        steps = []
        for layer in candidate_layers(model):
            candidate, saved = next_step(rates, layer, cost, spent)
            if candidate is None:
                continue
            new_loss, _ = loss_and_accuracy(model, calibration, candidate)
            # Of the last step only what the target asks for counts as saved.
            steps.append(((new_loss - loss) / min(saved, spent - budget), new_loss, candidate))
        if not steps:
            raise ValueError("No step leads on: the target is out of reach for rates of at least 0.3.")
        _, loss, rates = min(steps, key=lambda step: step[0])
        spent = cost(rates)
        say(f"  {rates}: {spent / 1e9:.3f} GMACs, loss {loss:.4f}")
    return rates


def next_step(
    rates: dict[int, float], layer: int, cost: Callable[[dict[int, float]], float], spent: float
) -> tuple[dict[int, float] | None, float]:
    """The rates with that layer's lowered until it saves something, and what it saves; None where nothing does.

    In a small grid a step can be less than a token, or no more than the fused token that comes with it.
    """
    rate = rates.get(layer, 1.0)
    while (rate := round(rate - STEP, 6)) >= LOWEST_KEEP_RATE:
        candidate = {**rates, layer: rate}
        if (saved := spent - cost(candidate)) > 0:
            return candidate, saved
    return None, 0.0


def uniform(
    model: EViTPreTrainedModel, cost: Callable[[dict[int, float]], float], budget: float
) -> dict[int, float] | None:
    """One rate in the paper's layers, the highest in hundredths that meets the budget; None if there is none."""
    layers = default_reorganization_layers(model.config.num_hidden_layers)
    for hundredths in range(99, 0, -1):
        rates = {layer: hundredths / 100 for layer in layers}
        if cost(rates) <= budget:
            return rates
    return None


def set_rates(config: Any, rates: dict[int, float]) -> None:
    """Put layers and keep rates into a configuration."""
    config.keep_rate = 1.0  # one number fits any list of layers
    config.reorganization_layers = sorted(rates)
    config.keep_rate = [rates[layer] for layer in sorted(rates)] or 1.0


def apply(model: EViTPreTrainedModel, rates: dict[int, float]) -> None:
    """Put layers and keep rates into a model."""
    set_rates(model.config, rates)


@torch.no_grad()
def loss_and_accuracy(model: EViTPreTrainedModel, calibration: list, rates: dict[int, float]) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers on the calibration images."""
    apply(model, rates)
    loss = right = total = 0.0
    for images, labels in calibration:
        logits = model(images).logits.float()
        loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
        total += len(labels)
    return loss / total, right / total


def measured_milliseconds(
    model: EViTPreTrainedModel,
    images: torch.Tensor,
    settings: Sequence[dict[int, float]],
    device: torch.device,
    rounds: int,
    clock_name: str,
) -> list[float]:
    """Median time of a batch in each setting, taken in turns."""

    def runner(rates: dict[int, float]) -> Callable[[], None]:
        fixed = copy.deepcopy(model)
        apply(fixed, rates)

        def run() -> None:
            with torch.no_grad():
                fixed(images)

        return run

    variants = [Variant(str(rates), runner(rates), 0, 0) for rates in settings]
    times = alternate(variants, device, rounds, clock_name=clock_name)
    return [1000 * statistics.median(seconds) for seconds in times]
