"""Labels of a split as class numbers, whatever form they come in: names, numbers, `a|b`, lists, zeros and ones."""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from .names import class_name


@dataclass
class Labels:
    """Labels of a split: one list for each image, of class numbers where `names` are known, else of values.

    `several` says whether an image can have several labels; if not, each list has one item.
    """

    rows: list[list[Any]]
    several: bool
    names: list[str] | None = None


def numbered(
    dataset: datasets.Dataset,
    column: str,
    split: str,
    names: list[str] | None = None,
    several: bool | None = None,
    is_plain: bool = False,
) -> tuple[datasets.Dataset, list[str], bool]:
    """The data with class numbers as labels, the names of the classes, and whether an image can have several.

    Args:
        dataset: with labels as numbers, strings or `ClassLabel`, lists of them, or zeros and ones for each class.
        column: of the labels.
        split: name of the data for messages.
        names: classes that numbers must follow: those of a second split are matched by name, not by position.
        several: what the other split is.
        is_plain: whether text is the name of one class, whatever it looks like.

    Raises: ValueError naming the labels that cannot be used.
    """
    labels = flattened_labels(dataset, column, split, several, is_plain)
    if labels.names is None:
        _check_values(labels, column, split)
        values = sorted({value for row in labels.rows for value in row})
        number_of = {value: i for i, value in enumerate(values)}
        labels = Labels(
            [[number_of[x] for x in row] for row in labels.rows], labels.several, [class_name(x) for x in values]
        )
    labels = _merged(labels)
    if names is not None and labels.names != names:
        labels = matched_by_name(labels, names, split)
    rows = labels.rows if labels.several else [row[0] for row in labels.rows]
    return with_labels(dataset, column, rows, labels.several), labels.names or [], labels.several


def _merged(labels: Labels) -> Labels:
    """Labels with one number for all spellings of a class."""
    names = list(dict.fromkeys(labels.names or ()))
    if names == labels.names:
        return labels
    number_of = [names.index(name) for name in labels.names or ()]
    return Labels([[number_of[x] for x in row] for row in labels.rows], labels.several, names)


def flattened_labels(
    dataset: datasets.Dataset, column: str, split: str, several: bool | None, is_plain: bool = False
) -> Labels:
    """Labels as lists, with the names of their classes where the data tells them.

    Args:
        dataset: the data.
        column: of the labels.
        split: for messages.
        several: whether another split has several labels for an image; None if there is none.
        is_plain: whether text is the name of one class, whatever it looks like.
    """
    feature = dataset.features[column]
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    values = dataset.select_columns(column).with_format("arrow")[:][column].to_pylist()
    # Only NaN differs from itself.
    missing = [
        i
        for i, row in enumerate(values)
        for x in (row if isinstance(row, list) else [row])
        if x in (None, "") or x != x
    ]
    if missing:
        raise ValueError(
            f"Column `{column}` of the {split} split has {len(missing)} images without a label, the first is number "
            f"{missing[0]}: remove them."
        )
    if inner is None and not is_plain and values and all(isinstance(x, str) for x in values):
        values = _parsed(values, several)
    is_list = inner is not None or any(isinstance(x, list) for x in values)
    if is_list:
        declared = inner.names if isinstance(inner, datasets.ClassLabel) else None
        hot = _hot_labels(values, several, declared)
        if hot is not None:
            return hot
    if several is not None and is_list != several:
        raise ValueError(f"Column `{column}` holds lists of labels in one split and single labels in the other.")
    rows = values if is_list else [[x] for x in values]
    kind = inner if is_list else feature
    if isinstance(kind, datasets.ClassLabel):
        return checked_class_labels(Labels(rows, is_list, [class_name(x) for x in kind.names]), column, split)
    if any(isinstance(x, str) for row in rows for x in row):
        rows = [[class_name(x) for x in row] for row in rows]
    return Labels(rows, is_list)


def _parsed(values: list[str], several: bool | None) -> list[Any]:
    """Text as lists where it is zeros and ones (`1|0|1`, `[1 0 1]`), `[...]` everywhere, or `a|b` somewhere."""
    if values and all(re.fullmatch(r"\[?\s*[01]\.?0*(\s*[,;|\s]\s*[01]\.?0*)+\s*\]?", x.strip()) for x in values):
        return [[int(float(number)) for number in re.findall(r"[01]\.?0*", x)] for x in values]
    if all(x[:1] == "[" and x[-1:] == "]" for x in map(str.strip, values)):
        try:
            return [ast.literal_eval(x) for x in values]
        except (ValueError, SyntaxError):
            return values
    if several or any("|" in x for x in values):
        return [[part for part in map(class_name, x.split("|")) if part] for x in values]
    return values


def _hot_labels(rows: Sequence[list[Any]], several: bool | None, names: list[str] | None) -> Labels | None:
    """Labels from lists of zeros and ones, one for each class; None if the lists hold labels themselves."""
    lengths = {len(row) for row in rows}
    length = lengths.pop() if len(lengths) == 1 else 0
    if length < 2 or not all(x in (0, 1) and not isinstance(x, str) for row in rows for x in row):
        return None
    if names is not None and (len(names) != length or all(len(set(row)) == length for row in rows)):
        return None
    labels = [[i for i, x in enumerate(row) if x] for row in rows]
    if several is None:
        several = any(len(row) != 1 for row in labels)
    if not several and any(len(row) != 1 for row in labels):
        return None
    return Labels(labels, several, [class_name(x) for x in names] if names else [str(i) for i in range(length)])


def checked_class_labels(labels: Labels, column: str, split: str) -> Labels:
    """Labels whose names the data tells, if all of them are in range.

    Raises: ValueError naming those that are not.
    """
    num_classes = len(labels.names or ())
    wrong = sorted({x for row in labels.rows for x in row if not 0 <= x < num_classes})
    if wrong:
        number = next(i for i, row in enumerate(labels.rows) if set(wrong) & set(row))
        raise ValueError(
            f"Column `{column}` of the {split} split has labels {wrong[:5]}, but {num_classes} classes; the first is "
            f"image {number}. Hidden test labels (-1) cannot be used."
        )
    return labels


def _check_values(labels: Labels, column: str, split: str) -> None:
    """Raise ValueError for labels that are not names or numbers of classes."""
    odd = [value for row in labels.rows for value in row if not isinstance(value, (int, str, bool))]
    if odd:
        raise ValueError(
            f"Column `{column}` holds {type(odd[0]).__name__}, not classes: {sorted(set(map(str, odd)))[:5]}. Write "
            "names or whole numbers."
        )
    values = {value for row in labels.rows for value in row}
    if len({isinstance(value, str) for value in values}) > 1:
        raise ValueError(f"Column `{column}` of the {split} split holds both text and numbers: write one of them.")
    if -1 in values:
        count = sum(row.count(-1) for row in labels.rows)
        raise ValueError(
            f"Column `{column}` of the {split} split has {count} labels of -1: hidden test labels cannot be used."
        )


def matched_by_name(labels: Labels, names: list[str], split: str) -> Labels:
    """Labels with the numbers that their classes have among `names`.

    Raises: ValueError naming classes that are not there.
    """
    own = labels.names or []
    unknown = sorted({own[i] for row in labels.rows for i in row} - set(names))
    if unknown:
        raise ValueError(
            f"The {split} split has classes that the training split has not: {unknown}. Add pictures of them to the "
            "training split, remove them, or pass `--allow-missing-classes`."
        )
    number_of = {i: names.index(name) for i, name in enumerate(own) if name in names}
    return Labels([[number_of[x] for x in row] for row in labels.rows], labels.several, names)


def with_labels(
    dataset: datasets.Dataset, column: str, labels: list[int] | list[list[int]], multi_label: bool
) -> datasets.Dataset:
    """The data with other labels in a column: class numbers, or lists of them where `multi_label` holds."""
    number = datasets.Value("int64")
    features = datasets.Features({column: datasets.Sequence(number) if multi_label else number})
    numbers = datasets.Dataset.from_dict({column: labels}, features=features)
    return datasets.concatenate_datasets([dataset.remove_columns(column), numbers], axis=1)


def with_hot_columns(
    dataset: datasets.Dataset, columns: Sequence[str], name: str, several: bool | None = None
) -> datasets.Dataset:
    """The data with one column of labels instead of a column of zeros and ones for each class.

    Args:
        dataset: the data.
        columns: of zeros and ones.
        name: of the new column.
        several: whether it holds lists; by default if an image has no label or several.
    """
    table = dataset.select_columns(list(columns)).with_format("arrow")[:]
    rows = zip(*(table[column].to_pylist() for column in columns), strict=True)
    labels = [[i for i, x in enumerate(row) if x] for row in rows]
    if several is None:
        several = any(len(row) != 1 for row in labels)
    classes = datasets.ClassLabel(names=[class_name(column) for column in columns])
    feature = datasets.Sequence(classes) if several else classes
    values = labels if several else [row[0] if len(row) == 1 else None for row in labels]
    added = datasets.Dataset.from_dict({name: values}, features=datasets.Features({name: feature}))
    return datasets.concatenate_datasets([dataset.remove_columns(list(columns)), added], axis=1)


def hot_columns(dataset: datasets.Dataset, without: Sequence[str]) -> list[str]:
    """Columns that hold only zeros and ones, if there are at least two of them."""
    kinds = ("bool", "int64", "int32", "int8", "uint8", "float64")
    found = [x for x, kind in dataset.features.items() if x not in without and getattr(kind, "dtype", "") in kinds]
    table = dataset.select_columns(found).with_format("arrow")[:] if found else {}
    found = [column for column in found if set(table[column].unique().to_pylist()) <= {0, 1}]
    return found if len(found) > 1 else []
