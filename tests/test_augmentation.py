import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoImageProcessor, ViTImageProcessor

from evit_training.arguments import AugmentationArguments
from evit_training.augmentation import ProcessorTransform, image_processor, training_transform


@pytest.fixture
def photo():
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_small_images_are_resized_to_a_square(photo):
    processor = image_processor(None, 32)
    assert ProcessorTransform(processor)(photo).shape == (3, 32, 32)
    assert processor.size == {"height": 32, "width": 32}


def test_large_images_are_resized_and_cropped_as_deit_does(photo):
    transformed = ProcessorTransform(image_processor(None, 224))(photo)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    deit = v2.Compose(
        [
            v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    # The processor of Transformers may resize as a tensor where torchvision resizes as a picture.
    torch.testing.assert_close(transformed, deit(photo).as_subclass(torch.Tensor), rtol=0, atol=0.05)


def test_a_checkpoints_processor_is_taken_or_resized(tmp_path):
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1] * 3, image_std=[0.2] * 3).save_pretrained(
        tmp_path
    )
    assert list(image_processor(str(tmp_path), 32).image_mean) == [0.1] * 3
    larger = image_processor(str(tmp_path), 48)
    assert (dict(larger.size), list(larger.image_std)) == ({"height": 48, "width": 48}, [0.2] * 3)
    larger.save_pretrained(tmp_path / "larger")
    assert AutoImageProcessor.from_pretrained(tmp_path / "larger").size == {"height": 48, "width": 48}


@pytest.mark.parametrize("crop", ["random_resized", "padded", "none"])
def test_training_images_have_the_models_size_and_scale(crop, photo):
    arguments = AugmentationArguments(
        crop=crop, affine_degrees=10, rand_augment=9, color_jitter=0.3, random_erasing=0.5
    )
    transform = training_transform(arguments, 32, image_processor(None, 32))
    torch.manual_seed(0)
    tensor = transform(photo)
    assert type(tensor) is torch.Tensor
    assert (tensor.shape, tensor.dtype) == ((3, 32, 32), torch.float32)
    assert tensor.abs().max() < 3


def test_all_randomness_comes_from_pytorch(photo):
    arguments = AugmentationArguments(affine_degrees=10, rand_augment=9, color_jitter=0.3, random_erasing=0.5)
    transform = training_transform(arguments, 32, image_processor(None, 32))

    def once(seed):
        torch.manual_seed(seed)
        np.random.seed(np.random.randint(1000))
        return transform(photo)

    assert torch.equal(once(0), once(0))
    assert not torch.equal(once(0), once(1))


def test_without_augmentation_training_sees_what_evaluation_sees(photo):
    processor = image_processor(None, 32)
    transform = training_transform(AugmentationArguments(crop="none", horizontal_flip=0), 32, processor)
    torch.testing.assert_close(transform(photo), ProcessorTransform(processor)(photo), rtol=0, atol=0.05)
