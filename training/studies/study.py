"""What a study compares: its file, and the runs that it takes."""

import contextlib
import io
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import packaged_file, parse_train_arguments, read_mapping
from ..settings import closest


STUDIES = Path(__file__).parent
FIELDS = ("about", "train", "seeds", "baseline", "settings", "ways", "claims")
# Set by the study, for each run.
OWN_FLAGS = ("--seed", "--output-dir", "--resume", "--overwrite", "--json", "--quiet")
# Of `comparisons.replacements`, which needs torch.
WAYS = ("ToMe", "without novelty", "attention received", "random", "lowest attention")
_CLAIM = re.compile(r"(?P<better>.+?) > (?P<than>.+?)(?: - (?P<margin>[\d.]+))?")
_STARTS_FROM = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Study:
    """Settings to train, each with all seeds.

    Args:
        name: of the file, without `.yaml`.
        about: what the study asks, a sentence or two.
        train: words of `evit train` for all runs, a recipe's name first if there is one.
        seeds: of each setting.
        settings: name and further words of each. `{NAME}` in them is the model that the setting NAME, an earlier one,
            trained with the same seed.
        baseline: name of the setting that the others are compared with.
        ways: of settings that choose or merge tokens as no model's setting says; see `comparisons.replacements`. Their
            models are not kept.
        claims: that the study decides.
    """

    name: str
    about: str
    train: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, tuple[str, ...]]
    baseline: str
    ways: Mapping[str, str] = field(default_factory=dict)
    claims: tuple["Claim", ...] = ()

    def runs(self, output_dir: Path) -> list["Run"]:
        """All runs, first those of the first seed, each after those whose models it starts from."""
        return [self.run(name, seed, output_dir) for seed in self.seeds for name in self.settings]

    def run(self, setting: str, seed: int, output_dir: Path) -> "Run":
        """The run of a setting with a seed."""
        folder = _folder(setting, seed, output_dir)
        words = [*self.train, *self.settings[setting]]
        needs = sorted({name for word in words for name in _STARTS_FROM.findall(word)})
        models = {name: str(_folder(name, seed, output_dir) / "model") for name in needs}
        words = [_STARTS_FROM.sub(lambda match: models[match[1]], word) for word in words]
        words += ["--seed", str(seed), "--output-dir", str(folder)]
        return Run(setting, seed, folder, tuple(words), tuple(needs), self.ways.get(setting))


@dataclass(frozen=True)
class Claim:
    """That one setting scores higher than a different one.

    Args:
        text: what is claimed, in words.
        better: name of a setting.
        than: name of the other.
        margin: points by which it may fall short.
    """

    text: str
    better: str
    than: str
    margin: float = 0.0


@dataclass(frozen=True)
class Run:
    """One setting with one seed.

    Args:
        setting: its name.
        seed: of data order, augmentation and initial weights.
        folder: that the run writes.
        words: of `evit train`.
        needs: settings whose model of the same seed it starts from or learns from.
        way: that chooses or merges tokens, see `Study`.
    """

    setting: str
    seed: int
    folder: Path
    words: tuple[str, ...]
    needs: tuple[str, ...]
    way: str | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.setting}, seed {self.seed}"

    def starts_from(self, other: "Run") -> bool:
        """Whether it needs the model of the other run."""
        return other.setting in self.needs and other.seed == self.seed

    @property
    def is_done(self) -> bool:
        """Whether it ran to its end: results.json is among the last files that a run writes."""
        return (self.folder / "results.json").exists()


def read_study(name_or_path: str, train: Sequence[str] = ()) -> Study:
    """Read a study and check every setting as `evit train` would, before anything is trained.

    Args:
        name_or_path: a YAML file, or the name of a packaged study.
        train: further words of `evit train` for all runs.

    Raises: ValueError naming the file, the field and what it accepts.
    """
    path = packaged_file(name_or_path, STUDIES, "study")
    fields, _ = read_mapping(path, "study")
    for name in fields:
        if name not in FIELDS:
            way_out = closest(str(name), FIELDS, f"a study has {', '.join(FIELDS)}.")
            raise ValueError(f"`{path}` has an unknown field `{name}`: {way_out}")
    study = _study(path, fields, train)
    for setting in study.settings:
        _check_run(path, study, study.run(setting, study.seeds[0], Path("runs") / study.name))
    return study


def _study(path: Path, fields: dict[str, Any], further: Sequence[str]) -> Study:
    seeds, settings = fields.get("seeds", [0]), fields.get("settings")
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ValueError(f"`{path}`: `seeds` must be a list of numbers, 0 or more, got {seeds!r}.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"`{path}`: `seeds` must be different numbers, got {seeds!r}.")
    if not isinstance(settings, dict) or not settings:
        raise ValueError(f"`{path}`: `settings` must be `name: flags of evit train` lines, got {settings!r}.")
    for name, flags in {"train": fields.get("train"), **settings}.items():
        if not isinstance(flags, (str, type(None))):
            raise ValueError(f"`{path}`: `{name}` must be flags as on a command line, got {flags!r}.")
    words = {str(name): tuple(shlex.split(flags or "")) for name, flags in settings.items()}
    folders = {_slug(name): name for name in words}
    if len(folders) < len(words):
        twin = next(name for name in words if folders[_slug(name)] != name)
        raise ValueError(
            f"`{path}`: `{twin}` and `{folders[_slug(twin)]}` need names that differ in a letter or digit."
        )
    baseline = str(fields.get("baseline", next(iter(words))))
    if baseline not in words:
        raise ValueError(f"`{path}`: `baseline` must be one of {', '.join(words)}, got {baseline!r}.")
    train = (*shlex.split(fields.get("train") or ""), *further)
    ways, claims = _pairs(path, fields, "ways"), _pairs(path, fields, "claims")
    for name, way in ways.items():
        if name not in words or way not in WAYS:
            raise ValueError(
                f"`{path}`: `ways` are `setting: way` lines, with one of the settings and of the ways "
                f"{', '.join(WAYS)}; got `{name}: {way}`."
            )
    return Study(
        path.stem,
        str(fields.get("about", "")).strip(),
        train,
        tuple(seeds),
        words,
        baseline,
        ways,
        _claims(path, claims, words),
    )


def _pairs(path: Path, fields: dict[str, Any], name: str) -> dict[str, str]:
    pairs = fields.get(name) or {}
    if not isinstance(pairs, dict):
        raise ValueError(f"`{path}`: `{name}` must be `name: text` lines, got {pairs!r}.")
    return {str(key): str(value) for key, value in pairs.items()}


def _claims(path: Path, claims: Mapping[str, str], settings: Collection[str]) -> tuple[Claim, ...]:
    found = []
    for text, comparison in claims.items():
        match = _CLAIM.fullmatch(comparison)
        if match is None or match["better"] not in settings or match["than"] not in settings:
            raise ValueError(
                f"`{path}`: a claim is `text: SETTING > SETTING`, or `text: SETTING > SETTING - POINTS`, with two of "
                f"{', '.join(settings)}; got {comparison!r}."
            )
        found.append(Claim(text, match["better"], match["than"], float(match["margin"] or 0)))
    return tuple(found)


def _check_run(path: Path, study: Study, run: Run) -> None:
    earlier = list(study.settings)[: list(study.settings).index(run.setting)]
    for name in run.needs:
        if name not in earlier:
            raise ValueError(f"`{path}`: `{run.setting}` starts from `{{{name}}}`, which is no setting above it.")
        if name in study.ways:
            raise ValueError(f"`{path}`: `{run.setting}` starts from `{{{name}}}`, whose models `ways` does not keep.")
    for word in (*study.train, *study.settings[run.setting]):
        if word.split("=")[0].replace("_", "-") in OWN_FLAGS:
            raise ValueError(f"`{path}`: `{word}` of `{run.setting}` is set by the study: leave it out.")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse_train_arguments(list(run.words))
    except (ValueError, SystemExit) as error:
        problem = said.getvalue().removeprefix("evit train: error:") if isinstance(error, SystemExit) else str(error)
        raise ValueError(f"`{path}`: setting `{run.setting}`: {problem.strip()}") from None


def _slug(setting: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", setting.casefold()).strip("-.") or "setting"


def _folder(setting: str, seed: int, output_dir: Path) -> Path:
    return output_dir / _slug(setting) / f"seed-{seed}"
