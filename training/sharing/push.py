"""Pushes of a run to the Hub: each is a separate process, `evit push`, so that the Hub never holds up training."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from .hub import FinalPushError, PushError


class BackgroundPush:
    """Pushes of a run, one process at a time: a process can be killed for certain, whatever the Hub does.

    Args:
        repo_id: where to.
        private: of a new repository.
        revision: branch.
        deadline: seconds after which a push is given up.
        log: file for what the pushes say.
    """

    def __init__(self, repo_id: str, private: bool, revision: str | None, deadline: float, log: Path) -> None:
        self.target = [repo_id, *(["--private"] if private else []), *(["--revision", revision] if revision else [])]
        self.deadline = deadline
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0

    def check(self) -> None:
        """Find out before training whether the Hub will take the model; makes the repository if there is none.

        Raises: PushError with the reason.
        """
        command = [sys.executable, "-m", "evit_training", "push", ".", *self.target, "--check"]
        try:
            process = subprocess.run(
                command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=self.deadline
            )
        except subprocess.TimeoutExpired:
            raise PushError(f"The Hub gave no answer in {self.deadline:.0f} s") from None
        if process.returncode:
            lines = process.stderr.strip().splitlines() or [f"status {process.returncode}"]
            raise PushError(lines[-1].removeprefix("evit push: error: ").split(" To try again: ")[0].rstrip("."))

    def start(self, folder: Path, message: str) -> bool:
        """Push a folder, unless the push before is still under way; returns whether it was started."""
        if self.is_running():
            return False
        command = [sys.executable, "-m", "evit_training", "push", str(folder), *self.target, "--message", message]
        with self.log.open("a") as log:
            # Its own session: signals of the terminal end the training, which then ends the push.
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self.started = time.monotonic()
        return True

    def is_running(self) -> bool:
        """Whether a push is under way; one beyond its deadline is killed, and a failure reported."""
        return self._status() is None

    def finish(self, folder: Path, message: str) -> None:
        """Push the end of a run and wait for it.

        Raises: FinalPushError with the command that tries again.
        """
        self._wait()
        self.start(folder, message)
        if self._wait():
            retry = shlex.join(["evit", "push", str(folder), *self.target])
            raise FinalPushError(
                f"The run is saved, but the Hub did not take it (see {self.log}). To finish the job: {retry}"
            )

    def close(self) -> None:
        """Kill a push that is still under way."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _wait(self) -> int:
        """Exit status of the push, when it has ended; 0 if there is none."""
        while (status := self._status()) is None:
            time.sleep(0.1)
        return status

    def _status(self) -> int | None:
        """Exit status of the push, told once; 0 if there is none, None while it is under way."""
        if self.process is None:
            return 0
        status = self.process.poll()
        if status is None and time.monotonic() - self.started > self.deadline:
            self.process.kill()
            status = self.process.wait()
        if status is not None:
            self.process = None
        if status:
            sys.stderr.write(f"A push to `{self.target[0]}` failed (status {status}, see {self.log}).\n")
        return status


__all__ = ["BackgroundPush"]
