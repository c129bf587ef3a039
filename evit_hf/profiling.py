"""What a model that reorganizes costs: multiply-accumulate operations, by formula and counted."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .configuration_evit import EViTConfig, height_and_width, keep_rate_by_layer
from .configuration_evit_lv import EViTLVConfig
from .short_cuts import short_cuts_counted
from .token_reorganization import num_attentive_tokens
from .towers import example_inputs, tower_of


KeepRates = float | Sequence[float] | dict[int, float] | None


def num_tokens_by_layer(
    config: EViTConfig,
    keep_rate: float | list[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> list[tuple[int, int]]:
    """Tokens that each layer's attention and MLP see.

    Args:
        config: the model's configuration.
        keep_rate: instead of `config.keep_rate`: in (0, 1], one number or one for each reorganization layer.
        image_size: pixels, (height, width) or one number for both, instead of `config.image_size`.

    Returns: (tokens in attention, tokens in the MLP) of each layer, prefix tokens included. DeiT-S at keep rate 0.7
        with fusion has 197 tokens before the first reorganization and 140, 100, 72 after the three.
    """
    return [(before, after) for before, after, _ in _token_counts(config, keep_rate, image_size)]


def _token_counts(
    config: EViTConfig, keep_rate: float | list[float] | None, image_size: int | tuple[int, int] | None
) -> list[tuple[int, int, bool]]:
    keep_rate = config.keep_rate if keep_rate is None else keep_rate
    rows, columns = config.patch_grid(image_size)
    return _tokens_by_layer(
        config.num_hidden_layers,
        rows * columns,
        config.num_prefix_tokens,
        keep_rate_by_layer(keep_rate, config.reorganization_layers),
        config.fuse_inattentive_tokens,
    )


def _tokens_by_layer(
    num_layers: int, num_image_tokens: int, num_prefix_tokens: int, keep_rates: dict[int, float], fuses: bool
) -> list[tuple[int, int, bool]]:
    """Tokens in attention and in the MLP of each layer, and whether it reorganizes: it may fuse just one token."""
    num_tokens = []
    for i in range(num_layers):
        before = num_image_tokens
        num_attentive = num_attentive_tokens(keep_rates.get(i, 1.0), before)
        if num_attentive < before:
            num_image_tokens = num_attentive + fuses
        after = num_prefix_tokens + num_image_tokens
        num_tokens.append((num_prefix_tokens + before, after, num_attentive < before))
    return num_tokens


def num_macs(
    config: EViTConfig | nn.Module,
    keep_rate: float | list[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
    executed: bool = False,
) -> int:
    """Multiply-accumulate operations of one image through the classifier, by formula.

    Counted are the patch embedding (with LV-ViT's stem), the attention layers (3 T d^2 for query, key and value,
    2 T^2 d for the map and its product with the values, T d^2 for the projection), the MLP (2 T' d m) and the
    classifiers, as the official code counts them; norms, activations, softmax and the reorganization itself (below
    0.1 %) are not. T and T' are the tokens before and after the reorganization.

    Args:
        config: the configuration of an EViT; or a model, EViT or reorganized, see `MacsFormula`.
        keep_rate: instead of `config.keep_rate`: in (0, 1], one number or one for each reorganization layer.
        image_size: pixels, (height, width) or one number for both, instead of the model's own.
        executed: count what this code really runs under sdpa when nobody looks inside (see `short_cuts`): after the
            last attention only the prefix tokens (LV-ViT reads all of them), no output projection of tokens that are
            given up, the class token's row of attention and the sums of the inattentive tokens.

    Returns: MACs; divide by 1e9 for GMACs. DeiT-S: 4.60 GMACs dense, 3.03 at keep rate 0.7 with fusion, 2.31 at 0.5,
        the 4.6, 3.0 and 2.3 of the paper. Executed are 4.28, 2.90 and 2.25.
    """
    if isinstance(config, nn.Module):
        return MacsFormula.of(config, image_size)(keep_rate, executed=executed)
    num_tokens = _token_counts(config, keep_rate, image_size)
    hidden_size, num_prefix_tokens = config.hidden_size, config.num_prefix_tokens
    macs = _patch_embedding_macs(config, *height_and_width(config.image_size if image_size is None else image_size))
    for i, (attention_tokens, mlp_tokens, reorganizes) in enumerate(num_tokens):
        is_last = i + 1 == len(num_tokens)
        num_queries = attention_tokens
        if executed and is_last and not reorganizes and not isinstance(config, EViTLVConfig):
            num_queries = mlp_tokens = num_prefix_tokens
        num_projected = min(num_queries, mlp_tokens) if executed else num_queries
        macs += (2 * attention_tokens + num_queries + num_projected) * hidden_size**2
        macs += 2 * num_queries * attention_tokens * hidden_size
        macs += 2 * mlp_tokens * hidden_size * config.intermediate_size
        if executed and reorganizes:
            macs += config.num_scoring_tokens * attention_tokens * hidden_size
            macs += config.fuse_inattentive_tokens * 2 * (attention_tokens - num_prefix_tokens) * hidden_size
    # One classifier for each prefix token and, in LV-ViT, for every image token that is left.
    num_classified = num_tokens[-1][1] if isinstance(config, EViTLVConfig) else num_prefix_tokens
    return macs + num_classified * hidden_size * config.num_labels


class LayerWeights(NamedTuple):
    """What decides the operations of a layer.

    Args:
        before: weights of linear layers in front of the reorganization; each token meets all of them.
        width: of the attention, num_heads * head_dim; each pair of tokens costs twice that.
        after: weights of linear layers after the reorganization.
    """

    before: int
    width: int
    after: int

    @classmethod
    def of(cls, layer: nn.Module, attention: str) -> "LayerWeights":
        """Read a layer whose attribute `attention` holds its attention."""
        module = getattr(layer, attention)
        before, every = (
            sum(part.weight.numel() for part in parts.modules() if isinstance(part, nn.Linear))
            for parts in (module, layer)
        )
        query = getattr(module, "q_proj", None)
        return cls(before, module.qkv.out_features // 3 if query is None else query.out_features, every - before)


@dataclass(frozen=True)
class MacsFormula:
    """Multiply-accumulate operations of one image through a model, as a function of its keep rates.

    For an EViT it is `num_macs`. Of other models that reorganize, PyTorch counts one dense forward pass, since each
    family has embeddings and classifiers of its own; what the layers save follows from their weights.

    Args:
        model: which one, for its settings.
        image_size: pixels, (height, width) or one number for both; None for the model's own.
        outside: operations that are not in the layers.
        layers: their weights; none for an EViT.
        num_image_tokens: of the whole image.
    """

    model: nn.Module
    image_size: int | Sequence[int] | None
    outside: int = 0
    layers: tuple[LayerWeights, ...] = ()
    num_image_tokens: int = 0

    @classmethod
    def of(cls, model: nn.Module, image_size: int | Sequence[int] | None = None) -> "MacsFormula":
        """Build the formula of a model; one of a family runs once, on one image.

        Args:
            model: an EViT, or a model that `reorganize` was called on.
            image_size: pixels, (height, width) or one number for both; by default the model's own.

        Raises: ValueError for a model that does not reorganize, or images that it does not take.
        """
        if isinstance(getattr(model, "config", None), EViTConfig):
            return cls(model, image_size)
        tower, lengths = tower_of(model), []
        if not tower.is_reorganized:
            raise ValueError(f"`{type(model).__name__}` gives up no tokens: call `reorganize(model)` first.")
        handle = tower.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        try:
            macs = count_macs(model, example_inputs(model, image_size), keep_rate=1.0)
        except (AssertionError, RuntimeError, ValueError) as error:
            size = "images of its own size" if image_size is None else f"images of {image_size} pixels"
            raise ValueError(f"`{type(model).__name__}` does not take {size}: {error}") from None
        finally:
            handle.remove()
        layers = tuple(LayerWeights.of(layer, tower.attention) for layer in tower.layers)
        length = lengths[0]
        dense = sum(length * (layer.before + layer.after + 2 * length * layer.width) for layer in layers)
        return cls(model, image_size, macs - dense, layers, length - tower.num_prefix_tokens)

    def __call__(self, keep_rate: KeepRates = None, executed: bool = False) -> int:
        """Multiply-accumulate operations of an image.

        Args:
            keep_rate: in (0, 1], one number or one for each reorganization layer; with other layers than the model's,
                a dictionary of rates by layer number; by default the model's own.
            executed: see `num_macs`; without short cuts these are the class token's row of attention, and the sums of
                the inattentive tokens.
        """
        if isinstance(self.model.config, EViTConfig):
            config = self.model.config
            if isinstance(keep_rate, dict):
                config, rates = copy.deepcopy(config), keep_rate
                config.keep_rate, config.reorganization_layers = 1.0, sorted(rates)
                keep_rate = [rates[layer] for layer in sorted(rates)]
            return num_macs(config, keep_rate, self.image_size, executed)
        tower = tower_of(self.model)
        if not isinstance(keep_rate, dict):
            keep_rate = tower.config.keep_rate if keep_rate is None else keep_rate
            keep_rate = keep_rate_by_layer(keep_rate, tower.config.reorganization_layers)
        fuses, num_prefix_tokens = tower.config.fuse_inattentive_tokens, tower.num_prefix_tokens
        num_tokens = _tokens_by_layer(len(self.layers), self.num_image_tokens, num_prefix_tokens, keep_rate, fuses)
        macs = self.outside
        for layer, (before, after, reorganizes) in zip(self.layers, num_tokens, strict=True):
            macs += before * (layer.before + 2 * before * layer.width) + after * layer.after
            if executed and reorganizes:
                macs += tower.num_scoring_tokens * before * layer.width
                macs += fuses * (before - num_prefix_tokens) * layer.width
        return macs


def keep_rate_for_macs(
    config: EViTConfig, macs: float, image_size: int | tuple[int, int] | None = None, decimals: int = 1
) -> float:
    """Highest keep rate at which a model costs no more than a number of multiply-accumulate operations.

    Args:
        config: the model's configuration; its own keep rate is ignored.
        macs: operations of one image, for example `num_macs(config, 1.0, 224)`.
        image_size: pixels, (height, width) or one number for both, instead of `config.image_size`.
        decimals: of the keep rate.

    Returns: a rate in (0, 1], the same for all reorganization layers. What DeiT-S costs at 224 pixels, it costs at
        272, 288 and 304 pixels at keep rates 0.7, 0.6 and 0.5, the paper's three.

    Raises: ValueError if even the lowest rate costs more.
    """
    steps = 10**decimals
    for i in range(steps, 0, -1):
        if num_macs(config, i / steps, image_size) <= macs:
            return i / steps
    size = config.image_size if image_size is None else image_size
    lowest = num_macs(config, 1 / steps, image_size)
    raise ValueError(
        f"No keep rate brings the model down to {macs / 1e9:.2f} GMACs: at `image_size` {size} it costs "
        f"{lowest / 1e9:.2f} even at {1 / steps}. Take smaller images."
    )


def _patch_embedding_macs(config: EViTConfig, height: int, width: int) -> int:
    """Multiply-accumulate operations from the image to its patches."""
    patch_height, patch_width = height_and_width(config.patch_size)
    rows, columns = config.patch_grid((height, width))
    num_patches = rows * columns
    if not isinstance(config, EViTLVConfig):
        return num_patches * config.hidden_size * config.num_channels * patch_height * patch_width
    stem = config.stem_hidden_size
    stem_pixels = -(-height // 2) * -(-width // 2)
    convolutions = stem_pixels * stem * (7 * 7 * config.num_channels + 2 * 3 * 3 * stem)
    return convolutions + num_patches * config.hidden_size * stem * (patch_height // 2) * (patch_width // 2)


def count_macs(model: nn.Module, pixel_values: torch.Tensor, **kwargs: object) -> int:
    """Multiply-accumulate operations that one forward really runs, counted by PyTorch for the whole batch.

    Args:
        model: any image model; it runs once, in evaluation mode, without gradients.
        pixel_values: (batch_size, num_channels, height, width).
        **kwargs: handed to the model, for example `keep_rate=0.5`.

    Returns: MACs of matrix products and convolutions, half of the FLOPs of `torch.utils.flop_counter`. For an EViT
        those of its short cuts, which it takes when nobody counts; a counter of your own sees the paper's order.
    """
    was_training = model.training
    counter = FlopCounterMode(display=False)
    try:
        # As plain matrix products attention is counted by every version of PyTorch; 2.7 overlooks its kernel for CPUs.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), short_cuts_counted(), counter:
            model.eval()(pixel_values, **kwargs)
    finally:
        model.train(was_training)
    return counter.get_total_flops() // 2


__all__ = ["MacsFormula", "count_macs", "keep_rate_for_macs", "num_macs", "num_tokens_by_layer"]
