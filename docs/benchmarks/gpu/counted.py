"""Families without training: DINOv2-B, DINOv3-B and CLIP-L/14 by keep rate and by share of operations, against ToMe.

Counted tokens add the logarithm of their sizes to the logits. Three ways to do that are timed, with attention without
sizes for comparison: as a mask (this package), as one more channel of queries and keys, with which the fastest kernels
can run, and in flex attention.
"""

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from kit import Kit, markdown
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from evit_training.measuring.timing import Variant, alternate, check_answers, quartiles


sys.path.append(str(Path(__file__).parent.parent))
from families import BASE, HEADER, compare, table


# Most important first: model, batch sizes.
SETTINGS = [("DINOv2-B/14", (256, 1, 64)), ("CLIP-L/14", (64, 1)), ("DINOv3-B/16", (256, 1))]
TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}


def family(kit: Kit, name: str, batch_size: int) -> tuple[str, Any]:
    """One model of `docs/benchmarks/families.py`."""
    dtype = torch.float32 if kit.is_dry else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        images = torch.randn(batch_size, 3, *(2 * [64 if kit.is_dry else 224])).to(kit.device)
        fields = {**TINY, "image_size": 64, "patch_size": 8} if kit.is_dry else {}
        rows = compare(name, images, 2 if kit.is_dry else 21, shares=(0.66, 0.5), **fields)
    finally:
        torch.set_default_dtype(before)
    return f"{HEADER}\n{table(rows)}", rows


def as_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """Attention with log sizes, (batch_size, sequence_length), as a mask."""
    return scaled_dot_product_attention(query, key, value, attn_mask=logs[:, None, None])


def as_channel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """Attention with log sizes as a channel of the keys, whose partner in the queries is 1; then zeros up to 8."""
    dim, scale = query.shape[-1], query.shape[-1] ** -0.5
    query = pad(pad(query, (0, 1), value=1.0), (0, 7))
    key = pad(torch.cat((key, (logs / scale)[:, None, :, None].expand(-1, key.shape[1], -1, 1)), dim=-1), (0, 7))
    return scaled_dot_product_attention(query, key, pad(value, (0, 8)), scale=scale)[..., :dim]


def in_flex(is_dry: bool) -> Callable[..., torch.Tensor]:
    """Attention with log sizes in flex attention, compiled unless this is a dry run."""
    attend = flex_attention if is_dry else torch.compile(flex_attention, dynamic=False)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
        def add_logs(score: torch.Tensor, batch: Any, head: Any, query_at: Any, key_at: Any) -> torch.Tensor:
            return score + logs[batch, key_at]

        return attend(query, key, value, score_mod=add_logs)

    return run


@torch.no_grad()
def log_sizes(kit: Kit, batch_size: int, num_tokens: int) -> tuple[str, Any]:
    """Ways to add log sizes to the logits of one layer's attention, at ViT-B's width."""
    dtype, repeats, rounds = (torch.float32, 1, 2) if kit.is_dry else (torch.bfloat16, 20, 21)
    heads = BASE["num_attention_heads"]
    torch.manual_seed(0)
    shape = (batch_size, heads, num_tokens, BASE["hidden_size"] // heads)
    query, key, value = (torch.randn(shape).to(kit.device, dtype) for _ in range(3))
    logs = torch.randint(1, 5, (batch_size, num_tokens)).log().to(kit.device, dtype)
    ways = {"mask": as_mask, "channel": as_channel, "flex": in_flex(kit.is_dry)}
    expected = as_mask(query.float(), key.float(), value.float(), logs.float())

    def repeated(attend: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            for _ in range(repeats):
                output = attend(*tensors)
            return output

        return run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex attention says that it is not compiled, in a dry run
        variants = [Variant(name, repeated(way, query, key, value, logs), 0, 0) for name, way in ways.items()]
        check_answers(variants, lambda keep_rate: expected, 0.02)
        dense = Variant("dense, no sizes", repeated(scaled_dot_product_attention, query, key, value), 0, 0)
        seconds = alternate([dense, *variants], kit.device, rounds)
    rows = []
    for variant, times in zip([dense, *variants], seconds, strict=True):
        low, middle, high = quartiles([1e6 * one / repeats for one in times])
        rows.append(
            [variant.name, middle, f"{low:.4g}–{high:.4g}", math.nan if variant is dense else variant.relative_error]
        )
    return markdown(["log sizes as", "us", "quartiles", "relative error"], rows), rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what a command line asks for."""
    kit = Kit("counted", __doc__, argv)
    for name, batch_sizes in SETTINGS:
        for batch_size in (2,) if kit.is_dry else batch_sizes:
            kit.measure(f"{name}, batch {batch_size}", lambda name=name, size=batch_size: family(kit, name, size), 45)
    for batch_size, num_tokens in ((1, 17),) if kit.is_dry else ((256, 197), (64, 197), (64, 130), (1, 197)):
        title = f"log sizes, batch {batch_size}, {num_tokens} tokens"
        kit.measure(title, lambda size=batch_size, tokens=num_tokens: log_sizes(kit, size, tokens))
    return kit.finish()


if __name__ == "__main__":
    sys.exit(main())
