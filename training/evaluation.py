"""What a model is worth: top-1 and top-5 accuracy, GMACs, images per second."""

import statistics
import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from evit_hf.profiling import num_macs


KeepRate = float | Sequence[float] | None


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: nn.Module, loader: DataLoader, keep_rate: KeepRate = None) -> dict:
    """Top-1 and top-5 accuracy, as fractions, each image counted once on any number of processes.

    Args:
        accelerator: gathers the counts.
        model: prepared by the accelerator; left in the mode it was in.
        loader: prepared by the accelerator.
        keep_rate: instead of the model's own.

    Returns: {"top1", "top5", "loss"}; top5 counts the best min(5, num_labels) classes, loss is the mean cross-entropy.
    """
    was_training = model.training
    model.eval()
    hits_at_1, hits_at_5, loss, num_images = 0, 0, 0.0, 0
    for batch in loader:
        logits = model(batch["pixel_values"], keep_rate=keep_rate).logits.float()
        losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch["labels"].unsqueeze(1)
        # Gathered for each image: the last batch of a distributed loader repeats some, and they are cut off here.
        best, losses = accelerator.gather_for_metrics((best, losses))
        hits_at_1 += best[:, 0].sum().item()
        hits_at_5 += best.any(dim=1).sum().item()
        loss += losses.sum().item()
        num_images += len(best)
    model.train(was_training)
    return {"top1": hits_at_1 / num_images, "top5": hits_at_5 / num_images, "loss": loss / num_images}


@torch.no_grad()
def images_per_second(
    model: nn.Module, pixel_values: torch.Tensor, keep_rates: Sequence[KeepRate], rounds: int = 20
) -> list[float]:
    """Speed of one model at several keep rates, in images per second: medians over rounds that alternate the rates.

    Args:
        model: left in the mode it was in.
        pixel_values: (batch_size, num_channels, height, width), on the model's device.
        keep_rates: what to compare.
        rounds: measured rounds, after two that warm up.

    Returns: one number for each keep rate.
    """
    was_training = model.training
    model.eval()
    seconds: list[list[float]] = [[] for _ in keep_rates]
    for round_number in range(rounds + 2):
        for keep_rate, times in zip(keep_rates, seconds, strict=True):
            _synchronize(pixel_values.device)
            start = time.perf_counter()
            model(pixel_values, keep_rate=keep_rate)
            _synchronize(pixel_values.device)
            if round_number >= 2:
                times.append(time.perf_counter() - start)
    model.train(was_training)
    return [len(pixel_values) / statistics.median(times) for times in seconds]


def compare_keep_rates(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader, keep_rates: Sequence[KeepRate]
) -> list[dict]:
    """Accuracy, cost and speed of one set of weights at several keep rates.

    Args:
        accelerator: see `accuracy`.
        model: prepared by the accelerator.
        loader: evaluation images, prepared by the accelerator; its first batch is used for the timing.
        keep_rates: what to compare, for example [1.0, 0.7].

    Returns: for each keep rate {"keep_rate", "top1", "top5", "loss", "gmacs", "images_per_second", "device", "dtype",
        "batch_size", "image_size"}; accuracies are fractions.
    """
    network = accelerator.unwrap_model(model)
    pixel_values = next(iter(loader))["pixel_values"].to(network.device)
    speeds = [float("nan")] * len(keep_rates)
    if accelerator.is_main_process:  # alone, so that no other process disturbs the timing
        speeds = images_per_second(network, pixel_values, keep_rates)
    accelerator.wait_for_everyone()
    height, width = pixel_values.shape[-2:]
    return [
        {
            "keep_rate": keep_rate,
            **accuracy(accelerator, model, loader, keep_rate),
            "gmacs": num_macs(network.config, keep_rate, (height, width)) / 1e9,
            "images_per_second": speed,
            "device": _device_name(network.device),
            "dtype": str(network.dtype).removeprefix("torch."),
            "batch_size": len(pixel_values),
            "image_size": [height, width],
        }
        for keep_rate, speed in zip(keep_rates, speeds, strict=True)
    ]


def comparison_table(results: Sequence[dict]) -> str:
    """The results of `compare_keep_rates` as text, one line for each keep rate, the first one as the baseline."""
    first = results[0]
    lines = [
        f"{first['device']}, {first['dtype']}, batch {first['batch_size']}, "
        f"{first['image_size'][0]}x{first['image_size'][1]} pixels",
        f"{'keep rate':<20}{'top-1 %':>9}{'top-5 %':>9}{'GMACs':>10}{'MACs':>8}{'images/s':>10}{'speed':>8}",
    ]
    for result in results:
        name = "1.0 (dense ViT)" if result["keep_rate"] == 1.0 else str(result["keep_rate"])
        lines.append(
            f"{name:<20}{100 * result['top1']:>9.2f}{100 * result['top5']:>9.2f}{result['gmacs']:>10.4f}"
            f"{result['gmacs'] / first['gmacs']:>7.2f}x{result['images_per_second']:>10.0f}"
            f"{result['images_per_second'] / first['images_per_second']:>7.2f}x"
        )
    return "\n".join(lines)


def _device_name(device: torch.device) -> str:
    """Name of the device for a report, with the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
