"""Where the time goes: the share of scoring, choosing, gathering, fusing and concatenating tokens, and of training.

If reorganizing takes more than 5 % at batch 256, one kernel for all of it may pay. The same for queries, keys and
values as one product: what three products of a third cost more than one.

`--once` runs one forward pass for `ncu --profile-from-start off` and measures nothing else.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from kit import Kit, markdown
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.benchmark import Timer

from evit_hf import EViTConfig, EViTForImageClassification, gpu_inference, preset_config, token_reorganization
from evit_hf.short_cuts import short_cuts_counted
from evit_training.measuring.comparisons import in_place


# Functions of `token_reorganization` by what they do. Those further down run inside those further up.
PARTS = {
    "class_token_probabilities": "score: the class token's row of attention",
    "choose_tokens": "choose: top-k, rows, weights",
    "rearrange_tokens": "rearrange: gather, fuse, concatenate",
    "rows_of": "of that, gather",
    "fused_token": "of that, fuse",
}


def build(kit: Kit) -> tuple[nn.Module, torch.Tensor]:
    """DeiT-S at keep rate 0.7 and a batch of images, ready for inference."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = EViTConfig(**sizes) if kit.is_dry else preset_config("evit-deit-s", initializer_range=0.05)
    config.keep_rate = 0.7
    batch_size, dtype = (2, torch.float32) if kit.is_dry else (256, torch.bfloat16)
    model = EViTForImageClassification(config).eval().to(kit.device, dtype)
    return model, torch.randn(batch_size, 3, config.image_size, config.image_size).to(kit.device, dtype)


def named_parts() -> dict[str, Any]:
    """The functions of `PARTS`, which the profiler sees under their names."""

    def named(name: str) -> Any:
        function = getattr(gpu_inference, name, None) or getattr(token_reorganization, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return function(*args, **kwargs)

        return run

    return {name: named(name) for name in PARTS}


def activities(kit: Kit) -> list[ProfilerActivity]:
    """What the profiler follows."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kit.device.type == "cuda" else [])]


@torch.no_grad()
def shares(kit: Kit) -> tuple[str, Any]:
    """Time of each part in a forward pass, from PyTorch's profiler."""
    model, images = build(kit)
    passes, is_cuda = (1, False) if kit.is_dry else (10, True)
    # The profiler would otherwise be given the plain order of operations, without short cuts.
    with in_place(named_parts()), short_cuts_counted():
        for _ in range(3):
            model(images)
        with profile(activities=activities(kit)) as profiler:
            for _ in range(passes):
                with record_function("forward"):
                    model(images)
            if is_cuda:
                torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.key in (*PARTS, "forward") and event.device_type == torch.autograd.DeviceType.CPU:
            times[event.key] = (event.device_time_total if is_cuda else event.cpu_time_total) / passes / 1000
    rows = [["forward pass", times["forward"], 100.0]]
    rows += [[PARTS[name], times[name], 100 * times[name] / times["forward"]] for name in PARTS if name in times]
    step = sum(times.get(name, 0.0) for name in ("class_token_probabilities", "choose_tokens", "rearrange_tokens"))
    rows.append(["score, choose and rearrange together", step, 100 * step / times["forward"]])
    kernels = profiler.key_averages().table(sort_by=f"self_{'cuda' if is_cuda else 'cpu'}_time_total", row_limit=25)
    text = f"{markdown(['part', 'ms', 'share, %'], rows)}\n\n```\n{kernels}\n```"
    return text, {"milliseconds": times, "share": step / times["forward"]}


def training(kit: Kit) -> tuple[str, Any]:
    """Kernels of a training step, and how much of the step's time the GPU is busy."""
    model, images = build(kit)
    model.train()
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    is_cuda = kit.device.type == "cuda"

    def step() -> None:
        model(images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if is_cuda:
            torch.cuda.synchronize()

    for _ in range(1 if kit.is_dry else 5):
        step()
    wall = Timer("step()", globals={"step": step}).timeit(1 if kit.is_dry else 10).median
    with short_cuts_counted(), profile(activities=activities(kit)) as profiler:
        step()
    events = profiler.key_averages()
    # An operation's row counts its kernels' time again: only theirs are added up.
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in kernels) / 1e6
    table = events.table(sort_by=f"self_{'cuda' if is_cuda else 'cpu'}_time_total", row_limit=30)
    text = f"A step takes {1e3 * wall:.2f} ms; kernels run for {1e3 * busy:.2f} ms of it.\n\n```\n{table}\n```"
    return text, {"wall": wall, "busy": busy}


@torch.no_grad()
def products(kit: Kit) -> tuple[str, Any]:
    """Queries, keys and values as three products and as one, with the weights side by side in memory."""
    dtype, width = (torch.float32, 32) if kit.is_dry else (torch.bfloat16, 384)
    rows = []
    for batch_size in (1, 2) if kit.is_dry else (1, 8, 64, 256, 1024):
        tokens = torch.randn(batch_size, 197, width, device=kit.device, dtype=dtype)
        parts = [nn.Linear(width, width).to(kit.device, dtype) for _ in range(3)]
        whole = nn.Linear(width, 3 * width).to(kit.device, dtype)
        names = {"tokens": tokens, "parts": parts, "whole": whole}
        seconds = [
            Timer(code, globals=names).blocked_autorange(min_run_time=0.01 if kit.is_dry else 0.5).median
            for code in ("[part(tokens) for part in parts]", "whole(tokens).chunk(3, dim=-1)")
        ]
        rows.append([batch_size, *(1e6 * one for one in seconds), seconds[0] / seconds[1]])
    return markdown(["batch", "three products, us", "one, us", "times as fast"], rows), rows


@torch.no_grad()
def once(kit: Kit) -> None:
    """One forward pass between the calls that switch ncu on and off."""
    model, images = build(kit)
    with short_cuts_counted():
        for _ in range(3):
            model(images)
        if kit.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        model(images)
        if kit.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what a command line asks for."""
    kit = Kit("shares", __doc__, argv, {"--once": {"action": "store_true", "help": "one forward pass, for ncu"}})
    if kit.arguments.once:
        once(kit)
        return 0
    kit.measure("DeiT-S, keep rate 0.7, batch 256", lambda: shares(kit))
    kit.measure("DeiT-S, keep rate 0.7, training step, batch 256", lambda: training(kit))
    kit.measure("queries, keys and values of DeiT-S", lambda: products(kit))
    return kit.finish()


if __name__ == "__main__":
    sys.exit(main())
