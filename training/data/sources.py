"""Where data comes from: folders, files, archives, a packaged data set or the Hub; read into splits."""

import glob
import os
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
from huggingface_hub.constants import HF_HUB_CACHE

from .folders import read_picture_folder
from .images import DatasetLike
from .names import split_in, split_of
from .tables import FILE_TYPES, IMAGE_COLUMNS, LABEL_COLUMNS, by_split, file_type, read_table


if TYPE_CHECKING:
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


def load_source(arguments: "DataArguments") -> Source:
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


def is_dataset_folder(folder: Path) -> bool:
    """Whether a folder holds a data set in files of its own, rather than pictures."""
    return _was_saved_to_disk(folder) or bool(_binary_files(folder))


def _was_saved_to_disk(root: Path) -> bool:
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def _binary_files(root: Path) -> list[Path]:
    return [path for path in _data_files(root) if file_type(path) in ("parquet", "arrow")]


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
    if _was_saved_to_disk(root):
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
    binary = _binary_files(root)
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
