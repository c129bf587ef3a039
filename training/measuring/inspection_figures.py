"""Figures of `evit inspect`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from evit_hf.drawing import GAP, below, beside, captioned, percent, text_line, with_margin
from evit_hf.visualization import PANEL, Visualization, shown_stages

from ..settings import Macs, budget_in_words
from .inspection import Inspection
from .metrics import binomial_standard_error


MAX_CLASSES = 20  # in the figure of survival by class


def draw_survival(found: Inspection, path: Path) -> None:
    """Draw how often each patch of the grid is kept: a row for each keep rate, a column for each layer drawn."""
    stages = shown_stages(len(found.layers))
    rows, columns = len(found.rates), len(stages)
    figure = Figure(figsize=(2.6 * columns + 1.2, 2.7 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, rate in zip(axes, found.rates, strict=True):
        for i, panel in zip(stages, row, strict=True):
            image = _show(panel, found, rate.kept_in_all[i] / found.num_images)
            kept = float(rate.num_kept[i]) / found.num_images
            panel.set_title(f"{budget_in_words(rate.keep_rate)}, layer {found.layers[i]}", fontsize=12)
            panel.set_xlabel(f"{kept:.0f} of {found.grid[0] * found.grid[1]} patches", fontsize=12)
    _color_bar(figure, image, axes)
    figure.set_layout_engine("constrained", hspace=0.06)
    figure.suptitle(f"Where patches survive ({found.num_images} images)", fontsize=14)
    figure.savefig(path, dpi=120)


def draw_survival_by_class(found: Inspection, path: Path) -> None:
    """Draw the same by class after the last layer, at the first keep rate.

    Of more than 20 classes it draws the 20 whose maps differ most from that of all images.
    """
    rate, counts = found.rates[0], found.class_counts()
    of_all = rate.kept_in_all[-1] / found.num_images
    numbers = counts.nonzero().flatten().tolist()
    maps = {number: rate.kept[-1, number] / counts[number] for number in numbers}
    farthest = sorted(numbers, key=lambda number: -float((maps[number] - of_all).abs().sum()))[:MAX_CLASSES]
    chosen = [number for number in numbers if number in farthest]
    columns = min(5, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.2 * columns + 1.2, 2.6 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, number in zip(axes.flat, chosen, strict=False):
        panel.set_axis_on()
        image = _show(panel, found, maps[number])
        name = found.label_names[number]
        panel.set_title(_plain(name if len(name) <= 18 else f"{name[:17]}…"), fontsize=12)
        panel.set_xlabel(f"{int(counts[number])} images", fontsize=11)
    _color_bar(figure, image, axes)
    which = "" if len(chosen) == len(numbers) else f", the {len(chosen)} of {len(numbers)} that differ most"
    title = f"By class after layer {found.layers[-1]} at {budget_in_words(rate.keep_rate)}{which}"
    figure.suptitle(title, fontsize=14)
    figure.savefig(path, dpi=120)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return " ".join(text.split()).replace("$", r"\$")


def _show(panel: Any, found: Inspection, shares: torch.Tensor) -> Any:
    panel.set(xticks=[], yticks=[])
    return panel.imshow(shares.view(found.grid).numpy(), vmin=0, vmax=1, cmap="inferno")


def _color_bar(figure: Any, image: Any, axes: Any) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0 %", "25 %", "50 %", "75 %", "100 %"], fontsize=11)
    bar.set_label("images in which the patch is kept", fontsize=12)


def draw_overlap(found: Inspection, path: Path) -> None:
    """Draw how much kept patches share with the dense model's attention, and with those of other keep rates."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = range(len(found.layers))
    for number, rate in enumerate(found.rates):
        shared = 100 * rate.shared_with_attention / found.num_images
        chance = 100 * rate.num_kept / found.num_images / (found.grid[0] * found.grid[1])
        left.plot(places, shared, marker="o", color=f"C{number}", label=budget_in_words(rate.keep_rate))
        left.plot(places, chance, linestyle=":", color=f"C{number}")
    left.plot([], [], color="gray", linestyle=":", label="as many by chance")
    words = [f"layer {layer}" if len(found.layers) < 6 else str(layer) for layer in found.layers]
    left.set_xticks(places, words, fontsize=11)
    left.set_xlabel("" if len(found.layers) < 6 else "layer", fontsize=12)
    left.set_ylim(0, 103)
    left.set_ylabel("% of kept patches", fontsize=12)
    left.set_title("Kept patches that the dense model attends to most", fontsize=12)
    left.grid(alpha=0.3)
    left.legend(fontsize=10)
    rates = [rate.keep_rate for rate in found.rates]
    shares = torch.eye(len(rates))
    for (a, b), sums in found.overlaps.items():
        i, j = rates.index(a), rates.index(b)
        shares[i, j] = shares[j, i] = sums[-1, 0] / found.num_images
    right.imshow(shares.numpy(), vmin=0, vmax=1, cmap="inferno")
    for i in range(len(rates)):
        for j in range(len(rates)):
            color = "black" if shares[i, j] > 0.6 else "white"
            right.text(j, i, percent(float(shares[i, j])), ha="center", va="center", color=color, fontsize=13)
    names = [f"{float(rate):g}" for rate in rates]
    right.set_xticks(range(len(rates)), names, fontsize=11)
    right.set_yticks(range(len(rates)), names, fontsize=11)
    right.set(xlabel=_axis(found), ylabel=_axis(found))
    right.set_title(f"Kept by both, of those kept by one or both (layer {found.layers[-1]})", fontsize=12)
    figure.savefig(path, dpi=120)


def _axis(found: Inspection) -> str:
    """What the numbers are that keep rates or shares of operations are shown by."""
    return "share of the dense model's MACs" if isinstance(found.rates[0].keep_rate, Macs) else "keep rate"


def draw_agreement(found: Inspection, path: Path) -> None:
    """Draw the share of answers that are those of the dense model, and of right answers, by keep rate."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    rates = sorted(found.rates, key=lambda rate: float(rate.keep_rate))
    shares = [found.agreement(rate) for rate in rates]
    places = [float(rate.keep_rate) for rate in rates]
    _with_errors(axes, places, shares, found.num_images, "same answer as dense")
    if found.knows_classes:
        right = [found.accuracy(rate.answers) or 0.0 for rate in rates] + [found.accuracy(found.dense) or 0.0]
        _with_errors(axes, [*places, 1.0], right, found.num_images, "right answer")
    axes.set_xlabel(f"{_axis(found)} (1.0 is dense)", fontsize=12)
    axes.set_ylabel("% of images", fontsize=12)
    axes.set_title(f"{found.num_images} images; bars: binomial standard error", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=11)
    figure.savefig(path, dpi=120)


def _with_errors(axes: Any, places: list[float], shares: list[float], num_images: int, label: str) -> None:
    errors = [100 * binomial_standard_error(share, num_images) for share in shares]
    axes.errorbar(places, [100 * share for share in shares], errors, marker="o", capsize=4, label=label)


def draw_most_different(seen: Sequence[tuple[str, Visualization]], path: Path) -> None:
    """Draw images on which answers differ most: the picture, and what is left of it after each layer.

    Args:
        seen: what to write over each, and the picture at one keep rate.
        path: of the PNG file.
    """
    rows = []
    for title, picture in seen:
        (view,) = picture.views
        answers = [
            f"{name}: {one.answers[0][0]} ({percent(one.answers[0][1])})"
            for name, one in (("dense", picture.dense), ("EViT", view))
        ]
        cells = [captioned(picture.overview(), answers, PANEL)]
        stages = shown_stages(len(view.trace.stages))
        cells += [captioned(picture.kept(view, i), view.caption(i), PANEL) for i in stages]
        row = beside(cells)
        rows += [text_line(title, row.width, 22), row]
    with_margin(below(rows, gap=GAP)).save(path)
