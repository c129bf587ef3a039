"""The command `evit space MODEL DEST`: a Gradio demo of a model, ready to be pushed as a Space."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..sharing.space import write_space


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="evit space",
        description="Write a Gradio demo of a model as a Space of the Hugging Face Hub: upload a picture, move the "
        "keep rate, see the answer, the kept patches of each layer, GMACs and latency.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="Model folder or run folder, which is bundled, or Hub id, which is loaded.")
    parser.add_argument("dest", type=Path, help="Folder to write; it must not exist or be empty.")
    parser.add_argument("--title", help="Of the Space; by default the model's name.")
    parser.add_argument("--license", default="apache-2.0", help="Of the Space, as the Hub writes licences.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write a Space; what cannot work ends with one line and status 2."""
    arguments = parser().parse_args(argv)
    try:
        write_space(arguments.model, arguments.dest, arguments.title, arguments.license)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"evit space: error: {error}\n")
        sys.exit(2)
    sys.stdout.write(
        f"Saved in {arguments.dest}. Try it: cd {arguments.dest} && pip install gradio -r requirements.txt && python "
        f"app.py. Share it: hf upload ORG/NAME {arguments.dest} --repo-type space\n"
    )
