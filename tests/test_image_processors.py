"""Image processors of converted models: taken over whole, pixel for pixel."""

import numpy as np
import pytest
import torch
from conftest import tiny_config_with
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    DeiTImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from evit_hf import EViTForImageClassification, convert_checkpoint
from evit_hf.checkpoint_files import ConversionError


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "patch_size": 8}


def picture(mode="RGB", size=(70, 50)):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def source_folder(folder, processor, **changes):
    """A ViT of Transformers with an image processor."""
    ViTForImageClassification(ViTConfig(**{**SMALL, "image_size": 32, **changes})).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def pixels_of(processor, image):
    return processor(image, return_tensors="pt").pixel_values


UNUSUAL = {"do_normalize": False, "rescale_factor": 1 / 127.5, "resample": 0, "image_mean": [0.1, 0.2, 0.3]}
PROCESSORS = {
    "plain": lambda size: ViTImageProcessor(size={"height": size, "width": size}),
    "unusual": lambda size: ViTImageProcessor(size={"height": size, "width": size}, **UNUSUAL),
    "no rescaling": lambda size: ViTImageProcessor(size={"height": size, "width": size}, do_rescale=False),
    "no resizing": lambda size: ViTImageProcessor(size={"height": size, "width": size}, do_resize=False),
    "crop": lambda size: ViTImageProcessor(
        size={"shortest_edge": size * 5 // 4}, do_center_crop=True, crop_size={"height": size, "width": size}
    ),
    "deit": lambda size: DeiTImageProcessor(
        size={"height": size * 5 // 4, "width": size * 5 // 4}, crop_size={"height": size, "width": size}
    ),
    "clip": lambda size: CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_convert_rgb=True
    ),
    "bit": lambda size: BitImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, resample=2
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_only_the_size_of_the_sources_processor_changes(name, tmp_path):
    """Also where it crops, does not normalize, rescales differently or converts colours."""
    source_folder(tmp_path / "vit", PROCESSORS[name](32))
    for size in (32, 64):
        convert_checkpoint(tmp_path / "vit", image_size=size).save_pretrained(tmp_path / str(size))
        processor, expected = AutoImageProcessor.from_pretrained(tmp_path / str(size)), PROCESSORS[name](size)
        assert type(processor) is type(AutoImageProcessor.from_pretrained(tmp_path / "vit"))
        image = picture(size=(size, size)) if name == "no resizing" else picture()
        torch.testing.assert_close(pixels_of(processor, image), pixels_of(expected, image), rtol=0, atol=0)
        ours = {key: value for key, value in processor.to_dict().items() if value is not None}
        theirs = {key: value for key, value in expected.to_dict().items() if value is not None}
        assert ours == theirs


def test_processor_that_fits_is_untouched(tmp_path):
    converted = convert_checkpoint(source_folder(tmp_path, PROCESSORS["unusual"](32)))
    assert converted.notes == []
    converted = convert_checkpoint(tmp_path, image_size=48)
    assert "in the image processor `size` is {'height': 48, 'width': 48}" in converted.notes


def test_rectangular_images(tmp_path):
    source_folder(tmp_path / "vit", PROCESSORS["crop"](32))
    converted = convert_checkpoint(tmp_path / "vit", image_size=(48, 32))
    assert converted.model.config.image_size == [48, 32]
    pixels = pixels_of(converted.image_processor, picture())
    assert pixels.shape == (1, 3, 48, 32)
    assert converted.model(pixels).logits.shape == (1, 2)


def test_proportion_of_resizing_to_crop_is_kept(tmp_path):
    """256 before a crop of 224 is 438 before one of 384."""
    from evit_hf.image_processors import processor_for_size

    crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    processor, _ = processor_for_size(ViTImageProcessor(size={"shortest_edge": 256}, **crop), 384)
    assert dict(processor.crop_size) == {"height": 384, "width": 384}
    assert processor.size["shortest_edge"] == 438


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_source_without_processor_gets_vits_for_its_channels(channels, mode, tmp_path):
    source_folder(tmp_path / "vit", None, num_channels=channels)
    converted = convert_checkpoint(tmp_path / "vit")
    assert "the source has no image processor: ViT's was taken (mean and deviation 0.5)" in converted.notes
    converted.save_pretrained(tmp_path / "evit")
    image = picture(mode, size=(32, 32))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "evit")
    # told where the channels are, as older Transformers do not recognize 4 of them
    pixels = processor(image, return_tensors="pt", input_data_format="channels_first").pixel_values
    expected = torch.from_numpy(np.atleast_3d(np.asarray(image)).transpose(2, 0, 1) / 127.5 - 1).float()
    torch.testing.assert_close(pixels[0], expected)
    assert converted.model(pixels).logits.shape == (1, 2)


def test_grey_processor_of_a_source_is_kept(tmp_path):
    grey = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.2], image_std=[0.3], do_convert_rgb=False)
    source_folder(tmp_path / "vit", grey, num_channels=1)
    converted = convert_checkpoint(tmp_path / "vit", image_size=48)
    image = picture("L")
    expected = ViTImageProcessor(**{**grey.to_dict(), "size": {"height": 48, "width": 48}})
    assert torch.equal(pixels_of(converted.image_processor, image), pixels_of(expected, image))
    assert converted.model(pixels_of(converted.image_processor, image)).logits.shape == (1, 2)


def test_damaged_processor_is_an_error_not_an_absent_one(tmp_path):
    source_folder(tmp_path, PROCESSORS["plain"](32))
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConversionError, match="preprocessor_config.json` is not the configuration of an image"):
        convert_checkpoint(tmp_path)


def test_evit_folder_keeps_its_processor(tmp_path):
    EViTForImageClassification(tiny_config_with()).save_pretrained(tmp_path)
    PROCESSORS["crop"](32).save_pretrained(tmp_path)
    converted = convert_checkpoint(tmp_path)
    assert torch.equal(pixels_of(converted.image_processor, picture()), pixels_of(PROCESSORS["crop"](32), picture()))
