"""Start the trainer: `accelerate launch -m evit_training train RECIPE --flags`, the same as `evit train`."""

import sys
from collections.abc import Sequence

from ..arguments import parse_train_arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the settings of a command line.

    Exit status: 0 done; 1 the end could not be saved, or a process that loads images died; 2 settings, data or
    checkpoints that cannot work, with one line that says why; 3 the loss was not finite too often; 4 out of memory;
    5 all is saved but the Hub did not take it; 143 and 130 stopped by SIGTERM and SIGINT, and saved.
    """
    arguments = parse_train_arguments(sys.argv[1:] if argv is None else argv)
    from huggingface_hub.errors import StrictDataclassError

    # Behind the checks: it costs seconds to import.
    from ..loop.checkpoints import CheckpointError, NoCheckpointError
    from ..loop.interruption import TrainingInterrupted
    from ..loop.steps import OutOfMemory, TrainingDiverged
    from ..loop.trainer import train
    from ..sharing.push import PUSH_FAILED, PushFailed

    statuses = {
        ValueError: 2,
        StrictDataclassError: 2,
        NoCheckpointError: 2,
        CheckpointError: 1,
        TrainingDiverged: 3,
        OutOfMemory: 4,
        PushFailed: PUSH_FAILED,
    }
    try:
        train(arguments)
    except TrainingInterrupted as error:
        sys.stderr.write(f"evit train: {error}\n")
        sys.exit(error.status)
    except tuple(statuses) as error:
        sys.stderr.write(f"evit train: error: {error}\n")
        sys.exit(next(status for kind, status in statuses.items() if isinstance(error, kind)))
