"""The command `evit space MODEL DEST`: a Gradio demo of a model, ready to be pushed as a Space."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from ..settings import FlagParser, setting
from .errors import command


@dataclass
class SpaceArguments:
    """What the Space says of itself."""

    title: str | None = setting(None, "Of the Space; by default the model's name.")
    license: str = setting("apache-2.0", "Of the Space, as the Hub writes licences.")
    examples: list[str] = setting([], "Pictures to offer for a click; none by default.")


@command("space")
def main(argv: list[str]) -> None:
    """Write a Space."""
    parser = FlagParser(
        "space",
        [SpaceArguments],
        usage="evit space MODEL DEST [--title TITLE] [--examples PICTURE ...]",
        description="Write a Gradio demo of a model as a Space of the Hugging Face Hub: upload a picture, move the "
        "keep rate, see the answer next to the dense model's, the kept patches and the attention of each layer, GMACs "
        "and latency.",
    )
    parser.add_argument("model", help="Model folder or run folder, which is bundled, or Hub id, which is loaded.")
    parser.add_argument("dest", type=Path, help="Folder to write; it must not exist or be empty.")
    (arguments,), rest, _ = parser.parse(argv)
    from ..learning.sources import resolve_model

    model = resolve_model(rest.model, asks_the_hub=False)
    from ..sharing.space import write_space

    # Of a run the whole folder: its results and pictures belong to the Space too.
    source = rest.model if Path(rest.model).is_dir() else model
    write_space(source, rest.dest, arguments.title, arguments.license, arguments.examples)
    dest = shlex.quote(str(rest.dest))
    print(
        f"Saved in {rest.dest}. Try it: cd {dest} && pip install gradio -r requirements.txt && python app.py. "
        f"Share it: hf upload ORG/NAME {dest} --repo-type space"
    )
