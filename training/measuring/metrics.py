"""Exact classification metrics, counted image by image and added up over processes."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn


# Above this many classes no confusion matrix is kept.
MAX_CONFUSION_CLASSES = 2000


def binomial_standard_error(share: float, num_images: int) -> float:
    """Standard error of a share of images, sqrt(share * (1 - share) / num_images).

    For a share of 0 or 1, where this would claim certainty, that of half an image from there.

    Args:
        share: in [0, 1].
        num_images: images that it is a share of.
    """
    edge = 0.5 / num_images
    share = min(max(share, edge), 1 - edge)
    return math.sqrt(share * (1 - share) / num_images)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of a mean, from the spread of the values; None for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


class Counts:
    """Counts that both kinds of classification have: images, right answers, predictions and labels of each class.

    Args:
        num_labels: number of classes.
        device: where to count.
    """

    def __init__(self, num_labels: int, device: torch.device | str = "cpu") -> None:
        self.num_labels = num_labels
        self.device = device
        self.counts = {
            **{name: self.zeros() for name in ("num_images", "num_bad_images")},
            **{name: self.zeros(num_labels) for name in ("hits", "support", "predicted")},
            # The longest floating-point type that the device has.
            "loss": self.zeros(dtype=torch.float32 if torch.device(device).type == "mps" else torch.float64),
        }

    def zeros(self, *shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        """A new count."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def add(self, logits: torch.Tensor, labels: torch.Tensor, is_counted: torch.Tensor | None = None) -> None:
        """Count a batch.

        Args:
            logits: (batch_size, num_labels).
            labels: (batch_size,) class numbers, or (batch_size, num_labels) zeros and ones where there are several.
            is_counted: (batch_size,), False for images that are only there to fill up.
        """
        if is_counted is not None:
            logits, labels = logits[is_counted], labels[is_counted]
        self.counts["num_images"] += len(labels)
        self._add(logits.float(), labels)

    def summarize(self, accelerator: Accelerator | None = None) -> dict[str, Any]:
        """Add up over processes and divide.

        Args:
            accelerator: connects the processes; None for one.

        Returns: what `_summarize` of the kind returns, and {"macro_f1", "loss", "num_images", "num_bad_images",
            "by_class", "confusion_matrix"}. Fractions; `by_class` is a list of {"precision", "recall", "f1",
            "support"}, 0.0 where nothing was predicted or there, and means over classes take only those that are
            there; `confusion_matrix[true][predicted]` counts images, None where it is not kept.

        Raises: ValueError if nothing was counted.
        """
        counts = {name: _summed(count, accelerator) for name, count in self.counts.items()}
        num_images = int(counts["num_images"].item())
        if num_images == 0:
            raise ValueError("No image was evaluated.")
        hits, support, predicted = (counts[name].double() for name in ("hits", "support", "predicted"))
        precision, recall = hits / predicted.clamp(min=1), hits / support.clamp(min=1)
        f1 = 2 * hits / (predicted + support).clamp(min=1)
        is_there = support > 0
        return {
            **self._summarize(counts, num_images),
            "macro_f1": f1[is_there].mean().item() if is_there.any() else 0.0,
            "loss": counts["loss"].item() / num_images,
            "num_images": num_images,
            "num_bad_images": counts["num_bad_images"].item(),
            "by_class": _by_class(precision, recall, f1, support),
            "confusion_matrix": counts["confusion"].tolist() if "confusion" in counts else None,
        }

    def _add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        raise NotImplementedError

    def _summarize(self, counts: dict[str, torch.Tensor], num_images: int) -> dict[str, float]:
        raise NotImplementedError


class ClassificationCounts(Counts):
    """Counts from which top-1, top-5, the report by class and the confusion matrix follow.

    Args:
        num_labels: number of classes.
        device: where to count.
    """

    def __init__(self, num_labels: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_labels, device)
        self.counts["hits_at_5"] = self.zeros()
        if num_labels <= MAX_CONFUSION_CLASSES:
            self.counts["confusion"] = self.zeros(num_labels, num_labels)

    def _add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        counts = self.counts
        best = logits.topk(min(5, self.num_labels), dim=1).indices
        predictions, ones = best[:, 0], torch.ones_like(labels)
        counts["hits"].index_add_(0, labels, (predictions == labels).long())
        counts["hits_at_5"] += (best == labels.unsqueeze(1)).sum()
        counts["support"].index_add_(0, labels, ones)
        counts["predicted"].index_add_(0, predictions, ones)
        counts["loss"] += nn.functional.cross_entropy(logits, labels, reduction="sum")
        if "confusion" in counts:
            counts["confusion"].view(-1).index_add_(0, labels * self.num_labels + predictions, ones)

    def _summarize(self, counts: dict[str, torch.Tensor], num_images: int) -> dict[str, float]:
        """{"top1", "top5", "balanced_accuracy"}; top5 counts the best min(5, num_labels) classes."""
        hits, support = counts["hits"].double(), counts["support"].double()
        return {
            "top1": hits.sum().item() / num_images,
            "top5": counts["hits_at_5"].item() / num_images,
            "balanced_accuracy": (hits / support)[support > 0].mean().item(),
        }


class MultiLabelCounts(Counts):
    """Counts for images with several labels, each predicted where its probability is above one half.

    Args:
        num_labels: number of classes.
        device: where to count.
    """

    def __init__(self, num_labels: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_labels, device)
        self.counts["exact"] = self.zeros()

    def _add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        counts, predicted, there = self.counts, logits > 0, labels > 0.5
        counts["exact"] += (predicted == there).all(dim=1).sum()
        counts["hits"] += (predicted & there).sum(dim=0)
        counts["support"] += there.sum(dim=0)
        counts["predicted"] += predicted.sum(dim=0)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        counts["loss"] += losses.mean(dim=1).sum()

    def _summarize(self, counts: dict[str, torch.Tensor], num_images: int) -> dict[str, float]:
        """{"micro_f1", "exact_match"}; exact match: all labels of an image right."""
        hits, support, predicted = (counts[name].double() for name in ("hits", "support", "predicted"))
        return {
            "micro_f1": (2 * hits.sum() / (predicted + support).sum().clamp(min=1)).item(),
            "exact_match": counts["exact"].item() / num_images,
        }


def _by_class(*columns: torch.Tensor) -> list[dict[str, float]]:
    names = ("precision", "recall", "f1", "support")
    return [
        {name: int(x) if name == "support" else x for name, x in zip(names, row, strict=True)}
        for row in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _summed(count: torch.Tensor, accelerator: Accelerator | None) -> torch.Tensor:
    """Sum over processes; each of them has counted different images."""
    if accelerator is None or accelerator.num_processes == 1:
        return count.cpu()
    count = count.clone()
    torch.distributed.all_reduce(count)
    return count.cpu()
