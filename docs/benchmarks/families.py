"""Times four families of Vision Transformers, dense and reorganized, with random weights: no download, one process.

python docs/benchmarks/families.py --rounds 15

Each model is timed as Transformers has it (dense), after `reorganize` at keep rates 1.0, 0.7 and 0.5, and with
`--macs` at shares of its operations: with counted tokens, and with as many tokens dropped, and merged as ToMe does.
All take turns in a new random order each round. Below the table is the time with counted tokens over that with dropped
ones, round by round. Efficiency is the speed-up divided by what the operations promise: 1 where time follows
operations.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers

from evit_hf import reorganize
from evit_hf.profiling import num_macs
from evit_hf.tokens_left import Asked
from evit_training.measuring.comparisons import REFERENCE, all_ways, in_place
from evit_training.measuring.machine import machine
from evit_training.measuring.timing import Variant, alternate, quartiles


SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
# Published sizes by name: class of the model, and fields of its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DINOv2-S/14": ("Dinov2ForImageClassification", {**SMALL, "mlp_ratio": 4, "patch_size": 14}),
    "DINOv3-S/16": (
        "DINOv3ViTModel",
        {**SMALL, "intermediate_size": 1536, "patch_size": 16, "num_register_tokens": 4},
    ),
    "CLIP-B/16": ("CLIPVisionModel", {**BASE, "patch_size": 16}),
    "BEiT-B/16": ("BeitForImageClassification", {**BASE, "patch_size": 16, "use_relative_position_bias": True}),
    "DINOv2-B/14": ("Dinov2ForImageClassification", {**BASE, "mlp_ratio": 4, "patch_size": 14}),
    "DINOv3-B/16": ("DINOv3ViTModel", {**BASE, "patch_size": 16, "num_register_tokens": 4}),
    "CLIP-L/14": ("CLIPVisionModel", {**LARGE, "patch_size": 14}),
}
TIMED_BY_DEFAULT = ("DINOv2-S/14", "DINOv3-S/16", "CLIP-B/16", "BEiT-B/16")
KEEP_RATES = (1.0, 0.7, 0.5)


def build(name: str, **fields: Any) -> transformers.PreTrainedModel:
    """A model of that size with random weights, far from uniform attention, in evaluation mode.

    Args:
        name: of `MODELS`.
        **fields: of its configuration, instead of the published ones.
    """
    class_name, published = MODELS[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**{"image_size": 224, "initializer_range": 0.05, **published, **fields})
    torch.manual_seed(0)
    return model_class(config).eval()


@contextmanager
def tome() -> Iterator[None]:
    """Let models with counted tokens merge as many of them as ToMe does, which scores no tokens."""

    def asked(num_scoring_tokens: int, **kwargs: Any) -> Asked:
        return Asked(num_scoring_tokens=0, **kwargs)

    with in_place({**all_ways()[REFERENCE].functions, "Asked": asked}):
        yield


def runner(model: torch.nn.Module, images: torch.Tensor, merges: bool = False) -> Callable[[], None]:
    """A function that runs a model once; `merges`: as ToMe."""

    def run() -> None:
        with torch.no_grad(), tome() if merges else nullcontext():
            model(images)

    return run


def compare(
    name: str,
    images: torch.Tensor,
    rounds: int,
    clock: str = "wall",
    keep_rates: Sequence[float] = KEEP_RATES,
    shares: Sequence[float] = (),
    **fields: Any,
) -> list[dict[str, Any]]:
    """Time one model, dense and reorganized.

    Args:
        name: of `MODELS`.
        images: (batch_size, 3, height, width), on the device and in the dtype to measure.
        rounds: to measure.
        clock: "wall" or "cpu".
        keep_rates: of the paper's way, tokens fused.
        shares: of the operations, tokens counted, and as many dropped, and merged.
        **fields: see `build`.

    Returns: one dictionary for each variant, the dense one first.
    """
    dense = build(name, **fields).to(images.device, images.dtype)
    variants, macs = [Variant("dense", runner(dense, images), 0, 0, 1.0)], []
    for keep_rate in keep_rates:
        model = reorganize(copy.deepcopy(dense), keep_rate)
        macs.append(num_macs(model, keep_rate, images.shape[-1]))
        variants.append(Variant(f"`reorganize`, {keep_rate}", runner(model, images), 0, 0, keep_rate))
    for share in shares:
        model = reorganize(copy.deepcopy(dense), macs=share)
        dropping = reorganize(copy.deepcopy(dense), macs=share, inattentive_tokens="dropped")
        for way, run in (
            (f"`reorganize`, macs={share}", runner(model, images)),
            (f"dropped, macs={share}", runner(dropping, images)),
            (f"ToMe, macs={share}", runner(model, images, merges=True)),
        ):
            macs.append(num_macs(model, image_size=images.shape[-1], macs=share))
            variants.append(Variant(way, run, 0, 0))
    whole = num_macs(model, image_size=images.shape[-1], keep_rate=1.0)
    seconds = alternate(variants, images.device, rounds, clock_name=clock)
    rows = []
    for variant, times, operations in zip(variants, seconds, [whole, *macs], strict=True):
        low, speed_up, high = quartiles([first / other for first, other in zip(seconds[0], times, strict=True)])
        rows.append(
            {
                "model": name,
                "variant": variant.name,
                "seconds": statistics.median(times),
                "images_per_second": len(images) / statistics.median(times),
                "gmacs": operations / 1e9,
                "saved": whole / operations,
                "speed_up": speed_up,
                "speed_up_quartiles": (low, high),
                "efficiency": speed_up * operations / whole,
            }
        )
        if variant.name.startswith("dropped"):
            pairs = zip(seconds[len(rows) - 2], times, strict=True)
            rows[-1]["counted_over_dropped"] = quartiles([counted / dropped for counted, dropped in pairs])
    return rows


HEADER = (
    "| model | variant | ms/batch | images/s | GMACs | operations dense / own | speed-up (quartiles) | efficiency |\n"
    "|---|---|---|---|---|---|---|---|"
)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of a Markdown table, below `HEADER`."""
    return "\n".join(
        f"| {row['model']} | {row['variant']} | {1000 * row['seconds']:.2f} | {row['images_per_second']:.1f} | "
        f"{row['gmacs']:.2f} | {row['saved']:.2f} | {row['speed_up']:.2f} "
        f"({row['speed_up_quartiles'][0]:.2f}–{row['speed_up_quartiles'][1]:.2f}) | {row['efficiency']:.2f} |"
        for row in rows
    )


def costs_of_counting(rows: list[dict[str, Any]]) -> str:
    """A sentence for each share of operations: the time with counted tokens over that with dropped ones."""
    return "\n".join(
        f"{row['model']}, {row['variant']}: counted takes {ratio:.3f} ({low:.3f}–{high:.3f}) times as long."
        for row in rows
        for low, ratio, high in [row.get("counted_over_dropped", (0, 0, 0))]
        if ratio
    )


def main() -> None:
    """Time the models of a command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", default=TIMED_BY_DEFAULT, help=f"of {', '.join(MODELS)}; by default the first four"
    )
    parser.add_argument("--keep-rates", type=float, nargs="*", default=KEEP_RATES, help="of the paper's way")
    parser.add_argument("--macs", type=float, nargs="*", default=[], help="shares of the operations")
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
        f"{arguments.clock} clock, {arguments.rounds} rounds, tokens fused\n\n{HEADER}"
    )
    images = torch.randn(arguments.batch_size, 3, 224, 224).to(device)
    costs = []
    for name in arguments.names:
        rows = compare(name, images, arguments.rounds, arguments.clock, arguments.keep_rates, arguments.macs)
        print(table(rows), flush=True)  # noqa: T201
        costs.append(costs_of_counting(rows))
    if arguments.macs:
        print("", *costs, sep="\n")  # noqa: T201


if __name__ == "__main__":
    main()
