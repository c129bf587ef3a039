"""Loaders of batches: the training batches of one process from any step on, and the evaluation batches."""

import atexit
import dataclasses
import multiprocessing
import multiprocessing.util
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, default_collate
from transformers import BaseImageProcessor

from ..arguments import TrainArguments
from .augmentation import ProcessorTransform
from .images import EvaluationImages, ImageSplits, StreamedEvaluationImages, StreamedTrainingImages, TrainingImages
from .sampling import EvaluationBatches, StepPlan, TrainingBatches


def training_loader(
    splits: ImageSplits,
    augment: Callable,
    plan: StepPlan,
    arguments: TrainArguments,
    accelerator: Accelerator,
    num_steps: int,
    first_step: int,
) -> DataLoader:
    """Build the loader of this process's micro-batches from an optimizer step on; one iteration is all epochs.

    Args:
        splits: the data.
        augment: from a decoded image to the tensor that the model sees.
        plan: how images are cut into steps.
        arguments: settings of the run.
        accelerator: knows this process and how many there are.
        num_steps: optimizer steps of the run.
        first_step: optimizer steps done so far.
    """
    data, seed = arguments.data, arguments.run.seed
    common = {
        "num_workers": data.num_workers,
        "worker_init_fn": ignore_signals,
        "collate_fn": default_collate,
        "pin_memory": accelerator.device.type == "cuda",
    }
    if splits.is_streamed:
        images = StreamedTrainingImages(
            splits,
            augment,
            seed,
            micro_batch_size=plan.micro_batch_size,
            first_micro_batch=first_step * plan.accumulation_steps,
            shuffle_buffer=data.shuffle_buffer,
            process=accelerator.process_index,
            num_processes=accelerator.num_processes,
            on_bad_image=data.on_bad_image,
        )
        return DataLoader(images, batch_size=None, **common)
    repeats = arguments.augmentation.repeated_augmentation
    labels = splits.train[splits.label_column][:] if data.balanced_sampling else None
    batches = TrainingBatches(plan, seed, first_step, num_steps, accelerator.process_index, repeats, labels)
    return DataLoader(TrainingImages(splits, augment, seed, data.on_bad_image), batch_sampler=batches, **common)


def evaluation_loader(
    splits: ImageSplits,
    processor: BaseImageProcessor,
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
    on_bad_image: str = "error",
) -> DataLoader:
    """Loader of the evaluation split for one process, as the image processor prepares it."""
    transform = ProcessorTransform(processor)
    process, num_processes = accelerator.process_index, accelerator.num_processes
    common = {"worker_init_fn": ignore_signals, "collate_fn": default_collate}
    if splits.is_streamed:
        streamed = StreamedEvaluationImages(splits, transform, batch_size, process, num_processes, on_bad_image)
        return DataLoader(streamed, batch_size=None, num_workers=min(num_workers, 1), **common)
    images = EvaluationImages(splits, transform, on_bad_image)
    batches = EvaluationBatches(len(images), batch_size, process, num_processes)
    return DataLoader(
        images, batch_sampler=batches, num_workers=num_workers, persistent_workers=num_workers > 0, **common
    )


def ignore_signals(worker: int) -> None:
    """Leave signals to the training process, see `end_loading_processes`; `worker_init_fn` of all loaders."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@atexit.register
def end_loading_processes() -> None:
    """Kill the loading processes of this process; at its exit, for Python would wait for ever.

    Python ends its daemonic children by SIGTERM, which loaders ignore, and then waits for them. Functions registered
    later run earlier, and `multiprocessing`, imported above, has registered its own.
    """
    with suppress(ValueError, AttributeError):  # not in the main thread, or not on POSIX
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def batches(
    splits: ImageSplits, split: Literal["train", "evaluation"], processor: Any, limit: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images of a split as the model sees them, with their class numbers, 32 at a time.

    Args:
        splits: the data.
        split: which of them.
        processor: image processor of the model.
        limit: images at most, the first ones.
    """
    rows = getattr(splits, split)
    images = EvaluationImages(dataclasses.replace(splits, evaluation=rows), ProcessorTransform(processor))
    end = len(rows) if limit is None else min(limit, len(rows))
    for start in range(0, end, 32):
        rows = [images[i, True] for i in range(start, min(start + 32, end))]
        labels = torch.tensor([row["labels"] for row in rows])
        yield torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows]), labels
