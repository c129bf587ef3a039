"""Pictures put together from pictures and text, with Pillow only: what `visualization` draws with."""

import functools
import importlib.util
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from PIL import Image


INK, FAINT, PAPER = (28, 28, 32), (100, 100, 108), (255, 255, 255)
GONE = (115, 158, 217)  # a blue that is rare in photographs and absent from grey pictures
# Of heat maps, from 0 to the largest value: it brightens in grey too, and can be told apart with any colour vision.
HEAT = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
GAP, TEXT = 12, 18  # pixels


def mask_overlay(kept: torch.Tensor) -> "Image.Image":
    """A picture of one pixel for each patch, to be laid over another: clear where the patch was kept.

    Args:
        kept: (rows, columns), bool.
    """
    alpha = torch.where(kept.cpu(), 0, 226).unsqueeze(2)
    return _from_pixels(torch.cat((torch.tensor(GONE).expand(*kept.shape, 3), alpha), dim=2))


def heat_overlay(values: torch.Tensor, opacity: float = 0.78) -> "Image.Image":
    """A picture of one pixel for each patch, to be laid over another: black at 0, light yellow at the largest value.

    Args:
        values: (rows, columns), 0 or more.
        opacity: in [0, 1].
    """
    values = values.detach().float().cpu()
    steps = values / values.max().clamp(min=torch.finfo(torch.float32).tiny) * (len(HEAT) - 1)
    colors, low = torch.tensor(HEAT, dtype=torch.float32), steps.floor().long().clamp(0, len(HEAT) - 2)
    color = torch.lerp(colors[low], colors[low + 1], (steps - low).unsqueeze(2))
    return _from_pixels(torch.cat((color, torch.full((*values.shape, 1), 255 * opacity)), dim=2))


def region_overlay(counted_by: torch.Tensor, kept: torch.Tensor) -> "Image.Image":
    """A picture of one pixel for each patch, to be laid over another: a colour for each region, thin on kept patches.

    Args:
        counted_by: (rows, columns), number of the region that each patch belongs to.
        kept: (rows, columns), bool: the patch of each region that was kept.
    """
    # Hues a golden section apart: regions of neighbouring numbers differ most.
    hue = (counted_by.cpu().float() * 0.618034 % 1).unsqueeze(2) * 6
    channels = ((hue + torch.tensor([0.0, 4.0, 2.0])) % 6 - 3).abs() - 1
    color = 255 * (0.15 + 0.8 * channels.clamp(0, 1))
    alpha = torch.where(kept.cpu(), 40.0, 165.0).unsqueeze(2)
    return _from_pixels(torch.cat((color, alpha), dim=2))


def _from_pixels(values: torch.Tensor) -> "Image.Image":
    from PIL import Image

    return Image.fromarray(values.round().to(torch.uint8).numpy())


@functools.cache
def font(size: int) -> Any:
    """A font with more than Latin letters if one is installed, otherwise Pillow's own.

    Args:
        size: pixels.
    """
    from PIL import ImageFont

    names, matplotlib = ["DejaVuSans.ttf", "Arial.ttf"], importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin:
        names.insert(0, str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"))
    for name in names:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def text_line(text: str, width: int, size: int = TEXT, color: tuple[int, int, int] = INK, right: str = "") -> Any:
    """One line of text, cut off where it is too long.

    Args:
        text: at the left; line breaks become blanks.
        width: pixels.
        size: of the letters, in pixels.
        color: red, green, blue.
        right: smaller and fainter text at the right, which is not cut off.

    Returns: a picture of that width.
    """
    from PIL import Image, ImageDraw

    letters, small = font(size), font(round(0.85 * size))
    room = width - (small.getlength(right) + GAP if right else 0)
    text = " ".join(text.split())
    length = letters.getlength(text)
    if length > room:
        text = text[: round(len(text) * room / length) + 4]
        while text and letters.getlength(f"{text}…") > room:
            text = text[:-1]
        text = f"{text}…"
    line = Image.new("RGB", (width, round(1.4 * size)), PAPER)
    draw = ImageDraw.Draw(line)
    draw.text((0, size), text, color, letters, anchor="ls")
    draw.text((width, size), right, FAINT, small, anchor="rs")
    return line


def heat_scale(width: int) -> "Image.Image":
    """The colours of a heat map from 0 to the largest value, with these words."""
    from PIL import Image

    colors = heat_overlay(torch.linspace(0, 1, 64).view(1, -1), 1.0).convert("RGB")
    return below([colors.resize((width, 16), Image.Resampling.BILINEAR), text_line("0", width, 16, FAINT, "largest")])


def captioned(picture: "Image.Image", lines: Sequence[str], width: int) -> "Image.Image":
    """A picture with lines of text below it, `width` pixels wide."""
    return below([picture, *(text_line(line, width) for line in lines)], width)


def beside(pictures: "Sequence[Image.Image]", gap: int = GAP) -> "Image.Image":
    """Pictures in a row, their tops in line."""
    from PIL import Image

    row = Image.new(
        "RGB", (sum(p.width for p in pictures) + gap * (len(pictures) - 1), max(p.height for p in pictures)), PAPER
    )
    x = 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width + gap
    return row


def below(pictures: "Sequence[Image.Image]", width: int | None = None, gap: int = 4) -> "Image.Image":
    """Pictures one below the other, their left edges in line, in a picture of `width` pixels or the widest of them."""
    from PIL import Image

    width = max(p.width for p in pictures) if width is None else width
    column = Image.new("RGB", (width, sum(p.height for p in pictures) + gap * (len(pictures) - 1)), PAPER)
    y = 0
    for picture in pictures:
        column.paste(picture, (0, y))
        y += picture.height + gap
    return column


def with_margin(picture: "Image.Image", margin: int = GAP) -> "Image.Image":
    """A picture with paper around it."""
    from PIL import ImageOps

    return ImageOps.expand(picture, margin, PAPER)


def percent(share: float) -> str:
    """A share as people read it: 81 %, 4.3 %, 0.06 %."""
    value = 100 * share
    digits = 0 if value >= 9.95 else 1 if value >= 0.95 else 2
    return f"{value:.{max(digits, 1) if 99.5 <= value < 99.95 else digits}f} %"


def macs_in_words(macs: float) -> str:
    """Multiply-accumulate operations with three digits that matter: 4.6 GMACs, 14.8 MMACs."""
    for size, unit in ((1e8, "G"), (1e5, "M")):
        if macs >= size:
            number = macs / (10 * size)
            return f"{number:.0f} {unit}MACs" if number >= 1000 else f"{number:.3g} {unit}MACs"
    return f"{macs:.0f} MACs"


__all__ = [
    "beside",
    "below",
    "captioned",
    "font",
    "heat_overlay",
    "heat_scale",
    "macs_in_words",
    "mask_overlay",
    "percent",
    "text_line",
    "with_margin",
]
