"""The tokens of one forward pass through a model that reorganizes them, on their way through its layers."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .configuration_evit import (
    BUDGET_FIELDS,
    budget_defaults,
    changed_budget,
    check_macs,
    is_whole_number,
    keep_rate_by_layer,
    python_value,
)
from .token_reorganization import (
    ImageTokens,
    TowerCosts,
    attention_by_patch,
    log_sizes,
    mean_keys,
    num_attentive_tokens,
    tokens_left_at_macs,
)


_remembered = functools.lru_cache(maxsize=256)(tokens_left_at_macs)


@dataclass
class TokenPlan:
    """How many tokens each layer keeps in one forward pass, and what becomes of the others.

    Args:
        layers: zero-based layers that reorganize their tokens.
        inattentive_tokens: "fused", "dropped" or "counted".
        keep_rates: keep rate of each of the layers, by layer number; empty if `macs` decides.
        macs: share of the dense model's operations, or None.
        tokens_left: image tokens after each of the layers, by layer number, once the size of the images is known;
            empty if `keep_rates` decide.
    """

    layers: list[int]
    inattentive_tokens: str
    keep_rates: dict[int, float]
    macs: float | None
    tokens_left: dict[int, int] = field(default_factory=dict)

    def for_images(self, num_patches: int, costs: TowerCosts) -> "TokenPlan":
        """The plan for images of this size.

        Args:
            num_patches: image tokens at the first layer's input.
            costs: of the model.

        Raises: ValueError if the share of operations is out of reach.
        """
        if self.macs is None:
            return self
        # A compiler would follow a cache with a warning.
        solve = tokens_left_at_macs if torch.compiler.is_compiling() else _remembered
        left = solve(self.macs, int(num_patches), tuple(self.layers), costs)
        return TokenPlan(self.layers, self.inattentive_tokens, {}, self.macs, left)

    def num_attentive(self, layer: int, num_image_tokens: int) -> int:
        """Tokens that a layer keeps of those at its input, a fused token not counted in."""
        if layer in self.keep_rates:
            return num_attentive_tokens(self.keep_rates[layer], num_image_tokens)
        if layer not in self.tokens_left or self.tokens_left[layer] >= num_image_tokens:
            return num_image_tokens
        return self.tokens_left[layer] - (self.inattentive_tokens == "fused")


def token_plan(
    config: Any, num_layers: int, keep_rate: Any = None, macs: Any = None, training_keep_rate: Any = None
) -> TokenPlan:
    """What a call asks for, or else a schedule, or else the configuration.

    Args:
        config: with the fields of `BUDGET_FIELDS`.
        num_layers: of the model.
        keep_rate: of the call, or None. Where the configuration has `macs`, the paper's layers and fusing come with
            it.
        macs: of the call, or None. Where the configuration has a keep rate, all layers and counting come with it.
        training_keep_rate: of the schedule, or None.

    Raises: ValueError for values out of range, or `keep_rate` together with `macs`.
    """
    keep_rate, macs = python_value(keep_rate), python_value(macs)
    if keep_rate is None and macs is None:
        keep_rate = training_keep_rate
    settings = {name: getattr(config, name) for name in BUDGET_FIELDS}
    if keep_rate is not None or macs is not None:
        settings = budget_defaults(changed_budget(settings, {"keep_rate": keep_rate, "macs": macs}), num_layers)
    layers, inattentive_tokens = settings["reorganization_layers"], settings["inattentive_tokens"]
    if settings["macs"] is not None:
        check_macs(settings["macs"])
        return TokenPlan(layers, inattentive_tokens, {}, settings["macs"])
    return TokenPlan(layers, inattentive_tokens, keep_rate_by_layer(settings["keep_rate"], layers), None)


def scores_by_layer(
    patch_scores: torch.Tensor | list[torch.Tensor] | None, layers: list[int]
) -> dict[int, torch.Tensor]:
    """Scores from outside by number of the layer that uses them.

    Args:
        patch_scores: (batch_size, num_patches), one such tensor for each of the layers, or None.
        layers: that reorganize their tokens.

    Returns: floating point, also of a mask of ones and zeros.

    Raises: ValueError for a wrong number of tensors.
    """
    if patch_scores is None:
        return {}
    scores = [patch_scores] * len(layers) if isinstance(patch_scores, torch.Tensor) else list(patch_scores)
    if len(scores) != len(layers):
        raise ValueError(
            f"`patch_scores` has {len(scores)} tensors but there are {len(layers)} reorganization layers: pass one "
            "tensor for all of them, or one for each."
        )
    return {layer: one if one.is_floating_point() else one.float() for layer, one in zip(layers, scores, strict=True)}


def check_scores(by_layer: dict[int, torch.Tensor], batch_size: int, num_patches: int) -> None:
    """Check that scores from outside are one for each patch of each image.

    Raises: ValueError for another shape.
    """
    for scores in by_layer.values():
        if tuple(scores.shape) != (batch_size, num_patches):
            raise ValueError(
                f"`patch_scores` must be (batch_size, num_patches) = {(batch_size, num_patches)}, got "
                f"{tuple(scores.shape)}: give one score for each patch, none for the class token."
            )


@dataclass
class TokensLeft:
    """The tokens of one forward pass: what was asked for, and by layer what is left.

    Everything is kept by layer number, so that a layer that gradient checkpointing runs again reads what it read at
    first.

    Args:
        plan: how many tokens each layer keeps; for images of this size once the first layer has begun.
        costs: of the model.
        num_prefix_tokens: class tokens, distillation token and registers, which are never given up.
        num_scoring_tokens: class tokens whose attention scores the image tokens, averaged.
        patch_scores: scores from outside that choose the tokens, (batch_size, num_patches), by layer number.
        scored_layers: layers whose class token attention is asked for.
        num_patches: of the whole image; the first layer says.
        class_attention: that attention, (batch_size, num_image_tokens), by layer number.
        chosen: kept tokens as positions among the layer's image tokens, by number of a layer that gave up some.
        attentive_index: kept tokens as positions in the patch grid, by layer number; -1 for an earlier fused token.
        image_tokens: those that leave a layer, by layer number; without the layers that all patches leave, in order.
        by_stage: see `of_stage`.
    """

    plan: TokenPlan
    costs: TowerCosts
    num_prefix_tokens: int
    num_scoring_tokens: int
    patch_scores: dict[int, torch.Tensor]
    scored_layers: tuple[int, ...] = ()
    num_patches: int = 0
    class_attention: dict[int, torch.Tensor] = field(default_factory=dict)
    chosen: dict[int, torch.Tensor] = field(default_factory=dict)
    attentive_index: dict[int, torch.Tensor] = field(default_factory=dict)
    image_tokens: dict[int, ImageTokens] = field(default_factory=dict)
    by_stage: dict[tuple[str, int], Any] = field(default_factory=dict)

    def entering(self, layer: int) -> ImageTokens | None:
        """The image tokens that enter a layer; None where all patches do, in order."""
        earlier = [number for number in self.image_tokens if number < layer]
        return self.image_tokens[max(earlier)] if earlier else None

    def of_stage(self, layer: int, name: str, make: Callable[[], Any]) -> Any:
        """What all layers between two reorganizations need alike, made by the first of them.

        Args:
            layer: number of a layer that fewer tokens enter.
            name: of what is made.
            make: makes it, without gradients.
        """
        key = (name, max(number for number in self.image_tokens if number < layer))
        if key not in self.by_stage:
            self.by_stage[key] = make()
        return self.by_stage[key]

    def leaving(self) -> ImageTokens | None:
        """The image tokens after the last layer; None if they are all patches, in order."""
        return self.image_tokens[max(self.image_tokens)] if self.image_tokens else None

    def on_whole_grid(self, features: torch.Tensor) -> torch.Tensor:
        """Features in which each patch has those of the token that counts it: an average then weighs it by its size.

        Args:
            features: (batch_size, num_prefix_tokens + num_image_tokens_left, hidden_size).

        Returns: (batch_size, num_prefix_tokens + num_patches, hidden_size); unless tokens are counted, the features.
        """
        left = self.leaving()
        if left is None or left.counted_by is None:
            return features
        batch_size, device = left.counted_by.shape[0], features.device
        prefix = torch.arange(self.num_prefix_tokens, device=device).expand(batch_size, -1)
        position = torch.cat((prefix, left.counted_by + self.num_prefix_tokens), dim=1)
        return features.gather(1, position.unsqueeze(-1).expand(-1, -1, features.shape[-1]))

    def class_attention_by_patch(self) -> torch.Tensor:
        """What is asked for, (batch_size, num_layers, num_patches), see `EViTModelOutput.class_attention`."""
        by_patch = []
        for layer in self.scored_layers:
            attention, left = self.class_attention[layer], self.entering(layer)
            if left is not None:
                attention = attention_by_patch(attention, left.patch_index, self.num_patches)
            by_patch.append(attention)
        return torch.stack(by_patch, dim=1)


@dataclass
class Asked:
    """What a layer asks of its attention, and the answer; made for one call.

    Args:
        num_scoring_tokens: class tokens whose attention is wanted; 0 for none.
        compares_tokens: whether the keys are wanted.
        num_prefix_tokens: tokens before the image tokens.
        token_sizes: (batch_size, num_image_tokens), how many patches each token counts; None for one each.
        probabilities: (batch_size, num_heads, at least num_scoring_tokens, sequence_length), after softmax.
        keys: see `token_reorganization.mean_keys`.
    """

    num_scoring_tokens: int
    compares_tokens: bool
    num_prefix_tokens: int
    token_sizes: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
    keys: torch.Tensor | None = None

    def mask(self, attention_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the logits: the family's mask, and the logarithm of the sizes."""
        if self.token_sizes is None:
            return attention_mask
        bias = log_sizes(self.token_sizes, self.num_prefix_tokens).to(dtype)
        return bias if attention_mask is None else attention_mask + bias

    def answer(self, key: torch.Tensor, probabilities: Callable[[], torch.Tensor]) -> None:
        """Keep what was asked for."""
        if self.num_scoring_tokens:
            self.probabilities = probabilities()
        if self.compares_tokens:
            self.keys = mean_keys(key, self.num_prefix_tokens)


def tokens_of_a_pass(
    owner: Any,
    keep_rate: Any,
    macs: Any,
    patch_scores: Any,
    num_prefix_tokens: int,
    num_scoring_tokens: int = 1,
    output_class_attention: bool | Sequence[int] = False,
) -> TokensLeft:
    """The tokens of a forward pass that begins, as its caller, a schedule or the configuration wants them.

    Args:
        owner: the module that owns the layers, with `config`, `costs` and `training_keep_rate`.
        keep_rate: of this call, or None.
        macs: of this call, or None.
        patch_scores: of this call, (batch_size, num_patches), one for each reorganization layer, or None.
        num_prefix_tokens: see `TokensLeft`.
        num_scoring_tokens: see `TokensLeft`.
        output_class_attention: of this call: layers whose class token attention is wanted, True for those that
            reorganize.

    Raises: ValueError for a keep rate or share of operations out of range, a wrong number of scores, or layers that
        do not exist.
    """
    scheduled = owner.training_keep_rate if owner.training else None
    plan = token_plan(owner.config, owner.costs.num_layers, keep_rate, macs, scheduled)
    return TokensLeft(
        plan=plan,
        costs=owner.costs,
        num_prefix_tokens=num_prefix_tokens,
        num_scoring_tokens=num_scoring_tokens,
        patch_scores=scores_by_layer(patch_scores, plan.layers),
        scored_layers=scored_layers(output_class_attention, plan.layers, owner.costs.num_layers),
    )


def scored_layers(asked: bool | Sequence[int], plan_layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Layers whose class token attention is asked for, by zero-based number: True means those that reorganize.

    Raises: ValueError for layers that do not exist.
    """
    if isinstance(asked, bool) or asked is None:
        return tuple(plan_layers) if asked else ()
    layers = python_value(asked)
    if not isinstance(layers, (list, tuple)) or any(
        not is_whole_number(layer) or not 0 <= layer < num_layers for layer in layers
    ):
        raise ValueError(
            f"`output_class_attention` must be True, False, or a list of layers in [0, {num_layers - 1}], got "
            f"{asked!r}: True takes the layers that reorganize."
        )
    return tuple(layers)


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
    left = tokens.entering(layer)
    if left is None:
        return bias
    pairs, lacks_distance = tokens.of_stage(
        layer, "pairs", lambda: _pairs(left.patch_index, tokens.num_prefix_tokens, bias.shape[-1])
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


__all__ = [
    "Asked",
    "TokenPlan",
    "TokensLeft",
    "bias_of_pairs",
    "scored_layers",
    "scores_by_layer",
    "token_plan",
    "tokens_of_a_pass",
]
