"""The runs of a study, one after another or next to each other, each a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from ..loop.interruption import lock, unlock
from ..screen import say
from .study import Run, Study


STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
SECONDS_TO_END = 60  # that an earlier run gets to save and leave its folder


class StudyStopped(Exception):
    """A signal ended the study; its message is for the screen."""

    def __init__(self, number: int) -> None:
        super().__init__("stopped. All runs are saved: the same command resumes the study.")
        self.status = 128 + number


def check_record(study: Study, output_dir: Path) -> None:
    """Write down what the study is; one whose settings changed since its runs were made must not mix with them.

    Raises: ValueError naming the setting.
    """
    record = output_dir / "study.yaml"
    now: dict[str, Any] = {
        "train": list(study.train),
        "settings": {name: [*_way(study, name), *words] for name, words in study.settings.items()},
    }
    made = {run.setting for run in study.runs(output_dir) if run.folder.exists()}
    before = yaml.safe_load(record.read_text("utf-8")) if record.exists() else now
    for name in made:
        if (before["train"], before["settings"].get(name)) != (now["train"], now["settings"][name]):
            raise ValueError(
                f"`{output_dir}` holds runs of `{name}` with other flags: name a different `--output-dir`, give the "
                "setting a different name, or delete its folder."
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    record.write_text(yaml.safe_dump(now, sort_keys=False), "utf-8")


def _way(study: Study, setting: str) -> list[str]:
    return [f"way: {study.ways[setting]}"] if setting in study.ways else []


def run_all(runs: Sequence[Run], num_jobs: int = 1, num_gpus: int = 0) -> dict[Run, str]:
    """Train what is not done yet.

    Args:
        runs: each after those that it needs.
        num_jobs: runs at a time. They share the processor's threads; on GPUs each has one, in turn.
        num_gpus: of the machine.

    Returns: what went wrong, by run; the others are done.

    Raises: StudyStopped after SIGTERM, SIGINT or SIGHUP, when all runs have saved and ended.
    """
    failed: dict[Run, str] = {}
    waiting = [run for run in runs if not run.is_done]
    running: dict[Run, tuple[subprocess.Popen[bytes], int]] = {}
    say(f"{len(runs)} runs: {len(runs) - len(waiting)} are done, {len(waiting)} to train, {num_jobs} at a time.")
    free = list(range(num_jobs))
    with _signals(lambda: [process for process, _ in running.values()]) as received:
        while waiting or running:
            for run in list(waiting):
                blocked = [other.setting for other in failed if run.starts_from(other)]
                if blocked or received:
                    waiting.remove(run)
                    if blocked:
                        failed[run] = f"not trained, as `{blocked[0]}` failed"
                elif free and not any(run.starts_from(other) for other in (*waiting, *running)):
                    waiting.remove(run)
                    slot = free.pop(0)
                    running[run] = _start(run, slot, num_jobs, num_gpus), slot
                    say(f"{run.name}: started, see {run.folder}.log")
            for run, (process, slot) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[run]
                free.append(slot)
                if status == 0 and run.is_done:
                    say(f"{run.name}: done, {len(waiting) + len(running)} to go")
                elif not received:
                    failed[run] = f"ended with status {status}, see {run.folder}.log"
                    say(f"{run.name}: {failed[run]}")
            time.sleep(0.1)
    if received:
        raise StudyStopped(received[0])
    return failed


def _start(run: Run, slot: int, num_jobs: int, num_gpus: int) -> "subprocess.Popen[bytes]":
    """Start or resume a run; what it prints goes into a file next to its folder."""
    _wait_for_folder(run.folder)
    environment = dict(os.environ)
    if num_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = str(slot % num_gpus)
    else:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_jobs)))
    start = ["evit_training", "train"] if run.way is None else ["evit_training.studies.ways", run.way]
    command = [sys.executable, "-m", *start, *run.words, "--resume", "auto"]
    with Path(f"{run.folder}.log").open("ab") as log:
        # In a session of its own: Ctrl-C reaches only the study, which tells its runs.
        return subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )


def _wait_for_folder(folder: Path) -> None:
    """Wait until a run that a killed study left behind has ended."""
    end = time.monotonic() + SECONDS_TO_END
    while True:
        try:
            unlock(lock(folder))
        except ValueError:
            if time.monotonic() > end:
                raise
            time.sleep(1)
        else:
            return


@contextlib.contextmanager
def _signals(running: Callable[[], list[subprocess.Popen[bytes]]]) -> Iterator[list[int]]:
    """Tell the runs to save and end when a signal comes; the list says which signals came."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not received:
            for process in running():
                process.terminate()
        received.append(number)

    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield received
    finally:
        for process in running():  # none, unless an error ends the study
            process.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)
