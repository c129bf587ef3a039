"""Names of splits and classes: which word means which split, and when two spellings are one class."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


_WORDS = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "val", "valid", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
_FILLERS = ("set", "dataset", "data", "images", "image", "imgs", "img", "pictures", "picture", "split", "folder")
# Folders of these names, with class folders inside, are parts of a data set and never classes.
_PART = re.compile(
    r"((k?fold|cv|split|part|subset|hold[-_ ]?out|held[-_ ]?out|batch)s?|gallery|query|probe|(un)?seen|(un)?labell?ed)"
    r"[-_ ]?\d*",
    re.IGNORECASE,
)
# `trainA`, `Trainingsdaten`, `entrenamiento`: how words for splits begin, here and in some other languages.
_STEM = re.compile(
    r"\W*\d*\W*(train|trein|trn|test|tst|valid|eval|entra[iî]n|entren|appren|prueba|treino|训练|测试)", re.IGNORECASE
)


def _words(name: str) -> list[str]:
    """Words of a name without digits; `TrainData` has two, and `traindata` is `train` as well."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold())
    bare = ([word.removesuffix(filler) for filler in _FILLERS] for word in words)
    return [next((x for x in some if x in SPLIT_OF_WORD), word) for word, some in zip(words, bare, strict=True)]


def split_of(name: str) -> str | None:
    """The split ("train", "validation" or "test") that is all that a name says: `Training`, `val_images`, `test2017`.

    None for any other name: `holdout`, `test drive`, `train_test`.
    """
    words = [word for word in _words(name) if word not in _FILLERS]
    splits = {SPLIT_OF_WORD.get(word) for word in words}
    return splits.pop() if len(splits) == 1 else None


def split_in(name: str) -> str | None:
    """The split that one of the words of a name says: `constraint_train-00000`; None if there is no such word.

    Raises: ValueError if words say several.
    """
    splits = {SPLIT_OF_WORD[word] for word in _words(name) if word in SPLIT_OF_WORD}
    if len(splits) > 1:
        raise ValueError(f"`{name}` names several splits, {sorted(splits)}: rename it.")
    return next(iter(splits), None)


def is_part(name: str) -> bool:
    """Whether a name is that of a part of a data set without saying which: `fold1`, `holdout`."""
    return _PART.fullmatch(name.strip()) is not None


def may_be_splits(names: Collection[str]) -> bool:
    """Whether all of several names begin as words for splits do: `trainA` and `testA`."""
    return len(names) > 1 and all(_STEM.match(name) or is_part(name) for name in names)


def split_siblings(names: Iterable[str]) -> list[str]:
    """Names that differ only in the word of a split: `seg_train` and `seg_test`, `cat_train` and `cat_test`."""
    groups: dict[tuple[str, ...], dict[str, set[str]]] = {}
    for name in names:
        words = [word for word in _words(name) if word not in _FILLERS]
        splits = {SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD}
        rest = tuple(word for word in words if word not in SPLIT_OF_WORD)
        if rest and len(splits) == 1:
            groups.setdefault(rest, {}).setdefault(splits.pop(), set()).add(name)
    return sorted(name for group in groups.values() if len(group) > 1 for some in group.values() for name in some)


def class_name(value: Any) -> str:
    """Name of a class: without blanks around it, in the composed spelling of Unicode (NFC)."""
    return unicodedata.normalize("NFC", str(value)).strip()


def class_numbers(names: Sequence[str], id2label: Mapping[int, str]) -> tuple[list[int], list[str]]:
    """A model's number of each class, found by name: as it is spelt, or without case where that is unambiguous.

    Args:
        names: classes to find.
        id2label: names of the model's classes.

    Returns: numbers of those that were found, and names of those that were not.
    """
    exact = {class_name(label): int(number) for number, label in id2label.items()}
    folded: dict[str, list[int]] = {}
    for label, its_number in exact.items():
        folded.setdefault(label.casefold(), []).append(its_number)
    asked = [class_name(name).casefold() for name in names]
    numbers, unknown = [], []
    for name in names:
        number: int | None = exact.get(class_name(name))
        if number is None:
            alike = folded.get(class_name(name).casefold(), [])
            number = alike[0] if len(alike) == 1 and asked.count(class_name(name).casefold()) == 1 else None
        if number is None:
            unknown.append(name)
        else:
            numbers.append(number)
    return numbers, unknown


def has_no_names(id2label: Mapping[int, str]) -> bool:
    """Whether a model's classes have only the names that Transformers makes up: LABEL_0, LABEL_1 and so on."""
    return all(str(label).upper() == f"LABEL_{number}" for number, label in id2label.items())
