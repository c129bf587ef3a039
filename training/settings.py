"""A setting: a dataclass field that knows its help text, what it accepts, and whether it changes the training.

A command is one or more dataclasses of settings. `FlagParser` makes a flag of each field: `keep_rate` is `--keep-rate`
(`--keep_rate` means the same). Only the standard library is imported, so that `--help` and usage errors are quick.
"""

import argparse
import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn


@dataclass(frozen=True)
class Accepted:
    """What a setting accepts. In a list, each item must be accepted; None always is.

    Args:
        words: completes "`--flag` must be ...".
        holds: the test of a value.
        way_out: a sentence for the end of the error.
    """

    words: str
    holds: Callable[[Any], bool]
    way_out: str = ""


AT_LEAST_ONE = Accepted("at least 1", lambda value: value >= 1)
LIMIT = Accepted("at least 1", lambda value: value >= 1, " Leave it out for no limit.")
NOT_NEGATIVE = Accepted("0 or more", lambda value: 0 <= value < float("inf"))
POSITIVE = Accepted("above 0", lambda value: 0 < value < float("inf"))
SHARE = Accepted("in [0, 1]", lambda value: 0 <= value <= 1)
YES = ("yes", "true", "t", "y", "1", "on")
NO = ("no", "false", "f", "n", "0", "off")
KEEP_RATE = Accepted("in (0, 1]", lambda value: 0 < value <= 1)
MACS_HELP = (
    "instead of a keep rate, for a model that was not trained to lose tokens: every layer gives up the same number of "
    "tokens, and each is counted by the kept one that it resembles most."
)


def setting(
    default: Any, text: str, accepts: Accepted | None = None, changes_training: bool = True, **metadata: Any
) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: its default.
        text: its help text.
        accepts: what it accepts beyond its type; None for everything.
        changes_training: whether a run that resumes with a different value would be a different training.
        **metadata: what a command wants to know besides, for example `only_for_training=True`.
    """
    metadata |= {"help": text, "accepts": accepts, "changes_training": changes_training}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def quiet_setting() -> Any:
    """The setting `--quiet`, which every command that measures or predicts takes."""
    return setting(False, "Print results and errors only: no notes, no bars.", changes_training=False)


def json_setting() -> Any:
    """The setting `--json`, which every command that measures or predicts takes."""
    return setting(
        False, "Print the result as JSON on standard output, all else on standard error.", changes_training=False
    )


def default_of(one: dataclasses.Field[Any]) -> Any:
    """Default of a setting."""
    return one.default if one.default_factory is dataclasses.MISSING else one.default_factory()


def macs_setting() -> Any:
    """The setting `macs` of a command that has a `keep_rate`, see `budget`."""
    return setting(
        None, f"Share of the dense model's operations, in (0, 1], {MACS_HELP}", KEEP_RATE, instead_of="keep_rate"
    )


def macs_list_setting(**metadata: Any) -> Any:
    """The setting `macs` of a command that has `keep_rates`.

    Args:
        **metadata: see `setting`.
    """
    text = f"Shares of the dense model's operations, in (0, 1], {MACS_HELP}"
    return setting(None, text, KEEP_RATE, instead_of="keep_rates", **metadata)


@dataclass(frozen=True, order=True)
class Macs:
    """A share of the dense model's operations, where there could be a keep rate.

    Args:
        share: in (0, 1].
    """

    share: float

    def __str__(self) -> str:
        """As a word."""
        return f"macs={self.share:g}"

    def __float__(self) -> float:
        """The share."""
        return self.share


def kept_of(arguments: Any) -> list[Any]:
    """What a command compares: its keep rates, or the dense model and the shares of operations.

    Args:
        arguments: settings with `keep_rates` and `macs`.
    """
    return arguments.keep_rates if arguments.macs is None else [1.0, *map(Macs, arguments.macs)]


def budget_of(keep_rate: Any) -> dict[str, Any]:
    """A keep rate, one for each layer, or a share of operations as keywords of `reorganize` and of a forward."""
    return {"macs": keep_rate.share} if isinstance(keep_rate, Macs) else {"keep_rate": keep_rate}


def budget_in_words(keep_rate: Any) -> str:
    """A keep rate, one for each layer, or a share of operations for titles and notes."""
    if isinstance(keep_rate, Macs):
        return str(keep_rate)
    return f"keep rate{'s' * isinstance(keep_rate, (list, tuple))} {rate_in_words(keep_rate)}"


def rate_in_words(keep_rate: Any) -> str:
    """The number of a keep rate, or those of all layers, with at most four digits."""
    if isinstance(keep_rate, (list, tuple)):
        return ", ".join(map(rate_in_words, keep_rate))
    return str(round(keep_rate, 4)) if isinstance(keep_rate, float) else str(keep_rate)


def budget(arguments: Any) -> dict[str, Any]:
    """What a command says of the tokens to keep, as keywords of `reorganize` and of a forward.

    Args:
        arguments: settings with `keep_rate`, a list of one number or of one for each layer, and `macs`.
    """
    rates = arguments.keep_rate
    return {"keep_rate": rates[0] if rates is not None and len(rates) == 1 else rates, "macs": arguments.macs}


def make_output_dir(folder: str | None) -> None:
    """Make the folder that `--output-dir` names before hours of work are spent on what would go there.

    Raises: ValueError if it cannot be.
    """
    try:
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`--output-dir {folder}` cannot be written: {error}.") from None


def check_new_folder(folder: str | Path) -> None:
    """Refuse a folder that holds something already, or cannot be one.

    Raises: ValueError.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"`{folder}` exists already: name a new folder.")


def flag(name: str) -> str:
    """A setting as it is written on a command line: `--keep-rate` for keep_rate."""
    return f"--{name.replace('_', '-')}"


def check_settings(part: Any) -> None:
    """Check all fields of a dataclass of settings.

    Raises: ValueError naming the first flag with a value that it does not accept.
    """
    for one in dataclasses.fields(part):
        accepts, value = one.metadata.get("accepts"), getattr(part, one.name)
        if accepts is None or value is None:
            continue
        for item in value if isinstance(value, list) else [value]:
            if not accepts.holds(item):
                raise ValueError(f"`{flag(one.name)}` must be {accepts.words}, got {item}.{accepts.way_out}")


def check_contradictions(part: type, given: Collection[str]) -> None:
    """Refuse a setting together with the one that it replaces.

    Args:
        part: dataclass of settings.
        given: names of the settings on the command line.

    Raises: ValueError naming both flags.
    """
    for one in dataclasses.fields(part):
        other = one.metadata.get("instead_of")
        if other is not None and {one.name, other} <= set(given):
            raise ValueError(f"`{flag(one.name)}` and `{flag(other)}` both say how much is kept: give one of them.")


def closest(word: str, known: Iterable[str], otherwise: str) -> str:
    """The way out for a word that is not known: the known one that looks like it, or `otherwise`."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean `{close[0]}`?" if close else otherwise


class _HelpFormatter(argparse.HelpFormatter):
    """Help with the default of each flag."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default, text = action.default, action.help or ""
        if default in (None, [], argparse.SUPPRESS) or default is False or not action.option_strings:
            return text
        shown = "yes" if default is True else " ".join(map(str, default if isinstance(default, list) else [default]))
        return f"{text} (default: {shown})".replace("%", "%%")


class FlagParser(argparse.ArgumentParser):
    """Parser of a command: positional arguments, and a flag for each field of dataclasses of settings.

    Args:
        word: of the command, for example "evaluate".
        parts: dataclasses of settings; the docstring of each is the title of its flags in the help.
        usage: of the command, without the flags that are seldom given.
        description: what the command does.
        leave_out: says of a field whether the command does without it; it then has its default.
        renamed: for flags of earlier versions, by name in hyphens: what to write instead.
        epilog: the end of the help.
    """

    def __init__(
        self,
        word: str,
        parts: Sequence[type],
        usage: str,
        description: str,
        leave_out: Callable[[dataclasses.Field[Any]], bool] = lambda field: False,
        renamed: dict[str, str] | None = None,
        epilog: str | None = None,
    ) -> None:
        super().__init__(
            prog=f"evit {word}",
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        # Before Python 3.14 `-1e-3` is taken for a flag, and `--learning-rate -1e-3` for one without a value.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|-inf$", re.IGNORECASE)
        self.parts, self.renamed = parts, renamed or {}
        self.source = ""  # file that the flags are of, for errors
        self.names: list[str] = []
        for part in parts:
            group = self.add_argument_group((part.__doc__ or "").split("\n")[0].rstrip("."))
            hints = typing.get_type_hints(part)
            for one in dataclasses.fields(part):
                if not leave_out(one):
                    self.names.append(one.name)
                    _add_flag(group, one, hints[one.name])

    def parse(self, argv: Sequence[str]) -> tuple[list[Any], argparse.Namespace, Collection[str]]:
        """Parse and check a command line.

        Returns: an object of each part, the positional arguments, and the names of the settings that were given.

        Raises: SystemExit with status 2 and one line on standard error, as argparse does.
        """
        positionals, flags = self.sorted_apart(argv)
        words = [*positionals, *flags]
        space, unknown = self.parse_known_args(words)
        if unknown:
            self.error(self._about_unknown(unknown[0]))
        given = {name for name in self.names if any(word.split("=")[0] in _spellings(name) for word in words)}
        objects = []
        for part in self.parts:
            names = [one.name for one in dataclasses.fields(part) if one.name in self.names]
            objects.append(part(**{name: getattr(space, name) for name in names}))
            for name in names:
                delattr(space, name)
            try:
                check_settings(objects[-1])
                check_contradictions(part, given)
            except ValueError as error:
                self.error(str(error))
        return objects, space, given

    def sorted_apart(self, argv: Sequence[str]) -> tuple[list[str], list[str]]:
        """The words of a command line that belong to no flag, and its flags with their values, in hyphens.

        So flags may come first: argparse would take FOLDER for the value of `--private` in `--private FOLDER NAME`.
        A flag that is not known has all words up to the next one.
        """
        positionals: list[str] = []
        flags: list[str] = []
        num_values = None  # that the last flag has taken, None where it takes no more
        for word in map(_with_hyphens, argv):
            if word.startswith("-") and not _is_number(word):
                flags.append(word)
                action, num_values = self._option_string_actions.get(word), None if "=" in word else 0
            elif num_values is not None and _takes(action, num_values, word):
                flags.append(word)
                num_values += 1
            else:
                positionals.append(word)
                num_values = None
        return positionals, flags

    def error(self, message: str) -> NoReturn:
        """End with one line and status 2."""
        source = f"`{self.source}`: " if self.source else ""
        sys.stderr.write(f"{self.prog}: error: {source}{message.removeprefix('argument ')}\n")
        sys.exit(2)

    def _about_unknown(self, word: str) -> str:
        name = word.split("=")[0]
        if not name.startswith("-"):
            return f"`{word}` is one word too many: see `{self.prog} --help`."
        if name.removeprefix("--no-").removeprefix("--") in self.renamed:
            return f"`{name}` is {self.renamed[name.removeprefix('--no-').removeprefix('--')]} now."
        known = [flag(name) for name in self.names]
        return f"unknown flag `{name}`: {closest(name, known, f'see `{self.prog} --help`.')}"


def _spellings(name: str) -> tuple[str, str]:
    return flag(name), flag(f"no_{name}")


def _with_hyphens(word: str) -> str:
    """A flag with hyphens for underscores; what follows `=` and what is not a flag stay as they are."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else word


def _add_flag(group: Any, one: dataclasses.Field[Any], hint: Any) -> None:
    """Add the flag of a field to a parser."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # of a type and None
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    default = default_of(one)
    keywords: dict[str, Any] = {"default": default, "help": one.metadata["help"].replace("%", "%%")}
    metavar = {int: "N", float: "X"}
    if typing.get_origin(hint) is Literal:
        keywords |= {"choices": typing.get_args(hint)}
    elif hint is bool:
        keywords |= {"type": _truth, "nargs": "?", "const": True, "metavar": "yes|no"}
    elif typing.get_origin(hint) is list:
        (kind,) = typing.get_args(hint)
        keywords |= {"type": kind, "nargs": "+", "metavar": metavar.get(kind, "WORD")}
    else:
        keywords |= {"type": hint, "metavar": metavar.get(hint, "WORD")}
    group.add_argument(flag(one.name), dest=one.name, **keywords)
    if hint is bool:
        group.add_argument(
            flag(f"no_{one.name}"), dest=one.name, action="store_false", default=default, help=argparse.SUPPRESS
        )


def _takes(action: argparse.Action | None, num_values: int, word: str) -> bool:
    """Whether a flag that has taken `num_values` words takes this one; one that is not known takes all."""
    if action is None:
        return True
    if action.nargs == "?":
        return not num_values and word.lower() in (*YES, *NO)
    if action.nargs == "+":
        return not num_values or action.type is str or _is_number(word)
    return action.nargs is None and not num_values


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _truth(word: str) -> bool:
    if word.lower() in YES:
        return True
    if word.lower() in NO:
        return False
    raise argparse.ArgumentTypeError(f"must be yes or no, got {word!r}")
