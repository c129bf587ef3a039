"""The screen of a command: notes, bars and the result, as `--quiet` and `--json` ask for.

Notes go to standard output, with `--quiet` nowhere; where they would get between results that others read, as with
`--json`, to standard error. Bars are drawn on terminals only. The result goes to standard output. Of several processes
on a machine the first one writes.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm


Item = TypeVar("Item")


@dataclass
class _Shown:
    """What the command that runs wants to be shown."""

    quiet: bool = False
    json: bool = False
    notes_to_stderr: bool = False


_shown = _Shown()


@contextlib.contextmanager
def screen(quiet: bool, as_json: bool, notes_to_stderr: bool = False) -> Iterator[None]:
    """Show what a command's `--quiet` and `--json` ask for, and no bars of libraries, while it runs.

    Args:
        quiet: `--quiet`.
        as_json: `--json`.
        notes_to_stderr: whether notes stay out of standard output without `--json` too.
    """
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    before = vars(_shown).copy()
    _shown.quiet, _shown.json, _shown.notes_to_stderr = quiet, as_json, as_json or notes_to_stderr
    try:
        yield
    finally:
        vars(_shown).update(before)


def is_first_process() -> bool:
    """Whether this process is the first one on its machine, the one that writes on the screen."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def say(text: str, is_result: bool = False) -> None:
    """Write a note, above the bars.

    Args:
        text: one line or several.
        is_result: whether it is a part of the result, which `--quiet` shows too unless `--json` has the whole.
    """
    if not _shown.quiet or (is_result and not _shown.json):
        _write(text, sys.stderr if _shown.notes_to_stderr else sys.stdout)


def show_result(text: str | None, result: Any) -> None:
    """Write the result of a command: with `--json` the object as one line of JSON, else `text`, if it was not said."""
    if _shown.json:
        _write(json.dumps(result), sys.stdout)
    elif text is not None:
        _write(text, sys.stdout)


class Bar(tqdm):
    """A bar of tqdm with a lock of this process, and without the thread that watches bars.

    The lock of tqdm itself is shared with processes that were forked: where one is killed while it holds it, as those
    that load images may be, all others wait for ever, bars shown or not.
    """

    monitor_interval = 0
    _lock = threading.RLock()


def bar(items: Iterable[Item] | None = None, unit: str = "it", **options: Any) -> "tqdm[Item]":
    """A bar of tqdm on standard error, drawn only on a terminal and without `--quiet`.

    Args:
        items: what is counted; by default the bar is moved by `update`.
        unit: name of an item.
        **options: of `tqdm`.
    """
    is_off = _shown.quiet or not is_first_process()
    shown = {"file": sys.stderr, "disable": True if is_off else None, "dynamic_ncols": True, "unit": f" {unit}"}
    return Bar(items, **shown, **options)


def _write(text: str, stream: Any) -> None:
    if is_first_process():
        with Bar.external_write_mode(file=stream):
            stream.write(f"{text}\n")
            stream.flush()
