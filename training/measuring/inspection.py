"""What a model keeps over a data set: where, how alike at different keep rates, and what that does to answers."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evit_hf.profiling import MacsFormula
from evit_hf.token_maps import trace_tokens
from evit_hf.visualization import class_scores

from ..settings import Macs, budget_of
from .metrics import binomial_standard_error


KeepRate = float | Macs


@dataclass
class KeptAtRate:
    """Sums over images at one keep rate.

    Args:
        keep_rate: below 1, or a share of operations.
        kept: (num_stages, num_classes, num_patches), images of each class in which a patch is kept.
        kept_in_all: (num_stages, num_patches), the same for all images, each counted once.
        num_kept: (num_stages,), patches kept.
        shared_with_attention: (num_stages,), sum over images of the share of the kept patches that are among as many
            patches that the dense model attends to most.
        distances: of each image, between the answers of the dense model and this one, see `answer_distance`.
        answers: class numbers of each image, or rows of zeros and ones.
        scores: of the answers.
    """

    keep_rate: KeepRate
    kept: torch.Tensor
    kept_in_all: torch.Tensor
    num_kept: torch.Tensor
    shared_with_attention: torch.Tensor
    distances: list[float] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


@dataclass
class Inspection:
    """What was found; see `as_json` for the numbers.

    Args:
        label_names: classes of the data.
        layers: that give up tokens.
        grid: rows and columns of patches.
        rates: what was summed up at each keep rate.
        dense: answers of the dense model: class numbers, or rows of zeros and ones, with their scores.
        labels: of the images, as answers are, in the numbers of the data.
        places: number of each image in the data.
        num_bad_images: that could not be decoded.
        overlaps: sums over images, (num_stages, 2), for each pair of keep rates: intersection over union of the kept
            patches, and the share of the lower rate's that the higher one keeps too.
        gmacs: of an image, by keep rate, dense included.
        knows_classes: whether the labels are in the model's numbers.
    """

    label_names: list[str]
    layers: list[int]
    grid: tuple[int, int]
    rates: list[KeptAtRate]
    dense: list[Any]
    dense_scores: list[float]
    labels: list[Any]
    places: list[int]
    num_bad_images: int
    overlaps: dict[tuple[KeepRate, KeepRate], torch.Tensor]
    gmacs: dict[KeepRate, float]
    knows_classes: bool

    @property
    def num_images(self) -> int:
        """Images that were looked at."""
        return len(self.labels)

    def class_counts(self) -> torch.Tensor:
        """Images of each class, (num_classes,)."""
        counts = torch.zeros(len(self.label_names))
        for label in self.labels:
            if isinstance(label, list):
                counts += torch.tensor(label)
            else:
                counts[label] += 1
        return counts

    def accuracy(self, answers: Sequence[Any]) -> float | None:
        """Share of right answers (with several labels, of images with exactly these); None for unknown classes."""
        if not self.knows_classes:
            return None
        return sum(a == b for a, b in zip(answers, self.labels, strict=True)) / self.num_images

    def agreement(self, rate: KeptAtRate) -> float:
        """Share of images with the dense model's answer."""
        return sum(a == b for a, b in zip(rate.answers, self.dense, strict=True)) / self.num_images

    def most_different(self, num_images: int) -> list[tuple[KeptAtRate, int]]:
        """Images on which a keep rate answers most differently from the dense model, each once, the farthest first.

        Args:
            num_images: at most.

        Returns: the keep rate, and the image as its position among those looked at.
        """
        found = sorted(
            (
                (distance, -float(rate.keep_rate), i, rate)
                for rate in self.rates
                for i, distance in enumerate(rate.distances)
            ),
            key=lambda row: (-row[0], row[1], row[2]),
        )
        chosen: dict[int, KeptAtRate] = {}
        for distance, _, i, rate in found:
            if i not in chosen and distance > 0 and len(chosen) < num_images:
                chosen[i] = rate
        return [(rate, i) for i, rate in chosen.items()]

    def as_json(self, model_labels: Sequence[str], num_different: int) -> dict[str, Any]:
        """All numbers.

        Args:
            model_labels: names of the model's classes.
            num_different: images to name in `most_different`.
        """
        dense_accuracy = self.accuracy(self.dense)
        return {
            "num_images": self.num_images,
            "num_bad_images": self.num_bad_images,
            "grid": list(self.grid),
            "dense": {"keep_rate": 1.0, "gmacs": self.gmacs[1.0], "accuracy": dense_accuracy},
            "keep_rates": [self._rate_as_json(rate) for rate in self.rates],
            "overlap_between_keep_rates": [
                {
                    "macs" if isinstance(pair[0], Macs) else "keep_rates": [float(rate) for rate in pair],
                    "layer": layer,
                    "intersection_over_union": rounded(sums[i, 0] / self.num_images),
                    "share_of_the_lower_rate": rounded(sums[i, 1] / self.num_images),
                }
                for pair, sums in self.overlaps.items()
                for i, layer in enumerate(self.layers)
            ],
            "most_different": [
                {
                    "image": self.places[i],
                    **budget_of(rate.keep_rate),
                    "distance": rounded(rate.distances[i]),
                    "label": named(self.labels[i], self.label_names),
                    "dense_answer": named(self.dense[i], model_labels),
                    "dense_score": rounded(self.dense_scores[i]),
                    "answer": named(rate.answers[i], model_labels),
                    "score": rounded(rate.scores[i]),
                }
                for rate, i in self.most_different(num_different)
            ],
        }

    def _rate_as_json(self, rate: KeptAtRate) -> dict[str, Any]:
        agreement, counts = self.agreement(rate), self.class_counts()
        right = {}
        if self.knows_classes:
            pairs = list(zip(self.dense, rate.answers, self.labels, strict=True))
            right = {
                "right_only_dense": sum(dense == label != answer for dense, answer, label in pairs),
                "right_only_here": sum(answer == label != dense for dense, answer, label in pairs),
            }
        num_patches = self.grid[0] * self.grid[1]
        return {
            **budget_of(rate.keep_rate),
            "gmacs": self.gmacs[rate.keep_rate],
            "agreement": agreement,
            "agreement_standard_error": binomial_standard_error(agreement, self.num_images),
            "mean_distance": rounded(sum(rate.distances) / self.num_images),
            "accuracy": self.accuracy(rate.answers),
            **right,
            "stages": [
                {
                    "layer": layer,
                    "mean_patches_kept": rounded(rate.num_kept[i] / self.num_images),
                    "shared_with_dense_attention": rounded(rate.shared_with_attention[i] / self.num_images),
                    "shared_by_chance": rounded(rate.num_kept[i] / self.num_images / num_patches),
                    "survival": self._map(rate.kept_in_all[i] / self.num_images),
                    "survival_by_class": {
                        name: self._map(rate.kept[i, number] / counts[number])
                        for number, name in enumerate(self.label_names)
                        if counts[number]
                    },
                }
                for i, layer in enumerate(self.layers)
            ],
        }

    def _map(self, shares: torch.Tensor) -> list[list[float]]:
        return [[rounded(x) for x in row] for row in shares.view(self.grid).tolist()]


def rounded(number: Any) -> float:
    """Four digits after the point."""
    return round(float(number), 4)


def named(answer: Any, names: Sequence[str]) -> str:
    """A class by name, or several."""
    if isinstance(answer, list):
        return ", ".join(names[i] for i, x in enumerate(answer) if x) or "none"
    return names[answer]


def answer_distance(dense: torch.Tensor, other: torch.Tensor, is_multi_label: bool) -> torch.Tensor:
    """Distance between two answers of each image, in [0, 1].

    Args:
        dense: (batch_size, num_labels), probabilities.
        other: the same of a different model.
        is_multi_label: whether each class has its own probability.

    Returns: (batch_size,): the total variation distance, half of the sum of all differences; for several labels the
        largest difference.
    """
    difference = (dense - other).abs()
    return difference.amax(dim=1) if is_multi_label else difference.sum(dim=1) / 2


@torch.no_grad()
def inspect_model(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    keep_rates: Sequence[KeepRate],
    label_names: list[str],
    is_multi_label: bool,
    knows_classes: bool,
) -> Inspection:
    """Look at what a model keeps of the images of a data set.

    Args:
        model: an EViT, or a model that `reorganize` was called on, on its device and in evaluation mode.
        batches: {"pixel_values", "labels", "is_counted"}, see `evaluation_loader`.
        keep_rates: below 1, or shares of operations, without the dense model's 1.0.
        label_names: classes of the data.
        is_multi_label: whether labels are rows of zeros and ones.
        knows_classes: whether labels are in the model's numbers.

    Raises: ValueError if there are no images, or they differ in size.
    """
    found: Inspection | None = None
    device, place = next(model.parameters()).device, 0
    dense_rate = Macs(1.0) if isinstance(keep_rates[0], Macs) else 1.0  # with the same layers
    for batch in batches:
        counted = batch["is_counted"].bool()
        places = [place + i for i in counted.nonzero().flatten().tolist()]
        place += len(counted)
        if not places:
            continue
        pixel_values, labels = batch["pixel_values"][counted].to(device), batch["labels"][counted]
        dense = trace_tokens(model, pixel_values, **budget_of(dense_rate))
        if found is None:
            layers, grid = [stage.layer for stage in dense.stages], dense.grid
            size = tuple(pixel_values.shape[-2:])
            found = _nothing_yet(model, keep_rates, label_names, layers, grid, size, knows_classes)
        elif dense.grid != found.grid:
            raise ValueError(f"Images differ in size: {dense.grid} and {found.grid} patches.")
        _add(found, model, pixel_values, labels, dense, is_multi_label)
        found.places += places
    if found is None:
        raise ValueError("There is no image to look at.")
    found.num_bad_images = place - found.num_images
    return found


def _nothing_yet(
    model: nn.Module,
    keep_rates: Sequence[KeepRate],
    label_names: list[str],
    layers: list[int],
    grid: tuple[int, int],
    size: tuple[int, ...],
    knows_classes: bool,
) -> Inspection:
    formula, num_patches = MacsFormula.of(model, size), grid[0] * grid[1]
    zeros = [
        KeptAtRate(
            rate,
            torch.zeros(len(layers), len(label_names), num_patches),
            torch.zeros(len(layers), num_patches),
            torch.zeros(len(layers)),
            torch.zeros(len(layers)),
        )
        for rate in keep_rates
    ]
    pairs = [(a, b) for i, a in enumerate(keep_rates) for b in keep_rates[i + 1 :]]
    overlaps = {pair: torch.zeros(len(layers), 2) for pair in pairs}
    gmacs = {rate: formula(**budget_of(rate)) / 1e9 for rate in (1.0, *keep_rates)}
    return Inspection(label_names, layers, grid, zeros, [], [], [], [], 0, overlaps, gmacs, knows_classes)


def _add(
    found: Inspection,
    model: nn.Module,
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    dense: Any,
    is_multi_label: bool,
) -> None:
    """Add a batch."""
    stages, classes = range(len(found.layers)), labels
    if not is_multi_label:
        classes = nn.functional.one_hot(labels, len(found.label_names))
    dense_scores = class_scores(model, dense.output.logits).cpu()
    attention = [dense.attention(i).flatten(1).cpu() for i in stages]
    kept: dict[KeepRate, list[torch.Tensor]] = {}
    for rate in found.rates:
        trace = trace_tokens(model, pixel_values, **budget_of(rate.keep_rate))
        masks = kept[rate.keep_rate] = [trace.kept(i).flatten(1).cpu() for i in stages]
        scores = class_scores(model, trace.output.logits).cpu()
        for i in stages:
            rate.kept[i] += classes.float().T @ masks[i].float()
            rate.kept_in_all[i] += masks[i].sum(dim=0)
            num_kept = masks[i].sum(dim=1, keepdim=True)
            rate.num_kept[i] += num_kept.sum()
            ranks = attention[i].argsort(dim=1, descending=True).argsort(dim=1)
            shared = ((ranks < num_kept) & masks[i]).sum(dim=1)
            rate.shared_with_attention[i] += (shared / num_kept.flatten().clamp(min=1)).sum()
        rate.distances += answer_distance(dense_scores, scores, is_multi_label).tolist()
        answers, best = _answers(scores, is_multi_label)
        rate.answers += answers
        rate.scores += best
    for (a, b), sums in found.overlaps.items():
        for i in stages:
            both, either = (kept[a][i] & kept[b][i]).sum(dim=1), (kept[a][i] | kept[b][i]).sum(dim=1)
            sums[i, 0] += (both / either.clamp(min=1)).sum()
            sums[i, 1] += (both / kept[min(a, b)][i].sum(dim=1).clamp(min=1)).sum()
    answers, best = _answers(dense_scores, is_multi_label)
    found.dense += answers
    found.dense_scores += best
    found.labels += labels.long().tolist()


def _answers(scores: torch.Tensor, is_multi_label: bool) -> tuple[list[Any], list[float]]:
    if is_multi_label:
        return (scores > 0.5).long().tolist(), scores.amax(dim=1).tolist()
    best = scores.max(dim=1)
    return best.indices.tolist(), best.values.tolist()


def write_inspection(report: dict[str, Any], folder: Path) -> None:
    """Write the numbers into inspection.json."""
    (folder / "inspection.json").write_text(json.dumps(report, indent=1) + "\n")
