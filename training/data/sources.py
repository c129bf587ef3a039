"""Where data comes from: folders, files, archives, a packaged data set or the Hub; read into splits."""

import contextlib
import glob
import hashlib
import os
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import pyarrow.compute
import yaml
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from .folders import PictureFolder, check_is_utf8, list_pictures, read_picture_folder, reasons
from .images import DatasetLike, OutsideFileError, is_inside
from .names import split_in, split_of
from .packaged import packaged_dataset
from .tables import FILE_TYPES, by_split, file_type, has_split_column, labels_of_text, read_table, reason_of


if TYPE_CHECKING:
    from ..arguments import DataArguments


EVAL_SPLITS = ("validation", "val", "valid", "dev", "test")
CACHES = (str(datasets.config.HF_DATASETS_CACHE), HF_HUB_CACHE)


@dataclass
class Source:
    """Splits as they were found, with images undecoded, and what the user should know about them.

    `roots` are the folders, and the address of the Hub, that files named by the data may lie in. `has_class_folders`
    says that labels are names of folders, whatever they look like.
    """

    splits: dict[str, DatasetLike]
    roots: tuple[str, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    has_class_folders: bool = False

    def find(self, name: str) -> str | None:
        """Name in `splits` of a split that the user may call by a usual word, such as `val` for validation."""
        if name in self.splits:
            return name
        return split_of(name) if split_of(name) in self.splits.keys() - {"train"} else None

    def find_evaluation(self, without: str | None = None) -> str | None:
        """Name in `splits` of the split to evaluate on, other than the one to train on; None if there is none."""
        return next((name for name in EVAL_SPLITS if name in self.splits and name != without), None)


def load_source(arguments: "DataArguments") -> Source:
    """All splits of a folder, files, a packaged data set, or a Hub id, in that order."""
    sources = [os.path.expanduser(source) for source in arguments.dataset]
    for source in sources:
        check_is_utf8(source)
    files = [
        file
        for source in sources
        for file in ([source] if Path(source).exists() else sorted(glob.glob(source)) or [source])
    ]
    packaged = packaged_dataset(sources[0]) if len(sources) == 1 else None
    if len(sources) == 1 and Path(sources[0]).is_dir():
        found = _load_folder(Path(sources[0]), arguments)
        if packaged:
            found.notes.append(f"`{sources[0]}` is the folder of that name here, not the packaged data set.")
        return found
    if all(Path(file).is_file() and _is_archive(Path(file)) for file in files):
        return _load_archives([Path(file) for file in files], arguments)
    if all(Path(file).is_file() for file in files):
        return _load_files([(file, Path(file).stem) for file in files], arguments)
    if packaged:
        return _load_files([(str(file), file.stem) for file in sorted(packaged.glob("*.parquet"))], arguments)
    if len(sources) == 1:
        return _load_with_datasets(sources[0], arguments, (f"hf://datasets/{sources[0]}",))
    missing = [file for file in files if not Path(file).is_file()]
    raise ValueError(f"`--dataset` takes one folder or Hub id, or several data files; these are not files: {missing}.")


def is_dataset_folder(folder: Path) -> bool:
    """Whether a folder holds the files of a data set, rather than pictures."""
    return _was_saved_to_disk(folder) or bool(_binary_files(folder))


def _was_saved_to_disk(root: Path) -> bool:
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def _binary_files(root: Path) -> list[Path]:
    return [path for path in _data_files(root) if file_type(path) in ("parquet", "arrow")]


def _load_with_datasets(name: str, arguments: "DataArguments", roots: tuple[str, ...]) -> Source:
    """A data set that the library `datasets` reads by itself: from the Hub, or a folder in one of its formats."""
    allowed = (*roots, *CACHES)
    try:
        builder = datasets.load_dataset_builder(name, arguments.dataset_config)
        files = [str(file) for some in (builder.config.data_files or {}).values() for file in some]
        _refuse_outside_files(name, files, allowed, arguments)
        if arguments.streaming:
            splits = builder.as_streaming_dataset()
        else:
            builder.download_and_prepare()
            splits = builder.as_dataset()
    except OutsideFileError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = reason_of(error)
        if not Path(name).exists() and "HF_HOME" not in reason:
            reason = f"it is not a file or folder here, and as a Hub id: {reason}"
        raise ValueError(f"`--dataset {name}` could not be loaded: {reason}") from None
    return Source(dict(splits), allowed)


def _refuse_outside_files(name: str, files: list[str], allowed: Sequence[str], arguments: "DataArguments") -> None:
    """Raise OutsideFileError for data files that are not below one of the allowed folders, unless a flag allows it."""
    outside = [] if arguments.allow_outside_files else [file for file in files if not is_inside(file, allowed)]
    if outside:
        raise OutsideFileError(
            f"`--dataset {name}` reads `{outside[0]}`, which is outside the data set: data from others should not "
            "say what is read here. Pass `--allow-outside-files` if you trust it."
        )


def _urls_in(readme: Path) -> list[str]:
    """URLs that a data set's README names as data files, which `datasets` would ask for when it is opened."""
    text = readme.read_text(errors="replace")
    try:
        head = yaml.safe_load(text.split("\n---", 1)[0]) if text.startswith("---") else None
    except yaml.YAMLError:
        return []  # `datasets` says what is wrong with it
    configs = head.get("configs") if isinstance(head, dict) else None
    files = [config.get("data_files") for config in configs or [] if isinstance(config, dict)]
    return [word for word in _words(files) if "://" in word]


def _words(value: object) -> list[str]:
    """All strings in lists and the values of dictionaries, at any depth."""
    if isinstance(value, (list, dict)):
        return [word for x in (value.values() if isinstance(value, dict) else value) for word in _words(x)]
    return [value] if isinstance(value, str) else []


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
        _refuse_outside_files(str(folder), _urls_in(readme), (str(root),), arguments)  # before any is asked for
        return _load_with_datasets(str(folder), arguments, (str(root),))
    binary = _binary_files(root)
    if binary:
        return _load_files([(str(path), _name_below(path, root)) for path in binary], arguments)
    found_labels = {
        path: labels_of_text(path, arguments.image_column, arguments.label_column) for path in _data_files(root)
    }
    labels = {path: some for path, some in found_labels.items() if some is not None}
    tables = [path for path in labels if path.stem.casefold() == "metadata"] or list(labels)
    is_metadata = any(path.stem.casefold() == "metadata" for path in tables)
    named = {name for name in (arguments.train_split, arguments.eval_split) if name not in (None, "train")}
    try:
        found = None if is_metadata else read_picture_folder(root, named)
    except ValueError as error:
        if not tables:
            raise ValueError(f"{error}{_tables_not_used(found_labels)}") from None
        found = None
    classes = {label for files in found.splits.values() for _, label in files} if found else set()
    if tables and len(classes) < 2:
        source = _load_files([(str(path), _name_below(path, root)) for path in tables], arguments)
        return _with_pictures_left_out(source, root)
    if found is not None:
        if len(classes) < 2:
            raise ValueError(
                f"`--dataset {folder}` has one class folder with pictures, {sorted(classes)}: two are needed."
            )
        _refuse_other_tables(folder, found, {path: labels[path] for path in tables})
        splits = {name: _listed(files) for name, files in found.splits.items()}
        return Source(splits, (str(root),), found.left_out, found.notes, has_class_folders=True)
    archives = sorted(path for path in root.iterdir() if _is_archive(path))
    if archives:
        return _load_archives(archives, arguments)
    tars = [path for path in root.iterdir() if path.suffix in (".tar", ".gz", ".tgz")]
    if tars:
        source = _load_with_datasets(str(folder), arguments, (str(root),))
        columns = {name for split in source.splits.values() for name in split.column_names or ()}
        if all(Image.registered_extensions().get(f".{x.lower()}") or x.startswith("__") for x in columns):
            raise ValueError(
                f"`{tars[0]}` has pictures but no labels next to them, as WebDataset has: extract it, and give the "
                "folder as `--dataset`."
            )
        return source
    pictures, _, left_out = list_pictures(root)
    left_out["pictures"] += len(pictures)
    raise ValueError(
        f"`--dataset {folder}` has no class folders with pictures and no table of pictures and labels, but "
        f"{reasons(+left_out)}: put the pictures of each class into a folder of their own, or write a CSV file with "
        f"the columns file_name and label.{_tables_not_used(found_labels)}"
    )


def _refuse_other_tables(folder: Path, found: PictureFolder, labels: Mapping[Path, set[str]]) -> None:
    """Raise ValueError for tables next to class folders that have other labels, or may tell splits."""
    classes = {label for files in found.splits.values() for _, label in files}
    for path, some in labels.items():
        if some != classes:
            raise ValueError(
                f"`--dataset {folder}` has class folders, {sorted(classes)[:5]}, and `{path.name}` with other labels, "
                f"{sorted(some)[:5]}: name that file with `--dataset`, or move it away."
            )
        if len(found.splits) == 1 and (split_in(path.stem) or has_split_column(path)):
            raise ValueError(
                f"`--dataset {folder}` has class folders, and `{path.name}`, which may say what is for training and "
                "what for evaluation: name such files with `--dataset`, or move them away."
            )


def _tables_not_used(labels: Mapping[Path, object]) -> str:
    """A sentence about tables without columns of pictures and labels, empty if there are none."""
    names = [path.name for path, some in labels.items() if some is None]
    if not names:
        return ""
    return (
        f" `{names[0]}` is not used, as no columns of it are known to hold pictures and labels: give the file itself "
        "as `--dataset`, and name them with `--image-column` and `--label-column`."
    )


def _with_pictures_left_out(source: Source, root: Path) -> Source:
    """The data of the tables of a folder, with the number of pictures there that they do not name."""
    named = {path for split in source.splits.values() for path, _ in files_of(split)}
    pictures, *_ = list_pictures(root)
    source.left_out["pictures that no table names"] += sum(str(root.joinpath(*x)) not in named for x in pictures)
    source.left_out += Counter()  # drops zeros
    return source


def files_of(dataset: DatasetLike, image_column: str | None = None) -> list[tuple[str | None, int | None]]:
    """Path and number of bytes of each undecoded picture; the bytes are None where a file has them.

    Args:
        dataset: the data; of a streamed one nothing is known.
        image_column: with the pictures, by default the first such column.
    """
    pictures = [x for x, feature in (dataset.features or {}).items() if isinstance(feature, datasets.Image)]
    if isinstance(dataset, datasets.IterableDataset) or not pictures:
        return []
    column = dataset.data.column(image_column or pictures[0])
    paths = pyarrow.compute.struct_field(column, "path").to_pylist()
    sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(column, "bytes")).to_pylist()
    numbers = range(len(paths)) if dataset._indices is None else dataset._indices.column(0).to_pylist()
    return [(paths[i], sizes[i]) for i in numbers]


def _is_archive(path: Path) -> bool:
    return path.suffix.lower() == ".zip" or zipfile.is_zipfile(path)


def _extracted(archive: Path) -> Path:
    """Folder with the files of an archive in the cache of `datasets`; a changed archive is extracted again.

    Raises: ValueError if that is not possible.
    """
    state = archive.stat()
    key = f"{archive.resolve()} {state.st_size} {state.st_mtime_ns}"
    folder = Path(datasets.config.EXTRACTED_DATASETS_PATH, hashlib.blake2b(key.encode(), digest_size=16).hexdigest())
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as partial:
            with zipfile.ZipFile(archive) as file:
                file.extractall(partial)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(partial, folder)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:  # RuntimeError: it needs a password
        raise ValueError(f"`{archive}` could not be extracted: {reason_of(error)}") from None
    return folder


def _load_archives(archives: list[Path], arguments: "DataArguments") -> Source:
    """Zip files of pictures in class folders: one for each split, or one with all of them."""
    source = Source({})
    for archive in archives:
        extracted = _extracted(archive)
        with zipfile.ZipFile(archive) as file:
            odd = next(
                (x.filename for x in file.infolist() if not (x.filename.isascii() or x.flag_bits & 0x800)), None
            )
        if odd is not None:
            source.notes.append(f"`{archive}` does not say how its names are written; this is one of them: {odd}.")
        try:
            part = _load_folder(extracted, arguments)
        except ValueError as error:
            raise type(error)(str(error).replace(str(extracted), str(archive))) from None
        split = split_in(archive.stem)
        if split is None and len(archives) > 1:
            raise ValueError(f"`{archive}` does not tell its split: put train, validation or test into its name.")
        if split is not None and len(part.splits) == 1:
            part.splits = {split: next(iter(part.splits.values()))}
        if source.splits.keys() & part.splits.keys():
            raise ValueError(f"`{archive}` has a split that another archive has too: extract them into one folder.")
        source.splits |= part.splits
        source.roots += part.roots
        source.left_out += part.left_out
        source.notes += part.notes
        source.has_class_folders |= part.has_class_folders
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


def _name_below(path: Path, root: Path) -> str:
    """Words that may tell the split of a data file: of its own name, or else of the folders that it is in."""
    own, folders = path.stem, path.relative_to(root).parts[:-1]
    return own if split_in(own) else next((name for name in folders if split_of(name)), own)


def _load_files(files: list[tuple[str, str]], arguments: "DataArguments") -> Source:
    """Splits of data files, given with the names that tell their split."""
    for file, _ in files:
        if file_type(file) is None:
            raise ValueError(
                f"`--dataset` names the file `{file}`: files must be {', '.join(FILE_TYPES)} or .zip; give a folder "
                "for images."
            )
    source = Source({}, tuple({str(Path(file).resolve().parent) for file, _ in files}))
    named = [name for name in (arguments.train_split, arguments.eval_split) if name is not None]
    stems = {re.sub(r"[0-9a-f]{4,}|\d+", "", name) for _, name in files}
    are_shards = len(stems) == 1 and not any("fold" in stem for stem in stems)
    parts: dict[str, list[DatasetLike]] = {}
    for file, name in files:
        table = read_table(
            file,
            arguments.image_column,
            arguments.label_column,
            arguments.allow_outside_files,
            arguments.streaming,
            source.notes,
        )
        told = name if name in named else split_in(name)
        splits = by_split(table, file, told, named, arguments.label_column)
        if None in splits and len(files) > 1 and not are_shards:
            raise ValueError(f"`{file}` does not tell its split: put train, validation or test into its name.")
        for split, part in splits.items():
            parts.setdefault(split or arguments.train_split, []).append(part)
    for split, tables in parts.items():
        seen: set[str | None] = set()
        for table in tables:
            paths = {path for path, size in files_of(table) if size is None and path is not None}
            if seen & paths:
                raise ValueError(
                    f"Several tables of the {split} split name the same pictures, {len(seen & paths)} in all, the "
                    f"first is `{min(map(str, seen & paths))}`: keep one table."
                )
            seen |= paths
        try:
            source.splits[split] = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
        except (ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"The files of the {split} split have different columns: {error}") from None
    return source
