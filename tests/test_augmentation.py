import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2
from transformers import AutoImageProcessor, ViTImageProcessor

from evit_training.arguments import AugmentationArguments
from evit_training.data.augmentation import (
    ProcessorTransform,
    RandAugment,
    batch_mixing,
    image_processor,
    three_augment,
    training_transform,
)


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
        crop=crop, affine_degrees=10, rand_augment=9, rand_augment_std=0.5, three_augment=True, color_jitter=0.3
    )
    transform = training_transform(arguments, 32, image_processor(None, 32))
    torch.manual_seed(0)
    tensor = transform(photo)
    assert type(tensor) is torch.Tensor
    assert (tensor.shape, tensor.dtype) == ((3, 32, 32), torch.float32)
    assert tensor.abs().max() < 3


def test_all_randomness_comes_from_pytorch(photo):
    arguments = AugmentationArguments(
        affine_degrees=10,
        rand_augment=9,
        rand_augment_std=0.5,
        three_augment=True,
        color_jitter=0.3,
        random_erasing=0.5,
    )
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


def rand_augment(magnitude=9, std=0.5):
    return RandAugment(magnitude, std, 90, (0.485, 0.456, 0.406))


def test_rand_augment_is_that_of_deit(photo):
    """timm's own transform, as DeiT and EViT build it from `rand-m9-mstd0.5-inc1`, under the same seed."""
    settings = {"translate_const": 40, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", settings)
    for number in range(20):
        torch.manual_seed(number)
        seed = torch.randint(2**32, ()).item()
        random.seed(seed)
        np.random.seed(seed)
        wanted = theirs(photo)
        torch.manual_seed(number)
        assert rand_augment()(photo).tobytes() == wanted.tobytes()


def test_rand_augment_leaves_other_generators_alone(photo):
    random.seed(1)
    np.random.seed(1)
    wanted = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    rand_augment()(photo)
    assert (random.random(), np.random.rand()) == wanted


def test_rand_augment_varies_its_magnitude_around_nine_tenths(photo):
    augment = rand_augment()
    drawn = []
    for operation in augment.transform.ops:
        operation.level_fn = lambda magnitude, settings: drawn.append(magnitude) or ()
        operation.aug_fn = lambda image, **settings: image
    torch.manual_seed(0)
    for _ in range(600):
        augment(photo)
    assert len(drawn) == pytest.approx(600, abs=60)  # two for each image, each applied to every other one
    assert np.mean(drawn) == pytest.approx(9, abs=0.1)  # of 10
    assert np.std(drawn) == pytest.approx(0.5, abs=0.1)
    assert max(drawn) <= 10


def test_three_augment_is_grey_solarized_or_blurred(photo):
    torch.manual_seed(0)
    pixels = np.asarray(photo).astype(int)
    seen = set()
    for _ in range(30):
        varied = np.asarray(three_augment(32)(photo)).astype(int)
        if (varied == varied[..., :1]).all():
            seen.add("grey")
        elif (np.minimum(abs(varied - pixels), abs(varied - (255 - pixels))) == 0).all():
            seen.add("solarized")
        elif varied.std() < pixels.std():
            seen.add("blurred")
    assert seen == {"grey", "solarized", "blurred"}


def test_mixing_gives_images_and_labels_the_same_shares():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16).clone()
    labels = torch.arange(4)
    torch.manual_seed(0)
    kinds = set()
    for _ in range(20):
        mixed, targets = batch_mixing(AugmentationArguments(mixup=0.8, cutmix=1.0), 4)(images, labels)
        # Image i has the value i, so the mean pixel is the expectation of the label.
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), targets @ torch.arange(4.0))
        kinds.add("cutmix" if mixed[1].unique().numel() > 1 else "mixup")
    assert kinds == {"cutmix", "mixup"}
    assert batch_mixing(AugmentationArguments(), 4) is None
    several = torch.eye(4)
    _, targets = batch_mixing(AugmentationArguments(mixup=0.8), 4)(images, several)
    assert targets.shape == (4, 4)


def test_erased_rectangles_hold_noise(photo):
    arguments = AugmentationArguments(crop="none", horizontal_flip=0, random_erasing=1.0)
    torch.manual_seed(0)
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    erased = training_transform(arguments, 32, image_processor(None, 32))(grey)
    is_noise = (erased - erased[:, :1, :1]).abs().amax(dim=0) > 1e-6
    assert 0.01 < is_noise.float().mean() < 0.4
    assert erased[:, is_noise].std() > 0.5
