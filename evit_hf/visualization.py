"""Pictures of the patches that an EViT keeps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from PIL import Image


def attentive_patch_mask(attentive_index: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Which patches of the original grid are among the kept tokens.

    Args:
        attentive_index: (batch_size, num_attentive), positions in the patch grid, -1 for a fused token, as in the
            `attentive_index` of a model's output.
        num_patches: patches of the original grid.

    Returns: (batch_size, num_patches), bool. A fused token is not a patch and marks none.
    """
    mask = torch.zeros(attentive_index.shape[0], num_patches + 1, dtype=torch.bool, device=attentive_index.device)
    # Position -1 lands in one more column, which is cut off again.
    index = torch.where(attentive_index < 0, num_patches, attentive_index)
    return mask.scatter(1, index, True)[:, :num_patches]


def blank_inattentive_patches(
    images: torch.Tensor,
    attentive_index: torch.Tensor,
    patch_size: int | tuple[int, int],
    blank: float | tuple[float, ...] = 1.0,
) -> torch.Tensor:
    """Images whose inattentive patches are painted over, as in the figures of the paper.

    Args:
        images: (batch_size, num_channels, height, width), any range.
        attentive_index: (batch_size, num_attentive), see `attentive_patch_mask`.
        patch_size: pixels, (height, width) or one number for both.
        blank: value of an inattentive patch, one number or one for each channel: 1.0 is white for images in [0, 1].

    Returns: (batch_size, num_channels, height, width). Margins that hold no whole patch are blank.
    """
    patch_height, patch_width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    height, width = images.shape[-2:]
    rows, columns = height // patch_height, width // patch_width
    mask = attentive_patch_mask(attentive_index, rows * columns).view(-1, 1, rows, columns)
    mask = mask.repeat_interleave(patch_height, dim=2).repeat_interleave(patch_width, dim=3)
    mask = torch.nn.functional.pad(mask, (0, width - mask.shape[3], 0, height - mask.shape[2]))
    color = torch.as_tensor(blank, dtype=images.dtype, device=images.device).view(-1, 1, 1)
    return torch.where(mask.to(images.device), images, color)


def attentive_patch_picture(
    images: torch.Tensor,
    attentive_index: Sequence[torch.Tensor],
    patch_size: int | tuple[int, int],
    min_pixels: int = 96,
    margin: int = 4,
    blank: tuple[float, float, float] = (0.45, 0.62, 0.85),
) -> "Image.Image":
    """One row for each image: the image, then what is left of it after each reorganization layer.

    Args:
        images: (batch_size, 1 or 3, height, width) in [0, 1], as the model saw them but without normalization.
        attentive_index: of the model's output, one tensor for each reorganization layer.
        patch_size: pixels, (height, width) or one number for both.
        min_pixels: smaller images are enlarged, by a whole factor, to at least that height.
        margin: white pixels between the images.
        blank: colour of inattentive patches, red, green and blue in [0, 1]; the default is a blue that is rare in
            photographs and absent from grey images.

    Returns: a PIL image.

    Raises: ValueError if images and index do not belong to the same batch.
    """
    from PIL import Image

    images = images.detach().float().cpu().clamp(0, 1)
    if any(len(index) != len(images) for index in attentive_index):
        raise ValueError(
            f"`attentive_index` is for batches of {[len(index) for index in attentive_index]} but there are "
            f"{len(images)} images: pass the images that gave this output."
        )
    images = images.expand(-1, 3, -1, -1)
    stages = [images] + [
        blank_inattentive_patches(images, index.cpu(), patch_size, blank) for index in attentive_index
    ]
    pictures = torch.stack(stages, dim=1)
    scale = -(-min_pixels // pictures.shape[-2])
    pictures = pictures.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    pictures = torch.nn.functional.pad(pictures, (margin, margin, margin, margin), value=1.0)
    rows, columns, channels, height, width = pictures.shape
    sheet = pictures.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    return Image.fromarray((sheet * 255).round().to(torch.uint8).numpy())


__all__ = ["attentive_patch_mask", "attentive_patch_picture", "blank_inattentive_patches"]
