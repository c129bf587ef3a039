"""How fast is it really: `evit benchmark`, dense ViTs and EViT on any backend, in one process, checked before timed.

evit benchmark evit-deit-s --batch-sizes 1 8 --threads 1
evit benchmark evit-deit-s --training --batch-sizes 16
evit benchmark evit-deit-ti --schedule --keep-rates 0.7
evit benchmark FOLDER --tune 0.6 --dataset DATA
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import setting


if TYPE_CHECKING:
    import torch

    from ..measuring.timing import Variant


# Relative error (norm over norm) that rounding explains; low precision also keeps other tokens where scores are close.
TOLERANCES = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.25}
PACKAGES = ("torch", "transformers", "timm", "onnxruntime", "openvino", "evit-hf")


@dataclass
class BenchmarkArguments:
    """What to measure, how, and where to write it."""

    keep_rates: list[float] = setting([1.0, 0.7, 0.5], "Keep rates of the EViT variants, in (0, 1].")
    batch_sizes: list[int] = setting([1, 8], "Images of a batch.")
    image_sizes: list[int] | None = setting(None, "Pixels; by default those of the model.")
    backends: list[str] = setting(
        ["sdpa"],
        "sdpa, sdpa-mkl (without oneDNN's linear layers), eager, compile-layers, compile, compile-freezing, "
        "compile-reduce-overhead, compile-max-autotune, torch-export, aoti, onnx, onnx-int8, openvino.",
    )
    baselines: list[str] = setting(
        ["timm", "timm-unfused", "transformers", "transformers-eager"],
        "Dense ViTs with the same weights in eager code; `none` for none, then keep rate 1.0 comes first.",
    )
    dtypes: list[str] = setting(["float32"], "float32, float16, bfloat16.")
    device: str | None = setting(None, "cpu, cuda, mps ...; by default the best there is.")
    threads: list[int] | None = setting(None, "Numbers of CPU threads; by default PyTorch's.")
    rounds: int = setting(11, "Measured rounds, after two that warm up; each times every variant once.")
    clock: str = setting(
        "wall", "wall, or cpu: this process's time on all threads, which other work on the machine does not add to."
    )
    training: bool = setting(False, "Time forward, backward and AdamW step instead of inference.")
    schedule: bool = setting(
        False, "Train through a schedule of keep rates instead, with each way to compile: graphs, waiting, speed."
    )
    no_fuse: bool = setting(False, "Drop inattentive tokens instead of fusing them.")
    tune: str | None = setting(
        None,
        "Find layers and keep rates for a target instead: 0.6 (share of the dense operations), 2.5gmacs or 40ms.",
    )
    tune_images: int = setting(256, "Calibration images for --tune, from the evaluation split.")
    save: str | None = setting(None, "With --tune: folder for the model with the settings that were found.")
    output_dir: str | None = setting(None, "Folder for benchmark.json and benchmark.png, or tune.json.")


def benchmark(name: str, arguments: BenchmarkArguments, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Measure all settings, print a table for each, write JSON and a plot.

    Args:
        name: preset, folder or Hub id.
        arguments: see `BenchmarkArguments`.
        argv: the command line, for the report.

    Returns: the report, as in benchmark.json.

    Raises:
        ValueError: for settings that cannot work.
        MeasurementError: for a variant that answers wrongly or impossibly fast.
    """
    import torch

    from evit_hf.configuration_evit import check_keep_rate

    from .machine import best_device, machine

    for rate in arguments.keep_rates:
        check_keep_rate(rate, 1)
    for dtype in arguments.dtypes:
        if dtype not in TOLERANCES:
            raise ValueError(f"`--dtypes` knows {', '.join(TOLERANCES)}, got {dtype!r}.")
    device = torch.device(arguments.device) if arguments.device else best_device()
    report: dict[str, Any] = {
        "command": f"evit benchmark {' '.join(argv)}",
        **machine(device, PACKAGES),
        "settings": [],
    }
    threads_before = torch.get_num_threads()
    try:
        for num_threads in arguments.threads or [threads_before]:
            torch.set_num_threads(num_threads)
            for dtype in arguments.dtypes:
                for image_size in arguments.image_sizes or [None]:
                    for batch_size in arguments.batch_sizes:
                        result = measure(name, arguments, device, dtype, image_size, batch_size)
                        report["settings"].append(result)
                        sys.stdout.write(table(result) + "\n\n")
                        sys.stdout.flush()
    finally:
        torch.set_num_threads(threads_before)
    if arguments.output_dir:
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "benchmark.json").write_text(json.dumps(report, indent=2) + "\n")
        draw(report, folder / "benchmark.png")
        sys.stdout.write(f"Saved {folder / 'benchmark.json'} and {folder / 'benchmark.png'}.\n")
    return report


def measure(
    name: str, arguments: BenchmarkArguments, device: "torch.device", dtype: str, image_size: int | None, batch: int
) -> dict[str, Any]:
    """Build, check and time all variants of one setting."""
    import torch

    from . import timing
    from . import variants as variants_of

    torch.manual_seed(0)
    model = variants_of.build_model(name, image_size)
    model.config.fuse_inattentive_tokens = not arguments.no_fuse and model.config.fuse_inattentive_tokens
    model.to(device, getattr(torch, dtype))
    size = model.config.image_size
    images = torch.randn(batch, model.config.num_channels, size, size).to(device, getattr(torch, dtype))
    baselines = [] if arguments.baselines == ["none"] else arguments.baselines
    peak = timing.matmul_peak(device, getattr(torch, dtype), arguments.clock)
    passes = 3 if arguments.training else 1
    with tempfile.TemporaryDirectory() as folder:
        if arguments.training:
            labels = torch.randint(model.config.num_labels, (batch,), device=device)
            variants = variants_of.training_variants(
                model, images, labels, arguments.keep_rates, arguments.backends, baselines
            )
            check_losses(variants, TOLERANCES[dtype])
        else:
            variants = variants_of.inference_variants(
                model,
                images,
                arguments.keep_rates,
                arguments.backends,
                baselines,
                Path(folder),
                torch.get_num_threads(),
            )
            reference = variants_of.reference_logits(model, images)
            timing.check_answers(variants, reference, TOLERANCES[dtype])
            del reference
        seconds = timing.alternate(variants, device, arguments.rounds, clock_name=arguments.clock)
        memory = [timing.peak_memory_mib(variant.run, device) for variant in variants]
        saved = [
            timing.saved_activations_mib(variant.extra["model"], variant.extra["forward"])
            if arguments.training and "compile" not in variant.name  # its tensors belong to the compiled code
            else None
            for variant in variants
        ]
    rows = summarize(variants, seconds, batch, baselines)
    for row, variant, mib, saved_mib in zip(rows, variants, memory, saved, strict=True):
        row["gflops_per_second"] = timing.check_rate(variant, batch, row["seconds"], peak, passes)
        row["peak_memory_mib"], row["saved_activations_mib"] = mib, saved_mib
        row["relative_error"] = variant.extra.get("relative_error")
    return {
        "model": name,
        "what": "training step" if arguments.training else "inference",
        "batch_size": batch,
        "image_size": size,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        "rounds": arguments.rounds,
        "fuse": model.config.fuse_inattentive_tokens,
        "device": str(device),
        "matmul_peak_gflops": peak,
        "rows": rows,
    }


def check_losses(variants: "Sequence[Variant]", tolerance: float) -> None:
    """Make sure that variants of one keep rate have one loss before they are timed.

    Raises: MeasurementError.
    """
    from ..measuring.timing import MeasurementError

    losses: dict[str, tuple[str, float]] = {}
    for variant in variants:
        loss = variant.extra["forward"]().item()
        first, expected = losses.setdefault(str(variant.keep_rate), (variant.name, loss))
        variant.extra["relative_error"] = abs(loss - expected) / max(abs(expected), 1e-9)
        if not variant.extra["relative_error"] <= tolerance:
            raise MeasurementError(f"`{variant.name}` has a loss of {loss:.5f}, `{first}` has {expected:.5f}.")


def summarize(
    variants: "Sequence[Variant]", seconds: list[list[float]], batch_size: int, baselines: Sequence[str]
) -> list[dict[str, Any]]:
    """Medians, and ratios of the same round, to the fastest dense baseline and to the same code at keep rate 1.0."""
    from ..measuring.timing import quartiles

    num_dense = len(baselines) or 1
    fastest = min(range(num_dense), key=lambda i: statistics.median(seconds[i]))
    # A dense baseline runs all of its operations.
    baseline_macs = variants[fastest].nominal_macs
    own_dense = {v.name.split(" ")[-1]: i for i, v in enumerate(variants) if v.keep_rate == 1.0 and "EViT" in v.name}
    rows = []
    for i, (variant, times) in enumerate(zip(variants, seconds, strict=True)):
        low, speed_up, high = quartiles([a / b for a, b in zip(seconds[fastest], times, strict=True)])
        row = {
            "name": variant.name,
            "keep_rate": variant.keep_rate,
            "is_baseline": i == fastest,
            "seconds": statistics.median(times),
            "images_per_second": batch_size / statistics.median(times),
            "speed_up": speed_up,
            "speed_up_quartiles": [low, high],
            "gmacs": variant.nominal_macs / 1e9,
            "executed_gmacs": variant.executed_macs / 1e9,
            "efficiency": speed_up * variant.nominal_macs / baseline_macs,
        }
        dense = own_dense.get(variant.name.split(" ")[-1]) if "EViT" in variant.name else None
        if dense is not None and dense != i:
            like = statistics.median(a / b for a, b in zip(seconds[dense], times, strict=True))
            row["like_for_like"] = like
            row["like_for_like_efficiency"] = like * variant.executed_macs / variants[dense].executed_macs
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """One setting as a Markdown table."""
    rows = result["rows"]
    baseline = next(row["name"] for row in rows if row["is_baseline"])
    has_saved = any(row["saved_activations_mib"] is not None for row in rows)
    lines = [
        f"{result['model']}, {result['what']}, {result['image_size']} px, batch {result['batch_size']}, "
        f"{result['dtype']}, {result['device']}, {result['threads']} threads, {result['clock']} clock, "
        f"{result['rounds']} rounds, tokens {'fused' if result['fuse'] else 'dropped'}; matrix products reach "
        f"{result['matmul_peak_gflops']:.0f} GFLOP/s",
        "",
        f"| variant | ms/batch | images/s | × {baseline} (quartiles) | GMACs nominal / executed | efficiency | "
        f"× own dense / efficiency | GFLOP/s | MiB{' | saved MiB' if has_saved else ''} |",
        f"|---|---|---|---|---|---|---|---|---|{'---|' if has_saved else ''}",
    ]
    for row in rows:
        low, high = row["speed_up_quartiles"]
        like = f"{row['like_for_like']:.2f} / {row['like_for_like_efficiency']:.2f}" if "like_for_like" in row else "–"
        memory, saved = (
            "–" if row[name] is None else f"{row[name]:.0f}" for name in ("peak_memory_mib", "saved_activations_mib")
        )
        lines.append(
            f"| {row['name']} | {1000 * row['seconds']:.1f} | {row['images_per_second']:.1f} | "
            f"{row['speed_up']:.3f} ({low:.2f}–{high:.2f}) | {row['gmacs']:.3f} / {row['executed_gmacs']:.3f} | "
            f"{row['efficiency']:.2f} | {like} | {row['gflops_per_second']:.0f} | {memory}"
            f"{f' | {saved}' if has_saved else ''} |"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw speed-up against saved operations, one panel for each setting; the diagonal is an efficiency of 1."""
    from matplotlib.figure import Figure

    settings = report["settings"]
    figure = Figure(figsize=(5 * len(settings), 4.5), layout="constrained")
    for number, result in enumerate(settings):
        axes = figure.add_subplot(1, len(settings), number + 1)
        dense = max(row["gmacs"] for row in result["rows"])
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in result["rows"]:
            kind = row["name"].split(" ")[-1] if "EViT" in row["name"] else row["name"]
            lines.setdefault(kind, []).append((dense / row["gmacs"], row["speed_up"]))
        for kind, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=kind)
        end = max(x for points in lines.values() for x, _ in points)
        axes.plot([1, end], [1, end], color="gray", linestyle=":", label="efficiency 1")
        axes.set(xlabel="dense GMACs / GMACs", ylabel="speed-up over the fastest dense baseline")
        axes.set_title(f"batch {result['batch_size']}, {result['image_size']} px, {result['dtype']}")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{settings[0]['model']}, {settings[0]['what']}, {report['device']}")
    figure.savefig(path, dpi=130)
