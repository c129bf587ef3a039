"""Our metrics for the `evaluate` library, whose own need the network.

>>> from evit_training.measuring.evaluate_metrics import TopKAccuracy
>>> metric = TopKAccuracy(k=5)
>>> metric.add_batch(predictions=logits, references=labels)
>>> metric.compute()
{'top5_accuracy': 0.95}
"""

from typing import Any

import datasets
import evaluate
import torch

from .metrics import ClassificationCounts


_CITATION = "Counted exactly, image by image, as the trainer of evit_hf does."


class TopKAccuracy(evaluate.Metric):
    """Share of images whose class is among the k best: `predictions` are logits or probabilities."""

    def __init__(self, k: int = 1, **kwargs: Any) -> None:
        self.k = k
        super().__init__(keep_in_memory=kwargs.pop("keep_in_memory", True), **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description="predictions: (num_images, num_labels); references: (num_images,) class numbers",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        scores, labels = torch.tensor(predictions), torch.tensor(references)
        if self.k > scores.shape[1]:
            raise ValueError(f"`k` is {self.k}, but there are {scores.shape[1]} classes.")
        hits = (scores.topk(self.k, dim=1).indices == labels.unsqueeze(1)).any(dim=1)
        return {f"top{self.k}_accuracy": hits.double().mean().item()}


class ClassReport(evaluate.Metric):
    """Top-1 accuracy, balanced accuracy, macro F1, report by class and confusion matrix from logits."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=kwargs.pop("keep_in_memory", True), **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return TopKAccuracy._info(self)

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, Any]:
        scores = torch.tensor(predictions)
        counts = ClassificationCounts(scores.shape[1])
        counts.add(scores, torch.tensor(references))
        report = counts.summarize()
        return {name: value for name, value in report.items() if name not in ("num_images", "num_bad_images")}
