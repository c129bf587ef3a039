"""Which images each process sees at which optimizer step, and with which random numbers.

Everything is a pure function of (seed, epoch, position) or (seed, step, process): nothing about order or randomness
has to be saved, and a run resumed at step 1000 sees what the uninterrupted one saw, whatever its workers fetched in
advance.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler


def seed_for(*parts: int | str) -> int:
    """A seed for PyTorch's generators, one for each combination of parts, for example ("order", seed, epoch)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class StepPlan:
    """How the images of an epoch fall into optimizer steps, processes and forward passes.

    Args:
        num_images: images of an epoch.
        batch_size: images of an optimizer step, over all processes.
        num_processes: processes that share a step.
        accumulation_steps: forward passes into which a process cuts its share.
        drop_last: whether the last, smaller batch is left out. Where it is all that there is, it never is.

    Raises: ValueError if the batch cannot be shared out.
    """

    num_images: int
    batch_size: int
    num_processes: int = 1
    accumulation_steps: int = 1
    drop_last: bool = True

    def __post_init__(self) -> None:
        """Check that every process and forward pass gets the same number of images."""
        if self.batch_size % (self.num_processes * self.accumulation_steps):
            raise ValueError(
                f"`--batch-size` {self.batch_size} cannot be cut evenly for {self.num_processes} processes with "
                f"`--gradient-accumulation-steps` {self.accumulation_steps}: take a multiple of "
                f"{self.num_processes * self.accumulation_steps}."
            )
        if self.num_images < self.num_processes:
            raise ValueError(f"{self.num_images} training images are too few for {self.num_processes} processes.")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        if self.drop_last and self.num_images >= self.batch_size:
            return self.num_images // self.batch_size
        return math.ceil(self._num_used / self.batch_size)

    @property
    def micro_batch_size(self) -> int:
        """Images of one forward pass."""
        return self.batch_size // (self.num_processes * self.accumulation_steps)

    @property
    def _num_used(self) -> int:
        """Images of an epoch that can be shared out evenly."""
        return self.num_images - self.num_images % self.num_processes

    def num_images_in_step(self, step: int) -> int:
        """Images of an optimizer step over all processes; the last step of an epoch may have fewer."""
        first = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self._num_used - first)

    def num_images_until(self, step: int) -> int:
        """Images of the first `step` optimizer steps."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        in_epoch = min(self.steps_per_epoch * self.batch_size, self._num_used)
        return epochs * in_epoch + min(rest * self.batch_size, self._num_used)

    def num_micro_batches(self, step: int) -> int:
        """Forward passes of each process in an optimizer step."""
        return math.ceil(self.num_images_in_step(step) / self.num_processes / self.micro_batch_size)

    def micro_batches(self, step: int, process: int) -> list[range]:
        """Positions in the epoch's order that one process takes, one range for each forward pass.

        Neighbours go to different processes, so that copies of an image (repeated augmentation) do.
        """
        first = step % self.steps_per_epoch * self.batch_size
        share = range(first + process, first + self.num_images_in_step(step), self.num_processes)
        return [share[i : i + self.micro_batch_size] for i in range(0, len(share), self.micro_batch_size)]


def epoch_order(
    num_images: int, seed: int, epoch: int, repeats: int = 1, labels: Sequence[int] | None = None
) -> torch.Tensor:
    """Image numbers of an epoch in their random order.

    Args:
        num_images: images to draw from, and length of the result.
        seed: of the run.
        epoch: number of the epoch.
        repeats: copies of each image, side by side; the epoch then holds only a part of the images.
        labels: class number of each image, to draw all classes equally often; by default each image is drawn once.

    Returns: (num_images,), image numbers.

    Source of repeated augmentation: arXiv 1901.09335, as DeiT uses it,
        https://github.com/facebookresearch/deit/blob/7e160fe/samplers.py.
    """
    generator = torch.Generator().manual_seed(seed_for("order", seed, epoch))
    order = torch.randperm(num_images, generator=generator)
    if labels is not None:
        order = balanced_order(labels, generator)
    return order.repeat_interleave(repeats)[:num_images]


def balanced_order(labels: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Image numbers in random order, as many of each class, or one more; as many as there are images.

    Images of a rare class come several times, each as often as the others of its class, or once more.

    Args:
        labels: class number of each image.
        generator: draws them.

    Returns: (len(labels),), image numbers.
    """
    numbers = torch.tensor(labels)
    present = torch.tensor(sorted(set(labels)))
    classes = present[torch.randperm(len(present), generator=generator)]  # the first ones get one image more
    drawn = []
    for i, label in enumerate(classes):
        members = (numbers == label).nonzero()[:, 0]
        count = len(range(i, len(labels), len(classes)))
        rounds = [torch.randperm(len(members), generator=generator) for _ in range(math.ceil(count / len(members)))]
        drawn.append(members[torch.cat(rounds)[:count]])
    order = torch.cat(drawn)
    return order[torch.randperm(len(order), generator=generator)]


class TrainingBatches(Sampler[list[tuple[int, int, int]]]):
    """Micro-batches of one process, from any optimizer step on, as lists of (epoch, position, image number).

    `repeats` and `labels` are those of `epoch_order`.
    """

    def __init__(
        self,
        plan: StepPlan,
        seed: int,
        first_step: int,
        num_steps: int,
        process: int = 0,
        repeats: int = 1,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.plan = plan
        self.seed = seed
        self.first_step = first_step
        self.num_steps = num_steps
        self.process = process
        self.repeats = repeats
        self.labels = labels

    def __len__(self) -> int:
        """Number of micro-batches."""
        return sum(self.plan.num_micro_batches(step) for step in range(self.first_step, self.num_steps))

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        """Yield the micro-batches, epoch after epoch."""
        order: list[int] = []
        order_epoch = None
        for step in range(self.first_step, self.num_steps):
            epoch = step // self.plan.steps_per_epoch
            if epoch != order_epoch:
                order = epoch_order(self.plan.num_images, self.seed, epoch, self.repeats, self.labels).tolist()
                order_epoch = epoch
            for positions in self.plan.micro_batches(step, self.process):
                yield [(epoch, position, order[position]) for position in positions]


class EvaluationBatches(Sampler[list[tuple[int, bool]]]):
    """Batches of one process as lists of (image number, whether it counts).

    Every process gets the same number of batches of the same sizes, which sharded models need; where that takes an
    image twice, the second one does not count.
    """

    def __init__(self, num_images: int, batch_size: int, process: int = 0, num_processes: int = 1) -> None:
        share = [(i, True) for i in range(process, num_images, num_processes)]
        share += [(0, False)] * (math.ceil(num_images / num_processes) - len(share))
        self.batches = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        """Yield the batches."""
        yield from self.batches
