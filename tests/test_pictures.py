"""One way from any picture to RGB, whoever asks: training, evaluation, cards, exports and the demo."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from evit_hf import EViTForImageClassification, as_rgb
from evit_hf.pictures import upright


def test_a_picture_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    image = Image.new("RGB", (30, 20))
    image.info["exif"] = exif.tobytes()
    assert as_rgb(image).size == (20, 30)
    assert as_rgb(as_rgb(image)).size == (20, 30)


@pytest.mark.filterwarnings("ignore:Metadata Warning")
def test_damaged_exif_turns_a_picture_as_far_as_it_can_be_read():
    exif = Image.Exif()
    exif[0x0110], exif[0x0112] = "a camera", 6
    file = io.BytesIO()
    Image.new("RGB", (32, 16), (200, 0, 0)).save(file, "JPEG", exif=exif.tobytes())
    damaged = bytearray(file.getvalue())
    damaged[damaged.index(b"Exif\0\0") + 17] = 1  # the kind of the camera's name
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(damaged)))
    seen = as_rgb(Image.open(io.BytesIO(damaged)))
    assert (seen.size, seen.mode) == ((16, 32), "RGB")
    assert as_rgb(seen).size == (16, 32)
    with pytest.raises(OSError, match="(?i)truncated"):
        as_rgb(Image.open(io.BytesIO(damaged[:-60])))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_is_left_of_damaged_exif_turns_as_pillow_does(orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.effect_noise((5, 3), 90).save(file, "PNG", exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(file))

    def broken(image):
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    seen = upright(Image.open(file))
    assert (seen.size, seen.tobytes()) == (wanted.size, wanted.tobytes())


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
