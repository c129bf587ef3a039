"""Evidence: small EViTs from scratch on CIFAR-10, 30 epochs, at keep rates 1.0, 0.7 and 0.5, tokens fused and dropped.

One call trains all of them for the seeds it is given, several at once on one GPU, and stops what has not ended in
time. A table of one seed says nothing of the error: give the next calls other seeds and put the tables together.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit import Kit, markdown


# Most important first: keep rate, what becomes of the other tokens.
VARIANTS = [(1.0, "fused"), (0.7, "fused"), (0.5, "fused"), (0.7, "dropped"), (0.5, "dropped")]


def command(kit: Kit, keep_rate: float, inattentive: str, seed: int, folder: Path) -> list[str]:
    """One `evit train`, as the recipe `cifar10` but shorter."""
    data, epochs = Path(kit.arguments.data), kit.arguments.epochs
    workers = max(1, (os.cpu_count() or 2) // len(VARIANTS))
    flags = ["cifar10", "--dataset", str(data / "train.parquet"), str(data / "test.parquet"), "--seed", str(seed)]
    flags += ["--keep-rate", str(keep_rate), "--inattentive-tokens", inattentive, "--epochs", str(epochs)]
    flags += ["--keep-rate-dense-epochs", f"{epochs * 0.1:g}", "--keep-rate-shrink-epochs", f"{epochs * 0.4:g}"]
    flags += ["--warmup-epochs", f"{epochs * 0.1:g}", "--compare-keep-rates", "1.0", "--num-pictures", "0"]
    flags += ["--output-dir", str(folder), "--num-workers", str(workers), "--mixed-precision", "bf16"]
    if kit.is_dry:
        flags += ["--max-train-samples", "64", "--max-eval-samples", "32", "--batch-size", "16", "--hidden-size", "24"]
        flags += ["--num-hidden-layers", "4", "--num-workers", "0", "--mixed-precision", "no"]
    return [sys.executable, "-m", "evit_training", "train", *flags]


def trained(kit: Kit, seed: int, folder: Path) -> tuple[str, Any]:
    """Train all variants at once and read what they reached."""
    os.environ["OMP_NUM_THREADS"] = "1"
    runs, num_at_once = [], 1 if kit.is_dry else len(VARIANTS)
    waiting = [(rate, kind, folder / f"{rate}-{kind}-{seed}") for rate, kind in VARIANTS[: 2 if kit.is_dry else None]]
    running: list[subprocess.Popen] = []
    while (waiting or running) and kit.seconds_left > 15:
        while waiting and len(running) < num_at_once:
            rate, kind, output = waiting.pop(0)
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.with_suffix(".log").open("w") as log:
                line = command(kit, rate, kind, seed, output)
                running.append(subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True))
            runs.append((rate, kind, output))
        running = [process for process in running if process.poll() is None]
        time.sleep(0.2)
    for process in running:
        os.killpg(process.pid, signal.SIGTERM)
    for process in running:
        process.wait(timeout=30)
    rows = []
    for rate, kind, output in runs:
        log, results = output / "metrics.jsonl", output / "results.json"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        if results.exists():
            found = {row["keep_rate"]: row for row in json.loads(results.read_text())}
            own = found.get(rate) or next(iter(found.values()))
            dense = found.get(1.0, own)
            rows.append([rate, kind, seed, "whole", 100 * own["top1"], 100 * dense["top1"], own["gmacs"]])
        else:
            best = [100 * line["eval_top1"] for line in lines if "eval_top1" in line]
            said = output.with_suffix(".log").read_text()[-400:]
            state = f"stopped at epoch {lines[-1].get('epoch', 0):.1f}" if lines else f"failed: {said}"
            rows.append([rate, kind, seed, state, best[-1] if best else float("nan"), float("nan"), float("nan")])
    header = ["keep rate", "others", "seed", "run", "top-1, %", "top-1 at 1.0, %", "GMACs"]
    if not any(row[3] == "whole" for row in rows):
        raise RuntimeError(f"no run ended:\n{markdown(header, rows)}")
    return markdown(header, rows), rows


def main(argv: Sequence[str] | None = None) -> int:
    """Train what a command line asks for."""
    flags = {
        "--data": {"default": ".gpu/cifar10", "help": "folder with train.parquet and test.parquet"},
        "--seeds": {"type": int, "nargs": "+", "default": [0], "help": "one table for each"},
        "--epochs": {"type": int, "default": 30, "help": "passes over the 50,000 images"},
    }
    kit = Kit("cifar10", __doc__, argv, flags)
    with tempfile.TemporaryDirectory() as temporary:
        for seed in kit.arguments.seeds:
            kit.measure(f"seed {seed}", lambda seed=seed: trained(kit, seed, Path(temporary)), 60)
    return kit.finish()


if __name__ == "__main__":
    sys.exit(main())
