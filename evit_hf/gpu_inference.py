"""Inference on GPUs: tokens chosen and rearranged by two Triton kernels, patches embedded by a matrix product.

In PyTorch choosing and rearranging are some thirty small operations for each layer: launching them costs more than a
small batch saves, and at batch 256 they take 7 % of the time of DeiT-S on an H100. The kernels give the same answers
up to the rounding of the fused token, in eager inference: with gradients, while tracing or compiling (Inductor fuses
the operations itself), for counted tokens, and for whoever counts or rewrites operations, the PyTorch code runs.

Nothing here has parameters: a model is saved and loaded as if this file did not exist.
"""

# Triton reads the annotations of its kernels.
# ruff: noqa: ANN001
# mypy: allow-untyped-defs, allow-incomplete-defs

import functools
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .short_cuts import operations_are_watched
from .token_reorganization import TokenChoice
from .token_reorganization import choose_tokens as choose_in_pytorch
from .token_reorganization import rearrange_tokens as rearrange_in_pytorch


try:
    import triton
    from triton import language as tl
    from triton.language import constexpr
except ImportError:  # not on every platform that PyTorch supports
    triton = constexpr = None

logger = logging.get_logger(__name__)

# Rows and columns of the tiles that are copied.
TILE_ROWS, TILE_COLUMNS = 32, 128
# Tokens of an image up to which one program sorts them.
MAX_TOKENS = 1024


def choose_tokens(
    attention: torch.Tensor,
    num_attentive: int,
    *,
    inattentive_tokens: str = "fused",
    token_scores: torch.Tensor | None = None,
    **others: Any,
) -> TokenChoice:
    """`token_reorganization.choose_tokens`, in a kernel where that can be."""
    if token_scores is None and inattentive_tokens != "counted" and runs_in_kernels(attention):
        index, weights = choose_by_kernel(attention, num_attentive, inattentive_tokens == "fused")
        return TokenChoice(index, None, weights)
    others.update(inattentive_tokens=inattentive_tokens, token_scores=token_scores)
    return choose_in_pytorch(attention, num_attentive, **others)


def rearrange_tokens(hidden_states: torch.Tensor, choice: TokenChoice, num_prefix_tokens: int = 1) -> torch.Tensor:
    """`token_reorganization.rearrange_tokens`, in a kernel where that can be."""
    if choice.counted is None and runs_in_kernels(hidden_states):
        return rearrange_by_kernel(hidden_states, choice.attentive_index, choice.weights, num_prefix_tokens)
    return rearrange_in_pytorch(hidden_states, choice, num_prefix_tokens)


def runs_in_kernels(tensor: torch.Tensor) -> bool:
    """Whether tokens of this tensor's device can be chosen and rearranged by kernels, and nobody would see it.

    Args:
        tensor: attention (batch_size, num_image_tokens) or tokens (batch_size, sequence_length, hidden_size).
    """
    return (
        tensor.is_cuda
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and tensor.shape[1] <= MAX_TOKENS
        and tensor.device.index == torch.cuda.current_device()
        and not operations_are_watched(tensor)
        and _has_compiler()
    )


@functools.cache
def _has_compiler() -> bool:
    """Whether Triton can build a kernel here: it needs a C compiler."""
    if triton is None:
        return False
    try:
        attention = torch.zeros(1, 4, device="cuda")
        rearrange_by_kernel(attention[:, :, None], *choose_by_kernel(attention, 2, True), 0)
    except Exception as error:  # whatever stands between Triton and this GPU
        logger.warning(f"Tokens are rearranged without kernels, which Triton could not build: {error}")
        return False
    return True


def embed_patches(projection: nn.Conv2d, pixel_values: torch.Tensor) -> torch.Tensor:
    """`projection(pixel_values)` as a matrix product: GPUs' convolutions are slow for large strides.

    1.6 of 9.3 ms of DeiT-S at keep rate 0.7 were that convolution, in bfloat16 at batch 256 on an H100.

    Args:
        projection: whose stride is its kernel size.
        pixel_values: (batch_size, num_channels, height, width).

    Returns: (batch_size, num_patches, hidden_size).
    """
    (height, width), batch_size = projection.kernel_size, pixel_values.shape[0]
    rows, columns = pixel_values.shape[-2] // height, pixel_values.shape[-1] // width
    patches = pixel_values[..., : rows * height, : columns * width]
    patches = patches.reshape(batch_size, -1, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    return nn.functional.linear(
        patches.reshape(batch_size, rows * columns, -1), projection.weight.flatten(1), projection.bias
    )


def choose_by_kernel(
    attention: torch.Tensor, num_attentive: int, fuses: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`top_attentive_index` and `inattentive_weights` of `token_reorganization`; of equals the lower position first.

    Args:
        attention: (batch_size, num_image_tokens), the class token's.
        num_attentive: image tokens to keep.
        fuses: whether to return the weights.

    Returns: (batch_size, num_attentive) positions; (batch_size, num_image_tokens) weights or None.
    """
    attention = attention.contiguous()
    batch_size, num_image_tokens = attention.shape
    index = torch.empty(batch_size, num_attentive, dtype=torch.int64, device=attention.device)
    weights = torch.empty_like(attention) if fuses else None
    _choose[(batch_size,)](
        attention,
        index,
        attention if weights is None else weights,
        num_image_tokens,
        num_attentive,
        fuses,
        triton.next_power_of_2(num_image_tokens),
    )
    return index, weights


def rearrange_by_kernel(
    hidden_states: torch.Tensor,
    attentive_index: torch.Tensor,
    weights: torch.Tensor | None,
    num_prefix_tokens: int,
) -> torch.Tensor:
    """`token_reorganization.rearrange_tokens` of fused or dropped tokens.

    Args:
        hidden_states: (batch_size, num_prefix_tokens + num_image_tokens, hidden_size).
        attentive_index: (batch_size, num_attentive), positions among the image tokens.
        weights: (batch_size, num_image_tokens), of each token in the fused token; None if they are dropped.
        num_prefix_tokens: tokens before the image tokens, class token included.

    Returns: (batch_size, num_prefix_tokens + num_attentive (+ 1 fused token), hidden_size).
    """
    hidden_states = hidden_states.contiguous()
    batch_size, sequence_length, hidden_size = hidden_states.shape
    num_copied = num_prefix_tokens + attentive_index.shape[1]
    length = num_copied + (weights is not None)
    output = hidden_states.new_empty(batch_size, length, hidden_size)
    num_copies = triton.cdiv(num_copied, TILE_ROWS)
    grid = (num_copies + (weights is not None), triton.cdiv(hidden_size, TILE_COLUMNS), batch_size)
    _rearrange[grid](
        hidden_states,
        attentive_index,
        hidden_states if weights is None else weights,
        output,
        sequence_length,
        hidden_size,
        num_prefix_tokens,
        num_copied,
        length,
        num_copies,
        TILE_ROWS,
        TILE_COLUMNS,
    )
    return output


# Arguments of kernels that change from call to call, so that no kernel is compiled for their values.
CHANGING = (
    "num_image_tokens",
    "num_attentive",
    "sequence_length",
    "num_prefix_tokens",
    "num_copied",
    "length",
    "num_copies",
)


def kernel(function: Any) -> Any:
    """`triton.jit` where there is Triton."""
    if triton is None:
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in CHANGING])


@kernel
def _choose(
    attention,
    index,
    weights,
    num_image_tokens,
    num_attentive,
    fuses: constexpr,
    size: constexpr,
) -> None:
    """Sort an image's tokens by attention; NaN comes first, as in `torch.topk`."""
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, size)
    inside = column < num_image_tokens
    values = tl.load(attention + image * num_image_tokens + column, mask=inside, other=0.0).to(tl.float32)
    # Numbers that are ordered as the values are: their bits, of which those below the sign change for negative values.
    bits = values.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = tl.where(values != values, 0x7FFFFFFF, bits)
    # The position in the lower half: all numbers differ, and of equals the lower position is the greater number.
    numbers = (bits.to(tl.int64) << 32) | (size - 1 - column).to(tl.int64)
    numbers = tl.where(inside, numbers, -9223372036854775808)
    ordered = tl.sort(numbers, descending=True)
    chosen = column < num_attentive
    positions = size - 1 - (ordered & 0xFFFFFFFF)
    tl.store(index + image * num_attentive + column, positions, mask=chosen)
    if fuses:
        last = tl.sum(tl.where(column == num_attentive - 1, ordered, 0), axis=0)
        values = tl.where(numbers >= last, 0.0, values)
        tl.store(weights + image * num_image_tokens + column, values, mask=inside)


@kernel
def _rearrange(
    hidden_states,
    index,
    weights,
    output,
    sequence_length,
    hidden_size,
    num_prefix_tokens,
    num_copied,
    length,
    num_copies,
    rows: constexpr,
    columns: constexpr,
) -> None:
    """Copy a tile of tokens to its new place, or, after the last copies, sum a tile of the fused token."""
    image = tl.program_id(2).to(tl.int64)
    tokens = hidden_states + image * sequence_length * hidden_size
    written = output + image * length * hidden_size
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = column < hidden_size
    if tl.program_id(0) < num_copies:
        new_row = tl.program_id(0) * rows + tl.arange(0, rows)
        is_chosen = (new_row >= num_prefix_tokens) & (new_row < num_copied)
        chosen = index + image * (num_copied - num_prefix_tokens) - num_prefix_tokens
        old_row = tl.load(chosen + new_row, mask=is_chosen, other=0)
        old_row = tl.where(is_chosen, old_row + num_prefix_tokens, new_row)
        mask = (new_row < num_copied)[:, None] & inside[None, :]
        copied = tl.load(tokens + old_row[:, None] * hidden_size + column[None, :], mask=mask)
        tl.store(written + new_row[:, None] * hidden_size + column[None, :], copied, mask=mask)
    else:
        num_image_tokens = sequence_length - num_prefix_tokens
        total = tl.zeros([columns], tl.float32)
        for first in range(0, num_image_tokens, rows):
            row = first + tl.arange(0, rows)
            is_image = row < num_image_tokens
            weight = tl.load(weights + image * num_image_tokens + row, mask=is_image, other=0.0)
            source = tokens + (row + num_prefix_tokens)[:, None] * hidden_size + column[None, :]
            tile = tl.load(source, mask=is_image[:, None] & inside[None, :], other=0.0)
            # The weights are rounded as in a matrix product of tokens and weights.
            weight = weight.to(tile.dtype).to(tl.float32)
            total += tl.sum(weight[:, None] * tile.to(tl.float32), axis=0)
        tl.store(written + num_copied * hidden_size + column, total.to(output.dtype.element_ty), mask=inside)


__all__ = [
    "choose_by_kernel",
    "choose_tokens",
    "embed_patches",
    "rearrange_by_kernel",
    "rearrange_tokens",
    "runs_in_kernels",
]
