"""What a study found: means over seeds, differences within seeds, a table and a figure."""

import functools
import json
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
from .study import Run, Study


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
        images_per_second: median of alternating rounds, all settings in one process; None if it was not measured.
        train_seconds: mean of the runs; those that ran next to others took longer.
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
                train_seconds=statistics.fmean(one["seconds"] for one in by_seed.values()),
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
        runs: the first one of each setting that is done is taken.
        batch_size: images of a batch, of noise: the time does not depend on what they show.
        rounds: measured rounds, after two that warm up.

    Returns: images per second by setting.
    """
    device, variants = best_device(), list[Variant]()
    for run in runs:
        if not run.is_done or any(run.setting == variant.name for variant in variants):
            continue
        model = load_classifier(str(run.folder / "model")).eval()
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
    title = TITLES[rows[0].metric]
    lines = [
        *([study.about, ""] if study.about else []),
        f"```bash\n{command}\n```",
        "",
        f"| setting | seeds | {title} | less `{study.baseline}`, same seed | GMACs | images/s | training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed = "" if row.images_per_second is None else f"{row.images_per_second:.0f}"
        if row.images_per_second is not None and base is not None and base.images_per_second is not None:
            speed += f" ({row.images_per_second / base.images_per_second:.2f}x)"
        lines.append(
            f"| {row.setting} | {len(row.scores)} | {_with_error(row.mean, row.standard_error)} | "
            f"{'' if row.difference is None else _with_error(row.difference, row.difference_error, '+')} | "
            f"{row.gmacs:.4f} | {speed} | {row.train_seconds:.0f} |"
        )
    notes = "After ± is one standard error over seeds; the differences are taken within seeds."
    if batch_size is not None:
        notes += (
            f" Speed: {device_name(best_device())}, float32, batch {batch_size}, medians of 11 "
            "alternating rounds in one process. Training: seconds of a run, longer where others ran next to it."
        )
    return "\n".join([*lines, "", notes, ""])


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.2f}" + ("" if error is None else f" ± {error:.2f}")


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
    }


def draw(study: Study, rows: Sequence[Row], path: Path) -> None:
    """Draw the score over operations and over measured time, with one standard error over seeds."""
    from matplotlib.figure import Figure

    timed = all(row.images_per_second is not None for row in rows)
    figure = Figure(figsize=(11 if timed else 6, 4.5), layout="constrained")
    panels = figure.subplots(1, 1 + timed, squeeze=False, sharey=True)[0]
    xs = [("GMACs of an image", [row.gmacs for row in rows])]
    if timed:
        xs.append(("milliseconds of an image, measured", [1000 / (row.images_per_second or 1) for row in rows]))
    looks = [{"color": f"C{number % 10}", "marker": "os^D"[number // 10 % 4]} for number in range(len(rows))]
    for panel, (label, values) in zip(panels, xs, strict=True):
        for row, x, look in zip(rows, values, looks, strict=True):
            panel.errorbar(x, row.mean, row.standard_error, capsize=4, label=row.setting, **look)
        panel.set_xlabel(label, fontsize=12)
        panel.tick_params(labelsize=11)
        panel.grid(alpha=0.3)
        panel.margins(x=0.08, y=0.15)
        panel.locator_params(axis="x", nbins=5)
    panels[0].set_ylabel(SCORE_TITLES[rows[0].metric], fontsize=12)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=10)
    seeds = max(len(row.scores) for row in rows)
    figure.suptitle(f"{study.name}: mean of {seeds} seeds, bars: 1 standard error", fontsize=12)
    figure.savefig(path, dpi=150)
