"""Data sets of images and labels, whatever form they come in."""

import glob
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image

from .sampling import seed_for


if TYPE_CHECKING:
    from .arguments import DataArguments


PACKAGED = Path(__file__).parent / "datasets"
EVAL_SPLITS = ("validation", "val", "valid", "dev", "test")
IMAGE_COLUMNS = ("image", "img", "pixel_values", "file_name", "file", "path", "image_path")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
FILE_TYPES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
DatasetLike = datasets.Dataset | datasets.IterableDataset


class BadImageError(ValueError):
    """An image that cannot be decoded; the message names its split, number, column and file."""

    def __init__(self, message: str) -> None:
        # A worker process hands on its whole traceback as the message; the reader needs the last line of it.
        super().__init__(message.rsplit("BadImageError: ", 1)[-1].strip())


@dataclass(frozen=True)
class ImageSplits:
    """Training and evaluation images with what their columns mean.

    `train` and `evaluation` have undecoded images in `image_column`, and in `label_column` class numbers, or lists of
    them where `multi_label` holds.
    """

    train: DatasetLike
    evaluation: DatasetLike
    image_column: str
    label_column: str
    label_names: list[str]
    multi_label: bool = False


# Images and labels


def decoded(value: dict[str, Any], place: str) -> Image.Image:
    """Image as the tensor-making code wants it: upright, RGB, without transparency.

    Args:
        value: {"bytes", "path"} as `datasets` stores images; EXIF rotation is applied.
        place: where it stands, for the message.

    Raises: BadImageError if it is missing or cannot be decoded.
    """
    if value is None or (value.get("bytes") is None and value.get("path") is None):
        raise BadImageError(f"{place} is missing.")
    try:
        return rgb(datasets.Image().decode_example(value))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        file = f" ({value['path']})" if value.get("path") else ""
        reason = " ".join(str(error).split())
        raise BadImageError(f"{place}{file} cannot be decoded: {type(error).__name__}: {reason}") from None


def rgb(image: Image.Image) -> Image.Image:
    """RGB version of an image in any mode of Pillow.

    16-bit grey is scaled to 8 bits, where `convert("RGB")` would cut it off at 255. Transparent pixels show white,
    where `convert("RGB")` would show whatever colour lies under them. Each kind is announced once.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        _say_once("Images with more than 8 bits for each pixel are scaled to 8 bits.")
        pixels = np.asarray(image).astype(np.float64)
        top = 65535 if image.mode.startswith("I;16") or pixels.max() > 255 else 255 if pixels.max() > 1 else 1
        return Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        _say_once("Transparent images are laid over white.")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)  # the default filter shows a message once for each place


def target(label: int | list[int], num_labels: int, multi_label: bool) -> int | torch.Tensor:
    """Class number, or for several labels (num_labels,) of zeros and ones; ValueError for a number that is no class."""
    for number in label if multi_label else [label]:
        if number is None or not 0 <= number < num_labels:
            raise ValueError(f"A label is {number}, but classes are numbered from 0 to {num_labels - 1}.")
    if not multi_label:
        return label
    several = torch.zeros(num_labels)
    several[torch.tensor(label, dtype=torch.long)] = 1.0
    return several


class LabelledImages(torch.utils.data.Dataset):
    """Images of one split that are decoded one by one; base of the two below."""

    def __init__(
        self,
        splits: ImageSplits,
        split: str,
        transform: Callable[[Image.Image], torch.Tensor],
        on_bad_image: str = "error",
    ) -> None:
        dataset: datasets.Dataset = getattr(splits, split)
        self.images = dataset.select_columns(splits.image_column)
        self.labels = dataset.select_columns(splits.label_column)
        self.splits = splits
        self.split = split
        self.transform = transform
        self.on_bad_image = on_bad_image

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """Return one image as RGB, before the transform; raise BadImageError if it cannot be decoded."""
        column = self.splits.image_column
        place = f"Image {index} of the {self.split} split (column `{column}`)"
        return decoded(self.images[index][column], place)

    def label(self, index: int) -> int | torch.Tensor:
        """Return one class number, or one vector of zeros and ones."""
        label = self.labels[index][self.splits.label_column]
        return target(label, len(self.splits.label_names), self.splits.multi_label)


class TrainingImages(LabelledImages):
    """Map from (epoch, position, image number) to {"pixel_values", "labels", "is_bad"}.

    The augmentation's random numbers depend on seed, epoch and position alone, in whichever process they are drawn.
    A bad image that may be skipped gives its place to the next good one.
    """

    def __init__(self, splits: ImageSplits, transform: Callable, seed: int, on_bad_image: str = "error") -> None:
        super().__init__(splits, "train", transform, on_bad_image)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        """Return one augmented image."""
        epoch, position, index = key
        for offset in range(len(self)):
            i = (index + offset) % len(self)
            try:
                image = self.image(i)
            except BadImageError:
                if self.on_bad_image == "error":
                    raise
                continue
            torch.default_generator.manual_seed(seed_for("image", self.seed, epoch, position))
            return {"pixel_values": self.transform(image), "labels": self.label(i), "is_bad": offset > 0}
        raise BadImageError("Not one image of the train split can be decoded.")


class EvaluationImages(LabelledImages):
    """Map from (image number, whether it counts) to {"pixel_values", "labels", "is_counted", "is_bad"}.

    A bad image that may be skipped is a blank that does not count.
    """

    def __init__(self, splits: ImageSplits, transform: Callable, on_bad_image: str = "error") -> None:
        super().__init__(splits, "evaluation", transform, on_bad_image)

    def __getitem__(self, key: tuple[int, bool]) -> dict[str, Any]:
        """Return one image."""
        index, is_counted = key
        is_bad = False
        try:
            image = self.image(index)
        except BadImageError:
            if self.on_bad_image == "error":
                raise
            image, is_bad = Image.new("RGB", (32, 32)), True
        return {
            "pixel_values": self.transform(image),
            "labels": self.label(index),
            "is_counted": is_counted and not is_bad,
            "is_bad": is_counted and is_bad,
        }


class StreamedTrainingImages(torch.utils.data.IterableDataset):
    """Endless stream of micro-batches of augmented images, from any micro-batch on, for one process.

    Each worker reads its own part of the data (its own files where there are enough of them). Micro-batch number n is
    made by worker n modulo their number; a stream that starts at a later one hands the parts round accordingly and
    skips, undecoded, what was seen before. So resuming is exact, with the same number of workers and processes.
    """

    def __init__(
        self,
        splits: ImageSplits,
        transform: Callable,
        seed: int,
        *,
        micro_batch_size: int,
        first_micro_batch: int,
        shuffle_buffer: int,
        process: int = 0,
        num_processes: int = 1,
        on_bad_image: str = "error",
    ) -> None:
        self.splits = splits
        self.transform = transform
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.first_micro_batch = first_micro_batch
        self.shuffle_buffer = shuffle_buffer
        self.process = process
        self.num_processes = num_processes
        self.on_bad_image = on_bad_image

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yield lists of {"pixel_values", "labels", "is_bad"}."""
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        part = (worker + self.first_micro_batch) % num_workers
        rows = self._rows(self.process * num_workers + part, self.num_processes * num_workers)
        num_seen = len(range(part, self.first_micro_batch, num_workers)) * self.micro_batch_size
        batch = []
        good = 0
        for position, row in enumerate(rows):
            if position < num_seen and self.on_bad_image == "error":
                continue  # every row was used, there is no need to look at it
            try:
                image = decoded(row[self.splits.image_column], f"Streamed image {position} of part {part}")
            except BadImageError:
                if self.on_bad_image == "error":
                    raise
                continue
            good += 1
            if self.on_bad_image == "skip" and good <= num_seen:
                continue
            torch.default_generator.manual_seed(seed_for("image", self.seed, self.process, part, position))
            label = target(row[self.splits.label_column], len(self.splits.label_names), self.splits.multi_label)
            batch.append({"pixel_values": self.transform(image), "labels": label, "is_bad": False})
            if len(batch) == self.micro_batch_size:
                yield batch
                batch = []

    def _rows(self, part: int, num_parts: int) -> Iterator[dict[str, Any]]:
        """One part of the data in random order, again and again."""
        epoch = 0
        shuffled = self.splits.train.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        mine = split_dataset_by_node(shuffled, part, num_parts)
        while True:
            mine.set_epoch(epoch)
            is_empty = True
            for rows in mine.iter(batch_size=16):  # `iter` leaves it to us to share out among workers
                for i in range(len(rows[self.splits.label_column])):
                    is_empty = False
                    yield {name: column[i] for name, column in rows.items()}
            if is_empty:
                raise ValueError("A part of the streamed data is empty: take fewer `--num_workers` or processes.")
            epoch += 1


class StreamedEvaluationImages(torch.utils.data.IterableDataset):
    """Batches of the streamed evaluation split for one process; as many on every process."""

    def __init__(
        self,
        splits: ImageSplits,
        transform: Callable,
        batch_size: int,
        process: int = 0,
        num_processes: int = 1,
        on_bad_image: str = "error",
    ) -> None:
        self.splits = splits
        self.transform = transform
        self.batch_size = batch_size
        self.process = process
        self.num_processes = num_processes
        self.on_bad_image = on_bad_image

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yield lists of {"pixel_values", "labels", "is_counted", "is_bad"}."""
        batch, num_rows, item = [], 0, None
        for i, row in enumerate(self.splits.evaluation):
            num_rows = i + 1
            if i % self.num_processes != self.process and item is not None:
                continue
            is_bad = False
            try:
                image = decoded(row[self.splits.image_column], f"Streamed evaluation image {i}")
            except BadImageError:
                if self.on_bad_image == "error":
                    raise
                image, is_bad = Image.new("RGB", (32, 32)), True
            label = target(row[self.splits.label_column], len(self.splits.label_names), self.splits.multi_label)
            item = {
                "pixel_values": self.transform(image),
                "labels": label,
                "is_counted": not is_bad,
                "is_bad": is_bad,
            }
            if i % self.num_processes == self.process:
                batch.append(item)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if num_rows % self.num_processes and self.process >= num_rows % self.num_processes:
            batch.append({**item, "is_counted": False, "is_bad": False})  # other processes have one more
        if batch:
            yield batch


# Loading


def load_splits(arguments: "DataArguments", seed: int) -> ImageSplits:
    """Training and evaluation split with numbered classes.

    Args:
        arguments: where the data is and what its columns are called.
        seed: draws the held-out part where there is no evaluation split, and the samples where they are limited.

    Raises: ValueError naming what there is, if a split or column cannot be found or a label is no class.
    """
    splits = _load(arguments)
    if arguments.train_split not in splits:
        raise ValueError(f"`--train_split` is `{arguments.train_split}`, but the data has {sorted(splits)}.")
    train = splits[arguments.train_split]
    eval_split = arguments.eval_split or next((name for name in EVAL_SPLITS if name in splits), None)
    if eval_split is not None and eval_split not in splits:
        raise ValueError(f"`--eval_split` is `{eval_split}`, but the data has {sorted(splits)}.")
    evaluation = splits[eval_split] if eval_split is not None else None

    image_column, train = _image_column(train, arguments.image_column)
    label_column = _label_column(train, arguments.label_column)
    if evaluation is not None:
        for column in (image_column, label_column):
            if column not in evaluation.column_names:
                raise ValueError(f"The evaluation split has no column `{column}`, only {evaluation.column_names}.")
        _, evaluation = _image_column(evaluation, image_column)
    columns = {"image_column": image_column, "label_column": label_column}
    if arguments.streaming:
        return _streamed(train, evaluation, arguments, columns)

    train, names, multi_label = _numbered(train, label_column, "train")
    if evaluation is None:
        halves = train.train_test_split(arguments.eval_fraction, seed=seed)
        train, evaluation = halves["train"], halves["test"]
    else:
        evaluation, *_ = _numbered(evaluation, label_column, "evaluation", names, multi_label)
    train = _limited(train, arguments.max_train_samples, seed)
    evaluation = _limited(evaluation, arguments.max_eval_samples, seed)
    for name, split in (("training", train), ("evaluation", evaluation)):
        if len(split) == 0:
            raise ValueError(f"The {name} split of {arguments.dataset} is empty.")
    return ImageSplits(train, evaluation, **columns, label_names=names, multi_label=multi_label)


def load_evaluation_split(arguments: "DataArguments") -> ImageSplits:
    """One split to evaluate on, as both splits: `--eval_split`, or validation or test, or the only one.

    Raises: ValueError naming what there is.
    """
    splits = _load(arguments)
    only = next(iter(splits)) if len(splits) == 1 else None
    name = arguments.eval_split or next((name for name in EVAL_SPLITS if name in splits), only)
    if name not in splits:
        raise ValueError(f"`--eval_split` is `{name}`, but the data has {sorted(splits)}.")
    image_column, dataset = _image_column(splits[name], arguments.image_column)
    label_column = _label_column(dataset, arguments.label_column)
    columns = {"image_column": image_column, "label_column": label_column}
    if arguments.streaming:
        return _streamed(dataset, dataset, arguments, columns)
    dataset, names, multi_label = _numbered(dataset, label_column, name)
    dataset = _limited(dataset, arguments.max_eval_samples, seed=0)
    return ImageSplits(dataset, dataset, **columns, label_names=names, multi_label=multi_label)


def check_images(splits: ImageSplits, num_images: int) -> None:
    """Decode images of both splits, evenly spread, and refuse those that cannot be.

    Args:
        splits: what to look at.
        num_images: images of each split; -1 looks at all.

    Raises: BadImageError naming the first one and how many more there are.
    """
    for split in ("train", "evaluation"):
        images = LabelledImages(splits, split, transform=rgb)
        count = len(images) if num_images < 0 else min(num_images, len(images))
        bad = []
        for i in range(count):
            try:
                images.image(i * len(images) // count)
            except BadImageError as error:
                bad.append(str(error))
        if bad:
            more = f" (and {len(bad) - 1} more of the {count} that were looked at)" if len(bad) > 1 else ""
            raise BadImageError(f"{bad[0]}{more} Mend or remove it, or pass `--on_bad_image skip`.")


def _load(arguments: "DataArguments") -> dict[str, DatasetLike]:
    """All splits of a packaged data set, a Hub id, a folder, or files."""
    sources, streaming = arguments.dataset, arguments.streaming
    if len(sources) == 1 and sources[0] in (path.name for path in PACKAGED.iterdir()):
        return datasets.load_dataset("parquet", data_dir=str(PACKAGED / sources[0]), streaming=streaming)
    files = [file for source in sources for file in (sorted(glob.glob(source)) or [source])]
    if all(Path(file).is_file() for file in files):
        # Each split by itself: together they would be forced under the labels of the first.
        return {
            split: _load_files(files, arguments)
            for split, files in _files_by_split(files, arguments.train_split).items()
        }
    if len(sources) == 1:
        folder = Path(sources[0])
        try:
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                saved = datasets.load_from_disk(sources[0])
                saved = saved if isinstance(saved, dict) else {arguments.train_split: saved}
                return {name: split.to_iterable_dataset() if streaming else split for name, split in saved.items()}
            return datasets.load_dataset(sources[0], arguments.dataset_config, streaming=streaming)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"`--dataset {sources[0]}` is no folder and could not be loaded: {error}") from None
        except ValueError as error:
            raise ValueError(f"`--dataset {sources[0]}` could not be loaded: {error}") from None
    missing = [file for file in files if not Path(file).is_file()]
    raise ValueError(f"`--dataset` takes one folder or Hub id, or several data files; {missing} are no files.")


def _load_files(files: list[str], arguments: "DataArguments") -> DatasetLike:
    """One split from files of one type; paths of images in a CSV file are relative to it."""
    (file_type,) = {FILE_TYPES[Path(file).suffix] for file in files}
    parts = []
    for file in files:
        try:
            part = datasets.load_dataset(file_type, data_files=file, split="train", streaming=arguments.streaming)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"`--dataset {file}` could not be read: {error}") from None
        if file_type == "csv":
            column = arguments.image_column or next((x for x in IMAGE_COLUMNS if x in part.column_names), None)
            if column not in part.column_names:
                raise ValueError(f"`{file}` has the columns {part.column_names}: name that of the images' paths.")
            folder = Path(file).resolve().parent
            part = part.map(_absolute_path, fn_kwargs={"column": column, "folder": str(folder)})
            part = part.cast_column(column, datasets.Image(decode=False))
        parts.append(part)
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _absolute_path(row: dict[str, Any], column: str, folder: str) -> dict[str, str]:
    return {column: str(Path(folder) / row[column])}


def _files_by_split(files: list[str], only: str) -> dict[str, list[str]]:
    """Data files by the split that their names tell; a single other file is the split `only`."""
    by_split: dict[str, list[str]] = {}
    for file in files:
        if Path(file).suffix not in FILE_TYPES:
            raise ValueError(
                f"`--dataset` names the file `{file}`: files must be {', '.join(FILE_TYPES)}; give a folder for images."
            )
        words = re.split(r"[^a-z]+", Path(file).stem.lower())
        split = next((name for name in ("train", *EVAL_SPLITS) if name in words), None)
        if split is None and len(files) > 1:
            raise ValueError(f"`{file}` does not tell its split: put train, validation or test into its name.")
        by_split.setdefault(split or only, []).append(file)
    return by_split


def _image_column(dataset: DatasetLike, name: str | None) -> tuple[str, DatasetLike]:
    """Name of the column with images, and the data with its images undecoded."""
    columns = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if name is None and len(columns) == 1:
        name = columns[0]
    if name not in columns:
        problem = f"`--image_column` is `{name}`" if name else f"The data has {len(columns)} columns of images"
        raise ValueError(
            f"{problem}: name one of {columns} with `--image_column` (all columns: {dataset.column_names})."
        )
    return name, dataset.cast_column(name, datasets.Image(decode=False))


def _label_column(dataset: DatasetLike, name: str | None) -> str:
    guess = next((column for column in LABEL_COLUMNS if column in dataset.column_names), None)
    if (name or guess) in dataset.column_names:
        return name or guess
    problem = f"`--label_column` is `{name}`" if name else "No column of labels was found"
    hint = f", perhaps `{guess}`" if guess else ""
    raise ValueError(f"{problem}: name one of {dataset.column_names} with `--label_column`{hint}.")


def _numbered(
    dataset: datasets.Dataset,
    column: str,
    split: str,
    names: list[str] | None = None,
    multi_label: bool | None = None,
) -> tuple[datasets.Dataset, list[str], bool]:
    """The data with class numbers as labels, the names of the classes, and whether an image can have several.

    Args:
        dataset: with labels as numbers, strings or `ClassLabel`, or lists of them.
        column: of the labels.
        split: name of the data for messages.
        names: classes that numbers must follow: those of another split are matched by name, not by position.
        multi_label: what the other split is.
    """
    feature = dataset.features[column]
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    is_list = inner is not None
    if multi_label is not None and is_list != multi_label:
        raise ValueError(f"Column `{column}` holds lists of labels in one split and single labels in the other.")
    labels = dataset.select_columns(column).with_format("arrow")[:][column].to_pylist()
    missing = [i for i, label in enumerate(labels) if label is None or (is_list and None in label)]
    if missing:
        raise ValueError(
            f"Column `{column}` of the {split} split has {len(missing)} images without a label, the first is number "
            f"{missing[0]}: remove them."
        )
    feature = inner if is_list else feature
    flat = {label for row in labels for label in row} if is_list else set(labels)
    if isinstance(feature, datasets.ClassLabel):
        wrong = [i for i in flat if not 0 <= i < feature.num_classes]
        if wrong:
            number = next(i for i, row in enumerate(labels) if set(wrong) & set(row if is_list else [row]))
            raise ValueError(
                f"Column `{column}` of the {split} split has labels {sorted(wrong)[:5]}, but "
                f"{feature.num_classes} classes; the first is image {number}. Hidden test labels (-1) cannot be used."
            )
        own_names = list(feature.names)
    elif flat and not isinstance(next(iter(flat)), (int, str, bool)):
        raise ValueError(
            f"Column `{column}` holds {type(next(iter(flat))).__name__}, not classes: {sorted(flat)[:5]}."
        )
    else:
        if {-1} & flat:
            raise ValueError(
                f"Column `{column}` of the {split} split has {labels.count(-1)} labels of -1: hidden test labels cannot "
                "be used."
            )
        own_names = [str(value) for value in sorted(flat)]
        number_of = {value: i for i, value in enumerate(sorted(flat))}
        labels = [[number_of[x] for x in row] if is_list else number_of[row] for row in labels]
    if names is not None and own_names != names:
        unknown = sorted({own_names[i] for row in labels for i in (row if is_list else [row])} - set(names))
        if unknown:
            raise ValueError(f"The {split} split has classes that the training split has not: {unknown}.")
        to = {i: names.index(name) for i, name in enumerate(own_names) if name in names}
        labels = [[to[x] for x in row] if is_list else to[row] for row in labels]
    number = datasets.Value("int64")
    numbers = datasets.Sequence(number) if is_list else number
    dataset = dataset.remove_columns(column).add_column(column, labels, feature=numbers)
    return dataset, names or own_names, is_list


def _streamed(
    train: datasets.IterableDataset,
    evaluation: datasets.IterableDataset | None,
    arguments: "DataArguments",
    columns: dict[str, str],
) -> ImageSplits:
    """Streamed splits, whose labels must be numbered already."""
    if evaluation is None:
        raise ValueError("Streamed data needs an evaluation split: name one with `--eval_split`.")
    feature = train.features[columns["label_column"]]
    inner = getattr(feature, "feature", None)
    classes = inner or feature
    if not isinstance(classes, datasets.ClassLabel):
        raise ValueError(
            f"Column `{columns['label_column']}` of streamed data must be a ClassLabel, got {feature}: classes cannot "
            "be counted before they are read. Leave out `--streaming`."
        )
    other = evaluation.features[columns["label_column"]]
    if (getattr(other, "feature", None) or other).names != classes.names:
        raise ValueError("The two splits number their classes differently: leave out `--streaming`.")
    if arguments.max_train_samples is not None:
        train = train.take(arguments.max_train_samples)
    if arguments.max_eval_samples is not None:
        evaluation = evaluation.take(arguments.max_eval_samples)
    return ImageSplits(train, evaluation, **columns, label_names=classes.names, multi_label=inner is not None)


def _limited(dataset: datasets.Dataset, max_samples: int | None, seed: int) -> datasets.Dataset:
    if max_samples is None or max_samples >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(max_samples))
