"""Exact classification metrics, counted image by image and added up over processes."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn


# Above this many classes no confusion matrix is kept.
MAX_CONFUSION_CLASSES = 2000


class ClassificationCounts:
    """Counts from which top-1, top-5, the report by class and the confusion matrix follow.

    Args:
        num_labels: number of classes.
        device: where to count.
    """

    def __init__(self, num_labels: int, device: torch.device | str = "cpu") -> None:
        self.num_labels = num_labels
        has_confusion = num_labels <= MAX_CONFUSION_CLASSES
        self.counts = {
            "num_images": torch.zeros((), dtype=torch.long, device=device),
            "num_bad_images": torch.zeros((), dtype=torch.long, device=device),
            "hits_at_1": torch.zeros(num_labels, dtype=torch.long, device=device),
            "hits_at_5": torch.zeros((), dtype=torch.long, device=device),
            "support": torch.zeros(num_labels, dtype=torch.long, device=device),
            "predicted": torch.zeros(num_labels, dtype=torch.long, device=device),
            "loss": torch.zeros((), dtype=_float64(device), device=device),
            **(
                {"confusion": torch.zeros(num_labels, num_labels, dtype=torch.long, device=device)}
                if has_confusion
                else {}
            ),
        }

    def add(self, logits: torch.Tensor, labels: torch.Tensor, is_counted: torch.Tensor | None = None) -> None:
        """Count a batch.

        Args:
            logits: (batch_size, num_labels).
            labels: (batch_size,), class numbers.
            is_counted: (batch_size,), False for images that are only there to fill up.
        """
        if is_counted is not None:
            logits, labels = logits[is_counted], labels[is_counted]
        counts, logits = self.counts, logits.float()
        best = logits.topk(min(5, self.num_labels), dim=1).indices
        predictions, ones = best[:, 0], torch.ones_like(labels)
        counts["num_images"] += len(labels)
        counts["hits_at_1"].index_add_(0, labels, (predictions == labels).long())
        counts["hits_at_5"] += (best == labels.unsqueeze(1)).sum()
        counts["support"].index_add_(0, labels, ones)
        counts["predicted"].index_add_(0, predictions, ones)
        counts["loss"] += nn.functional.cross_entropy(logits, labels, reduction="sum")
        if "confusion" in counts:
            counts["confusion"].view(-1).index_add_(0, labels * self.num_labels + predictions, ones)

    def summarize(self, accelerator: Accelerator | None = None) -> dict[str, Any]:
        """Add up over processes and divide.

        Args:
            accelerator: connects the processes; None for one.

        Returns: {"top1", "top5", "loss", "balanced_accuracy", "macro_f1", "num_images", "num_bad_images", "by_class",
            "confusion_matrix"}. Fractions; top5 counts the best min(5, num_labels) classes; `by_class` is a list of
            {"precision", "recall", "f1", "support"}, 0.0 where nothing was predicted or there, and means over classes
            take only those that are there; `confusion_matrix[true][predicted]` counts images, None for many classes.

        Raises: ValueError if nothing was counted.
        """
        counts = {name: _summed(count, accelerator) for name, count in self.counts.items()}
        num_images = counts["num_images"].item()
        if num_images == 0:
            raise ValueError("No image was evaluated.")
        hits, support, predicted = (counts[name].double() for name in ("hits_at_1", "support", "predicted"))
        precision, recall = hits / predicted.clamp(min=1), hits / support.clamp(min=1)
        f1 = 2 * hits / (predicted + support).clamp(min=1)
        is_there = support > 0
        return {
            "top1": hits.sum().item() / num_images,
            "top5": counts["hits_at_5"].item() / num_images,
            "loss": counts["loss"].item() / num_images,
            "balanced_accuracy": recall[is_there].mean().item(),
            "macro_f1": f1[is_there].mean().item(),
            "num_images": num_images,
            "num_bad_images": counts["num_bad_images"].item(),
            "by_class": _by_class(precision, recall, f1, support),
            "confusion_matrix": counts["confusion"].tolist() if "confusion" in counts else None,
        }


class MultiLabelCounts:
    """Counts for images with several labels, each predicted where its probability is above one half.

    Args:
        num_labels: number of classes.
        device: where to count.
    """

    def __init__(self, num_labels: int, device: torch.device | str = "cpu") -> None:
        self.counts = {
            **{name: torch.zeros((), dtype=torch.long, device=device) for name in ("num_images", "num_bad_images")},
            "exact": torch.zeros((), dtype=torch.long, device=device),
            "loss": torch.zeros((), dtype=_float64(device), device=device),
            **{
                name: torch.zeros(num_labels, dtype=torch.long, device=device)
                for name in ("hits", "support", "predicted")
            },
        }

    def add(self, logits: torch.Tensor, labels: torch.Tensor, is_counted: torch.Tensor | None = None) -> None:
        """Count a batch: (batch_size, num_labels) logits and zeros and ones."""
        if is_counted is not None:
            logits, labels = logits[is_counted], labels[is_counted]
        counts, logits = self.counts, logits.float()
        predicted, there = logits > 0, labels > 0.5
        counts["num_images"] += len(labels)
        counts["exact"] += (predicted == there).all(dim=1).sum()
        counts["hits"] += (predicted & there).sum(dim=0)
        counts["support"] += there.sum(dim=0)
        counts["predicted"] += predicted.sum(dim=0)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        counts["loss"] += losses.mean(dim=1).sum()

    def summarize(self, accelerator: Accelerator | None = None) -> dict[str, Any]:
        """Add up over processes and divide.

        Returns: {"micro_f1", "macro_f1", "exact_match", "loss", "num_images", "num_bad_images", "by_class"}; see
            `ClassificationCounts.summarize`. Exact match: all labels of an image right.
        """
        counts = {name: _summed(count, accelerator) for name, count in self.counts.items()}
        num_images = counts["num_images"].item()
        if num_images == 0:
            raise ValueError("No image was evaluated.")
        hits, support, predicted = (counts[name].double() for name in ("hits", "support", "predicted"))
        precision, recall = hits / predicted.clamp(min=1), hits / support.clamp(min=1)
        f1 = 2 * hits / (predicted + support).clamp(min=1)
        is_there = support > 0
        return {
            "micro_f1": (2 * hits.sum() / (predicted + support).sum().clamp(min=1)).item(),
            "macro_f1": f1[is_there].mean().item() if is_there.any() else 0.0,
            "exact_match": counts["exact"].item() / num_images,
            "loss": counts["loss"].item() / num_images,
            "num_images": num_images,
            "num_bad_images": counts["num_bad_images"].item(),
            "by_class": _by_class(precision, recall, f1, support),
            "confusion_matrix": None,
        }


def _float64(device: torch.device | str) -> torch.dtype:
    """The longest floating-point type that a device has."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def _by_class(*columns: torch.Tensor) -> list[dict[str, float]]:
    names = ("precision", "recall", "f1", "support")
    return [
        {name: int(x) if name == "support" else x for name, x in zip(names, row, strict=True)}
        for row in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _summed(count: torch.Tensor, accelerator: Accelerator | None) -> torch.Tensor:
    """Sum over processes; each of them has counted other images."""
    if accelerator is None or accelerator.num_processes == 1:
        return count.cpu()
    count = count.clone()
    torch.distributed.all_reduce(count)
    return count.cpu()
