"""Loaders of batches: the training batches of one process from any step on, and the evaluation batches."""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.util import Finalize
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, default_collate
from transformers import BaseImageProcessor

from ..arguments import TrainArguments
from ..screen import say
from .augmentation import ProcessorTransform
from .images import (
    SHARED_MEMORY,
    EvaluationImages,
    ImageSplits,
    StreamedEvaluationImages,
    StreamedTrainingImages,
    TrainingImages,
)
from .sampling import EvaluationBatches, StepPlan, TrainingBatches


class LoaderError(RuntimeError):
    """Batches cannot be loaded for a reason that is not in the data: a killed process, memory, file handles."""

    status = 1


class ImageLoader(DataLoader[Any]):
    """Loader of batches of images, whose processes leave signals to their parent and end with it.

    Batches are collated as usual; see `torch.utils.data.DataLoader` for the arguments. Iterating raises LoaderError
    for what the processes died of.
    """

    def __init__(self, images: torch.utils.data.Dataset[Any], **arguments: Any) -> None:
        super().__init__(images, worker_init_fn=ignore_signals, collate_fn=default_collate, **arguments)
        self.processes: set[multiprocessing.process.BaseProcess] = set()
        # Python ends its children by SIGTERM, which they ignore, and then waits for them. This comes first, also in a
        # forked process, where functions of `atexit` are not called; and when nobody has the loader any more.
        Finalize(self, end_processes, [self.processes], exitpriority=10)

    def __iter__(self) -> Iterator[Any]:
        """Start the processes, and yield the batches."""
        others = set(multiprocessing.active_children())
        try:
            with said_in_one_line(self.num_workers), deaths_noticed_in_line():
                batches = super().__iter__()
        finally:  # not all of them may have started
            self.processes.update(set(multiprocessing.active_children()) - others)
        return self._batches(batches)

    def close(self) -> None:
        """End the processes at once."""
        end_processes(self.processes)

    def _batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        with said_in_one_line(self.num_workers, self.processes):
            yield from batches


def end_processes(processes: set[multiprocessing.process.BaseProcess]) -> None:
    """Kill processes, which need not be alive any more, and forget them."""
    while processes:
        processes.pop().kill()


@contextlib.contextmanager
def deaths_noticed_in_line() -> Iterator[None]:
    """Notice the death of a loading process where its images are awaited, between optimizer steps.

    PyTorch's handler, set when the first loader starts, raises wherever the parent happens to be, even in the middle
    of an optimizer step; the loader itself looks after its processes too, every five seconds.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    yield
    if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)


@contextlib.contextmanager
def said_in_one_line(
    num_workers: int, processes: Iterable[multiprocessing.process.BaseProcess] = ()
) -> Iterator[None]:
    """Replace the errors of loading processes, whose messages are tracebacks, by one sentence.

    Args:
        num_workers: how many processes there are.
        processes: those that have started; where one of them was killed, whatever its parent meets comes of that.

    Raises: LoaderError if a process died, or memory, shared memory or file handles ran out.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        text = f"{type(error).__name__}: {error}".strip()
        is_own = "in DataLoader worker process" not in text
        # Tensors in shared memory are fetched from the process that made them.
        is_cut_off = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
        if num_workers and is_own and (is_cut_off or any(x.exitcode == -signal.SIGKILL for x in processes)):
            text = f"exited unexpectedly: {text.splitlines()[-1]}"
            raise LoaderError(f"{DIED} ({text.strip()}).") from None
        for signs, way_out in WAYS_OUT.items():
            if any(sign in text for sign in signs):
                raise LoaderError(f"{way_out} ({text.splitlines()[-1].strip()}).") from None
        raise


DIED = "A process that loads images died: take fewer `--num-workers` if memory ran out"
# What the text of an error has in it: what to do about it. The first that fits counts.
WAYS_OUT = {
    ("Too many open files", "received 0 items of ancdata"): "There are too many open files: raise the limit "
    "(`ulimit -n 65536`), or take fewer `--num-workers`",
    ("Bus error", *SHARED_MEMORY): "Shared memory (/dev/shm), through which loading processes hand over "
    "images, is full: enlarge it (`docker run --shm-size 8g`), or take fewer `--num-workers`; 0 does without",
    ("killed by signal", "exited unexpectedly"): DIED,
    ("Cannot allocate memory", "can't allocate memory", "MemoryError"): "Memory ran out while images were loaded: "
    "take fewer `--num-workers`",
    ("Resource temporarily unavailable",): "No more processes can be started: raise the limit (`ulimit -u`), or take "
    "fewer `--num-workers`",
}


def training_loader(
    splits: ImageSplits,
    augment: Callable[..., Any],
    plan: StepPlan,
    arguments: TrainArguments,
    accelerator: Accelerator,
    num_steps: int,
    first_step: int,
) -> ImageLoader:
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
    num_workers = data.num_workers if splits.is_streamed else useful_workers(data.num_workers)
    common = {"num_workers": num_workers, "pin_memory": accelerator.device.type == "cuda"}
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
        return ImageLoader(images, batch_size=None, **common)
    repeats = arguments.augmentation.repeated_augmentation
    labels = splits.train[splits.label_column][:] if data.balanced_sampling else None
    batches = TrainingBatches(plan, seed, first_step, num_steps, accelerator.process_index, repeats, labels)
    return ImageLoader(TrainingImages(splits, augment, seed, data.on_bad_image), batch_sampler=batches, **common)


def evaluation_loader(
    splits: ImageSplits,
    processor: BaseImageProcessor,
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
    on_bad_image: str = "error",
) -> ImageLoader:
    """Loader of the evaluation split for one process, as the image processor prepares it."""
    transform = ProcessorTransform(processor)
    process, num_processes = accelerator.process_index, accelerator.num_processes
    if splits.is_streamed:
        streamed = StreamedEvaluationImages(splits, transform, batch_size, process, num_processes, on_bad_image)
        return ImageLoader(streamed, batch_size=None, num_workers=min(num_workers, 1))
    num_workers = useful_workers(num_workers)
    images = EvaluationImages(splits, transform, on_bad_image)
    batches = EvaluationBatches(len(images), batch_size, process, num_processes)
    return ImageLoader(images, batch_sampler=batches, num_workers=num_workers, persistent_workers=num_workers > 0)


@functools.cache
def useful_workers(num_workers: int) -> int:
    """Number of loading processes, no more than CPUs: more of them only take each other's time. Says so once."""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers > num_cpus:
        say(f"`--num-workers` is {num_workers}, but this process has {num_cpus} CPUs: {num_cpus} load images.")
    return min(num_workers, num_cpus)


def ignore_signals(worker: int) -> None:
    """Leave signals to the parent process; `worker_init_fn` of all loaders."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


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
