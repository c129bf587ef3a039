"""timm's and Meta's Vision Transformers with layer scale or registers, as DINOv2 models of Transformers.

DeiT III, DINOv2 and ViTs with registers: Transformers' DINOv2 computes the same, with layer scale 1 and class position
0 where the source has none.
"""

import re
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from .checkpoint_files import ConversionError, non_finite
from .timm_checkpoints import is_packed_swiglu
from .vit_weights import Weights


# Their parameter name -> that of Transformers' checkpoints, without the prefix of a classifier.
KEYS = {
    r"cls_token": "embeddings.cls_token",
    r"mask_token": "embeddings.mask_token",
    r"(?:reg_token|register_tokens)": "embeddings.register_tokens",
    r"pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embeddings.projection.\1",
    r"norm\.(weight|bias)": r"layernorm.\1",
    r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"encoder.layer.\1.norm\2.\3",
    r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)": r"encoder.layer.\1.attention.attention.{}.\2",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"encoder.layer.\1.attention.output.dense.\2",
    r"blocks\.(\d+)\.(?:ls|gamma_)([12])(?:\.gamma)?": r"encoder.layer.\1.layer_scale\2.lambda1",
}
MLP_KEYS = {r"blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)": r"encoder.layer.\1.mlp.fc\2.\3"}
SWIGLU_KEYS = {
    r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)": r"encoder.layer.\1.mlp.weights_in.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)": r"encoder.layer.\1.mlp.weights_out.\2",
}


def dinov2_model(found: Weights, fields: dict[str, Any], allow_non_finite: bool) -> PreTrainedModel:
    """Build the DINOv2 model with the same outputs, classifier included.

    Args:
        found: the weights, with positions for the class token and all patches.
        fields: of their configuration, as an EViT would have them.
        allow_non_finite: whether to accept NaN and infinite weights.

    Returns: Dinov2Model or Dinov2ForImageClassification, or those with registers.

    Raises: ConversionError for what these cannot be, for tensors that are missing, superfluous or misshapen, and for
        NaN or infinite weights.
    """
    fields, has_head, is_swiglu = dict(fields), "head.weight" in found.tensors, is_packed_swiglu(found.tensors)
    registers = next((found.tensors[name] for name in ("reg_token", "register_tokens") if name in found.tensors), None)
    kind = "Dinov2" if registers is None else "Dinov2WithRegisters"
    if fields.pop("use_distillation_token", False):
        raise ConversionError(f"`{found.source}` has layer scale or registers and a distillation token: no model has.")
    if isinstance(fields["image_size"], list) or isinstance(fields["patch_size"], list):
        raise ConversionError(
            f"`{found.source}` has {fields['image_size']} pixels in patches of {fields['patch_size']}, but DINOv2 of "
            "Transformers takes its positions for a square."
        )
    ratio = _mlp_ratio(fields["hidden_size"], fields.pop("intermediate_size"), is_swiglu)
    if ratio is None:
        raise ConversionError(
            f"The MLP of `{found.source}` is not a whole number of times as wide as the model, as DINOv2's is."
        )
    if is_swiglu:
        fields.pop("hidden_act", None)
    if registers is not None:
        fields["num_register_tokens"] = registers.shape[1]
    try:
        config = getattr(transformers, f"{kind}Config")(**fields, mlp_ratio=ratio, use_swiglu_ffn=is_swiglu)
    except StrictDataclassError as error:
        raise ConversionError(f"`{found.source}` cannot be a DINOv2: {error.__cause__ or error}") from None
    state_dict, unexpected = _translated(found, is_swiglu)
    if unexpected:
        raise ConversionError(f"The checkpoint `{found.source}` does not fit. No place for: {unexpected}.")
    wrong = [] if allow_non_finite else non_finite(state_dict)
    if wrong:
        raise ConversionError(
            f"`{found.source}` holds NaN or infinite values in {wrong}: the file is damaged or the training diverged. "
            "To convert it nevertheless, pass `allow_non_finite_weights=True` (`--allow-non-finite-weights`)."
        )
    _fill_in(state_dict, config)
    if has_head:
        prefix = "dinov2" if registers is None else "dinov2_with_registers"
        state_dict = {f"{prefix}.{name}": tensor for name, tensor in state_dict.items()}
        head = found.tensors["head.weight"].float()
        state_dict["classifier.weight"] = torch.cat((head, torch.zeros_like(head)), dim=1)  # class token, patches
        state_dict["classifier.bias"] = found.tensors.get("head.bias", head.new_zeros(len(head))).float()
        found.notes.append("the classifier reads the class token; its weights for the mean of the patches are 0")
    return _loaded(
        found,
        getattr(transformers, f"{kind}ForImageClassification" if has_head else f"{kind}Model"),
        config,
        state_dict,
    )


def _mlp_ratio(hidden_size: int, intermediate_size: int, is_swiglu: bool) -> int | None:
    """Whole number from which DINOv2 computes the width of its MLP, None if none does."""
    for ratio in range(1, 17):
        width = hidden_size * ratio
        if is_swiglu:
            width = 2 * ((int(width * 2 / 3) + 7) // 8 * 8)
        if width == intermediate_size:
            return ratio
    return None


def _translated(found: Weights, is_swiglu: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Copies of all tensors but the classifier's under DINOv2's names, and the names of those without a place."""
    keys, state_dict, unexpected = {**KEYS, **(SWIGLU_KEYS if is_swiglu else MLP_KEYS)}, {}, []
    for name, tensor in found.tensors.items():
        if re.fullmatch(r"head\.(weight|bias)", name):
            continue
        target = next((match.expand(keys[key]) for key in keys if (match := re.fullmatch(key, name))), None)
        if target is None or not tensor.is_floating_point():
            unexpected.append(name)
        elif "{}" in target and tensor.ndim:
            for letter, part in zip(("query", "key", "value"), tensor.tensor_split(3), strict=True):
                state_dict[target.format(letter)] = part.detach().float().clone()
        else:
            state_dict[target] = tensor.detach().float().clone()
    return state_dict, unexpected


def _fill_in(state_dict: dict[str, torch.Tensor], config: Any) -> None:
    """Add what the source does not have and DINOv2 needs: layer scales of 1, a mask token that nothing uses."""
    state_dict.setdefault("embeddings.mask_token", torch.zeros(1, config.hidden_size))
    for layer in range(config.num_hidden_layers):
        for half in (1, 2):
            scale = torch.ones(config.hidden_size)
            state_dict.setdefault(f"encoder.layer.{layer}.layer_scale{half}.lambda1", scale)


def _loaded(
    found: Weights, model_class: type[PreTrainedModel], config: Any, state_dict: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """The model, with every parameter filled."""
    try:
        model, info = model_class.from_pretrained(None, config=config, state_dict=state_dict, output_loading_info=True)
    except RuntimeError as error:
        raise ConversionError(f"The checkpoint `{found.source}` does not fit: {error}") from None
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if problems:
        raise ConversionError(f"The checkpoint `{found.source}` does not fit: {problems}.")
    return model


__all__ = ["dinov2_model"]
