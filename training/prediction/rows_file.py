"""Rows in a file: CSV, JSON lines or Parquet, written once complete; until then a journal that survives any end."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from .predictor import Row, schema


FORMATS = (".csv", ".jsonl", ".parquet")
ROWS_OF_A_GROUP = 10_000


class RowsFile:
    """A file of rows that is complete or not there, and a journal next to it that a second run continues.

    The journal, `FILE.partial`, is text: its first line the settings, then a JSON object for each row. What a run that
    was killed has written is not predicted again.

    Args:
        path: of the file; its suffix says the format, one of `FORMATS`.
        settings: what makes predictions differ.
        overwrite: whether to replace an existing file and start over.

    Raises: ValueError for an unknown suffix, a file that exists, or a journal of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path, self.settings = path, dict(settings)
        check_rows_path(path, overwrite)
        self.journal = path.with_name(path.name + ".partial")
        self.done: set[str] = set()
        if self.journal.exists() and not overwrite:
            self._resume()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.journal.write_text(json.dumps(self.settings) + "\n")
        self._file = self.journal.open("a")

    def write(self, rows: Sequence[Row]) -> None:
        """Add rows; after that a kill of the process does not lose them."""
        self._file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._file.flush()
        self.done.update(row["path"] for row in rows)

    def finish(self) -> None:
        """Write the file from the journal, and remove that."""
        self._file.close()
        part = self.path.with_name(self.path.name + ".part")
        {".csv": self._write_csv, ".jsonl": self._write_json_lines, ".parquet": self._write_parquet}[
            self.path.suffix.lower()
        ](part)
        os.replace(part, self.path)
        self.journal.unlink()

    def rows(self) -> Iterator[Row]:
        """Rows so far, in the order in which they were written."""
        with self.journal.open() as file:
            next(file)
            for line in file:
                yield json.loads(line)

    def _resume(self) -> None:
        """Read what is done, and cut off a line that was not written whole."""
        with self.journal.open("rb") as file:
            try:
                settings = json.loads(file.readline())
            except ValueError:
                raise ValueError(f"`{self.journal}` is damaged: remove it, or pass `--overwrite`.") from None
            if settings != self.settings:
                different = sorted(
                    name for name in settings.keys() | self.settings if settings.get(name) != self.settings.get(name)
                )
                raise ValueError(
                    f"`{self.journal}` was begun with other settings ({', '.join(different)}): choose a different "
                    "`--output`, or `--overwrite` to start over."
                )
            end = file.tell()
            for line in file:
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    row = None
                if row is None:
                    break
                self.done.add(row["path"])
                end += len(line)
        with self.journal.open("r+b") as file:
            file.truncate(end)

    def _write_csv(self, path: Path) -> None:
        """Write lists as columns with numbers: label_1, score_1, label_2, ..., then error and feature_1, ..."""
        num_labels = self.settings["top_k"]
        num_features = max((len(row.get("features") or ()) for row in self.rows()), default=0)
        names = ["path", *(f"{kind}_{k + 1}" for k in range(num_labels) for kind in ("label", "score")), "error"]
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, *(f"feature_{k + 1}" for k in range(num_features))])
            for row in self.rows():
                labels, scores = (row[name] or [None] * num_labels for name in ("labels", "scores"))
                pairs = [value for pair in zip(labels, scores, strict=True) for value in pair]
                features = (row.get("features") or [None] * num_features) if num_features else []
                writer.writerow([row["path"], *pairs, row["error"], *features])

    def _write_json_lines(self, path: Path) -> None:
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows())

    def _write_parquet(self, path: Path) -> None:
        with pyarrow.parquet.ParquetWriter(path, schema(self.settings["features"])) as writer:
            group: list[Row] = []
            for row in self.rows():
                group.append(row)
                if len(group) == ROWS_OF_A_GROUP:
                    writer.write_table(pyarrow.Table.from_pylist(group, writer.schema))
                    group = []
            writer.write_table(pyarrow.Table.from_pylist(group, writer.schema))


def check_rows_path(path: Path, overwrite: bool) -> None:
    """Refuse a file that rows cannot be written to, before anything heavy is loaded.

    Raises: ValueError naming the flag.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"`--output` must end in {', '.join(FORMATS)}, got `{path}`.")
    if path.is_dir():
        raise ValueError(f"`--output` is a folder, `{path}`: name a file.")
    if path.exists() and not overwrite:
        raise ValueError(f"`--output`: `{path}` already exists: choose a different file, or pass `--overwrite`.")
