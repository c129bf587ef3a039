"""Traffic with the Hugging Face Hub, what may go there, and the rules that a card must keep."""

import hashlib
import html
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import yaml

from .command import without_paths


TEMPLATES = Path(__file__).parent
REQUIRED_METADATA = ("license", "library_name", "pipeline_tag", "tags")
# What an unfilled template, or a value that was never there, leaves in a card.
BLANK_WORDS = r"\b(None|nan|TODO)\b|(More Information Needed)"
BLANKS = (r"\{\{", r"\{%", BLANK_WORDS, r"\|\s*\|[^\n]*\|$")
CARD = "README.md"

# All that is ever pushed, and the code that config.json names. Run folders hold more: checkpoints, pickles of other
# tools, tokens in `.env`.
ON_THE_HUB = (
    CARD,
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "arguments.yaml",
    "results.json",
    "class_report.json",
    "evaluation.json",
    "evaluation.png",
    "tradeoff.png",
    "kept_patches.png",
)
# These may name files of this machine.
WITH_PATHS = {"arguments.yaml": (yaml.safe_load, yaml.safe_dump), "evaluation.json": (json.loads, json.dumps)}
PASSING = {408, 412, 425, 429, 500, 502, 503, 504}
REASONS = {
    401: "no valid token: `hf auth login`, or set HF_TOKEN",
    403: "this token may not write there",
    404: "not found, or no right to see it",
}


class PushError(RuntimeError):
    """The Hub did not take a push."""

    status = 5


class FinalPushError(PushError):
    """The run is done and saved, but its last push failed."""


class _CardFailedError(Exception):
    """The card could not be written, for a reason of this machine."""


class CardUnreadableError(RuntimeError):
    """What came as the card is not what the Hub stores."""


# Cards


def render_card(template: str = "model_card_template.md", **values: Any) -> str:
    """Fill a card template.

    Args:
        template: name of a file in this folder.
        **values: one for each name in the template.

    Returns: the card, front matter included.

    Raises: jinja2.UndefinedError if a value is missing: the Hub's own renderer would leave a blank.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = plain_text
    return environment.get_template(template).render(**values)


def check_card(text: str) -> dict[str, Any]:
    """Refuse a card with a blank, or without the metadata that the Hub searches by.

    Args:
        text: the whole card; its blocks of code are not searched for blanks.

    Returns: the metadata.

    Raises: ValueError naming the line or the missing metadata.
    """
    metadata, body = split_card(text)
    if metadata is None:
        raise ValueError("The card has no front matter: it must begin with metadata between two lines of `---`.")
    missing = [name for name in REQUIRED_METADATA if not metadata.get(name)]
    if missing:
        raise ValueError(f"The card's metadata lacks {missing}.")
    for line in re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE).splitlines():
        for blank in BLANKS:
            if re.search(blank, line) and line.strip() != "| | |":
                raise ValueError(f"The card has a blank in the line: {line}")
    return metadata


def split_card(text: str) -> tuple[dict[str, Any] | None, str]:
    """Metadata and body of a card; None and the whole text if it has no front matter.

    Raises: ValueError if the metadata is not a YAML mapping.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    match = re.match(r"---\n(.*?)\n?---(?:\n(.*)|$)", text, re.DOTALL)
    if match is None:
        return None, text
    try:
        metadata = yaml.safe_load(match.group(1)) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        raise ValueError(f"The card's metadata is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"The card's metadata must be `name: value` lines, got a {type(metadata).__name__}.")
    return metadata, match.group(2) or ""


def plain_text(text: object) -> str:
    """Text from outside (a label, a file name) that means nothing to Markdown, HTML, a table or `check_card`.

    Args:
        text: anything with a string form.

    Returns: one line of at most 200 characters; those with a meaning are HTML entities, and so is the first letter of
        a class that is called "None".
    """
    line = "".join(character if character.isprintable() else " " for character in str(text))[:200]
    line = re.sub(r"([\\`*_{}\[\]()#!|~$])", lambda match: f"&#{ord(match.group(1))};", html.escape(line)).strip()
    line = re.sub(BLANK_WORDS, lambda match: f"&#{ord(match.group()[0])};{match.group()[1:]}", line)
    return line or "&quot;&quot;"


# Files


def export_folder(source: Path, destination: Path) -> list[str]:
    """Copy what belongs on the Hub, and nothing else, into a new folder.

    Args:
        source: a model folder, or a run folder with `model/` in it; files of both are taken, those of the run first.
        destination: deleted first if it exists.

    Returns: names of the files.

    Raises: ValueError if there is no model with safetensors weights, or a damaged one.
    """
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    folders = [folder for folder in (source / "model", source) if folder.is_dir()]
    for folder in folders:
        for pattern in [*ON_THE_HUB, *remote_code(folder)]:
            for path in folder.glob(pattern):
                if path.is_file() and not path.is_symlink():
                    shutil.copyfile(path, destination / path.name)
    for name in WITH_PATHS:
        _hide_paths(destination / name)
    names = sorted(path.name for path in destination.iterdir())
    has_weights = any(name.endswith(".safetensors") for name in names)
    if "config.json" not in names or not has_weights:
        shutil.rmtree(destination)
        raise ValueError(
            f"`{source}` holds no model: it needs config.json and model.safetensors, in itself or in `model/`."
        )
    damage = next(filter(None, map(_damage, sorted(destination.iterdir()))), None)
    if damage is not None:
        shutil.rmtree(destination)
        raise ValueError(f"The model in `{source}` is damaged: {damage}. Save or train it again.")
    return names


def _damage(path: Path) -> str | None:
    """What is wrong with the weights or the image processor of a model; None if nothing is found."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):
                return None
        if path.name == "preprocessor_config.json" and not isinstance(json.loads(path.read_bytes()), dict):
            return f"{path.name} is not an object in JSON"
    except (ValueError, SafetensorError) as error:
        return f"{path.name} cannot be read ({error})"
    return None


def remote_code(folder: Path) -> list[str]:
    """Names of the Python files for `trust_remote_code`: those that config.json names, and what they import.

    Args:
        folder: of a model; one without readable config.json has no such files.
    """
    try:
        classes = json.loads((folder / "config.json").read_text("utf-8"))["auto_map"].values()
        found = [f"{str(name).split('.')[0]}.py" for name in classes]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    for name in found:  # which grows meanwhile
        if re.fullmatch(r"\w+\.py", name) and (folder / name).is_file():
            imported = re.findall(r"^\s*from \.(\w+) import", (folder / name).read_text("utf-8"), re.MULTILINE)
            found += [f"{module}.py" for module in imported if f"{module}.py" not in found]
    return [name for name in dict.fromkeys(found) if re.fullmatch(r"\w+\.py", name)]


def _hide_paths(file: Path) -> None:
    """Replace paths of this machine in a settings file by names; a file that cannot be parsed is deleted."""
    load, dump = WITH_PATHS[file.name]
    options = {"sort_keys": False} if dump is yaml.safe_dump else {"indent": 2}
    try:
        file.write_text(dump(without_paths(load(file.read_text("utf-8"))), **options).rstrip() + "\n", "utf-8")
    except (OSError, ValueError, yaml.YAMLError):
        file.unlink(missing_ok=True)


# Traffic


class _Patience:
    """How long this process waits for the Hub: every answer that asks to try again later counts against a limit.

    Args:
        limit: seconds from the first such answer to the next good one.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.since: float | None = None
        self.num_requests: Counter[tuple[str, str]] = Counter()

    def on_request(self, request: Any) -> None:
        """Count the requests for an address."""
        self.num_requests[request.method, str(request.url)] += 1

    def on_response(self, response: Any) -> None:
        """Raise PushError if the Hub asks for more patience than there is."""
        if response.status_code not in PASSING:
            self.since = None
            return
        now, wait = time.monotonic(), seconds_to_wait(response.headers)
        self.since = now if self.since is None else self.since
        if now + wait - self.since > self.limit:
            asked = f" and asks to wait {wait:.0f} s" if wait else ""
            raise PushError(
                f"status {response.status_code}{asked}; the limit is {self.limit:.0f} s, which is `--timeout` times "
                "`--attempts`"
            )

    def has_repeated(self, error: BaseException) -> bool:
        """Whether huggingface_hub has itself repeated the request that failed."""
        for link in _chain(error):
            try:
                request = (getattr(link, "response", None) or link).request
            except (AttributeError, RuntimeError):  # httpx raises the latter where there is none
                continue
            return self.num_requests[request.method, str(request.url)] > 1
        return False


def _chain(error: BaseException) -> list[BaseException]:
    """An exception and those that it came from."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def seconds_to_wait(headers: Any) -> float:
    """Seconds that an answer asks to wait, in `Retry-After` (a number or a date) or in `RateLimit`; 0 by default."""
    waits = [0.0]
    after = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", after):
        waits.append(float(after))
    elif after:
        try:
            waits.append(parsedate_to_datetime(after).timestamp() - time.time())
        except (ValueError, OverflowError):
            pass
    limit = re.search(r";\s*r=(\d+).*?;\s*t=(\d+)", headers.get("ratelimit", ""))
    if limit and limit.group(1) == "0":
        waits.append(float(limit.group(2)))
    return max(waits)


@dataclass
class HubRepo:
    """A model repository on the Hub.

    Args:
        repo_id: "organization/name" or "user/name".
        private: whether a new repository is private; None is the Hub's default.
        revision: branch to push to; made if there is none.
        attempts: how often to try what may pass: no connection, a busy Hub, a branch that moved. What huggingface_hub
            repeats by itself is not repeated again.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    attempts: int = 5
    _patience: _Patience | None = field(default=None, init=False, repr=False)

    def limit_waiting(self, timeout: float) -> None:
        """Give the Hub client of this process time limits: by default it waits forever for a Hub that hangs.

        The client is shared by all code that uses huggingface_hub, so this is for processes that only push.

        Args:
            timeout: seconds without an answer after which a request has failed; times `attempts`, how long the Hub may
                ask to try again later.
        """
        from huggingface_hub import get_session, set_client_factory

        default = get_session()  # httpx, or since huggingface_hub 2 httpx2
        hooks = {name: list(functions) for name, functions in default.event_hooks.items()}
        self._patience = patience = _Patience(timeout * self.attempts)
        hooks["request"].append(patience.on_request)
        hooks["response"].append(patience.on_response)
        set_client_factory(
            lambda: type(default)(event_hooks=hooks, follow_redirects=default.follow_redirects, timeout=timeout)
        )

    def check_write_access(self) -> None:
        """Make sure that a push will be allowed; makes the repository if there is none.

        Raises: PushError saying what is missing.
        """
        from huggingface_hub import CommitOperationAdd

        def attempt() -> None:
            api = self._prepared()
            # The Hub asks for the right to write here, and nothing is uploaded: small files travel with the commit.
            probe = CommitOperationAdd(CARD, b"")
            api.preupload_lfs_files(self.repo_id, [probe], revision=self.revision)

        self._try(attempt)

    def push(
        self, folder: Path, message: str = "Upload EViT", card: Callable[[bytes | None], str | None] | None = None
    ) -> str:
        """Push an exported folder in one commit; files that did not change are not sent again.

        Args:
            folder: see `export_folder`.
            message: of the commit.
            card: gets the card that the Hub has, None if it has none, and returns the one to push, None to leave the
                Hub's as it is. If somebody edits that in the meantime, it is asked again.

        Returns: address of the commit.

        Raises: PushError with the last reason; nothing is pushed over a card that could not be read.
        """

        def attempt() -> str:
            api = self._prepared()
            parent = None
            if card is not None:
                there, parent = self._card(api)
                try:
                    text = card(there)
                except Exception as error:  # none of the Hub's
                    raise _CardFailedError from error
                (folder / CARD).unlink(missing_ok=True)
                if text is not None:
                    (folder / CARD).write_bytes(text.encode())
            commit = api.upload_folder(
                folder_path=folder,
                repo_id=self.repo_id,
                revision=self.revision,
                commit_message=message,
                parent_commit=parent,
            )
            return str(commit.commit_url)

        return self._try(attempt)

    def _prepared(self) -> Any:
        """Return a client, when repository and branch exist."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(self.repo_id, private=self.private, exist_ok=True)
        if self.revision not in (None, "main"):
            api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        return api

    def _card(self, api: Any) -> tuple[bytes | None, str | None]:
        """The card on the Hub, None if there is none, and the commit it is of.

        It is asked for in two ways and never taken from a cache: a page of a proxy, an empty or cut body, or an
        earlier state must not be mistaken for what people wrote.

        Raises: CardUnreadableError if the two answers disagree.
        """
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.repo_id, CARD, revision=self.revision, endpoint=api.endpoint)
        response = get_session().get(url, headers=build_hf_headers())
        content = None
        if response.status_code != 404 or response.headers.get("X-Error-Code") != "EntryNotFound":
            hf_raise_for_status(response)
            content = response.content
        known = [info.lfs.sha256 if info.lfs else info.blob_id for info in self._stored(api)]
        hashes = []
        if content is not None:
            blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            hashes = [blob, hashlib.sha256(content).hexdigest()]
        if bool(known) != (content is not None) or not set(known) <= set(hashes):
            raise CardUnreadableError("the card there could not be read, so it is not overwritten")
        return content, response.headers.get("X-Repo-Commit")

    def _stored(self, api: Any) -> list[Any]:
        """What the Hub knows of the card: nothing, or size and hash."""
        try:
            infos = api.get_paths_info(self.repo_id, [CARD], revision=self.revision)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CardUnreadableError("the Hub's answer about the card there makes no sense") from error
        return [info for info in infos if info.path == CARD]

    def _try(self, action: Callable[[], Any]) -> Any:
        """Result of an action; tried again, after longer and longer waits, if its failure may pass."""
        for number in range(1, self.attempts + 1):
            if self._patience is not None:
                self._patience.num_requests.clear()
            try:
                return action()
            except _CardFailedError as failed:
                raise (failed.__cause__ or failed) from None
            except Exception as error:
                is_final, reason, wait = diagnosis(error)
                is_final = is_final or (self._patience is not None and self._patience.has_repeated(error))
                if is_final or number == self.attempts:
                    tries = "" if is_final else f" {self.attempts} times"
                    raise PushError(f"The Hub refused `{self.repo_id}`{tries}: {reason}") from error
                time.sleep(max(wait, min(2.0**number * 0.25, 20.0)))
        raise AssertionError("unreachable")


def diagnosis(error: BaseException) -> tuple[bool, str, float]:
    """Whether trying again is of no use, the reason in one line, and the seconds that the Hub asks to wait."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, (PushError, CardUnreadableError)):
        return isinstance(error, PushError), str(error), 0.0
    for link in _chain(error):
        response = getattr(link, "response", None)
        status = getattr(response, "status_code", None)
        if status is not None:
            wait = seconds_to_wait(response.headers)
            return status not in PASSING, REASONS.get(status, f"status {status}"), wait
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    final = (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, FileNotFoundError)
    return isinstance(error, final), reason, 0.0


__all__ = [
    "FinalPushError",
    "HubRepo",
    "PushError",
    "check_card",
    "export_folder",
    "plain_text",
    "render_card",
    "split_card",
]
