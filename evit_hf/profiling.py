"""What an EViT costs: multiply-accumulate operations, by formula and counted."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .configuration_evit import EViTConfig, height_and_width, keep_rate_by_layer
from .configuration_evit_lv import EViTLVConfig
from .short_cuts import short_cuts_counted
from .token_reorganization import num_attentive_tokens


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
    keep_rate = config.keep_rate if keep_rate is None else keep_rate
    keep_rates = keep_rate_by_layer(keep_rate, config.reorganization_layers)
    rows, columns = config.patch_grid(image_size)
    num_image_tokens = rows * columns

    num_tokens = []
    for i in range(config.num_hidden_layers):
        before = num_image_tokens
        num_attentive = num_attentive_tokens(keep_rates.get(i, 1.0), before)
        if num_attentive < before:
            num_image_tokens = num_attentive + config.fuse_inattentive_tokens
        num_tokens.append((config.num_prefix_tokens + before, config.num_prefix_tokens + num_image_tokens))
    return num_tokens


def num_macs(
    config: EViTConfig,
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
        config: the model's configuration.
        keep_rate: instead of `config.keep_rate`: in (0, 1], one number or one for each reorganization layer.
        image_size: pixels, (height, width) or one number for both, instead of `config.image_size`.
        executed: count what this code really runs under sdpa when nobody looks inside (see `short_cuts`): after the
            last attention only the prefix tokens (LV-ViT reads all of them), no output projection of tokens that are
            given up, the class token's row of attention and the sums of the inattentive tokens.

    Returns: MACs; divide by 1e9 for GMACs. DeiT-S: 4.60 GMACs dense, 3.03 at keep rate 0.7 with fusion, 2.31 at 0.5,
        the 4.6, 3.0 and 2.3 of the paper. Executed are 4.28, 2.90 and 2.25.
    """
    num_tokens = num_tokens_by_layer(config, keep_rate, image_size)
    hidden_size, num_prefix_tokens = config.hidden_size, config.num_prefix_tokens
    macs = _patch_embedding_macs(config, *height_and_width(config.image_size if image_size is None else image_size))
    for i, (attention_tokens, mlp_tokens) in enumerate(num_tokens):
        reorganizes = mlp_tokens < attention_tokens
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


__all__ = ["count_macs", "keep_rate_for_macs", "num_macs", "num_tokens_by_layer"]
