"""Pixels of a picture as an image processor computes them, with Pillow and numpy only.

An exported `example.py` carries the text of these functions and of those of `pictures`: they use nothing but warnings,
math, numpy and Pillow.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.utils import is_vision_available

from .pictures import as_rgb, upright


if is_vision_available():
    from PIL import Image


def processed_pixels(image: "Image.Image", settings: dict[str, Any], num_channels: int = 3) -> np.ndarray:
    """Pixels of a picture, resized, cropped, rescaled and normalized as preprocessor_config.json says.

    Pillow and torchvision, which Transformers takes, round differently by a level or two of 255.

    Args:
        image: in any mode of Pillow.
        settings: what preprocessor_config.json holds.
        num_channels: of the model: 1 for grey, 3 for RGB, 4 for RGB and transparency.

    Returns: (1, num_channels, height, width), float32.
    """
    image = upright(image).convert("RGBA") if num_channels == 4 else as_rgb(image)
    channels = [image.convert("L")] if num_channels == 1 else image.split()
    if settings.get("do_resize"):
        size = settings["size"]
        width, height = size.get("width"), size.get("height")
        if size.get("shortest_edge"):
            short, edge = min(image.size), size["shortest_edge"]
            width, height = (edge if side == short else int(edge * side / short) for side in image.size)
        resample = settings.get("resample")
        channels = [channel.resize((width, height), 2 if resample is None else resample) for channel in channels]
    pixels = np.stack([np.asarray(channel) for channel in channels])
    if settings.get("do_center_crop"):
        for axis, length in ((1, settings["crop_size"]["height"]), (2, settings["crop_size"]["width"])):
            missing = max(length - pixels.shape[axis], 0)
            padding = [(0, 0)] * 3
            padding[axis] = (missing // 2, missing - missing // 2)
            pixels = np.pad(pixels, padding)
            start = (pixels.shape[axis] - length) // 2
            pixels = pixels.take(range(start, start + length), axis)
    pixels = pixels.astype(np.float64)
    if settings.get("do_rescale"):
        pixels = pixels * settings["rescale_factor"]
    if settings.get("do_normalize"):
        mean, std = (np.reshape(settings[name], (-1, 1, 1)) for name in ("image_mean", "image_std"))
        pixels = (pixels - mean) / std
    return pixels[None].astype(np.float32)


def robust_keep_rates(keep_rates: Sequence[float], num_image_tokens: int, fuses: bool) -> list[float]:
    """Keep rates that keep the same tokens in a runtime that multiplies in float32.

    0.6 of 25 tokens are 15, and 16 in float32. Here each rate moves to the middle of those that keep as many tokens.

    Args:
        keep_rates: one for each reorganization layer.
        num_image_tokens: patches of an image.
        fuses: whether inattentive tokens become one token.
    """
    robust = []
    for keep_rate in keep_rates:
        kept = math.ceil(keep_rate * num_image_tokens)
        robust.append((kept - 0.5) / num_image_tokens)
        num_image_tokens = kept + int(fuses and kept < num_image_tokens)
    return robust


__all__ = ["processed_pixels", "robust_keep_rates"]
