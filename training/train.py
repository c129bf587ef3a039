"""Start the trainer: `accelerate launch -m evit_training.train RECIPE --flags`, the same as `evit train`."""

import sys
from collections.abc import Sequence

from .arguments import parse_train_arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the settings of a command line; what cannot work ends with one line and status 2."""
    arguments = parse_train_arguments(sys.argv[1:] if argv is None else argv)
    from huggingface_hub.errors import StrictDataclassError

    from .trainer import train  # behind the checks: it costs seconds to import

    try:
        train(arguments)
    except (ValueError, StrictDataclassError) as error:
        sys.stderr.write(f"evit train: error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
