"""Times four families of Vision Transformers, dense and reorganized, with random weights: no download, one process.

python docs/benchmarks/families.py --rounds 15

Each model is timed as Transformers has it (dense) and after `reorganize` at keep rates 1.0, 0.7 and 0.5, all taking
turns in a new random order each round. Efficiency is the speed-up divided by what the operations promise: 1 where
time follows operations.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
import transformers

from evit_hf import reorganize
from evit_hf.profiling import num_macs
from evit_training.measuring.machine import machine
from evit_training.measuring.timing import Variant, alternate, quartiles


SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
# Published sizes by name: class of the model, and fields of its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DINOv2-S/14": ("Dinov2ForImageClassification", {**SMALL, "mlp_ratio": 4, "patch_size": 14}),
    "DINOv3-S/16": (
        "DINOv3ViTModel",
        {**SMALL, "intermediate_size": 1536, "patch_size": 16, "num_register_tokens": 4},
    ),
    "CLIP-B/16": ("CLIPVisionModel", {**BASE, "patch_size": 16}),
    "BEiT-B/16": ("BeitForImageClassification", {**BASE, "patch_size": 16, "use_relative_position_bias": True}),
}
KEEP_RATES = (1.0, 0.7, 0.5)


def build(name: str) -> transformers.PreTrainedModel:
    """A model of that size with random weights, far from uniform attention, in evaluation mode."""
    class_name, fields = MODELS[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**fields, image_size=224, initializer_range=0.05)
    torch.manual_seed(0)
    return model_class(config).eval()


def runner(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """A function that runs a model once."""

    def run() -> None:
        with torch.no_grad():
            model(images)

    return run


def table(name: str, images: torch.Tensor, rounds: int, clock: str) -> str:
    """Rows of a Markdown table for one model."""
    dense = build(name)
    variants, macs = [Variant("dense", runner(dense, images), 0, 0, 1.0)], []
    for keep_rate in KEEP_RATES:
        model = reorganize(copy.deepcopy(dense), keep_rate)
        macs.append(num_macs(model, keep_rate))
        variants.append(Variant(f"`reorganize`, {keep_rate}", runner(model, images), 0, 0, keep_rate))
    seconds = alternate(variants, images.device, rounds, clock_name=clock)
    rows = []
    for variant, times, operations in zip(variants, seconds, [macs[0], *macs], strict=True):
        low, speed_up, high = quartiles([first / other for first, other in zip(seconds[0], times, strict=True)])
        rows.append(
            f"| {name} | {variant.name} | {1000 * statistics.median(times):.0f} | {operations / 1e9:.2f} | "
            f"{macs[0] / operations:.2f} | {speed_up:.2f} ({low:.2f}–{high:.2f}) | "
            f"{speed_up * operations / macs[0]:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Time the models of a command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}; by default all")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: this process's time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.set_default_dtype(dtype)
    print(machine(device, ("torch", "transformers")))  # noqa: T201
    print(  # noqa: T201
        f"224 px, batch {arguments.batch_size}, {arguments.dtype}, {device}, {arguments.threads} threads, "
        f"{arguments.clock} clock, {arguments.rounds} rounds, tokens fused\n\n"
        "| model | variant | ms/batch | GMACs | operations dense / own | speed-up (quartiles) | efficiency |\n"
        "|---|---|---|---|---|---|---|"
    )
    with torch.device(device):
        images = torch.randn(arguments.batch_size, 3, 224, 224)
        for name in arguments.names:
            print(table(name, images, arguments.rounds, arguments.clock), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
