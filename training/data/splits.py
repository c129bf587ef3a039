"""Data sets of images and labels, whatever form they come in: their splits, their classes, what was left out."""

import dataclasses
import glob
import hashlib
import os
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow.compute
import torch
from huggingface_hub.constants import HF_HUB_CACHE

from evit_hf.pictures import as_rgb

from .classes import hot_columns, numbered, with_hot_columns, with_labels
from .folders import read_picture_folder, reasons
from .images import BadImageError, DatasetLike, ImageSplits, LabelledImages
from .names import class_numbers, split_in, split_of
from .sampling import seed_for
from .tables import FILE_TYPES, IMAGE_COLUMNS, LABEL_COLUMNS, by_split, file_type, read_table


if TYPE_CHECKING:
    from evit_hf import EViTPreTrainedModel

    from ..arguments import DataArguments


PACKAGED = Path(__file__).parent.parent / "datasets"
EVAL_SPLITS = ("validation", "val", "valid", "dev", "test")
CACHES = (str(datasets.config.HF_DATASETS_CACHE), HF_HUB_CACHE)


@dataclass
class Source:
    """Splits as they were found, with images undecoded, and what the user should know about them.

    `roots` are the folders, and the address of the Hub, that files named by the data may lie in.
    """

    splits: dict[str, DatasetLike]
    roots: tuple[str, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def find(self, name: str) -> str | None:
        """Name in `splits` of a split that the user may call by a usual word, such as `val` for validation."""
        if name in self.splits:
            return name
        return split_of(name) if split_of(name) in self.splits.keys() - {"train"} else None

    def find_evaluation(self) -> str | None:
        """Name in `splits` of the split to evaluate on, None if there is none."""
        return next((name for name in EVAL_SPLITS if name in self.splits), None)


def load_splits(arguments: "DataArguments", seed: int) -> ImageSplits:
    """Training and evaluation split with numbered classes.

    Args:
        arguments: where the data is and what its columns are called.
        seed: draws the held-out part where there is no evaluation split, and the samples where they are limited.

    Raises: ValueError naming what there is, if a split or column cannot be found, a label is not a class, or data
        would be lost.
    """
    source = _load(arguments)
    train, evaluation = _train_and_evaluation(source, arguments)

    image_column, train = _image_column(train, arguments.image_column)
    train, label_column, hot = _label_column(train, arguments.label_column, image_column)
    if evaluation is not None:
        if hot and set(hot) <= set(evaluation.column_names):
            several = not isinstance(train.features[label_column], datasets.ClassLabel)
            evaluation = with_hot_columns(evaluation, hot, label_column, several)
        for column in (image_column, label_column):
            if column not in evaluation.column_names:
                raise ValueError(f"The evaluation split has no column `{column}`, only {evaluation.column_names}.")
        _, evaluation = _image_column(evaluation, image_column)
    columns = {"image_column": image_column, "label_column": label_column}
    if isinstance(train, datasets.IterableDataset):
        return _streamed(train, evaluation, arguments, columns, source)

    is_declared = isinstance(train.features[label_column], datasets.ClassLabel)
    train, names, multi_label = numbered(train, label_column, "train")
    if evaluation is None:
        train, evaluation = held_out(train, label_column, arguments.eval_fraction, len(names), seed)
    else:
        if arguments.allow_missing_classes:
            names = _all_names(names, numbered(evaluation, label_column, "evaluation", several=multi_label)[1])
        evaluation, *_ = numbered(evaluation, label_column, "evaluation", names, multi_label)
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


def _train_and_evaluation(source: Source, arguments: "DataArguments") -> tuple[DatasetLike, DatasetLike | None]:
    """The split that is trained on, and the one that is evaluated on if there is one; the others are noted."""
    train_split = source.find(arguments.train_split)
    if train_split is None:
        raise ValueError(f"`--train-split` is `{arguments.train_split}`, but the data has {sorted(source.splits)}.")
    eval_split = source.find_evaluation()
    if arguments.eval_split is not None:
        eval_split = source.find(arguments.eval_split)
        if eval_split is None:
            raise ValueError(f"`--eval-split` is `{arguments.eval_split}`, but the data has {sorted(source.splits)}.")
    for name in source.splits.keys() - {train_split, eval_split}:
        source.notes.append(f"The split `{name}` is not used.")
    return source.splits[train_split], source.splits[eval_split] if eval_split is not None else None


def load_evaluation_split(arguments: "DataArguments") -> ImageSplits:
    """One split to evaluate on, as both splits: `--eval-split`, or validation or test, or the only one.

    Raises: ValueError naming what there is.
    """
    source = _load(arguments)
    only = next(iter(source.splits)) if len(source.splits) == 1 else None
    wanted = arguments.eval_split
    name = source.find(wanted) if wanted is not None else source.find_evaluation() or only
    if name is None:
        raise ValueError(f"`--eval-split` is `{wanted}`, but the data has {sorted(source.splits)}.")
    image_column, dataset = _image_column(source.splits[name], arguments.image_column)
    dataset, label_column, _ = _label_column(dataset, arguments.label_column, image_column)
    columns = {"image_column": image_column, "label_column": label_column}
    if isinstance(dataset, datasets.IterableDataset):
        return _streamed(dataset, dataset, arguments, columns, source)
    dataset, names, multi_label = numbered(dataset, label_column, name)
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
        column = dataset.data.column(splits.image_column)
        paths = pyarrow.compute.struct_field(column, "path").to_pylist()
        sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(column, "bytes")).to_pylist()
        numbers = range(len(paths)) if dataset._indices is None else dataset._indices.column(0).to_pylist()
        for i in numbers:
            size = sizes[i]
            if size is None and paths[i] is not None and os.path.isfile(paths[i]):
                size = os.path.getsize(paths[i])
            digest.update(repr((_below(paths[i], splits.roots), size)).encode())
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
            except BadImageError as error:
                bad.append(str(error))
        if bad:
            more = f" (and {len(bad) - 1} more of the {count} that were looked at)" if len(bad) > 1 else ""
            raise BadImageError(f"{bad[0]}{more} Mend or remove it, or pass `--on-bad-image skip`.")


def _load(arguments: "DataArguments") -> Source:
    """All splits of a folder, files, a packaged data set, or a Hub id, in that order."""
    sources = arguments.dataset
    files = [
        file
        for source in sources
        for file in ([source] if Path(source).exists() else sorted(glob.glob(source)) or [source])
    ]
    if len(sources) == 1 and Path(sources[0]).is_dir():
        return _load_folder(Path(sources[0]), arguments)
    if all(Path(file).is_file() for file in files):
        return _load_files([(file, Path(file).stem) for file in files], arguments)
    if len(sources) == 1 and sources[0] in (path.name for path in PACKAGED.iterdir()):
        folder = PACKAGED / sources[0]
        return _load_files([(str(file), file.stem) for file in sorted(folder.glob("*.parquet"))], arguments)
    if len(sources) == 1:
        return _load_with_datasets(sources[0], arguments, (f"hf://datasets/{sources[0]}",))
    missing = [file for file in files if not Path(file).is_file()]
    raise ValueError(f"`--dataset` takes one folder or Hub id, or several data files; these are not files: {missing}.")


def _load_with_datasets(name: str, arguments: "DataArguments", roots: tuple[str, ...]) -> Source:
    """A data set that the library `datasets` reads by itself: from the Hub, or a folder of its own kinds."""
    try:
        splits = datasets.load_dataset(name, arguments.dataset_config, streaming=arguments.streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, PermissionError):
            reason += f" (set HF_HOME, now {datasets.config.HF_CACHE_HOME}, to a folder that can be written)"
        elif not Path(name).exists():
            reason = f"it is not a file or folder here, and as a Hub id: {reason}"
        raise ValueError(f"`--dataset {name}` could not be loaded: {reason}") from None
    return Source(dict(splits), (*roots, *CACHES))


def _load_folder(folder: Path, arguments: "DataArguments") -> Source:
    """A folder of pictures, of tables, of archives, or of what `save_to_disk` wrote."""
    root = folder.resolve()
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(root))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"`--dataset {folder}` could not be loaded: {error}") from None
        saved = dict(saved) if isinstance(saved, dict) else {arguments.train_split: saved}
        splits = {name: x.to_iterable_dataset() if arguments.streaming else x for name, x in saved.items()}
        return Source(splits, (str(root),))
    readme = root / "README.md"
    if readme.is_file() and re.search(r"^(configs|dataset_info):", readme.read_text(errors="replace"), re.MULTILINE):
        return _load_with_datasets(str(folder), arguments, (str(root),))
    binary = [path for path in _data_files(root) if file_type(path) in ("parquet", "arrow")]
    if binary:
        return _load_files([(str(path), _name_below(path, root)) for path in binary], arguments)
    tables = [path for path in _data_files(root) if _has_columns(path, arguments)]
    named = {name for name in (arguments.train_split, arguments.eval_split) if name not in (None, "train")}
    metadata = [path for path in tables if path.stem == "metadata"]
    if metadata:
        return _load_files([(str(path), _name_below(path, root)) for path in metadata], arguments)
    try:
        found = read_picture_folder(root, named)
    except ValueError:
        if not tables:
            raise
        found = None
    classes = {label for files in found.splits.values() for _, label in files} if found else set()
    if tables and len(classes) < 2:
        return _load_files([(str(path), _name_below(path, root)) for path in tables], arguments)
    if found is not None:
        if len(classes) < 2:
            raise ValueError(
                f"`--dataset {folder}` has one class folder with pictures, {sorted(classes)}: two are needed."
            )
        splits = {name: _listed(files) for name, files in found.splits.items()}
        return Source(splits, (str(root),), found.left_out)
    archives = sorted(path for path in root.iterdir() if zipfile.is_zipfile(path))
    if archives:
        return _load_archives(archives, root, arguments)
    if any(path.suffix in (".tar", ".gz", ".tgz") for path in root.iterdir()):
        return _load_with_datasets(str(folder), arguments, (str(root),))
    raise ValueError(
        f"`--dataset {folder}` has no class folders with pictures and no table of pictures and labels: put the "
        "pictures of each class into a folder of their own, or write a CSV file with the columns file_name and label."
    )


def _load_archives(archives: list[Path], root: Path, arguments: "DataArguments") -> Source:
    """Zip files of pictures in class folders: one for each split, or one with all of them."""
    source = Source({})
    for archive in archives:
        try:
            folder = datasets.DownloadManager().extract(str(archive))
        except (OSError, ValueError) as error:
            raise ValueError(f"`{archive}` could not be extracted: {error}") from None
        part = _load_folder(Path(folder), arguments)
        split = split_in(archive.stem)
        if split is None and len(archives) > 1:
            raise ValueError(f"`{archive}` does not tell its split: put train, validation or test into its name.")
        if split is not None and len(part.splits) == 1:
            part.splits = {split: next(iter(part.splits.values()))}
        if source.splits.keys() & part.splits.keys():
            raise ValueError(f"`{root}` has several archives of the same split: extract them, and name their folder.")
        source.splits |= part.splits
        source.roots += part.roots
        source.left_out += part.left_out
        source.notes += part.notes
    return source


def _listed(files: Sequence[tuple[str, str]]) -> datasets.Dataset:
    """The data of a list of (path, class)."""
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    images = [{"bytes": None, "path": path} for path, _ in files]
    return datasets.Dataset.from_dict({"image": images, "label": [label for _, label in files]}, features=features)


def _data_files(root: Path) -> list[Path]:
    """Data files of a folder and its subfolders, hidden ones left out."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in sorted(files) if not name.startswith(".") and file_type(name)]
    return [path for path in found if path.suffix.lower() != ".json"]


def _has_columns(path: Path, arguments: "DataArguments") -> bool:
    """Whether the first line of a text table names a column of pictures and one of labels."""
    with path.open(errors="replace") as file:
        words = {word.strip().lstrip("\ufeff") for word in re.split(r'[,;\t|":{}\s]', file.readline())}
    images = (arguments.image_column,) if arguments.image_column else IMAGE_COLUMNS
    labels = (arguments.label_column,) if arguments.label_column else LABEL_COLUMNS
    return bool(words & set(images)) and bool(words & set(labels))


def _name_below(path: Path, root: Path) -> str:
    """Words that may tell the split of a data file: of its own name, or else of the folders that it is in."""
    own, folders = path.stem, path.relative_to(root).parts[:-1]
    return own if split_in(own) else next((name for name in folders if split_of(name)), own)


def _load_files(files: list[tuple[str, str]], arguments: "DataArguments") -> Source:
    """Splits of data files, given with the names that tell their split."""
    for file, _ in files:
        if file_type(file) is None:
            raise ValueError(
                f"`--dataset` names the file `{file}`: files must be {', '.join(FILE_TYPES)}; give a folder for "
                "images."
            )
    source = Source({}, tuple({str(Path(file).resolve().parent) for file, _ in files}))
    named = [name for name in (arguments.train_split, arguments.eval_split) if name is not None]
    stems = {re.sub(r"[0-9a-f]{4,}|\d+", "", name) for _, name in files}
    are_shards = len(stems) == 1 and not any("fold" in stem for stem in stems)
    parts: dict[str, list[DatasetLike]] = {}
    for file, name in files:
        table = read_table(
            file, arguments.image_column, arguments.allow_outside_files, arguments.streaming, source.notes
        )
        told = name if name in named else split_in(name)
        splits = by_split(table, file, told, named)
        if None in splits and len(files) > 1 and not are_shards:
            raise ValueError(f"`{file}` does not tell its split: put train, validation or test into its name.")
        for split, part in splits.items():
            parts.setdefault(split or arguments.train_split, []).append(part)
    for split, tables in parts.items():
        try:
            source.splits[split] = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
        except (ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"The files of the {split} split have different columns: {error}") from None
    return source


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


def _label_column(dataset: DatasetLike, name: str | None, image_column: str) -> tuple[DatasetLike, str, list[str]]:
    """The data, its column of labels, and the columns of zeros and ones of which that was made, if it was."""
    guess = next((column for column in LABEL_COLUMNS if column in dataset.column_names), None)
    if (name or guess) in dataset.column_names:
        return dataset, name or guess or "", []
    if name is None and isinstance(dataset, datasets.Dataset):
        hot = hot_columns(dataset, [image_column])
        if hot:
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

    The first 256 labels show whether it does; only then as many as the buffer holds are read.
    """

    def first(count: int) -> list[int]:
        return [row[column] for row in train.select_columns(column).take(count)]

    def comes_sorted(labels: list[int]) -> bool:
        changes = sum(one != other for one, other in zip(labels, labels[1:], strict=False))
        return len(labels) >= 4 * len(set(labels)) and changes == len(set(labels)) - 1

    if len(names) < 2 or not comes_sorted(first(256)):
        return
    labels = first(shuffle_buffer)
    if len(set(labels)) < len(names):
        raise ValueError(
            f"The streamed data is sorted by class: the {len(labels)} images that `--shuffle-buffer` holds are of "
            f"{len(set(labels))} of {len(names)} classes, so batches would be too. Raise it to the number of images, "
            "shuffle the data once before, or leave out `--streaming`."
        )


def _limited(dataset: datasets.Dataset, max_samples: int | None, seed: int) -> datasets.Dataset:
    if max_samples is None or max_samples >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(max_samples))


def with_classes_of(model: "EViTPreTrainedModel", splits: ImageSplits) -> ImageSplits:
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
        # Its class labels would refuse numbers of another list.
        value = datasets.Value("int64")
        features = evaluation.features.copy()
        features[column] = datasets.Sequence(value) if splits.multi_label else value
        evaluation = evaluation.map(renumbered, features=features)
    else:
        labels = [renumbered(row)[column] for row in evaluation.select_columns(column)]
        evaluation = with_labels(evaluation, column, labels, splits.multi_label)
    return dataclasses.replace(splits, evaluation=evaluation, label_names=known)
