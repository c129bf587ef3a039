"""`reorganize` for timm's Vision Transformers, which hand no keywords to their blocks: their own halves and loop.

For three classes of models with a class token, all of whose blocks attend first and then feed forward:
    - `VisionTransformer` (ViT, DeiT, DeiT III, DINOv2, CLIP): registers, layer scale, q/k norm, gated attention,
      distillation token;
    - `Eva` (EVA, EVA-02, DINOv3, Perception Encoder, ViTs with rotary positions): rotary positions follow the tokens;
    - `Beit`: its position bias follows the tokens.

Nothing here imports timm.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .token_reorganization import class_token_probabilities
from .tokens_left import Asked, TokensLeft, bias_of_pairs, tokens_of_a_pass


# For each class of models: its blocks and attentions that work, and what its answer may be read from. The class tokens
# of EVA, DINOv3, PE and BEiT were trained to describe the image whatever the classifier reads later.
MODEL_CLASSES = {
    "VisionTransformer": ({"Block", "Attention"}, ("token",)),
    "Eva": ({"EvaBlock", "EvaBlockPostNorm", "EvaAttention", "AttentionRope"}, ("token", "avg", "map")),
    "Beit": ({"Block", "Attention"}, ("token", "avg")),
}


class TimmHalves:
    """Halves of timm's blocks, whose attentions project in several ways and tell no probabilities."""

    def attend(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        tokens: TokensLeft,
        asked: Asked,
        rope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention with its residual; answers what the layer asks.

        Args:
            hidden_states: (batch_size, num_prefix_tokens + num_image_tokens, hidden_size).
            attention_mask: position bias that the layers of a BEiT share, (num_heads, num_positions, num_positions),
                or None.
            tokens: of this forward pass.
            asked: of the layer, see `tokens_left.Asked`.
            rope: sines and cosines of all patches, see `rotary_of_tokens`, or None.
        """
        attention, left = self.attn, tokens.entering(self.layer_number)
        bias, is_post_norm = attention_mask, type(self).__name__ == "EvaBlockPostNorm"
        if getattr(attention, "relative_position_bias_table", None) is not None:
            bias = attention._get_rel_pos_bias() if bias is None else attention._get_rel_pos_bias() + bias
        if bias is not None:
            bias = bias_of_pairs(bias, tokens, self.layer_number)
        if rope is not None and left is not None:
            rope = rotary_of_tokens(rope, left.patch_index)

        normed = hidden_states if is_post_norm else self.norm1(hidden_states)
        gate = attention.gate(normed).sigmoid() if getattr(attention, "gate", None) is not None else None
        query, key, value = _query_key_value(attention, normed, rope)
        dropout = attention.attn_drop.p if attention.attn_drop.training else 0.0
        bias = asked.mask(bias, query.dtype)
        if attention.fused_attn:
            output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        else:
            weights = (query * attention.scale) @ key.transpose(-2, -1)
            weights = (weights if bias is None else weights + bias).softmax(dim=-1)
            output = attention.attn_drop(weights) @ value
        output = getattr(attention, "norm", nn.Identity())(output.transpose(1, 2).flatten(2))
        output = attention.proj_drop(attention.proj(output if gate is None else output * gate))
        asked.answer(
            key,
            lambda: class_token_probabilities(
                query, key, attention.scale, num_scoring_tokens=asked.num_scoring_tokens, position_bias=bias
            ),
        )
        output = self.norm1(output) if is_post_norm else _scaled(self, output, "ls1", "gamma_1")
        return hidden_states + self.drop_path1(output)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """MLP with its residual."""
        if type(self).__name__ == "EvaBlockPostNorm":
            return hidden_states + self.drop_path2(self.norm2(self.mlp(hidden_states)))
        output = _scaled(self, self.mlp(self.norm2(hidden_states)), "ls2", "gamma_2")
        return hidden_states + self.drop_path2(output)


def _scaled(block: nn.Module, output: torch.Tensor, layer_scale: str, gamma: str) -> torch.Tensor:
    """The output of a half, times its layer scale if the block has one."""
    if hasattr(block, layer_scale):
        return getattr(block, layer_scale)(output)
    factor = getattr(block, gamma)
    return output if factor is None else factor * output


def _query_key_value(
    attention: nn.Module, normed: torch.Tensor, rope: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of timm's attentions, each (batch_size, num_heads, sequence_length, head_dim)."""
    if attention.qkv is None:
        parts = [getattr(attention, f"{name}_proj")(normed) for name in "qkv"]
    elif getattr(attention, "q_bias", None) is None:
        parts = attention.qkv(normed).chunk(3, dim=-1)
    else:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        if attention.qkv_bias_separate:
            parts = (attention.qkv(normed) + bias).chunk(3, dim=-1)
        else:
            parts = nn.functional.linear(normed, attention.qkv.weight, bias).chunk(3, dim=-1)
    head_dim = parts[0].shape[-1] // attention.num_heads
    query, key, value = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in parts)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    if rope is not None:
        query, key = (_rotated(attention, states, rope).type_as(value) for states in (query, key))
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1:
        key, value = (states.repeat_interleave(num_groups, dim=1) for states in (key, value))
    return query, key, value


def _rotated(attention: nn.Module, states: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Queries or keys, those of the image tokens turned by their positions."""
    prefix, image = states.tensor_split([attention.num_prefix_tokens], dim=2)
    sin, cos = rope.chunk(2, dim=-1)
    if getattr(attention, "rotate_half", False):  # pairs (0, dim / 2), (1, dim / 2 + 1), ...
        first, second = image.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:  # pairs (0, 1), (2, 3), ...
        turned = torch.stack((-image[..., 1::2], image[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((prefix, (image * cos + turned * sin).to(image.dtype)), dim=2)


def rotary_of_tokens(rope: torch.Tensor, patch_index: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of the image tokens that are left. A fused token has no position and is not rotated.

    Args:
        rope: of all patches, (num_patches, 2 * head_dim), sines first; or of each head, (num_heads, num_patches,
            2 * head_dim).
        patch_index: (batch_size, num_image_tokens), patches that are left, -1 for a fused token.

    Returns: (batch_size, 1 or num_heads, num_image_tokens, 2 * head_dim).
    """
    of_tokens = rope[..., patch_index.clamp(min=0), :]
    of_tokens = of_tokens.unsqueeze(1) if rope.ndim == 2 else of_tokens.transpose(0, 1)
    sin, cos = of_tokens.chunk(2, dim=-1)
    is_fused = (patch_index < 0)[:, None, :, None]
    return torch.cat((sin.masked_fill(is_fused, 0.0), cos.masked_fill(is_fused, 1.0)), dim=-1)


class ReorganizingTimmModel:
    """timm's loop over its blocks, with the tokens handed to each; in front of the model's own class."""

    def forward(
        self,
        x: torch.Tensor,
        tokens: TokensLeft | None = None,
        keep_rate: Any = None,
        macs: Any = None,
        patch_scores: Any = None,
        output_attentive_index: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Classify.

        Args:
            x: (batch_size, num_channels, height, width).
            tokens: of this forward pass, if it has begun further out.
            keep_rate: for this call, in (0, 1], one number or one for each reorganization layer.
            macs: for this call, share of the dense model's operations, in (0, 1].
            patch_scores: scores from outside that choose the tokens, (batch_size, num_patches), or one for each layer.
            output_attentive_index: whether to return which patches were kept as well.
            **kwargs: none; a mask is refused.

        Returns: logits (batch_size, num_classes); with `output_attentive_index` a pair, whose second is one tensor of
            patch positions (batch_size, num_attentive) for each reorganization layer.
        """
        tokens = tokens if tokens is not None else self.tokens_of_a_pass(keep_rate, macs, patch_scores)
        features = self.forward_features(x, tokens=tokens, **kwargs)
        logits = self.forward_head(tokens.on_whole_grid(features))
        if output_attentive_index:
            return logits, tuple(tokens.attentive_index[layer] for layer in sorted(tokens.attentive_index))
        return logits

    def forward_features(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        tokens: TokensLeft | None = None,
        keep_rate: Any = None,
        macs: Any = None,
        patch_scores: Any = None,
    ) -> torch.Tensor:
        """Tokens after the last norm: prefix tokens, then the image tokens that are left.

        Args:
            x: (batch_size, num_channels, height, width).
            attn_mask: refused.
            is_causal: refused.
            tokens: see `forward`.
            keep_rate: see `forward`.
            macs: see `forward`.
            patch_scores: see `forward`.

        Raises: ValueError for a mask.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("`attn_mask` and `is_causal` cannot follow reorganized tokens yet: leave them out.")
        tokens = tokens if tokens is not None else self.tokens_of_a_pass(keep_rate, macs, patch_scores)
        x, positions = self._embedded(x)
        for block, position in zip(self.blocks, positions, strict=True):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, tokens=tokens, use_reentrant=False, **position)
            else:
                x = block(x, tokens=tokens, **position)
        return self.norm(x)

    def _embedded(self, images: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """Tokens that enter the first block, and for each block what tells it their positions."""
        x, depth = self.patch_embed(images), len(self.blocks)
        if not hasattr(self, "_pos_embed"):  # Beit
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
            x = self.pos_drop(x if self.pos_embed is None else x + self.pos_embed)
            bias = {} if self.rel_pos_bias is None else {"attention_mask": self.rel_pos_bias()}
            return x, [bias] * depth
        x = self._pos_embed(x)
        if not isinstance(x, tuple):  # VisionTransformer
            return self.norm_pre(self.patch_drop(x)), [{}] * depth
        x, rope = x  # Eva
        if rope is None:
            return self.norm_pre(x), [{}] * depth
        return self.norm_pre(x), [{"rope": rope[i] if self.rope_mixed else rope} for i in range(depth)]

    def tokens_of_a_pass(self, keep_rate: Any, macs: Any, patch_scores: Any) -> TokensLeft:
        """See `tokens_left.tokens_of_a_pass`."""
        return tokens_of_a_pass(self, keep_rate, macs, patch_scores, self.num_prefix_tokens)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: intermediate features are grids of all patches."""
        raise ValueError(
            "`forward_intermediates` and hidden states of a reorganized timm model would be grids of all patches: use "
            "a dense model, or `forward_features(x, keep_rate=1.0)`."
        )

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Pickle and copy by way of the dense class, since this one is made when it is needed."""
        return _empty_model, (type(self).dense_class,), self.__dict__


def reason_against(model: nn.Module) -> str | None:
    """Why a timm model cannot be reorganized, None if it can."""
    kind = next((base.__name__ for base in type(model).__mro__ if base.__name__ in MODEL_CLASSES), None)
    if kind is None:
        return (
            f"of timm's models those of the class `VisionTransformer`, `Eva` or `Beit` can be, not "
            f"`{type(model).__name__}`"
        )
    parts, poolings = MODEL_CLASSES[kind]
    if model.cls_token is None:
        return "it has no class token whose attention could say which patches matter"
    if model.global_pool not in poolings:
        return (
            f"its answer comes from `global_pool={model.global_pool!r}`, not from the class token, whose attention "
            "then says little: create it with `global_pool='token'` if it was trained so"
        )
    if type(getattr(model, "patch_drop", None)) not in (nn.Identity, type(None)):
        return "its patch dropout drops patches itself: create it with `patch_drop_rate=0`"
    found = {type(block).__name__ for block in model.blocks}
    found |= {type(block.attn).__name__ for block in model.blocks if hasattr(block, "attn")}
    if not found <= parts:
        return f"its blocks are of the kind {', '.join(sorted(found))}, not timm's plain `Block` with `Attention`"
    return None


def reorganizing_model_class(model_class: type) -> type:
    """The class of a timm model that hands tokens to its blocks; its name stays."""
    names = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    bases = (ReorganizingTimmModel, model_class)
    return type(model_class.__name__, bases, {**names, "dense_class": model_class})


def _empty_model(model_class: type) -> nn.Module:
    """A reorganizing model without contents, for pickle and deepcopy to fill."""
    model_class = reorganizing_model_class(model_class)
    return model_class.__new__(model_class)
