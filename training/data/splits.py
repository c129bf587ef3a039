"""Data sets of images and labels, whatever form they come in."""

import dataclasses
import glob
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from evit_hf.pictures import as_rgb

from .images import BadImageError, DatasetLike, ImageSplits, LabelledImages


if TYPE_CHECKING:
    from evit_hf import EViTPreTrainedModel

    from ..arguments import DataArguments


PACKAGED = Path(__file__).parent.parent / "datasets"
EVAL_SPLITS = ("validation", "val", "valid", "dev", "test")
IMAGE_COLUMNS = ("image", "img", "pixel_values", "file_name", "file", "path", "image_path")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
FILE_TYPES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}


def load_splits(arguments: "DataArguments", seed: int) -> ImageSplits:
    """Training and evaluation split with numbered classes.

    Args:
        arguments: where the data is and what its columns are called.
        seed: draws the held-out part where there is no evaluation split, and the samples where they are limited.

    Raises: ValueError naming what there is, if a split or column cannot be found or a label is no class.
    """
    splits = _load(arguments)
    if arguments.train_split not in splits:
        raise ValueError(f"`--train-split` is `{arguments.train_split}`, but the data has {sorted(splits)}.")
    train = splits[arguments.train_split]
    eval_split = arguments.eval_split or next((name for name in EVAL_SPLITS if name in splits), None)
    if eval_split is not None and eval_split not in splits:
        raise ValueError(f"`--eval-split` is `{eval_split}`, but the data has {sorted(splits)}.")
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
    """One split to evaluate on, as both splits: `--eval-split`, or validation or test, or the only one.

    Raises: ValueError naming what there is.
    """
    splits = _load(arguments)
    only = next(iter(splits)) if len(splits) == 1 else None
    name = arguments.eval_split or next((name for name in EVAL_SPLITS if name in splits), only)
    if name not in splits:
        raise ValueError(f"`--eval-split` is `{name}`, but the data has {sorted(splits)}.")
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
        images = LabelledImages(splits, split, transform=as_rgb)
        count = len(images) if num_images < 0 else min(num_images, len(images))
        bad = []
        for i in range(count):
            try:
                images.image(i * len(images) // count)
            except BadImageError as error:
                bad.append(str(error))
        if bad:
            more = f" (and {len(bad) - 1} more of the {count} that were looked at)" if len(bad) > 1 else ""
            raise BadImageError(f"{bad[0]}{more} Mend or remove it, or pass `--on-bad-image skip`.")


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
                f"`--dataset` names the file `{file}`: files must be {', '.join(FILE_TYPES)}; give a folder for "
                "images."
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
        problem = f"`--image-column` is `{name}`" if name else f"The data has {len(columns)} columns of images"
        raise ValueError(
            f"{problem}: name one of {columns} with `--image-column` (all columns: {dataset.column_names})."
        )
    return name, dataset.cast_column(name, datasets.Image(decode=False))


def _label_column(dataset: DatasetLike, name: str | None) -> str:
    guess = next((column for column in LABEL_COLUMNS if column in dataset.column_names), None)
    if (name or guess) in dataset.column_names:
        return name or guess
    problem = f"`--label-column` is `{name}`" if name else "No column of labels was found"
    hint = f", perhaps `{guess}`" if guess else ""
    raise ValueError(f"{problem}: name one of {dataset.column_names} with `--label-column`{hint}.")


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
                f"Column `{column}` of the {split} split has {labels.count(-1)} labels of -1: hidden test labels "
                "cannot be used."
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
    return with_labels(dataset, column, labels, is_list), names or own_names, is_list


def with_labels(
    dataset: datasets.Dataset, column: str, labels: list[int] | list[list[int]], multi_label: bool
) -> datasets.Dataset:
    """The data with other labels in a column: class numbers, or lists of them where `multi_label` holds."""
    number = datasets.Value("int64")
    features = datasets.Features({column: datasets.Sequence(number) if multi_label else number})
    numbers = datasets.Dataset.from_dict({column: labels}, features=features)
    return datasets.concatenate_datasets([dataset.remove_columns(column), numbers], axis=1)


def _streamed(
    train: datasets.IterableDataset,
    evaluation: datasets.IterableDataset | None,
    arguments: "DataArguments",
    columns: dict[str, str],
) -> ImageSplits:
    """Streamed splits, whose labels must be numbered already."""
    if evaluation is None:
        raise ValueError("Streamed data needs an evaluation split: name one with `--eval-split`.")
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


def with_classes_of(model: "EViTPreTrainedModel", splits: ImageSplits) -> ImageSplits:
    """The evaluation split with the model's numbers of its classes, matched by name.

    Raises: ValueError naming the classes that the model does not know.
    """
    number_of = {str(name).casefold(): number for number, name in model.config.id2label.items()}
    names = splits.label_names
    unknown = [name for name in names if name.casefold() not in number_of]
    if unknown:
        raise ValueError(
            f"The data has classes that the model does not know: {unknown[:5]} of {len(names)}; the model has "
            f"{model.config.num_labels}: evaluate on data of its classes, or fine-tune it with `evit train --model`."
        )
    numbers = [number_of[name.casefold()] for name in names]
    known = [str(name) for _, name in sorted(model.config.id2label.items())]
    if numbers == list(range(len(known))):
        return splits
    column = splits.label_column

    def renumbered(row: dict[str, Any]) -> dict[str, Any]:
        label = row[column]
        return {column: [numbers[x] for x in label] if splits.multi_label else numbers[label]}

    evaluation = splits.evaluation
    if isinstance(evaluation, datasets.IterableDataset):
        # Its class labels would refuse numbers of another list.
        value = datasets.Value("int64")
        features = evaluation.features.copy()
        features[column] = datasets.Sequence(value) if splits.multi_label else value
        evaluation = evaluation.map(renumbered, features=features)
    else:
        labels = [renumbered(row)[column] for row in evaluation.select_columns(column)]
        evaluation = with_labels(evaluation, column, labels, splits.multi_label)
    return dataclasses.replace(splits, evaluation=evaluation, label_names=known)
