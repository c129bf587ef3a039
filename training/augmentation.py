"""From a PIL image to the tensor that a model sees, in training and in evaluation."""

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from transformers import AutoImageProcessor, BaseImageProcessor, ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


if TYPE_CHECKING:
    from .arguments import AugmentationArguments


def image_processor(model: str | None, image_size: int) -> BaseImageProcessor:
    """The image processor that is saved with the model, and that evaluation uses.

    Args:
        model: checkpoint whose processor to take, with its mean, standard deviation and interpolation.
        image_size: pixels of the images that it shall return.

    Returns: a processor that, from 128 pixels on, resizes the short side to 8/7 of `image_size` and crops the centre,
        as DeiT does, and resizes to a square below that.
    """
    if model is not None:
        processor = AutoImageProcessor.from_pretrained(model)
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        if (size.get("height"), size.get("width")) == (image_size, image_size):
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
    steps: list[torch.nn.Module] = []
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
    if arguments.rand_augment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=arguments.rand_augment, interpolation=bicubic))
    if arguments.color_jitter:
        steps.append(v2.ColorJitter(*[arguments.color_jitter] * 3))
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps.append(v2.Normalize(processor.image_mean, processor.image_std))
    if arguments.random_erasing:
        steps.append(v2.RandomErasing(arguments.random_erasing))
    return v2.Compose([*steps, v2.ToPureTensor()])
