"""Pictures as EViT sees them: one way from any picture that Pillow opens to RGB, in training, evaluation and use.

Exported models carry the text of both functions in their `example.py`: they need `warnings`, numpy and Pillow, nothing
else.
"""

import warnings

import numpy as np
from transformers.utils import is_vision_available


if is_vision_available():
    from PIL import Image, ImageOps


def upright(image: "Image.Image") -> "Image.Image":
    """Picture turned as its EXIF says; where the EXIF is damaged, as far as it can be read.

    Raises: OSError, SyntaxError or ValueError if the picture itself is damaged, as Pillow does.
    """
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of many kinds: Pillow writes the rest of the EXIF again
        image.load()  # raises if it was the picture
        turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation of a camera: `Image.Transpose`
        try:
            turn = turns.get(image.getexif().get(0x0112, 1))
        except Exception:  # the EXIF says nothing
            turn = None
        image = image.copy() if turn is None else image.transpose(Image.Transpose(turn))
        image.info = {name: value for name, value in image.info.items() if name == "transparency"}
        return image


def as_rgb(image: "Image.Image") -> "Image.Image":
    """Upright RGB version of a picture, eight bits for each colour.

    `image.convert("RGB")` ignores that a camera was held sideways (EXIF), shows whatever colour lies under transparent
    pixels, and cuts 16-bit grey off at 255. Here the picture is turned upright, transparent pixels show white, and
    more than eight bits are scaled to eight; each of the last two is announced by a warning.

    Args:
        image: picture in any mode of Pillow. Of an animation this is the current frame, when opened the first.

    Returns: picture in mode "RGB"; its width and height change places where EXIF says so.

    Raises: OSError, SyntaxError or ValueError if its file is damaged, as Pillow does.
    """
    image = upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        warnings.warn("Images with more than 8 bits for each pixel are scaled to 8 bits.", stacklevel=2)
        pixels = np.asarray(image).astype(np.float64)
        # 16 bits say so by their mode; of wider pixels the values tell the range: 16 bits, 8 bits, or a fraction.
        top = 65535 if image.mode.startswith("I;16") or pixels.max() > 255 else 255 if pixels.max() > 1 else 1
        return Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        warnings.warn("Transparent images are laid over white.", stacklevel=2)
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


__all__ = ["as_rgb", "upright"]
