"""The training loop, top to bottom.

Build data, model, optimizer and schedules; go on from a checkpoint if there is one; then for each optimizer step: keep
rate, forward, backward, step, log; for each epoch: evaluate, checkpoint; at the end: save, compare with the dense model,
draw. Settings: `arguments.py`. What must never happen to a run: `checkpoints.py`, `interruption.py`.
"""

import datetime
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import BaseImageProcessor
from transformers.utils import ModelOutput

from evit_hf import EViTPreTrainedModel
from evit_hf.keep_rate_schedule import rounded_keep_rate, scheduled_keep_rate
from evit_hf.profiling import num_macs
from evit_hf.token_labelling import mix_targets, random_mix_box, token_labelling_loss
from evit_hf.visualization import attentive_patch_picture

from .arguments import TrainArguments
from .augmentation import ProcessorTransform, batch_mixing, image_processor, training_transform
from .checkpoints import (
    CheckpointError,
    Progress,
    checkpoint_path,
    newest_checkpoint,
    problem,
    read_checkpoint,
    settings_that_differ,
)
from .data import (
    BadImageError,
    EvaluationImages,
    ImageSplits,
    StreamedTrainingImages,
    TrainingImages,
    check_images,
    load_splits,
)
from .evaluation import comparison_table, compare_keep_rates, evaluate, evaluation_loader, main_score
from .interruption import Interruption, TrainingInterrupted, await_deaths_of_loaders, ignore_signals, lock
from .metrics_log import MetricsLog, build_trackers
from .models import build_model, load_classifier
from .optimization import WeightAverage, build_optimizer, freeze, learning_rate_schedule
from .sampling import StepPlan, TrainingBatches, epoch_order, seed_for
from .state import TrainingState
from .teachers import Oracle, Teacher, build_oracle, build_teacher, distillation_loss


# What a run leaves in its output folder.
RUN_FILES = (
    "model",
    "checkpoints",
    "metrics.jsonl",
    "results.json",
    "class_report.json",
    "arguments.yaml",
    "kept_patches.png",
    "non_finite.json",
)
KeepRate = float | list[float]
Batch = dict[str, torch.Tensor]


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite; ends with status 3."""


class OutOfMemory(RuntimeError):
    """Not even one image at a time fits into memory; ends with status 4."""


@dataclass
class Parts:
    """Everything that a training step needs."""

    arguments: TrainArguments
    accelerator: Accelerator
    splits: ImageSplits
    plan: StepPlan
    num_steps: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    oracle: Oracle | None
    teacher: Teacher | None
    mixing: v2.Transform | None
    processor: BaseImageProcessor
    augment: Callable

    @property
    def network(self) -> EViTPreTrainedModel:
        """The model without what Accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.model)


def train(arguments: TrainArguments) -> list[dict]:
    """Train a model and leave it in `arguments.run.output_dir`.

    The folder then holds `model/` (weights, configuration, image processor, code for `trust_remote_code`),
    `checkpoints/`, `metrics.jsonl` (one line for each log and each epoch), `results.json` (this function's result),
    `class_report.json`, `arguments.yaml` (all settings, again a recipe) and `kept_patches.png`.

    Returns: accuracy, GMACs and images per second of the dense and of the reorganized model, see `compare_keep_rates`;
        nothing for a dry run.

    Raises:
        ValueError: settings or data that cannot work, a folder that is in use.
        CheckpointError: no intact checkpoint to resume from, or the end of the run could not be saved.
        TrainingInterrupted: SIGTERM or SIGINT; the run was saved.
        TrainingDiverged: `--max_skipped_steps` steps in a row were not finite.
        OutOfMemory: one image at a time is too much.
    """
    accelerator = build_accelerator(arguments)
    with run_folder(accelerator, arguments) as resume_from:
        parts = build_parts(arguments, accelerator)
        if arguments.run.dry_run:
            return dry_run(parts)
        state = TrainingState(
            accelerator,
            parts.model,
            parts.optimizer,
            parts.average,
            Progress(settings=arguments.as_dict(), num_processes=accelerator.num_processes),
            Path(arguments.run.output_dir) / "checkpoints",
        )
        if resume_from is not None:
            resume(state, resume_from, arguments)
        return run_training(parts, state, is_resumed=resume_from is not None)


def run_training(parts: Parts, state: TrainingState, is_resumed: bool) -> list[dict]:
    """Train from where `state` stands to the end."""
    arguments, accelerator, plan = parts.arguments, parts.accelerator, parts.plan
    optimization, run = arguments.optimization, arguments.run
    progress, num_steps = state.progress, parts.num_steps
    output_dir = Path(run.output_dir)
    if accelerator.is_main_process and not is_resumed:  # nothing was written before all of the above worked
        prepare_output_dir(output_dir, arguments)
    accelerator.wait_for_everyone()
    accelerator.print(describe(parts, progress))
    log = MetricsLog(output_dir / "metrics.jsonl", accelerator)
    log.drop_after(progress.step, keeps_evaluation=progress.evaluated_step == progress.step)
    learning_rate = learning_rate_schedule(
        parts.optimizer.optimizer,  # the schedule itself is not prepared: it would step once for each process
        optimization,
        plan.steps_per_epoch,
        num_steps,
        progress.schedule_step,
    )
    eval_loader = evaluation_loader(
        parts.splits,
        parts.processor,
        optimization.eval_batch_size,
        arguments.data.num_workers,
        accelerator,
        arguments.data.on_bad_image,
    )
    micro_batches = iter(training_loader(parts, progress.step)) if progress.step < num_steps else iter(())
    await_deaths_of_loaders()
    progress_bar = tqdm(
        total=num_steps,
        initial=progress.step,
        desc="train",
        unit="step",
        disable=None if accelerator.is_local_main_process else True,
    )
    window = LogWindow(accelerator.device)
    is_probed = accelerator.num_processes == 1
    with Interruption(accelerator) as interruption:
        while True:
            # Evaluate, at the target keep rate
            ends_epoch = progress.step > 0 and progress.step % plan.steps_per_epoch == 0
            if (ends_epoch or progress.step == num_steps) and progress.evaluated_step != progress.step:
                evaluate_epoch(parts, state, eval_loader, log, interruption)
                window.restart_clock()

            # Checkpoint
            signal_number = interruption.agreed()
            is_due = ends_epoch or (run.checkpoint_steps and progress.step % run.checkpoint_steps == 0)
            if signal_number or (is_due and progress.step > 0) or progress.step == num_steps:
                state.save(run.keep_checkpoints, must_succeed=bool(signal_number))
                window.restart_clock()
            if signal_number:
                raise TrainingInterrupted(
                    signal_number,
                    f"Interrupted by signal {signal_number} after step {progress.step} of {num_steps}, and saved: "
                    f"go on with `--resume auto --output_dir {output_dir}`.",
                )
            if progress.step == num_steps:
                break

            # Data
            step = progress.step
            start = time.perf_counter()
            try:
                batches = [next(micro_batches) for _ in range(plan.num_micro_batches(step))]
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                state.save(run.keep_checkpoints)
                raise CheckpointError(
                    f"A process that loads images died ({' '.join(str(error).split())}). The run was saved at step "
                    f"{step}: go on with `--resume auto`, with fewer `--num_workers` if memory ran out."
                ) from None
            window.data_seconds += time.perf_counter() - start
            count_bad_images(parts, progress, batches)

            # Keep rate, forward, backward
            keep_rate = training_keep_rate(parts, progress)
            if not is_probed:
                fit_into_memory(parts, progress, batches[0], keep_rate)
                is_probed = True
            loss = backward(parts, progress, batches, keep_rate)

            # Step
            gradient_norm = accelerator.clip_grad_norm_(
                parts.model.parameters(), optimization.max_grad_norm or math.inf
            )
            is_finite = agreed_finite(accelerator, loss, gradient_norm)
            rate_used = learning_rate.get_last_lr()[-1]
            if is_finite or accelerator.scaler is not None:  # the scaler skips the step itself, and scales down
                parts.optimizer.step()
            parts.optimizer.zero_grad()
            progress.step += 1
            if is_finite and not accelerator.optimizer_step_was_skipped:
                if parts.average is not None:
                    parts.average.update(progress.schedule_step - 1)
                learning_rate.step()
                progress.skipped_in_row = 0
                window.loss_sum += loss
                window.num_steps += 1
            else:
                count_skipped_step(parts, state, step)
            progress_bar.update()

            # Log
            window.num_images += plan.num_images_in_step(step)
            if (
                progress.step % run.log_steps == 0
                or progress.step % plan.steps_per_epoch == 0
                or (progress.step == num_steps)
            ):
                entry = window.summarize(accelerator)
                log.write(
                    {
                        "step": progress.step,
                        "epoch": progress.step / plan.steps_per_epoch,
                        "learning_rate": rate_used,
                        "keep_rate": keep_rate,
                        "gmacs": num_macs(parts.network.config, keep_rate) / 1e9,
                        "skipped_steps": progress.skipped_steps,
                        "bad_images": progress.bad_images,
                        **entry,
                    }
                )
                progress_bar.set_postfix(loss=f"{entry['loss']:.3f}", keep_rate=shown(keep_rate))
                window = LogWindow(accelerator.device)
    progress_bar.close()
    results = finish(parts, state, eval_loader)
    log.close()
    return results


# Parts


def build_accelerator(arguments: TrainArguments) -> Accelerator:
    """Build the Accelerator, on the CPU where there is nothing better, on as many processes as were launched.

    Raises:
        ValueError: for DeepSpeed, FSDP1, fp16 without a GPU, or a tracker that is not installed.
        RuntimeError: if Accelerate would run each process alone, as it silently does with some launch commands.
    """
    accelerator = Accelerator(
        mixed_precision=arguments.run.mixed_precision,
        cpu=not torch.accelerator.is_available(),
        **build_trackers(arguments.run),
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched but Accelerate uses {accelerator.num_processes}: launch with "
            "`torchrun --nproc_per_node N -m evit_training.train`."
        )
    if arguments.run.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError("`--mixed_precision fp16` needs a GPU, here it would train in float32: take `bf16` or `no`.")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed steps the optimizer inside backward, so that steps could neither be skipped nor resumed "
            "exactly: shard with FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`)."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and (
        accelerator.distributed_type != DistributedType.FSDP
    ):
        raise ValueError("FSDP was asked for, but Accelerate shards only on GPUs: leave out `--use_fsdp`.")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("This trainer shards with FSDP2: pass `--fsdp_version 2` to `accelerate launch`.")
    return accelerator


def build_parts(arguments: TrainArguments, accelerator: Accelerator) -> Parts:
    """Build data, model, optimizer and teachers, and check what can be checked before the first step."""
    optimization, seed = arguments.optimization, arguments.run.seed
    splits = load_splits(arguments.data, seed)
    is_streamed = isinstance(splits.train, datasets.IterableDataset)
    if is_streamed:
        num_images = optimization.max_steps * optimization.batch_size  # one long epoch
    else:
        num_images = len(splits.train)
        if arguments.data.check_images and arguments.data.on_bad_image == "error":
            check_images(splits, arguments.data.check_images)
    plan = StepPlan(
        num_images,
        optimization.batch_size,
        accelerator.num_processes,
        optimization.gradient_accumulation_steps,
        optimization.drop_last,
    )

    set_seed(seed)  # the same weights on every process
    network = build_model(arguments, splits.label_names, splits.multi_label)
    image_size = network.config.image_size
    processor = image_processor(arguments.model.model, image_size)
    oracle = build_oracle(arguments.teacher, network, load_classifier, image_size=image_size)
    teacher = build_teacher(arguments.teacher, network, processor, splits.label_names, splits.multi_label)
    for helper in (oracle, teacher):
        if helper is not None:
            helper.to(accelerator.device)
    freeze(network, arguments.model.trainable, arguments.model.freeze_layers)
    optimizer = build_optimizer(network, optimization, arguments.learning_rate)
    if arguments.run.compile:
        # In place: no wrapper, the same names. One compilation for each keep rate of the schedule and of evaluation.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        network.compile()
    model, optimizer = accelerator.prepare(network, optimizer)
    return Parts(
        arguments=arguments,
        accelerator=accelerator,
        splits=splits,
        plan=plan,
        num_steps=optimization.max_steps or optimization.epochs * plan.steps_per_epoch,
        model=model,
        optimizer=optimizer,
        average=WeightAverage(model, optimization.ema_decay) if optimization.ema_decay else None,
        oracle=oracle,
        teacher=teacher,
        mixing=batch_mixing(arguments.augmentation, len(splits.label_names)),
        processor=processor,
        augment=training_transform(arguments.augmentation, image_size, processor),
    )


def training_loader(parts: Parts, first_step: int) -> DataLoader:
    """Loader of this process's micro-batches from an optimizer step on; one iteration goes through all epochs."""
    arguments, accelerator, plan = parts.arguments, parts.accelerator, parts.plan
    data, seed = arguments.data, arguments.run.seed
    common = {
        "num_workers": data.num_workers,
        "worker_init_fn": ignore_signals,
        "collate_fn": default_collate,
        "pin_memory": accelerator.device.type == "cuda",
    }
    if isinstance(parts.splits.train, datasets.IterableDataset):
        images = StreamedTrainingImages(
            parts.splits,
            parts.augment,
            seed,
            micro_batch_size=plan.micro_batch_size,
            first_micro_batch=first_step * plan.accumulation_steps,
            shuffle_buffer=data.shuffle_buffer,
            process=accelerator.process_index,
            num_processes=accelerator.num_processes,
            on_bad_image=data.on_bad_image,
        )
        return DataLoader(images, batch_size=None, **common)
    batches = TrainingBatches(
        plan,
        seed,
        first_step,
        parts.num_steps,
        accelerator.process_index,
        arguments.augmentation.repeated_augmentation,
    )
    images = TrainingImages(parts.splits, parts.augment, seed, data.on_bad_image)
    return DataLoader(images, batch_sampler=batches, **common)


# One step


def training_keep_rate(parts: Parts, progress: Progress) -> KeepRate:
    """Keep rate of the next optimizer step: drawn from the range if there is one, then scheduled, then rounded."""
    arguments = parts.arguments
    optimization, steps_per_epoch = arguments.optimization, parts.plan.steps_per_epoch
    target = parts.network.config.keep_rate
    levels = optimization.keep_rate_levels or (8 if arguments.run.compile else None)
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


# What can go wrong in a step


def fit_into_memory(parts: Parts, progress: Progress, batch: Batch, keep_rate: KeepRate) -> None:
    """Find a micro-batch that fits on every process, by one forward and backward pass without the others.

    The keep rate never rises during training, so that the first step needs the most. Sharded models cannot run without
    the others; they have as many images on each process, and are tried together.
    """
    synchronizes = parts.accelerator.is_fsdp2
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
            "Memory does not suffice for one image: take a smaller model or `--image_size`, `--gradient_checkpointing`, "
            "`--mixed_precision bf16`, or a lower `--keep_rate`."
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
        f"{step + 1} (its images: {report}); {where}. Lower `--learning_rate`, set `--max_grad_norm`, or train without "
        "`--mixed_precision fp16`."
    )


def images_of_step(parts: Parts, step: int) -> list[int]:
    """Numbers of the training images of an optimizer step on all processes; none are known of streamed data."""
    if isinstance(parts.splits.train, datasets.IterableDataset):
        return []
    arguments, plan = parts.arguments, parts.plan
    epoch, repeats = step // plan.steps_per_epoch, arguments.augmentation.repeated_augmentation
    order = epoch_order(plan.num_images, arguments.run.seed, epoch, repeats).tolist()
    processes = range(plan.num_processes)
    return [order[i] for process in processes for part in plan.micro_batches(step, process) for i in part]


def count_bad_images(parts: Parts, progress: Progress, batches: list[Batch]) -> None:
    """Count replaced images over all processes.

    Raises: BadImageError if they are more than `--max_bad_images` of the data.
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
            f"{progress.bad_images} images could not be decoded, more than `--max_bad_images` "
            f"{parts.arguments.data.max_bad_images} of {seen}: mend the data, or raise it."
        )


# Evaluation and the end


def evaluate_epoch(
    parts: Parts, state: TrainingState, loader: DataLoader, log: "MetricsLog", interruption: Interruption
) -> None:
    """Evaluate the weights, and their averages; remember which were the best.

    Nothing is remembered of an evaluation that a signal interrupted: it is made again on resuming.
    """
    accelerator, progress = parts.accelerator, state.progress
    oracle = parts.oracle if parts.arguments.teacher.oracle_in_evaluation else None
    entry: dict[str, Any] = {"step": progress.step, "epoch": progress.step / parts.plan.steps_per_epoch}
    best = progress.best
    summary = []
    for kind, prefix in (("raw", "eval_"), ("ema", "ema_eval_")):
        if kind == "ema" and parts.average is None:
            continue
        with parts.average.in_model() if kind == "ema" else nullcontext():
            metrics = evaluate(
                accelerator,
                parts.model,
                until_interrupted(loader, interruption),
                oracle=oracle,
                multi_label=parts.splits.multi_label,
            )
        if interruption.agreed():
            return
        name, score = main_score(metrics)
        if not best or score > best["score"]:
            best = {"step": progress.step, "weights": kind, "score": score, "metric": name}
        entry.update({f"{prefix}{key}": x for key, x in metrics.items() if isinstance(x, (int, float))})
        label = "" if kind == "raw" else "averaged weights: "
        second = ("top5", "top-5") if name == "top1" else ("macro_f1", "macro F1")
        first = "top-1" if name == "top1" else "micro F1"
        summary.append(
            f"{label}{first} {100 * score:.2f} %, {second[1]} {100 * metrics[second[0]]:.2f} %, "
            f"loss {metrics['loss']:.3f}"
        )
    progress.best, progress.evaluated_step = best, progress.step
    log.write(entry)
    accelerator.print(f"epoch {entry['epoch']:.4g}, step {progress.step}: {'; '.join(summary)}")


def until_interrupted(loader: DataLoader, interruption: Interruption) -> Iterator[Batch]:
    """Yield the batches until a signal comes; at least one."""
    for number, batch in enumerate(loader):
        if number and interruption.agreed():
            return
        yield batch


def finish(parts: Parts, state: TrainingState, eval_loader: DataLoader) -> list[dict]:
    """Save the final weights as a model, compare it with the dense one, draw.

    Raises: CheckpointError if the model cannot be saved.
    """
    arguments, accelerator = parts.arguments, parts.accelerator
    output_dir = Path(arguments.run.output_dir)
    which = load_final_weights(parts, state)
    weights = state.weights()
    timed_model = None
    if accelerator.is_main_process:
        export(parts, weights, output_dir / "model")
        timed_model = load_classifier(str(output_dir / "model")).to(accelerator.device)
    keep_rate = parts.network.config.keep_rate
    keep_rates = [1.0, *(arguments.optimization.keep_rate_range or [])[::-1], keep_rate]
    keep_rates = [rate for i, rate in enumerate(keep_rates) if rate not in keep_rates[:i]]
    multi_label = parts.splits.multi_label
    results = compare_keep_rates(accelerator, parts.model, eval_loader, keep_rates, timed_model, multi_label)
    report = {"label_names": parts.splits.label_names, "keep_rate": keep_rate}
    for result in results:
        by_class, confusion_matrix = result.pop("by_class"), result.pop("confusion_matrix")
        if result["keep_rate"] == keep_rate:
            report.update(by_class=by_class, confusion_matrix=confusion_matrix)
    if accelerator.is_main_process:
        (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (output_dir / "class_report.json").write_text(json.dumps(report) + "\n")
        if arguments.run.num_pictures and not isinstance(parts.splits.evaluation, datasets.IterableDataset):
            draw_kept_patches(timed_model, parts.processor, parts.splits, arguments.run.num_pictures, output_dir)
    accelerator.print(comparison_table(results))
    saved = ", ".join(name for name in RUN_FILES if (output_dir / name).exists())
    accelerator.print(f"Saved in {output_dir}: {saved}. The model has the {which}.")
    for failure in state.failures:
        accelerator.print(failure)
    accelerator.end_training()
    return results


def load_final_weights(parts: Parts, state: TrainingState) -> str:
    """Put the weights to be saved into the model, and say in words which they are.

    Raises: CheckpointError if they are in a checkpoint that is not intact any more.
    """
    best = state.progress.best
    if parts.arguments.run.final_weights == "last":
        if parts.average is None:
            return "last weights"
        parts.average.exchange()
        return "averages of the last weights (EMA)"
    path = checkpoint_path(state.folder, best["step"])
    found = problem(path)
    if found is not None:
        raise CheckpointError(f"The best weights, of {path}, cannot be saved as the model: {found}.")
    tensors = read_checkpoint(path)[1]
    state.load_weights(tensors["ema" if best["weights"] == "ema" else "model"])
    kind = "averaged (EMA) " if best["weights"] == "ema" else ""
    return f"{kind}weights of step {best['step']}, the best: {best['metric']} {100 * best['score']:.2f} %"


def export(parts: Parts, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Save model and image processor, in place of an earlier one when all is written.

    Raises: CheckpointError if that fails.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        parts.network.save_pretrained(partial, state_dict=weights)
        parts.processor.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except Exception as error:  # safetensors has an exception of its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"The model could not be saved in {folder}: {error}") from error


def draw_kept_patches(
    model: EViTPreTrainedModel, processor: BaseImageProcessor, splits: ImageSplits, num_images: int, output_dir: Path
) -> None:
    """Draw evaluation images with the patches that each reorganization layer keeps, into kept_patches.png."""
    images = EvaluationImages(splits, ProcessorTransform(processor), on_bad_image="skip")
    items = [images[i, True] for i in range(min(num_images, len(images)))]
    pixel_values = torch.stack([item["pixel_values"] for item in items])
    with torch.no_grad():
        attentive_index = model.eval()(pixel_values.to(model.device)).attentive_index
    mean, std = (torch.tensor(stat).view(1, -1, 1, 1) for stat in (processor.image_mean, processor.image_std))
    picture = attentive_patch_picture(pixel_values * std + mean, attentive_index, model.config.patch_size)
    picture.save(output_dir / "kept_patches.png")


def dry_run(parts: Parts) -> list:
    """Train two steps and evaluate one batch, report what the whole run would take, and leave nothing behind."""
    arguments, accelerator, plan = parts.arguments, parts.accelerator, parts.plan
    accelerator.print(describe(parts, Progress()))
    progress = Progress(settings=arguments.as_dict())
    micro_batches = iter(training_loader(parts, 0))
    seconds = []
    for step in range(min(2, parts.num_steps)):
        batches = [next(micro_batches) for _ in range(plan.num_micro_batches(step))]
        start = time.perf_counter()
        keep_rate = training_keep_rate(parts, progress)
        if accelerator.num_processes > 1 and step == 0:
            fit_into_memory(parts, progress, batches[0], keep_rate)
        loss = backward(parts, progress, batches, keep_rate)
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
        progress.step += 1
    loader = evaluation_loader(parts.splits, parts.processor, arguments.optimization.eval_batch_size, 0, accelerator)
    start = time.perf_counter()
    evaluate(accelerator, parts.model, [next(iter(loader))], multi_label=parts.splits.multi_label)
    num_epochs = math.ceil(parts.num_steps / plan.steps_per_epoch)
    try:
        eval_seconds = (time.perf_counter() - start) * len(loader) * num_epochs
    except TypeError:
        eval_seconds = 0.0  # streamed data has no length
    total = seconds[-1] * parts.num_steps + eval_seconds
    config = parts.network.config
    accelerator.print(
        f"Dry run: loss {loss.item():.3f}, {memory_gib(accelerator.device):.2f} GiB at the peak, "
        f"{num_macs(config, 1.0) / 1e9:.4f} GMACs dense and {num_macs(config) / 1e9:.4f} at keep rate "
        f"{shown(config.keep_rate)}, {seconds[-1]:.3f} s for a step of {plan.batch_size} images at keep rate "
        f"{shown(keep_rate)}. {parts.num_steps} steps and {num_epochs} evaluations would take "
        f"{datetime.timedelta(seconds=round(total))} or less, plus what loading images takes. Nothing was saved."
    )
    accelerator.end_training()
    return []


# Folder and log


@contextmanager
def run_folder(accelerator: Accelerator, arguments: TrainArguments) -> Iterator[Path | None]:
    """Lock the output folder for the time of the run.

    Yields: the checkpoint to go on from, or None.

    Raises: ValueError if the folder is in use, or holds a run that is neither to be resumed nor overwritten.
    """
    run = arguments.run
    output_dir = Path(run.output_dir)
    if run.resume and run.overwrite:
        raise ValueError("`--overwrite` would delete what `--resume` goes on from: pass one of them.")
    if run.dry_run:
        yield None
        return
    locked = lock(output_dir) if accelerator.is_main_process else None
    try:
        left = [name for name in RUN_FILES if (output_dir / name).exists()]
        resume_from = None
        if run.resume == "auto":
            resume_from = newest_checkpoint(output_dir / "checkpoints")
            if resume_from is None and left:
                accelerator.print(f"`{output_dir}` has no checkpoint yet: the run starts from the beginning.")
        elif run.resume is not None:
            resume_from = Path(run.resume)
        elif left and not run.overwrite:
            raise ValueError(
                f"`{output_dir}` holds a run already ({', '.join(left)}): go on with `--resume auto`, choose another "
                "`--output_dir`, or pass `--overwrite` to delete it."
            )
        accelerator.wait_for_everyone()
        yield resume_from
    finally:
        if locked is not None:
            (output_dir / ".lock").unlink(missing_ok=True)
            locked.close()
            if not any(output_dir.iterdir()):
                output_dir.rmdir()


def prepare_output_dir(output_dir: Path, arguments: TrainArguments) -> None:
    """Clear the folder of what an earlier run left, and write down the settings."""
    for name in RUN_FILES:
        path = output_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (output_dir / "arguments.yaml").write_text(yaml.safe_dump(arguments.as_dict(), sort_keys=False))


def resume(state: TrainingState, path: Path, arguments: TrainArguments) -> None:
    """Go on from a checkpoint.

    Raises: CheckpointError if it cannot be read; ValueError if settings that change the training are not what they
        were, with a table of them.
    """
    old, _ = read_checkpoint(path)
    is_streamed = arguments.data.streaming
    different = settings_that_differ(
        old.settings, arguments.as_dict(), also_harmful=["num_workers"] if is_streamed else []
    )
    if is_streamed and old.num_processes != state.progress.num_processes:
        different.append(f"  processes: {old.num_processes} in the checkpoint, {state.progress.num_processes} now")
    if different and not arguments.run.resume_override:
        table = "\n".join(different)
        raise ValueError(
            f"`--resume` from {path} with other settings would be another training:\n{table}\nTake the old ones, or "
            "pass `--resume_override` to go on all the same."
        )
    state.load(path)
    if old.num_processes != state.progress.num_processes:
        state.accelerator.print(
            f"The checkpoint is of {old.num_processes} processes, this run has {state.progress.num_processes}: order, "
            "augmentation and batch size stay, dropout and mixing are drawn anew."
        )
    state.accelerator.print(f"Going on from {path}, after step {state.progress.step}.")


class LogWindow:
    """Sums since the last line of the log. The loss stays on the device until it is read: reading waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), device=device)
        self.num_steps = 0
        self.num_images = 0
        self.data_seconds = 0.0
        self.other_seconds = 0.0
        self.start = self.pause = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave out the time since the last step, which went to evaluation or a checkpoint."""
        if not self.num_images:
            self.start = time.perf_counter()

    def summarize(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean loss over all processes, speed, share of the time spent waiting for images, and peak memory."""
        loss = accelerator.reduce(self.loss_sum, "sum").item() / accelerator.num_processes if self.num_steps else 0.0
        seconds = time.perf_counter() - self.start
        return {
            "loss": loss / self.num_steps if self.num_steps else float("nan"),
            "images_per_second": self.num_images / seconds,
            "data_wait": self.data_seconds / seconds,
            "memory_gib": memory_gib(accelerator.device),
        }


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the device, or of this process where it is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux, in bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def shown(keep_rate: float | list[float]) -> str:
    """Return a keep rate, or one for each layer, with three digits."""
    rates = keep_rate if isinstance(keep_rate, list) else [keep_rate]
    return " ".join(f"{rate:.3f}" for rate in rates)


def describe(parts: Parts, progress: Progress) -> str:
    """Return the settings of the run, and what they come to, as text."""
    arguments, accelerator, config = parts.arguments, parts.accelerator, parts.network.config
    num_parameters = sum(parameter.numel() for parameter in parts.model.parameters())
    num_trained = sum(parameter.numel() for parameter in parts.model.parameters() if parameter.requires_grad)
    frozen = "" if num_trained == num_parameters else f" ({num_trained / 1e6:.2f} M trained)"
    settings = yaml.safe_dump(arguments.as_dict(), sort_keys=False, default_flow_style=None).rstrip()
    streamed = isinstance(parts.splits.train, datasets.IterableDataset)
    counts = (
        "streamed images"
        if streamed
        else f"{len(parts.splits.train)} training and {len(parts.splits.evaluation)} evaluation images"
    )
    passes = parts.plan.accumulation_steps * progress.accumulation_factor
    return (
        f"{settings}\n"
        f"{counts}, {config.num_labels} classes, {num_parameters / 1e6:.2f} M parameters{frozen}, layers "
        f"{config.reorganization_layers} of {config.num_hidden_layers} reorganize at keep rate "
        f"{shown(config.keep_rate)}, {num_macs(config) / 1e9:.4f} GMACs ({num_macs(config, 1.0) / 1e9:.4f} dense), "
        f"learning rate {arguments.learning_rate:g}, {parts.num_steps} steps of {parts.plan.batch_size} images on "
        f"{accelerator.num_processes} x {accelerator.device.type}, {passes} forward passes for each"
    )
