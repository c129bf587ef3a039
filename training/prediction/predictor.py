"""One callable for all that predicts: load once, then encoded images in, rows of labels, scores and features out."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow
import torch
from torch import nn

from evit_hf import reorganize
from evit_hf.towers import tower_of

from ..data.augmentation import ProcessorTransform, load_processor
from ..data.images import BadImageError, decoded
from ..learning.models import load_classifier, was_reorganized
from ..measuring.evaluation import images_per_second
from ..measuring.machine import best_device
from .inputs import Inputs


Row = dict[str, Any]
# Batches whose images are prepared while the model is busy with another one.
BATCHES_AHEAD = 2


def schema(features: bool) -> pyarrow.Schema:
    """Types of the columns of rows; `features` says whether they have that column."""
    columns = {
        "path": pyarrow.string(),
        "labels": pyarrow.list_(pyarrow.string()),
        "scores": pyarrow.list_(pyarrow.float32()),
        "error": pyarrow.string(),
        **({"features": pyarrow.list_(pyarrow.float32())} if features else {}),
    }
    return pyarrow.schema(columns)


class Predictor:
    """An image classifier that takes encoded images.

    Args:
        model: folder or Hub id, see `resolve_model`.
        keep_rate: one number, or one for each reorganization layer. With neither it nor `macs` it is what the model
            was saved with, and 1.0 for a ViT that was never reorganized.
        top_k: labels of each image, in descending order of score.
        features: whether rows have what the classifier is given, a vector for each image.
        device: "cpu", "cuda", ...; None is the best there is.
        dtype: "float32", "bfloat16" or "float16", of weights and pixels.
        roots: folders that files named by data may lie in; None allows all.
        threads: of the process, for the model; None leaves them as they are.
        macs: share of the dense model's operations, instead of a keep rate.

    Raises: ValueError if the model cannot be loaded, has no image processor, or takes other images than RGB.
    """

    def __init__(
        self,
        model: str,
        keep_rate: float | Sequence[float] | None = None,
        top_k: int = 5,
        features: bool = False,
        device: str | None = None,
        dtype: str = "float32",
        roots: Sequence[str] | None = None,
        threads: int | None = None,
        macs: float | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = best_device(device)
        self.network = load_classifier(model).eval().to(self.device, getattr(torch, dtype))
        self.transform = ProcessorTransform(load_processor(model))
        if keep_rate is None and macs is None and not was_reorganized(model):
            keep_rate = 1.0
        reorganize(self.network, keep_rate, macs=macs)
        self.roots = roots
        config = self.network.config
        num_channels = tower_of(self.network).num_channels
        if num_channels != 3:
            raise ValueError(f"`{model}` takes images of {num_channels} channels: predictions are for RGB.")
        self.labels = [config.id2label[i] for i in range(config.num_labels)]
        self.top_k = min(top_k, config.num_labels)
        self.is_multi_label = config.problem_type == "multi_label_classification" or config.num_labels == 1
        self._last_batch: torch.Tensor | None = None
        self._features: torch.Tensor | None = None
        self._wants_features = features
        if features:
            _classifier(self.network).register_forward_pre_hook(self._note_features)

    def __call__(self, batch: pyarrow.Table, column: str = "bytes") -> pyarrow.Table:
        """Predict a table, as Ray Data hands it over.

        Args:
            batch: with `path`, a name for each image, and encoded images.
            column: of the images, each the bytes of a file, or {"bytes", "path"}.

        Returns: the columns of the batch except the images, and those of `predict`.
        """
        names = [str(name) for name in batch["path"].to_pylist()]
        images = [x if isinstance(x, dict) else {"bytes": x, "path": None} for x in batch[column].to_pylist()]
        rows = self.predict(names, [self.prepare(name, image) for name, image in zip(names, images, strict=True)])
        table = pyarrow.Table.from_pylist(rows, schema(self._wants_features))
        for name in batch.column_names:
            if name not in (column, "path"):
                table = table.append_column(batch.schema.field(name), batch[name])
        return table

    def prepare(self, name: str, image: dict[str, Any]) -> torch.Tensor | BadImageError:
        """Pixels of one image as the model sees them, or why there are none.

        Args:
            name: for the message.
            image: {"bytes", "path"}, of which one may be None.
        """
        try:
            return self.transform(decoded(image, f"`{name}`", self.roots))
        except BadImageError as error:
            return error

    @torch.inference_mode()
    def predict(self, names: Sequence[str], prepared: Sequence[torch.Tensor | BadImageError]) -> list[Row]:
        """Rows of a batch, in its order.

        Args:
            names: of the images.
            prepared: see `prepare`.

        Returns: {"path", "labels", "scores", "error"}, with "features" if asked for. Scores are probabilities. An
            image that could not be decoded has only its error.

        Raises: ValueError for scores that are not finite.
        """
        good = [i for i, pixels in enumerate(prepared) if isinstance(pixels, torch.Tensor)]
        rows: list[Row] = [
            {"path": name, "labels": None, "scores": None, "error": None if i in good else str(prepared[i])}
            | ({"features": None} if self._wants_features else {})
            for i, name in enumerate(names)
        ]
        if not good:
            return rows
        pixel_values = torch.stack([prepared[i] for i in good]).to(self.device, self.network.dtype)  # type: ignore[misc]
        self._last_batch = pixel_values
        logits = self.network(pixel_values).logits.float()
        scores, numbers = (logits.sigmoid() if self.is_multi_label else logits.softmax(-1)).topk(self.top_k)
        all_scores, all_numbers = scores.tolist(), numbers.tolist()
        features = self._features.float().tolist() if self._features is not None else None
        for place, i in enumerate(good):
            if not all(score == score for score in all_scores[place]):
                raise ValueError(f"The scores of `{names[i]}` are not numbers in {self.network.dtype}: take float32.")
            rows[i]["labels"] = [self.labels[number] for number in all_numbers[place]]
            rows[i]["scores"] = all_scores[place]
            if features is not None:
                rows[i]["features"] = features[place]
        return rows

    def rows(self, inputs: Inputs, numbers: Sequence[int], batch_size: int, num_threads: int) -> Iterator[list[Row]]:
        """Rows of images batch by batch, in their order; the next images are prepared while the model works.

        Args:
            inputs: images.
            numbers: of those to predict.
            batch_size: images for each forward.
            num_threads: threads that decode and resize.
        """
        waiting: deque[tuple[list[str], list[Future[torch.Tensor | BadImageError]]]] = deque()
        pool = ThreadPoolExecutor(num_threads)
        try:
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                names = [inputs.names[i] for i in batch]
                images = inputs.images[list(batch)]["image"]
                waiting.append((names, [pool.submit(self.prepare, *pair) for pair in zip(names, images, strict=True)]))
                if len(waiting) > BATCHES_AHEAD:
                    yield self._finished(*waiting.popleft())
            while waiting:
                yield self._finished(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def own_speed(self) -> float | None:
        """Images per second of the model by itself, measured on the last batch; None if there was none."""
        if self._last_batch is None:
            return None
        return images_per_second(self.network, self._last_batch, [None], rounds=3)[0]

    def _finished(self, names: list[str], futures: list[Future[torch.Tensor | BadImageError]]) -> list[Row]:
        return self.predict(names, [future.result() for future in futures])

    def _note_features(self, classifier: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._features = inputs[0]


def _classifier(network: nn.Module) -> nn.Module:
    """The first linear classifier of a network."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2].endswith(("classifier", "head", "fc")):
            return module
    raise ValueError(f"`--features`: {type(network).__name__} has no linear classifier whose input they could be.")
