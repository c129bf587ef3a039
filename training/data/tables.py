"""Tables of images and labels: CSV, TSV, JSON lines, Parquet and Arrow, as people's programs write them."""

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.compute

from .folders import picture_suffixes
from .images import DatasetLike, OutsideFileError
from .names import SPLIT_OF_WORD, class_name


FILE_TYPES = {
    **{".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"},
    **{".jsonl": "json", ".ndjson": "json", ".json": "json"},
}
IMAGE_COLUMNS = ("image", "img", "pixel_values", "file_name", "filename", "file", "path", "image_path", "filepath")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
SPLIT_COLUMNS = ("split", "subset", "partition", "set")


def usual_column(columns: Iterable[str], words: Sequence[str]) -> str | None:
    """The column that has one of some usual names, in capitals or not; the earlier names first."""
    by_word = {column.strip().casefold(): column for column in reversed(list(columns))}
    return next((by_word[word] for word in words if word in by_word), None)


def file_type(file: str | Path) -> str | None:
    """Kind of a data file by its suffix, in capitals or not; None if it is not one."""
    return FILE_TYPES.get(Path(file).suffix.lower())


def read_table(
    file: str,
    image_column: str | None,
    label_column: str | None,
    allow_outside: bool,
    streaming: bool,
    notes: list[str],
) -> Any:
    """Read one data file.

    Args:
        file: path.
        image_column: with pictures, or their paths, which are relative to the file's folder.
        label_column: setting of that name.
        allow_outside: whether paths may lead out of that folder, and be URLs.
        streaming: whether pictures inside the file are read while they are used.
        notes: gets a line for each thing that was found out and not said.

    Returns: the data with its pictures undecoded; a table of paths is never streamed, its pictures are.

    Raises: ValueError naming the file and what is wrong with it.
    """
    kind = file_type(file)
    if kind in ("csv", "json"):
        columns = _read_csv(file, notes) if kind == "csv" else _read_json(file)
        name = image_column or usual_column(columns, IMAGE_COLUMNS)
        if name not in columns:
            hint = " The first line of a CSV file must hold the names of its columns." if kind == "csv" else ""
            raise ValueError(
                f"`{file}` has the columns {list(columns)[:20]}: name that of the images' paths with "
                f"`--image-column`.{hint}"
            )
        if not columns[name]:
            raise ValueError(f"`{file}` has no rows.")
        if kind == "csv":
            columns = {x: values if x == name else _numbers(values) for x, values in columns.items()}
        columns[name] = resolved(columns[name], file, name, allow_outside)
        label = label_column or usual_column(columns, LABEL_COLUMNS)
        for column, values in list(columns.items()):
            try:
                pyarrow.array(values)
            except (pyarrow.ArrowException, TypeError, OverflowError) as error:
                if column == label or label is None:
                    raise ValueError(f"Column `{column}` of `{file}` holds values of several kinds: {error}") from None
                notes.append(f"Column `{column}` of `{file}` holds values of several kinds, and is not used.")
                del columns[column]
        return datasets.Dataset.from_dict(columns).cast_column(name, datasets.Image(decode=False))
    return _with_images(_load_binary(file, kind, streaming), file, kind, image_column, allow_outside, streaming)


def labels_of_text(file: Path, image_column: str | None, label_column: str | None) -> set[str] | None:
    """Labels of a CSV or JSON-lines file; None if it has no column of pictures, or none of labels.

    Columns of zeros and ones are labels too: their names.
    """
    try:
        columns: dict[str, list[Any]] = _read_csv(str(file), []) if file_type(file) == "csv" else _read_json(str(file))
    except ValueError:
        return None
    label_column = label_column or usual_column(columns, LABEL_COLUMNS)
    if (image_column or usual_column(columns, IMAGE_COLUMNS)) not in columns:
        return None
    if label_column in columns:
        return {class_name(value) for value in columns[label_column]}
    hot = {name for name, values in columns.items() if {str(value) for value in values} <= {"0", "1", "0.0", "1.0"}}
    return hot if len(hot) > 1 else None


def has_split_column(file: Path) -> bool:
    """Whether a CSV or JSON-lines file has a column that is called as those are that tell the split."""
    columns = _read_csv(str(file), []) if file_type(file) == "csv" else _read_json(str(file))
    return usual_column(columns, SPLIT_COLUMNS) is not None


def _load_binary(file: str, kind: str | None, streaming: bool) -> DatasetLike:
    if "::" in file:
        raise ValueError(f"`--dataset {file}`: `::` in a path would be read as a chain of URLs: rename it.")
    try:
        pattern = re.sub(r"([*?\[])", r"[\1]", file)  # the name itself, not what it would match
        return datasets.load_dataset(kind, data_files=pattern, split="train", streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"`--dataset {file}` could not be read: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """What an error of `datasets` says, in one line; of a cache that cannot be written it names the setting."""
    cause = error.__cause__ or error.__context__
    reason = " ".join((f"{error}: {cause}" if cause is not None else str(error)).split())
    caches = (str(datasets.config.HF_CACHE_HOME), str(datasets.config.HF_DATASETS_CACHE))
    for one in (error, cause):
        file = str(one.filename) + os.sep if isinstance(one, OSError) and one.filename else None
        if file and any(file.startswith(x + os.sep) or x.startswith(file) for x in caches):
            return f"{reason} (set HF_HOME, now {caches[0]}, to a folder that can be written)"
    return reason


def _with_images(
    table: DatasetLike, file: str, kind: str | None, name: str | None, allow_outside: bool, streaming: bool
) -> DatasetLike:
    """A Parquet or Arrow table whose pictures are pictures, also where no program has said so in its metadata."""
    if table.features is None or any(isinstance(x, datasets.Image) for x in table.features.values()):
        return table
    pictures = [column for column, feature in table.features.items() if _holds_bytes(feature)]
    name = name or usual_column(table.column_names, IMAGE_COLUMNS) or (pictures[0] if len(pictures) == 1 else None)
    feature = table.features.get(name)
    dtype = getattr(feature, "dtype", None)
    if name in pictures:
        if isinstance(feature, dict) and not streaming:
            values = table.data.column(name)
            if pyarrow.compute.all(pyarrow.compute.is_null(pyarrow.compute.struct_field(values, "bytes"))).as_py():
                paths = pyarrow.compute.struct_field(values, "path") if "path" in feature else [None] * len(table)
                return _with_paths(table, resolved(pyarrow.array(paths).to_pylist(), file, name, allow_outside), name)
        if isinstance(feature, dict) and set(feature) != {"bytes", "path"}:
            table = table.map(lambda row: {name: {"bytes": row[name]["bytes"], "path": None}})
        return table.cast_column(name, datasets.Image(decode=False))
    if dtype is not None and (dtype.endswith(("string", "string_view")) or dtype.startswith("int")):
        if streaming:
            table = _load_binary(file, kind, streaming=False)
        return _with_paths(table, resolved(table[name][:], file, name, allow_outside), name)
    return table


def _holds_bytes(feature: Any) -> bool:
    """Whether a column may hold encoded pictures: bytes, or a struct with them."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary", "binary_view")


def _with_paths(table: datasets.Dataset, paths: list[str], name: str) -> datasets.Dataset:
    return table.remove_columns(name).add_column(name, paths).cast_column(name, datasets.Image(decode=False))


def _read_csv(file: str, notes: list[str]) -> dict[str, list[str]]:
    """Columns of a CSV file as text, with its own separator and encoding: no value is taken for a missing one.

    A first line like `sep=;`, which Excel writes, and columns without any text are left out.
    """
    text = _decoded(file, notes)
    told = re.match(r"sep=(.)\r?\n", text)
    text = text[told.end() :] if told else text
    header = text.split("\n", 1)[0].rstrip("\r")
    separator = told.group(1) if told else max(",;\t|", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        rows = [row for row in reader if any(map(str.strip, row))]
    except csv.Error as error:  # such as a quote that is never closed, which would swallow rows
        raise ValueError(f"`{file}` could not be read as CSV up to line {reader.line_num}: {error}.") from None
    num_columns = max((i for row in rows for i, value in enumerate(row, 1) if value.strip()), default=0)
    if rows and len(rows[0]) > num_columns:
        rows = [row[:num_columns] if len(row) == len(rows[0]) else row for row in rows]
    names = [name.strip() for name in rows[0]] if rows else []
    if len(set(names)) < len(names):
        raise ValueError(f"`{file}` has several columns of one name: {names}.")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(names):
            raise ValueError(
                f"`{file}` has {len(names)} columns, but {len(row)} values in row {number}: put text that holds "
                f"`{separator}` into quotes."
            )
    return {name: [row[i].strip() for row in rows[1:]] for i, name in enumerate(names)}


def _decoded(file: str, notes: list[str]) -> str:
    """Text of a CSV file in its own encoding; a note says so if it is not Unicode.

    Raises: ValueError if it is not text.
    """
    data = Path(file).read_bytes()
    encodings = ["utf-16"] if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "cp1252", "latin-1"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
            break
        except UnicodeDecodeError:
            continue
    else:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"`{file}` is not text in UTF-8 or UTF-16: save it as UTF-8.")
    if encoding not in ("utf-8-sig", "utf-16"):
        notes.append(f"`{file}` is not UTF-8, and was read as {encoding}.")
    return text


def _read_json(file: str) -> dict[str, list[Any]]:
    """Columns of JSON lines, or of one list of objects."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        rows = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(x) for x in text.split("\n") if x.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`--dataset {file}` could not be read as JSON lines: {error}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"`{file}` must hold one JSON object for each image, a line for each.")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _numbers(values: list[str]) -> list[Any]:
    """Text of a CSV column as numbers, where all of it is numbers as Python writes them: `007` is a name."""
    if values and all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", value) for value in values):
        return [int(value) for value in values]
    if values and all(re.fullmatch(r"-?\d+\.\d+", value) for value in values):
        return [float(value) for value in values]
    return values


def resolved(values: Sequence[Any], file: str, column: str, allow_outside: bool) -> list[str]:
    """Full paths of the pictures that a table names, found also without suffix or in the other spelling of Unicode.

    Args:
        values: paths as the table has them, relative to its folder.
        file: the table.
        column: for messages.
        allow_outside: whether they may be URLs, or lead out of the table's folder.

    Raises: ValueError naming the first row that has no path, a path that leads outside, or no file there.
    """
    folder = Path(file).resolve().parent
    listings: dict[str, dict[str, list[str]]] = {}
    found: list[str] = []
    missing: list[tuple[int, str]] = []
    for number, value in enumerate(values, 1):
        if not (value is None or isinstance(value, (str, int))):
            raise ValueError(
                f"Column `{column}` of `{file}` holds {type(value).__name__} in row {number}, not a path: write one "
                "row for each picture."
            )
        text = "" if value is None else str(value).strip()
        if not text:
            raise ValueError(
                f"Column `{column}` of `{file}` is empty in row {number}: name a file, or remove the row."
            )
        path = os.path.normpath(folder / text)
        if "\\" in text and not os.path.exists(path):  # as Windows writes paths
            path = os.path.normpath(folder / text.replace("\\", "/"))
        is_outside = not path.startswith(str(folder) + os.sep)
        is_remote = ("://" in text or "::" in text) and not os.path.exists(path)
        if (is_outside or is_remote) and not allow_outside:
            raise OutsideFileError(
                f"Column `{column}` of `{file}` names `{text[:100]}` in row {number}, "
                f"{'a URL' if is_remote else f'which is outside the data set in {folder}'}: data from others should "
                "not say what is read here. Pass `--allow-outside-files` if you trust it."
            )
        path = text if is_remote else _existing(path, listings)
        if path is None:
            missing.append((number, text))
        else:
            found.append(path)
    if missing:
        raise ValueError(
            f"Column `{column}` of `{file}` names files that are not in {folder}: {len(missing)} of {len(values)}, "
            f"the first is `{missing[0][1][:100]}` in row {missing[0][0]}."
        )
    return found


def _existing(path: str, listings: dict[str, dict[str, list[str]]]) -> str | None:
    """The file at a path, or the only picture there that has this name and a suffix."""
    folder, name = os.path.split(path)
    if folder not in listings:
        names: dict[str, list[str]] = {}
        suffixes = picture_suffixes()
        for entry in os.listdir(folder) if os.path.isdir(folder) else ():
            plain = unicodedata.normalize("NFC", entry)
            names.setdefault(plain, []).insert(0, entry)
            stem, suffix = os.path.splitext(plain)
            if suffix.lower() in suffixes:
                names.setdefault(stem, []).append(entry)
        listings[folder] = names
    matches = listings[folder].get(unicodedata.normalize("NFC", name), [])
    if name in matches:
        return path
    same = [match for match in matches if unicodedata.normalize("NFC", match) == unicodedata.normalize("NFC", name)]
    matches = same or matches
    return os.path.join(folder, matches[0]) if len(matches) == 1 else None


def by_split(
    table: DatasetLike, file: str, told: str | None, named: Sequence[str], label_column: str | None
) -> dict[str | None, DatasetLike]:
    """The splits of one table: by its column `split`, or the one that its name tells, which may be None.

    Args:
        table: the data.
        file: its path.
        told: the split that its name tells.
        named: splits that the settings name; values of the column may be these, or usual words.
        label_column: setting of that name; classes may be called train and test.

    Raises: ValueError for other values, or for such a column in streamed data.
    """
    column = usual_column(table.column_names, SPLIT_COLUMNS)
    if isinstance(table, datasets.IterableDataset):
        if column is not None and told is None:
            raise ValueError(f"Column `{column}` of `{file}` may tell the split: leave out `--streaming`.")
        return {told: table}
    column = column or _column_of_split_words(table, label_column or usual_column(table.column_names, LABEL_COLUMNS))
    if column is None:
        return {told: table}
    values = [str(value).strip() for value in table[column][:]]
    meaning = {value: value if value in named else SPLIT_OF_WORD.get(value.casefold()) for value in set(values)}
    unknown = sorted(value for value, split in meaning.items() if split is None)
    if len(unknown) == len(meaning) and (len(unknown) < 2 or column.casefold() == "set"):
        return {told: table}  # something else that is called so
    if unknown:
        raise ValueError(
            f"Column `{column}` of `{file}` has {unknown[:5]}, which are not splits: write train, validation or test, "
            "or name them with `--train-split` and `--eval-split`."
        )
    splits = [meaning[value] for value in values]
    table = table.remove_columns(column)
    return {
        split: table.select([i for i, value in enumerate(splits) if value == split])
        for split in dict.fromkeys(splits)
        if split is not None
    }


def _column_of_split_words(table: datasets.Dataset, label_column: str | None) -> str | None:
    """A column of text that holds nothing but the words of at least two splits, whatever its name."""
    for column, feature in table.features.items():
        if column == label_column or getattr(feature, "dtype", None) not in ("string", "large_string"):
            continue
        values = table.data.column(column).unique().to_pylist()
        splits = {SPLIT_OF_WORD.get(str(value).strip().casefold()) for value in values}
        if len(splits) > 1 and None not in splits:
            return column
    return None
