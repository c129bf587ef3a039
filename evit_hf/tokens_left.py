"""The tokens of one forward pass through a model that reorganizes them, on their way through its layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .configuration_evit import check_keep_rate, keep_rate_by_layer
from .token_reorganization import attention_by_patch


@dataclass
class TokensLeft:
    """The tokens of one forward pass: what was asked for, and by layer what is left.

    Everything is kept by layer number, so that a layer that gradient checkpointing runs again reads what it read at
    first.

    Args:
        keep_rates: keep rate of each reorganization layer, by layer number.
        fuse: whether the inattentive tokens are fused, or else dropped.
        num_prefix_tokens: class tokens, distillation token and registers, which are never given up.
        num_scoring_tokens: class tokens whose attention scores the image tokens, averaged.
        patch_scores: scores from outside that choose the tokens, (batch_size, num_patches), by layer number.
        scored_layers: layers whose class token attention is asked for.
        num_patches: of the whole image; the first layer says.
        class_attention: that attention, (batch_size, num_image_tokens), by layer number.
        attentive_index: kept tokens as positions in the patch grid, by layer number; -1 for an earlier fused token.
        patch_index: position in the patch grid of the image tokens that leave a layer, by layer number; without the
            layers that all patches leave, in order.
        by_stage: see `of_stage`.
    """

    keep_rates: dict[int, float]
    fuse: bool
    num_prefix_tokens: int
    num_scoring_tokens: int
    patch_scores: dict[int, torch.Tensor]
    scored_layers: tuple[int, ...] = ()
    num_patches: int = 0
    class_attention: dict[int, torch.Tensor] = field(default_factory=dict)
    attentive_index: dict[int, torch.Tensor] = field(default_factory=dict)
    patch_index: dict[int, torch.Tensor] = field(default_factory=dict)
    by_stage: dict[tuple[str, int], Any] = field(default_factory=dict)

    def entering(self, layer: int) -> torch.Tensor | None:
        """Position in the patch grid of the image tokens that enter a layer; None where all patches do, in order."""
        earlier = [number for number in self.patch_index if number < layer]
        return self.patch_index[max(earlier)] if earlier else None

    def of_stage(self, layer: int, name: str, make: Callable[[], Any]) -> Any:
        """What all layers between two reorganizations need alike, made by the first of them.

        Args:
            layer: number of a layer that fewer tokens enter.
            name: of what is made.
            make: makes it, without gradients.
        """
        key = (name, max(number for number in self.patch_index if number < layer))
        if key not in self.by_stage:
            self.by_stage[key] = make()
        return self.by_stage[key]

    def class_attention_by_patch(self) -> torch.Tensor:
        """What is asked for, (batch_size, num_layers, num_patches), see `EViTModelOutput.class_attention`."""
        by_patch = []
        for layer in self.scored_layers:
            attention, patch_index = self.class_attention[layer], self.entering(layer)
            if patch_index is not None:
                attention = attention_by_patch(attention, patch_index, self.num_patches)
            by_patch.append(attention)
        return torch.stack(by_patch, dim=1)


def tokens_of_a_pass(
    owner: nn.Module,
    keep_rate: Any,
    patch_scores: Any,
    num_prefix_tokens: int,
    num_scoring_tokens: int = 1,
    scored_layers: Sequence[int] = (),
) -> TokensLeft:
    """The tokens of a forward pass that begins, as its caller, a schedule or the configuration wants them.

    Args:
        owner: the module that owns the layers, with `config` and `training_keep_rate`.
        keep_rate: of this call, or None.
        patch_scores: of this call, (batch_size, num_patches), one for each reorganization layer, or None.
        num_prefix_tokens: see `TokensLeft`.
        num_scoring_tokens: see `TokensLeft`.
        scored_layers: see `TokensLeft`.

    Raises: ValueError for a keep rate out of range, or a wrong number of scores.
    """
    config = owner.config
    layers = config.reorganization_layers
    if keep_rate is None:
        keep_rate = owner.training_keep_rate if owner.training else None
    keep_rate = config.keep_rate if keep_rate is None else keep_rate
    check_keep_rate(keep_rate, len(layers))
    scores = [patch_scores] * len(layers) if isinstance(patch_scores, torch.Tensor) else list(patch_scores or [])
    if scores and len(scores) != len(layers):
        raise ValueError(
            f"`patch_scores` has {len(scores)} tensors but there are {len(layers)} reorganization layers: pass one "
            "tensor for all of them, or one for each."
        )
    return TokensLeft(
        keep_rates=keep_rate_by_layer(keep_rate, layers),
        fuse=config.fuse_inattentive_tokens,
        num_prefix_tokens=num_prefix_tokens,
        num_scoring_tokens=num_scoring_tokens,
        patch_scores=dict(zip(layers, scores, strict=False)),
        scored_layers=tuple(scored_layers),
    )


def bias_of_pairs(bias: torch.Tensor, tokens: TokensLeft, layer: int) -> torch.Tensor:
    """Bias for each pair of tokens that enter a layer, of a bias for each pair of positions.

    A fused token has no position: its bias is 0 with other image tokens, and with the prefix and itself that of any
    patch.

    Args:
        bias: ((1,) num_heads, num_tokens, num_tokens), prefix tokens first, then all patches.
        tokens: of this forward pass.
        layer: its number.

    Returns: (batch_size, num_heads, num_prefix_tokens + num_image_tokens, the same); the bias itself if all patches
        are there.
    """
    patch_index = tokens.entering(layer)
    if patch_index is None:
        return bias
    pairs, lacks_distance = tokens.of_stage(
        layer, "pairs", lambda: _pairs(patch_index, tokens.num_prefix_tokens, bias.shape[-1])
    )
    # One long row for each head is read in order, where pairs of indices would be looked up one by one.
    of_pairs = bias.flatten(0, -3).flatten(1).index_select(1, pairs.flatten())
    return of_pairs.view(-1, *pairs.shape).transpose(0, 1).masked_fill(lacks_distance, 0.0)


def _pairs(patch_index: torch.Tensor, num_prefix_tokens: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of each pair of tokens in a map of all positions, and where one of them has no distance to the other."""
    batch_size = patch_index.shape[0]
    prefix = torch.arange(num_prefix_tokens, device=patch_index.device).expand(batch_size, -1)
    position = torch.cat((prefix, patch_index.clamp(min=0) + num_prefix_tokens), dim=1)
    is_fused = nn.functional.pad(patch_index < 0, (num_prefix_tokens, 0))
    is_image = torch.arange(position.shape[1], device=position.device) >= num_prefix_tokens
    lacks_distance = (is_fused[:, :, None] | is_fused[:, None, :]) & is_image & is_image[:, None]
    lacks_distance = lacks_distance & ~torch.eye(position.shape[1], dtype=torch.bool, device=position.device)
    return position[:, :, None] * num_tokens + position[:, None, :], lacks_distance.unsqueeze(1)


__all__ = ["TokensLeft", "bias_of_pairs", "tokens_of_a_pass"]
