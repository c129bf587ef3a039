"""What a training step needs: data, model, optimizer and teachers, built and checked before the first step."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import nn
from torchvision.transforms import v2
from transformers import BaseImageProcessor

from evit_hf import EViTPreTrainedModel

from ..arguments import TrainArguments
from ..data.augmentation import batch_mixing, image_processor, training_transform
from ..data.images import ImageSplits
from ..data.sampling import StepPlan
from ..data.splits import check_images, describe_splits, load_splits
from ..learning.models import build_model, compile_layers, load_classifier
from ..learning.optimization import WeightAverage, build_optimizer, freeze
from ..learning.teachers import Oracle, Teacher, build_oracle, build_teacher
from .metrics_log import build_trackers


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
            "`torchrun --nproc_per_node N -m evit_training train`."
        )
    if arguments.run.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError("`--mixed-precision fp16` needs a GPU, here it would train in float32: take `bf16` or `no`.")
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
    accelerator.print(describe_splits(splits))
    if splits.is_streamed:
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
        compile_layers(network)
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
