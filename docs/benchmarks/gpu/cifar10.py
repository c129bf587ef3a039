"""Evidence: small EViTs from scratch on CIFAR-10, 30 epochs, at keep rates 1.0, 0.7 and 0.5, tokens fused and dropped.

One call trains all of them for the seeds it is given, several at once on one GPU, and stops what has not ended in
time. A table of one seed says nothing of the error: give the next calls other seeds and put the tables together.
"""

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit import Kit

from evit_training.studies.report import as_json, as_markdown, summarize
from evit_training.studies.runner import StudyStopped, run_all
from evit_training.studies.study import Run, Study


# Most important first.
SETTINGS = {
    "1.0": "--keep-rate 1.0",
    "0.7 fused": "--keep-rate 0.7",
    "0.5 fused": "--keep-rate 0.5",
    "0.7 dropped": "--keep-rate 0.7 --inattentive-tokens dropped",
    "0.5 dropped": "--keep-rate 0.5 --inattentive-tokens dropped",
}


def study(kit: Kit) -> Study:
    """All settings, trained as by the recipe `cifar10` but shorter."""
    data, epochs = Path(kit.arguments.data), kit.arguments.epochs
    workers = max(1, (os.cpu_count() or 2) // len(SETTINGS))
    flags = ["cifar10", "--dataset", str(data / "train.parquet"), str(data / "test.parquet"), "--epochs", str(epochs)]
    flags += ["--keep-rate-dense-epochs", f"{epochs * 0.1:g}", "--keep-rate-shrink-epochs", f"{epochs * 0.4:g}"]
    flags += ["--warmup-epochs", f"{epochs * 0.1:g}", "--compare-keep-rates", "1.0", "--num-pictures", "0"]
    flags += ["--num-workers", str(workers), "--mixed-precision", "bf16"]
    settings = {name: tuple(words.split()) for name, words in SETTINGS.items()}
    if kit.is_dry:
        flags += ["--max-train-samples", "64", "--max-eval-samples", "32", "--batch-size", "16", "--hidden-size", "24"]
        flags += ["--num-hidden-layers", "4", "--num-workers", "0", "--mixed-precision", "no"]
        settings = {name: settings[name] for name in ("1.0", "0.7 fused")}
    about = f"CIFAR-10, {epochs} epochs from scratch."
    return Study("cifar10", about, tuple(flags), tuple(kit.arguments.seeds), settings, "1.0")


def trained(kit: Kit, folder: Path) -> tuple[str, Any]:
    """Train all runs, several at once, until the time is up, and read what they reached."""
    os.environ["OMP_NUM_THREADS"] = "1"
    plan = study(kit)
    runs, failed = plan.runs(folder), {}
    alarm = threading.Timer(kit.seconds_left - 15, os.kill, (os.getpid(), signal.SIGTERM))
    alarm.start()
    try:
        failed = run_all(runs, 1 if kit.is_dry else len(SETTINGS), 0 if kit.is_dry else 1)
    except StudyStopped:
        pass  # what has ended is in the table
    finally:
        alarm.cancel()
    notes = [f"{run.name}: {failed.get(run) or so_far(run)}" for run in runs if not run.is_done]
    rows = summarize(plan, runs)
    if not rows:
        raise RuntimeError("\n".join(["no run ended:", *notes]))
    return "\n".join([as_markdown(plan, rows, None, kit.command), *notes]), as_json(plan, rows, None)


def so_far(run: Run) -> str:
    """What a run that was stopped had reached."""
    log = run.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    scores = [f"{100 * line['eval_top1']:.2f} % at epoch {line['epoch']:.1f}" for line in lines if "eval_top1" in line]
    return f"stopped, {scores[-1] if scores else 'not yet evaluated'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Train what a command line asks for."""
    flags = {
        "--data": {"default": ".gpu/cifar10", "help": "folder with train.parquet and test.parquet"},
        "--seeds": {"type": int, "nargs": "+", "default": [0], "help": "of each setting"},
        "--epochs": {"type": int, "default": 30, "help": "passes over the 50,000 images"},
    }
    kit = Kit("cifar10", __doc__, argv, flags)
    with tempfile.TemporaryDirectory() as temporary:
        kit.measure(f"seeds {kit.arguments.seeds}", lambda: trained(kit, Path(temporary)), 60)
    return kit.finish()


if __name__ == "__main__":
    sys.exit(main())
