"""The command `evit push FOLDER ORG/NAME`: a model or a run on the Hub."""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..sharing.hub import PushError, export_folder, push_folder
from ..sharing.push import PUSH_FAILED, write_card


def parser() -> argparse.ArgumentParser:
    """Flags of `evit push`."""
    parser = argparse.ArgumentParser(
        prog="evit push",
        description="Push a model folder or a run folder to the Hugging Face Hub: weights, configuration, image "
        "processor, code for trust_remote_code, card and results, and nothing else that lies there.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="Model folder, or run folder with `model/` in it.")
    parser.add_argument("repo_id", help="ORG/NAME on the Hub; made if there is none.")
    parser.add_argument("--private", action="store_true", default=None, help="Make a new repository private.")
    parser.add_argument("--revision", help="Branch to push to; made if there is none.")
    parser.add_argument("--message", default="Upload EViT", help="Commit message.")
    parser.add_argument("--timeout", type=float, default=30.0, help="Seconds without an answer before a try failed.")
    parser.add_argument("--attempts", type=int, default=5, help="How often to try what may pass.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Push; status 2 for a folder without model, 5 if the Hub does not take it, with the command that tries again."""
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    arguments = parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "export"
        try:
            export_folder(arguments.folder, export)
            write_card(arguments.folder, export, arguments.repo_id, arguments.revision, arguments.timeout)
            url = push_folder(
                export,
                arguments.repo_id,
                private=arguments.private,
                revision=arguments.revision,
                message=arguments.message,
                timeout=arguments.timeout,
                attempts=arguments.attempts,
            )
        except ValueError as error:
            sys.stderr.write(f"evit push: error: {error}\n")
            sys.exit(2)
        except PushError as error:
            sys.stderr.write(f"evit push: error: {error}. To try again: evit push {shlex.join(argv)}\n")
            sys.exit(PUSH_FAILED)
    sys.stdout.write(f"Pushed to {url}\n")
