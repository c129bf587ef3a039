"""Labelled images one by one: decoded to RGB, augmented with their own random numbers, streamed or not."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, TypeAlias

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image

from evit_hf.pictures import as_rgb

from .sampling import seed_for


with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
with contextlib.suppress(ImportError):
    import pillow_jxl  # noqa: F401 (registers itself)

# Errors that say nothing about an image: it must not be skipped for them.
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# What PyTorch says where shared memory is full.
SHARED_MEMORY = ("/torch_", "shared memory")

DatasetLike: TypeAlias = datasets.Dataset | datasets.IterableDataset


class BadImageError(ValueError):
    """An image that cannot be decoded; the message names its split, number, column and file."""

    def __init__(self, message: str) -> None:
        # The message from a worker process is its whole traceback; the reader needs the last line of it.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


class OutsideFileError(BadImageError):
    """An image that is a file or a URL outside the data set; it is never skipped."""


@dataclass(frozen=True)
class ImageSplits:
    """Training and evaluation images with what their columns mean.

    `train` and `evaluation` have undecoded images in `image_column`, and in `label_column` class numbers, or lists of
    them where `multi_label` holds. Images in files must lie below one of `roots`, folders or an address on the Hub;
    None allows all. `notes` are sentences for the user about how the data was read, and what was left out.
    """

    train: DatasetLike
    evaluation: DatasetLike
    image_column: str
    label_column: str
    label_names: list[str]
    multi_label: bool = False
    roots: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_streamed(self) -> bool:
        """Whether the images are read while they are used, so that their number is not known."""
        return isinstance(self.train, datasets.IterableDataset)


def decoded(value: dict[str, Any], place: str, roots: Sequence[str] | None = None) -> Image.Image:
    """Image as `as_rgb` makes it.

    Args:
        value: {"bytes", "path"} as `datasets` stores images.
        place: where it is, for the message.
        roots: where a file may be that the data names, see `ImageSplits`.

    Raises:
        BadImageError: it is missing, or cannot be decoded.
        OutsideFileError: it may not be read.
        OSError: there are too many open files.
    """
    if value is None or (value.get("bytes") is None and value.get("path") is None):
        raise BadImageError(f"{place} is missing.")
    path = value.get("path")
    if value.get("bytes") is None and not is_inside(path, roots):
        raise OutsideFileError(
            f"{place} is `{path}`, which is outside the data set: data from others should not say what is read here. "
            "Pass `--allow-outside-files` if you trust it."
        )
    try:
        if value.get("bytes") is not None:
            return as_rgb(Image.open(BytesIO(value["bytes"])))
        if os.path.isfile(path):
            return as_rgb(Image.open(path))
        if os.path.exists(path):  # a named pipe would never answer
            raise BadImageError(f"{place} ({path}) is not a file.")
        return as_rgb(datasets.Image().decode_example(value))
    except BadImageError:
        raise
    except Exception as error:  # decoders have many
        if is_of_the_machine(error):
            raise
        file = f" ({path})" if path else ""
        reason = " ".join(str(error).split())
        raise BadImageError(f"{place}{file} cannot be decoded: {type(error).__name__}: {reason}") from None


def is_of_the_machine(error: Exception) -> bool:
    """Whether an error says that memory, shared memory or file handles ran out, and nothing about an image."""
    is_shared_memory = any(sign in str(error) for sign in SHARED_MEMORY)
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in OF_THE_MACHINE or is_shared_memory


def is_inside(path: str, roots: Sequence[str] | None) -> bool:
    """Whether a file, perhaps inside archives (`zip://a.png::b.zip`), is below a folder or an address on the Hub."""
    if roots is None or any(_is_below(path, root) for root in roots):
        return True
    *inner, outermost = path.split("::")
    return (
        all(re.match(r"(zip|tar|gzip|bz2|xz|zstd|lz4)://", part) for part in inner)
        and "://" not in outermost.removeprefix("hf://")
        and any(_is_below(outermost, root) for root in roots)
    )


def _is_below(path: str, root: str) -> bool:
    if root.startswith("hf://"):
        return path.startswith((root + "/", root + "@")) and ".." not in path.split("/") and "::" not in path
    is_url = "://" in path and not os.path.exists(path)
    return not is_url and os.path.abspath(path).startswith(os.path.abspath(root) + os.sep)


def target(label: Any, num_labels: int, multi_label: bool) -> int | torch.Tensor:
    """Class number, or for several labels (num_labels,) of zeros and ones.

    Raises: ValueError for a number that is not a class.
    """
    for number in label if multi_label else [label]:
        if number is None or not 0 <= number < num_labels:
            raise ValueError(f"A label is {number}, but classes are numbered from 0 to {num_labels - 1}.")
    if not multi_label:
        return label
    several = torch.zeros(num_labels)
    several[torch.tensor(label, dtype=torch.long)] = 1.0
    return several


class _Pictures:
    """What the classes below share: decoding, labels, and what a bad image does.

    Args:
        splits: the data.
        transform: from an RGB picture to what the model sees.
        on_bad_image: "error" raises for an image that cannot be decoded, "skip" leaves it to the class.
    """

    def __init__(self, splits: ImageSplits, transform: Callable[..., Any], on_bad_image: str = "error") -> None:
        self.splits = splits
        self.transform = transform
        self.on_bad_image = on_bad_image

    def decoded(self, row: dict[str, Any], place: str) -> Image.Image | None:
        """Picture of a row, None for a bad one that may be skipped; BadImageError for one that may not."""
        try:
            return decoded(row[self.splits.image_column], place, self.splits.roots)
        except BadImageError as error:
            if self.on_bad_image == "error" or isinstance(error, OutsideFileError):
                raise
            return None

    def target(self, row: dict[str, Any]) -> int | torch.Tensor:
        """One class number, or one vector of zeros and ones."""
        label = row[self.splits.label_column]
        return target(label, len(self.splits.label_names), self.splits.multi_label)

    def evaluated(self, image: Image.Image | None, target: int | torch.Tensor, is_counted: bool) -> dict[str, Any]:
        """Return one item of evaluation; a bad image is a blank that does not count."""
        return {
            "pixel_values": self.transform(image if image is not None else Image.new("RGB", (32, 32))),
            "labels": target,
            "is_counted": is_counted and image is not None,
            "is_bad": is_counted and image is None,
        }


class LabelledImages(_Pictures, torch.utils.data.Dataset[Any]):
    """Images of one split that are decoded one by one; base of the two below."""

    def __init__(
        self, splits: ImageSplits, split: str, transform: Callable[..., Any], on_bad_image: str = "error"
    ) -> None:
        super().__init__(splits, transform, on_bad_image)
        dataset: datasets.Dataset = getattr(splits, split)
        self.images = dataset.select_columns(splits.image_column)
        self.labels = dataset.select_columns(splits.label_column)
        self.split = split

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def image(self, index: int) -> Image.Image | None:
        """Return one image as RGB, before the transform; None for a bad one that may be skipped.

        Raises: BadImageError if it cannot be decoded and may not be skipped.
        """
        column = self.splits.image_column
        return self.decoded(self.images[index], f"Image {index} of the {self.split} split (column `{column}`)")

    def label(self, index: int) -> int | torch.Tensor:
        """Return one class number, or one vector of zeros and ones."""
        return self.target(self.labels[index])


class TrainingImages(LabelledImages):
    """Map from (epoch, position, image number) to {"pixel_values", "labels", "is_bad"}.

    The augmentation's random numbers depend only on seed, epoch and position, in whichever process they are drawn.
    A bad image that may be skipped gives its place to the next good one.
    """

    def __init__(
        self, splits: ImageSplits, transform: Callable[..., Any], seed: int, on_bad_image: str = "error"
    ) -> None:
        super().__init__(splits, "train", transform, on_bad_image)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        """Return one augmented image."""
        epoch, position, index = key
        for offset in range(len(self)):
            i = (index + offset) % len(self)
            image = self.image(i)
            if image is not None:
                torch.default_generator.manual_seed(seed_for("image", self.seed, epoch, position))
                return {"pixel_values": self.transform(image), "labels": self.label(i), "is_bad": offset > 0}
        raise BadImageError("Not one image of the train split can be decoded.")


class EvaluationImages(LabelledImages):
    """Map from (image number, whether it counts) to {"pixel_values", "labels", "is_counted", "is_bad"}.

    A bad image that may be skipped is a blank that does not count.
    """

    def __init__(self, splits: ImageSplits, transform: Callable[..., Any], on_bad_image: str = "error") -> None:
        super().__init__(splits, "evaluation", transform, on_bad_image)

    def __getitem__(self, key: tuple[int, bool]) -> dict[str, Any]:
        """Return one image."""
        index, is_counted = key
        return self.evaluated(self.image(index), self.label(index), is_counted)


@contextlib.contextmanager
def arrow_waits_briefly() -> Iterator[None]:
    """Let `datasets` wait 0.2 s for Arrow's threads, instead of five, where a stream of several Parquet files ends."""
    name = "SLEEP_TIME_ON_THREADS_SHUTDOWN"  # there are versions without
    before = getattr(datasets.config, name, 0)
    setattr(datasets.config, name, min(before, 0.2))
    try:
        yield
    finally:
        setattr(datasets.config, name, before)


class StreamedTrainingImages(_Pictures, torch.utils.data.IterableDataset[Any]):
    """Endless stream of micro-batches of augmented images, from any micro-batch on, for one process.

    Each worker reads its own part of the data (its own files where there are enough of them). Micro-batch number n is
    made by worker n modulo their number; a stream that starts at a later one hands the parts round accordingly and
    skips, undecoded, what was seen before. So resuming is exact, with the same number of workers and processes.
    """

    def __init__(
        self,
        splits: ImageSplits,
        transform: Callable[..., Any],
        seed: int,
        *,
        micro_batch_size: int,
        first_micro_batch: int,
        shuffle_buffer: int,
        process: int = 0,
        num_processes: int = 1,
        on_bad_image: str = "error",
    ) -> None:
        super().__init__(splits, transform, on_bad_image)
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.first_micro_batch = first_micro_batch
        self.shuffle_buffer = shuffle_buffer
        self.process = process
        self.num_processes = num_processes

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yield lists of {"pixel_values", "labels", "is_bad"}; the last is how many were skipped before it."""
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        part = (worker + self.first_micro_batch) % num_workers
        rows = self._rows(self.process * num_workers + part, self.num_processes * num_workers)
        num_seen = len(range(part, self.first_micro_batch, num_workers)) * self.micro_batch_size
        batch = []
        good, num_skipped = 0, 0
        for position, (epoch, row) in enumerate(rows):
            if position < num_seen and self.on_bad_image == "error":
                continue  # every row was used, there is no need to look at it
            image = self.decoded(row, f"Streamed image {position} of part {part}")
            if image is None:
                num_skipped += 1
                if good == 0 and epoch > 0:
                    raise BadImageError(f"Not one of the streamed images of part {part} can be decoded.")
                continue
            good += 1
            if self.on_bad_image == "skip" and good <= num_seen:
                num_skipped = 0  # counted before
                continue
            torch.default_generator.manual_seed(seed_for("image", self.seed, self.process, part, position))
            batch.append({"pixel_values": self.transform(image), "labels": self.target(row), "is_bad": num_skipped})
            num_skipped = 0
            if len(batch) == self.micro_batch_size:
                yield batch
                batch = []

    def _rows(self, part: int, num_parts: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """One part of the data in random order, again and again, each row with the number of the pass."""
        epoch = 0
        shuffled = self.splits.train.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        mine = split_dataset_by_node(shuffled, part, num_parts)
        with arrow_waits_briefly():
            while True:
                mine.set_epoch(epoch)
                is_empty = True
                batches = mine.iter(batch_size=16)  # `iter` leaves it to us to share out among workers
                with contextlib.closing(batches):
                    for rows in batches:
                        for i in range(len(rows[self.splits.label_column])):
                            is_empty = False
                            yield epoch, {name: column[i] for name, column in rows.items()}
                if is_empty:
                    raise ValueError("A part of the streamed data is empty: take fewer `--num-workers` or processes.")
                epoch += 1


class StreamedEvaluationImages(_Pictures, torch.utils.data.IterableDataset[Any]):
    """Batches of the streamed evaluation split for one process; every process gets the same number of them."""

    def __init__(
        self,
        splits: ImageSplits,
        transform: Callable[..., Any],
        batch_size: int,
        process: int = 0,
        num_processes: int = 1,
        on_bad_image: str = "error",
    ) -> None:
        super().__init__(splits, transform, on_bad_image)
        self.batch_size = batch_size
        self.process = process
        self.num_processes = num_processes

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yield lists of {"pixel_values", "labels", "is_counted", "is_bad"}."""
        batch, num_rows, item = [], 0, None
        for i, row in enumerate(self.splits.evaluation):
            num_rows = i + 1
            if i % self.num_processes != self.process and item is not None:
                continue
            item = self.evaluated(self.decoded(row, f"Streamed evaluation image {i}"), self.target(row), True)
            if i % self.num_processes == self.process:
                batch.append(item)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if num_rows % self.num_processes and self.process >= num_rows % self.num_processes:
            batch.append({**item, "is_counted": False, "is_bad": False})  # other processes have one more
        if batch:
            yield batch
