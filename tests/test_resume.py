"""No work is lost: runs that are killed, stopped and damaged end bit for bit as if nothing had happened."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from runs import RANDOM, SMALL, ForkedRun, fork_ranks, read_log, run, state_hash


WORKERS = ["--num_workers", "1"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "straight"
    run([*SMALL, *RANDOM], output_dir)
    return output_dir


def logged_steps(output_dir):
    entries = read_log(output_dir)
    return [e["step"] for e in entries if "loss" in e], [e["step"] for e in entries if "eval_top1" in e]


@pytest.mark.parametrize("step", [2, 6, 9], ids=["first epoch", "epoch end", "second epoch"])
def test_resumed_run_equals_uninterrupted_run_after_kill(step, uninterrupted, tmp_path):
    """Kill -9 mid-epoch, at the end of one, and with loading processes where the other run had none."""
    output_dir = tmp_path / "run"
    flags = [*SMALL, *RANDOM, *WORKERS, "--checkpoint_steps", "2"]
    killed = ForkedRun(flags, output_dir)
    killed.wait_for_step(output_dir, step)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    text = run([*flags, "--resume", "auto"], output_dir)
    assert "Going on from" in text or step == 2
    assert state_hash(output_dir) == state_hash(uninterrupted)
    assert logged_steps(output_dir) == (list(range(1, 19)), [6, 12, 18])
    results = [json.loads((path / "results.json").read_text())[1]["loss"] for path in (output_dir, uninterrupted)]
    assert results[0] == results[1]
