"""The command `evit benchmark`: dense ViTs and EViT on any backend, in one process, checked before they are timed.

evit benchmark evit-deit-s --batch-sizes 1 8 --threads 1
evit benchmark evit-deit-s --training --batch-sizes 16
evit benchmark evit-deit-ti --schedule --keep-rates 0.7
"""

from ..measuring.arguments import BenchmarkArguments
from ..screen import screen
from ..settings import FlagParser
from .errors import command


@command("benchmark")
def main(argv: list[str]) -> None:
    """Benchmark with the settings of a command line; status 3 for a measurement that cannot be true."""
    parser = FlagParser(
        "benchmark",
        [BenchmarkArguments],
        usage="evit benchmark MODEL [--keep-rates 1.0 0.7 0.5 | --macs 0.66] [--batch-sizes 1 8] [--flag value ...]",
        description="Time EViT against dense ViTs. MODEL is a preset such as evit-deit-s (`evit presets` lists them), "
        "a model folder, a run folder or a Hub id.",
        renamed={
            "tune": "the command `evit tune MODEL TARGET`",
            "fuse": "`--inattentive-tokens dropped`",
        },
    )
    parser.add_argument("model", nargs="?", default="evit-deit-s", help="Preset, model folder, run folder or Hub id.")
    (arguments,), rest, given = parser.parse(argv)
    arguments.check_mode(given)
    from ..learning.sources import resolve_model

    model = resolve_model(rest.model, takes_presets=True)
    with screen(arguments.quiet, arguments.json):
        if arguments.schedule:
            from ..measuring.schedule import benchmark_schedule

            benchmark_schedule(model, arguments, argv)
        else:
            from ..measuring.benchmark import benchmark

            benchmark(model, arguments, argv)
