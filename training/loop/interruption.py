"""Signals, lost launchers and locks: how a run ends before its end, and what keeps two runs apart."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType

import filelock
from accelerate import Accelerator


# SIGUSR1 is what Slurm's `--signal` sends, SIGHUP what a closed terminal does.
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


class TrainingInterruptedError(Exception):
    """One of SIGNALS came; the run was saved and ends with 128 + the signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.status = 128 + signal_number


class Interruption:
    """Remember the first of SIGNALS until the optimizer step is done; the second one ends the process at once.

    A run whose launcher died (`accelerate launch` does not forward signals) is interrupted too: nobody could stop it.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal_number = 0
        launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
        self.launcher = os.getppid() if launched else None
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        """Start to listen."""
        if threading.current_thread() is threading.main_thread():  # Python allows no other to listen
            for name in SIGNALS:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self.before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            os._exit(128 + number)
        self.signal_number = number

    def agreed(self) -> int:
        """Number of the signal that any process got, 0 for none; every process must ask at the same step."""
        if self.launcher is not None and os.getppid() != self.launcher:
            self.signal_number = self.signal_number or signal.SIGTERM
        if self.accelerator.num_processes == 1:
            return self.signal_number
        if self.signal_number:
            self.accelerator.set_trigger()
        if not self.accelerator.check_trigger():
            return 0
        self.signal_number = self.signal_number or signal.SIGTERM
        return self.signal_number


def await_deaths_of_loaders() -> None:
    """Notice the death of a loading process where its images are awaited, between optimizer steps.

    PyTorch's handler, set when the first loader starts, raises wherever the training process happens to be, even in
    the middle of an optimizer step; the loader itself checks on its processes too, every five seconds.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def lock(output_dir: Path) -> filelock.BaseFileLock:
    """Make the output folder and lock it for this process; the lock ends with the process, however it ends.

    On a file system without locks the file `.lock` itself is the lock.

    Returns: the lock, see `unlock`.

    Raises: ValueError if another run holds the lock, or the folder cannot be made or written.
    """
    held: filelock.BaseFileLock = filelock.FileLock(output_dir / ".lock")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(blocking=False)
        except NotImplementedError:  # older versions of filelock leave the choice to their caller
            held = filelock.SoftFileLock(output_dir / ".lock")
            held.acquire(blocking=False)
    except filelock.Timeout:
        raise ValueError(
            f"Another run is writing to `--output-dir {output_dir}`: wait for it, or choose another folder."
        ) from None
    except OSError as error:
        raise ValueError(f"`--output-dir {output_dir}` cannot be written: {error}.") from None
    return held


def unlock(held: filelock.BaseFileLock) -> None:
    """Release the lock of an output folder, and delete its file."""
    if isinstance(held, filelock.SoftFileLock):
        held.release()
        return
    Path(held.lock_file).unlink(missing_ok=True)  # first: later it might be another run's
    held.release()
