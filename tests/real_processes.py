"""Commands in processes of their own that end as those of users do: at the end of a Python program.

Starting Python and importing PyTorch takes many seconds, so a `Starter` does that once and forks for each command.
Forked children leave the loop of the program below, run their code, and come to the program's end.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


PROGRAM = """
import importlib.util, json, os, runpy, sys, time
import torch
exec(sys.argv[1])

torch.set_num_threads(1)
request = None
for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        break
    request = None
    print(json.dumps(pid), flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([status, time.monotonic()]), flush=True)
if request is not None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    if request["hides_package"]:
        sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
        sys.path = [path for path in sys.path if not path or not os.path.exists(os.path.join(path, "evit_hf"))]
        assert not importlib.util.find_spec("evit_hf") and not importlib.util.find_spec("evit_training")
    sys.argv = ["-c", *request["argv"]]
    exec(request["code"])
"""
# What takes longest to import and does not depend on environment variables, or all that commands need.
FRESH = "import torchvision"
READY = "import evit_training.loop.trainer, evit_training.measuring.tuning"
COMMAND = 'runpy.run_module("evit_training", run_name="__main__", alter_sys=True)'


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
    """The process that forks commands, one at a time.

    Args:
        imports: code that runs once, before any command.
    """

    def __init__(self, imports=READY):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, imports], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, argv, folder, before="", **options):
        """Start `evit ARGV`; `before` is code that runs before it."""
        return self.start_code(f"{before}\n{COMMAND}", folder, argv, **options)

    def start_code(self, code, folder, argv=(), cwd=None, environment=None, hides_package=False):
        """Start a program; what it says goes to files in `folder`. `hides_package`: it cannot import this project."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr"):
            (folder / name).unlink(missing_ok=True)
        request = {
            "argv": [str(word) for word in argv],
            "code": code,
            "cwd": str(cwd or Path.cwd()),
            "environment": {**os.environ, **(environment or {})},
            "hides_package": hides_package,
            "stderr": str(folder / "stderr"),
            "stdout": str(folder / "stdout"),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Command(self, folder, json.loads(self.process.stdout.readline()))

    def run(self, argv, folder, **options):
        """Run `evit ARGV` to its end."""
        return self.start(argv, folder, **options).wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def starter(imports=READY):
    """The one `Starter` of this process with these imports."""
    starter = Starter(imports)
    atexit.register(starter.close)
    return starter


def run_code(code, *, imports=FRESH, seconds=300, **options):
    """Run a program to its end, by default with nothing imported that reads environment variables."""
    with tempfile.TemporaryDirectory() as folder:
        return starter(imports).start_code(code, folder, **options).wait(seconds)


def evit(*argv, imports=READY, **options):
    """Run `evit ARGV` to its end."""
    return run_code(COMMAND, argv=argv, imports=imports, **options)
