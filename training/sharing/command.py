"""The command line of a run, as somebody else can paste it: without paths of this machine."""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def command_of_run(argv: Sequence[str] = sys.argv, environment: Mapping[str, str] = os.environ) -> str:
    """Command line that starts this run again.

    Args:
        argv: of this process.
        environment: tells how many processes torchrun or `accelerate launch` has started.

    Returns: `evit train ...` or `torchrun ... -m evit_training train ...`; the flags are those of the command line, or
        the run's `arguments.yaml` where `train()` was called by a script or a notebook.
    """
    program, *flags = argv
    is_command = Path(program).name.startswith(("evit", "__main__")) and flags[:1] == ["train"]
    flags = flags[1:] if is_command else ["arguments.yaml"]
    num_processes = int(environment.get("WORLD_SIZE", "1"))
    local = int(environment.get("LOCAL_WORLD_SIZE", num_processes))
    start = ["evit", "train"]
    if num_processes > 1:
        nodes = ["--nnodes", str(num_processes // local)] if num_processes > local else []
        start = ["torchrun", *nodes, "--nproc-per-node", str(local), "-m", "evit_training", "train"]
    return shlex.join([*start, *flags])


def public_command(command: str) -> str:
    """A command line in which local paths are reduced to their last part, as `without_paths` does."""
    words = []
    for word in shlex.split(command):
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(f"{flag}{equals}{without_paths(value)}")
    return shlex.join(words)


def without_paths(value: Any) -> Any:
    """A setting, or a collection of settings, in which local paths are reduced to their last part.

    Where files were is nobody's business. Absolute paths, those that begin with `~` or `..`, and those that exist are
    local; Hub ids and addresses on the web stay.
    """
    if isinstance(value, dict):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    path = value.removeprefix("file://")
    is_local = path != value or re.match(r"[/\\~]|\.\.?[/\\]|[A-Za-z]:[/\\]", path) is not None
    try:
        is_local = is_local or (re.search(r"[/\\]", path) is not None and Path(path).exists())
    except (OSError, ValueError):  # too long for a path, or with a null character: text
        is_local = False
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "." if is_local else value


__all__ = ["command_of_run", "public_command", "without_paths"]
