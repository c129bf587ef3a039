"""The command `evit push FOLDER ORG/NAME`: a model or a run on the Hub."""

import shlex
import sys
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
    timeout: float = setting(30.0, "Seconds without an answer after which a request has failed.", POSITIVE)
    attempts: int = setting(
        5,
        "How often to try what may pass; the Hub may ask to wait `--timeout` times `--attempts` seconds in all.",
        AT_LEAST_ONE,
    )
    check: bool = setting(False, "Only make sure that a push will be allowed; FOLDER is not read.")


@command("push")
def main(argv: list[str]) -> None:
    """Push; status 2 for a folder without model, 5 if the Hub does not take it, with the command that tries again."""
    parser = FlagParser(
        "push",
        [PushArguments],
        usage="evit push FOLDER ORG/NAME [--flag value ...]",
        description="Push a model folder or a run folder to the Hugging Face Hub: weights, configuration, image "
        "processor, code for trust_remote_code, card and results, and nothing else.",
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
    from ..sharing.card import card_to_push
    from ..sharing.hub import HubRepo, PushError, export_folder

    repo = HubRepo(rest.repo_id, arguments.private or None, arguments.revision, arguments.attempts)
    said = None

    def card(there: bytes | None) -> str | None:
        nonlocal said
        text, said = card_to_push(rest.folder, export, repo.repo_id, there)
        return text

    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "export"
        if not arguments.check:
            export_folder(rest.folder, export)
        repo.limit_waiting(arguments.timeout)
        try:
            if arguments.check:
                repo.check_write_access()
                return
            url = repo.push(export, arguments.message, card)
        except PushError as error:
            raise PushError(f"{error}. To try again: evit push {shlex.join(argv)}") from None
    if said:
        sys.stderr.write(f"{said}\n")
    print(f"Pushed to {url}")
