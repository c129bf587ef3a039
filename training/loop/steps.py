"""One optimizer step: its keep rate, its gradients however they are cut, its loss, and what can go wrong in it."""

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from transformers.utils import ModelOutput

from evit_hf.keep_rate_schedule import rounded_keep_rate, scheduled_keep_rate
from evit_hf.token_labelling import mix_targets, random_mix_box, token_labelling_loss

from ..data.images import BadImageError
from ..data.sampling import epoch_order, seed_for
from ..learning.teachers import distillation_loss
from .checkpoints import Progress, newest_checkpoint
from .parts import Parts
from .state import TrainingState


KeepRate = float | list[float]
Batch = dict[str, torch.Tensor]


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""

    status = 3


class OutOfMemory(RuntimeError):
    """Not even one image at a time fits into memory."""

    status = 4


def training_keep_rate(parts: Parts, progress: Progress) -> KeepRate:
    """Keep rate of the next optimizer step: drawn from the range if there is one, then scheduled, then rounded."""
    arguments = parts.arguments
    optimization, steps_per_epoch = arguments.optimization, parts.plan.steps_per_epoch
    target = parts.network.config.keep_rate
    levels = optimization.keep_rate_levels
    if optimization.keep_rate_range is not None:
        low, high = optimization.keep_rate_range
        # The same on all processes.
        generator = torch.Generator().manual_seed(seed_for("keep rate", arguments.run.seed, progress.step))
        share = torch.rand((), generator=generator).item()
        share = math.floor(share * (levels + 1)) / levels if levels else share
        target = low + (high - low) * share
    rate = scheduled_keep_rate(
        progress.schedule_step,
        target,
        dense_steps=round(optimization.keep_rate_dense_epochs * steps_per_epoch),
        shrink_steps=round(optimization.keep_rate_shrink_epochs * steps_per_epoch),
    )
    return rounded_keep_rate(rate, target, levels) if levels else rate


def backward(parts: Parts, progress: Progress, batches: list[Batch], keep_rate: KeepRate) -> torch.Tensor:
    """Gradients of one optimizer step; where memory runs out, again with smaller micro-batches.

    Returns: this process's part of the mean loss of the step, on the device.
    """
    while True:
        buffers = [buffer.clone() for buffer in parts.model.buffers()]
        try:
            return accumulated_backward(parts, progress, batches, keep_rate)
        except RuntimeError as error:
            # With several processes the others wait in a collective: `fit_into_memory` has found a size beforehand.
            if parts.accelerator.num_processes > 1 or not should_reduce_batch_size(error):
                raise
        halve_micro_batches(parts, progress, buffers)


def accumulated_backward(
    parts: Parts, progress: Progress, batches: list[Batch], keep_rate: KeepRate, synchronizes: bool = True
) -> torch.Tensor:
    """Sum the gradients of all images of a step, each weighing the same, however they are cut into forward passes."""
    accelerator = parts.accelerator
    pieces = [piece for batch in batches for piece in cut(batch, progress.accumulation_factor)]
    num_images = parts.plan.num_images_in_step(progress.step)
    total = torch.zeros((), device=accelerator.device)
    for number, piece in enumerate(pieces):
        torch.manual_seed(seed_for("step", parts.arguments.run.seed, progress.step, accelerator.process_index, number))
        is_last = number + 1 == len(pieces)
        with nullcontext() if is_last and synchronizes else accelerator.no_sync(parts.model):
            piece = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in piece.items()}
            # Accelerate averages over processes, so this sums to the mean over all images of the step.
            weight = len(piece["labels"]) * accelerator.num_processes / num_images
            loss = micro_batch_loss(parts, progress, piece, keep_rate) * weight
            accelerator.backward(loss)
        total += loss.detach()
    return total


def micro_batch_loss(parts: Parts, progress: Progress, batch: Batch, keep_rate: KeepRate) -> torch.Tensor:
    """Loss of one forward pass in training."""
    arguments, accelerator, config = parts.arguments, parts.accelerator, parts.network.config
    grid = (config.image_size // config.patch_size,) * 2
    images, labels = batch["pixel_values"], batch["labels"]
    if parts.mixing is not None:
        images, labels = parts.mixing(images, labels)
    mix_box = random_mix_box(grid) if torch.rand(()) < arguments.optimization.mix_token else None
    oracle_steps = (
        parts.num_steps
        if arguments.teacher.oracle_epochs is None
        else round(arguments.teacher.oracle_epochs * parts.plan.steps_per_epoch)
    )
    with accelerator.autocast():
        scores = parts.oracle(images, mix_box) if parts.oracle and progress.schedule_step < oracle_steps else None
        taught = parts.teacher(images, mix_box) if parts.teacher else None
    parts.model.train()
    outputs = parts.model(images, keep_rate=keep_rate, patch_scores=scores, mix_box=mix_box)
    loss = training_loss(
        outputs,
        labels,
        arguments.optimization.label_smoothing,
        mix_box,
        grid,
        multi_label=parts.splits.multi_label,
        token_targets=None if taught is None else taught[1],
        has_teacher=taught is not None,
    )
    return loss if taught is None else distillation_loss(outputs, taught[0], loss, arguments.teacher)


def training_loss(
    outputs: ModelOutput,
    labels: torch.Tensor,
    label_smoothing: float,
    mix_box: tuple[int, int, int, int] | None,
    grid: tuple[int, int],
    multi_label: bool = False,
    token_targets: torch.Tensor | None = None,
    has_teacher: bool = False,
) -> torch.Tensor:
    """Cross-entropy, for mixed images with mixed labels; token labelling too where there is an auxiliary classifier.

    Args:
        outputs: of the model in training.
        labels: (batch_size,) class numbers, or (batch_size, num_labels) probabilities.
        label_smoothing: share of the target that is spread over all classes.
        mix_box: what the model was given, or None.
        grid: (rows, columns) of patches.
        multi_label: whether each class is a question of its own.
        token_targets: (batch_size, num_patches, num_labels), a teacher's probabilities of the patches, mixed already.
        has_teacher: whether a distillation token learns from a teacher, so that the class token alone learns labels.

    Returns: scalar.
    """
    logits = outputs.cls_logits if has_teacher and outputs.get("cls_logits") is not None else outputs.logits
    logits = logits.float()
    num_labels = logits.shape[-1]
    targets = labels if labels.ndim == 2 else nn.functional.one_hot(labels, num_labels)
    targets = targets.to(logits.dtype)
    if multi_label:
        targets = targets * (1 - label_smoothing) + label_smoothing / 2
    else:
        targets = targets * (1 - label_smoothing) + label_smoothing / num_labels
    mixed_tokens = None
    if mix_box is not None:
        each_token = targets.unsqueeze(1).expand(-1, grid[0] * grid[1], -1)
        targets, mixed_tokens = mix_targets(targets, each_token, mix_box, grid)
    if multi_label:
        return nn.functional.binary_cross_entropy_with_logits(logits, targets)
    if outputs.get("aux_logits") is None:
        return nn.functional.cross_entropy(logits, targets)
    token_targets = mixed_tokens if token_targets is None else token_targets
    return token_labelling_loss(logits, outputs.aux_logits.float(), outputs.patch_index, targets, token_targets)


def cut(batch: Batch, parts: int) -> Iterator[Batch]:
    """Cut a batch into so many parts of nearly the same size, or into single images if there are no more."""
    size = math.ceil(len(batch["labels"]) / parts)
    for i in range(0, len(batch["labels"]), size):
        yield {name: tensor[i : i + size] for name, tensor in batch.items()}


# What can go wrong


def fit_into_memory(parts: Parts, progress: Progress, batch: Batch, keep_rate: KeepRate) -> None:
    """Find a micro-batch that fits on every process, by one forward and backward pass without the others.

    A scheduled keep rate never rises, so that the first step needs the most, and of a range its upper end does.
    Sharded models cannot run without the others; they have as many images on each process, and are tried together.
    """
    synchronizes = parts.accelerator.is_fsdp2
    if parts.arguments.optimization.keep_rate_range is not None:
        keep_rate = max(keep_rate, parts.arguments.optimization.keep_rate_range[1])
    while True:
        buffers = [buffer.clone() for buffer in parts.model.buffers()]
        is_too_much = False
        try:
            accumulated_backward(parts, progress, [batch], keep_rate, synchronizes)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            is_too_much = True
        if is_too_much:
            parts.accelerator.set_trigger()
        if not parts.accelerator.check_trigger():
            parts.optimizer.zero_grad()
            with torch.no_grad():
                for buffer, value in zip(parts.model.buffers(), buffers, strict=True):
                    buffer.copy_(value)
            return
        halve_micro_batches(parts, progress, buffers)


@torch.no_grad()
def halve_micro_batches(parts: Parts, progress: Progress, buffers: list[torch.Tensor]) -> None:
    """Undo a step that did not fit into memory, and cut its micro-batches into twice as many.

    Raises: OutOfMemory if they were single images.
    """
    micro_batch_size = math.ceil(parts.plan.micro_batch_size / progress.accumulation_factor)
    parts.optimizer.zero_grad()
    for buffer, value in zip(parts.model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    clear_device_cache(garbage_collection=True)
    if micro_batch_size == 1:
        raise OutOfMemory(
            "Memory does not suffice for one image: take a smaller model or `--image-size`, "
            "`--gradient-checkpointing`, `--mixed-precision bf16`, or a lower `--keep-rate`."
        )
    progress.accumulation_factor *= 2
    parts.accelerator.print(
        f"Out of memory: micro-batches of {math.ceil(parts.plan.micro_batch_size / progress.accumulation_factor)} "
        f"instead of {micro_batch_size} images from step {progress.step + 1} on; a step still has "
        f"{parts.plan.batch_size} images."
    )


def agreed_finite(accelerator: Accelerator, loss: torch.Tensor, gradient_norm: torch.Tensor) -> bool:
    """Whether loss and gradients are finite on all processes."""
    if hasattr(gradient_norm, "full_tensor"):
        gradient_norm = gradient_norm.full_tensor()
    finite = (loss.isfinite() & gradient_norm.to(loss.device).isfinite()).float()
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite.item())


def count_skipped_step(parts: Parts, state: TrainingState, step: int) -> None:
    """Count a step whose loss or gradients were not finite: it left weights, averages and schedules alone.

    Raises: TrainingDiverged after too many in a row, naming the images.
    """
    progress, arguments, accelerator = state.progress, parts.arguments, parts.accelerator
    progress.skipped_steps += 1
    progress.skipped_in_row += 1
    accelerator.print(f"Skipped step {step + 1}: its loss or gradients were not finite on some process.")
    # An fp16 gradient scaler starts at 2 ** 16 and halves: that many steps may overflow before it fits.
    limit = arguments.optimization.max_skipped_steps + (16 if accelerator.scaler is not None else 0)
    if progress.skipped_in_row < limit:
        return
    last_good = newest_checkpoint(state.folder) if accelerator.is_main_process and state.folder.exists() else None
    where = f"the last checkpoint, {last_good}, is intact" if last_good else "there is no checkpoint yet"
    report = Path(arguments.run.output_dir) / "non_finite.json"
    if accelerator.is_main_process:
        report.write_text(json.dumps({"step": step + 1, "images": images_of_step(parts, step)}) + "\n")
    raise TrainingDiverged(
        f"{progress.skipped_in_row} steps in a row had a loss or gradient that is not finite, the last is step "
        f"{step + 1} (its images: {report}); {where}. Lower `--learning-rate`, set `--max-grad-norm`, or train "
        "without `--mixed-precision fp16`."
    )


def images_of_step(parts: Parts, step: int) -> list[int]:
    """Numbers of the training images of an optimizer step on all processes; none are known of streamed data."""
    if isinstance(parts.splits.train, datasets.IterableDataset):
        return []
    arguments, plan = parts.arguments, parts.plan
    epoch, repeats = step // plan.steps_per_epoch, arguments.augmentation.repeated_augmentation
    labels = parts.splits.train[parts.splits.label_column][:] if arguments.data.balanced_sampling else None
    order = epoch_order(plan.num_images, arguments.run.seed, epoch, repeats, labels).tolist()
    processes = range(plan.num_processes)
    return [order[i] for process in processes for part in plan.micro_batches(step, process) for i in part]


def count_bad_images(parts: Parts, progress: Progress, batches: list[Batch]) -> None:
    """Count replaced images over all processes.

    Raises: BadImageError if they are more than `--max-bad-images` of the data.
    """
    if parts.arguments.data.on_bad_image == "error":
        return
    bad = sum(batch["is_bad"].sum() for batch in batches)
    if parts.accelerator.num_processes > 1:
        bad = parts.accelerator.reduce(bad.to(parts.accelerator.device), "sum")
    progress.bad_images += int(bad)
    # Of the images so far, or of one epoch in the first one.
    seen = max(progress.step * parts.plan.batch_size, parts.plan.num_images)
    if progress.bad_images > parts.arguments.data.max_bad_images * seen:
        raise BadImageError(
            f"{progress.bad_images} images could not be decoded, more than `--max-bad-images` "
            f"{parts.arguments.data.max_bad_images} of {seen}: mend the data, or raise it."
        )
