"""One optimizer step: its gradients however they are cut, whether they are finite, and what can go wrong in it."""

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.optim.lr_scheduler import LRScheduler

from evit_hf.keep_rate_schedule import KeepRate

from ..data.images import BadImageError
from ..data.sampling import StepPlan, seed_for
from ..learning.objective import Objective
from ..screen import say
from .checkpoints import newest_checkpoint
from .interruption import on_any_process
from .state import TrainingState


Batch = dict[str, torch.Tensor]


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""

    status, says_what_is_safe = 3, True


class NotEnoughMemoryError(RuntimeError):
    """Not even one image at a time fits into memory."""

    status = 4


@dataclass
class StepGradients:
    """Gradients of optimizer steps, in forward passes that fit into memory.

    Args:
        state: model to train, and its progress.
        objective: the loss.
        plan: how images are cut into steps.
        seed: of the run.
    """

    state: TrainingState
    objective: Objective
    plan: StepPlan
    seed: int

    def backward(self, batches: list[Batch], keep_rate: KeepRate) -> torch.Tensor:
        """Compute the gradients of one step; where memory runs out, again with smaller micro-batches.

        Returns: this process's part of the mean loss of the step, on the device.

        Raises: NotEnoughMemoryError if one image is too much.
        """
        while True:
            buffers = self._copied_buffers()
            try:
                return self._accumulate(batches, keep_rate)
            except RuntimeError as error:
                # With several processes the others wait in a collective: `fit_into_memory` has found a size before.
                if self.state.accelerator.num_processes > 1 or not should_reduce_batch_size(error):
                    raise
            self._halve_micro_batches(buffers)

    def fit_into_memory(self, batch: Batch, keep_rate: KeepRate) -> None:
        """Find a micro-batch that fits on every process, by one forward and backward pass without the others.

        Sharded models cannot run without the others; each process has as many images, and they are tried together.

        Args:
            batch: of the first step.
            keep_rate: highest one of the run, which needs the most memory.

        Raises: NotEnoughMemoryError if one image is too much.
        """
        accelerator = self.state.accelerator
        while True:
            buffers = self._copied_buffers()
            is_too_much = False
            try:
                self._accumulate([batch], keep_rate, synchronizes=accelerator.is_fsdp2)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                is_too_much = True
            if not on_any_process(accelerator, is_too_much):
                self._undo(buffers)
                return
            self._halve_micro_batches(buffers)

    def micro_batch_loss(self, batch: Batch, keep_rate: KeepRate) -> torch.Tensor:
        """Mean loss of one forward pass."""
        return self.objective(self.state.model, batch, keep_rate, self.state.progress.schedule_step)

    def _accumulate(self, batches: list[Batch], keep_rate: KeepRate, synchronizes: bool = True) -> torch.Tensor:
        """Sum the gradients of all images of a step, each weighing the same, however they are cut into passes."""
        accelerator, model, progress = self.state.accelerator, self.state.model, self.state.progress
        pieces = [piece for batch in batches for piece in cut_batch(batch, progress.accumulation_factor)]
        num_images = self.plan.num_images_in_step(progress.step)
        total = torch.zeros((), device=accelerator.device)
        for number, piece in enumerate(pieces):
            torch.manual_seed(seed_for("step", self.seed, progress.step, accelerator.process_index, number))
            is_last = number + 1 == len(pieces)
            with nullcontext() if is_last and synchronizes else accelerator.no_sync(model):
                piece = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in piece.items()}
                # Accelerate averages over processes, so this sums to the mean over all images of the step.
                weight = len(piece["labels"]) * accelerator.num_processes / num_images
                loss = self.micro_batch_loss(piece, keep_rate) * weight
                accelerator.backward(loss)
            total += loss.detach()
        return total

    def _copied_buffers(self) -> list[torch.Tensor]:
        return [buffer.clone() for buffer in self.state.model.buffers()]

    @torch.no_grad()
    def _undo(self, buffers: list[torch.Tensor]) -> None:
        """Forget the gradients of a step, and what its forward passes did to running statistics."""
        self.state.optimizer.zero_grad()
        for buffer, value in zip(self.state.model.buffers(), buffers, strict=True):
            buffer.copy_(value)

    def _halve_micro_batches(self, buffers: list[torch.Tensor]) -> None:
        """Undo a step that did not fit into memory, and cut its micro-batches into twice as many."""
        progress, full_size = self.state.progress, self.plan.micro_batch_size
        size = math.ceil(full_size / progress.accumulation_factor)
        self._undo(buffers)
        clear_device_cache(garbage_collection=True)
        if size == 1:
            raise NotEnoughMemoryError(
                "Memory does not suffice for one image: take a smaller model or `--image-size`, "
                "`--gradient-checkpointing`, `--mixed-precision bf16`, or a lower `--keep-rate`."
            )
        progress.accumulation_factor *= 2
        say(
            f"Out of memory: micro-batches of {math.ceil(full_size / progress.accumulation_factor)} "
            f"instead of {size} images from step {progress.step + 1} on; a step still has "
            f"{self.plan.batch_size} images."
        )


def cut_batch(batch: Batch, num_pieces: int) -> Iterator[Batch]:
    """Cut a batch into pieces of nearly the same size, or into single images if it has no more than that."""
    size = math.ceil(len(batch["labels"]) / num_pieces)
    for i in range(0, len(batch["labels"]), size):
        yield {name: tensor[i : i + size] for name, tensor in batch.items()}


def update_weights(
    state: TrainingState, learning_rate: LRScheduler, loss: torch.Tensor, max_grad_norm: float | None
) -> bool:
    """Take the optimizer step that the gradients ask for, unless they or the loss are not finite on some process.

    Returns: whether the step counts; otherwise it left weights, averages and schedules as they were.
    """
    accelerator, progress = state.accelerator, state.progress
    gradient_norm = accelerator.clip_grad_norm_(state.model.parameters(), max_grad_norm or math.inf)
    is_finite = agreed_finite(accelerator, loss, gradient_norm)
    if is_finite or accelerator.scaler is not None:  # the scaler skips the step itself, and scales down
        state.optimizer.step()
    state.optimizer.zero_grad()
    progress.step += 1
    if not is_finite or accelerator.optimizer_step_was_skipped:
        progress.skipped_steps += 1
        progress.skipped_in_row += 1
        return False
    progress.skipped_in_row = 0
    if state.average is not None:
        state.average.update(progress.schedule_step - 1)
    learning_rate.step()
    return True


def agreed_finite(accelerator: Accelerator, loss: torch.Tensor, gradient_norm: torch.Tensor) -> bool:
    """Whether loss and gradients are finite on all processes."""
    if hasattr(gradient_norm, "full_tensor"):
        gradient_norm = gradient_norm.full_tensor()
    finite = (loss.isfinite() & gradient_norm.to(loss.device).isfinite()).float()
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite.item())


def report_skipped_step(state: TrainingState, max_in_row: int, report: Path, images: list[int]) -> None:
    """Say that the last step was skipped.

    Args:
        state: of the run, the step counted.
        max_in_row: skipped steps in a row that end the run.
        report: file for the images of the last one.
        images: numbers of the training images of the step.

    Raises: TrainingDivergedError after too many in a row.
    """
    progress, accelerator = state.progress, state.accelerator
    say(f"Skipped step {progress.step}: its loss or gradients were not finite on some process.")
    # An fp16 gradient scaler starts at 2 ** 16 and halves: that many steps may overflow before it fits.
    if progress.skipped_in_row < max_in_row + (16 if accelerator.scaler is not None else 0):
        return
    last_good = newest_checkpoint(state.folder) if accelerator.is_main_process and state.folder.exists() else None
    where = f"the last checkpoint, {last_good}, is intact" if last_good else "there is no checkpoint yet"
    if accelerator.is_main_process:
        report.write_text(json.dumps({"step": progress.step, "images": images}) + "\n")
    raise TrainingDivergedError(
        f"{progress.skipped_in_row} steps in a row had a loss or gradient that is not finite, the last is step "
        f"{progress.step} (its images: {report}); {where}. Lower `--learning-rate`, set `--max-grad-norm`, or train "
        "without `--mixed-precision fp16`."
    )


def images_of_step(plan: StepPlan, order: list[int], step: int) -> list[int]:
    """Numbers of the training images of an optimizer step on all processes.

    Args:
        plan: how images are cut into steps.
        order: image numbers in the order of the epoch.
        step: optimizer steps done before it.
    """
    processes = range(plan.num_processes)
    return [order[i] for process in processes for part in plan.micro_batches(step, process) for i in part]


def count_bad_images(state: TrainingState, batches: list[Batch], plan: StepPlan, max_share: float) -> None:
    """Count replaced images over all processes.

    Args:
        state: of the run.
        batches: of this process.
        plan: how images are cut into steps.
        max_share: share of bad images that ends the run.

    Raises: BadImageError if they are more than that; the run was saved.
    """
    progress, accelerator = state.progress, state.accelerator
    bad = torch.stack([batch["is_bad"].sum() for batch in batches]).sum()
    if accelerator.num_processes > 1:
        bad = accelerator.reduce(bad.to(accelerator.device), "sum")
    num_bad = progress.bad_images + int(bad)
    # Of the images so far, or of one epoch in the first one.
    seen = max(progress.step * plan.batch_size, plan.num_images)
    if num_bad > max_share * seen:
        state.save()
        raise BadImageError(
            f"{num_bad} images could not be decoded, more than `--max-bad-images` {max_share} of {seen}: "
            "fix the data, or raise the limit."
        )
    progress.bad_images = num_bad
