"""Benchmarks: dense ViTs and EViT on any backend, timed in turns in one process, and checked before that."""

import json
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..screen import say, show_result
from ..settings import kept_of, make_output_dir
from .arguments import BenchmarkArguments


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .timing import Variant


# Relative error (norm over norm) that rounding explains; low precision also keeps other tokens where scores are close.
TOLERANCES = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.25}


@dataclass(frozen=True)
class Row:
    """What was measured of one variant.

    Args:
        name: of the variant.
        keep_rate: its keep rate, or share of operations as a word.
        is_baseline: whether it is the fastest dense baseline.
        seconds: median for a batch.
        images_per_second: from that.
        speed_up: over the fastest dense baseline, median of the ratios within a round.
        speed_up_quartiles: lower and upper quartile of these ratios.
        gmacs: operations of an image by the paper's count, in GMACs.
        executed_gmacs: those that are actually run.
        efficiency: speed-up over saved operations; 1 where time follows operations.
        like_for_like: speed-up over the same code at keep rate 1.0; None for that itself, and where it was not timed.
        like_for_like_efficiency: the same by executed operations.
        gflops_per_second: rate.
        peak_memory_mib: memory that a run needs at its peak.
        saved_activations_mib: memory of what a forward keeps for backward; None for inference and compiled code.
        relative_error: of the answer or the loss.
    """

    name: str
    keep_rate: float | str
    is_baseline: bool
    seconds: float
    images_per_second: float
    speed_up: float
    speed_up_quartiles: tuple[float, float]
    gmacs: float
    executed_gmacs: float
    efficiency: float
    like_for_like: float | None = None
    like_for_like_efficiency: float | None = None
    gflops_per_second: float = float("nan")
    peak_memory_mib: float | None = None
    saved_activations_mib: float | None = None
    relative_error: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The row for benchmark.json; a comparison that was not made has no entry."""
        optional = ("like_for_like", "like_for_like_efficiency")
        return {name: value for name, value in asdict(self).items() if name not in optional or value is not None}


@dataclass(frozen=True)
class Comparison:
    """All variants of one setting, measured."""

    model: str
    what: str
    batch_size: int
    image_size: int
    dtype: str
    threads: int
    clock: str
    rounds: int
    inattentive_tokens: str
    device: str
    matmul_peak_gflops: float
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """The comparison for benchmark.json."""
        return {**vars(self), "rows": [row.as_json() for row in self.rows]}


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
    for dtype in arguments.dtypes:
        if dtype not in TOLERANCES:
            raise ValueError(f"`--dtypes` knows {', '.join(TOLERANCES)}, got {dtype!r}.")
    make_output_dir(arguments.output_dir)
    import torch

    from .machine import PACKAGES, best_device, machine

    device = best_device(arguments.device)
    comparisons = []
    threads_before = torch.get_num_threads()
    try:
        for num_threads in arguments.threads or [threads_before]:
            torch.set_num_threads(num_threads)
            for dtype in arguments.dtypes:
                for image_size in arguments.image_sizes or [None]:
                    for batch_size in arguments.batch_sizes:
                        comparisons.append(measure(name, arguments, device, dtype, image_size, batch_size))
                        say(f"{table(comparisons[-1])}\n", is_result=True)
    finally:
        torch.set_num_threads(threads_before)
    report = {
        "command": shlex.join(["evit", "benchmark", *argv]),
        **machine(device, PACKAGES),
        "settings": [comparison.as_json() for comparison in comparisons],
    }
    show_result(None, report)
    if arguments.output_dir:
        folder = Path(arguments.output_dir)
        (folder / "benchmark.json").write_text(json.dumps(report, indent=2) + "\n")
        draw(comparisons, report["device"], folder / "benchmark.png")
        say(f"Saved {folder / 'benchmark.json'} and {folder / 'benchmark.png'}.")
    return report


def measure(
    name: str, arguments: BenchmarkArguments, device: "torch.device", dtype: str, image_size: int | None, batch: int
) -> Comparison:
    """Build, check and time all variants of one setting."""
    import torch

    from evit_hf.towers import example_inputs, tower_of

    from . import timing
    from .variants import build_model, default_baselines

    torch.manual_seed(0)
    model = build_model(name, image_size, arguments.inattentive_tokens, arguments.macs and arguments.macs[0])
    shape = example_inputs(model, image_size, batch).shape
    model.to(device, getattr(torch, dtype))
    images = torch.randn(shape).to(device, getattr(torch, dtype))
    baselines = default_baselines(model) if arguments.baselines is None else arguments.baselines
    baselines = [] if baselines == ["none"] else baselines
    peak = timing.matmul_peak(device, getattr(torch, dtype), arguments.clock)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.training:
            variants = checked_training_steps(model, images, arguments, baselines, TOLERANCES[dtype])
        else:
            variants = checked_inference(model, images, arguments, baselines, TOLERANCES[dtype], Path(folder))
        seconds = timing.alternate(variants, device, arguments.rounds, clock_name=arguments.clock)
        memory = [timing.peak_memory_mib(variant.run, device) for variant in variants]
        saved = [
            timing.saved_activations_mib(variant.model, variant.forward)
            if variant.model is not None and "compile" not in variant.name  # its tensors belong to the compiled code
            else None
            for variant in variants
        ]
    rows = [
        replace(
            row,
            gflops_per_second=timing.check_rate(variant, batch, row.seconds, peak, 3 if arguments.training else 1),
            peak_memory_mib=mib,
            saved_activations_mib=saved_mib,
        )
        for row, variant, mib, saved_mib in zip(
            summarize(variants, seconds, batch, baselines), variants, memory, saved, strict=True
        )
    ]
    return Comparison(
        model=name,
        what="training step" if arguments.training else "inference",
        batch_size=batch,
        image_size=shape[-1],
        dtype=dtype,
        threads=torch.get_num_threads(),
        clock=arguments.clock,
        rounds=arguments.rounds,
        inattentive_tokens=tower_of(model).config.inattentive_tokens,
        device=str(device),
        matmul_peak_gflops=peak,
        rows=rows,
    )


def checked_inference(
    model: "PreTrainedModel",
    images: "torch.Tensor",
    arguments: BenchmarkArguments,
    baselines: Sequence[str],
    tolerance: float,
    folder: Path,
) -> "list[Variant]":
    """Build the forwards to be timed; each gives the logits of the plainest implementation.

    Raises: MeasurementError.
    """
    import torch

    from .timing import check_answers
    from .variants import inference_variants, reference_logits

    variants = inference_variants(
        model, images, kept_of(arguments), arguments.backends, baselines, folder, torch.get_num_threads()
    )
    check_answers(variants, reference_logits(model, images), tolerance)
    return variants


def checked_training_steps(
    model: "PreTrainedModel",
    images: "torch.Tensor",
    arguments: BenchmarkArguments,
    baselines: Sequence[str],
    tolerance: float,
) -> "list[Variant]":
    """Build the training steps to be timed; those of one keep rate have one loss.

    Raises: MeasurementError.
    """
    import torch

    from .timing import MeasurementError
    from .variants import check_classifier, training_variants

    check_classifier(model, "--training")
    labels = torch.randint(model.config.num_labels, (len(images),), device=images.device)
    variants = training_variants(model, images, labels, kept_of(arguments), arguments.backends, baselines)
    losses: dict[str, tuple[str, float]] = {}
    for variant in variants:
        loss = variant.forward().item()
        first, expected = losses.setdefault(str(variant.keep_rate), (variant.name, loss))
        variant.relative_error = abs(loss - expected) / max(abs(expected), 1e-9)
        if not variant.relative_error <= tolerance:
            raise MeasurementError(f"`{variant.name}` has a loss of {loss:.5f}, `{first}` has {expected:.5f}.")
    return variants


def summarize(
    variants: "Sequence[Variant]", seconds: list[list[float]], batch_size: int, baselines: Sequence[str]
) -> list[Row]:
    """Medians, and ratios of the same round, to the fastest dense baseline and to the same code at keep rate 1.0."""
    from .timing import quartiles

    num_dense = len(baselines) or 1
    fastest = min(range(num_dense), key=lambda i: statistics.median(seconds[i]))
    # A dense baseline runs all of its operations.
    baseline_macs = variants[fastest].nominal_macs
    own = [not variant.name.startswith("dense") for variant in variants]
    own_dense = {v.name.split(" ")[-1]: i for i, v in enumerate(variants) if own[i] and v.keep_rate == 1.0}
    rows = []
    for i, (variant, times) in enumerate(zip(variants, seconds, strict=True)):
        low, speed_up, high = quartiles([a / b for a, b in zip(seconds[fastest], times, strict=True)])
        dense = own_dense.get(variant.name.split(" ")[-1]) if own[i] else None
        like = like_efficiency = None
        if dense is not None and dense != i:
            like = statistics.median(a / b for a, b in zip(seconds[dense], times, strict=True))
            like_efficiency = like * variant.executed_macs / variants[dense].executed_macs
        rows.append(
            Row(
                name=variant.name,
                keep_rate=variant.keep_rate if isinstance(variant.keep_rate, float) else str(variant.keep_rate),
                is_baseline=i == fastest,
                seconds=statistics.median(times),
                images_per_second=batch_size / statistics.median(times),
                speed_up=speed_up,
                speed_up_quartiles=(low, high),
                gmacs=variant.nominal_macs / 1e9,
                executed_gmacs=variant.executed_macs / 1e9,
                efficiency=speed_up * variant.nominal_macs / baseline_macs,
                like_for_like=like,
                like_for_like_efficiency=like_efficiency,
                relative_error=variant.relative_error,
            )
        )
    return rows


def table(result: Comparison) -> str:
    """One setting as a Markdown table."""
    baseline = next(row.name for row in result.rows if row.is_baseline)
    has_saved = any(row.saved_activations_mib is not None for row in result.rows)
    lines = [
        f"{result.model}, {result.what}, {result.image_size} px, batch {result.batch_size}, "
        f"{result.dtype}, {result.device}, {result.threads} threads, {result.clock} clock, "
        f"{result.rounds} rounds, tokens {result.inattentive_tokens}; matrix products reach "
        f"{result.matmul_peak_gflops:.0f} GFLOP/s",
        "",
        f"| variant | ms/batch | images/s | × {baseline} (quartiles) | GMACs nominal / executed | efficiency | "
        f"× own dense / efficiency | GFLOP/s | MiB{' | saved MiB' if has_saved else ''} |",
        f"|---|---|---|---|---|---|---|---|---|{'---|' if has_saved else ''}",
    ]
    for row in result.rows:
        low, high = row.speed_up_quartiles
        like = "–" if row.like_for_like is None else f"{row.like_for_like:.2f} / {row.like_for_like_efficiency:.2f}"
        memory, saved = ("–" if x is None else f"{x:.0f}" for x in (row.peak_memory_mib, row.saved_activations_mib))
        lines.append(
            f"| {row.name} | {1000 * row.seconds:.2f} | {row.images_per_second:.1f} | "
            f"{row.speed_up:.3f} ({low:.2f}–{high:.2f}) | {row.gmacs:.3f} / {row.executed_gmacs:.3f} | "
            f"{row.efficiency:.2f} | {like} | {row.gflops_per_second:.0f} | {memory}"
            f"{f' | {saved}' if has_saved else ''} |"
        )
    return "\n".join(lines)


def draw(comparisons: Sequence[Comparison], device: str, path: Path) -> None:
    """Draw speed-up against saved operations, one panel for each setting; the diagonal is an efficiency of 1.

    Keep rates are on the points, bars are the quartiles over rounds, and the legend has the names of the table.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(comparisons), 5), layout="constrained")
    for number, result in enumerate(comparisons):
        axes = figure.add_subplot(1, len(comparisons), number + 1)
        dense = max(row.gmacs for row in result.rows)
        baseline = next(row.name for row in result.rows if row.is_baseline)
        lines: dict[str, list[Row]] = {}
        for row in result.rows:
            first, *others = row.name.split(" ")
            kind = row.name if first == "dense" else " ".join((first, *others[1:]))  # without the keep rate
            lines.setdefault(kind, []).append(row)
        for kind, rows in lines.items():
            rows.sort(key=lambda row: -row.gmacs)
            savings, speed_ups = [dense / row.gmacs for row in rows], [row.speed_up for row in rows]
            quartiles = [
                [max(row.speed_up - row.speed_up_quartiles[0], 0) for row in rows],
                [max(row.speed_up_quartiles[1] - row.speed_up, 0) for row in rows],
            ]
            marker = "s" if kind.startswith("dense") else "o"
            axes.errorbar(savings, speed_ups, quartiles, marker=marker, capsize=3, label=kind)
            for row, x, y in zip(rows, savings, speed_ups, strict=True):
                if marker == "o":
                    place = {"textcoords": "offset points", "xytext": (-8, 4), "ha": "right", "fontsize": 11}
                    axes.annotate(
                        row.keep_rate if isinstance(row.keep_rate, str) else f"{row.keep_rate:g}", (x, y), **place
                    )
        end = max(dense / row.gmacs for row in result.rows)
        axes.plot([1, end], [1, end], color="gray", linestyle=":", label="as fast as operations fall")
        axes.margins(0.1)
        axes.set_xlabel("times fewer operations than dense", fontsize=12)
        axes.set_ylabel(f"times as fast as {baseline}", fontsize=12)
        threads = f", {result.threads} thread{'s' * (result.threads > 1)}" if result.device == "cpu" else ""
        title = f"batch {result.batch_size}, {result.image_size} px, {result.dtype}{threads}"
        axes.set_title(title, fontsize=12)
        axes.tick_params(labelsize=11)
        axes.legend(fontsize=10)
        axes.grid(alpha=0.3)
    shown = comparisons[0]
    figure.suptitle(f"{shown.model}, {shown.what}, labels: keep rate or macs\n{device}", fontsize=13)
    figure.savefig(path, dpi=130)
