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
    attentive tokens: the image tokens that are kept: those with the highest class token attention or, when the others
        are counted, with the highest product of attention and novelty.
    inattentive tokens: the others. They are fused into one token, or dropped (the paper), or each is counted by the
        kept token that it resembles most (for models that were not trained to lose tokens).

A worked example: 196 image tokens at keep rate 0.7 become 139, 99 and 71 after three layers with fusion, and 138, 97
and 68 without.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


# What becomes of the inattentive tokens.
INATTENTIVE_TOKENS = ("fused", "dropped", "counted")
# Share of the mean in a token that counts others, see `averaged_tokens`.
AVERAGED_SHARE = 0.5
# A share of the operations never leaves fewer image tokens than this: with fewer the answers of models that were not
# trained to lose tokens fall apart.
MIN_TOKENS = 16


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


class TowerCosts(NamedTuple):
    """Multiply-accumulate operations of a stack of Vision Transformer layers, by what they are proportional to.

    Args:
        patch: for each patch of the image: its embedding.
        attention: for each token at a layer's input: query, key, value and output projection.
        pair: for each pair of those tokens: the attention map and its product with the values.
        feed_forward: for each token after the reorganization: the MLP.
        key: numbers in a key, by which tokens are compared; not among the operations of `macs`.
        num_layers: layers.
        num_prefix_tokens: tokens before the image tokens, class token included.
    """

    patch: int
    attention: int
    pair: int
    feed_forward: int
    key: int
    num_layers: int
    num_prefix_tokens: int

    def macs(self, num_patches: int, tokens_left: dict[int, int]) -> int:
        """Operations of one image: patch embedding and layers, without classifiers and pooling.

        Args:
            num_patches: image tokens at the first layer's input.
            tokens_left: image tokens after each layer that reorganizes, by layer number.
        """
        macs, tokens = num_patches * self.patch, self.num_prefix_tokens + num_patches
        for layer in range(self.num_layers):
            before = tokens
            tokens = self.num_prefix_tokens + tokens_left[layer] if layer in tokens_left else tokens
            macs += self.layer_macs(before, tokens)
        return macs

    def layer_macs(self, num_before: int, num_after: int) -> int:
        """Operations of one layer, of its tokens before and after the reorganization, prefix tokens included."""
        return num_before * (self.attention + num_before * self.pair) + num_after * self.feed_forward


def tokens_left_at_macs(
    macs: float, num_patches: int, layers: Sequence[int], costs: TowerCosts, min_tokens: int | None = None
) -> dict[int, int]:
    """Image tokens after each layer when all layers give up the same number, for a share of the dense operations.

    If n layers give up t tokens in all, num_patches - (i + 1) * t // n are left after the i-th of them, but never
    fewer than 16 (or num_patches, if there are fewer). t is the smallest number that costs no more than asked for.

    Args:
        macs: share of the operations of the dense layers and patch embedding, in (0, 1].
        num_patches: image tokens at the first layer's input.
        layers: zero-based layers that give up tokens, strictly increasing.
        costs: of the model.
        min_tokens: instead of 16.

    Returns: image tokens after each of the layers, by layer number. ViT-B/16 at 224 pixels and 0.66 has 186 after the
        first layer, 11 fewer after each other, and 66 after the last.

    Raises: ValueError if 16 tokens after each of the layers still cost more.
    """
    layers, fewest = list(layers), min(MIN_TOKENS if min_tokens is None else min_tokens, num_patches)

    def left(given_up: int) -> dict[int, int]:
        return {layer: max(fewest, num_patches - (i + 1) * given_up // len(layers)) for i, layer in enumerate(layers)}

    dense = costs.macs(num_patches, {})
    low, high = 0, len(layers) * (num_patches - fewest)
    if costs.macs(num_patches, left(high) if layers else {}) > macs * dense:
        lowest = costs.macs(num_patches, left(high) if layers else {}) / dense
        raise ValueError(
            f"`macs` {macs} is out of reach: with {fewest} of {num_patches} image tokens after layers {layers} the "
            f"model still needs {math.ceil(lowest * 1000) / 1000} of its operations. Ask for more, or take larger "
            "images or smaller patches."
        )
    while low < high:
        middle = (low + high) // 2
        if costs.macs(num_patches, left(middle)) <= macs * dense:
            high = middle
        else:
            low = middle + 1
    return left(low) if layers else {}


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
    return tensor.to(_at_least_float32_dtype(tensor))


def _at_least_float32_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


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


class CountedTokens(NamedTuple):
    """Who counts whom, and the sizes that follow from it: what counting knows beyond the choice.

    Args:
        inattentive_rows: (batch_size, num_inattentive), rows of the given-up tokens, see `attentive_rows`.
        counted_by: (batch_size, num_image_tokens), the kept token that counts each token of this layer's input, itself
            for a kept one, as position among the kept tokens.
        token_sizes: (batch_size, num_attentive), float32: how many patches each kept token now counts, itself
            included.
        counting: (batch_size, num_counting), the kept tokens that count given-up ones, as positions among the kept
            tokens; filled up with others, since there are as many as could be.
        shares: (batch_size, num_counting, num_inattentive), share of each given-up token in the mean of its kept one;
            0 for all others.
    """

    inattentive_rows: torch.Tensor
    counted_by: torch.Tensor
    token_sizes: torch.Tensor
    counting: torch.Tensor
    shares: torch.Tensor


class TokenChoice(NamedTuple):
    """Which tokens a layer keeps, and what becomes of the others: all that `rearrange_tokens` needs.

    Args:
        attentive_index: (batch_size, num_attentive), positions among the image tokens.
        rows: (batch_size, num_attentive), see `attentive_rows`; None where a kernel chose them.
        weights: (batch_size, num_image_tokens), see `inattentive_weights`; None unless the others are fused.
        counted: who counts them; None unless they are counted.
    """

    attentive_index: torch.Tensor
    rows: torch.Tensor | None
    weights: torch.Tensor | None = None
    counted: CountedTokens | None = None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What `follow_tokens` takes: `attentive_index` and, if tokens are counted, who counts them, and the sizes."""
        counted = () if self.counted is None else (self.counted.counted_by, self.counted.token_sizes)
        return self.attentive_index, *counted


def rows_of(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Tokens by their rows in the long list of all tokens of the batch, see `attentive_rows`.

    Args:
        tokens: (batch_size, sequence_length, size).
        rows: (batch_size, num_rows).

    Returns: (batch_size, num_rows, size).
    """
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, tokens.shape[-1])


def rearrange_tokens(hidden_states: torch.Tensor, choice: TokenChoice, num_prefix_tokens: int = 1) -> torch.Tensor:
    """Prefix tokens, attentive tokens, fused token: what is left once the attentive tokens are chosen.

    Args:
        hidden_states: (batch_size, num_prefix_tokens + num_image_tokens, hidden_size).
        choice: see `choose_tokens`.
        num_prefix_tokens: tokens before the image tokens, class token included.

    Returns: (batch_size, num_prefix_tokens + num_attentive (+ 1 fused token), hidden_size).
    """
    rows = choice.rows
    if rows is None:
        rows = attentive_rows(choice.attentive_index, hidden_states.shape[1], num_prefix_tokens)
    prefix, tokens = hidden_states[:, :num_prefix_tokens], hidden_states[:, num_prefix_tokens:]
    attentive = rows_of(hidden_states, rows)
    if choice.counted is not None:
        inattentive = rows_of(hidden_states, choice.counted.inattentive_rows)
        # Few tokens count others: only they change, in the copy that was just made.
        rows = attentive_rows(choice.counted.counting, attentive.shape[1], 0)
        averaged = averaged_tokens(rows_of(attentive, rows), inattentive, choice.counted.shares)
        attentive = attentive.flatten(0, 1).index_copy_(0, rows.flatten(), averaged.flatten(0, 1)).view_as(attentive)
    if choice.weights is None:
        return torch.cat((prefix, attentive), dim=1)
    return torch.cat((prefix, attentive, fused_token(tokens, choice.weights)), dim=1)


def averaged_tokens(attentive: torch.Tensor, inattentive: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Kept tokens, each half of itself and half of the mean of what it counts, at its own length.

    The mean is weighted by size and the token itself takes part in it; a token that counts nothing new stays as it is.
    Averages are shorter than what they are averages of, which the layers after it did not learn:
    hence the length.

    Args:
        attentive: (batch_size, num_counting, hidden_size), the kept tokens that count others.
        inattentive: (batch_size, num_inattentive, hidden_size).
        shares: (batch_size, num_counting, num_inattentive), see `CountedTokens`.

    Returns: (batch_size, num_counting, hidden_size). Gradients flow through the tokens.

    Source: ToMe (arXiv 2210.09461) takes the mean itself; ToFu (arXiv 2312.01026) keeps the length.
    """
    with torch.autocast(attentive.device.type, enabled=False):
        shares = AVERAGED_SHARE * shares
        # The length is set below, so that a token's own share can be 1 and the others' in proportion to it.
        shares = shares / (1 - shares.sum(dim=2, keepdim=True))
        mixed = torch.baddbmm(attentive, shares.to(attentive.dtype), inattentive)
        before = attentive.norm(dim=2, keepdim=True, dtype=_at_least_float32_dtype(attentive))
        after = mixed.norm(dim=2, keepdim=True, dtype=_at_least_float32_dtype(attentive))
        return mixed * (before / after.clamp(min=1e-12)).to(mixed.dtype)


def choose_tokens(
    attention: torch.Tensor,
    num_attentive: int,
    *,
    num_prefix_tokens: int = 1,
    inattentive_tokens: str = "fused",
    token_scores: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    token_sizes: torch.Tensor | None = None,
) -> TokenChoice:
    """Choose the attentive tokens, and prepare what becomes of the others.

    Args:
        attention: (batch_size, num_image_tokens), see `class_token_attention`. It weighs the fused token, and chooses
            the tokens (when they are counted, together with `novelty`) unless `token_scores` does.
        num_attentive: image tokens to keep, between 1 and num_image_tokens.
        num_prefix_tokens: tokens before the image tokens, class token included.
        inattentive_tokens: "fused" makes one token of the inattentive ones, "dropped" drops them, "counted" lets each
            of them be counted by a kept token.
        token_scores: (batch_size, num_image_tokens), scores from outside that choose the tokens.
        keys: (batch_size, num_image_tokens, head_dim), see `mean_keys`; needed for "counted".
        token_sizes: (batch_size, num_image_tokens), see `CountedTokens`; None for all 1.
    """
    if inattentive_tokens == "counted":
        return _counted_choice(attention, num_attentive, num_prefix_tokens, token_scores, keys, token_sizes)
    index = top_attentive_index(attention if token_scores is None else token_scores, num_attentive)
    return _choice_of(index, attention, num_prefix_tokens, inattentive_tokens == "fused")


def _choice_of(index: torch.Tensor, attention: torch.Tensor, num_prefix_tokens: int, fuses: bool) -> TokenChoice:
    """Rows and weights that follow from the chosen tokens."""
    rows = attentive_rows(index, num_prefix_tokens + attention.shape[1], num_prefix_tokens)
    return TokenChoice(index, rows, inattentive_weights(attention, index) if fuses else None)


def mean_keys(key: torch.Tensor, num_prefix_tokens: int = 1) -> torch.Tensor:
    """Keys of the image tokens, averaged over the heads: what tells whether two tokens are alike.

    Args:
        key: (batch_size, num_key_heads, sequence_length, head_dim), as the attention sees them: rotated and normalized
            where the family does so.
        num_prefix_tokens: tokens before the image tokens, class token included.

    Returns: (batch_size, num_image_tokens, head_dim), float32 or float64, of length 1. A key of zeros stays one; it
        resembles nothing. Without gradient.

    Source: ToMe (arXiv 2210.09461) compares the same.
    """
    with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
        keys = key[:, :, num_prefix_tokens:].to(_at_least_float32_dtype(key)).mean(dim=1)
        return torch.nn.functional.normalize(keys, dim=-1)


def novelty(sorted_keys: torch.Tensor) -> torch.Tensor:
    """How unlike each token is to the most similar one among those that are attended to more.

    Args:
        sorted_keys: (batch_size, num_image_tokens, head_dim), see `mean_keys`, in descending order of attention.

    Returns: (batch_size, num_image_tokens), 1 - cosine, in [0, 2]; 2 for the first token, which has none before it.
    """
    with torch.autocast(sorted_keys.device.type, enabled=False):
        alike = sorted_keys @ sorted_keys.transpose(1, 2)
        position = torch.arange(alike.shape[1], device=alike.device)
        alike = alike.masked_fill(position >= position.unsqueeze(1), -1.0)
        return (1 - alike.amax(dim=2)).clamp(min=0)


def _counted_choice(
    attention: torch.Tensor,
    num_attentive: int,
    num_prefix_tokens: int,
    token_scores: torch.Tensor | None,
    keys: torch.Tensor | None,
    token_sizes: torch.Tensor | None,
) -> TokenChoice:
    """Keep the tokens of highest attention times novelty, and let each other be counted by the one it resembles most.

    A token that is attended to, but looks like one that is attended to more, can be counted by it. Equal attention:
    the lower position comes first. Equal scores: the higher attention. Equally similar: the higher score. NaN comes
    before all numbers, as in `torch.topk`.

    Source: choosing the tokens that are both dense and far from any denser one is density-peak clustering; ToMe (arXiv
        2210.09461) introduced sizes.
    """
    if keys is None:
        raise ValueError("`keys` is missing: counting needs them, see `mean_keys`.")
    num_image_tokens = attention.shape[1]
    with torch.no_grad(), torch.autocast(attention.device.type, enabled=False):
        # 1. Order the tokens by score.
        ranked = attention if token_scores is None else token_scores
        ranked, order = ranked.sort(dim=1, descending=True, stable=True)
        keys = rows_of(keys, attentive_rows(order, num_image_tokens, 0))
        if token_scores is None:
            by_score = (ranked * novelty(keys)).sort(dim=1, descending=True, stable=True).indices
            order = order.gather(1, by_score)
            keys = rows_of(keys, attentive_rows(by_score, num_image_tokens, 0))
        # 2. Each token that is given up finds the kept one it resembles most.
        alike = keys[:, num_attentive:] @ keys[:, :num_attentive].transpose(1, 2)
        sizes = torch.ones_like(keys[:, :, 0]) if token_sizes is None else token_sizes
        return counted_choice(order, alike.argmax(dim=2), sizes, num_prefix_tokens)


def counted_choice(
    order: torch.Tensor, nearest: torch.Tensor, token_sizes: torch.Tensor, num_prefix_tokens: int = 1
) -> TokenChoice:
    """What follows from the order of the tokens and from who counts whom.

    Args:
        order: (batch_size, num_image_tokens), all positions among the image tokens, those that are kept first.
        nearest: (batch_size, num_inattentive), the kept token that counts each of the others, by position in `order`.
        token_sizes: (batch_size, num_image_tokens), patches that each token counts so far.
        num_prefix_tokens: tokens before the image tokens, class token included.
    """
    num_image_tokens, num_inattentive = order.shape[1], nearest.shape[1]
    num_attentive = num_image_tokens - num_inattentive
    kept = torch.arange(num_attentive, device=order.device)
    counted_by = torch.cat((kept.expand(order.shape[0], -1), nearest), dim=1)
    counted_by = torch.empty_like(order).scatter(1, order, counted_by)
    sizes = token_sizes.gather(1, order)
    added = (nearest.unsqueeze(1) == kept.unsqueeze(1)) * sizes[:, num_attentive:].unsqueeze(1)
    total = added.sum(dim=2)
    sizes = sizes[:, :num_attentive] + total
    counting = total.topk(min(num_attentive, num_inattentive), dim=1).indices
    added = rows_of(added, attentive_rows(counting, num_attentive, 0))
    # A size is 0 only where a mask hides all that a token counts.
    shares = added / sizes.gather(1, counting).unsqueeze(2).clamp(min=1)
    rows = attentive_rows(order, num_prefix_tokens + num_image_tokens, num_prefix_tokens)
    counted = CountedTokens(rows[:, num_attentive:], counted_by, sizes, counting, shares)
    return TokenChoice(order[:, :num_attentive], rows[:, :num_attentive], None, counted)


def log_sizes(token_sizes: torch.Tensor, num_prefix_tokens: int = 1) -> torch.Tensor:
    """What is added to the attention logits of each key: a token that counts five patches is attended to five times.

    Args:
        token_sizes: (batch_size, num_image_tokens), see `CountedTokens`.
        num_prefix_tokens: tokens before the image tokens, which count only themselves: 0.

    Returns: (batch_size, 1, 1, num_prefix_tokens + num_image_tokens).

    Source: "proportional attention" of ToMe, arXiv 2210.09461.
    """
    return torch.nn.functional.pad(token_sizes.log(), (num_prefix_tokens, 0))[:, None, None]


def reorganize_tokens(
    hidden_states: torch.Tensor,
    attention: torch.Tensor,
    num_attentive: int,
    *,
    num_prefix_tokens: int = 1,
    inattentive_tokens: str = "fused",
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
        inattentive_tokens: "fused" into one token, appended last, or "dropped". To count them, use `choose_tokens` and
            `rearrange_tokens`.
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
    if inattentive_tokens not in ("fused", "dropped"):
        raise ValueError(
            f"`inattentive_tokens` must be 'fused' or 'dropped', got {inattentive_tokens!r}: to count them, use "
            "`choose_tokens` and `rearrange_tokens`."
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
    choice = _choice_of(attentive_index, attention, num_prefix_tokens, inattentive_tokens == "fused")
    return rearrange_tokens(hidden_states, choice, num_prefix_tokens), attentive_index


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


class ImageTokens(NamedTuple):
    """The image tokens at some layer's input or output.

    Args:
        patch_index: (batch_size, num_image_tokens), position in the original patch grid, -1 for a fused token.
        token_sizes: (batch_size, num_image_tokens), see `CountedTokens`; None while every token is one patch.
        counted_by: (batch_size, num_patches), which of these tokens, by position among them, counts each patch of the
            original grid; None before any token was counted.
    """

    patch_index: torch.Tensor
    token_sizes: torch.Tensor | None = None
    counted_by: torch.Tensor | None = None


def all_patches(batch_size: int, num_patches: int, device: torch.device) -> ImageTokens:
    """The image tokens before any reorganization: every patch, in the order of the grid."""
    return ImageTokens(torch.arange(num_patches, device=device).expand(batch_size, -1))


def follow_tokens(
    tokens: ImageTokens,
    inattentive_tokens: str,
    attentive_index: torch.Tensor,
    counted_by: torch.Tensor | None = None,
    token_sizes: torch.Tensor | None = None,
) -> ImageTokens:
    """The image tokens after a choice was carried out on them.

    Args:
        tokens: before it.
        inattentive_tokens: see `choose_tokens`.
        attentive_index: (batch_size, num_attentive), see `TokenChoice`.
        counted_by: (batch_size, num_image_tokens), see `CountedTokens`.
        token_sizes: (batch_size, num_attentive), see `CountedTokens`.
    """
    patch_index = follow_patches(tokens.patch_index, attentive_index)
    if inattentive_tokens == "fused":
        patch_index = append_fused_patch(patch_index)
    if counted_by is not None and tokens.counted_by is not None:
        counted_by = counted_by.gather(1, tokens.counted_by)
    return ImageTokens(patch_index, token_sizes, counted_by)


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
    inattentive_tokens: str = "fused",
) -> torch.Tensor:
    """Attention mask over the tokens that `reorganize_tokens` returns.

    Args:
        token_mask: (batch_size, num_prefix_tokens + num_image_tokens), nonzero where a token may be attended to.
        attentive_index: (batch_size, num_attentive), positions among the image tokens.
        num_prefix_tokens: tokens before the image tokens, class token included.
        inattentive_tokens: with "fused" there is a fused token, which may be attended to if any token in it may.

    Returns: (batch_size, num_prefix_tokens + num_attentive (+ 1)), dtype of `token_mask`.
    """
    prefix, mask = token_mask[:, :num_prefix_tokens], token_mask[:, num_prefix_tokens:]
    attentive = mask.gather(1, attentive_index)
    if inattentive_tokens != "fused":
        return torch.cat((prefix, attentive), dim=1)
    fused = mask.scatter(1, attentive_index, 0).amax(dim=1, keepdim=True)
    return torch.cat((prefix, attentive, fused), dim=1)


__all__ = [
    "INATTENTIVE_TOKENS",
    "CountedTokens",
    "ImageTokens",
    "TokenChoice",
    "TowerCosts",
    "all_patches",
    "append_fused_patch",
    "attention_by_patch",
    "attentive_rows",
    "averaged_tokens",
    "choose_tokens",
    "class_token_attention",
    "class_token_probabilities",
    "counted_choice",
    "follow_patches",
    "follow_tokens",
    "fused_token",
    "inattentive_weights",
    "log_sizes",
    "mean_keys",
    "novelty",
    "num_attentive_tokens",
    "rearrange_tokens",
    "reorganize_token_mask",
    "reorganize_tokens",
    "rows_of",
    "scores_by_patch",
    "tokens_left_at_macs",
    "top_attentive_index",
]
