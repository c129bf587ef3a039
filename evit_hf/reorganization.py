"""`reorganize`: any Vision Transformer with a class token keeps only its attentive tokens, by one call.

The paper's step comes between the two halves of a layer, attention and feed-forward network. Each family of models
writes these halves in one of a few dialects; `ReorganizingLayer` runs one half, reorganizes, and runs the other.
What one forward pass knows of its tokens (which are left, and where they were) is a `TokensLeft` that travels in the
keywords of the layers, never on a module: two forward passes may be under way at once, and gradient checkpointing runs
a layer again after others have run.

The arithmetic is in `token_reorganization`. For ViT and DeiT the classes of `modeling_evit` compute the same, faster.
"""

import copy
import functools
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, TransformersKwargs

from .configuration_evit import (
    BUDGET_FIELDS,
    DEFAULT_MACS,
    EViTConfig,
    budget_defaults,
    changed_budget,
    refuse_misspelt_names,
    renamed_settings,
)
from .gpu_inference import choose_tokens, rearrange_tokens
from .reorganization_timm import MODEL_CLASSES, TimmHalves, reason_against, reorganizing_model_class
from .token_reorganization import (
    TowerCosts,
    all_patches,
    class_token_attention,
    class_token_probabilities,
    follow_patches,
    follow_tokens,
    scores_by_patch,
)
from .tokens_left import Asked, TokensLeft, bias_of_pairs, check_scores, tokens_of_a_pass


# Transformers' attention that also tells what the class token looks at, where a layer asks for it: by the name of the
# implementation that it stands in for. No functions for masks are registered for them: none is needed, and while
# tracing Transformers would make a mask of full length.
WITH_CLASS_ROW = {"sdpa": "sdpa_with_class_row", "eager": "eager_with_class_row"}
# What a saved model needs to be reorganized without this package.
CODE_FILES = (
    "reorganization.py",
    "reorganization_timm.py",
    "tokens_left.py",
    "token_reorganization.py",
    "gpu_inference.py",
    "short_cuts.py",
    "configuration_evit.py",
)


# What `save_pretrained` hands to `push_to_hub`.
OF_PUSH = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def sdpa_with_class_row(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    asked: Asked | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Transformers' sdpa attention, which also answers what a layer asks.

    Args:
        module: the attention module.
        query: (batch_size, num_heads, sequence_length, head_dim), rotated where the family rotates.
        key: (batch_size, num_key_heads, sequence_length, head_dim), likewise.
        value: (batch_size, num_key_heads, sequence_length, head_dim).
        attention_mask: additive, (1 or batch_size, num_heads, sequence_length, sequence_length), or None.
        scaling: factor on the dot products; head_dim ** -0.5 by default.
        asked: of the layer.
        **kwargs: for `sdpa_attention_forward`.

    Returns: output (batch_size, sequence_length, num_heads, head_dim), and None.
    """
    kwargs.pop("tokens", None)
    if asked is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    attention_mask = asked.mask(attention_mask, query.dtype)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    def probabilities() -> torch.Tensor:
        repeats = query.shape[1] // key.shape[1]
        return class_token_probabilities(
            query,
            key.repeat_interleave(repeats, dim=1) if repeats > 1 else key,  # grouped keys
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            num_scoring_tokens=asked.num_scoring_tokens,
            position_bias=attention_mask,
        )

    asked.answer(key, probabilities)
    return output, None


def eager_with_class_row(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    asked: Asked | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The family's own eager attention, which also answers what a layer asks; see `sdpa_with_class_row`."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if asked is None:
        return eager(module, query, key, value, attention_mask, **kwargs)
    attention_mask = asked.mask(attention_mask, query.dtype)
    output, attention_map = eager(module, query, key, value, attention_mask, **kwargs)
    asked.answer(key, lambda: attention_map)
    return output, attention_map


ALL_ATTENTION_FUNCTIONS.register(WITH_CLASS_ROW["sdpa"], sdpa_with_class_row)
ALL_ATTENTION_FUNCTIONS.register(WITH_CLASS_ROW["eager"], eager_with_class_row)


class ReorganizingLayer:
    """A layer that reorganizes its tokens between its two halves; in front of the layer's own class.

    The halves come from a dialect: `attend(hidden_states, attention_mask, **kwargs)` returns the hidden states after
    attention and residual, `feed_forward(hidden_states)` returns the layer's output. The keywords reach the attention
    function, which answers what the layer asks in `asked`.
    """

    layer_number: int

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        tokens: TokensLeft | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend, reorganize, feed forward.

        Args:
            hidden_states: (batch_size, num_prefix_tokens + num_image_tokens, hidden_size).
            attention_mask: of the family, over the tokens of the whole image.
            tokens: of this forward pass. Without them the layer is the dense one.
            **kwargs: of the family.

        Returns: (batch_size, num_prefix_tokens + num_attentive (+ 1 fused token), hidden_size).
        """
        if tokens is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        number, num_image_tokens = self.layer_number, hidden_states.shape[1] - tokens.num_prefix_tokens
        if number == 0:
            tokens.plan, tokens.num_patches = tokens.plan.for_images(num_image_tokens, tokens.costs), num_image_tokens
            check_scores(tokens.patch_scores, hidden_states.shape[0], num_image_tokens)
        plan, left = tokens.plan, tokens.entering(number)
        if left is not None:
            attention_mask, kwargs = self.follow_tokens(tokens, left.patch_index, attention_mask, kwargs)
        num_attentive = plan.num_attentive(number, num_image_tokens)
        reorganizes, is_scored = num_attentive < num_image_tokens, number in tokens.scored_layers
        asked = Asked(
            num_scoring_tokens=tokens.num_scoring_tokens if reorganizes or is_scored else 0,
            compares_tokens=reorganizes and plan.inattentive_tokens == "counted",
            num_prefix_tokens=tokens.num_prefix_tokens,
            token_sizes=None if left is None else left.token_sizes,
        )
        hidden_states = self.attend(hidden_states, attention_mask, tokens=tokens, asked=asked, **kwargs)
        attention = None
        if asked.probabilities is not None:
            attention = class_token_attention(asked.probabilities, tokens.num_prefix_tokens, tokens.num_scoring_tokens)
        if is_scored:
            tokens.class_attention[number] = attention
        is_whole = left is None
        if is_whole and number in plan.layers:
            left = all_patches(hidden_states.shape[0], num_image_tokens, hidden_states.device)
        if reorganizes:
            scores = tokens.patch_scores.get(number)
            choice = choose_tokens(
                attention,
                num_attentive,
                num_prefix_tokens=tokens.num_prefix_tokens,
                inattentive_tokens=plan.inattentive_tokens,
                token_scores=None if scores is None else scores_by_patch(scores, left.patch_index),
                keys=asked.keys,
                token_sizes=left.token_sizes,
            )
            hidden_states = rearrange_tokens(hidden_states, choice, tokens.num_prefix_tokens)
            tokens.chosen[number] = choice.attentive_index
            tokens.attentive_index[number] = follow_patches(left.patch_index, choice.attentive_index)
            tokens.image_tokens[number] = follow_tokens(left, plan.inattentive_tokens, *choice.tensors())
        elif number in plan.layers:
            tokens.attentive_index[number] = left.patch_index
            if not is_whole:
                tokens.image_tokens[number] = left
        return self.feed_forward(hidden_states)

    def follow_tokens(
        self,
        tokens: TokensLeft,
        patch_index: torch.Tensor,
        attention_mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """What the attention is given for the tokens that are left; rotary positions follow them.

        A fused token has no position and is not rotated.

        Args:
            tokens: of this forward pass.
            patch_index: (batch_size, num_image_tokens), see `TokensLeft.entering`.
            attention_mask: of the family, over the tokens of the whole image.
            kwargs: of the family.
        """
        if kwargs.get("position_embeddings") is None:
            return attention_mask, kwargs
        rotation = tokens.of_stage(
            self.layer_number, "rotation", lambda: rotation_of_tokens(kwargs["position_embeddings"], patch_index)
        )
        return attention_mask, {**kwargs, "position_embeddings": rotation}

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Pickle and copy by way of the dense class, since this one is made when it is needed."""
        return _empty_layer, (type(self).dense_class, type(self).halves), self.__dict__


def rotation_of_tokens(
    tables: tuple[torch.Tensor, torch.Tensor], patch_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the image tokens that are left, each (batch_size, 1, num_image_tokens, head_dim).

    Args:
        tables: cosines and sines of all patches, each (num_patches, head_dim).
        patch_index: (batch_size, num_image_tokens), patches that are left, -1 for a fused token.
    """
    is_fused = (patch_index < 0).unsqueeze(-1)
    cos, sin = (table[patch_index.clamp(min=0)] for table in tables)
    return cos.masked_fill(is_fused, 1.0).unsqueeze(1), sin.masked_fill(is_fused, 0.0).unsqueeze(1)


class ViTHalves:
    """Halves of ViT's layer and of those copied from it, with stochastic depth or without."""

    def attend(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """Attention with its residual."""
        output, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        return self._branch(output) + hidden_states

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """MLP with its residual."""
        return self._branch(self.mlp(self.layernorm_after(hidden_states))) + hidden_states

    def _branch(self, output: torch.Tensor) -> torch.Tensor:
        output = self.dropout(output)
        return self.drop_path(output) if hasattr(self, "drop_path") else output


class Dinov2Halves:
    """Halves of DINOv2's layer: layer scale and stochastic depth."""

    def attend(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """Attention with its residual."""
        output, _ = self.attention(self.norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        return self.drop_path(self.layer_scale1(output)) + hidden_states

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """MLP with its residual."""
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states)))) + hidden_states


class CLIPHalves:
    """Halves of CLIP's layer."""

    def attend(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """Attention with its residual."""
        normed = self.layer_norm1(hidden_states)
        output, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        return hidden_states + output

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """MLP with its residual."""
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class BeitHalves:
    """Halves of BEiT's layer, whose attention has a bias for each pair of positions: its own or a shared one."""

    def attend(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        tokens: TokensLeft,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention with its residual; `attention_mask` is the bias that all layers share, or None."""
        bias = attention_mask
        if self.relative_position_bias is not None:
            window = (resolution[0] // self.patch_size, resolution[1] // self.patch_size)
            num_tokens = tokens.num_prefix_tokens + window[0] * window[1]
            own = self.relative_position_bias(window, interpolate_pos_encoding, dim_size=num_tokens)
            bias = own if bias is None else own + bias
        if bias is not None:
            bias = bias_of_pairs(bias, tokens, self.layer_number)
        normed = self.layernorm_before(hidden_states)
        output, _ = self.attention(normed, attention_mask=bias, tokens=tokens, **kwargs)
        return self.drop_path(self.lambda_1 * self.dropout(output)) + hidden_states

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """MLP with its residual."""
        output = self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return self.drop_path(self.lambda_2 * output) + hidden_states


@dataclass(frozen=True)
class Family:
    """How one family of models is reorganized.

    Args:
        layer: class name of its layers; several are separated by "|".
        halves: dialect of their two halves.
        models: class names of the models that read class tokens, or averages of patches; others want one answer for
            each patch.
        num_prefix_tokens: of the module that owns the layers.
        num_class_tokens: of that module: those whose attention scores the image tokens.
        attention: attribute of a layer that holds its attention.
        pools_patches: whether a pooling layer inside that module averages the patches.
    """

    layer: str
    halves: type
    models: tuple[str, ...]
    num_prefix_tokens: Callable[[nn.Module], int] = lambda tower: 1
    num_class_tokens: Callable[[nn.Module], int] = lambda tower: 1
    attention: str = "attention"
    pools_patches: Callable[[nn.Module], bool] = lambda tower: False


def _with_registers(tower: nn.Module) -> int:
    return 1 + tower.config.num_register_tokens


def _clip(prefix: str, layer: str, *more: str) -> Family:
    return Family(layer, CLIPHalves, (f"{prefix}VisionModel", f"{prefix}Model", *more), attention="self_attn")


# By the model type of the configuration that the layers' owner has.
FAMILIES: dict[str, Family] = {
    "vit": Family("ViTLayer", ViTHalves, ("ViTModel", "ViTForImageClassification")),
    "vit_msn": Family("ViTMSNLayer", ViTHalves, ("ViTMSNModel", "ViTMSNForImageClassification")),
    "deit": Family(
        "DeiTLayer",
        ViTHalves,
        ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
        num_prefix_tokens=lambda tower: 2,
    ),
    "vivit": Family("VivitLayer", ViTHalves, ("VivitModel", "VivitForVideoClassification")),
    "audio-spectrogram-transformer": Family(
        "ASTLayer",
        ViTHalves,
        ("ASTModel", "ASTForAudioClassification"),
        num_prefix_tokens=lambda tower: 2,
        num_class_tokens=lambda tower: 2,  # its answer is the mean of both
    ),
    "pixio": Family(
        "PixioLayer",
        ViTHalves,
        ("PixioModel",),
        num_prefix_tokens=lambda tower: tower.config.n_cls_tokens,
        num_class_tokens=lambda tower: tower.config.n_cls_tokens,
    ),
    "dinov2": Family("Dinov2Layer", Dinov2Halves, ("Dinov2Model", "Dinov2ForImageClassification")),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersLayer",
        Dinov2Halves,
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
        num_prefix_tokens=_with_registers,
    ),
    "dinov3_vit": Family("DINOv3ViTLayer", Dinov2Halves, ("DINOv3ViTModel",), num_prefix_tokens=_with_registers),
    "sapiens2": Family("Sapiens2Layer", Dinov2Halves, ("Sapiens2Model",), num_prefix_tokens=_with_registers),
    "tipsv2_vision_model": Family(
        "Tipsv2VisionLayer", Dinov2Halves, ("Tipsv2VisionModel", "Tipsv2Model"), num_prefix_tokens=_with_registers
    ),
    "radio": Family(
        "RadioLayer",
        Dinov2Halves,
        ("RadioModel",),
        num_prefix_tokens=lambda tower: tower.config.num_cls_tokens + tower.config.num_registers,
        num_class_tokens=lambda tower: tower.config.num_cls_tokens,
    ),
    "clip_vision_model": _clip(
        "CLIP", "CLIPEncoderLayer", "CLIPVisionModelWithProjection", "CLIPForImageClassification"
    ),
    "metaclip_2_vision_model": _clip(
        "MetaClip2", "MetaClip2EncoderLayer", "MetaClip2VisionModelWithProjection", "MetaClip2ForImageClassification"
    ),
    "chinese_clip_vision_model": _clip("ChineseCLIP", "ChineseCLIPVisionLayer"),
    "altclip_vision_model": _clip("AltCLIP", "AltCLIPEncoderLayer"),
    "beit": Family(
        "BeitLayer",
        BeitHalves,
        ("BeitModel", "BeitForImageClassification"),
        pools_patches=lambda tower: tower.config.use_mean_pooling and tower.pooler is not None,
    ),
    "timm_wrapper": Family(
        "Block|EvaBlock|EvaBlockPostNorm",
        TimmHalves,
        ("TimmWrapperModel", "TimmWrapperForImageClassification", *MODEL_CLASSES),
        num_prefix_tokens=lambda tower: tower.num_prefix_tokens,
        attention="attn",
    ),
}

_NO_CLASS_TOKEN = "it has no class token whose attention could say which patches matter"
_GRID = "it wants one answer for each patch, or a whole grid of them"
# Why other models are refused, by model type.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("siglip_vision_model", "siglip2_vision_model", "ijepa", "aimv2_vision_model"), _NO_CLASS_TOKEN),
    "siglip": _NO_CLASS_TOKEN,
    "siglip2": _NO_CLASS_TOKEN,
    "aimv2": _NO_CLASS_TOKEN,
    "vit_mae": "its model shuffles the patches and drops most of them itself: load the checkpoint as a ViT "
    "(`ViTModel.from_pretrained`)",
    **dict.fromkeys(
        ("mlcd", "mlcd_vision_model"),
        "its rotary positions are one set for the whole batch, while each image keeps different patches",
    ),
    "data2vec-vision": "its attention takes no keywords and adds its position bias out of reach",
    "swin": "its windows need every patch",
    "swinv2": "its windows need every patch",
    "yolos": "its detection tokens come after the patches",
    "owlvit": _GRID,
    "owlv2": _GRID,
    "dpt": _GRID,
    "vitdet": _GRID,
    "vitpose": _GRID,
    "vitpose_backbone": _GRID,
    "eomt": _GRID,
    "sam": _GRID,
    "timm_backbone": _GRID,
    **dict.fromkeys(
        ("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava"),
        "its language model expects as many image tokens as its processor wrote into the prompt",
    ),
}


def reorganize(
    model: nn.Module,
    keep_rate: float | Sequence[float] | None = None,
    *,
    macs: float | None = None,
    reorganization_layers: Sequence[int] | None = None,
    inattentive_tokens: str | None = None,
    fuse_inattentive_tokens: bool | None = None,
) -> nn.Module:
    """Let a Vision Transformer keep its attentive tokens only.

    A model that was not trained to lose tokens takes `macs`, which brings all that keeps its answers: the same number
    of tokens is given up in every layer, and each is counted by the kept token that it resembles most. A model that
    will be trained for it takes `keep_rate`, the paper's way: three layers, and the rest is fused into one token.

    The model stays what it is: its class, its parameters' names, its model type and its checkpoints; `save_pretrained`
    writes the settings into config.json, and `reorganize(AutoModel.from_pretrained(folder))` restores them. Its
    forward then takes `keep_rate`, `macs`, `patch_scores` and `output_class_attention` as that of `EViTModel` does,
    and its outputs have the attributes `attentive_index`, `patch_index`, `class_attention` and, where tokens are
    counted, `token_sizes` and `counted_by`. Averages over patches then weigh each token by its size. Called again it
    changes the settings.

    Args:
        model: a model of Transformers or timm, see `families`. It is changed in place and gets a configuration of its
            own. Of an EViT only the settings change.
        keep_rate: share of image tokens kept at each reorganization layer, in (0, 1]: one number, or one for each.
        macs: share of the dense model's multiply-accumulate operations (patch embedding and layers), in (0, 1]. With
            neither it is what the model's configuration says, or `macs=0.66`.
        reorganization_layers: zero-based layers, strictly increasing; by default what its configuration says, or all
            layers with `macs`, those at one, two and three quarters of the depth with `keep_rate`.
        inattentive_tokens: what becomes of the others: "fused" into one token, weighted by class token attention,
            "dropped", or "counted"; by default what its configuration says, or "counted" with `macs`, "fused" with
            `keep_rate`.
        fuse_inattentive_tokens: old name: True is "fused", False "dropped".

    Returns: the same model. One of timm answers with a tensor: `model(images, output_attentive_index=True)` returns
        the kept patches as well.

    Raises: ValueError for a model that cannot be reorganized, with the reason, or settings out of range.

    Example:
        >>> from transformers import AutoModelForImageClassification
        >>> from evit_hf import reorganize
        >>> model = AutoModelForImageClassification.from_pretrained("facebook/dinov2-base-imagenet1k-1-layer")
        >>> model = reorganize(model, macs=0.66)
        >>> model(**inputs, macs=0.5).attentive_index  # doctest: +SKIP
    """
    asked: dict[str, Any] = {
        "keep_rate": keep_rate,
        "macs": macs,
        "reorganization_layers": reorganization_layers,
        "inattentive_tokens": inattentive_tokens,
    }
    if fuse_inattentive_tokens is not None:
        asked = renamed_settings({**asked, "fuse_inattentive_tokens": fuse_inattentive_tokens})
    if isinstance(getattr(model, "config", None), EViTConfig):
        _set_own(model.config, asked)
        return model
    owner, path, family = find_tower(model)
    old = owner.config
    layers = getattr(owner, layers_name(owner, family))
    now = {name: getattr(old, name, None) for name in (*BUDGET_FIELDS, "fuse_inattentive_tokens")}
    if now.pop("fuse_inattentive_tokens") is not None and now["inattentive_tokens"] is None:  # an older config.json
        now["inattentive_tokens"] = "fused" if old.fuse_inattentive_tokens else "dropped"
    if all(value is None for value in (keep_rate, macs, now["keep_rate"], now["macs"])):
        asked["macs"] = DEFAULT_MACS
    settings = budget_defaults(changed_budget(now, asked), len(layers))
    _check_settings(settings, len(layers))
    implementation = old._attn_implementation
    if implementation not in (*WITH_CLASS_ROW, *WITH_CLASS_ROW.values()):
        raise ValueError(
            f"`attn_implementation` is {implementation!r}, which does not tell what the class token looks at: load "
            "the model with `attn_implementation='sdpa'`, which runs flash kernels on a GPU, or 'eager'."
        )
    if isinstance(layers[0], ReorganizingLayer):
        _share_configuration(model, owner)
    else:
        _own_configuration(model)
        if family.halves is TimmHalves:
            owner.__class__ = reorganizing_model_class(type(owner))
        for number, layer in enumerate(layers):
            layer.__class__ = _reorganizing_class(type(layer), family.halves)
            layer.layer_number = number
        owner.training_keep_rate = None  # the rate of a schedule, see `KeepRateCallback`
        owner.costs = _costs(owner, layers, family)
        if family.pools_patches(owner):
            owner.register_forward_hook(functools.partial(_weigh_patches, pools=True), with_kwargs=True)
    _hand_tokens_on(model, owner, path, family)
    config = owner.config
    for name, value in settings.items():
        setattr(config, name, value)
    config._attn_implementation = WITH_CLASS_ROW.get(implementation, implementation)
    return model


def _hand_tokens_on(model: nn.Module, owner: nn.Module, path: Sequence[nn.Module], family: Family) -> None:
    """Let the models around the layers hand the tokens of a pass on, weigh averages, and be saved with the settings.

    Those that do already, since they or a part of them were reorganized before, stay as they are.

    Args:
        model: the outermost.
        owner: of the layers.
        path: the models on the way to the owner, from the outside in.
        family: of the layers.
    """
    new = [module for module in path if not hasattr(module, "hands_tokens_on")]
    for module in new:
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        start = functools.partial(_start, owner=owner, names=names)
        module.register_forward_pre_hook(start, with_kwargs=True)
        module.register_forward_hook(_finish, with_kwargs=True)
        module.hands_tokens_on = True
    if model not in new or not isinstance(model, PreTrainedModel):
        return
    if family.halves is TimmHalves and "Classification" not in type(model).__name__:
        model.register_forward_hook(_weigh_pooled, with_kwargs=True)
    elif len(path) > 1 and "Classification" in type(model).__name__ and not family.pools_patches(owner):
        path[1].register_forward_hook(functools.partial(_weigh_patches, pools=False), with_kwargs=True)
    model.config.auto_map = {name: "reorganization.ReorganizedAutoModel" for name in _auto_classes(model)}
    model.save_pretrained = functools.partial(_save_pretrained, model.save_pretrained)


def _costs(owner: nn.Module, layers: Sequence[nn.Module], family: Family) -> TowerCosts:
    """Multiply-accumulate operations of a stack of layers, from the sizes of its linear layers and convolutions."""
    attention = getattr(layers[0], family.attention)

    def sizes(module: nn.Module) -> int:
        return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))

    convolutions = (nn.Conv2d, nn.Conv3d)
    patch = sum(
        m.weight.numel()
        for name, child in owner.named_children()
        if name != layers_name(owner, family)
        for m in child.modules()
        if isinstance(m, convolutions)
    )
    query = getattr(attention, "q_proj", None)
    width = attention.qkv.out_features // 3 if query is None else query.out_features
    heads = next(getattr(attention, name) for name in ("num_attention_heads", "num_heads") if hasattr(attention, name))
    return TowerCosts(
        patch=patch,
        attention=sizes(attention),
        pair=2 * width,
        feed_forward=sizes(layers[0]) - sizes(attention),
        key=width // heads,
        num_layers=len(layers),
        num_prefix_tokens=family.num_prefix_tokens(owner),
    )


def families() -> dict[str, str]:
    """Families of models by model type: those that `reorganize` takes, and why it refuses the others.

    Returns: for each model type "works: " and the names of its classes, or "refused: " and the reason.
    """
    works = {name: f"works: {', '.join(family.models)}" for name, family in FAMILIES.items()}
    return dict(sorted({**works, **{name: f"refused: {reason}" for name, reason in REFUSED.items()}}.items()))


def find_tower(model: nn.Module) -> tuple[nn.Module, list[nn.Module], Family]:
    """The module that owns the layers, the models on the way to it from the outside in, and their family.

    Raises: ValueError for a model that cannot be reorganized.
    """
    timm_model = getattr(model, "timm_model", model)
    if type(timm_model).__module__.startswith("timm."):
        reason = reason_against(timm_model)
        if reason:
            raise ValueError(f"`{type(timm_model).__name__}` cannot be reorganized: {reason}.")
        if not hasattr(timm_model, "config"):
            timm_model.config = TimmSettings() if timm_model is model else model.config
        return timm_model, [] if timm_model is model else [model], FAMILIES["timm_wrapper"]
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`model` must be a model of Transformers or timm, got {type(model).__name__}.")
    owners = [
        (name, module, family)
        for name, module in model.named_modules()
        if (family := FAMILIES.get(getattr(getattr(module, "config", None), "model_type", None))) is not None
        and layers_name(module, family) is not None
    ]
    model_type = model.config.model_type
    if len(owners) != 1:
        reason = REFUSED.get(model_type) or next(
            (
                REFUSED[module.config.model_type]
                for module in model.modules()
                if getattr(getattr(module, "config", None), "model_type", None) in REFUSED
            ),
            f"it has {len(owners)} stacks of layers of a known Vision Transformer" if owners else "",
        )
        reason = reason or f"no layers of a known Vision Transformer were found in it; known are {', '.join(FAMILIES)}"
        raise ValueError(f"`{type(model).__name__}` ({model_type}) cannot be reorganized: {reason}.")
    name, owner, family = owners[0]
    known = {base.__name__ for base in type(model).__mro__}
    if not known & set(family.models):
        raise ValueError(
            f"`{type(model).__name__}` cannot be reorganized: {REFUSED.get(model_type, _GRID)}. Of its family these "
            f"can: {', '.join(family.models)}."
        )
    if not _hands_keywords_on(owner, family):
        raise ValueError(
            f"`{type(model).__name__}` cannot be reorganized with this version of Transformers, whose "
            f"`{family.layer}` takes no keywords: update Transformers to 5.18 or newer."
        )
    steps = name.split(".") if name else []
    path = [model.get_submodule(".".join(steps[:depth])) for depth in range(len(steps) + 1)]
    return owner, [module for module in path if isinstance(module, PreTrainedModel) or module is owner], family


def layers_name(owner: nn.Module, family: Family) -> str | None:
    """Name of the list of layers of a module, None if it has none."""
    for name, child in owner.named_children():
        if (
            isinstance(child, (nn.ModuleList, nn.Sequential))
            and len(child)
            and type(child[0]).__name__.removeprefix("FSDP") in family.layer.split("|")  # FSDP2 renames classes
        ):
            return name
    return None


def _hands_keywords_on(owner: nn.Module, family: Family) -> bool:
    layer = getattr(owner, layers_name(owner, family))[0]
    forwards = [type(owner).forward, getattr(type(layer), "dense_class", type(layer)).forward]
    forwards.append(type(getattr(layer, family.attention)).forward)
    return all(
        any(parameter.kind == parameter.VAR_KEYWORD for parameter in inspect.signature(forward).parameters.values())
        for forward in forwards
    )


def _check_settings(settings: dict[str, Any], num_layers: int) -> None:
    """Check the settings by the rules of `EViTConfig`, which also makes lists of what JSON would.

    Raises: ValueError naming the setting, its value and the way out.
    """
    try:
        config = EViTConfig(num_hidden_layers=num_layers, **settings)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None
    settings.update({name: getattr(config, name) for name in settings})


def _set_own(config: EViTConfig, chosen: dict[str, Any]) -> None:
    """Change the settings of an EViT: all that are given, or none if they are wrong together.

    Raises: ValueError naming the setting, its value and the way out.
    """
    now = {name: getattr(config, name) for name in BUDGET_FIELDS}
    settings = budget_defaults(changed_budget(now, chosen), config.num_hidden_layers)
    _check_settings(settings, config.num_hidden_layers)
    config.keep_rate = 1.0  # which fits the old layers and the new ones
    for name in ("macs", "reorganization_layers", "keep_rate", "inattentive_tokens"):
        if settings[name] is not None:
            setattr(config, name, settings[name])


def _own_configuration(model: PreTrainedModel) -> None:
    """Give a model its own configuration: others may have been built from the same object."""
    memo: dict[int, Any] = {}
    model.config = copy.deepcopy(model.config, memo)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in memo:
                setattr(module, name, memo[id(value)])


def _share_configuration(model: nn.Module, owner: nn.Module) -> None:
    """Let the layers read the configuration that the whole model is saved with.

    A part of a model that was reorganized by itself has its own.
    """
    if not isinstance(model, PreTrainedModel):
        return
    own = owner.config
    parts = (model.config, *vars(model.config).values())
    shared = next((part for part in parts if getattr(part, "model_type", None) == own.model_type), own)
    for module in model.modules():
        if vars(module).get("config") is own:
            module.config = shared


def _auto_classes(model: PreTrainedModel) -> list[str]:
    """Names of the Auto classes of Transformers that build models of this class."""
    names = ("AutoModel", "AutoModelForImageClassification", "AutoModelForVideoClassification")
    names += ("AutoModelForAudioClassification", "AutoModelForZeroShotImageClassification")
    found = {name: getattr(transformers, name)._model_mapping.get(type(model.config), None) for name in names}
    # An entry is a class, or a tuple of classes.
    return [name for name, entry in found.items() if type(model) in (entry if isinstance(entry, tuple) else [entry])]


def _save_pretrained(
    save: Callable[..., Any], save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """Save a reorganized model with the code that reorganizes it for those who load it with `trust_remote_code=True`.

    By default Transformers writes names of older versions, which its `Trainer` does not find when it resumes. It would
    also push before the code is there.
    """
    pushes = kwargs.pop("push_to_hub", False)
    of_push = {name: kwargs.pop(name) for name in OF_PUSH if pushes and name in kwargs}
    result = save(save_directory, *args, **{"save_original_format": False, **kwargs})
    for name in CODE_FILES:
        shutil.copyfile(Path(__file__).with_name(name), Path(save_directory) / name)
    if pushes and kwargs.get("is_main_process", True):
        repo_id = of_push.pop("repo_id", Path(save_directory).name)
        save.__self__.push_to_hub(repo_id, **of_push)
    return result


class ReorganizedAutoModel:
    """What the Auto classes build of a saved, reorganized model with `trust_remote_code=True`."""

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load the model in its own class, and reorganize it as its configuration says.

        Args:
            name: folder or Hub id.
            *args: for the class's own `from_pretrained`.
            config: of the model; by default that of the folder.
            **kwargs: for the class's own `from_pretrained`.

        Returns: the model; with `output_loading_info=True` the information as well.
        """
        config = config if config is not None else transformers.AutoConfig.from_pretrained(name)
        model_class = getattr(transformers, config.architectures[0])
        loaded = model_class.from_pretrained(name, *args, config=config, **kwargs)
        if isinstance(loaded, tuple):
            return (reorganize(loaded[0]), *loaded[1:])
        return reorganize(loaded)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the model keeps its class, and its folder the code that it came with."""


@functools.cache
def _reorganizing_class(layer_class: type, halves: type) -> type:
    """The class of a layer that reorganizes; its name stays, since FSDP and Accelerate look for layers by name."""
    names = {
        "dense_class": layer_class,
        "halves": halves,
        "__module__": layer_class.__module__,
        "__qualname__": layer_class.__qualname__,
    }
    return type(layer_class.__name__, (ReorganizingLayer, halves, layer_class), names)


def _empty_layer(layer_class: type, halves: type) -> nn.Module:
    """A reorganizing layer without contents, for pickle and deepcopy to fill."""
    layer_class = _reorganizing_class(layer_class, halves)
    return layer_class.__new__(layer_class)


@dataclass
class TimmSettings:
    """What a configuration would hold, for a model of timm outside of Transformers."""

    keep_rate: float | list[float] | None = None
    macs: float | None = None
    reorganization_layers: list[int] | None = None
    inattentive_tokens: str | None = None
    model_type: str = "timm_wrapper"
    _attn_implementation: str = "sdpa"


def _start(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], owner: nn.Module, names: tuple[str, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the outermost model's forward: what is asked for goes into the keywords, which reach every layer."""
    kwargs, family = dict(kwargs), FAMILIES[owner.config.model_type]
    if "tokens" not in kwargs:
        refuse_misspelt_names(
            [name for name in kwargs if name not in names and name not in TransformersKwargs.__annotations__],
            ("keep_rate", "macs", "patch_scores", "output_class_attention"),
        )
        kwargs["tokens"] = tokens_of_a_pass(
            owner,
            kwargs.pop("keep_rate", None),
            kwargs.pop("macs", None),
            kwargs.pop("patch_scores", None),
            num_prefix_tokens=family.num_prefix_tokens(owner),
            num_scoring_tokens=family.num_class_tokens(owner),
            output_class_attention=kwargs.pop("output_class_attention", False),
        )
    config, is_vision = owner.config, getattr(module, "config", None) is owner.config
    if config._attn_implementation not in tuple(WITH_CLASS_ROW.values()):
        raise ValueError(
            f"`attn_implementation` was set to {config._attn_implementation!r}, which does not tell what the class "
            "token looks at: set 'sdpa' or 'eager' and call `reorganize(model)` again."
        )
    given = {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}
    if is_vision and (given.get("attention_mask") is not None and module.main_input_name != "input_ids"):
        raise ValueError("`attention_mask` cannot follow reorganized tokens yet: leave it out.")
    wants_maps = kwargs.get("output_attentions", getattr(config, "output_attentions", False))
    is_eager = config._attn_implementation == WITH_CLASS_ROW["eager"]
    if wants_maps and not is_eager:
        raise ValueError("`output_attentions=True` needs the attention maps: load with `attn_implementation='eager'`.")
    drops = max(getattr(config, name, 0.0) for name in ("attention_probs_dropout_prob", "attention_dropout"))
    if owner.training and drops and is_eager:
        raise ValueError(
            f"Attention dropout of {drops} would choose the tokens under 'eager', whose map it changes: set 'sdpa' "
            "and call `reorganize(model)` again."
        )
    for name in ("image_grid_hw", "cu_seqlens", "bool_masked_pos"):
        if given.get(name) is not None:
            raise ValueError(
                f"`{name}` and reorganized tokens do not go together: leave it out, or use a dense model."
            )
    return args, kwargs


def _finish(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After a model's forward: its output tells which patches were kept.

    As attributes: `Trainer` would take fields for predictions, and a pipeline would cut them by image.
    """
    tokens = kwargs["tokens"]
    if not isinstance(output, ModelOutput):
        return
    if tokens.class_attention:
        output.class_attention = tokens.class_attention_by_patch()
    if not tokens.attentive_index:
        return
    output.attentive_index = tuple(tokens.attentive_index[layer] for layer in sorted(tokens.attentive_index))
    left = tokens.leaving()
    output.patch_index = output.attentive_index[-1] if left is None else left.patch_index
    if tokens.plan.inattentive_tokens == "counted":
        sizes, counted_by = torch.ones_like(output.patch_index).float(), output.patch_index
        output.token_sizes = sizes if left is None else left.token_sizes
        output.counted_by = counted_by if left is None else left.counted_by


def _weigh_patches(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, pools: bool) -> Any:
    """After the forward of a model whose patches are averaged: weigh the tokens that are left by their sizes.

    Each patch gets the features of the token that counts it, and the average is that of the family. So is a pooling
    layer of the module's own, which is called again; otherwise the average comes in the classifier around it.
    """
    features = kwargs["tokens"].on_whole_grid(output[0])
    if not isinstance(output, ModelOutput):  # with `return_dict=False`
        return (output[0], module.pooler(features), *output[2:]) if pools else (features, *output[1:])
    if pools:
        output.pooler_output = module.pooler(features)
    else:
        output.last_hidden_state = features
    return output


def _weigh_pooled(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After the forward of timm's model without its classifier: weigh the patches that it averages by their sizes."""
    tokens, features = kwargs["tokens"], output[0]
    if not module.config.do_pooling or tokens.plan.inattentive_tokens != "counted":
        return output
    pooled = module.timm_model.forward_head(tokens.on_whole_grid(features))
    if not isinstance(output, ModelOutput):
        return (features, pooled, *output[2:])
    output.pooler_output = pooled
    return output


__all__ = ["FAMILIES", "REFUSED", "ReorganizingLayer", "TokensLeft", "families", "reorganize"]
