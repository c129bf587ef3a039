"""What the scripts of this folder share: flags, a time limit, and results that are written as they come.

A GPU is often lent for minutes. So each script measures the most important things first, starts nothing that it has no
time for, keeps what it has when one measurement fails, and runs at a tiny size on a CPU (`--dry-run`).
"""

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from evit_training.measuring.machine import PACKAGES, best_device, machine


class Kit:
    """One run of a script.

    Args:
        name: of the files NAME.json and NAME.md.
        description: for `--help`.
        argv: the command line; by default that of the process.
        flags: more flags, by name with the keywords of `add_argument`.
    """

    def __init__(
        self, name: str, description: str, argv: Sequence[str] | None = None, flags: dict[str, dict] | None = None
    ) -> None:
        parser = argparse.ArgumentParser(name, description=description, formatter_class=argparse.RawTextHelpFormatter)
        parser.add_argument("--output-dir", default=f"runs/gpu/{name}", help="folder for NAME.json and NAME.md")
        parser.add_argument("--minutes", type=float, default=9.0, help="start nothing later than this")
        parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU: does it work at all?")
        for flag, keywords in (flags or {}).items():
            parser.add_argument(flag, **keywords)
        self.name, self.arguments = name, parser.parse_args(argv)
        self.device = torch.device("cpu") if self.is_dry else best_device()
        if self.device.type != "cuda" and not self.is_dry:
            parser.error("there is no CUDA GPU here: `--dry-run` runs at a tiny size on the CPU.")
        self.deadline = time.monotonic() + 60 * self.arguments.minutes
        self.command = (
            f"python3 docs/benchmarks/gpu/{name}.py {' '.join(sys.argv[1:] if argv is None else argv)}".strip()
        )
        self.sections: list[dict[str, Any]] = []
        self.num_failed = 0

    @property
    def is_dry(self) -> bool:
        """Whether this is a dry run."""
        return self.arguments.dry_run

    @property
    def seconds_left(self) -> float:
        """Until the time limit."""
        return self.deadline - time.monotonic()

    def measure(self, title: str, run: Callable[[], tuple[str, Any]], seconds: float = 20) -> None:
        """Run one measurement and write what it found; an error is noted and the next measurement starts.

        Args:
            title: of its section.
            run: returns a Markdown table and the same as JSON.
            seconds: that it needs at most; it is left out if fewer are left.
        """
        text, data, start = "", None, time.monotonic()
        if self.seconds_left < seconds:
            text = f"Not measured: it takes up to {seconds:.0f} s, and {self.seconds_left:.0f} s were left."
        else:
            try:
                text, data = run()
            except Exception as error:
                traceback.print_exc()
                self.num_failed += 1
                text = f"Failed: {type(error).__name__}: {error}"
        seconds_taken = time.monotonic() - start
        self.sections.append({"title": title, "text": text, "data": data, "seconds": seconds_taken})
        sys.stdout.write(f"## {title}\n\n{text}\n\n({seconds_taken:.0f} s)\n\n")
        sys.stdout.flush()
        self.write()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self) -> None:
        """Write all sections so far."""
        folder = Path(self.arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        report = {"command": self.command, **machine(self.device, (*PACKAGES, "accelerate", "triton"))}
        report["sections"] = self.sections
        (folder / f"{self.name}.json").write_text(json.dumps(report, indent=2) + "\n")
        versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        head = f"# {self.name}\n\n{report['device']}, {report['cpu']}, {report['date']}; {versions}.\n\n"
        head += f"```bash\n{self.command}\n```\n\n"
        body = "\n\n".join(f"## {section['title']}\n\n{section['text']}" for section in self.sections)
        (folder / f"{self.name}.md").write_text(head + body + "\n")

    def finish(self) -> int:
        """Say where the results are.

        Returns: exit status, 1 if a measurement failed.
        """
        sys.stdout.write(
            f"Saved {Path(self.arguments.output_dir) / self.name}.json and .md; {self.num_failed} failed.\n"
        )
        return 1 if self.num_failed else 0


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table; floats with four digits, or all before the point."""

    def shown_number(x: float) -> str:
        return f"{x:.0f}" if abs(x) >= 10_000 else f"{x:.4g}"

    shown = [[shown_number(x) if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines = [header, ["---"] * len(header), *shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
