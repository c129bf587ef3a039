"""Checkpoints that survive whatever kills a run: hashed, synchronised, renamed when complete, verified before use.

A checkpoint is a folder `step-000000123`:
    model.safetensors     raw weights, under the names of the modules in memory
    ema.safetensors       averaged weights, if there are any
    optimizer.pt          state of AdamW and of the gradient scaler, tensors and numbers only
    progress.json         everything else: optimizer step, counts, best result, settings of the run
    manifest.json         SHA-256 and size of each file above
It gets its name only when all of it is on the disk. When its weights have been evaluated it gets one more file:
    evaluation.json       what that changed in the progress, with a SHA-256
Without it, or if it is damaged, a resumed run evaluates again.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ..arguments import FIELDS, in_todays_words


MANIFEST = "manifest.json"
EVALUATION = "evaluation.json"
# What an evaluation changes in the progress.
EVALUATED = ("evaluated_step", "best", "evaluations_since_best")
PREFIX = "step-"
PARTIAL = ".partial-"


@dataclass
class Progress:
    """How far a run is: all that resuming needs apart from the tensors.

    Args:
        step: optimizer steps done, including skipped ones; it says which images come next.
        skipped_steps: of these, steps that changed nothing because the loss or a gradient was not finite. The
            schedules are at `step - skipped_steps`.
        skipped_in_row: the last ones of these, without a good one in between.
        evaluated_step: optimizer step of the last evaluation that was completed.
        bad_images: training images that could not be decoded and were replaced.
        accumulation_factor: into how many parts micro-batches are cut because memory ran out; 1 for not at all.
        seconds: time of the run so far, without what was lost by being killed.
        best: {"step", "weights": "raw" or "ema", "score"} of the best evaluation, or empty.
        evaluations_since_best: evaluations after it, none of which was better.
        num_processes: processes of the run.
        settings: flat settings of the run.
        data: see `fingerprint`; empty in checkpoints of older versions.
    """

    step: int = 0
    skipped_steps: int = 0
    skipped_in_row: int = 0
    evaluated_step: int = 0
    bad_images: int = 0
    accumulation_factor: int = 1
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    evaluations_since_best: int = 0
    num_processes: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def schedule_step(self) -> int:
        """Optimizer steps that counted."""
        return self.step - self.skipped_steps


class CheckpointError(RuntimeError):
    """Something that a run leaves could not be written at its end."""

    status = 1


class NoCheckpointError(CheckpointError):
    """No intact checkpoint to resume from, although there should be one."""

    status = 2


def checkpoint_path(folder: Path, step: int) -> Path:
    """Folder of the checkpoint of an optimizer step."""
    return folder / f"{PREFIX}{step:09d}"


def write_checkpoint(
    folder: Path,
    progress: Progress,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    ema: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint, all of it or nothing.

    Args:
        folder: of all checkpoints of the run.
        progress: how far the run is.
        model: weights by name, on the CPU.
        optimizer: state of the optimizer and what belongs to it.
        ema: averaged weights by name.

    Returns: the folder of the checkpoint.

    Raises: OSError if it cannot be written; what was there before is untouched and nothing partial is left.
    """
    final = checkpoint_path(folder, progress.step)
    if damage(final) is None:
        return final  # a run is deterministic, and `resume` refuses those of other settings: it holds exactly this
    partial = folder / f"{PARTIAL}{final.name}"
    buffer = BytesIO()
    torch.save(optimizer, buffer)
    files = {
        "model.safetensors": save_tensors(model),
        "optimizer.pt": buffer.getvalue(),
        "progress.json": json.dumps(asdict(progress), indent=2).encode(),
        **({"ema.safetensors": save_tensors(ema)} if ema is not None else {}),
    }
    manifest = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, data in {**files, MANIFEST: json.dumps(manifest, indent=2).encode()}.items():
            write_durably(partial / name, data)
        if final.exists():  # a damaged one of the same step
            shutil.rmtree(final)
        partial.rename(final)
        _synchronize_folder(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def write_evaluation(folder: Path, progress: Progress) -> None:
    """Add to the checkpoint of a step what the evaluation of its weights changed in the progress.

    Raises: OSError if it cannot be written.
    """
    text = json.dumps({name: getattr(progress, name) for name in EVALUATED})
    record = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "progress": text}
    replace_durably(checkpoint_path(folder, progress.step) / EVALUATION, json.dumps(record).encode())


def _evaluated(path: Path) -> dict[str, Any]:
    """What `write_evaluation` wrote; nothing if there is no such file, or one that is damaged."""
    try:
        record = json.loads((path / EVALUATION).read_bytes())
        if hashlib.sha256(record["progress"].encode()).hexdigest() == record["sha256"]:
            return json.loads(record["progress"])
        reason = "its SHA-256 is a different one"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    sys.stderr.write(f"{path / EVALUATION} is damaged ({reason}): the weights are evaluated again.\n")
    return {}


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Replace the contents of a file at once: a reader sees the old or the new ones."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    write_durably(partial, data)
    partial.replace(path)
    _synchronize_folder(path.parent)


def _synchronize_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; Windows cannot be asked to."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(path: Path) -> str | None:
    """Damage of a checkpoint in words, naming the file, or None if every byte is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for name, expected in manifest.items():
            data = (path / name).read_bytes()
            if len(data) != expected["size"]:
                return f"{name} has {len(data)} bytes instead of {expected['size']}"
            if hashlib.sha256(data).hexdigest() != expected["sha256"]:
                return f"{name} was changed: its SHA-256 is not that of {MANIFEST}"
        missing = {"model.safetensors", "optimizer.pt", "progress.json"} - manifest.keys()
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"
    return f"{MANIFEST} does not name {sorted(missing)}" if missing else None


def newest_checkpoint(folder: Path) -> Path | None:
    """Newest checkpoint of a run that is intact; damaged ones are named on standard error and skipped.

    Returns: its path, or None if there has never been one.

    Raises: NoCheckpointError if there are checkpoints and all of them are damaged.
    """
    for path in folder.glob(f"{PARTIAL}*"):
        sys.stderr.write(f"Skipped a half-written checkpoint, {path}.\n")
    paths = sorted(folder.glob(f"{PREFIX}*"), reverse=True)
    damaged = []
    for path in paths:
        found = damage(path)
        if found is None:
            return path
        damaged.append(f"{path}: {found}")
        sys.stderr.write(f"Skipped a damaged checkpoint, {damaged[-1]}.\n")
    if damaged:
        raise NoCheckpointError(
            f"None of the {len(paths)} checkpoints in {folder} is intact ({'; '.join(damaged)}): nothing was "
            "changed. Restore one, or pass `--overwrite` to start from the beginning."
        )
    return None


def read_checkpoint(path: Path) -> tuple[Progress, dict[str, Any]]:
    """Read a checkpoint.

    Returns: the progress, and {"model", "optimizer", "ema"} on the CPU; "ema" is None if there is none.

    Raises: NoCheckpointError if it is not intact, or of a different version.
    """
    found = damage(path)
    if found is not None:
        raise NoCheckpointError(f"{path} is not an intact checkpoint: {found}.")

    def weights(name: str) -> dict[str, torch.Tensor]:
        # In the same order on all processes, which safetensors does not guarantee: sharding each is a collective.
        return dict(sorted(load_tensors((path / name).read_bytes()).items()))

    try:
        progress = Progress(**{**json.loads((path / "progress.json").read_text()), **_evaluated(path)})
    except TypeError as error:
        raise NoCheckpointError(f"{path} was written by a different version of this trainer: {error}.") from None
    return progress, {
        "model": weights("model.safetensors"),
        "optimizer": torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        "ema": weights("ema.safetensors") if (path / "ema.safetensors").exists() else None,
    }


def rotate_checkpoints(folder: Path, keep: int, spared: Iterable[int] = ()) -> None:
    """Delete all but the newest `keep` intact checkpoints and those of the steps `spared`.

    Half-written ones go too. Damaged ones do not count as kept: a run must not lose an intact one to them.
    """
    spared_paths = {checkpoint_path(folder, step) for step in spared}
    num_kept = 0
    for path in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        # Reading a checkpoint again costs time: only those that might be kept are read.
        is_kept = num_kept < keep and damage(path) is None
        num_kept += is_kept
        if not is_kept and path not in spared_paths:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def data_that_differ(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What tells the data of a checkpoint from that of today, a line for each, as `settings_that_differ` does.

    Args:
        old: `Progress.data` of the checkpoint; empty if it is of an older version, which differs in nothing.
        new: that of this run.
    """
    if not old:
        return []
    lines = []
    gone, come = (
        [name for name in a["label_names"] if name not in b["label_names"]] for a, b in ((old, new), (new, old))
    )
    if gone or come:
        lines.append(f"  classes: {gone} in the checkpoint only, {come} now only")
    elif old["label_names"] != new["label_names"]:
        lines.append("  classes: the same, in a different order")
    for name, what in (("num_train", "training images"), ("num_eval", "evaluation images")):
        if old[name] != new[name]:
            lines.append(f"  {what}: {old[name]} in the checkpoint, {new[name]} now")
    if not lines and old["hash"] != new["hash"]:
        lines.append("  images: as many, but other files or other labels")
    return lines


def settings_that_differ(old: dict[str, Any], new: dict[str, Any], also_harmful: Iterable[str] = ()) -> list[str]:
    """Lines of a table with the settings that change the training and have changed; empty if there are none.

    Args:
        old: flat settings of the checkpoint.
        new: flat settings of this run.
        also_harmful: settings that matter in this run though they usually do not.
    """
    old = in_todays_words(old)
    names = [
        name
        for name in {**old, **new}
        if (name not in FIELDS or FIELDS[name].metadata["changes_training"] or name in also_harmful)
        and old.get(name) != new.get(name)
    ]
    width = max((len(name) for name in names), default=0)
    return [f"  {name:<{width}}  checkpoint: {old.get(name)!s:<12}  now: {new.get(name)}" for name in names]
