"""Commands in processes of their own that end as those of users do: at the end of a Python program.

Starting Python and importing PyTorch takes many seconds, so one process does that, `Starter`, and forks for each
command. Forked children leave the loop of the program below, run their command, and come to its end.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


PROGRAM = """
import json, os, sys, time
import torch
import evit_training.loop.trainer, evit_training.measuring.tuning
from evit_training import cli

torch.set_num_threads(1)
argv = None
for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(0)
        for number, path in ((1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        argv = request["argv"]
        exec(request["before"])
        break
    print(json.dumps(pid), flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([status, time.monotonic()]), flush=True)
if argv is not None:
    cli.main(argv)
"""


@dataclass
class Ended:
    """What a command left: its exit status, when it ended (`time.monotonic`), and what it said."""

    status: int
    time: float
    stdout: str
    stderr: str

    @property
    def last_line(self):
        lines = self.stderr.strip().splitlines()
        return lines[-1] if lines else ""


class Command:
    """A command that runs."""

    def __init__(self, starter, folder, pid):
        self.starter, self.folder, self.pid = starter, folder, pid

    def wait(self, seconds=120):
        """Wait for the end; a process that does not end fails the test."""
        watch = subprocess.Popen(["/bin/sh", "-c", f"sleep {seconds}; kill -9 -- -{self.pid}"], start_new_session=True)
        try:
            status, ended = json.loads(self.starter.process.stdout.readline())
        finally:
            os.killpg(watch.pid, signal.SIGKILL)
            watch.wait()
        stdout, stderr = (
            (self.folder / name).read_text() if (self.folder / name).is_file() else "" for name in ("stdout", "stderr")
        )
        assert status != -signal.SIGKILL, f"did not end in {seconds} s:\n{stderr[-3000:]}"
        return Ended(status, ended, stdout, stderr)

    def wait_for(self, is_there, seconds=120):
        """Wait until `is_there()`."""
        deadline = time.monotonic() + seconds
        while not is_there():
            assert time.monotonic() < deadline, (self.folder / "stderr").read_text()[-3000:]
            time.sleep(0.01)


class Starter:
    """The process that forks commands, one at a time."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, argv, folder, before=""):
        """Start `evit ARGV`; `before` is code that runs before it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr"):
            (folder / name).unlink(missing_ok=True)
        request = {"argv": [str(word) for word in argv], "before": before, "stderr": str(folder / "stderr")}
        request["stdout"] = str(folder / "stdout")
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Command(self, folder, json.loads(self.process.stdout.readline()))

    def run(self, argv, folder, **options):
        """Run `evit ARGV` to its end."""
        return self.start(argv, folder, **options).wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait()
