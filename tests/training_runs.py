"""Real training runs in real processes that can be killed: forked, so that nothing is imported again."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState


# A small network, and everything that is random: augmentation, mixing, stochastic depth, with schedules and averages.
SMALL = [
    *["digits", "--max_train_samples", "104", "--max_eval_samples", "40", "--hidden_size", "32"],
    *["--num_hidden_layers", "4", "--reorganization_layers", "1", "2", "--epochs", "3", "--batch_size", "16"],
    *["--warmup_epochs", "1", "--eval_batch_size", "16", "--num_pictures", "0", "--log_steps", "1"],
    *["--keep_rate_dense_epochs", "0.5", "--keep_rate_shrink_epochs", "1.5"],
    *["--compare_keep_rates", "1.0"],
]
RANDOM = [
    *["--mixup", "0.8", "--cutmix", "1.0", "--rand_augment", "9", "--rand_augment_std", "0.5"],
    *["--random_erasing", "0.25", "--drop_path_rate", "0.2", "--ema_decay", "0.9", "--label_smoothing", "0.1"],
]


class ForkedRun:
    """One `evit train`, as a process of its own."""

    def __init__(self, flags, output_dir, *, before=None, **environment):
        self.output = Path(f"{output_dir}-{time.monotonic_ns()}.txt")
        self.process = multiprocessing.get_context("fork").Process(
            target=self._run, args=([*self._with_folder(flags, output_dir)], before, environment)
        )
        self.process.start()

    @staticmethod
    def _with_folder(flags, output_dir):
        return flags if "--output_dir" in flags else [*flags, "--output_dir", str(output_dir)]

    def _run(self, argv, before, environment):
        os.setsid()  # a group of its own, with its workers
        with self.output.open("w", buffering=1) as file, contextlib.ExitStack() as stack:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = file, file
            os.environ.update(environment)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            torch.set_num_threads(1)
            if before is not None:
                stack.enter_context(before) if hasattr(before, "__enter__") else before()
            from evit_training.commands import train

            try:
                train.main(argv)
            except Exception:
                traceback.print_exc(file=file)
                sys.exit(70)

    @property
    def pid(self):
        return self.process.pid

    def wait(self, seconds=240):
        """Exit status, negative for a signal."""
        self.process.join(seconds)
        if self.process.is_alive():
            os.killpg(self.pid, 9)
            self.process.join()
            raise AssertionError(f"still running after {seconds} s:\n{self.text()[-3000:]}")
        return self.process.exitcode

    def text(self):
        return self.output.read_text() if self.output.exists() else ""

    def wait_for_step(self, output_dir, step, seconds=120):
        """Wait until the log holds a training step."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.is_alive():
            if any(entry["step"] >= step for entry in read_log(output_dir)):
                return
            time.sleep(0.005)
        raise AssertionError(f"no step {step}:\n{self.text()[-3000:]}")


def run(flags, output_dir, status=0, **options):
    """Run to the end and return what was printed."""
    forked = ForkedRun(flags, output_dir, **options)
    found = forked.wait()
    assert found == status, f"status {found}\n{forked.text()[-4000:]}"
    return forked.text()


def free_port():
    """A port of this worker's own range, below those that the system hands out to others in the meantime."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in random.sample(range(20000 + 1000 * worker, 21000 + 1000 * worker), 100):
        with socket.socket() as attempt, contextlib.suppress(OSError):
            attempt.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def fork_ranks(flags, output_dir, num_processes=2, before=None, **environment):
    """The processes of one distributed run, connected by gloo."""
    port = free_port()
    return [
        ForkedRun(
            flags,
            output_dir,
            before=before,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num_processes),
            LOCAL_WORLD_SIZE=str(num_processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            **environment,
        )
        for rank in range(num_processes)
    ]


def read_log(output_dir):
    path = Path(output_dir) / "metrics.jsonl"
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # half a line of a run that continues
            entries.append(json.loads(line))
    return entries


def state_hash(output_dir):
    """SHA-256 of weights, averages and optimizer state in the newest checkpoint of a run."""
    newest = max((Path(output_dir) / "checkpoints").glob("step-*"))
    digest = hashlib.sha256()
    for name in ("model.safetensors", "ema.safetensors", "optimizer.pt"):
        if (newest / name).exists():
            digest.update((newest / name).read_bytes())
    return newest.name, digest.hexdigest()
