"""What to predict: pictures, folders of them, and data sets, as one list of images with unique names."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow.compute

from ..arguments import DataArguments
from ..data.folders import picture_suffixes, pictures_below, reasons
from ..data.images import DatasetLike
from ..data.sources import is_dataset_folder, load_source
from ..data.splits import image_column_of
from ..data.tables import file_type


IMAGE = datasets.Image(decode=False)


@dataclass(frozen=True)
class Inputs:
    """Images, undecoded, in the order of the command line.

    Args:
        names: of the images, no two alike: the path of a picture, or split and file name or number of a row of a
            data set.
        images: one column, `image`, of {"bytes", "path"}.
        roots: folders that files named by the data may lie in, see `ImageSplits`.
        notes: sentences for the user about what was left out.
    """

    names: list[str]
    images: datasets.Dataset
    roots: tuple[str, ...] | None
    notes: tuple[str, ...]


def find_inputs(words: Sequence[str], data: DataArguments, split: str | None = None) -> Inputs:
    """Find the images that are to be predicted; nothing is decoded.

    Args:
        words: picture files, folders of pictures with any folders below them, folders and files of data sets, Hub ids
            of data sets, or the packaged data set digits.
        data: how to read data sets; `dataset` is not used.
        split: of data sets; None takes all.

    Raises: ValueError for a word that is none of these, or that has no images.
    """
    names: list[str] = []
    parts: list[datasets.Dataset] = []
    roots: set[str] = set()
    left_out: Counter[str] = Counter()
    notes: list[str] = []
    seen: set[str] = set()

    def add(found: Sequence[str], images: datasets.Dataset) -> None:
        new = [i for i, name in enumerate(found) if name not in seen]
        seen.update(found)
        if len(new) < len(found):
            left_out["pictures that were named twice"] += len(found) - len(new)
            images = images.select(new)
        names.extend(found[i] for i in new)
        parts.append(images)

    for word in words:
        path = Path(word)
        if path.is_dir() and not is_dataset_folder(path):
            pictures, others = pictures_below(word)
            left_out.update(others)
            roots.add(str(path.absolute()))
            add(*_of_files([os.path.join(word, *inside) for inside in pictures]))
        elif path.is_file() and file_type(word) is None:
            roots.add(str(path.absolute().parent))
            add(*_of_files([word]))
        else:
            if not path.exists() and (path.suffix.lower() in picture_suffixes() or word.startswith((".", "/", "~"))):
                raise ValueError(f"`{word}` is neither a picture, a folder nor a data set: there is no such file.")
            source = load_source(_arguments_for(word, data))
            splits = source.splits
            if split is not None:
                name = source.find(split)
                if name is None:
                    raise ValueError(f"`--split` is `{split}`, but `{word}` has {sorted(splits)}.")
                splits = {name: splits[name]}
            roots.update(source.roots)
            left_out.update(source.left_out)
            notes += source.notes
            for name, rows in splits.items():
                prefix = f"{word}:{name}" if len(words) > 1 else name
                add(*_of_rows(rows, data.image_column, prefix))
    if left_out:
        notes.append(f"Left out: {reasons(left_out)}.")
    images = datasets.concatenate_datasets(parts)
    return Inputs(names, images, None if data.allow_outside_files else tuple(sorted(roots)), tuple(notes))


def _arguments_for(word: str, data: DataArguments) -> DataArguments:
    settings = {name: value for name, value in vars(data).items() if name != "dataset"}
    return DataArguments(dataset=[word], **settings)


def _of_files(paths: list[str]) -> tuple[list[str], datasets.Dataset]:
    rows = {"image": [{"bytes": None, "path": path} for path in paths]}
    return paths, datasets.Dataset.from_dict(rows, features=datasets.Features({"image": IMAGE}))


def _of_rows(rows: DatasetLike, column: str | None, prefix: str) -> tuple[list[str], datasets.Dataset]:
    """Images of a split of a data set: files are named by their paths, others by split and by name or number."""
    name, undecoded = image_column_of(rows, column)
    images = undecoded.select_columns(name)
    images = (images if name == "image" else images.rename_column(name, "image")).cast_column("image", IMAGE)
    column_of_images = images.flatten_indices().data.column("image")
    paths = pyarrow.compute.struct_field(column_of_images, "path").to_pylist()
    is_within = pyarrow.compute.struct_field(column_of_images, "bytes").is_valid()
    names = paths if all(paths) and len(set(paths)) == len(paths) else [str(i) for i in range(len(images))]
    if names is paths and not pyarrow.compute.any(is_within).as_py():
        return paths, images
    return [f"{prefix}/{name}" for name in names], images
