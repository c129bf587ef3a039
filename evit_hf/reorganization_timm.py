"""`reorganize` for timm's Vision Transformers, which hand no keywords to their blocks: halves and loop of their own.

For `VisionTransformer` with blocks of the plain kind (`Block`): registers, layer scale, q/k norm, gated attention and
positions without a class token included. Nothing here imports timm.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .token_reorganization import class_token_probabilities
from .tokens_left import TokensLeft, tokens_of_a_pass


class TimmHalves:
    """Halves of timm's `Block`, whose attention projects query, key and value at once and tells no probabilities."""

    def attend(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        num_scoring_tokens: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention with its residual, and the class token's row where it is asked for."""
        attention, normed = self.attn, self.norm1(hidden_states)
        batch_size, length, _ = normed.shape
        gate = attention.gate(normed).sigmoid() if getattr(attention, "gate", None) is not None else None
        qkv = attention.qkv(normed).reshape(batch_size, length, 3, attention.num_heads, attention.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = attention.q_norm(query), attention.k_norm(key)
        dropout = attention.attn_drop.p if attention.attn_drop.training else 0.0
        if attention.fused_attn:
            output = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        else:
            weights = ((query * attention.scale) @ key.transpose(-2, -1)).softmax(dim=-1)
            output = attention.attn_drop(weights) @ value
        output = getattr(attention, "norm", nn.Identity())(output.transpose(1, 2).reshape(batch_size, length, -1))
        output = attention.proj_drop(attention.proj(output if gate is None else output * gate))
        rows = None
        if num_scoring_tokens:
            rows = class_token_probabilities(query, key, attention.scale, num_scoring_tokens=num_scoring_tokens)
        return hidden_states + self.drop_path1(self.ls1(output)), rows

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """MLP with its residual."""
        return hidden_states + self.drop_path2(self.ls2(self.mlp(self.norm2(hidden_states))))


class ReorganizingTimmModel:
    """timm's loop over its blocks, with the tokens handed to each; in front of the model's own class."""

    def forward(
        self,
        x: torch.Tensor,
        tokens: TokensLeft | None = None,
        keep_rate: Any = None,
        patch_scores: Any = None,
        output_attentive_index: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Classify.

        Args:
            x: (batch_size, num_channels, height, width).
            tokens: of this forward pass, if it has begun further out.
            keep_rate: for this call, in (0, 1], one number or one for each reorganization layer.
            patch_scores: scores from outside that choose the tokens, (batch_size, num_patches), or one for each layer.
            output_attentive_index: whether to return which patches were kept as well.
            **kwargs: none; a mask is refused.

        Returns: logits (batch_size, num_classes); with `output_attentive_index` a pair, whose second is one tensor of
            patch positions (batch_size, num_attentive) for each reorganization layer.
        """
        tokens = tokens if tokens is not None else self.tokens_of_a_pass(keep_rate, patch_scores)
        logits = self.forward_head(self.forward_features(x, tokens=tokens, **kwargs))
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
        patch_scores: Any = None,
    ) -> torch.Tensor:
        """Tokens after the last norm: prefix tokens, then the image tokens that are left.

        Args:
            x: (batch_size, num_channels, height, width).
            attn_mask: refused.
            is_causal: refused.
            tokens: see `forward`.
            keep_rate: see `forward`.
            patch_scores: see `forward`.

        Raises: ValueError for a mask.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("`attn_mask` and `is_causal` cannot follow reorganized tokens yet: leave them out.")
        tokens = tokens if tokens is not None else self.tokens_of_a_pass(keep_rate, patch_scores)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, tokens=tokens, use_reentrant=False)
            else:
                x = block(x, tokens=tokens)
        return self.norm(x)

    def tokens_of_a_pass(self, keep_rate: Any, patch_scores: Any) -> TokensLeft:
        """See `tokens_left.tokens_of_a_pass`."""
        return tokens_of_a_pass(self, keep_rate, patch_scores, self.num_prefix_tokens)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: intermediate features are grids of all patches."""
        raise ValueError(
            "`forward_intermediates` and hidden states of a reorganized timm model would be grids of all patches: use "
            "a dense model, or `forward_features(x, keep_rate=1.0)`."
        )

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Pickle and copy by way of the dense class, since this one is made when it is needed."""
        return _empty_model, (type(self).dense_class,), self.__dict__


def reason_against(model: nn.Module) -> str | None:
    """Why a timm model cannot be reorganized, None if it can."""
    kinds = {base.__name__ for base in type(model).__mro__}
    if "VisionTransformer" not in kinds:
        return f"of timm's models those of the class `VisionTransformer` can be, not `{type(model).__name__}`"
    if "VisionTransformerDistilled" in kinds:
        return "timm's distilled DeiT hands its tokens to two heads: load it as a DeiT of Transformers"
    if model.cls_token is None:
        return "it has no class token whose attention could say which patches matter"
    if model.global_pool != "token":
        return (
            f"its answer comes from `global_pool={model.global_pool!r}`, not from the class token, whose attention "
            "then says little: create it with `global_pool='token'` if it was trained so"
        )
    if type(model.patch_drop) is not nn.Identity:
        return "its patch dropout drops patches itself: create it with `patch_drop_rate=0`"
    kinds = {type(block).__name__ for block in model.blocks}
    kinds |= {type(block.attn).__name__ for block in model.blocks if hasattr(block, "attn")}
    if kinds != {"Attention", "Block"}:
        return f"its blocks are of the kind {', '.join(sorted(kinds))}, not timm's plain `Block` with `Attention`"
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
