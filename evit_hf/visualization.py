"""Pictures of the patches that a model keeps, of what it looks at, and of what its fused tokens are made of.

`visualize` does it all for one picture: `visualize(model, processor, picture).sheet().save("kept.png")`.
"""

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .drawing import (
    FAINT,
    GAP,
    INK,
    PAPER,
    below,
    beside,
    captioned,
    font,
    heat_overlay,
    heat_scale,
    macs_in_words,
    mask_overlay,
    percent,
    region_overlay,
    text_line,
    with_margin,
)
from .pictures import as_rgb
from .profiling import MacsFormula
from .token_maps import TokenTrace, trace_tokens
from .towers import tower_of


if TYPE_CHECKING:
    from PIL import Image


Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the picture
PANEL = 260  # pixels, of a picture on a sheet
UNSEEN = (150, 150, 155)  # lies over what a model does not see
ABOUT_ATTENTION = (
    "Class token's attention",
    "to each patch; what fused",
    "tokens get is shared out",
    "among their patches",
)
ABOUT_ATTENTION_WITHOUT_FUSED = ("Class token's attention", "to each patch that is left")
ABOUT_WEIGHTS = (
    "Weights in the fused token",
    "of each patch, in % of their",
    "sum; through earlier fused",
    "tokens to their patches",
)
ABOUT_REGIONS = (
    "Who counts whom",
    "a colour for each token",
    "that is left: the patches",
    "it counts; its own is clear",
)
MAX_COLUMNS = 4  # of a sheet; more layers are in the animation


def attentive_patch_mask(attentive_index: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Which patches of the original grid are among the kept tokens.

    Args:
        attentive_index: (batch_size, num_attentive), positions in the patch grid, -1 for a fused token, as in the
            `attentive_index` of a model's output.
        num_patches: patches of the original grid.

    Returns: (batch_size, num_patches), bool. A fused token is not a patch and marks none.
    """
    mask = torch.zeros(attentive_index.shape[0], num_patches + 1, dtype=torch.bool, device=attentive_index.device)
    # Position -1 lands in one more column, which is cut off again.
    index = torch.where(attentive_index < 0, num_patches, attentive_index)
    return mask.scatter(1, index, True)[:, :num_patches]


def blank_inattentive_patches(
    images: torch.Tensor,
    attentive_index: torch.Tensor,
    patch_size: int | tuple[int, int],
    blank: float | tuple[float, ...] = 1.0,
) -> torch.Tensor:
    """Images whose inattentive patches are painted over, as in the figures of the paper.

    Args:
        images: (batch_size, num_channels, height, width), any range.
        attentive_index: (batch_size, num_attentive), see `attentive_patch_mask`.
        patch_size: pixels, (height, width) or one number for both.
        blank: value of an inattentive patch, one number or one for each channel: 1.0 is white for images in [0, 1].

    Returns: (batch_size, num_channels, height, width). Margins that hold no whole patch are blank.
    """
    patch_height, patch_width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    height, width = images.shape[-2:]
    rows, columns = height // patch_height, width // patch_width
    mask = attentive_patch_mask(attentive_index, rows * columns).view(-1, 1, rows, columns)
    mask = mask.repeat_interleave(patch_height, dim=2).repeat_interleave(patch_width, dim=3)
    mask = torch.nn.functional.pad(mask, (0, width - mask.shape[3], 0, height - mask.shape[2]))
    color = torch.as_tensor(blank, dtype=images.dtype, device=images.device).view(-1, 1, 1)
    return torch.where(mask.to(images.device), images, color)


def attentive_patch_picture(
    images: torch.Tensor,
    attentive_index: Sequence[torch.Tensor],
    patch_size: int | tuple[int, int],
    min_pixels: int = 96,
    margin: int = 4,
    blank: tuple[float, float, float] = (0.45, 0.62, 0.85),
    captions: Sequence[str] = (),
) -> "Image.Image":
    """One row for each image: the image, then what is left of it after each reorganization layer.

    Args:
        images: (batch_size, 1 or 3, height, width) in [0, 1], as the model saw them but without normalization.
        attentive_index: of the model's output, one tensor for each reorganization layer.
        patch_size: pixels, (height, width) or one number for both.
        min_pixels: smaller images are enlarged, by a whole factor, to at least that height.
        margin: white pixels between the images.
        blank: colour of inattentive patches, red, green and blue in [0, 1]; the default is a blue that is rare in
            photographs and absent from grey images.
        captions: one for each column, written above it: the image, then each reorganization layer.

    Returns: a PIL image.

    Raises: ValueError if images and index do not belong to the same batch.
    """
    from PIL import Image

    images = images.detach().float().cpu().clamp(0, 1)
    if any(len(index) != len(images) for index in attentive_index):
        raise ValueError(
            f"`attentive_index` is for batches of {[len(index) for index in attentive_index]} but there are "
            f"{len(images)} images: pass the images that gave this output."
        )
    images = images.expand(-1, 3, -1, -1)
    stages = [images] + [
        blank_inattentive_patches(images, index.cpu(), patch_size, blank) for index in attentive_index
    ]
    pictures = torch.stack(stages, dim=1)
    scale = -(-min_pixels // pictures.shape[-2])
    pictures = pictures.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    pictures = torch.nn.functional.pad(pictures, (margin, margin, margin, margin), value=1.0)
    rows, columns, channels, height, width = pictures.shape
    sheet = pictures.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    picture = Image.fromarray((sheet * 255).round().to(torch.uint8).numpy())
    if not captions:
        return picture
    column = width - 2 * margin
    # As large as a column allows, and readable at half its size.
    size = next(
        size
        for size in range(26, 8, -1)
        if size == 9 or all(font(size).getlength(text) <= column for text in captions)
    )
    words = [with_margin(text_line(text, column, size), margin) for text in captions]
    return below([beside(words, gap=0), picture], picture.width, gap=0)


@dataclass(frozen=True)
class View:
    """What a model at one keep rate made of a picture.

    Args:
        keep_rate: in (0, 1], or one for each reorganization layer; None where `share` says what is kept.
        trace: of a batch of this one picture.
        answers: the likeliest classes with their probabilities, in descending order; none for a model without classes.
        macs: multiply-accumulate operations of the picture.
        macs_so_far: of embeddings, classifiers and the layers up to each reorganization layer.
        share: of the dense model's operations, in (0, 1], or None.
    """

    keep_rate: float | Sequence[float] | None
    trace: TokenTrace
    answers: tuple[tuple[str, float], ...]
    macs: int
    macs_so_far: tuple[int, ...]
    share: float | None = None

    @property
    def num_patches(self) -> int:
        """Patches of the picture."""
        return self.trace.grid[0] * self.trace.grid[1]

    @property
    def name(self) -> str:
        """The keep rate or share of operations in words."""
        if self.share is not None:
            return "dense" if self.share == 1.0 else f"macs={self.share:g}"
        rates = [self.keep_rate] if isinstance(self.keep_rate, (int, float)) else self.keep_rate or []
        return "dense" if set(rates) == {1.0} else f"keep rate {', '.join(f'{rate:g}' for rate in rates)}"

    def regions(self) -> "Image.Image | None":
        """Who counts whom after the last layer, a pixel for each patch; None if the output does not say."""
        counted_by = getattr(self.trace.output, "counted_by", None)
        if counted_by is None:
            return None
        kept = self.trace.kept(len(self.trace.stages) - 1)[0]
        return region_overlay(counted_by[0].view(self.trace.grid), kept)

    def heading(self, width: int, right: str | None = None) -> "Image.Image":
        """Keep rate and first answer, and at the right the operations or what else is given."""
        answer = f": {self.answers[0][0]} ({percent(self.answers[0][1])})" if self.answers else ""
        return text_line(f"{self.name}{answer}", width, 22, right=right or macs_in_words(self.macs))

    def caption(self, stage: int) -> tuple[str, str]:
        """Two lines about a stage: what it kept, and what it cost so far."""
        reorganized = self.trace.stages[stage]
        num_kept = int(self.trace.kept(stage).sum())
        fused = int((reorganized.patches_left < 0).sum())
        cost = f"{macs_in_words(self.macs_so_far[stage])} so far"
        kept = f"layer {reorganized.layer}: {num_kept} of {self.num_patches} kept"
        return kept, f"{fused} fused, {cost}" if fused else cost


@dataclass(frozen=True)
class Visualization:
    """A picture with what a dense model and EViT make of it.

    Args:
        name: of the picture.
        picture: as it was given, upright, in RGB.
        box: the part of it that the patch grid covers; it reaches beyond the picture where the processor pads.
        dense: the model at keep rate 1.0.
        views: the model at other keep rates.
    """

    name: str
    picture: "Image.Image"
    box: Box
    dense: View
    views: tuple[View, ...]

    def kept(self, view: View, stage: int) -> "Image.Image":
        """The picture with given-up patches painted over, after a stage."""
        return self._with(mask_overlay(view.trace.kept(stage)[0]))

    def attention(self, view: View, stage: int) -> "Image.Image":
        """The class token's attention in a stage as a heat map; black is 0, light yellow the largest value."""
        return self._with(heat_overlay(view.trace.attention(stage)[0]), is_grey=True)

    def fused_weights(self, view: View, stage: int) -> "Image.Image | None":
        """Weights of the patches in the fused token of a stage as a heat map, None if it makes none."""
        weights = view.trace.fused_weights(stage)
        return None if weights is None else self._with(heat_overlay(weights[0]), is_grey=True)

    def regions(self, view: View) -> "Image.Image | None":
        """Who counts whom after the last layer, in colours; None if the output does not say."""
        regions = view.regions()
        return None if regions is None else self._with(regions)

    def overview(self) -> "Image.Image":
        """The picture with a frame around the part that the model sees."""
        from PIL import ImageDraw

        panel, (left, top, right, bottom) = self._panel()
        _veil(panel, (left, top, right, bottom))
        draw = ImageDraw.Draw(panel)
        frame = (max(left, 0), max(top, 0), min(right, panel.width) - 1, min(bottom, panel.height) - 1)
        draw.rectangle(frame, outline=PAPER, width=3)
        draw.rectangle(frame, outline=INK, width=1)
        return panel

    def _panel(self) -> "tuple[Image.Image, Box]":
        """The picture at the size of a panel, and the box in it."""
        from PIL import Image

        width, height = self.picture.size
        scale = PANEL / max(width, height)
        if scale >= 1:  # small pictures keep their pixels visible
            scale = max(1, int(scale))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        across, down = size[0] / width, size[1] / height
        left, top, right, bottom = self.box
        return self.picture.resize(size, resample), (left * across, top * down, right * across, bottom * down)

    def _with(self, overlay: "Image.Image", is_grey: bool = False) -> "Image.Image":
        """The picture under an overlay of one pixel for each patch."""
        from PIL import Image

        panel, box = self._panel()
        if is_grey:
            panel = panel.convert("L").convert("RGB")
        left, top, right, bottom = box
        across, down = overlay.width / (right - left), overlay.height / (bottom - top)
        # From a pixel of the panel to one of the overlay; outside of it, transparent.
        affine = (across, 0, -left * across, 0, down, -top * down)
        laid = overlay.transform(panel.size, Image.Transform.AFFINE, affine, Image.Resampling.NEAREST)
        panel = Image.alpha_composite(panel.convert("RGBA"), laid).convert("RGB")
        _veil(panel, box)
        return panel

    def sheet(self) -> "Image.Image":
        """All of it on one sheet: a block of rows for each keep rate, a column for each reorganization layer.

        Of more than four reorganization layers, the last of each quarter.
        """
        stages = shown_stages(len(self.dense.trace.stages))
        width = (len(stages) + 1) * (PANEL + GAP) - GAP

        def row(first: "Image.Image", panels: "list[Image.Image]", captions: Sequence[Sequence[str]]) -> "Image.Image":
            cells = [captioned(panel, lines, PANEL) for panel, lines in zip(panels, captions, strict=True)]
            return beside([below([first], PANEL), *cells])

        overview = captioned(self.overview(), ["framed: what it is given"], PANEL)
        attention = [self.attention(self.dense, i) for i in stages]
        captions = [
            [f"layer {s.layer}: attention", self._largest(self.dense, i)]
            for i, s in enumerate(self.dense.trace.stages)
            if i in stages
        ]
        rows = [text_line(self.name, width, 26)] if self.name else []
        rows += [_rule(width), self.dense.heading(width), row(overview, attention, captions)]
        for view in self.views:
            share = f"{macs_in_words(view.macs)}, {percent(view.macs / self.dense.macs)} of dense"
            rows += [_rule(width), view.heading(width, share)]
            kept = [self.kept(view, i) for i in stages]
            rows.append(row(_answers(view, self.dense), kept, [view.caption(i) for i in stages]))
            heat = [self.attention(view, i) for i in stages]
            weights = [self.fused_weights(view, i) for i in stages]
            about = ABOUT_ATTENTION if any(weights) else ABOUT_ATTENTION_WITHOUT_FUSED
            rows.append(row(_legend(about), heat, [[self._largest(view, i)] for i in stages]))
            if any(weights):
                nothing = text_line("no fused token", PANEL, color=FAINT)
                captions = [[_largest_share(view.trace.fused_weights(i))] for i in stages]
                rows.append(row(_legend(ABOUT_WEIGHTS), [panel or nothing for panel in weights], captions))
            if (regions := self.regions(view)) is not None:
                sizes = view.trace.output.token_sizes[0]
                counts = f"{len(sizes)} tokens count {self.dense.num_patches}"
                caption = [counts, f"the largest {int(sizes.max())} of them"]
                rows.append(row(_legend(ABOUT_REGIONS, has_scale=False), [regions], [caption]))
        return with_margin(below(rows, gap=GAP))

    @staticmethod
    def _largest(view: View, stage: int) -> str:
        return f"largest {percent(float(view.trace.attention(stage).max()))}"

    def frames(self) -> "list[Image.Image]":
        """One picture for each step through the layers: all patches first, then what each layer keeps and looks at."""
        width, frames = 3 * (PANEL + GAP) - GAP, []
        for i in range(-1, len(self.dense.trace.stages)):
            rows = [text_line(self.name, width, 26)] if self.name else []
            for view in self.views or (self.dense,):
                rows += [_rule(width), view.heading(width)]
                panels: list[Any] = [self.overview()] * 3
                captions: list[Any] = [["all patches", ""], ["attention"], ["fused token"]]
                if i >= 0:
                    panels = [self.kept(view, i), self.attention(view, i), self.fused_weights(view, i)]
                    captions = [
                        view.caption(i),
                        [f"attention, {self._largest(view, i)}"],
                        ["weights in the fused token"],
                    ]
                cells = [
                    captioned(panel, lines, PANEL)
                    for panel, lines in zip(panels, captions, strict=True)
                    if panel is not None
                ]
                rows.append(beside(cells))
            frames.append(with_margin(below(rows, width, gap=GAP)))
        return frames

    def save_animation(self, path: str | os.PathLike[str], seconds: float = 1.2) -> None:
        """Write the frames as an endless WebP, GIF or PNG animation, as the suffix of the path says.

        Args:
            path: of the file.
            seconds: of each frame; the last one stays twice as long.
        """
        first, *others = self.frames()
        durations = [round(1000 * seconds)] * len(others) + [round(2000 * seconds)]
        kind = {"quality": 90} if str(path).lower().endswith(".webp") else {}
        first.save(path, save_all=True, append_images=others, duration=durations, loop=0, **kind)


@torch.no_grad()
def visualize(
    model: nn.Module,
    processor: Any,
    picture: "Image.Image",
    keep_rates: Sequence[float | Sequence[float] | None] = (None,),
    name: str = "",
    num_answers: int = 3,
    macs: Sequence[float] | None = None,
) -> Visualization:
    """What a model keeps of a picture, looks at and answers, at several keep rates or shares of operations.

    Args:
        model: an EViT, or a model that `reorganize` was called on; it runs in evaluation mode and keeps its own.
        processor: its image processor, which says how pictures are resized and cropped.
        picture: a PIL image in any mode and of any proportions.
        keep_rates: in (0, 1], one number or one for each reorganization layer; None is the model's own. The dense
            model is always there.
        name: of the picture, for the heading.
        num_answers: classes to name.
        macs: instead of keep rates: shares of the dense model's operations, in (0, 1].

    Returns: what to draw; `visualize(...).sheet().save("kept.png")` draws it all.

    Raises: ValueError for a model that does not reorganize tokens of pictures, a processor that is not understood, or
        keep rates out of range.
    """
    picture = as_rgb(picture)
    tower, parameter = tower_of(model), next(model.parameters())
    num_channels = getattr(tower.config, "num_channels", 3)
    given = picture.convert("L") if num_channels == 1 else picture
    pixel_values = torch.as_tensor(processor(given, return_tensors="pt")["pixel_values"])
    pixel_values = pixel_values.to(parameter.device, parameter.dtype)
    height, width = pixel_values.shape[-2:]
    patch_height, patch_width = tower.patch_size
    left, top, right, bottom = seen_box(picture.size, processor)
    covered = (width // patch_width * patch_width / width, height // patch_height * patch_height / height)
    box = (left, top, left + (right - left) * covered[0], top + (bottom - top) * covered[1])

    was_training = model.training
    model.eval()
    try:
        dense_macs = MacsFormula.of(model, (height, width))(1.0)
        if macs is None and list(keep_rates) == [None] and tower.config.macs is not None:
            macs = [tower.config.macs]
        view = functools.partial(_view, model, pixel_values, num_answers, dense_macs)
        if macs is None:
            rates = [tower.config.keep_rate if rate is None else rate for rate in keep_rates]
            dense, views = view(1.0), tuple(view(rate) for rate in rates if rate != 1.0)
        else:
            dense, views = view(None, 1.0), tuple(view(None, share) for share in macs if share != 1.0)
    finally:
        model.train(was_training)
    return Visualization(name, picture, box, dense, views)


def _view(
    model: nn.Module,
    pixel_values: torch.Tensor,
    num_answers: int,
    dense_macs: int,
    keep_rate: float | Sequence[float] | None,
    share: float | None = None,
) -> View:
    trace = trace_tokens(model, pixel_values, keep_rate, share)
    logits = trace.output if isinstance(trace.output, torch.Tensor) else getattr(trace.output, "logits", None)
    answers: tuple[tuple[str, float], ...] = ()
    if logits is not None:
        scores, names = class_scores(model, logits)[0], getattr(model.config, "id2label", None) or {}
        best = scores.topk(min(num_answers, len(scores)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        answers = tuple((str(names.get(i, f"class {i}")), score) for i, score in pairs)
    costs = tower_of(model).costs
    stages = {stage.layer: stage for stage in trace.stages}
    prefix, num_tokens = trace.num_prefix_tokens, trace.num_prefix_tokens + trace.grid[0] * trace.grid[1]
    macs, so_far = dense_macs - costs.num_layers * costs.layer_macs(num_tokens, num_tokens), []
    for number in range(costs.num_layers):
        left = prefix + stages[number].patches_left.shape[1] if number in stages else num_tokens
        macs += costs.layer_macs(num_tokens, left)
        num_tokens = left
        if number in stages:
            so_far.append(macs)
    return View(keep_rate, trace, answers, macs, tuple(so_far), share)


def class_scores(model: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities of the classes, (batch_size, num_labels), float32: each by itself if an image may have several.

    Args:
        model: whose configuration says so.
        logits: (batch_size, num_labels).
    """
    is_multi_label = getattr(model.config, "problem_type", None) == "multi_label_classification"
    return logits.float().sigmoid() if is_multi_label or logits.shape[-1] == 1 else logits.float().softmax(-1)


def seen_box(size: tuple[int, int], processor: Any) -> Box:
    """The part of a picture that a model sees, mapped back through its image processor's resizing and cropping.

    Args:
        size: width and height of the picture in pixels, upright.
        processor: image processor of Transformers.

    Returns: left, top, right and bottom in pixels of the picture; they reach beyond it where the processor pads.

    Raises: ValueError for a processor that does something else.
    """
    settings = processor.to_dict()
    if "data_config" in settings:  # timm
        config = settings["data_config"]
        edges, share = config["input_size"][-2:], config.get("crop_pct") or 0.875
        kind = {"shortest_edge": math.floor(edges[0] / share)}
        if config.get("crop_mode", "center") == "squash":
            kind = {"height": math.floor(edges[0] / share), "width": math.floor(edges[1] / share)}
        settings = {"do_resize": True, "size": kind, "do_center_crop": True}
        settings["crop_size"] = {"height": edges[0], "width": edges[1]}
    width, height = size
    resized = (width, height)
    if settings.get("do_resize"):
        target = {name: value for name, value in dict(settings.get("size") or {}).items() if value}
        if target.keys() == {"height", "width"}:
            resized = (target["width"], target["height"])
        elif target.keys() == {"shortest_edge"}:
            short, edge = min(size), target["shortest_edge"]
            resized = tuple(edge if side == short else int(edge * side / short) for side in size)
        else:
            raise ValueError(
                f"`processor` resizes to {target}, which cannot be mapped back to the picture: take one that resizes "
                "to a height and width or to a shortest edge."
            )
    if not settings.get("do_center_crop"):
        return 0.0, 0.0, float(width), float(height)
    crop = dict(settings["crop_size"])
    across, down = width / resized[0], height / resized[1]
    left, top = (resized[0] - crop["width"]) // 2, (resized[1] - crop["height"]) // 2
    return left * across, top * down, (left + crop["width"]) * across, (top + crop["height"]) * down


def shown_stages(num_stages: int) -> list[int]:
    """Reorganization layers that get a column of a sheet: all, or of more than four the last of each quarter."""
    num_columns = min(num_stages, MAX_COLUMNS)
    return [-(-(i + 1) * num_stages // num_columns) - 1 for i in range(num_columns)]


def _largest_share(weights: torch.Tensor | None) -> str:
    if weights is None:
        return "no fused token"
    return f"largest {percent(float(weights.max() / weights.sum().clamp(min=1e-12)))}"


def _veil(panel: "Image.Image", box: Box) -> None:
    """Grey out what is outside of a box, in place."""
    from PIL import Image

    left, top, right, bottom = (round(edge) for edge in box)
    inside = (max(left, 0), max(top, 0), min(right, panel.width), min(bottom, panel.height))
    veil = Image.new("L", panel.size, 185)
    veil.paste(0, inside)
    panel.paste(Image.new("RGB", panel.size, UNSEEN), mask=veil)


def _rule(width: int) -> "Image.Image":
    from PIL import Image

    return Image.new("RGB", (width, 2), (215, 215, 220))


def _answers(view: View, dense: View) -> "Image.Image":
    """The answers of a view next to those of the dense model."""
    lines = []
    for title, answers in (("EViT says", view.answers), ("dense says", dense.answers)):
        if answers:
            lines.append(text_line(title, PANEL, 16, FAINT))
        lines += [text_line(f"{percent(score)}: {name}", PANEL) for name, score in answers]
    return below(lines or [text_line("", PANEL)], PANEL)


def _legend(about: Sequence[str], has_scale: bool = True) -> "Image.Image":
    title, *others = about
    lines = [text_line(title, PANEL), *(text_line(line, PANEL, 16, FAINT) for line in others)]
    return below([*lines, heat_scale(PANEL - GAP)] if has_scale else lines, PANEL)


__all__ = [
    "View",
    "Visualization",
    "attentive_patch_mask",
    "attentive_patch_picture",
    "blank_inattentive_patches",
    "class_scores",
    "seen_box",
    "shown_stages",
    "visualize",
]
