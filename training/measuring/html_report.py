"""A report of visualized pictures in one HTML file that needs nothing else: no network, no fonts, no other files."""

import base64
import hashlib
import os
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evit_hf.drawing import HEAT, heat_overlay, macs_in_words, mask_overlay, percent
from evit_hf.visualization import View, Visualization


if TYPE_CHECKING:
    from PIL import Image


MAX_PIXELS = 640  # of the longer side of a picture in the report
SCRIPT = """
"use strict";
const shown = () => [...document.querySelectorAll("article")].filter((article) => article.offsetParent !== null);
let current = null;
document.addEventListener("focusin", (event) => { current = event.target.closest("article") ?? current; });
const go = (step) => {
  const articles = shown();
  const next = articles[Math.min(Math.max(articles.indexOf(current) + step, 0), articles.length - 1)];
  if (next) { next.focus({preventScroll: true}); next.scrollIntoView({block: "start"}); }
};
const themes = ["auto", "light", "dark"];
const keys = {
  1: () => document.getElementById("kept").click(),
  2: () => document.getElementById("attention").click(),
  3: () => document.getElementById("weights").click(),
  x: () => document.getElementById("differing").click(),
  t: () => {
    const now = themes.findIndex((theme) => document.getElementById(theme).checked);
    document.getElementById(themes[(now + 1) % 3]).click();
  },
  j: () => go(1),
  k: () => go(-1),
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
  keys[event.key]();
  event.preventDefault();
});
"""


def write_report(pictures: Iterable[Visualization], path: Path, title: str) -> None:
    """Write a report, picture by picture; a file of that name is replaced when all is written.

    Args:
        pictures: in order; taken one at a time.
        path: of the file.
        title: of the page.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    stream = environment.get_template("report.html.jinja").stream(
        title=title,
        pictures=_contexts(pictures),
        heat=", ".join(f"rgb{color}" for color in HEAT),
        script=SCRIPT,
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(stream)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _contexts(pictures: Iterable[Visualization]) -> Iterator[dict[str, Any]]:
    """What the template says about each picture."""
    for seen in pictures:
        width, height = seen.picture.size
        left, top, right, bottom = seen.box
        is_small = max(width, height) <= 160
        picture = seen.picture.copy()
        picture.thumbnail((MAX_PIXELS, MAX_PIXELS))
        first = seen.dense.answers[:1]
        differs = [bool(first) and view.answers[0][0] != first[0][0] for view in seen.views]
        yield {
            "name": seen.name,
            "source": _data_url(picture, "PNG" if is_small else "JPEG"),
            "is_small": is_small,
            "width": width,
            "height": height,
            "box": f"left: {100 * left / width:.3f}%; top: {100 * top / height:.3f}%; "
            f"width: {100 * (right - left) / width:.3f}%; height: {100 * (bottom - top) / height:.3f}%",
            "differs": any(differs),
            "views": [
                _view(view, seen.dense, d)
                for view, d in zip((seen.dense, *seen.views), (False, *differs), strict=True)
            ],
        }


def _view(view: View, dense: View, differs: bool) -> dict[str, Any]:
    cost = macs_in_words(view.macs)
    return {
        "name": view.name,
        "cost": cost if view is dense else f"{cost}, {percent(view.macs / dense.macs)} of dense",
        "answers": [(label, percent(score)) for label, score in view.answers],
        "differs": differs,
        "stages": [_stage(view, i) for i in range(len(view.trace.stages))],
    }


def _stage(view: View, i: int) -> dict[str, Any]:
    layer, attention, weights = view.trace.stages[i].layer, view.trace.attention(i)[0], view.trace.fused_weights(i)
    maps = {"kept": mask_overlay(view.trace.kept(i)[0]), "attention": heat_overlay(attention)}
    captions = {
        "kept": view.caption(i),
        "attention": (f"layer {layer}: largest {percent(float(attention.max()))}",),
        "weights": (f"layer {layer}: no fused token",),
    }
    if weights is not None:
        maps["weights"] = heat_overlay(weights[0])
        largest = percent(float(weights.max() / weights.sum().clamp(min=1e-12)))
        captions["weights"] = (f"layer {layer}: largest {largest} of the weights",)
    regions = view.regions() if i == len(view.trace.stages) - 1 else None
    if regions is not None:
        maps["weights"] = regions
        num_left = view.trace.stages[i].patches_left.shape[1]
        captions["weights"] = (f"layer {layer}: {num_left} tokens, coloured with the patches that they count",)
    return {"maps": {kind: _data_url(overlay, "PNG") for kind, overlay in maps.items()}, "captions": captions}


def _data_url(picture: "Image.Image", kind: str) -> str:
    file = BytesIO()
    picture.save(file, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
