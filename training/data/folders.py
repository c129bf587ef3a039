"""Folders of pictures: which picture belongs to which split and class, and what is left out and why.

A class is the first folder below the split (or below the data set): `train/cat/2021/1.png` is a cat. Words in the
names of files mean nothing. Where two readings are possible, neither is taken.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from .names import class_name, is_part, may_be_splits, split_of, split_siblings


Parts = tuple[str, ...]  # a path below the data set's folder

# Files that lie next to pictures and are never one.
_SIDECARS = {
    *(".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".md", ".yaml", ".yml", ".html", ".pdf", ".ini", ".log"),
    *(".py", ".ipynb", ".npy", ".npz", ".mat", ".pkl", ".pt", ".pth", ".parquet", ".arrow", ".db", ".zip", ".tar"),
    *(".gz", ".mp4", ".avi", ".mov", ".mkv", ".wav", ".mp3", ".doc", ".docx", ".xls", ".xlsx", ".h5", ".svg"),
}
# Folders that systems make, next to those that begin with a dot.
_OF_SYSTEMS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
_PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}


@dataclass
class PictureFolder:
    """Pictures of a folder by split, as (path, class), and the number of files that were left out by reason.

    `class_level` says at which level below the folder the class folders are; 0 is right inside it. `notes` are
    sentences for the user.
    """

    splits: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    class_level: int = 0
    notes: list[str] = field(default_factory=list)


def picture_suffixes() -> set[str]:
    """Suffixes of the picture files that Pillow reads here, with the plugins that are installed."""
    Image.init()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN} - _SIDECARS


def list_pictures(root: Path) -> tuple[list[Parts], list[Parts], Counter[str]]:
    """Pictures below a folder, following links; files that look like pictures but cannot be read; the others counted.

    Args:
        root: folder.

    Returns: pictures, unreadable files, and the number of files that were left out by reason.

    Raises: ValueError for a folder that cannot be listed, or a name that is not UTF-8.
    """
    check_is_utf8(root)
    suffixes = picture_suffixes()
    pictures: list[Parts] = []
    unreadable: list[Parts] = []
    left_out: Counter[str] = Counter()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse_to_go_on):
        real = os.path.realpath(folder) + os.sep
        hidden = [name for name in folders if _is_hidden(name)]
        for name in hidden:
            left_out["files in hidden folders"] += sum(len(x) for *_, x in os.walk(os.path.join(folder, name)))
        # A link to a folder that it lies in would never end.
        folders[:] = sorted(
            name
            for name in folders
            if name not in hidden and not real.startswith(os.path.realpath(os.path.join(folder, name)) + os.sep)
        )
        inside = Path(folder).relative_to(root).parts
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(".") or name in ("Thumbs.db", "desktop.ini"):
                left_out["hidden files"] += 1
            elif suffix in suffixes or (suffix not in _SIDECARS and _opens(os.path.join(folder, name))):
                check_is_utf8(root.joinpath(*inside, name))
                pictures.append((*inside, name))
            elif os.path.islink(os.path.join(folder, name)) and not os.path.exists(os.path.join(folder, name)):
                left_out[f"links that lead nowhere ({'/'.join((*inside, name))})"] += 1
            else:
                if suffix not in _SIDECARS:
                    unreadable.append((*inside, name))
                plugin = f", which `pip install {_PLUGINS[suffix]}` would read" if suffix in _PLUGINS else ""
                left_out[f"{suffix or 'without suffix'}{plugin}"] += 1
    return pictures, unreadable, left_out


def _is_hidden(folder: str) -> bool:
    return folder.startswith(".") or folder in _OF_SYSTEMS


def check_is_utf8(path: str | Path) -> None:
    """Raise ValueError for a path that is not UTF-8: neither Arrow nor JSON can hold it."""
    name = os.fsencode(path)
    try:
        name.decode()
    except UnicodeDecodeError:
        raise ValueError(
            f"The name `{name.decode(errors='backslashreplace')}` is not UTF-8: rename it, or all names of a folder "
            "with `convmv -r -f latin1 -t utf8 --notest FOLDER`."
        ) from None


def _refuse_to_go_on(error: OSError) -> None:
    raise ValueError(f"The folder `{error.filename}` cannot be listed: {error.strerror}.") from None


def _opens(path: str) -> bool:
    if not os.path.isfile(path):  # a named pipe would never answer
        return False
    try:
        with Image.open(path):
            return True
    except (OSError, SyntaxError, ValueError):
        return False


def read_picture_folder(root: Path, named_splits: Collection[str] = ()) -> PictureFolder | None:
    """Sort the pictures of a folder into splits and classes.

    Args:
        root: folder with class folders, or with split folders that hold class folders.
        named_splits: folders that are splits whatever their names mean.

    Returns: the pictures; None if there are no class folders, only pictures or none at all.

    Raises: ValueError naming the folders that can be read in two ways, or a class that would be lost.
    """
    pictures, unreadable, left_out = list_pictures(root)
    found = PictureFolder(left_out=left_out)
    by_split = _by_split(pictures, root, named_splits, found)
    if by_split is None:
        return None
    for split, classes in by_split.items():
        found.splits[split] = [
            (str(root.joinpath(*parts)), class_name(name)) for name, files in classes.items() for parts in files
        ]
    level = found.class_level + 1
    used = {parts[:level] for classes in by_split.values() for files in classes.values() for parts in files}
    lost = {parts[:level] for parts in unreadable if len(parts) > level} - used
    if lost:
        names = ", ".join("/".join(parts) for parts in sorted(lost)[:5])
        raise ValueError(
            f"`{root}` has classes without a picture that can be read, {names}: {reasons(left_out)}. Convert the "
            "files, install what reads them, or remove the folders."
        )
    spellings: dict[str, set[str]] = {}
    for name in sorted({name for classes in by_split.values() for name in classes}):
        spellings.setdefault(class_name(name), set()).add(name)
    found.notes += [
        f"Folders whose names differ only in blanks or in their Unicode form are one class: {sorted(names)}."
        for names in spellings.values()
        if len(names) > 1
    ]
    empty = _folders_without_pictures(root, pictures, found.class_level)
    if empty:
        found.left_out[f"folders without pictures ({', '.join(empty[:5])})"] += len(empty)
    return found


def _folders_without_pictures(root: Path, pictures: list[Parts], class_level: int) -> list[str]:
    """Folders next to those of splits and classes that hold no pictures, at any depth."""
    known = {parts[:length] for parts in pictures for length in range(len(parts))}
    above = sorted(parts for parts in known if len(parts) <= class_level)
    return [
        "/".join((*parts, entry.name))
        for parts in above
        for entry in sorted(root.joinpath(*parts).iterdir())
        if entry.is_dir() and not _is_hidden(entry.name) and (*parts, entry.name) not in known
    ]


def _by_split(
    pictures: list[Parts], root: Path, named: Collection[str], found: PictureFolder, above: Parts = ()
) -> dict[str, dict[str, list[Parts]]] | None:
    """Pictures by split and class folder; see `read_picture_folder`."""
    level = found.class_level = len(above)
    tops: dict[str, list[Parts]] = {}
    for parts in pictures:
        if len(parts) > level + 1:
            tops.setdefault(parts[level], []).append(parts)
    loose = sum(len(parts) == level + 1 for parts in pictures)
    if not tops:
        return None
    nested = [top for top, files in tops.items() if any(len(parts) > level + 2 for parts in files)]
    by_flag = [top for top in tops if top in named and top in nested]
    splits = {top: top if top in by_flag else split_of(top) for top in tops}
    others = [top for top in tops if splits[top] is None]
    where = root.joinpath(*above)
    if loose:
        found.left_out["loose pictures without a class folder"] += loose
    if by_flag or (len(others) < len(tops) and not others and nested):
        for top in others:
            found.left_out[f"pictures in `{top}`, which is neither `--train-split` nor `--eval-split`"] += len(
                tops[top]
            )
        chosen = {top: files for top, files in tops.items() if splits[top]}
        found.class_level = level + 1
        if all(_is_doubled(top, files, level) for top, files in chosen.items()):
            found.class_level = level + 2
        return _split_folders(chosen, splits, where, found)
    if not others:
        raise ValueError(
            f"`{where}` has {_listed(tops)} with pictures but without class folders. If these are classes, put them "
            "into a folder `train`; if they are splits, put the pictures into a folder for each class."
        )
    if len(others) < len(tops) and any(top in nested for top in splits if splits[top]):
        raise ValueError(
            f"`{where}` has {_listed([top for top in tops if splits[top]])}, and {_listed(others)}, whose name is not "
            "that of a split. Remove or rename it, or name it with `--train-split` or `--eval-split`. If all are "
            "classes, put them into a folder `train`."
        )
    if (
        any(is_part(top) and top in nested for top in others)
        or split_siblings(tops)
        or (nested and may_be_splits(tops))
    ):
        raise ValueError(
            f"`{where}` has {_listed(tops)}: these names may mean parts of the data. Say with `--train-split` and "
            "`--eval-split` which is which, or put the class folders into folders `train` and `test`."
        )
    below = {parts[level + 1] for top in nested for parts in tops[top] if len(parts) > level + 2}
    deeper = sorted(
        {name for top in nested for parts in tops[top] for name in parts[level + 1 : -1] if split_of(name)}
    )
    _refuse_copies(tops, where, level)
    if len(tops) == 1 and nested and (not deeper or len(below) == 1 or all(split_of(name) for name in below)):
        (top,) = tops
        if len(below) > 1 or deeper:  # a folder around the data, not its only class
            return _by_split(pictures, root, named, found, (*above, top))
    if deeper and len(nested) == len(tops) and all(split_of(name) for name in below):
        return _splits_in_classes(tops, level, found)
    if deeper:
        raise ValueError(
            f"`{where}` has {_listed(deeper)} inside some class folders: put the splits first "
            "(`train/cat`, `test/cat`), or rename them."
        )
    return {"train": tops}


def _refuse_copies(tops: dict[str, list[Parts]], where: Path, level: int) -> None:
    """Raise ValueError for a folder that holds all the others once more, as an archive leaves it."""
    for top, files in tops.items():
        inside = {parts[level + 1] for parts in files if len(parts) > level + 2}
        if len(tops) > 2 and tops.keys() - {top} <= inside:
            raise ValueError(
                f"`{where / top}` has folders for all classes that lie next to it: give it as `--dataset`, or move it "
                "away."
            )


def _splits_in_classes(
    tops: dict[str, list[Parts]], level: int, found: PictureFolder
) -> dict[str, dict[str, list[Parts]]]:
    """Pictures of class folders that hold split folders: `cat/train`, `cat/test`."""
    deep = {parts[level + 2] for files in tops.values() for parts in files if len(parts) > level + 3}
    if len(deep) > 1 and all(len(parts) > level + 3 for files in tops.values() for parts in files):
        tops_listed = _listed(tops)
        raise ValueError(
            f"{tops_listed[0].upper()}{tops_listed[1:]} hold split folders with {_listed(deep)} inside: give one of "
            "them as `--dataset` if those are the classes, or put the pictures into the split folders."
        )
    by_split: dict[str, dict[str, list[Parts]]] = {}
    for top, files in tops.items():
        for parts in files:
            if len(parts) > level + 2:
                by_split.setdefault(split_of(parts[level + 1]) or "", {}).setdefault(top, []).append(parts)
            else:
                found.left_out["loose pictures without a split folder"] += 1
    return by_split


def _is_doubled(top: str, files: list[Parts], level: int) -> bool:
    """Whether a folder holds only a folder of its own name, as archives leave it: `train/train/cat/1.png`."""
    return all(len(parts) > level + 3 and parts[level + 1].casefold() == top.casefold() for parts in files)


def _split_folders(
    tops: dict[str, list[Parts]], splits: dict[str, str | None], where: Path, found: PictureFolder
) -> dict[str, dict[str, list[Parts]]]:
    """Pictures of split folders by class folder; a split without class folders is left out, and said so."""
    level = found.class_level
    by_split: dict[str, dict[str, list[Parts]]] = {}
    for top, files in tops.items():
        split = splits[top] or ""
        if split in by_split:
            same = [other for other in tops if splits[other] == split]
            raise ValueError(f"`{where}` has {_listed(same)}, which are all the {split} split: keep one of them.")
        classes: dict[str, list[Parts]] = {}
        for parts in files:
            if len(parts) > level + 1:
                classes.setdefault(parts[level], []).append(parts)
        num_loose = len(files) - sum(map(len, classes.values()))
        if num_loose:
            found.left_out[f"pictures in `{top}` without a class folder"] += num_loose
        if classes:
            by_split[split] = classes
    return by_split


def reasons(left_out: Counter[str]) -> str:
    """Numbers of files by reason in words."""
    return "; ".join(f"{count} {reason}" for reason, count in left_out.most_common()) or "there are no files"


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{'folders' if len(names) > 1 else 'a folder'} {', '.join(f'`{name}`' for name in names[:5])}{more}"


def pictures_below(folder: str | Path) -> tuple[list[Parts], Counter[str]]:
    """Pictures below a folder, where classes and splits do not matter, and the number of files left out by reason.

    Raises: ValueError if there are none.
    """
    pictures, _, left_out = list_pictures(Path(folder))
    if not pictures:
        raise ValueError(f"`{folder}` has no picture that can be read: {reasons(left_out)}.")
    return pictures, left_out


def picture_files(words: Iterable[str]) -> dict[str, str]:
    """Pictures and folders of pictures, with any folders below them, as paths by unique names.

    Args:
        words: paths.

    Returns: path of each picture by its name: the path below its folder, or that of the file; longer where two would
        be the same.

    Raises: ValueError for a path that is not there, or a folder without pictures.
    """
    found: dict[str, str] = {}
    for word in words:
        root = Path(word).expanduser()
        if root.is_dir():
            named = [("/".join(parts), root.joinpath(*parts)) for parts in pictures_below(root)[0]]
        elif root.exists():
            named = [(root.name, root)]
        else:
            raise ValueError(f"`{word}` is neither a picture nor a folder of pictures: there is nothing of that name.")
        for name, path in named:
            found.setdefault(name if found.get(name, str(path)) == str(path) else str(path), str(path))
    return found
