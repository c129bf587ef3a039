"""Data sets of images and labels, whatever form they come in."""

import glob
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from PIL import Image


if TYPE_CHECKING:
    from collections.abc import Callable

    from .arguments import DataArguments


PACKAGED = Path(__file__).parent / "datasets"
EVAL_SPLITS = ("validation", "val", "dev", "test")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


class LabelledImages(torch.utils.data.Dataset):
    """Map-style data set of {"pixel_values": tensor, "labels": class number}."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        label_column: str,
        transform: "Callable[[Image.Image], torch.Tensor]",
    ) -> None:
        self.dataset = dataset
        self.image_column = image_column
        self.label_column = label_column
        self.transform = transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset)

    def image(self, index: int) -> Image.Image:
        """Return one image as RGB, before the transform."""
        return self.dataset[index][self.image_column].convert("RGB")

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one transformed image and its class number."""
        row = self.dataset[index]
        return {
            "pixel_values": self.transform(row[self.image_column].convert("RGB")),
            "labels": row[self.label_column],
        }


def load_splits(arguments: "DataArguments", seed: int) -> tuple[datasets.Dataset, datasets.Dataset, str, str]:
    """Training and evaluation split, with labels as `ClassLabel`, and the names of the image and label columns.

    Args:
        arguments: where the data is and what its columns are called.
        seed: draws the held-out part where there is no evaluation split, and the samples where they are limited.

    Raises: ValueError naming what there is, if a split or column cannot be found or a label is no class.
    """
    splits = _load(arguments)
    if arguments.train_split not in splits:
        raise ValueError(f"`--train_split` is `{arguments.train_split}`, but the data has {sorted(splits)}.")
    train = splits[arguments.train_split]
    image_column = _image_column(train, arguments.image_column)
    label_column = _label_column(train, arguments.label_column)
    train = _with_class_labels(train, label_column)

    eval_split = arguments.eval_split or next((name for name in EVAL_SPLITS if name in splits), None)
    if eval_split is None:
        halves = train.train_test_split(arguments.eval_fraction, seed=seed)
        train, evaluation = halves["train"], halves["test"]
    elif eval_split not in splits:
        raise ValueError(f"`--eval_split` is `{eval_split}`, but the data has {sorted(splits)}.")
    else:
        evaluation = _with_class_labels(splits[eval_split], label_column, like=train)
    train = _limited(train, arguments.max_train_samples, seed)
    evaluation = _limited(evaluation, arguments.max_eval_samples, seed)
    for name, split in (("training", train), ("evaluation", evaluation)):
        if len(split) == 0:
            raise ValueError(f"The {name} split of {arguments.dataset} is empty.")
    return train, evaluation, image_column, label_column


def _load(arguments: "DataArguments") -> datasets.DatasetDict:
    """All splits of a packaged data set, a Hub id, a folder, or files."""
    sources = arguments.dataset
    if len(sources) == 1 and sources[0] in (path.name for path in PACKAGED.iterdir()):
        return datasets.load_dataset("parquet", data_dir=str(PACKAGED / sources[0]))
    files = [file for source in sources for file in (sorted(glob.glob(source)) or [source])]
    if all(Path(file).is_file() for file in files):
        # Each split by itself: together they would be forced under the labels of the first.
        return datasets.DatasetDict(
            {
                split: datasets.load_dataset("parquet", data_files=files, split="train")
                for split, files in _files_by_split(files).items()
            }
        )
    if len(sources) == 1:
        try:
            return datasets.load_dataset(sources[0], arguments.dataset_config)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"`--dataset {sources[0]}` is no folder and could not be loaded: {error}") from None
    missing = [file for file in files if not Path(file).is_file()]
    raise ValueError(f"`--dataset` takes one folder or Hub id, or several parquet files; {missing} are no files.")


def _files_by_split(files: list[str]) -> dict[str, list[str]]:
    """Parquet files by the split that their names tell; a single other file is the training split."""
    by_split: dict[str, list[str]] = {}
    for file in files:
        if not file.endswith(".parquet"):
            raise ValueError(f"`--dataset` names the file `{file}`: files must be parquet; give a folder for images.")
        words = re.split(r"[^a-z]+", Path(file).stem.lower())
        split = next((name for name in ("train", *EVAL_SPLITS) if name in words), None)
        if split is None and len(files) > 1:
            raise ValueError(f"`{file}` does not tell its split: put train, validation or test into its name.")
        by_split.setdefault(split or "train", []).append(file)
    return by_split


def _image_column(dataset: datasets.Dataset, name: str | None) -> str:
    columns = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if name is None and len(columns) == 1:
        return columns[0]
    if name in columns:
        return name
    problem = f"`--image_column` is `{name}`" if name else f"The data has {len(columns)} columns of images"
    raise ValueError(f"{problem}: name one of {columns} with `--image_column` (all columns: {dataset.column_names}).")


def _label_column(dataset: datasets.Dataset, name: str | None) -> str:
    if name is None:
        name = next((column for column in LABEL_COLUMNS if column in dataset.column_names), None)
    if name in dataset.column_names:
        return name
    raise ValueError(f"No column of labels: name one of {dataset.column_names} with `--label_column`, got {name!r}.")


def _with_class_labels(
    dataset: datasets.Dataset, column: str, like: datasets.Dataset | None = None
) -> datasets.Dataset:
    """The data set with labels as ClassLabel, numbered as in `like`: classes are matched by name, not by position."""
    if column not in dataset.column_names:
        raise ValueError(f"The evaluation split has no column `{column}`, only {dataset.column_names}.")
    if not isinstance(dataset.features[column], datasets.ClassLabel):
        dataset = dataset.class_encode_column(column)
    if like is not None and dataset.features[column].names != like.features[column].names:
        known, here = like.features[column], dataset.features[column]
        unknown = sorted(set(here.names) - set(known.names))
        if unknown:
            raise ValueError(f"The evaluation split has classes that the training split has not: {unknown}.")
        numbers = [known.str2int(here.int2str(label)) for label in dataset[column]]
        dataset = dataset.remove_columns(column).add_column(column, numbers).cast_column(column, known)
    labels = dataset.with_format("numpy")[column][:]
    if len(labels) and (labels.min() < 0 or labels.max() >= dataset.features[column].num_classes):
        raise ValueError(
            f"Column `{column}` has labels from {labels.min()} to {labels.max()}, but "
            f"{dataset.features[column].num_classes} classes: hidden test labels (-1) cannot be used."
        )
    return dataset


def _limited(dataset: datasets.Dataset, max_samples: int | None, seed: int) -> datasets.Dataset:
    if max_samples is None or max_samples >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(max_samples))
