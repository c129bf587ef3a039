"""The command `evit push FOLDER ORG/NAME`: a model or a run on the Hub."""

import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..settings import AT_LEAST_ONE, POSITIVE, FlagParser, setting
from .errors import command


@dataclass
class PushArguments:
    """How to push."""

    private: bool = setting(False, "Make a new repository private.")
    revision: str | None = setting(None, "Branch to push to; made if there is none.")
    message: str = setting("Upload EViT", "Commit message.")
    timeout: float = setting(30.0, "Seconds without an answer after which a try has failed.", POSITIVE)
    attempts: int = setting(5, "How often to try what may pass.", AT_LEAST_ONE)


@command("push")
def main(argv: list[str]) -> None:
    """Push; status 2 for a folder without model, 5 if the Hub does not take it, with the command that tries again."""
    parser = FlagParser(
        "push",
        [PushArguments],
        usage="evit push FOLDER ORG/NAME [--flag value ...]",
        description="Push a model folder or a run folder to the Hugging Face Hub: weights, configuration, image "
        "processor, code for trust_remote_code, card and results, and nothing else that lies there.",
    )
    parser.add_argument("folder", type=Path, help="Model folder, or run folder with `model/` in it.")
    parser.add_argument("repo_id", help="ORG/NAME on the Hub; made if there is none.")
    (arguments,), rest, _ = parser.parse(argv)
    if not rest.folder.is_dir():
        raise ValueError(f"`FOLDER` must be a model folder or a run folder, and `{rest.folder}` is not a folder.")
    if rest.repo_id.count("/") != 1 or not all(rest.repo_id.split("/")):
        raise ValueError(
            f"The repository must be named ORG/NAME, where ORG may be your user name: got `{rest.repo_id}`."
        )
    from ..sharing.hub import PushError, export_folder, push_folder
    from ..sharing.push import write_card

    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "export"
        export_folder(rest.folder, export)
        try:
            write_card(rest.folder, export, rest.repo_id, arguments.revision, arguments.timeout)
            url = push_folder(
                export,
                rest.repo_id,
                private=arguments.private or None,
                revision=arguments.revision,
                message=arguments.message,
                timeout=arguments.timeout,
                attempts=arguments.attempts,
            )
        except PushError as error:
            raise PushError(f"{error}. To try again: evit push {shlex.join(argv)}") from None
    print(f"Pushed to {url}")
