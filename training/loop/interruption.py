"""Signals, lost launchers and locks: how a run ends before its end, and what keeps two runs apart."""

import errno
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import filelock
from accelerate import Accelerator

from .checkpoints import Progress


# SIGUSR1 is what Slurm's `--signal` sends, SIGHUP what a closed terminal does.
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")

# What file systems without locks answer.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class TrainingInterruptedError(Exception):
    """One of SIGNALS came; the run ends with 128 + the signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.status = 128 + signal_number


class Interruption:
    """Remember what ends a run before its end until the optimizer step is done, and all processes agree on it.

    That is the first of SIGNALS (the second one ends the process at once), and a failure to load images. SIGHUP means
    nothing to a run that was started with `nohup`. A run whose launcher died (`accelerate launch` does not forward
    signals) is interrupted too: nobody could stop it.

    Args:
        accelerator: connects the processes.
        progress: of the run.
        num_steps: optimizer steps of the run.
    """

    def __init__(self, accelerator: Accelerator, progress: Progress, num_steps: int) -> None:
        self.accelerator = accelerator
        self.progress = progress
        self.num_steps = num_steps
        self.signal_number = 0
        self.failure: Exception | None = None
        launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
        self.launcher = os.getppid() if launched else None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        """Start to listen."""
        if threading.current_thread() is threading.main_thread():  # Python allows no other to listen
            for name in SIGNALS:
                number = getattr(signal, name, None)
                is_nohup = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN
                if number and not is_nohup:
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

    def agreed(self) -> bool:
        """Whether any process is to end; every process must ask at the same step."""
        if self.launcher is not None and os.getppid() != self.launcher:
            self.signal_number = self.signal_number or signal.SIGTERM
        return on_any_process(self.accelerator, bool(self.signal_number or self.failure))

    def error(self) -> Exception:
        """What to raise when `agreed`."""
        if self.failure is not None:
            return self.failure
        number = self.signal_number or signal.SIGTERM
        why = f"by signal {int(number)}" if self.signal_number else "because one of this run's processes is to end,"
        return TrainingInterruptedError(
            number, f"Interrupted {why} after step {self.progress.step} of {self.num_steps}."
        )


def on_any_process(accelerator: Accelerator, is_so: bool) -> bool:
    """Whether something is so on any process; every process must ask."""
    if accelerator.num_processes == 1:
        return is_so
    if is_so:
        accelerator.set_trigger()
    return accelerator.check_trigger()


def lock(output_dir: Path) -> filelock.BaseFileLock:
    """Make the output folder and lock it for this process; the lock ends with the process, however it ends.

    On a file system without locks the file `.lock` itself is the lock.

    Returns: the lock, see `unlock`.

    Raises: ValueError if another run holds the lock, or the folder cannot be made or written.
    """
    path = output_dir / ".lock"
    held: filelock.BaseFileLock = filelock.FileLock(path)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        was_there = path.exists()
        try:
            held.acquire(blocking=False)
        except filelock.Timeout:
            raise
        except (OSError, NotImplementedError) as error:  # older versions of filelock leave the choice to their caller
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            if not was_there:
                path.unlink(missing_ok=True)  # it is of this attempt
            held = filelock.SoftFileLock(path)
            held.acquire(blocking=False)
    except filelock.Timeout:
        raise ValueError(
            f"Another run is writing to `--output-dir {output_dir}`: wait for it, or choose a different folder."
            + (f" If it was killed, delete {path}." if isinstance(held, filelock.SoftFileLock) else "")
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
