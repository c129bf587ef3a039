"""What torch.compile costs and gives while a schedule moves the keep rate: `evit benchmark MODEL --schedule`."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evit_hf import EViTPreTrainedModel

from ..learning.models import compile_layers
from .timing import synchronize
from .variants import build_model


if TYPE_CHECKING:
    from .benchmark import BenchmarkArguments


# Way to compile, and in how many steps the keep rate falls.
STRATEGIES: dict[str, tuple[Callable[[EViTPreTrainedModel], Any], int]] = {
    "eager, exact schedule": (lambda model: None, 16),
    "layers, any number of tokens, exact schedule": (compile_layers, 16),
    "whole model, 2 levels": (lambda model: model.compile(), 2),
    "whole model, one graph a rate, 2 levels": (lambda model: model.compile(dynamic=False), 2),
}


def benchmark_schedule(name: str, arguments: "BenchmarkArguments", argv: Sequence[str] = ()) -> dict[str, Any]:
    """Train through the schedule once, which compiles, then twice more, which is the steady state.

    Args:
        name: preset, folder or Hub id.
        arguments: `keep_rates[0]` is the target, `batch_sizes[0]`, `device`, `threads[0]`, `dtypes[0]`, `output_dir`.
        argv: the command line, for the report.

    Returns: the report; for each strategy the number of keep rates, graphs and graphs compiled again in the steady
        state, seconds that the first pass took longer than a steady one, and milliseconds of a steady step.
    """
    from torch._dynamo.utils import counters

    from .benchmark import PACKAGES
    from .machine import best_device, machine

    device = torch.device(arguments.device) if arguments.device else best_device()
    if arguments.threads:
        torch.set_num_threads(arguments.threads[0])
    torch._inductor.config.force_disable_caches = True  # what an earlier run compiled would seem to cost nothing
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    target, batch_size = min(arguments.keep_rates), arguments.batch_sizes[0]
    rows = []
    for title, (prepare, levels) in STRATEGIES.items():
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = build_model(name).to(device, getattr(torch, arguments.dtypes[0])).train()
        prepare(model)
        size, config = model.config.image_size, model.config
        images = torch.randn(batch_size, config.num_channels, size, size, device=device, dtype=model.dtype)
        labels = torch.randint(config.num_labels, (batch_size,), device=device)
        rates = [1.0 - (1.0 - target) * i / levels for i in range(levels + 1)]
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
        steady = [second for one in passes[1:] for second in one]
        rows.append(
            {
                "strategy": title,
                "num_keep_rates": len(rates),
                "graphs": graphs[0],
                "graphs_in_steady_state": graphs[2] - graphs[0],
                "seconds_waited": sum(passes[0]) - sum(passes[1]),
                "steady_ms": 1000 * statistics.median(steady),
            }
        )
        sys.stdout.write(f"  {title}: {rows[-1]['graphs']} graphs, {rows[-1]['seconds_waited']:.0f} s\n")
        sys.stdout.flush()
    report = {
        "command": f"evit benchmark {' '.join(argv)}",
        **machine(device, PACKAGES),
        "model": name,
        "target": target,
    }
    report |= {"batch_size": batch_size, "threads": torch.get_num_threads(), "rows": rows}
    sys.stdout.write(schedule_table(report) + "\n")
    if arguments.output_dir:
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "schedule.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def schedule_table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = [
        f"{report['model']}, forward and backward of {report['batch_size']} images, keep rate 1.0 to "
        f"{report['target']}, {report['device']}",
        "",
        "| compiled | keep rates | graphs | compiled again in the steady state | waited, s | steady step, ms |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['strategy']} | {row['num_keep_rates']} | {row['graphs']} | {row['graphs_in_steady_state']} | "
        f"{row['seconds_waited']:.0f} | {row['steady_ms']:.0f} |"
        for row in report["rows"]
    ]
    return "\n".join(lines)
