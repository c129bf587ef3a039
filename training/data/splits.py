"""Data sets of images and labels, whatever form they come in: their splits, their classes, what was left out."""

import dataclasses
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import datasets
import torch

from evit_hf.pictures import as_rgb

from .classes import hot_columns, numbered, with_hot_columns, with_labels
from .folders import reasons
from .images import BadImageError, DatasetLike, ImageSplits, LabelledImages, OutsideFileError
from .names import class_numbers
from .sampling import seed_for
from .sources import Source, files_of, load_source
from .tables import LABEL_COLUMNS, usual_column


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..arguments import DataArguments


def load_splits(arguments: "DataArguments", seed: int) -> ImageSplits:
    """Training and evaluation split with numbered classes.

    Args:
        arguments: where the data is and what its columns are called.
        seed: draws the held-out part where there is no evaluation split, and the samples where they are limited.

    Raises: ValueError naming what there is, if a split or column cannot be found, a label is not a class, or data
        would be lost.
    """
    source = load_source(arguments)
    train, evaluation = _chosen(source, arguments)
    train, evaluation, image_column, label_column = _with_columns(train, evaluation, arguments, source.notes)
    columns = {"image_column": image_column, "label_column": label_column}
    if isinstance(train, datasets.IterableDataset):
        return _streamed(train, evaluation, arguments, columns, source)

    files = Counter(path for path, size in files_of(train, image_column) if path and size is None)
    if files and max(files.values()) > 1:
        double = sum(count > 1 for count in files.values())
        source.notes.append(f"{double} pictures are in several rows of the training split; each row counts.")
    evaluated = [] if evaluation is None else files_of(evaluation, image_column)
    in_both = len({path for path, size in evaluated if size is None} & files.keys())
    if in_both:
        source.notes.append(f"{in_both} pictures are in both splits, so that accuracies say little.")
    columns_of_both = {*train.column_names, *(evaluation.column_names if evaluation is not None else ())}
    unused = sorted(columns_of_both - {image_column, label_column, ""})
    if unused:
        source.notes.append(f"Columns that are not used: {', '.join(unused[:10])}.")
    is_plain = source.has_class_folders
    is_declared = isinstance(train.features[label_column], datasets.ClassLabel)
    train, names, multi_label = numbered(train, label_column, "train", is_plain=is_plain)
    if not (multi_label or is_plain):
        source.notes += _combined(names)
    if len(names) < 2 and not multi_label:
        raise ValueError(f"The data has one class, {names}: two are needed.")
    if evaluation is None:
        train, evaluation = held_out(train, label_column, arguments.eval_fraction, len(names), seed)
    else:
        if arguments.allow_missing_classes:
            others = numbered(evaluation, label_column, "evaluation", several=multi_label, is_plain=is_plain)[1]
            names = _all_names(names, others)
        evaluation, *_ = numbered(evaluation, label_column, "evaluation", names, multi_label, is_plain)
        if not (is_declared or multi_label or arguments.allow_missing_classes):
            _refuse_missing_classes(evaluation, label_column, names)
    if arguments.balanced_sampling and multi_label:
        raise ValueError("`--balanced-sampling` needs one label for each image: leave it out.")
    train = _limited(train, arguments.max_train_samples, seed)
    evaluation = _limited(evaluation, arguments.max_eval_samples, seed)
    for name, split in (("training", train), ("evaluation", evaluation)):
        if len(split) == 0:
            raise ValueError(f"The {name} split of {arguments.dataset} is empty.")
    if arguments.streaming:  # only the list of files was read
        train, evaluation = (
            split.to_iterable_dataset(num_shards=min(len(split), 64))
            for split in (train.shuffle(seed=seed), evaluation)
        )
    return ImageSplits(
        train,
        evaluation,
        **columns,
        label_names=names,
        multi_label=multi_label,
        roots=None if arguments.allow_outside_files else source.roots,
        notes=_notes(source),
    )


def _with_columns(
    train: DatasetLike, evaluation: DatasetLike | None, arguments: "DataArguments", notes: list[str]
) -> tuple[DatasetLike, DatasetLike | None, str, str]:
    """Both splits with undecoded pictures and one column of labels, and the names of these columns."""
    image_column, train = image_column_of(train, arguments.image_column)
    train, label_column, hot = _label_column(train, arguments.label_column, image_column, notes)
    if evaluation is not None:
        if hot and set(hot) <= set(evaluation.column_names):
            several = not isinstance(train.features[label_column], datasets.ClassLabel)
            evaluation = with_hot_columns(evaluation, hot, label_column, several)
        for column in (image_column, label_column):
            if column not in evaluation.column_names:
                raise ValueError(f"The evaluation split has no column `{column}`, only {evaluation.column_names}.")
        _, evaluation = image_column_of(evaluation, image_column)
    return train, evaluation, image_column, label_column


def _chosen(source: Source, arguments: "DataArguments") -> tuple[DatasetLike, DatasetLike | None]:
    """The split to train on, and the one to evaluate on if there is one; others are noted."""
    train_split = source.find(arguments.train_split)
    if train_split is None:
        raise ValueError(f"`--train-split` is `{arguments.train_split}`, but the data has {sorted(source.splits)}.")
    eval_split = source.find_evaluation(without=train_split)
    if arguments.eval_split is not None:
        eval_split = source.find(arguments.eval_split)
        if eval_split is None:
            raise ValueError(f"`--eval-split` is `{arguments.eval_split}`, but the data has {sorted(source.splits)}.")
        if eval_split == train_split:
            source.notes.append(f"The split `{train_split}` is trained on AND evaluated on.")
    for name in sorted(source.splits.keys() - {train_split, eval_split}):
        source.notes.append(f"The split `{name}` is not used.")
    return source.splits[train_split], None if eval_split is None else source.splits[eval_split]


def load_evaluation_split(arguments: "DataArguments") -> ImageSplits:
    """One split to evaluate on, as both splits: `--eval-split`, or validation or test, or the only one.

    Raises: ValueError naming what there is.
    """
    source = load_source(arguments)
    only = next(iter(source.splits)) if len(source.splits) == 1 else None
    wanted = arguments.eval_split
    name = source.find(wanted) if wanted is not None else source.find_evaluation() or only
    if name is None:
        raise ValueError(f"`--eval-split` is `{wanted}`, but the data has {sorted(source.splits)}.")
    image_column, dataset = image_column_of(source.splits[name], arguments.image_column)
    dataset, label_column, _ = _label_column(dataset, arguments.label_column, image_column, source.notes)
    columns = {"image_column": image_column, "label_column": label_column}
    if isinstance(dataset, datasets.IterableDataset):
        return _streamed(dataset, dataset, arguments, columns, source)
    dataset, names, multi_label = numbered(dataset, label_column, name, is_plain=source.has_class_folders)
    dataset = _limited(dataset, arguments.max_eval_samples, seed=0)
    if arguments.streaming:
        dataset = dataset.to_iterable_dataset(num_shards=min(len(dataset), 64))
    roots = None if arguments.allow_outside_files else source.roots
    return ImageSplits(
        dataset,
        dataset,
        **columns,
        label_names=names,
        multi_label=multi_label,
        roots=roots,
        notes=_notes(source),
    )


def _combined(names: list[str]) -> list[str]:
    """Sentences about classes such as `cat, dog` whose parts are classes too."""
    parts = {name: {part for part in re.split(r"[\s,;/+&]+", name) if part} for name in names}
    return [
        f"`{name}` is read as a class of its own: write `{'|'.join(sorted(some))}` if an image has these labels."
        for name, some in parts.items()
        if len(some) > 1 and some <= set(names)
    ][:5]


def _all_names(names: list[str], others: list[str]) -> list[str]:
    return names + [name for name in others if name not in names]


def _refuse_missing_classes(evaluation: datasets.Dataset, column: str, names: list[str]) -> None:
    missing = sorted(set(range(len(names))) - set(evaluation[column][:]))
    if missing:
        raise ValueError(
            f"The evaluation split has no picture of {len(missing)} classes of the training split: "
            f"{[names[i] for i in missing[:5]]}. Add some, or pass `--allow-missing-classes`."
        )


def _notes(source: Source) -> tuple[str, ...]:
    left_out = (f"Left out: {reasons(source.left_out)}.",) if source.left_out else ()
    return (*source.notes, *left_out)


def held_out(
    dataset: datasets.Dataset, column: str, share: float, num_classes: int, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The data without a part of it, and that part, in which classes are as frequent as in the whole.

    Every class keeps a picture to train on. Where images have several labels, the rarest of them counts.

    Args:
        dataset: with class numbers.
        column: of them.
        share: of the images, in [0, 1].
        num_classes: number of classes.
        seed: draws the images.
    """
    labels = dataset[column][:]
    rows = labels if labels and isinstance(labels[0], list) else [[label] for label in labels]
    frequency = Counter(x for row in rows for x in row)
    strata: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        strata.setdefault(min(row, key=lambda x: (frequency[x], x), default=-1), []).append(i)
    wanted = {stratum: share * len(members) for stratum, members in strata.items()}
    counts = {stratum: min(int(wanted[stratum]), len(members) - 1) for stratum, members in strata.items()}
    total = min(-int(-share * len(labels) // 1), len(labels) - 1)
    # What is left goes to the classes that have nothing yet, then to those that lack most of their share.
    order = sorted(strata, key=lambda x: (counts[x] > 0, counts[x] - wanted[x], x))
    while sum(counts.values()) < total:
        rest = [x for x in order if counts[x] < len(strata[x]) - 1] or [x for x in order if counts[x] < len(strata[x])]
        for stratum in rest[: total - sum(counts.values())]:
            counts[stratum] += 1
    generator = torch.Generator().manual_seed(seed_for("held out", seed))
    held: list[int] = []
    for stratum in sorted(strata):
        members = strata[stratum]
        drawn = torch.randperm(len(members), generator=generator)[: counts[stratum]]
        held += [members[i] for i in drawn.tolist()]
    chosen = set(held)
    return dataset.select([i for i in range(len(labels)) if i not in chosen]), dataset.select(sorted(held))


def describe_splits(splits: ImageSplits, names: Sequence[str] = ("train", "evaluation")) -> str:
    """Return a table of the splits (images, classes, images of the smallest and largest class), and what was left out.

    Args:
        splits: the data.
        names: which splits.
    """
    lines = [f"{'split':<12}{'images':>10}{'classes':>9}  images of the smallest and the largest class"]
    for name in names:
        dataset = getattr(splits, name)
        if isinstance(dataset, datasets.IterableDataset):
            lines.append(f"{name:<12}{'streamed':>10}{len(splits.label_names):>9}  not known before they are read")
            continue
        counts = class_counts(dataset, splits)
        smallest, largest = (pick(range(len(counts)), key=counts.__getitem__) for pick in (min, max))
        present = sum(count > 0 for count in counts)
        lines.append(
            f"{name:<12}{len(dataset):>10}{present:>9}  {counts[smallest]} ({splits.label_names[smallest]}), "
            f"{counts[largest]} ({splits.label_names[largest]})"
        )
        if present < len(counts):
            absent = [splits.label_names[i] for i, count in enumerate(counts) if not count]
            lines.append(f"{'':<12}no images of {len(absent)} classes: {', '.join(absent[:5])}")
    return "\n".join([*lines, *splits.notes])


def class_counts(dataset: datasets.Dataset, splits: ImageSplits) -> list[int]:
    """Number of images of each class in a split that is not streamed."""
    labels = dataset[splits.label_column][:]
    frequency = Counter(x for row in labels for x in row) if splits.multi_label else Counter(labels)
    return [frequency[i] for i in range(len(splits.label_names))]


def fingerprint(splits: ImageSplits) -> dict[str, Any]:
    """What tells one data set from another: names of the classes, numbers of images, and a hash of their list.

    The hash covers labels, names of files below the data set's folder, and the sizes of the pictures in bytes.

    Returns: {"label_names", "num_train", "num_eval", "hash"}; the last three are None for streamed data.
    """
    if splits.is_streamed:
        return {"label_names": splits.label_names, "num_train": None, "num_eval": None, "hash": None}
    digest = hashlib.blake2b(digest_size=16)
    for dataset in (splits.train, splits.evaluation):
        digest.update(repr(dataset[splits.label_column][:]).encode())
        for path, size in files_of(dataset, splits.image_column):
            if size is None and path is not None and os.path.isfile(path):
                size = os.path.getsize(path)
            digest.update(repr((_below(path, splits.roots), size)).encode())
    return {
        "label_names": splits.label_names,
        "num_train": len(splits.train),
        "num_eval": len(splits.evaluation),
        "hash": digest.hexdigest(),
    }


def _below(path: str | None, roots: Sequence[str] | None) -> str | None:
    root = next((root for root in roots or () if path is not None and path.startswith(root + os.sep)), None)
    return path if root is None or path is None else path[len(root) :]


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
            except OutsideFileError:
                raise
            except BadImageError as error:
                bad.append(str(error))
        if bad:
            more = f" (and {len(bad) - 1} more of the {count} that were looked at)" if len(bad) > 1 else ""
            raise BadImageError(f"{bad[0]}{more} Mend or remove it, or pass `--on-bad-image skip`.")


def image_column_of(dataset: DatasetLike, name: str | None) -> tuple[str, DatasetLike]:
    """Name of the column with images, and the data with its images undecoded.

    Args:
        dataset: one split.
        name: of the column; None finds the only one with images.

    Raises: ValueError naming the columns there are.
    """
    columns = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if name is None and len(columns) == 1:
        name = columns[0]
    if name not in columns:
        problem = f"`--image-column` is `{name}`" if name else f"The data has {len(columns)} columns of images"
        if not columns:
            raise ValueError(
                f"{problem}, and no column of the data holds pictures as files, bytes or paths ({dataset.features})."
            )
        raise ValueError(
            f"{problem}: name one of {columns} with `--image-column` (all columns: {dataset.column_names})."
        )
    return name, dataset.cast_column(name, datasets.Image(decode=False))


def _label_column(
    dataset: DatasetLike, name: str | None, image_column: str, notes: list[str]
) -> tuple[DatasetLike, str, list[str]]:
    """The data, its column of labels, and the columns of zeros and ones of which that was made, if it was.

    `notes` gets a line for such columns.
    """
    guess = usual_column(dataset.column_names, LABEL_COLUMNS)
    if (name or guess) in dataset.column_names:
        return dataset, name or guess or "", []
    if name is None and isinstance(dataset, datasets.Dataset):
        hot = hot_columns(dataset, [image_column])
        if hot:
            notes.append(f"Columns of zeros and ones, which are read as labels: {', '.join(hot)}.")
            return with_hot_columns(dataset, hot, "label"), "label", hot
    problem = f"`--label-column` is `{name}`" if name else "No column of labels was found"
    hint = f", perhaps `{guess}`" if guess else ""
    raise ValueError(f"{problem}: name one of {dataset.column_names} with `--label-column`{hint}.")


def _streamed(
    train: datasets.IterableDataset,
    evaluation: datasets.IterableDataset | None,
    arguments: "DataArguments",
    columns: dict[str, str],
    source: Source,
) -> ImageSplits:
    """Streamed splits, whose labels must be numbered already."""
    if evaluation is None:
        raise ValueError("Streamed data needs an evaluation split: name one with `--eval-split`.")
    column = columns["label_column"]
    feature = train.features[column]
    inner = getattr(feature, "feature", None)
    classes = inner or feature
    if not isinstance(classes, datasets.ClassLabel):
        raise ValueError(
            f"Column `{column}` of streamed data must be a ClassLabel, got {feature}: classes cannot be counted "
            "before they are read. Leave out `--streaming`."
        )
    other = evaluation.features[column]
    if (getattr(other, "feature", None) or other).names != classes.names:
        raise ValueError("The two splits number their classes differently: leave out `--streaming`.")
    if train is not evaluation and inner is None:
        _refuse_sorted(train, column, classes.names, arguments.shuffle_buffer)
    if arguments.max_train_samples is not None:
        train = train.take(arguments.max_train_samples)
    if arguments.max_eval_samples is not None:
        evaluation = evaluation.take(arguments.max_eval_samples)
    return ImageSplits(
        train,
        evaluation,
        **columns,
        label_names=classes.names,
        multi_label=inner is not None,
        roots=None if arguments.allow_outside_files else source.roots,
        notes=_notes(source),
    )


def _refuse_sorted(train: datasets.IterableDataset, column: str, names: list[str], shuffle_buffer: int) -> None:
    """Raise ValueError if the stream comes class by class and the buffer is too small to mix the classes.

    The first 256 labels show whether it does; only then as many as the buffer holds are read, and as many again, which
    must be of all classes too.
    """

    def first(count: int) -> list[int]:
        return [row[column] for row in train.select_columns(column).take(count)]

    def comes_sorted(labels: list[int]) -> bool:
        changes = sum(one != other for one, other in zip(labels, labels[1:], strict=False))
        return len(labels) >= 4 * len(set(labels)) and changes == len(set(labels)) - 1

    if len(names) < 2 or not comes_sorted(first(256)):
        return
    labels = first(2 * shuffle_buffer)
    fewest = min(len(set(part)) for part in (labels[:shuffle_buffer], labels[-shuffle_buffer:]))
    if fewest < len(names):
        raise ValueError(
            f"The streamed data is sorted by class: the {min(shuffle_buffer, len(labels))} images that "
            f"`--shuffle-buffer` holds are of {fewest} of {len(names)} classes, so batches would be too. Raise it to "
            "the number of images, shuffle the data once before, or leave out `--streaming`."
        )


def _limited(dataset: datasets.Dataset, max_samples: int | None, seed: int) -> datasets.Dataset:
    if max_samples is None or max_samples >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(max_samples))


def with_classes_of(model: "PreTrainedModel", splits: ImageSplits) -> ImageSplits:
    """The evaluation split with the model's numbers of its classes, matched by name.

    Raises: ValueError naming the classes that the model does not know.
    """
    names = splits.label_names
    numbers, unknown = class_numbers(names, model.config.id2label)
    if unknown:
        raise ValueError(
            f"The data has classes that the model does not know: {unknown[:5]} of {len(names)}; the model has "
            f"{model.config.num_labels}: evaluate on data of its classes, or fine-tune it with `evit train --model`."
        )
    known = [str(name) for _, name in sorted(model.config.id2label.items())]
    if numbers == list(range(len(known))):
        return splits
    column = splits.label_column

    def renumbered(row: dict[str, Any]) -> dict[str, Any]:
        label = row[column]
        return {column: [numbers[x] for x in label] if splits.multi_label else numbers[label]}

    evaluation = splits.evaluation
    if isinstance(evaluation, datasets.IterableDataset):
        # Its class labels would refuse the numbers of a different list.
        value = datasets.Value("int64")
        features = evaluation.features.copy()
        features[column] = datasets.Sequence(value) if splits.multi_label else value
        evaluation = evaluation.map(renumbered, features=features)
    else:
        labels = [renumbered(row)[column] for row in evaluation.select_columns(column)]
        evaluation = with_labels(evaluation, column, labels, splits.multi_label)
    return dataclasses.replace(splits, evaluation=evaluation, label_names=known)
