"""The command `evit train`, which launchers start as `accelerate launch -m evit_training train RECIPE --flags`."""

from ..arguments import TrainArguments, parse_train_arguments
from ..screen import screen
from .errors import command


@command("train")
def main(argv: list[str]) -> None:
    """Train with the settings of a command line.

    Exit status: 0 done; 1 the end could not be saved, or a process that loads images died; 2 settings, data or
    checkpoints that cannot work; 3 the loss was not finite too often; 4 out of memory; 5 all is saved but the Hub did
    not take it; 143 and 130 stopped by SIGTERM and SIGINT, and saved.
    """
    arguments = parse_train_arguments(argv)
    resolve_models(arguments)
    from ..loop.trainer import train

    with screen(arguments.run.quiet, arguments.run.json):
        train(arguments)


def resolve_models(arguments: TrainArguments) -> None:
    """Replace the models that a run starts from or learns from by what `from_pretrained` takes.

    Raises: ValueError for one that is not there.
    """
    from ..learning.sources import resolve_model

    if arguments.model.model is not None:
        arguments.model.model = resolve_model(arguments.model.model, "--model")
    for name in ("oracle", "teacher"):
        source = getattr(arguments.teacher, name)
        if source not in (None, "initial"):
            setattr(arguments.teacher, name, resolve_model(source, f"--{name}"))
