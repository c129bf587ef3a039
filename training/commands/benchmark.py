"""The command `evit benchmark`: dense ViTs and EViT on any backend, in one process, checked before they are timed.

evit benchmark evit-deit-s --batch-sizes 1 8 --threads 1
evit benchmark evit-deit-s --training --batch-sizes 16
evit benchmark evit-deit-ti --schedule --keep-rates 0.7
evit benchmark FOLDER --tune 0.6 --dataset DATA
"""

import sys
from collections.abc import Sequence

from ..arguments import DataArguments
from ..measuring.benchmark import BenchmarkArguments, benchmark


def main(argv: Sequence[str] | None = None) -> None:
    """Benchmark with the settings of a command line; status 2 for what cannot work, 3 for a measurement that lies."""
    from transformers import HfArgumentParser

    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    parser = HfArgumentParser(
        (BenchmarkArguments, DataArguments),
        prog="evit benchmark",
        usage="evit benchmark MODEL [--keep-rates 1.0 0.7 0.5] [--batch-sizes 1 8] [--flag value ...]",
        description="Time EViT against dense ViTs. MODEL is a preset such as evit-deit-s, a folder or a Hub id.",
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", default="evit-deit-s", help="Preset, folder or Hub id.")
    arguments, data, rest = parser.parse_args_into_dataclasses(argv)
    from huggingface_hub.errors import StrictDataclassError

    from evit_hf.export import ExportError

    from ..measuring.timing import MeasurementError

    try:
        if arguments.tune is not None:
            from ..measuring.tuning import tune

            tune(rest.model, arguments, data)
        elif arguments.schedule:
            from ..measuring.schedule import benchmark_schedule

            benchmark_schedule(rest.model, arguments, argv)
        else:
            benchmark(rest.model, arguments, argv)
    except (ValueError, OSError, StrictDataclassError, ExportError) as error:
        sys.stderr.write(f"evit benchmark: error: {error}\n")
        sys.exit(2)
    except MeasurementError as error:
        sys.stderr.write(f"evit benchmark: error: {error}\n")
        sys.exit(3)
