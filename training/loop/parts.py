"""The parts of a run, built and checked before its first step."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from transformers import BaseImageProcessor

from evit_hf.keep_rate_schedule import KeepRateSchedule
from evit_hf.profiling import MacsFormula
from evit_hf.towers import tower_of

from ..arguments import TrainArguments
from ..data.augmentation import batch_mixing, image_processor
from ..data.images import ImageSplits
from ..data.sampling import StepPlan
from ..data.splits import check_images, describe_splits, fingerprint, load_splits
from ..learning.models import (
    build_model,
    compile_layers,
    knows_classes,
    leave_out_unused,
    load_classifier,
    square_image_size,
)
from ..learning.objective import Objective
from ..learning.optimization import WeightAverage, build_optimizer, freeze
from ..learning.teachers import build_oracle, build_teacher
from ..measuring.machine import check_launcher
from ..screen import say
from .checkpoints import Progress
from .metrics_log import tracker_settings
from .state import TrainingState


@dataclass(frozen=True)
class Parts:
    """What stays as it is while a run trains; what changes is in its `TrainingState`.

    Args:
        arguments: settings of the run.
        splits: the data.
        processor: image processor of the model.
        image_size: pixels of the images, which are square.
        plan: how images are cut into optimizer steps.
        num_steps: optimizer steps of the run.
        keep_rates: keep rate of each of them.
        macs: operations of an image at a keep rate.
        objective: what the model learns.
    """

    arguments: TrainArguments
    splits: ImageSplits
    processor: BaseImageProcessor
    image_size: int
    plan: StepPlan
    num_steps: int
    keep_rates: KeepRateSchedule
    macs: MacsFormula
    objective: Objective


def build_accelerator(arguments: TrainArguments) -> Accelerator:
    """Build the Accelerator, on the CPU where there is nothing better, on as many processes as were launched.

    Raises:
        ValueError: for DeepSpeed, FSDP1, fp16 without a GPU, a tracker that is not installed, what `accelerate launch`
            asks for and the settings do not, or where Accelerate would not connect the processes, as it silently does
            with some launch commands.
    """
    check_launcher(arguments.run.mixed_precision)
    accelerator = Accelerator(
        mixed_precision=arguments.run.mixed_precision,
        cpu=not torch.accelerator.is_available(),
        **tracker_settings(arguments.run),
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise ValueError(
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


def build_parts(arguments: TrainArguments, accelerator: Accelerator) -> tuple[Parts, TrainingState]:
    """Build data, model, optimizer and teachers, and check what can be checked before the first step.

    Raises: ValueError for settings or data that cannot work.
    """
    optimization, seed = arguments.optimization, arguments.run.seed
    splits = load_splits(arguments.data, seed)
    say(describe_splits(splits))
    plan = StepPlan(
        # Streamed data is one long epoch.
        optimization.max_steps * optimization.batch_size if splits.is_streamed else len(splits.train),
        optimization.batch_size,
        accelerator.num_processes,
        optimization.gradient_accumulation_steps,
        optimization.drop_last,
    )
    mixes = arguments.augmentation.mixup or arguments.augmentation.cutmix or optimization.mix_token
    if mixes and plan.micro_batch_size == 1:
        raise ValueError(
            "Mixing pairs the images of a forward pass, which has one here: raise `--batch-size`, lower "
            "`--gradient-accumulation-steps`, or leave out `--mixup`, `--cutmix` and `--mix-token`."
        )
    if arguments.data.check_images and arguments.data.on_bad_image == "error" and not splits.is_streamed:
        check_images(splits, arguments.data.check_images)
    num_steps = optimization.max_steps or optimization.epochs * plan.steps_per_epoch

    set_seed(seed)  # the same weights on every process
    network = build_model(arguments, splits)
    image_size = square_image_size(network, arguments.model)
    processor = image_processor(arguments.model.model, image_size)
    oracle = build_oracle(arguments.teacher, network, load_classifier, image_size, processor)
    model = arguments.model.model
    if arguments.teacher.teacher == "initial" and not knows_classes(model, splits.label_names):
        raise ValueError(
            f"`--teacher initial` would teach what a random classifier says, as `{model}` has none for these classes: "
            "fine-tune it first, and pass that run as `--teacher`."
        )
    teacher = build_teacher(arguments.teacher, network, processor, splits.label_names)
    for helper in (oracle, teacher):
        if helper is not None:
            helper.to(accelerator.device)
    oracle_epochs = arguments.teacher.oracle_epochs
    objective = Objective(
        network.config,
        label_smoothing=optimization.label_smoothing,
        mix_token=optimization.mix_token,
        mixing=batch_mixing(arguments.augmentation, len(splits.label_names)),
        oracle=oracle,
        oracle_steps=None if oracle_epochs is None else round(oracle_epochs * plan.steps_per_epoch),
        teacher=teacher,
        teaching=arguments.teacher,
        autocast=accelerator.autocast,
    )
    keep_rates = KeepRateSchedule.in_epochs(
        tower_of(network).config.keep_rate,
        optimization.keep_rate_dense_epochs,
        optimization.keep_rate_shrink_epochs,
        plan.steps_per_epoch,
        levels=optimization.keep_rate_levels,
        range=optimization.keep_rate_range,
        seed=seed,
    )
    macs = MacsFormula.of(network, image_size)
    freeze(network, arguments.model.trainable, arguments.model.freeze_layers)
    leave_out_unused(network, image_size)
    optimizer = build_optimizer(network, optimization, arguments.learning_rate)
    if arguments.run.compile:
        compile_layers(network)
    model, optimizer = accelerator.prepare(network, optimizer)
    state = TrainingState(
        accelerator,
        model,
        optimizer,
        WeightAverage(model, optimization.ema_decay) if optimization.ema_decay else None,
        Progress(settings=arguments.as_dict(), num_processes=accelerator.num_processes, data=fingerprint(splits)),
        Path(arguments.run.output_dir) / "checkpoints",
    )
    return Parts(arguments, splits, processor, image_size, plan, num_steps, keep_rates, macs, objective), state
