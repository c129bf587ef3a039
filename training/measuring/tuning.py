"""Layers and keep rates for a budget, without retraining: `evit tune MODEL TARGET --dataset DATA`.

Judged by labels it is a greedy search. All layers but the first and the last may reorganize; it starts from the dense
model and, step by step, lowers the keep rate of the layer where an operation saved costs least on the calibration
images, until the target is met. One rate for the layers that the paper takes is measured too, and the better wins.

Judged by the dense model it starts from the recipe for models that were not trained to lose tokens (see `recipes`),
and compares it with its neighbours. What is left open there makes little difference, so it takes a minute, not hours.
"""

import copy
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from evit_hf.checkpoint_files import set_modes_by_umask
from evit_hf.configuration_evit import default_reorganization_layers
from evit_hf.profiling import MacsFormula
from evit_hf.reorganization import reorganize
from evit_hf.token_reorganization import tokens_left_at_macs
from evit_hf.towers import tower_of

from ..arguments import DataArguments
from ..data.augmentation import ProcessorTransform, load_processor
from ..data.folders import picture_files, pictures_below
from ..data.images import decoded
from ..data.loaders import batches
from ..data.sources import is_dataset_folder
from ..data.splits import load_evaluation_split, with_classes_of
from ..learning.models import keep_rates_of, load_classifier, was_reorganized
from ..screen import say, show_result
from ..settings import check_new_folder, make_output_dir
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
        loss: mean cross-entropy on the calibration images, with the labels or with the dense model's probabilities.
        accuracy: share of right answers on them, or of answers that are the dense model's.
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
        data: calibration images from the evaluation split, with labels if these are to judge.

    Returns: {"target", "judge", "num_images", "inattentive_tokens", candidates by name, "chosen"}; candidates, "dense"
        among them, as dictionaries.

    Raises: ValueError for a target that cannot be read or reached.
    """
    goal = parse_target(target)
    make_output_dir(arguments.output_dir)
    if arguments.save:
        check_new_folder(arguments.save)
    device = best_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = load_classifier(name).eval().to(device)
    if model.config.problem_type == "multi_label_classification":
        raise ValueError("`evit tune` weighs layers by cross-entropy, and this model can give several labels.")
    judge = arguments.judge or ("dense" if is_untrained(model, name) else "labels")
    processor = load_processor(name)
    if judge == "dense":
        reorganize(model, 1.0, inattentive_tokens="counted")
        calibration = answered_by(model, unlabelled(data, processor, arguments.images), device)
    else:
        splits = with_classes_of(model, load_evaluation_split(data))
        calibration = [
            (images.to(device), labels.to(device))
            for images, labels in batches(splits, "evaluation", processor, arguments.images)
        ]

    def milliseconds(settings: Sequence[dict[int, float]]) -> list[float]:
        images = calibration[0][0]
        images = images.repeat(-(-arguments.batch_size // len(images)), 1, 1, 1)[: arguments.batch_size]
        return measured_milliseconds(model, images, settings, device, arguments.rounds, arguments.clock)

    cost, settings = search(model, calibration, goal, target, milliseconds, judge)
    candidates, lines = {}, []
    for (key, rates), ms in zip(settings.items(), milliseconds(list(settings.values())), strict=True):
        loss, accuracy = loss_and_accuracy(model, calibration, rates)
        layers = sorted(rates)
        candidates[key] = Candidate(layers, [rates[layer] for layer in layers], cost(rates) / 1e9, ms, loss, accuracy)
        lines.append(
            f"{key}: layers {layers}, keep rates {[round(rates[layer], 3) for layer in layers]}, "
            f"{candidates[key].gmacs:.3f} GMACs, {ms:.1f} ms for {arguments.batch_size} images, loss {loss:.4f}, "
            f"{100 * accuracy:.2f} % {'answers as dense' if judge == 'dense' else 'right'}"
        )
    chosen = choose(candidates, goal)
    num_images = sum(len(labels) for _, labels in calibration)
    report: dict[str, Any] = {"target": target, "judge": judge, "num_images": num_images}
    report["inattentive_tokens"] = tower_of(model).config.inattentive_tokens
    report |= {key: asdict(one) for key, one in candidates.items()}
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
    judge: str = "labels",
) -> tuple[Callable[[dict[int, float]], float], dict[str, dict[int, float]]]:
    """Find what meets the target.

    Returns: operations of a setting as a function, and settings by name: "dense", then what `recipes` returns or
        "tuned", and "paper_layers" where one rate in the paper's layers meets the target.
    """
    cost, budget = cost_and_budget(model, tuple(calibration[0][0].shape[-2:]), goal, milliseconds)
    say(f"Target {target}: at most {budget / 1e9:.3f} GMACs of {cost({}) / 1e9:.3f}.")
    if judge == "dense":
        found = recipes(model, tuple(calibration[0][0].shape[-2:]), cost, budget)
    else:
        found = {"tuned": greedy(model, calibration, cost, budget, say)}
    paper = uniform(model, cost, budget)
    return cost, {"dense": {}, **found, **({"paper_layers": paper} if paper else {})}


def is_untrained(model: PreTrainedModel, name: str) -> bool:
    """Whether a model was not trained to lose tokens: it has no keep rate of its own, or a share of operations."""
    config = tower_of(model).config
    return not was_reorganized(name) or config.macs is not None or config.keep_rate == 1.0


def unlabelled(data: DataArguments, processor: BaseImageProcessor, limit: int) -> Iterator[torch.Tensor]:
    """Images as a model sees them, 32 at a time, of data with or without labels.

    Args:
        data: a folder with pictures in it, of which some from all over it are taken, or a data set with labels, which
            are not looked at.
        processor: of the model.
        limit: images at most.
    """
    words = [Path(word) for word in data.dataset]
    if not all(word.is_dir() and not is_dataset_folder(word) and has_loose_pictures(word) for word in words):
        for images, _ in batches(load_evaluation_split(data), "evaluation", processor, limit):
            yield images
        return
    files = list(picture_files(data.dataset).items())
    files = files[:: -(-len(files) // limit)]
    transform = ProcessorTransform(processor)
    for start in range(0, len(files), 32):
        pictures = [decoded({"bytes": None, "path": path}, f"`{name}`") for name, path in files[start : start + 32]]
        yield torch.stack([torch.as_tensor(transform(picture)) for picture in pictures])


def has_loose_pictures(folder: Path) -> bool:
    """Whether pictures are right in a folder, rather than in class folders."""
    return any(len(inside) == 1 for inside in pictures_below(folder)[0])


@torch.no_grad()
def answered_by(model: PreTrainedModel, images: Iterable[torch.Tensor], device: torch.device) -> list[Any]:
    """Batches with the probabilities that the dense model gives the classes, in the place of labels."""
    moved = (batch.to(device) for batch in images)
    return [(batch, model(batch, keep_rate=1.0).logits.float().softmax(-1)) for batch in moved]


def recipes(
    model: PreTrainedModel, image_size: tuple[int, int], cost: Callable[[dict[int, float]], float], budget: float
) -> dict[str, dict[int, float]]:
    """The recipe of `macs=` and its neighbours at a budget, as keep rates by layer of a model with counted tokens.

    The recipe gives up the same number of tokens in every layer down to 16. Its neighbours begin later, take every
    second layer, or keep more. Those out of reach are left out.

    Raises: ValueError if the recipe is out of reach.
    """
    tower = tower_of(model)
    rows, columns = tower.patch_grid(image_size)
    layers, num_patches = range(len(tower.layers)), rows * columns
    # Operations outside of the layers cannot be saved.
    dense = tower.costs.macs(num_patches, {})
    share = (budget - cost({}) + dense) / dense
    found = {"recipe": keep_rates_of(tokens_left_at_macs(share, num_patches, layers, tower.costs), num_patches)}
    for name, some, min_tokens in (
        ("from_layer_1", layers[1:], None),
        ("from_layer_2", layers[2:], None),
        ("every_second_layer", layers[::2], None),
        ("at_least_32_tokens", layers, 32),
    ):
        try:
            left = tokens_left_at_macs(share, num_patches, some, tower.costs, min_tokens)
        except ValueError:
            continue
        found[name] = keep_rates_of(left, num_patches)
    return found


def choose(candidates: dict[str, Candidate], goal: Target) -> str:
    """Name of the candidate with the least loss that meets the target, the dense model left out.

    Raises: ValueError if all miss a target in milliseconds by more than 5 %.
    """
    others = {key: one for key, one in candidates.items() if key != "dense"}
    met = {key: one for key, one in others.items() if goal.kind != "ms" or one.ms <= 1.05 * goal.amount}
    if not met:
        fastest = min(one.ms for one in others.values())
        raise ValueError(
            f"The target of {goal.amount} ms was missed: {fastest:.1f} ms. Times do not follow operations that far on "
            "this device: try larger batches, or a target in GMACs."
        )
    return min(met, key=lambda key: met[key].loss)


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
    """Give a model layers and their keep rates; {} is dense.

    A share of operations gives way to them, and what becomes of the inattentive tokens goes with it.
    """
    if rates:
        layers = sorted(rates)
        reorganize(model, [rates[layer] for layer in layers], reorganization_layers=layers)
    else:
        reorganize(model, 1.0)


@torch.no_grad()
def loss_and_accuracy(model: PreTrainedModel, calibration: list[Any], rates: dict[int, float]) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers on the calibration images.

    Args:
        model: to be measured; it gets the keep rates.
        calibration: images, and class numbers or, (batch_size, num_labels), probabilities.
        rates: keep rates by layer.
    """
    set_rates(model, rates)
    loss = right = total = 0.0
    for images, labels in calibration:
        logits = model(images).logits.float()
        loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(-1) == (labels if labels.ndim == 1 else labels.argmax(-1))).sum().item()
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
