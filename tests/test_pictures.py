"""One way from any picture to RGB, whoever asks: training, evaluation, cards, exports and the demo."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from evit_hf import EViTForImageClassification, as_rgb


def test_a_picture_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    image = Image.new("RGB", (30, 20))
    image.info["exif"] = exif.tobytes()
    assert as_rgb(image).size == (20, 30)
    assert as_rgb(as_rgb(image)).size == (20, 30)


def test_a_transparent_colour_of_an_rgb_picture_is_white(tmp_path):
    image = Image.new("RGB", (2, 1), (200, 0, 0))
    image.putpixel((1, 0), (0, 0, 9))
    image.save(tmp_path / "key.png", transparency=(0, 0, 9))
    opened = Image.open(tmp_path / "key.png")
    assert opened.mode == "RGB"
    with pytest.warns(UserWarning, match="Transparent images are laid over white"):
        seen = as_rgb(opened)
    assert [seen.getpixel((x, 0)) for x in range(2)] == [(200, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_a_dark_picture_of_16_bits_stays_dark(suffix, tmp_path):
    pixels = np.array([[0, 514, 200]], dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"dark.{suffix}")
    assert [as_rgb(Image.open(tmp_path / f"dark.{suffix}")).getpixel((x, 0))[0] for x in range(3)] == [0, 2, 1]


def test_models_offer_it_to_those_who_load_them_without_this_package():
    image = Image.effect_noise((5, 4), 60)
    assert ImageOps.grayscale(EViTForImageClassification.as_rgb(image)).tobytes() == image.tobytes()
