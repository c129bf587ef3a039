"""From a PIL image to the tensor that a model sees, in training and in evaluation."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from transformers import AutoImageProcessor, BaseImageProcessor, ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from evit_hf.image_processors import timm_processor


if TYPE_CHECKING:
    from ..arguments import AugmentationArguments


def image_processor(model: str | None, image_size: int) -> BaseImageProcessor:
    """The image processor that is saved with the model, and that evaluation uses.

    Args:
        model: checkpoint whose processor to take, with its mean, standard deviation and interpolation.
        image_size: pixels of the images that it returns.

    Returns: a processor that, from 128 pixels on, resizes the short side to 8/7 of `image_size` and crops the centre,
        as DeiT does, and resizes to a square below that.
    """
    if model is not None:
        processor = load_processor(model)
        if output_size(processor) == (image_size, image_size):
            return processor
        style = {name: getattr(processor, name) for name in ("image_mean", "image_std", "resample")}
    else:
        style = {
            "image_mean": list(IMAGENET_DEFAULT_MEAN),
            "image_std": list(IMAGENET_DEFAULT_STD),
            "resample": Image.Resampling.BICUBIC,
        }
    square = {"height": image_size, "width": image_size}
    if image_size < 128:
        return ViTImageProcessor(size=square, **style)
    return ViTImageProcessor(
        size={"shortest_edge": round(image_size * 8 / 7)}, do_center_crop=True, crop_size=square, **style
    )


def load_processor(name_or_path: str) -> BaseImageProcessor:
    """Load the image processor of a model.

    Raises: ValueError if it has none, or a damaged one.
    """
    try:
        return plain_processor(AutoImageProcessor.from_pretrained(name_or_path))
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        reason = "" if isinstance(error, OSError) else f" ({type(error).__name__}: {error})"
        raise ValueError(
            f"`{name_or_path}` has no readable preprocessor_config.json{reason}, which says how images are resized "
            "and normalized: copy it from the model that it was made of."
        ) from error


def plain_processor(processor: BaseImageProcessor) -> BaseImageProcessor:
    """A processor whose settings a folder of Transformers can hold: that of timm becomes one of ViT."""
    data = getattr(processor, "data_config", None)
    if data is None:
        return processor
    num_channels, *image_size = data["input_size"]
    return timm_processor(data, image_size, num_channels)[0]


def output_size(processor: BaseImageProcessor) -> tuple[int, int] | None:
    """Pixels (height, width) of the images that a processor returns, None if that depends on the image."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    pixels = (size.get("height"), size.get("width"))
    return None if None in pixels else pixels


class ProcessorTransform:
    """The image processor as the transform of one image."""

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return (num_channels, height, width)."""
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


def training_transform(
    arguments: "AugmentationArguments", image_size: int, processor: BaseImageProcessor
) -> v2.Compose:
    """Random variation of a training image, ending in the processor's normalization.

    Args:
        arguments: which variations, and how strong.
        image_size: pixels.
        processor: gives mean and standard deviation.

    Returns: a transform from a PIL image to a float32 tensor (3, image_size, image_size). All of its randomness comes
        from PyTorch's generator.
    """
    bicubic, size = InterpolationMode.BICUBIC, (image_size, image_size)
    steps: list[nn.Module] = []
    if arguments.crop == "random_resized":
        steps.append(v2.RandomResizedCrop(size, scale=(arguments.crop_min_scale, 1.0), interpolation=bicubic))
    else:
        steps.append(v2.Resize(size, interpolation=bicubic))
    if arguments.crop == "padded":
        steps.append(v2.RandomCrop(size, padding=image_size // 8))
    if arguments.affine_degrees:
        steps.append(
            v2.RandomAffine(
                arguments.affine_degrees,
                translate=(0.1, 0.1),
                scale=(0.9, 1.1),
                interpolation=InterpolationMode.BILINEAR,
            )
        )
    if arguments.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(arguments.horizontal_flip))
    if arguments.three_augment:
        steps.append(three_augment(image_size))
    if arguments.rand_augment:
        magnitude, std = arguments.rand_augment, arguments.rand_augment_std
        steps.append(RandAugment(magnitude, std, image_size, processor.image_mean))
    if arguments.color_jitter:
        steps.append(v2.ColorJitter(*[arguments.color_jitter] * 3))
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps.append(v2.Normalize(processor.image_mean, processor.image_std))
    if arguments.random_erasing:
        steps.append(v2.RandomErasing(arguments.random_erasing, value="random"))
    return v2.Compose([*steps, v2.ToPureTensor()])


class RandAugment(nn.Module):
    """RandAugment of the paper's recipes: timm's `rand-m9-mstd0.5-inc1`, at any magnitude.

    Two operations are drawn for each image, each is applied with probability 0.5, and its magnitude varies.

    Args:
        magnitude: mean, on a scale where 10 is the strongest.
        std: standard deviation.
        image_size: pixels.
        mean: colour, in [0, 1], of what rotations and shifts bring into the picture.
    """

    def __init__(self, magnitude: float, std: float, image_size: int, mean: Sequence[float]) -> None:
        super().__init__()
        from timm.data.auto_augment import rand_augment_transform

        settings = {
            "translate_const": int(0.45 * image_size),
            "img_mean": tuple(min(255, round(255 * x)) for x in mean),
            "interpolation": Image.Resampling.BICUBIC,
            "magnitude_std": std,
        }
        self.transform = rand_augment_transform("rand-m9-inc1", settings)
        for operation in self.transform.ops:
            operation.magnitude = magnitude  # of which timm's text takes whole numbers only

    def forward(self, image: Image.Image) -> Image.Image:
        """Return the varied image; the random numbers depend on PyTorch's generator only.

        timm draws from the generators of Python and numpy: both get a seed for this image, and their state back.
        """
        seed = int(torch.randint(2**32, ()).item())
        states = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed)
        try:
            return self.transform(image)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def three_augment(image_size: int) -> v2.RandomChoice:
    """3-Augment of DeiT III: grey, solarization or Gaussian blur, with equal chances.

    Args:
        image_size: pixels; the kernel of the blur grows with it.

    Source: "DeiT III: Revenge of the ViT", arXiv 2204.07118, section 3.4;
        https://github.com/facebookresearch/deit/blob/7e160fe/augment.py.
    """
    kernel_size = max(3, image_size // 10 // 2 * 2 + 1)
    blur = v2.GaussianBlur(kernel_size, sigma=(0.1, 2.0))
    return v2.RandomChoice([v2.RandomGrayscale(1.0), v2.RandomSolarize(128, p=1.0), blur])


def batch_mixing(arguments: "AugmentationArguments", num_labels: int) -> v2.Transform | None:
    """MixUp, CutMix, or one of them for each batch, from (images, labels) to (images, probabilities).

    Args:
        arguments: which, and how strong.
        num_labels: number of classes.

    Returns: a transform whose randomness comes from PyTorch's generator, or None if both are off.
    """
    mixup = v2.MixUp(alpha=arguments.mixup, num_classes=num_labels) if arguments.mixup else None
    cutmix = v2.CutMix(alpha=arguments.cutmix, num_classes=num_labels) if arguments.cutmix else None
    if mixup and cutmix:
        return v2.RandomChoice([mixup, cutmix], p=[1 - arguments.mix_switch, arguments.mix_switch])
    return mixup or cutmix
