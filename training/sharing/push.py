"""Pushes to the Hub: the card that goes with a model, and pushes in the background of a training run."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from ..sharing.card import keep_what_was_added, render_folder_card, render_run_card, written_by_hand
from ..sharing.hub import card_on_the_hub, check_card


def write_card(source: Path, export: Path, repo_id: str, revision: str | None, timeout: float) -> None:
    """Put a card into an exported folder that names this repository, and keeps what a person wrote there.

    A run's card is rendered again, for this name. A model folder without card gets one of what its files tell.

    Args:
        source: the run or model folder; the run's own README.md is renewed too.
        export: see `export_folder`.
        repo_id: where it goes.
        revision: branch.
        timeout: seconds without an answer after which a request has failed.
    """
    card = export / "README.md"
    try:
        if (source / "run.json").exists():
            text = render_run_card(source, repo_id)
            (source / "README.md").write_text(text)
        else:
            text = card.read_text() if card.exists() else render_folder_card(export, repo_id)
        there = card_on_the_hub(repo_id, revision, timeout)
        if there is not None and written_by_hand(there) != written_by_hand(text):
            merged = text if written_by_hand(text) else keep_what_was_added(there, text)
            try:
                check_card(merged)
            except ValueError:
                merged = text
            if written_by_hand(there) not in merged:
                sys.stderr.write("The card on the Hub had text of its own: it stays in the repository's history.\n")
            text = merged
        card.write_text(text)
    except ValueError as error:
        sys.stderr.write(f"The card was left as it is: {error}\n")


class PushFailed(RuntimeError):
    """The run is done and saved, but its last push failed."""

    status = 5


class BackgroundPush:
    """Pushes of a run, one process at a time, so that a failing or hanging Hub never holds up training.

    Args:
        repo_id: where to.
        private: of a new repository.
        revision: branch.
        deadline: seconds after which a push is given up.
        log: file for what the pushes say.
    """

    def __init__(self, repo_id: str, private: bool, revision: str | None, deadline: float, log: Path) -> None:
        self.repo_id = repo_id
        self.flags = [*(["--private"] if private else []), *(["--revision", revision] if revision else [])]
        self.deadline = deadline
        self.log = log
        self.process: subprocess.Popen | None = None
        self.started = 0.0
        self.num_failures = 0

    def start(self, folder: Path, message: str) -> bool:
        """Push a folder, unless the push before is still at it; returns whether it was started."""
        if self.is_running():
            return False
        command = [sys.executable, "-m", "evit_training", "push", str(folder), self.repo_id, *self.flags]
        with self.log.open("a") as log:
            # A session of its own: signals of the terminal end the training, which then ends the push.
            self.process = subprocess.Popen(
                [*command, "--message", message],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.started = time.monotonic()
        return True

    def is_running(self) -> bool:
        """Whether a push is under way; one beyond its deadline is ended, a failure is reported once."""
        if self.process is None:
            return False
        status = self.process.poll()
        if status is None and time.monotonic() - self.started > self.deadline:
            self.process.kill()
            status = self.process.wait()
        if status is None:
            return True
        self.process = None
        if status != 0:
            self.num_failures += 1
            sys.stderr.write(
                f"A push to `{self.repo_id}` failed (status {status}, see {self.log}); training goes on.\n"
            )
        return False

    def finish(self, folder: Path, message: str) -> None:
        """Push the end of a run and wait for it.

        Raises: PushFailed with the command that tries again.
        """
        while self.is_running():
            time.sleep(0.1)
        failures = self.num_failures
        self.start(folder, message)
        while self.is_running():
            time.sleep(0.1)
        if self.num_failures > failures:
            retry = shlex.join(["evit", "push", str(folder), self.repo_id, *self.flags])
            raise PushFailed(
                f"The run is saved, but the Hub did not take it (see {self.log}). To finish the job: {retry}"
            )

    def close(self) -> None:
        """End a push that is still under way."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
