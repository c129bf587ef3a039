"""The folder of a run: who may write into it, what is left in it, and how an earlier run in it is resumed."""

import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from transformers import BaseImageProcessor, PreTrainedModel

from evit_hf.checkpoint_files import set_modes_by_umask
from evit_hf.towers import tower_of
from evit_hf.visualization import attentive_patch_picture

from ..arguments import TrainArguments
from ..data.augmentation import ProcessorTransform
from ..data.images import EvaluationImages, ImageSplits
from ..measuring.machine import package_versions
from ..screen import say
from ..sharing.command import command_of_run
from .checkpoints import (
    PARTIAL,
    PREFIX,
    CheckpointError,
    NoCheckpointError,
    checkpoint_path,
    damage,
    data_that_differ,
    newest_checkpoint,
    read_checkpoint,
    replace_durably,
    settings_that_differ,
)
from .interruption import lock, unlock
from .metrics_log import TRACKER_FOLDER
from .state import TrainingState


# Whose versions the card of a run names.
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evit-hf")
# What a run leaves in its output folder.
RUN_FILES = (
    "model",
    "checkpoints",
    "metrics.jsonl",
    "results.json",
    "class_report.json",
    "arguments.yaml",
    "kept_patches.png",
    "tradeoff.png",
    "run.json",
    "README.md",
    "export",
    "push.log",
    "non_finite.json",
)


FOLDERS = ("model", "checkpoints", "export")
# Of these, what is there before the first checkpoint.
AT_THE_START = ("checkpoints", "metrics.jsonl", "arguments.yaml", "push.log", "non_finite.json")


class OtherSettingsError(ValueError):
    """A run cannot resume under settings that change the training; the message holds a table of them."""

    status, is_table = 2, True


@contextmanager
def run_folder(accelerator: Accelerator, arguments: TrainArguments) -> Iterator[Path | None]:
    """Lock the output folder for the time of the run.

    Yields: the checkpoint to resume from, or None.

    Raises: ValueError if the folder is in use, or holds a run that is neither to be resumed nor overwritten.
    """
    run = arguments.run
    output_dir = Path(run.output_dir)
    if run.resume and run.overwrite:
        raise ValueError("`--overwrite` would delete what `--resume` continues from: pass one of them.")
    if run.dry_run:
        yield None
        return
    held = lock(output_dir) if accelerator.is_main_process else None
    try:
        resume_from = checkpoint_to_resume(accelerator, arguments)
        accelerator.wait_for_everyone()
        yield resume_from
    finally:
        if held is not None:
            unlock(held)
            if not any(output_dir.iterdir()):
                output_dir.rmdir()


def checkpoint_to_resume(accelerator: Accelerator, arguments: TrainArguments) -> Path | None:
    """Checkpoint that `--resume` names, or None for a run from the beginning.

    Raises: ValueError if the output folder holds a run that is neither to be resumed nor overwritten.
    """
    run = arguments.run
    output_dir = Path(run.output_dir)
    left = [name for name in RUN_FILES if (output_dir / name).exists()]
    if not run.overwrite:
        check_kinds(output_dir)
    if run.resume == "auto":
        newest = newest_checkpoint(output_dir / "checkpoints")
        results = [name for name in left if name not in AT_THE_START]
        if newest is None and results:
            raise ValueError(
                f"`{output_dir}` has no checkpoint to resume from, but holds {', '.join(results)}, which a run from "
                "the beginning would delete: choose a different `--output-dir`, or pass `--overwrite` instead of "
                "`--resume auto`."
            )
        if newest is None and left:
            say(f"`{output_dir}` has no checkpoint yet: the run starts from the beginning.")
        return newest
    if run.overwrite:
        check_sources(arguments, {(output_dir / name).resolve() for name in left})
    named = None if run.resume is None else Path(run.resume)
    is_its_own = named is not None and named.resolve().parent.parent == output_dir.resolve()
    if left and not run.overwrite and not is_its_own:
        raise ValueError(
            f"`{output_dir}` holds a run already ({', '.join(left)}): resume it with `--resume auto`, choose a "
            "different `--output-dir`, or pass `--overwrite` to delete it."
        )
    return named


def check_sources(arguments: TrainArguments, deleted: Collection[Path]) -> None:
    """Check that `--overwrite` spares the models that the run starts from or learns from.

    Raises: ValueError naming the flag.
    """
    sources = {name: getattr(arguments.teacher, name) for name in ("oracle", "teacher")}
    for name, source in {"model": arguments.model.model, **sources}.items():
        if source is not None and any(Path(source).resolve().is_relative_to(path) for path in deleted):
            raise ValueError(f"`--overwrite` would delete `--{name} {source}`: choose a different `--output-dir`.")


def check_kinds(output_dir: Path) -> None:
    """Check that what is in the output folder can be replaced by what a run writes there.

    Raises: ValueError for a folder in the place of a file, or a file in the place of a folder.
    """
    for name in RUN_FILES:
        path, needs_folder = output_dir / name, name in FOLDERS
        if path.exists() and path.is_dir() != needs_folder:
            kinds = ("file", "folder") if needs_folder else ("folder", "file")
            raise ValueError(
                f"`{path}` is a {kinds[0]}, where a run has a {kinds[1]}: move it away, or pass `--overwrite` to "
                "delete what is in the output folder."
            )


def prepare_output_dir(output_dir: Path, arguments: TrainArguments, keeps_files: bool) -> None:
    """Write down the settings, and clear the folder of what an earlier run left unless this one resumes it."""
    for name in () if keeps_files else (*RUN_FILES, TRACKER_FOLDER):
        path = output_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    # Without what is only about this start of the run, so that the file is a recipe that can be resumed.
    settings = arguments.as_dict() | {
        "resume": None,
        "resume_override": False,
        "overwrite": False,
        "quiet": False,
        "json": False,
    }
    replace_durably(output_dir / "arguments.yaml", yaml.safe_dump(settings, sort_keys=False).encode())


def resume_command(output_dir: Path) -> str:
    """Command line that resumes the run in a folder."""
    return command_of_run(["evit", "train", str(output_dir / "arguments.yaml"), "--resume", "auto"])


@contextmanager
def saying_what_is_safe(state: TrainingState, output_dir: Path, num_steps: int) -> Iterator[None]:
    """Add to any error that ends a run what of it is saved, and the command that resumes it.

    A run that fails before its first step leaves the folder free for the next one.
    """
    try:
        yield
    except Exception as error:
        if state.saved_step is None and state.progress.step == 0 and state.accelerator.is_main_process:
            (output_dir / "arguments.yaml").unlink(missing_ok=True)
        if not getattr(error, "says_what_is_safe", False):
            _add_note(
                error,
                "No checkpoint was written yet."
                if state.saved_step is None
                else f"The run is saved up to step {state.saved_step} of {num_steps}: resume with `--resume auto`, "
                f"as in: {resume_command(output_dir)}",
            )
        raise


def _add_note(error: Exception, note: str) -> None:
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", []), note]


def resume(state: TrainingState, path: Path, arguments: TrainArguments, num_steps: int) -> None:
    """Resume from a checkpoint.

    Raises: CheckpointError if it cannot be read; ValueError if the data, or settings that change the training, are
        not what they were, with a table of them.
    """
    old, tensors = read_checkpoint(path)
    is_streamed = arguments.data.streaming
    different = settings_that_differ(
        old.settings, arguments.as_dict(), also_harmful=["num_workers"] if is_streamed else []
    )
    if is_streamed and old.num_processes != state.progress.num_processes:
        different.append(f"  processes: {old.num_processes} in the checkpoint, {state.progress.num_processes} now")
    other_data = data_that_differ(old.data, state.progress.data)
    if (different or other_data) and not arguments.run.resume_override:
        table = "\n".join(different + other_data)
        what = " and ".join(["settings"] * bool(different) + ["data"] * bool(other_data))
        raise OtherSettingsError(
            f"`--resume` from {path} with other {what} would be a different training:\n{table}\nTake the old ones, "
            "or pass `--resume-override` to resume anyway."
        )
    later = [one for one in path.parent.glob(f"{PREFIX}*") if one.name > path.name]
    if (different or other_data) and later and path.resolve().parent == state.folder.resolve():
        raise ValueError(
            f"`{state.folder}` has checkpoints of later steps, which the run with other settings would be mixed with "
            f"({', '.join(sorted(one.name for one in later))}): choose a different `--output-dir`, or delete them."
        )
    num_processes = old.num_processes  # before it becomes that of this run
    state.load(path, old, tensors)
    if state.progress.step > num_steps:
        raise ValueError(
            f"{path} is of step {state.progress.step}, beyond the {num_steps} steps of this run: raise `--epochs` or "
            "`--max-steps`."
        )
    take_over_best(state, path.parent, is_needed=arguments.run.final_weights == "best")
    if num_processes != state.progress.num_processes:
        say(
            f"The checkpoint is of {num_processes} processes, this run has {state.progress.num_processes}: order, "
            "augmentation and batch size stay, dropout and mixing are drawn again."
        )
    say(f"Resuming from {path}, after step {state.progress.step}.")


def take_over_best(state: TrainingState, source: Path, is_needed: bool) -> None:
    """Copy the best checkpoint of the run that is resumed, where this run has a different folder.

    Args:
        state: as resumed.
        source: folder of the checkpoints of the run that is resumed.
        is_needed: whether the best weights are to become the model.

    Raises: NoCheckpointError if it is needed and neither folder holds it intact; OSError if it cannot be copied.
    """
    if not state.progress.best:
        return
    path = checkpoint_path(state.folder, state.progress.best["step"])
    original = source / path.name
    if state.accelerator.is_main_process and original.resolve() != path.resolve() and damage(original) is None:
        partial = path.with_name(f"{PARTIAL}{path.name}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(original, partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    state.accelerator.wait_for_everyone()
    found = damage(path) if is_needed else None
    if found is not None:
        raise NoCheckpointError(
            f"`--final-weights best` needs {original}, the best so far, but it is not intact: {found}. Restore it, or "
            "pass `--final-weights last`."
        )


def export(
    network: PreTrainedModel, processor: BaseImageProcessor, weights: dict[str, torch.Tensor], folder: Path
) -> None:
    """Save model and image processor; they replace an earlier one when all is written.

    Raises: CheckpointError if that fails.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        network.save_pretrained(partial, state_dict=weights)
        processor.save_pretrained(partial)
        set_modes_by_umask(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except Exception as error:  # safetensors has its own exception for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"The model could not be saved in {folder}: {error}") from error


def draw_kept_patches(
    model: PreTrainedModel, processor: BaseImageProcessor, splits: ImageSplits, num_images: int, output_dir: Path
) -> None:
    """Draw evaluation images with the patches that each reorganization layer keeps, into kept_patches.png.

    Each column says how many tokens its layer keeps, an earlier fused token among them if it was kept.
    """
    images = EvaluationImages(splits, ProcessorTransform(processor), on_bad_image="skip")
    items = [images[i, True] for i in range(min(num_images, len(images)))]
    pixel_values = torch.stack([item["pixel_values"] for item in items])
    with torch.no_grad():
        attentive_index = model.eval()(pixel_values.to(model.device)).attentive_index
    tower = tower_of(model)
    (patch_height, patch_width), (height, width) = tower.patch_size, pixel_values.shape[-2:]
    captions = [f"{(height // patch_height) * (width // patch_width)} patches"]
    for layer, index in zip(sorted(tower.config.reorganization_layers), attentive_index, strict=True):
        captions.append(f"layer {layer}: {index.shape[1]} kept")
    mean, std = (torch.tensor(stat).view(1, -1, 1, 1) for stat in (processor.image_mean, processor.image_std))
    images_shown = pixel_values * std + mean
    picture = attentive_patch_picture(images_shown, attentive_index, tower.patch_size, 192, captions=captions)
    picture.save(output_dir / "kept_patches.png")


def run_record(**values: Any) -> dict[str, Any]:
    """Facts for the card that no other file of a run has: command, versions, hardware and the values given."""
    return {"command": command_of_run(), "versions": package_versions(PACKAGES), **values}
