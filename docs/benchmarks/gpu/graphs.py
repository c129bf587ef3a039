"""Small batches without the cost of launching kernels: CUDA graphs of eager code, and `torch.compile` in three modes.

The question: is EViT ever slower than dense at batch 1? So the dense models run in CUDA graphs too, and the fastest of
all dense variants is what the others are compared with.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from inference import benchmarked, sized
from kit import Kit

from evit_hf.towers import example_inputs
from evit_training.measuring import timing
from evit_training.measuring.benchmark import TOLERANCES, Comparison, summarize, table
from evit_training.measuring.variants import build_model, inference_variants, reference_logits


BASELINES = ["timm", "transformers"]


def in_cuda_graph(run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """The same work as one launch; on a CPU it is the work itself."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return answer

    return replay


def graphed(kit: Kit, name: str, batch_size: int, keep_rates: Sequence[float] = (1.0, 0.7, 0.5)) -> tuple[str, Any]:
    """Eager code, and the same in CUDA graphs."""
    dtype, rounds = ("float32", 2) if kit.is_dry else ("bfloat16", 51)
    torch.manual_seed(0)
    model = build_model(name).to(kit.device, getattr(torch, dtype))
    images = torch.randn_like(example_inputs(model, None, batch_size))
    with tempfile.TemporaryDirectory() as folder:
        eager = inference_variants(model, images, keep_rates, ["sdpa"], BASELINES, Path(folder))
    graphs = [
        dataclasses.replace(one, name=f"{one.name} cuda-graph", run=in_cuda_graph(one.run, kit.device))
        for one in eager
    ]
    # Baselines first.
    variants = sorted([*eager, *graphs], key=lambda one: not one.name.startswith("dense"))
    timing.check_answers(variants, reference_logits(model, images), TOLERANCES[dtype])
    seconds = timing.alternate(variants, kit.device, rounds)
    comparison = Comparison(
        model=name,
        what="inference",
        batch_size=batch_size,
        image_size=images.shape[-1],
        dtype=dtype,
        threads=torch.get_num_threads(),
        clock="wall",
        rounds=rounds,
        inattentive_tokens="fused",
        device=str(kit.device),
        matmul_peak_gflops=timing.matmul_peak(kit.device, getattr(torch, dtype)),
        rows=summarize(variants, seconds, batch_size, 2 * BASELINES),
    )
    return table(comparison), comparison.as_json()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what a command line asks for."""
    kit = Kit("graphs", __doc__, argv, {"--skip-graphs": {"action": "store_true", "help": "only `torch.compile`"}})
    with tempfile.TemporaryDirectory() as temporary:
        name = sized("evit-deit-s", Path(temporary), kit.is_dry)
        for batch_size in () if kit.arguments.skip_graphs else (1,) if kit.is_dry else (1, 8, 64):
            kit.measure(f"CUDA graphs, batch {batch_size}", lambda size=batch_size: graphed(kit, name, size))
        if kit.is_dry:  # compiling for the CPU is tested elsewhere
            return kit.finish()
        for batch_size, mode in ((1, "reduce-overhead"), (256, "default"), (256, "max-autotune"), (1, "max-autotune")):
            backend = "compile" if mode == "default" else f"compile-{mode}"
            kit.measure(
                f"torch.compile, {mode}, batch {batch_size}",
                lambda size=batch_size, backend=backend: benchmarked(
                    kit, name, size, backends=[backend], keep_rates=[1.0, 0.7, 0.5]
                ),
                seconds=240 if mode == "max-autotune" else 120,
            )
    return kit.finish()


if __name__ == "__main__":
    sys.exit(main())
