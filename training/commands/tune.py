"""The command `evit tune MODEL TARGET --dataset DATA`: layers and keep rates for a budget, without training."""

from ..arguments import DataArguments
from ..measuring.arguments import TuneArguments, parse_target
from ..screen import screen
from ..settings import FlagParser
from .errors import command


@command("tune")
def main(argv: list[str]) -> None:
    """Tune with the settings of a command line."""
    parser = FlagParser(
        "tune",
        [TuneArguments, DataArguments],
        usage="evit tune MODEL TARGET --dataset DATA [--save FOLDER] [--flag value ...]",
        description="Find layers and keep rates with which a model meets a budget. One that was not trained to lose "
        "tokens starts from the recipe of `macs=`, and is judged by how far its answers are from those of the dense "
        "model, on images without labels; others by their loss on labelled images. MODEL is a model folder, a run "
        "folder or a Hub id.",
        leave_out=lambda field: field.metadata.get("only_for_training", False),
    )
    parser.add_argument("model", help="Model folder, run folder or Hub id of an image classifier.")
    parser.add_argument("target", help="0.6 (share of the dense operations), 2.5gmacs, or 40ms for a batch.")
    (arguments, data), rest, _ = parser.parse(argv)
    parse_target(rest.target)
    from ..learning.sources import resolve_model

    model = resolve_model(rest.model)
    from ..measuring.tuning import tune

    with screen(arguments.quiet, arguments.json):
        tune(model, rest.target, arguments, data)
