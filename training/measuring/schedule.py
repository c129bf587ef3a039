"""What torch.compile costs and gives while a schedule moves the keep rate: `evit benchmark MODEL --schedule`."""

import json
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from evit_hf.towers import example_inputs

from ..learning.models import compile_layers
from ..screen import say, show_result
from ..settings import make_output_dir
from .arguments import BenchmarkArguments
from .machine import PACKAGES, best_device, machine
from .timing import synchronize
from .variants import build_model, check_classifier


# Way to compile, and in how many steps the keep rate falls.
STRATEGIES: dict[str, tuple[Callable[[PreTrainedModel], Any], int]] = {
    "eager, exact schedule": (lambda model: None, 16),
    "layers, any number of tokens, exact schedule": (compile_layers, 16),
    "whole model, 2 levels": (lambda model: model.compile(), 2),
    "whole model, one graph a rate, 2 levels": (lambda model: model.compile(dynamic=False), 2),
}


@dataclass(frozen=True)
class ScheduleRow:
    """What one way to compile costs and gives.

    Args:
        strategy: its name.
        num_keep_rates: keep rates of the schedule.
        graphs: compiled in the first pass.
        graphs_in_steady_state: compiled in the passes after it.
        seconds_waited: by which the first pass was longer than the second; 0 where nothing was compiled.
        steady_ms: median of a step after the first pass.
    """

    strategy: str
    num_keep_rates: int
    graphs: int
    graphs_in_steady_state: int
    seconds_waited: float
    steady_ms: float


def summarize(strategy: str, passes: Sequence[Sequence[float]], graphs: Sequence[int]) -> ScheduleRow:
    """Sum up a strategy.

    Args:
        strategy: its name.
        passes: seconds of each step of each pass.
        graphs: number of compiled graphs after each pass.
    """
    return ScheduleRow(
        strategy=strategy,
        num_keep_rates=len(passes[0]),
        graphs=graphs[0],
        graphs_in_steady_state=graphs[-1] - graphs[0],
        seconds_waited=sum(passes[0]) - sum(passes[1]) if graphs[0] else 0.0,
        steady_ms=1000 * statistics.median(second for one in passes[1:] for second in one),
    )


def benchmark_schedule(name: str, arguments: BenchmarkArguments, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Train through the schedule once, which compiles, then twice more, which is the steady state.

    Args:
        name: preset, folder or Hub id.
        arguments: the lowest of `keep_rates` is the target; `batch_sizes[0]`, `device`, `threads[0]`, `dtypes[0]`,
            `inattentive_tokens`, `output_dir`.
        argv: the command line, for the report.

    Returns: the report, with a `ScheduleRow` as a dictionary for each strategy.
    """
    make_output_dir(arguments.output_dir)
    device = best_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads[0])
    torch._inductor.config.force_disable_caches = True  # what an earlier run compiled would seem to cost nothing
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    target = min(arguments.keep_rates)
    rows = []
    for title, (prepare, levels) in STRATEGIES.items():
        rates = [1.0 - (1.0 - target) * i / levels for i in range(levels + 1)]
        rows.append(summarize(title, *timed_passes(name, arguments, device, prepare, rates)))
        say(f"  {title}: {rows[-1].graphs} graphs, {rows[-1].seconds_waited:.0f} s")
    report = {
        "command": shlex.join(["evit", "benchmark", *argv]),
        **machine(device, PACKAGES),
        "model": name,
        "target": target,
        "batch_size": arguments.batch_sizes[0],
        "threads": torch.get_num_threads(),
        "rows": [asdict(row) for row in rows],
    }
    show_result(schedule_table(report, rows), report)
    if arguments.output_dir:
        folder = Path(arguments.output_dir)
        (folder / "schedule.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def timed_passes(
    name: str,
    arguments: BenchmarkArguments,
    device: torch.device,
    prepare: Callable[[PreTrainedModel], Any],
    rates: Sequence[float],
) -> tuple[list[list[float]], list[int]]:
    """Train three times through a schedule.

    Returns: seconds of each step of each pass, and the number of compiled graphs after each pass.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = build_model(name, inattentive_tokens=arguments.inattentive_tokens)
    check_classifier(model, "--schedule")
    model = model.to(device, getattr(torch, arguments.dtypes[0])).train()
    prepare(model)
    images = torch.randn_like(example_inputs(model, batch_size=arguments.batch_sizes[0]))
    labels = torch.randint(model.config.num_labels, (len(images),), device=device)
    passes: list[list[float]] = []
    graphs = []
    for _ in range(3):
        seconds = []
        for rate in rates:
            synchronize(device)
            start = time.perf_counter()
            model(images, labels=labels, keep_rate=rate).loss.backward()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        passes.append(seconds)
        graphs.append(counters["stats"].get("unique_graphs", 0))
    return passes, graphs


def schedule_table(report: dict[str, Any], rows: Sequence[ScheduleRow]) -> str:
    """The report as a Markdown table."""
    lines = [
        f"{report['model']}, forward and backward of {report['batch_size']} images, keep rate 1.0 to "
        f"{report['target']}, {report['device']}",
        "",
        "| compiled | keep rates | graphs | compiled again in the steady state | waited, s | steady step, ms |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.strategy} | {row.num_keep_rates} | {row.graphs} | {row.graphs_in_steady_state} | "
        f"{row.seconds_waited:.0f} | {row.steady_ms:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)
