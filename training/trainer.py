"""The training loop, top to bottom.

Build data, model, optimizer and schedules; then for each optimizer step: keep rate, forward, backward, step, log; for
each epoch: evaluate; at the end: save, compare with the dense model, draw. Settings: `arguments.py`.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    get_cosine_with_min_lr_schedule_with_warmup,
)
from transformers.utils import ModelOutput

from evit_hf import (
    EViTConfig,
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVForImageClassification,
    EViTPreTrainedModel,
)
from evit_hf.keep_rate_schedule import scheduled_keep_rate
from evit_hf.token_labelling import mix_targets, random_mix_box, token_labelling_loss
from evit_hf.visualization import attentive_patch_picture

from .arguments import OptimizationArguments, TrainArguments
from .augmentation import ProcessorTransform, image_processor, training_transform
from .data import LabelledImages, load_splits
from .evaluation import accuracy, compare_keep_rates, comparison_table


# What a run leaves in its output folder.
RUN_FILES = ("model", "metrics.jsonl", "results.json", "arguments.yaml", "kept_patches.png")


def train(arguments: TrainArguments) -> list[dict]:
    """Train a model and leave it in `arguments.run.output_dir`.

    The folder then holds `model/` (weights, configuration, image processor, code for `trust_remote_code`),
    `metrics.jsonl` (one line for each log and each epoch), `results.json` (this function's result), `arguments.yaml`
    (all settings, again a recipe) and `kept_patches.png`.

    Returns: accuracy, GMACs and images per second of the dense and of the reorganized model, see `compare_keep_rates`.

    Raises: ValueError for settings or data that cannot work.
    """
    optimization = arguments.optimization
    output_dir = Path(arguments.run.output_dir)
    refuse_finished_run(output_dir, arguments.run.overwrite)
    accelerator = build_accelerator(arguments.run.mixed_precision)

    # Data, model, optimizer
    train_data, eval_data, image_column, label_column = load_splits(arguments.data, arguments.run.seed)
    set_seed(arguments.run.seed)  # the same weights on every process
    model = build_model(arguments, train_data.features[label_column].names)
    image_size = model.config.image_size
    grid = (image_size // model.config.patch_size,) * 2
    processor = image_processor(arguments.model.model, image_size)
    augment = training_transform(arguments.augmentation, image_size, processor)
    train_images = LabelledImages(train_data, image_column, label_column, augment)
    eval_images = LabelledImages(eval_data, image_column, label_column, ProcessorTransform(processor))
    train_loader = DataLoader(
        train_images,
        optimization.batch_size,
        shuffle=True,
        num_workers=arguments.data.num_workers,
        drop_last=len(train_images) >= optimization.batch_size * accelerator.num_processes,
        persistent_workers=arguments.data.num_workers > 0,
        generator=torch.Generator().manual_seed(arguments.run.seed),
    )
    eval_loader = DataLoader(eval_images, optimization.eval_batch_size, num_workers=arguments.data.num_workers)
    optimizer = build_optimizer(model, optimization)
    model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, train_loader, eval_loader)
    set_seed(arguments.run.seed, device_specific=True)  # other augmentation and dropout on every process

    # Schedules, all in optimizer steps
    steps_per_epoch = len(train_loader)
    num_steps = optimization.max_steps or optimization.epochs * steps_per_epoch
    learning_rate = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer.optimizer,  # and the schedule itself is not prepared: it would step once for each process
        num_warmup_steps=round(optimization.warmup_epochs * steps_per_epoch),
        num_training_steps=num_steps,
        min_lr=optimization.min_learning_rate,
    )
    dense_steps = round(optimization.keep_rate_dense_epochs * steps_per_epoch)
    shrink_steps = round(optimization.keep_rate_shrink_epochs * steps_per_epoch)

    if accelerator.is_main_process:  # nothing was written before all of the above worked
        prepare_output_dir(output_dir, arguments)
    accelerator.wait_for_everyone()
    accelerator.print(describe(accelerator, model, arguments, len(train_images), len(eval_images), num_steps))
    log = MetricsLog(output_dir / "metrics.jsonl", accelerator.is_main_process)
    progress = tqdm(
        total=num_steps, desc="train", unit="step", disable=None if accelerator.is_local_main_process else True
    )
    # The loss is summed on the device and read only where it is logged: reading it waits for the device.
    loss_sum, loss_steps, log_time = torch.zeros((), device=accelerator.device), 0, time.perf_counter()
    for step, (epoch, batch, ends_epoch) in enumerate(batches(train_loader, num_steps)):
        # Keep rate
        keep_rate = scheduled_keep_rate(step, arguments.keep_rate, dense_steps, shrink_steps)

        # Forward, backward, step
        model.train()
        mix_box = random_mix_box(grid) if torch.rand(()) < optimization.mix_token else None
        outputs = model(batch["pixel_values"], keep_rate=keep_rate, mix_box=mix_box)
        loss = training_loss(outputs, batch["labels"], optimization.label_smoothing, mix_box, grid)
        accelerator.backward(loss)
        if optimization.max_grad_norm:
            accelerator.clip_grad_norm_(model.parameters(), optimization.max_grad_norm)
        optimizer.step()
        rate_used = learning_rate.get_last_lr()[0]
        if not accelerator.optimizer_step_was_skipped:  # fp16 overflow
            learning_rate.step()
        optimizer.zero_grad()
        loss_sum, loss_steps = loss_sum + loss.detach(), loss_steps + 1
        progress.update()

        # Log
        last_step = step + 1 == num_steps
        if (step + 1) % arguments.run.log_steps == 0 or ends_epoch or last_step:
            mean_loss = accelerator.reduce(loss_sum / loss_steps, "mean").item()
            if not math.isfinite(mean_loss):
                raise FloatingPointError(
                    f"The training loss is {mean_loss} at step {step + 1}: lower `--learning_rate`, or set "
                    "`--max_grad_norm`."
                )
            seconds = time.perf_counter() - log_time
            speed = loss_steps * optimization.batch_size * accelerator.num_processes / seconds
            entry = {"loss": mean_loss, "learning_rate": rate_used, "keep_rate": keep_rate, "images_per_second": speed}
            log.write({"step": step + 1, "epoch": (step + 1) / steps_per_epoch, **entry})
            progress.set_postfix(loss=f"{mean_loss:.3f}", keep_rate=shown(keep_rate))
            loss_sum, loss_steps, log_time = torch.zeros_like(loss_sum), 0, time.perf_counter()

        # Evaluate, at the target keep rate
        if ends_epoch or last_step:
            metrics = accuracy(accelerator, model, eval_loader)
            log.write({"step": step + 1, "epoch": epoch + 1, **{f"eval_{name}": x for name, x in metrics.items()}})
            accelerator.print(
                f"epoch {epoch + 1}: loss {mean_loss:.3f}, keep rate {shown(keep_rate)}, "
                f"top-1 {100 * metrics['top1']:.2f} %, top-5 {100 * metrics['top5']:.2f} %"
            )
            log_time = time.perf_counter()
    progress.close()

    # Save, compare, draw
    network = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        network.save_pretrained(output_dir / "model")
        processor.save_pretrained(output_dir / "model")
    keep_rates = [1.0, arguments.keep_rate] if arguments.keep_rate != 1.0 else [1.0]
    results = compare_keep_rates(accelerator, model, eval_loader, keep_rates)
    if accelerator.is_main_process:
        (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        if arguments.run.num_pictures:
            draw_kept_patches(network, processor, eval_images, arguments.run.num_pictures, output_dir)
    accelerator.print(comparison_table(results))
    accelerator.print(
        f"Saved in {output_dir}: {', '.join(name for name in RUN_FILES if (output_dir / name).exists())}"
    )
    accelerator.end_training()
    return results


def refuse_finished_run(output_dir: Path, overwrite: bool) -> None:
    """Raise ValueError if the folder holds a run that must not be overwritten."""
    left = [name for name in RUN_FILES if (output_dir / name).exists()]
    if left and not overwrite:
        raise ValueError(
            f"`{output_dir}` holds a run already ({', '.join(left)}): choose another `--output_dir`, or pass "
            "`--overwrite` to delete it."
        )


def prepare_output_dir(output_dir: Path, arguments: TrainArguments) -> None:
    """Make the folder of a run, without what an earlier one left, and write down the settings."""
    for name in RUN_FILES:
        path = output_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "arguments.yaml").write_text(yaml.safe_dump(arguments.as_dict(), sort_keys=False))


def build_accelerator(mixed_precision: str) -> Accelerator:
    """Build the Accelerator, on the CPU where there is nothing better, on as many processes as were launched.

    Raises: RuntimeError if Accelerate would run each process alone, as it silently does with some launch commands.
    """
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched but Accelerate uses {accelerator.num_processes}: launch with "
            "`torchrun --nproc_per_node N -m evit_training.train`."
        )
    return accelerator


def build_model(arguments: TrainArguments, label_names: list[str]) -> EViTPreTrainedModel:
    """Build the network: a checkpoint with a head for these classes, a model of the paper, or one of any size."""
    model = arguments.model
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: number for number, name in enumerate(label_names)},
    }
    settings: dict[str, Any] = {
        "keep_rate": arguments.keep_rate,
        "fuse_inattentive_tokens": model.fuse_inattentive_tokens,
        "drop_path_rate": model.drop_path_rate,
        **({"reorganization_layers": model.reorganization_layers} if model.reorganization_layers is not None else {}),
    }
    if model.model is not None:
        network = load_classifier(model.model, **labels, **settings)
        if not isinstance(network.config.image_size, int) or not isinstance(network.config.patch_size, int):
            raise ValueError(
                f"`{model.model}` was made for images of {network.config.image_size} pixels in patches of "
                f"{network.config.patch_size}: this trainer takes square ones, `transformers.Trainer` takes all."
            )
        if model.image_size not in (None, network.config.image_size):
            raise ValueError(
                f"`--image_size` is {model.image_size} but `{model.model}` was made for {network.config.image_size}: "
                "leave it out; training at another resolution is not built yet."
            )
    elif model.preset is not None:
        size = {} if model.image_size is None else {"image_size": model.image_size}
        config = EViTConfig.preset(model.preset, num_labels=len(label_names), **labels, **settings, **size)
        network = AutoModelForImageClassification.from_config(config)
    else:
        config = EViTConfig(
            image_size=model.image_size or 224,
            patch_size=model.patch_size,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            intermediate_size=4 * model.hidden_size,
            initializer_range=model.initializer_range,
            layer_norm_eps=1e-6,
            **labels,
            **settings,
        )
        network = EViTForImageClassification(config)
    if arguments.run.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return network


def load_classifier(name_or_path: str, **settings: Any) -> EViTPreTrainedModel:
    """Load a checkpoint as the EViT classifier that its configuration asks for; a ViT or DeiT becomes one."""
    config_dict, _ = PreTrainedConfig.get_config_dict(name_or_path)
    if config_dict.get("model_type") == "evit_lv":
        return EViTLVForImageClassification.from_pretrained(name_or_path, **settings)
    if (config_dict.get("architectures") or [""])[0].endswith("WithTeacher"):
        return EViTForImageClassificationWithTeacher.from_pretrained(name_or_path, **settings)
    return EViTForImageClassification.from_pretrained(name_or_path, **settings)


def training_loss(
    outputs: ModelOutput,
    labels: torch.Tensor,
    label_smoothing: float,
    mix_box: tuple[int, int, int, int] | None,
    grid: tuple[int, int],
) -> torch.Tensor:
    """Cross-entropy, for mixed images with mixed labels; token labelling too where there is an auxiliary classifier.

    Args:
        outputs: of the model in training.
        labels: (batch_size,), class numbers.
        label_smoothing: share of the target that is spread over all classes.
        mix_box: what the model was given, or None.
        grid: (rows, columns) of patches.

    Returns: scalar.
    """
    logits = outputs.logits.float()
    num_labels = logits.shape[-1]
    targets = nn.functional.one_hot(labels, num_labels) * (1 - label_smoothing) + label_smoothing / num_labels
    token_targets = None
    if mix_box is not None:
        each_token = targets.unsqueeze(1).expand(-1, grid[0] * grid[1], -1)
        targets, token_targets = mix_targets(targets, each_token, mix_box, grid)
    if outputs.get("aux_logits") is None:
        return nn.functional.cross_entropy(logits, targets)
    return token_labelling_loss(logits, outputs.aux_logits.float(), outputs.patch_index, targets, token_targets)


def build_optimizer(model: nn.Module, arguments: OptimizationArguments) -> torch.optim.AdamW:
    """Build AdamW without weight decay on norms, biases, positions and tokens."""
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        is_spared = parameter.ndim < 2 or name.endswith(("cls_token", "distillation_token", "position_embeddings"))
        (spared if is_spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": arguments.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=arguments.learning_rate)


def batches(loader: DataLoader, num_steps: int) -> Iterator[tuple[int, dict[str, torch.Tensor], bool]]:
    """Yield `num_steps` batches over as many epochs as that takes: epoch, batch, whether it ends the epoch."""
    step, epoch = 0, 0
    while True:
        for i, batch in enumerate(loader):
            yield epoch, batch, i + 1 == len(loader)
            step += 1
            if step == num_steps:
                return
        epoch += 1


def shown(keep_rate: float | list[float]) -> str:
    """Return a keep rate, or one for each layer, with three digits."""
    rates = keep_rate if isinstance(keep_rate, list) else [keep_rate]
    return " ".join(f"{rate:.3f}" for rate in rates)


def describe(
    accelerator: Accelerator,
    model: nn.Module,
    arguments: TrainArguments,
    num_train: int,
    num_eval: int,
    num_steps: int,
) -> str:
    """Return the settings of the run, and what they come to, as text."""
    config = accelerator.unwrap_model(model).config
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = yaml.safe_dump(arguments.as_dict(), sort_keys=False, default_flow_style=None).rstrip()
    return (
        f"{settings}\n"
        f"{num_train} training and {num_eval} evaluation images, {config.num_labels} classes, "
        f"{num_parameters / 1e6:.2f} M parameters, layers {config.reorganization_layers} of "
        f"{config.num_hidden_layers} reorganize, {num_steps} steps on {accelerator.num_processes} x "
        f"{accelerator.device.type}"
    )


def draw_kept_patches(
    model: EViTPreTrainedModel,
    processor: BaseImageProcessor,
    images: LabelledImages,
    num_images: int,
    output_dir: Path,
) -> None:
    """Draw evaluation images with the patches that each reorganization layer keeps, into kept_patches.png."""
    pixel_values = torch.stack([images[i]["pixel_values"] for i in range(min(num_images, len(images)))])
    with torch.no_grad():
        attentive_index = model.eval()(pixel_values.to(model.device)).attentive_index
    mean, std = (torch.tensor(stat).view(1, -1, 1, 1) for stat in (processor.image_mean, processor.image_std))
    picture = attentive_patch_picture(pixel_values * std + mean, attentive_index, model.config.patch_size)
    picture.save(output_dir / "kept_patches.png")


class MetricsLog:
    """A file with one JSON object for each line, written by the main process."""

    def __init__(self, path: Path, is_writer: bool) -> None:
        self.path = path
        self.is_writer = is_writer

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line; it is on disk when this returns."""
        if self.is_writer:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
