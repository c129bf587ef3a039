"""What a study found: means over seeds, differences within seeds, a table and a figure."""

import functools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from evit_hf.towers import example_inputs

from ..learning.models import load_classifier
from ..measuring.evaluation import SCORE_TITLES, main_score
from ..measuring.machine import best_device, device_name
from ..measuring.metrics import standard_error
from ..measuring.timing import Variant, alternate
from .study import Claim, Run, Study


# 97.5 % quantiles of Student's t-distribution with 1, 2, ... degrees of freedom; beyond, the last one is nearly right.
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
TITLES = {"top1": "top-1 %", "micro_f1": "micro F1 %"}


@dataclass(frozen=True)
class Row:
    """A setting's result over its seeds.

    Args:
        setting: its name.
        metric: "top1", or "micro_f1" with several labels.
        scores: percent, by seed.
        mean: of the scores.
        standard_error: of the mean over seeds; None for one seed.
        difference: mean over seeds of the score less the baseline's with the same seed; None if they share none.
        difference_error: standard error of it; None for one seed.
        gmacs: of an image.
        images_per_second: median of alternating rounds, all settings in one process; None if it was not measured, as
            for models that are not kept.
        train_seconds: median of the runs; those that ran next to others took longer.
    """

    setting: str
    metric: str
    scores: dict[int, float]
    mean: float
    standard_error: float | None
    difference: float | None
    difference_error: float | None
    gmacs: float
    images_per_second: float | None
    train_seconds: float


def summarize(study: Study, runs: Sequence[Run], speeds: dict[str, float] | None = None) -> list[Row]:
    """The rows of the table, of the runs that are done.

    Args:
        study: see `Study`.
        runs: of it.
        speeds: images per second by setting, see `measure_speed`.
    """
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in study.settings}
    for run in runs:
        if run.is_done:
            results[run.setting][run.seed] = _result(run.folder)
    metric = next((main_score(one)[0] for by_seed in results.values() for one in by_seed.values()), "top1")
    scores = {name: {seed: 100 * one[metric] for seed, one in by_seed.items()} for name, by_seed in results.items()}
    baseline, rows = scores[study.baseline], []
    for name, by_seed in results.items():
        if not by_seed:
            continue
        pairs = [score - baseline[seed] for seed, score in scores[name].items() if seed in baseline]
        is_baseline = name == study.baseline
        rows.append(
            Row(
                setting=name,
                metric=metric,
                scores=scores[name],
                mean=statistics.fmean(scores[name].values()),
                standard_error=standard_error(list(scores[name].values())),
                difference=statistics.fmean(pairs) if pairs and not is_baseline else None,
                difference_error=None if is_baseline else standard_error(pairs),
                gmacs=next(iter(by_seed.values()))["gmacs"],
                images_per_second=(speeds or {}).get(name),
                train_seconds=statistics.median(one["seconds"] for one in by_seed.values()),
            )
        )
    return rows


def _result(folder: Path) -> dict[str, Any]:
    """Measurement of a run at the keep rate that it was trained for, with the seconds that it took."""
    own = json.loads((folder / "class_report.json").read_text("utf-8"))["keep_rate"]
    measured = json.loads((folder / "results.json").read_text("utf-8"))
    seconds = json.loads((folder / "run.json").read_text("utf-8"))["seconds"]
    return {**next(one for one in measured if one["keep_rate"] == own), "seconds": seconds}


@torch.no_grad()
def measure_speed(runs: Sequence[Run], batch_size: int, rounds: int = 11) -> dict[str, float]:
    """Speed of one model of each setting, all in one process and in turn.

    Args:
        runs: the first one of each setting that is done and has kept its model is taken.
        batch_size: images of a batch, of noise: the time does not depend on what they show.
        rounds: measured rounds, after two that warm up.

    Returns: images per second by setting.
    """
    device, variants = best_device(), list[Variant]()
    for run in runs:
        is_measured = any(run.setting == variant.name for variant in variants)
        folder = run.folder / "model"
        if not run.is_done or run.way is not None or is_measured or not folder.exists():
            continue
        model = load_classifier(str(folder)).eval()
        model.to(device)
        images = torch.randn_like(example_inputs(model, _result(run.folder)["image_size"], batch_size))
        variants.append(Variant(run.setting, functools.partial(model, images), 0, 0))
    seconds = alternate(variants, device, rounds)
    return {
        variant.name: batch_size / statistics.median(times) for variant, times in zip(variants, seconds, strict=True)
    }


def as_markdown(study: Study, rows: Sequence[Row], batch_size: int | None, command: str) -> str:
    """The table as a Markdown text, with what it takes to read it.

    Args:
        study: see `Study`.
        rows: see `summarize`.
        batch_size: of the measurement of speed, or None without one.
        command: that makes the table.
    """
    base = next((row for row in rows if row.setting == study.baseline), None)
    is_timed = any(row.images_per_second is not None for row in rows)
    columns = ["setting", "seeds", TITLES[rows[0].metric], f"less `{study.baseline}`, same seed", "GMACs"]
    columns += ["images/s", "training, s"] if is_timed else ["training, s"]
    lines = [
        *([study.about, ""] if study.about else []),
        f"```bash\n{command}\n```",
        "",
        _table_line(columns),
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = [row.setting, str(len(row.scores)), _with_error(row.mean, row.standard_error)]
        cells.append("" if row.difference is None else _with_error(row.difference, row.difference_error, "+"))
        cells.append(f"{row.gmacs:.4f}")
        if is_timed:
            cells.append(_speed(row, base))
        lines.append(_table_line([*cells, f"{row.train_seconds:.0f}"]))
    notes = (
        "After ± is one standard error over seeds; the differences are taken within seeds. Training: median seconds "
        "of a run, longer where others ran next to it."
    )
    if is_timed:
        notes += (
            f" Speed: {device_name(best_device())}, float32, batch {batch_size}, medians of 11 alternating rounds in "
            "one process."
        )
    lines += ["", notes, ""]
    verdicts = decide(study, rows)
    if verdicts:
        lines += ["| claim | compared | points | |", "|---|---|---|---|"]
        for verdict in verdicts:
            claim, points = verdict.claim, _with_error(verdict.difference, verdict.error, "+")
            than = claim.than + (f" - {claim.margin:g}" if claim.margin else "")
            lines.append(f"| {claim.text} | {claim.better} > {than} | {points} | {verdict.says} |")
        lines += [
            "",
            "Points: the one score less the other, within seeds. A claim is decided if the 95 % interval, of "
            "Student's t-distribution over seeds, is on one side of it; all seeds share their test images.",
            "",
        ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Verdict:
    """What a study says of a claim.

    Args:
        claim: see `Claim`.
        difference: mean over seeds of the one score less the other, in points.
        error: standard error of it; None for less than two seeds.
        says: "holds here" or "does not hold here", if the 95 % interval of Student's t-distribution is on one side of
            what is claimed, or else "not decidable at this size".
    """

    claim: Claim
    difference: float
    error: float | None
    says: str


def decide(study: Study, rows: Sequence[Row]) -> list[Verdict]:
    """What the rows say of the study's claims; those with a setting that has no run yet are left out."""
    scores, verdicts = {row.setting: row.scores for row in rows}, []
    for claim in study.claims:
        better, than = scores.get(claim.better, {}), scores.get(claim.than, {})
        pairs = [score - than[seed] for seed, score in better.items() if seed in than]
        if not pairs:
            continue
        difference, error, says = statistics.fmean(pairs), standard_error(pairs), "not decidable at this size"
        reach = math.inf if error is None else error * T_975[min(len(pairs) - 1, len(T_975)) - 1]
        if abs(difference + claim.margin) > reach:
            says = "holds here" if difference > -claim.margin else "does not hold here"
        verdicts.append(Verdict(claim, difference, error, says))
    return verdicts


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.2f}" + ("" if error is None else f" ± {error:.2f}")


def _speed(row: Row, base: Row | None) -> str:
    """Images per second, and how often the baseline's; "" where it was not measured."""
    if row.images_per_second is None:
        return ""
    times = ""
    if base is not None and base.images_per_second is not None:
        times = f" ({row.images_per_second / base.images_per_second:.2f}x)"
    return f"{row.images_per_second:.0f}{times}"


def _table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def as_json(study: Study, rows: Sequence[Row], batch_size: int | None) -> dict[str, Any]:
    """All numbers of the table."""
    return {
        "study": study.name,
        "baseline": study.baseline,
        "seeds": list(study.seeds),
        "device": device_name(best_device()),
        "torch": torch.__version__,
        "batch_size": batch_size,
        "rows": [asdict(row) for row in rows],
        "claims": [asdict(verdict) for verdict in decide(study, rows)],
    }


def draw(study: Study, rows: Sequence[Row], path: Path) -> None:
    """Draw differences to the baseline, and the score over operations and over measured time.

    Bars are one standard error over seeds. The first panel names the settings; colors and markers are those of all.
    """
    from matplotlib.figure import Figure

    xs = [("GMACs of an image", [row.gmacs for row in rows])]
    if any(row.images_per_second is not None for row in rows):
        xs.append(("milliseconds of an image, measured", [1000 / (row.images_per_second or math.nan) for row in rows]))
    figure = Figure(figsize=(5 + 4 * len(xs), max(4.5, 1.5 + 0.28 * len(rows))), layout="constrained")
    names, *panels = figure.subplots(1, 1 + len(xs))
    looks = [{"color": f"C{number % 10}", "marker": "os^D"[number // 10 % 4]} for number in range(len(rows))]
    for number, (row, look) in enumerate(zip(rows, looks, strict=True)):
        difference = 0.0 if row.setting == study.baseline else row.difference
        if difference is not None:
            names.errorbar(difference, number, xerr=row.difference_error, capsize=3, **look)
        for panel, (_, values) in zip(panels, xs, strict=True):
            panel.errorbar(_beside(values, number), row.mean, row.standard_error, capsize=3, elinewidth=0.8, **look)
    names.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    names.set_yticks(range(len(rows)), [row.setting for row in rows])
    names.invert_yaxis()
    names.set_xlabel(f"points less {study.baseline}, same seed", fontsize=12)
    for panel, (label, _) in zip(panels, xs, strict=True):
        panel.sharey(panels[0])
        panel.set_xlabel(label, fontsize=12)
        panel.set_ylabel(SCORE_TITLES[rows[0].metric], fontsize=12)
        panel.locator_params(axis="x", nbins=5)
    for panel in (names, *panels):
        panel.tick_params(labelsize=11)
        panel.grid(alpha=0.3)
        panel.margins(x=0.08)
    seeds = max(len(row.scores) for row in rows)
    figure.suptitle(f"{study.name}: mean of {seeds} seed{'s' * (seeds != 1)}, bars: 1 standard error", fontsize=12)
    figure.savefig(path, dpi=150)


def _beside(values: Sequence[float], number: int) -> float:
    """Where to draw one of the values: those that are nearly the same stand side by side. NaN for NaN."""
    known = [value for value in values if not math.isnan(value)]
    step = 0.012 * (max(known) - min(known))
    twins = [other for other, value in enumerate(values) if other == number or abs(value - values[number]) <= step]
    return values[number] + step * (twins.index(number) - (len(twins) - 1) / 2)
