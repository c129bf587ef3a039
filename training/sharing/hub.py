"""Sharing: render and check model cards, collect what belongs on the Hub, push it there."""

import html
import re
import shutil
import time
from pathlib import Path
from typing import Any

import yaml


TEMPLATE = Path(__file__).with_name("model_card_template.md")
REQUIRED_METADATA = ("license", "library_name", "pipeline_tag", "tags")
# What an unfilled template, or a value that was never there, leaves behind.
BLANKS = (r"\{\{", r"\{%", r"\bNone\b", r"\bnan\b", r"\bTODO\b", "More Information Needed", r"\|\s*\|[^\n]*\|$")


# All that is ever pushed. Run folders hold more: checkpoints, pickles of other tools, tokens in `.env`.
ON_THE_HUB = (
    "README.md",
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "configuration_evit.py",
    "configuration_evit_lv.py",
    "linear.py",
    "modeling_evit.py",
    "modeling_evit_lv.py",
    "pictures.py",
    "token_labelling.py",
    "token_reorganization.py",
    "arguments.yaml",
    "results.json",
    "class_report.json",
    "evaluation.json",
    "evaluation.png",
    "tradeoff.png",
    "kept_patches.png",
)
TRANSIENT = {408, 412, 425, 429, 500, 502, 503, 504}


class PushError(RuntimeError):
    """The Hub did not take a push."""

    status = 5


def render_card(template: Path = TEMPLATE, **values: Any) -> str:
    """Fill a card template.

    Args:
        template: file with Jinja's placeholders.
        **values: one for each name in the template, `model_card_template.md` by default.

    Returns: the card, front matter included.

    Raises: jinja2.UndefinedError if a value is missing: the Hub's own renderer would leave a blank.
    """
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["plain"] = plain_text
    return environment.from_string(template.read_text()).render(**values)


def check_card(text: str) -> dict[str, Any]:
    """Refuse a card with a blank, or without the metadata that the Hub searches by.

    Args:
        text: the whole card.

    Returns: the metadata.

    Raises: ValueError naming the line or the missing metadata.
    """
    match = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    if match is None:
        raise ValueError("The card has no front matter: it must begin with metadata between two lines of `---`.")
    try:
        metadata = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        raise ValueError(f"The card's metadata is no YAML: {error}") from None
    missing = [name for name in REQUIRED_METADATA if not (metadata or {}).get(name)]
    if missing:
        raise ValueError(f"The card's metadata lacks {missing}.")
    for line in match.group(2).splitlines():
        for blank in BLANKS:
            if re.search(blank, line) and line.strip() != "| | |":
                raise ValueError(f"The card has a blank in the line: {line}")
    return metadata


def plain_text(text: object) -> str:
    """Text from outside (a label, a file name) that means nothing to Markdown, HTML or a table.

    Args:
        text: anything with a string form.

    Returns: one line of at most 200 characters.
    """
    line = "".join(character if character.isprintable() else " " for character in str(text))[:200]
    return re.sub(r"([\\`*_{}\[\]()#!|~$])", lambda match: f"&#{ord(match.group(1))};", html.escape(line)).strip()


def export_folder(source: Path, destination: Path) -> list[str]:
    """Copy what belongs on the Hub, and nothing else, into a new folder.

    Args:
        source: a model folder, or a run folder with `model/` in it; files of both are taken, those of the run first.
        destination: made anew.

    Returns: names of the files.

    Raises: ValueError if there is no model with safetensors weights.
    """
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    folders = [folder for folder in (source / "model", source) if folder.is_dir()]
    for folder in folders:
        for pattern in ON_THE_HUB:
            for path in folder.glob(pattern):
                if path.is_file() and not path.is_symlink():
                    shutil.copyfile(path, destination / path.name)
    names = sorted(path.name for path in destination.iterdir())
    has_weights = any(name.endswith(".safetensors") for name in names)
    if "config.json" not in names or not has_weights:
        shutil.rmtree(destination)
        raise ValueError(
            f"`{source}` holds no model: it needs config.json and model.safetensors, in itself or in `model/`."
        )
    return names


def check_write_access(repo_id: str, private: bool | None = None, revision: str | None = None) -> None:
    """Make sure, before hours of training, that a push will be allowed; creates the repository if there is none.

    Args:
        repo_id: "name" or "organization/name".
        private: of a new repository.
        revision: branch to push to; created if there is none.

    Raises: PushError saying what is missing.
    """
    from huggingface_hub import CommitOperationAdd

    def attempt() -> None:
        api = _api()
        _prepare_repo(api, repo_id, private, revision)
        # The Hub asks for the right to write here, and nothing is uploaded: small files travel with the commit.
        probe = CommitOperationAdd("README.md", b"")
        api.preupload_lfs_files(repo_id, [probe], revision=revision)

    _try(attempt, repo_id, attempts=3)


def card_on_the_hub(repo_id: str, revision: str | None = None, timeout: float = 30.0) -> str | None:
    """The card that a repository has now, where a person may have added to it; None if there is none.

    Raises: PushError if the Hub does not answer.
    """
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    def attempt() -> str | None:
        try:
            path = _api(timeout).hf_hub_download(repo_id, "README.md", revision=revision)
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
        return Path(path).read_text()

    return _try(attempt, repo_id, attempts=3)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload EViT",
    timeout: float = 30.0,
    attempts: int = 5,
) -> str:
    """Push an exported folder in one commit; files that did not change are not sent again.

    Args:
        folder: see `export_folder`.
        repo_id: "name" or "organization/name".
        private: of a new repository.
        revision: branch; created if there is none.
        message: of the commit.
        timeout: seconds without an answer after which a request has failed.
        attempts: how often to try what may pass: no connection, a busy Hub, a branch that moved.

    Returns: address of the commit.

    Raises: PushError with the last reason.
    """

    def attempt() -> str:
        api = _api(timeout)
        _prepare_repo(api, repo_id, private, revision)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            revision=revision,
            commit_message=message,
            allow_patterns=list(ON_THE_HUB),
        )
        return str(commit.commit_url)

    return _try(attempt, repo_id, attempts)


def _api(timeout: float = 30.0) -> Any:
    """Client with a time limit: the library's own waits for a hung Hub for ever."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import get_session

    get_session().timeout = timeout
    return HfApi()


def _prepare_repo(api: Any, repo_id: str, private: bool | None, revision: str | None) -> None:
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision not in (None, "main"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _try(action: Any, repo_id: str, attempts: int) -> Any:
    """Result of an action; tried again, after longer and longer waits, if its failure may pass."""
    for number in range(attempts):
        try:
            return action()
        except Exception as error:
            is_final, reason = _diagnosis(error)
            if is_final or number + 1 == attempts:
                tries = "" if is_final else f" {attempts} times"
                raise PushError(f"The Hub refused `{repo_id}`{tries}: {reason}") from error
            time.sleep(min(2.0**number * 0.5, 20.0))
    raise AssertionError("unreachable")


def _diagnosis(error: BaseException) -> tuple[bool, str]:
    """Whether trying again is of no use, and the reason in one line."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for link in chain:
        status = getattr(getattr(link, "response", None), "status_code", None)
        if status is not None:
            hints = {
                401: "no valid token: `hf auth login`, or set HF_TOKEN",
                403: "this token may not write there",
                404: "not found, or no right to see it",
            }
            return status not in TRANSIENT, hints.get(status, f"status {status}")
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return isinstance(error, (HFValidationError, LocalTokenNotFoundError, FileNotFoundError)), reason


__all__ = [
    "PushError",
    "card_on_the_hub",
    "check_card",
    "check_write_access",
    "export_folder",
    "plain_text",
    "push_folder",
    "render_card",
]
