"""Token reorganization, the core of EViT, as pure functions of tensors.

Nothing here knows a model: any Vision Transformer with a class token can call `reorganize_tokens` between attention
and MLP. Source of every formula: "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations" (Liang et al., ICLR 2022, arXiv 2202.07800) and its official implementation,
https://github.com/youweiliang/evit/blob/5ca95a7/evit.py#L186-L270.

Terms:
    prefix tokens: the tokens before the image tokens: the class token, always first, then a distillation token or
        registers. They are never candidates: never dropped, fused or moved.
    image tokens: everything after the prefix. One of them may be a fused token made by an earlier layer, which
        competes like any other token.
    attentive tokens: the image tokens with the highest class token attention; they are kept.
    inattentive tokens: the others; they are fused into one token or dropped.

A worked example: 196 image tokens at keep rate 0.7 become 139, 99 and 71 after three layers with fusion, and 138, 97
and 68 without.
"""

import math
from typing import NamedTuple

import torch


def num_attentive_tokens(keep_rate: float, num_image_tokens: int) -> int:
    """Number of tokens that a layer keeps: ceil(keep_rate * num_image_tokens).

    Args:
        keep_rate: share of image tokens kept, in (0, 1].
        num_image_tokens: image tokens at the layer's input, an earlier fused token counted in, class token excluded.
            In a graph that `torch.jit.trace` records for images of any size it is a tensor.

    Returns: attentive tokens, at least 1. The product is rounded up as the floating-point number it is, like the
        official code does: 0.55 * 100 is 55.000000000000007 and gives 56. A tensor is multiplied in float64 too.

    Source: evit.py:209 of the official implementation.
    """
    if isinstance(num_image_tokens, torch.Tensor):
        return (num_image_tokens.double() * keep_rate).ceil().long()
    return math.ceil(keep_rate * num_image_tokens)


def class_token_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    token_mask: torch.Tensor | None = None,
    num_scoring_tokens: int = 1,
    position_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention probabilities of the class token only: one row of the attention map, at a fraction of its cost.

    Computed in addition to whichever attention kernel runs, since fused kernels (sdpa, flash, flex) do not return the
    map. The softmax runs in float32, or in float64 for inputs in float64.

    Args:
        query: (batch_size, num_heads, sequence_length, head_dim); only its first position, the class token, is read,
            or as many as `num_scoring_tokens` says.
        key: (batch_size, num_heads, sequence_length, head_dim).
        scaling: factor on the dot products, head_dim ** -0.5 in a ViT.
        token_mask: (batch_size, sequence_length), True or nonzero where a token may be attended to.
        num_scoring_tokens: 2 to include a distillation token that follows the class token.
        position_bias: ((1 or batch_size,) num_heads, sequence_length, sequence_length), what the family adds to the
            logits of a pair of positions, as BEiT does.

    Returns: (batch_size, num_heads, num_scoring_tokens, sequence_length), float32 or float64.
    """
    logits = _at_least_float32(query[:, :, :num_scoring_tokens] @ key.transpose(-2, -1)) * scaling
    if position_bias is not None:
        logits = logits + position_bias[..., :num_scoring_tokens, :]
    if token_mask is not None:
        logits = logits.masked_fill(token_mask[:, None, None, :] == 0, float("-inf"))
    return logits.softmax(dim=-1)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def class_token_attention(
    attention_probabilities: torch.Tensor, num_prefix_tokens: int = 1, num_scoring_tokens: int = 1
) -> torch.Tensor:
    """Attention that the class token pays to every image token, averaged over the heads.

    Args:
        attention_probabilities: (batch_size, num_heads, num_queries, sequence_length) after softmax, first query the
            class token: a whole attention map, or what `class_token_probabilities` returns.
        num_prefix_tokens: tokens before the image tokens, class token included.
        num_scoring_tokens: 2 to average over the class token and the distillation token that follows it.

    Returns: (batch_size, num_image_tokens), float32, or float64 for probabilities in float64. A row sums to less than
        1: the share of the prefix tokens is cut off and nothing is renormalised.

    Source: evit.py:206-208 of the official implementation.
    """
    scoring = attention_probabilities[:, :, :num_scoring_tokens, num_prefix_tokens:]
    return _at_least_float32(scoring).mean(dim=(1, 2))


def top_attentive_index(scores: torch.Tensor, num_attentive: int) -> torch.Tensor:
    """Positions of the `num_attentive` highest scores, in descending order of score.

    Args:
        scores: (batch_size, num_image_tokens).
        num_attentive: tokens to keep, between 1 and num_image_tokens.

    Returns: (batch_size, num_attentive), positions among the image tokens.
    """
    return scores.topk(num_attentive, dim=1).indices


def attentive_rows(attentive_index: torch.Tensor, sequence_length: int, num_prefix_tokens: int = 1) -> torch.Tensor:
    """Positions of the attentive tokens in one long list of all tokens of the batch.

    Copying rows of that list beats `gather`, which would look up each number of a token one by one.

    Args:
        attentive_index: (batch_size, num_attentive), positions among the image tokens.
        sequence_length: num_prefix_tokens + num_image_tokens.
        num_prefix_tokens: tokens before the image tokens, class token included.

    Returns: (batch_size, num_attentive), positions among the batch_size * sequence_length tokens.
    """
    batch_size = attentive_index.shape[0]
    first_row = torch.arange(batch_size, device=attentive_index.device) * sequence_length + num_prefix_tokens
    return attentive_index + first_row.unsqueeze(1)


def inattentive_weights(attention: torch.Tensor, attentive_index: torch.Tensor) -> torch.Tensor:
    """Share of each image token in the fused token: its attention, zero if it is attentive.

    Args:
        attention: (batch_size, num_image_tokens), the class token's attention, mean over heads, after softmax.
        attentive_index: (batch_size, num_attentive), positions among the image tokens.

    Returns: (batch_size, num_image_tokens). Gradients flow through it.
    """
    return attention.scatter(1, attentive_index, 0.0)


def fused_token(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of the inattentive tokens, weighted by the class token's attention: one token for all of them.

    The sum runs over all tokens, the attentive ones with weight zero, so no complement of `attentive_index` is ever
    built.

    Args:
        tokens: (batch_size, num_image_tokens, hidden_size), prefix tokens excluded.
        weights: (batch_size, num_image_tokens), see `inattentive_weights`. They are not renormalised, as in the
            paper's code.

    Returns: (batch_size, 1, hidden_size).

    Source: "inattentive token fusion" of the paper; evit.py:259-263 of the official implementation.
    """
    return (weights.to(tokens.dtype).unsqueeze(1) @ tokens).to(tokens.dtype)


def rearrange_tokens(
    hidden_states: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None, num_prefix_tokens: int = 1
) -> torch.Tensor:
    """Prefix tokens, attentive tokens, fused token: what is left once the attentive tokens are chosen.

    Args:
        hidden_states: (batch_size, num_prefix_tokens + num_image_tokens, hidden_size).
        rows: (batch_size, num_attentive), see `attentive_rows`.
        weights: (batch_size, num_image_tokens), see `inattentive_weights`; None drops the inattentive tokens.
        num_prefix_tokens: tokens before the image tokens, class token included.

    Returns: (batch_size, num_prefix_tokens + num_attentive (+ 1 fused token), hidden_size).
    """
    prefix, tokens = hidden_states[:, :num_prefix_tokens], hidden_states[:, num_prefix_tokens:]
    attentive = hidden_states.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, hidden_states.shape[-1])
    if weights is None:
        return torch.cat((prefix, attentive), dim=1)
    return torch.cat((prefix, attentive, fused_token(tokens, weights)), dim=1)


class TokenChoice(NamedTuple):
    """Which tokens a layer keeps, and what becomes of the others: all that `rearrange_tokens` needs.

    Args:
        attentive_index: (batch_size, num_attentive), positions among the image tokens.
        rows: (batch_size, num_attentive), see `attentive_rows`.
        weights: (batch_size, num_image_tokens), see `inattentive_weights`; None drops the inattentive tokens.
    """

    attentive_index: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor | None


def choose_tokens(
    attention: torch.Tensor,
    num_attentive: int,
    *,
    num_prefix_tokens: int = 1,
    fuse_inattentive_tokens: bool = True,
    token_scores: torch.Tensor | None = None,
) -> TokenChoice:
    """Choose the attentive tokens, and weigh the others if they are to be fused.

    Args:
        attention: (batch_size, num_image_tokens), see `class_token_attention`. It weighs the fused token, and chooses
            the tokens unless `token_scores` does.
        num_attentive: image tokens to keep, between 1 and num_image_tokens.
        num_prefix_tokens: tokens before the image tokens, class token included.
        fuse_inattentive_tokens: whether the inattentive tokens become one token or are dropped.
        token_scores: (batch_size, num_image_tokens), scores from outside that choose the tokens.
    """
    index = top_attentive_index(attention if token_scores is None else token_scores, num_attentive)
    return _choice_of(index, attention, num_prefix_tokens, fuse_inattentive_tokens)


def _choice_of(index: torch.Tensor, attention: torch.Tensor, num_prefix_tokens: int, fuses: bool) -> TokenChoice:
    """Rows and weights that follow from the chosen tokens."""
    rows = attentive_rows(index, num_prefix_tokens + attention.shape[1], num_prefix_tokens)
    return TokenChoice(index, rows, inattentive_weights(attention, index) if fuses else None)


def reorganize_tokens(
    hidden_states: torch.Tensor,
    attention: torch.Tensor,
    num_attentive: int,
    *,
    num_prefix_tokens: int = 1,
    fuse_inattentive_tokens: bool = True,
    token_scores: torch.Tensor | None = None,
    attentive_index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the attentive tokens and fuse or drop the inattentive ones: the paper's step between attention and MLP.

    Args:
        hidden_states: (batch_size, num_prefix_tokens + num_image_tokens, hidden_size), after attention and residual.
        attention: (batch_size, num_image_tokens), the class token's attention, see `class_token_attention`. It weighs
            the fused token, and it chooses the tokens unless `token_scores` or `attentive_index` does.
        num_attentive: image tokens to keep, see `num_attentive_tokens`. If that is all of them, nothing happens.
        num_prefix_tokens: tokens before the image tokens, class token included.
        fuse_inattentive_tokens: whether the inattentive tokens are fused into one token, appended last, or dropped.
        token_scores: (batch_size, num_image_tokens), scores from outside that choose the tokens: an oracle, a random
            baseline, a mask of ones and zeros.
        attentive_index: (batch_size, num_attentive), the choice itself from outside, positions among the image tokens.

    Returns:
        hidden_states: (batch_size, num_prefix_tokens + num_attentive (+ 1 fused token), hidden_size): prefix tokens,
            attentive tokens in descending order of score, fused token.
        attentive_index: (batch_size, num_attentive), positions among the image tokens of the input.

    Raises: ValueError if `num_attentive` is not in [1, num_image_tokens], if both choices are given, or if a choice
        has the wrong shape.

    Source: evit.py:253-266 of the official implementation.
    """
    num_image_tokens = hidden_states.shape[1] - num_prefix_tokens
    if not 1 <= num_attentive <= num_image_tokens:
        raise ValueError(
            f"`num_attentive` must be between 1 and the {num_image_tokens} image tokens, got {num_attentive}: "
            "compute it with `num_attentive_tokens(keep_rate, num_image_tokens)`."
        )
    if token_scores is not None and attentive_index is not None:
        raise ValueError("`token_scores` and `attentive_index` both choose the tokens: pass one of them.")

    # 1. Choose the attentive tokens.
    if attentive_index is None:
        scores = attention if token_scores is None else token_scores
        if tuple(scores.shape) != (hidden_states.shape[0], num_image_tokens):
            raise ValueError(
                f"`{'attention' if token_scores is None else 'token_scores'}` must be (batch_size, num_image_tokens) "
                f"= {(hidden_states.shape[0], num_image_tokens)}, got {tuple(scores.shape)}: leave out the prefix "
                "tokens."
            )
        attentive_index = top_attentive_index(scores, num_attentive)
    elif tuple(attentive_index.shape) != (hidden_states.shape[0], num_attentive):
        raise ValueError(
            f"`attentive_index` must be (batch_size, num_attentive) = {(hidden_states.shape[0], num_attentive)}, "
            f"got {tuple(attentive_index.shape)}: give as many positions per image as tokens are kept."
        )
    if num_attentive == num_image_tokens:
        return hidden_states, attentive_index

    # 2. Keep them, after the prefix tokens, and fuse the rest into one token.
    choice = _choice_of(attentive_index, attention, num_prefix_tokens, fuse_inattentive_tokens)
    return rearrange_tokens(hidden_states, choice.rows, choice.weights, num_prefix_tokens), attentive_index


def follow_patches(patch_index: torch.Tensor, attentive_index: torch.Tensor) -> torch.Tensor:
    """Original patch position of every attentive token.

    Args:
        patch_index: (batch_size, num_image_tokens), position in the original patch grid of each image token at the
            layer's input, -1 for a fused token.
        attentive_index: (batch_size, num_attentive), positions among those tokens.

    Returns: (batch_size, num_attentive), positions in the original patch grid, -1 for a fused token that was kept.
    """
    return patch_index.gather(1, attentive_index)


def append_fused_patch(patch_index: torch.Tensor) -> torch.Tensor:
    """Mark the fused token, which is made of many patches, with position -1 after the attentive ones.

    Args:
        patch_index: (batch_size, num_attentive).

    Returns: (batch_size, num_attentive + 1).
    """
    return torch.nn.functional.pad(patch_index, (0, 1), value=-1)


def scores_by_patch(patch_scores: torch.Tensor, patch_index: torch.Tensor) -> torch.Tensor:
    """Scores from outside, given by original patch position, for the image tokens that are left at some layer.

    Args:
        patch_scores: (batch_size, num_patches), one score for each patch of the original grid.
        patch_index: (batch_size, num_image_tokens), original patch position of each token, -1 for a fused token.

    Returns: (batch_size, num_image_tokens). A fused token has no position and scores -inf: a dropped token never
        outranks a kept one; it is folded into the next fused token.
    """
    scores = patch_scores.gather(1, patch_index.clamp(min=0))
    return scores.masked_fill(patch_index < 0, float("-inf"))


def attention_by_patch(attention: torch.Tensor, patch_index: torch.Tensor, num_patches: int) -> torch.Tensor:
    """The class token's attention to the image tokens of some layer, by patch of the original grid.

    Args:
        attention: (batch_size, num_image_tokens), see `class_token_attention`.
        patch_index: (batch_size, num_image_tokens), original patch position of each token, -1 for a fused token.
        num_patches: patches of the original grid.

    Returns: (batch_size, num_patches), 0 for patches that were given up before; what goes to a fused token is left
        out.
    """
    by_patch = attention.new_zeros(attention.shape[0], num_patches + 1)
    # Position -1 lands in an extra column, which is cut off again.
    index = torch.where(patch_index < 0, num_patches, patch_index)
    return by_patch.scatter(1, index, attention)[:, :num_patches]


def reorganize_token_mask(
    token_mask: torch.Tensor,
    attentive_index: torch.Tensor,
    num_prefix_tokens: int = 1,
    fuse_inattentive_tokens: bool = True,
) -> torch.Tensor:
    """Attention mask over the tokens that `reorganize_tokens` returns.

    Args:
        token_mask: (batch_size, num_prefix_tokens + num_image_tokens), nonzero where a token may be attended to.
        attentive_index: (batch_size, num_attentive), positions among the image tokens.
        num_prefix_tokens: tokens before the image tokens, class token included.
        fuse_inattentive_tokens: whether a fused token was appended. It may be attended to if any token in it may.

    Returns: (batch_size, num_prefix_tokens + num_attentive (+ 1)), dtype of `token_mask`.
    """
    prefix, mask = token_mask[:, :num_prefix_tokens], token_mask[:, num_prefix_tokens:]
    attentive = mask.gather(1, attentive_index)
    if not fuse_inattentive_tokens:
        return torch.cat((prefix, attentive), dim=1)
    fused = mask.scatter(1, attentive_index, 0).amax(dim=1, keepdim=True)
    return torch.cat((prefix, attentive, fused), dim=1)


__all__ = [
    "TokenChoice",
    "append_fused_patch",
    "attention_by_patch",
    "attentive_rows",
    "choose_tokens",
    "class_token_attention",
    "class_token_probabilities",
    "follow_patches",
    "fused_token",
    "inattentive_weights",
    "num_attentive_tokens",
    "rearrange_tokens",
    "reorganize_token_mask",
    "reorganize_tokens",
    "scores_by_patch",
    "top_attentive_index",
]
