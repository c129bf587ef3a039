"""Image processors of converted models: taken over whole where there is one, made from timm's settings otherwise."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .checkpoint_files import ConversionError
from .profiling import height_and_width


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# timm's words -> PIL's numbers.
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def processor_for_size(processor: Any, image_size: int | Sequence[int]) -> tuple[Any, list[str]]:
    """An image processor that gives images of a different size, and is otherwise the same.

    The crop becomes the new size, and what is resized before cropping keeps its proportion to the crop: 256 pixels
    before a crop of 224 become 438 before one of 384.

    Args:
        processor: any of Transformers', with `size`, and with `crop_size` where it crops.
        image_size: pixels, (height, width) or one number for both.

    Returns: the processor itself if it fits, else a changed copy; notes on what changed.
    """
    height, width = height_and_width(image_size)
    settings = processor.to_dict()
    size, crop = dict(settings.get("size") or {}), dict(settings.get("crop_size") or {})
    target = {"height": height, "width": width}
    if settings.get("do_center_crop"):
        if crop == target:
            return processor, []
        old_height, old_width = crop["height"], crop["width"]
        changes = {"crop_size": target, "size": _scaled(size, height / old_height, width / old_width)}
    elif "shortest_edge" in size:
        factor = max(height, width) / size["shortest_edge"]
        if factor == 1.0:
            return processor, []
        changes = {"size": _scaled(size, factor, factor)}
    else:
        if size == target:
            return processor, []
        changes = {"size": target}
    note = ", ".join(f"`{name}` is {value}" for name, value in changes.items())
    return type(processor).from_dict({**settings, **changes}), [f"in the image processor {note}"]


def _scaled(size: Mapping[str, int], height_factor: float, width_factor: float) -> dict[str, int]:
    factors = {"height": height_factor, "width": width_factor}
    return {
        name: math.floor(value * factors.get(name, max(height_factor, width_factor)) + 1e-6)
        for name, value in size.items()
    }


def timm_processor(
    settings: Mapping[str, Any], image_size: int | Sequence[int], num_channels: int
) -> tuple[Any, list[str]]:
    """The image processor that does what timm's evaluation transform does.

    Args:
        settings: `mean`, `std`, `crop_pct`, `crop_mode` and `interpolation`, as in timm's `pretrained_cfg`; what is
            missing is timm's default, ImageNet's statistics and a bicubic crop of 0.875.
        image_size: pixels, (height, width) or one number for both.
        num_channels: of the images. With other than 3 no colours are converted.

    Returns: a ViTImageProcessor, and what was assumed.

    Raises: ConversionError for settings of the wrong type.
    """
    from transformers import ViTImageProcessor  # needs Pillow, which converting weights does not

    height, width = height_and_width(image_size)
    fraction = settings.get("crop_pct") or 0.875
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < math.inf:
        raise ConversionError(f"`crop_pct` must be a positive fraction, got {fraction!r}: timm's default is 0.875.")
    interpolation = settings.get("interpolation") or "bicubic"
    if interpolation not in INTERPOLATIONS:
        raise ConversionError(f"`interpolation` must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}.")
    mean, notes = _by_channel(settings.get("mean") or IMAGENET_MEAN, "mean", num_channels)
    std, _ = _by_channel(settings.get("std") or IMAGENET_STD, "std", num_channels)
    mode = settings.get("crop_mode") or "center"
    size: dict[str, int] = {"height": math.floor(height / fraction), "width": math.floor(width / fraction)}
    if mode == "center" and height == width:
        size = {"shortest_edge": size["height"]}
    elif mode != "squash":
        notes.append(
            f"images are resized to {size['height']}x{size['width']} pixels whatever their proportions: an image "
            f"processor has no crop mode '{mode}' for {height}x{width} pixels"
        )
    channels: dict[str, Any] = {} if num_channels == 3 else {"do_convert_rgb": False}
    processor = ViTImageProcessor(
        size=size,
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        image_mean=mean,
        image_std=std,
        resample=INTERPOLATIONS[interpolation],
        **channels,
    )
    return processor, notes


def _by_channel(values: Any, name: str, num_channels: int) -> tuple[list[float], list[str]]:
    """A statistic for each channel; one that the source gives for three colours is averaged for other numbers."""
    numbers = [values] if isinstance(values, (int, float)) else values
    is_numbers = isinstance(numbers, (list, tuple)) and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in numbers
    )
    if not is_numbers or not numbers or (name == "std" and min(numbers) <= 0):
        raise ConversionError(f"`{name}` must be a list of numbers, one for each channel, got {values!r:.100}.")
    if len(numbers) == num_channels:
        return list(map(float, numbers)), []
    average = sum(numbers) / len(numbers)
    note = f"mean and deviation of {num_channels} channels: the source gives {len(numbers)}, each is their average"
    return [average] * num_channels, [note] if len(set(numbers)) > 1 else []
