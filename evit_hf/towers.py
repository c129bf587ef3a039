"""The part of a model that reorganizes its tokens, whichever class the model has: EViT's own, or one of a family."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .configuration_evit import EViTConfig, height_and_width
from .modeling_evit import EViTPreTrainedModel
from .reorganization import find_tower, layers_name
from .token_reorganization import TowerCosts


@dataclass(frozen=True)
class Tower:
    """The stack of layers of a Vision Transformer, and what is around it.

    Args:
        owner: module that owns the layers.
        name: of their list in the model, for example "vit.layers" or "timm_model.blocks".
        layers: the list.
        attention: attribute of a layer that holds its attention.
        num_prefix_tokens: class tokens, distillation token and registers.
        num_scoring_tokens: class tokens whose attention scores the image tokens.
    """

    owner: Any  # a module; its attributes are those of its family
    name: str
    layers: nn.ModuleList | nn.Sequential
    attention: str
    num_prefix_tokens: int
    num_scoring_tokens: int

    @property
    def config(self) -> Any:
        """Configuration with `keep_rate`, `reorganization_layers` and `inattentive_tokens`; set by `reorganize`.

        In a model of several parts, as CLIP is, it is that of the part.
        """
        return self.owner.config

    @property
    def costs(self) -> TowerCosts:
        """Operations of the layers; of a family those that `reorganize` found."""
        return self.config.costs if isinstance(self.config, EViTConfig) else self.owner.costs

    @property
    def is_reorganized(self) -> bool:
        """See `reorganizes`."""
        return hasattr(self.owner, "training_keep_rate")

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels.

        Raises: ValueError for a model whose patches are not parts of a picture.
        """
        if hasattr(self.owner, "patch_embed"):  # timm
            return height_and_width(self.owner.patch_embed.patch_size)
        if not hasattr(self.config, "image_size") and not hasattr(self.config, "max_img_size"):
            raise ValueError(f"A model of type '{self.config.model_type}' has no patches of pictures.")
        return height_and_width(self.config.patch_size)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the images that the model was made for; None if it names no size."""
        if hasattr(self.owner, "patch_embed"):
            size = self.owner.patch_embed.img_size
        else:
            size = getattr(self.config, "image_size", None)
        return None if size is None else height_and_width(size)

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.owner.embed_dim if hasattr(self.owner, "patch_embed") else self.config.hidden_size

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        if hasattr(self.owner, "patch_embed"):
            return self.owner.patch_embed.proj.in_channels
        return self.config.num_channels

    def patch_grid(self, image_size: int | Sequence[int] | None = None) -> tuple[int, int]:
        """Rows and columns of patches of an image.

        Args:
            image_size: pixels, (height, width) or one number for both, instead of the model's own.

        Raises: ValueError if no size is known.
        """
        size = self.image_size if image_size is None else height_and_width(image_size)
        if size is None:
            raise ValueError(f"`image_size` must be given: a model of type '{self.config.model_type}' names none.")
        if isinstance(self.config, EViTConfig):  # whose stem may round up
            return self.config.patch_grid(size)
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]


def reorganizes(model: nn.Module) -> bool:
    """Whether a model gives up tokens: an EViT, or one that `reorganize` was called on; any other does not."""
    return any(hasattr(module, "training_keep_rate") for module in model.modules())


def tower_of(model: nn.Module) -> Tower:
    """Find the layers of a model that reorganizes or could.

    Args:
        model: an EViT, or a model that `reorganize` takes.

    Raises: ValueError for other models, with the reason.
    """
    if isinstance(model, EViTPreTrainedModel):
        backbone: Any = model.base_model
        config = model.config
        name = "layers" if backbone is model else f"{model.base_model_prefix}.layers"
        prefix, scoring = config.num_prefix_tokens, config.num_scoring_tokens
        return Tower(backbone, name, backbone.layers, "attention", prefix, scoring)
    owner, _, family = find_tower(model)
    path = next(name for name, module in model.named_modules() if module is owner)
    layers: Any = layers_name(owner, family)
    return Tower(
        owner=owner,
        name=f"{path}.{layers}" if path else layers,
        layers=getattr(owner, layers),
        attention=family.attention,
        num_prefix_tokens=family.num_prefix_tokens(owner),
        num_scoring_tokens=family.num_class_tokens(owner),
    )


def example_inputs(
    model: nn.Module, image_size: int | Sequence[int] | None = None, batch_size: int = 1
) -> torch.Tensor:
    """Zeros in the shape of a model's inputs: images, or what videos and sound become.

    Args:
        model: see `tower_of`.
        image_size: pixels, (height, width) or one number for both, instead of the model's own.
        batch_size: number of images.

    Raises: ValueError if no size is known, or for a model that needs words too.
    """
    tower, main_input = tower_of(model), getattr(model, "main_input_name", "pixel_values")
    parameter, config = next(model.parameters()), tower.config
    if main_input == "input_ids":
        raise ValueError(f"`{type(model).__name__}` needs words too: take its image part, `model.vision_model`.")
    if main_input == "input_values":  # a spectrogram
        shape: tuple[int, ...] = (config.max_length, config.num_mel_bins)
    else:
        size = tower.image_size if image_size is None else height_and_width(image_size)
        if size is None:
            raise ValueError(f"`image_size` must be given: a model of type '{config.model_type}' names none.")
        frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
        shape = (*frames, tower.num_channels, *size)
    return torch.zeros(batch_size, *shape, device=parameter.device, dtype=parameter.dtype)


__all__ = ["Tower", "example_inputs", "reorganizes", "tower_of"]
