"""Layers and keep rates for a budget, without retraining: `evit tune MODEL TARGET --dataset DATA`.

A greedy search. All layers but the first and the last may reorganize; it starts from the dense model and, step by
step, lowers the keep rate of the layer where an operation saved costs least on the calibration images, until the
target is met. One rate for the layers that the paper takes is measured too, and the better of the two wins.
"""

import copy
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from evit_hf.checkpoint_files import set_modes_by_umask
from evit_hf.configuration_evit import default_reorganization_layers
from evit_hf.profiling import MacsFormula
from evit_hf.reorganization import reorganize
from evit_hf.towers import tower_of

from ..arguments import DataArguments
from ..data.loaders import batches
from ..data.splits import load_evaluation_split, with_classes_of
from ..learning.models import load_classifier, load_processor
from ..screen import say, show_result
from ..settings import make_output_dir
from .arguments import Target, TuneArguments, parse_target
from .machine import best_device
from .timing import Variant, alternate


STEP = 0.1
LOWEST_KEEP_RATE = 0.3


@dataclass(frozen=True)
class Candidate:
    """Layers and keep rates, and what they cost and give.

    Args:
        reorganization_layers: zero-based.
        keep_rate: one for each of them.
        gmacs: of an image.
        ms: for a batch.
        loss: mean cross-entropy on the calibration images.
        accuracy: share of right answers on them.
    """

    reorganization_layers: list[int]
    keep_rate: list[float]
    gmacs: float
    ms: float
    loss: float
    accuracy: float


def tune(name: str, target: str, arguments: TuneArguments, data: DataArguments) -> dict[str, Any]:
    """Search, report, and save where asked.

    Args:
        name: folder or Hub id of a trained classifier.
        target: see `parse_target`.
        arguments: see `TuneArguments`.
        data: calibration images with labels, from the evaluation split.

    Returns: {"target", "num_images", "dense", "tuned", "paper_layers", "chosen"}; candidates as dictionaries.

    Raises: ValueError for a target that cannot be read or reached.
    """
    goal = parse_target(target)
    make_output_dir(arguments.output_dir)
    device = best_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = load_classifier(name).eval().to(device)
    if model.config.problem_type == "multi_label_classification":
        raise ValueError("`evit tune` weighs layers by cross-entropy, and this model can give several labels.")
    splits = with_classes_of(model, load_evaluation_split(data))
    processor = load_processor(name)
    calibration = [
        (images.to(device), labels.to(device))
        for images, labels in batches(splits, "evaluation", processor, arguments.images)
    ]

    def milliseconds(settings: Sequence[dict[int, float]]) -> list[float]:
        images = calibration[0][0]
        images = images.repeat(-(-arguments.batch_size // len(images)), 1, 1, 1)[: arguments.batch_size]
        return measured_milliseconds(model, images, settings, device, arguments.rounds, arguments.clock)

    cost, settings = search(model, calibration, goal, target, milliseconds)
    candidates, lines = {}, []
    for (key, rates), ms in zip(settings.items(), milliseconds(list(settings.values())), strict=True):
        loss, accuracy = loss_and_accuracy(model, calibration, rates)
        layers = sorted(rates)
        candidates[key] = Candidate(layers, [rates[layer] for layer in layers], cost(rates) / 1e9, ms, loss, accuracy)
        lines.append(
            f"{key}: layers {layers}, keep rates {candidates[key].keep_rate}, {candidates[key].gmacs:.3f} GMACs, "
            f"{ms:.1f} ms for {arguments.batch_size} images, loss {loss:.4f}, accuracy {100 * accuracy:.2f} %"
        )
    chosen = choose(candidates, goal)
    num_images = sum(len(labels) for _, labels in calibration)
    report = {"target": target, "num_images": num_images, **{key: asdict(one) for key, one in candidates.items()}}
    report["chosen"] = chosen
    show_result("\n".join([*lines, f"Chosen: {chosen}"]), report)
    save(report, arguments, model, settings[chosen], processor)
    return report


def search(
    model: PreTrainedModel,
    calibration: list[Any],
    goal: Target,
    target: str,
    milliseconds: Callable[[Sequence[dict[int, float]]], list[float]],
) -> tuple[Callable[[dict[int, float]], float], dict[str, dict[int, float]]]:
    """Find what meets the target.

    Returns: operations of a setting as a function, and settings by name: "dense", "tuned", and "paper_layers" where
        one rate in the paper's layers meets the target.
    """
    cost, budget = cost_and_budget(model, tuple(calibration[0][0].shape[-2:]), goal, milliseconds)
    say(f"Target {target}: at most {budget / 1e9:.3f} GMACs of {cost({}) / 1e9:.3f}.")
    tuned = greedy(model, calibration, cost, budget, say)
    paper = uniform(model, cost, budget)
    return cost, {"dense": {}, "tuned": tuned, **({"paper_layers": paper} if paper else {})}


def choose(candidates: dict[str, Candidate], goal: Target) -> str:
    """Name of the candidate with the least loss, the dense model left out.

    Raises: ValueError if it misses a target in milliseconds by more than 5 %.
    """
    chosen = min((key for key in candidates if key != "dense"), key=lambda key: candidates[key].loss)
    if goal.kind == "ms" and candidates[chosen].ms > 1.05 * goal.amount:
        raise ValueError(
            f"The target of {goal.amount} ms was missed: {candidates[chosen].ms:.1f} ms. Times do not follow "
            "operations that far on this device: try larger batches, or a target in GMACs."
        )
    return chosen


def save(
    report: dict[str, Any],
    arguments: TuneArguments,
    model: PreTrainedModel,
    rates: dict[int, float],
    processor: BaseImageProcessor,
) -> None:
    """Write tune.json and the model with the chosen layers and keep rates, where asked."""
    if arguments.output_dir:
        (Path(arguments.output_dir) / "tune.json").write_text(json.dumps(report, indent=2) + "\n")
    if arguments.save:
        set_rates(model, rates)
        model.save_pretrained(arguments.save)
        processor.save_pretrained(arguments.save)
        set_modes_by_umask(Path(arguments.save))
        say(f"Saved the model with these settings in {arguments.save}.")


def cost_and_budget(
    model: PreTrainedModel,
    image_size: tuple[int, int],
    goal: Target,
    milliseconds: Callable[[Sequence[dict[int, float]]], list[float]],
) -> tuple[Callable[[dict[int, float]], float], float]:
    """Operations of a setting as a function, and how many of them the target allows.

    Args:
        model: to be tuned.
        image_size: height and width, in pixels.
        goal: the target.
        milliseconds: time of a batch in each of some settings.

    A time becomes operations along a line through three measured points: dense, 0.7 and 0.5 in the paper's layers.

    Raises: ValueError for a target beyond reach.
    """
    cost = MacsFormula.of(model, image_size)
    dense, lowest = cost({}), cost({layer: LOWEST_KEEP_RATE for layer in candidate_layers(model)})
    if goal.kind == "ms":
        layers = default_reorganization_layers(len(tower_of(model).layers))
        points = [{}, *({layer: rate for layer in layers} for rate in (0.7, 0.5))]
        times, costs = milliseconds(points), [cost(point) for point in points]
        slope, intercept = statistics.linear_regression(times, costs)
        budget = slope * goal.amount + intercept
    else:
        budget = goal.amount * (dense if goal.kind == "share" else 1e9)
    if budget >= dense:
        raise ValueError("The dense model meets this target already: there is nothing to tune.")
    if budget < lowest:
        raise ValueError(
            f"No setting gets there: the lowest keep rates cost {lowest / 1e9:.3f} GMACs, the target allows "
            f"{budget / 1e9:.3f}. Take a smaller model or smaller images."
        )
    return cost, budget


def candidate_layers(model: PreTrainedModel) -> list[int]:
    """Layers that may reorganize: in the first one the class token has not looked at anything yet."""
    return list(range(1, len(tower_of(model).layers) - 1)) or [0]


def greedy(
    model: PreTrainedModel,
    calibration: list[Any],
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
    model: PreTrainedModel, cost: Callable[[dict[int, float]], float], budget: float
) -> dict[int, float] | None:
    """One rate in the paper's layers, the highest in hundredths that meets the budget; None if there is none."""
    layers = default_reorganization_layers(len(tower_of(model).layers))
    for hundredths in range(99, 0, -1):
        rates = {layer: hundredths / 100 for layer in layers}
        if cost(rates) <= budget:
            return rates
    return None


def set_rates(model: PreTrainedModel, rates: dict[int, float]) -> None:
    """Give a model layers and their keep rates, in the place of a share of operations if it has one; {} is dense."""
    if rates:
        layers = sorted(rates)
        reorganize(model, [rates[layer] for layer in layers], reorganization_layers=layers)
    else:
        reorganize(model, 1.0)


@torch.no_grad()
def loss_and_accuracy(model: PreTrainedModel, calibration: list[Any], rates: dict[int, float]) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers on the calibration images."""
    set_rates(model, rates)
    loss = right = total = 0.0
    for images, labels in calibration:
        logits = model(images).logits.float()
        loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
        total += len(labels)
    return loss / total, right / total


def measured_milliseconds(
    model: PreTrainedModel,
    images: torch.Tensor,
    settings: Sequence[dict[int, float]],
    device: torch.device,
    rounds: int,
    clock_name: str,
) -> list[float]:
    """Median time of a batch in each setting, taken in turns."""

    def runner(rates: dict[int, float]) -> Callable[[], None]:
        fixed = copy.deepcopy(model)
        set_rates(fixed, rates)

        def run() -> None:
            with torch.no_grad():
                fixed(images)

        return run

    variants = [Variant(str(rates), runner(rates), 0, 0) for rates in settings]
    times = alternate(variants, device, rounds, clock_name=clock_name)
    return [1000 * statistics.median(seconds) for seconds in times]
