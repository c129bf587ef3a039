"""Tensors with the names of DeiT, timm, EViT or LV-ViT: the configuration that they tell, and our names for them."""

import argparse
import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .checkpoint_files import ConversionError, check_tensors, chosen_weights, non_finite
from .configuration_evit import EViTConfig
from .modeling_evit import (
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTModel,
    EViTPreTrainedModel,
)
from .modeling_evit_lv import EViTLVForImageClassification
from .timm_checkpoints import PUBLISHED_HEADS, TimmDescription, features_of_keys, refuse_features
from .token_reorganization import num_attentive_tokens


# Their parameter name -> ours, as regular expressions. `qkv` is one tensor of theirs and three of ours.
BLOCK_KEYS = {
    r"blocks\.(\d+)\.norm1\.(weight|bias)": r"vit.layers.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(weight|bias)": r"vit.layers.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)": r"vit.layers.\1.attention.{}_proj.\2",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"vit.layers.\1.attention.o_proj.\2",
    r"blocks\.(\d+)\.mlp\.(fc1|fc2)\.(weight|bias)": r"vit.layers.\1.mlp.\2.\3",
    r"norm\.(weight|bias)": r"vit.layernorm.\1",
    r"cls_token": "vit.embeddings.cls_token",
    r"pos_embed": "vit.embeddings.position_embeddings",
    r"patch_embed\.proj\.(weight|bias)": r"vit.embeddings.patch_embeddings.projection.\1",
}
DEIT_KEYS = {**BLOCK_KEYS, r"head\.(weight|bias)": r"classifier.\1"}
DISTILLED_DEIT_KEYS = {
    **BLOCK_KEYS,
    r"dist_token": "vit.embeddings.distillation_token",
    r"head\.(weight|bias)": r"cls_classifier.\1",
    r"head_dist\.(weight|bias)": r"distillation_classifier.\1",
}
LVVIT_KEYS = {
    **DEIT_KEYS,
    r"aux_head\.(weight|bias)": r"aux_classifier.\1",
    r"patch_embed\.(conv[123])\.weight": r"vit.embeddings.patch_embeddings.\1.weight",
    r"patch_embed\.(bn[123])\.(weight|bias|running_mean|running_var|num_batches_tracked)": (
        r"vit.embeddings.patch_embeddings.\1.\2"
    ),
}

# Heads and residual scale of the published LV-ViTs by (hidden size, depth): no tensor tells them.
LVVIT_GEOMETRY = {(240, 12): (4, 1.0), (384, 16): (6, 2.0), (512, 20): (8, 2.0), (768, 24): (12, 3.0)}

# Parameters that every source with such names has, and their dimensions.
NEEDED = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}


@dataclass
class Weights:
    """Tensors with the names of DeiT, timm, EViT or LV-ViT, and what else their source says.

    Args:
        tensors: by name, without prefixes.
        source: for messages.
        settings: `args` of an official training script.
        description: what timm says of the model, if it does.
        unused: see `ConvertedCheckpoint`.
        notes: see `ConvertedCheckpoint`.
    """

    tensors: dict[str, torch.Tensor]
    source: Any
    settings: dict[str, Any] = field(default_factory=dict)
    description: TimmDescription | None = None
    unused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_lvvit(self) -> bool:
        """Whether this is an LV-ViT, which has a stem of convolutions."""
        return "patch_embed.conv1.weight" in self.tensors

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and, in distilled models, distillation token; those that have positions."""
        return 2 if "dist_token" in self.tensors else 1

    def give_class_token_a_position(self, image_size: Any) -> None:
        """Make positions for the class token (and distillation token) and all patches, without changing outputs.

        Models whose patches only have positions (DeiT III) get zeros for the prefix tokens; positions of registers are
        added to the registers.

        Args:
            image_size: pixels, (height, width) or one number, if it is known.
        """
        positions, patch = self.tensors["pos_embed"], self.tensors["patch_embed.proj.weight"].shape[-2:]
        name = next((name for name in ("reg_token", "register_tokens") if name in self.tensors), None)
        num_registers = self.tensors[name].shape[1] if name is not None and self.tensors[name].ndim == 3 else 0
        num_positions, num_prefix = positions.shape[1], self.num_prefix_tokens
        choices = (num_prefix, num_prefix + num_registers, 0)
        pixels = [image_size] * 2 if isinstance(image_size, int) else image_size
        is_known = isinstance(pixels, (list, tuple)) and len(pixels) == 2 and all(isinstance(x, int) for x in pixels)
        num_patches = (pixels[0] // patch[0]) * (pixels[1] // patch[1]) if is_known else None
        embedded = next((n for n in choices if num_positions - n == num_patches), None)
        if embedded is None:
            embedded = next(
                (n for n in choices if math.isqrt(max(num_positions - n, 0)) ** 2 == num_positions - n), None
            )
        if embedded == 0:
            zeros = positions.new_zeros(1, num_prefix, positions.shape[-1])
            self.tensors = {**self.tensors, "pos_embed": torch.cat((zeros, positions), dim=1)}
            self.notes.append("only its patches have positions: that of the class token is zero")
        elif name is not None and embedded is not None and embedded > num_prefix:
            prefix, registers, patches = positions.tensor_split([num_prefix, embedded], dim=1)
            positions = torch.cat((prefix, patches), dim=1)
            self.tensors = {**self.tensors, "pos_embed": positions, name: self.tensors[name] + registers}


def weights_in(content: Mapping[str, Any], source: Any, wanted: str | None) -> Weights:
    """Find the weights in the content of a file."""
    entries, place, unused = chosen_weights(content, "patch_embed.proj.weight", wanted, source)
    missing = sorted(NEEDED.keys() - entries.keys())
    if missing:
        absent = {"cls_token": "no class token", "pos_embed": "no position embeddings"}
        if entries and any(name.startswith("blocks.0.") for name in entries):
            refuse_features(
                source, [*features_of_keys(entries), *(absent[name] for name in missing if name in absent)]
            )
        names = entries or content
        raise ConversionError(
            f"Not recognized: no {missing} among {len(names)} entries of `{source}`, which begin with "
            f"{sorted(map(str, names))[:5]}. EViT, DeiT, timm ViT and LV-ViT files have them; for Transformers give "
            "the folder."
        )
    others = {name: type(value).__name__ for name, value in entries.items() if not isinstance(value, torch.Tensor)}
    if others:
        raise ConversionError(f"`{source}` must hold tensors only, but some entries are not: {others}.")
    check_tensors(entries, source)
    args = content.get("args")
    notes = []
    if place:
        notes.append(f"the weights are those at `{place}`")
    settings = vars(args) if isinstance(args, argparse.Namespace) else {}
    return Weights(entries, source, settings, unused=unused, notes=notes)


def configuration_fields(found: Weights, given: dict[str, Any], image_size: Any) -> dict[str, Any]:
    """Fields of the configuration, from the shapes of the tensors, what the source says, and what was given."""
    tensors = found.tensors
    wrong = {
        name: tuple(tensors[name].shape)
        for name, num_dims in NEEDED.items()
        if tensors[name].ndim != num_dims or 0 in tensors[name].shape
    }
    if wrong:
        raise ConversionError(
            f"`{found.source}` has tensors of a wrong shape: {wrong}. Expected are `cls_token` (1, 1, hidden size), "
            "`pos_embed` (1, positions, hidden size), `patch_embed.proj.weight` (hidden size, channels, height, "
            "width) and `blocks.0.mlp.fc1.weight` (MLP size, hidden size)."
        )
    numbers = {int(match[1]) for match in (re.match(r"blocks\.(\d{1,6})\.", name) for name in tensors) if match}
    num_layers = len(numbers)
    if numbers != set(range(num_layers)):
        absent = sorted(set(range(max(numbers))) - numbers)[:5]
        raise ConversionError(f"`{found.source}` has blocks up to number {max(numbers)}, but lacks blocks {absent}.")

    known = dict(found.description.known) if found.description else {}
    hidden_size = tensors["cls_token"].shape[-1]
    if known.pop("hidden_size", hidden_size) != hidden_size:  # a changed width: the architecture's heads are others
        known.pop("num_attention_heads")
    known_size = known.pop("image_size", None)
    if not found.is_lvvit:
        found.give_class_token_a_position(known_size or image_size)
    fields = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "intermediate_size": tensors["blocks.0.mlp.fc1.weight"].shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "layer_norm_eps": 1e-6,
        "num_channels": tensors["patch_embed.conv1.weight" if found.is_lvvit else "patch_embed.proj.weight"].shape[1],
        "use_distillation_token": found.num_prefix_tokens == 2,
        **known,
    }
    fields |= _grid(found, known_size, image_size)
    if "head.weight" in tensors:
        fields |= _classes(found)
    for name, value in given.items():
        if known.get(name, value) != value:
            raise ConversionError(f"`{name}` is {value}, but `{found.source}` has {known[name]}: leave it out.")
    return {**fields, **(_lvvit_fields if found.is_lvvit else _heads)(found, {**fields, **given})}


def _grid(found: Weights, known_size: Any, image_size: Any) -> dict[str, Any]:
    """Image and patch size: as the source says, as was asked for if it fits, or a square."""
    patch = [size * (2 if found.is_lvvit else 1) for size in found.tensors["patch_embed.proj.weight"].shape[-2:]]
    num_positions = found.tensors["pos_embed"].shape[1]
    num_patches = num_positions - found.num_prefix_tokens
    fields = {"patch_size": patch[0] if patch[0] == patch[1] else patch}
    for size in (known_size, image_size):
        if size is None:
            continue
        pixels = [size, size] if isinstance(size, int) else list(size) if isinstance(size, (list, tuple)) else []
        if len(pixels) != 2 or not all(isinstance(x, int) and x > 0 for x in pixels):
            raise ConversionError(f"`image_size` of `{found.source}` must be pixels, (height, width), got {size!r}.")
        if (pixels[0] // patch[0]) * (pixels[1] // patch[1]) == num_patches:
            return {**fields, "image_size": pixels[0] if pixels[0] == pixels[1] else pixels}
    side = math.isqrt(max(num_patches, 0))
    if not side or side**2 != num_patches:
        raise ConversionError(
            f"`pos_embed` of `{found.source}` has {num_positions} positions: {num_patches} for image tokens, which is "
            "not a square grid. EViT needs one position for each prefix token and each patch: give the size of its "
            "images as `image_size`, (height, width) (`--image-size`)."
        )
    pixels = [side * patch[0], side * patch[1]]
    if known_size is not None:
        found.notes.append(f"images are {pixels[0]}x{pixels[1]} pixels, as its positions say, not {known_size}")
    elif not found.is_lvvit:
        found.notes.append(f"images are square, {side}x{side} patches: no tensor tells")
    return {**fields, "image_size": pixels[0] if pixels[0] == pixels[1] else pixels}


def _classes(found: Weights) -> dict[str, Any]:
    """Number of classes and their names, which must agree with the classifier."""
    num_labels = found.tensors["head.weight"].shape[0] if found.tensors["head.weight"].ndim else 0
    description = found.description or TimmDescription({})
    names = description.label_names
    if description.num_classes not in (None, num_labels):
        raise ConversionError(
            f"`num_classes` in the config.json of `{found.source}` is {description.num_classes}, but `head.weight` "
            f"has {num_labels} rows."
        )
    if isinstance(names, list):
        if len(names) != num_labels:
            raise ConversionError(
                f"`label_names` in the config.json of `{found.source}` has {len(names)} names, but `head.weight` has "
                f"{num_labels} rows."
            )
        names = dict(enumerate(names))
    if names and not 0 <= min(names) <= max(names) < num_labels:
        raise ConversionError(
            f"`label_names` in the config.json of `{found.source}` names classes {min(names)} to {max(names)}, but "
            f"`head.weight` has {num_labels} rows."
        )
    if not names:
        return {"num_labels": num_labels}
    id2label = {number: names.get(number, f"LABEL_{number}") for number in range(num_labels)}
    return {"id2label": id2label, "label2id": {label: number for number, label in id2label.items()}}


def _heads(found: Weights, fields: dict[str, Any]) -> dict[str, Any]:
    """Attention heads: as the source says, as was given, or the published model's."""
    if "residual_scale" in fields:
        raise ConversionError(f"`residual_scale` is for LV-ViTs, and `{found.source}` is not one: leave it out.")
    heads = fields.get("num_attention_heads")
    if heads is None:
        size = (fields["hidden_size"], fields["num_hidden_layers"], fields["intermediate_size"])
        heads = PUBLISHED_HEADS.get(size)
        if heads is None:
            raise ConversionError(
                f"No tensor tells the number of attention heads, and `{found.source}` is not one of the published "
                f"models: it has width {size[0]}, depth {size[1]} and MLP size {size[2]}: "
                "give `num_attention_heads` (`--num-attention-heads`)."
            )
        found.notes.append(f"{heads} attention heads, as in the published model of this width and depth")
    return {"num_attention_heads": _checked_heads(found, heads, fields["hidden_size"])}


def _checked_heads(found: Weights, heads: Any, hidden_size: int) -> int:
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or hidden_size % heads:
        raise ConversionError(
            f"`num_attention_heads` of `{found.source}` must divide the hidden size of {hidden_size}, got {heads!r}."
        )
    return heads


def _lvvit_fields(found: Weights, fields: dict[str, Any]) -> dict[str, Any]:
    """Heads, residual scale and stem of an LV-ViT."""
    size = (fields["hidden_size"], fields["num_hidden_layers"])
    heads, scale = LVVIT_GEOMETRY.get(size, (None, None))
    heads, scale = fields.get("num_attention_heads", heads), fields.get("residual_scale", scale)
    if scale is None:
        raise ConversionError(
            f"An LV-ViT of width {size[0]} and depth {size[1]} is not one of the published ones: give its `skip_lam` "
            "as `residual_scale` (`--residual-scale`)."
        )
    if heads is None:
        raise ConversionError(
            "No tensor tells the number of attention heads: give `num_attention_heads` (`--num-attention-heads`)."
        )
    return {
        "num_attention_heads": _checked_heads(found, heads, size[0]),
        "residual_scale": scale,
        "stem_hidden_size": found.tensors["patch_embed.conv1.weight"].shape[0],
        "layer_norm_eps": 1e-5,
    }


def trained_reorganization(found: Weights) -> tuple[str, dict[str, Any]]:
    """Name the format and say how the source reorganized, from the settings in the file."""
    settings = found.settings
    if found.is_lvvit:
        return "LV-ViT", {}
    try:
        if "base_keep_rate" in settings:
            layers = settings.get("drop_loc", "(3, 6, 9)")
            layers = ast.literal_eval(layers) if isinstance(layers, str) else layers
            return "official EViT", {
                "keep_rate": settings["base_keep_rate"],
                "reorganization_layers": list(layers),
                "inattentive_tokens": "fused" if settings.get("fuse_token", False) else "dropped",
            }
        if "reduction_loc" in settings:
            num_patches = found.tensors["pos_embed"].shape[1] - found.num_prefix_tokens
            return "TokenReduction", token_reduction_settings(settings, num_patches)
    except (ValueError, SyntaxError, TypeError, LookupError, ArithmeticError) as error:
        names = ("base_keep_rate", "drop_loc", "fuse_token", "keep_rate", "reduction_loc")
        known = {name: settings[name] for name in names if name in settings}
        raise ConversionError(f"The settings `args` of `{found.source}` make no sense: {known} ({error}).") from None
    return "timm" if found.description else "DeiT or timm", {}


def token_reduction_settings(settings: dict[str, Any], num_patches: int) -> dict[str, Any]:
    """Per-layer keep rates that leave as many tokens as a TokenReduction model keeps.

    TokenReduction keeps int(keep_rate ** i * num_patches) tokens at its i-th layer, of the *initial* patches; EViT
    keeps ceil(rate * N) of the N tokens that arrive.

    Args:
        settings: the `args` of the file: `model`, `keep_rate`, `reduction_loc`.
        num_patches: patches of the image.

    Returns: `keep_rate`, `reorganization_layers` and `inattentive_tokens`.

    Raises: ConversionError for other methods than EViT and Top-K, or counts that grow.

    Source: https://github.com/JoakimHaurum/TokenReduction (models/evit.py, models/topk.py).
    """
    method = str(settings.get("model", "")).split("_")[0].lower()
    if method not in ("evit", "topk"):
        raise ConversionError(
            f"A TokenReduction model `{settings.get('model')}` reduces tokens in a different way: only its `evit` and "
            "`topk` models keep the attentive tokens."
        )
    fuse = method == "evit"
    layers = list(settings["reduction_loc"])
    rates = settings["keep_rate"]
    rates = list(rates) if isinstance(rates, (list, tuple)) else [rates]
    rates = rates * len(layers) if len(rates) == 1 else rates
    num_tokens, keep_rates = num_patches, []
    for i, rate in enumerate(rates):
        num_kept = int(rate ** (i + 1) * num_patches)
        if not 0 < num_kept <= num_tokens:
            raise ConversionError(
                f"At layer {layers[i]} TokenReduction keeps {num_kept} of {num_patches} initial tokens, but only "
                f"{num_tokens} arrive there: EViT cannot do that."
            )
        keep_rate = 1.0 if num_kept == num_tokens else (num_kept - 0.5) / num_tokens
        assert num_attentive_tokens(keep_rate, num_tokens) == num_kept
        keep_rates.append(keep_rate)
        num_tokens = num_kept + (fuse and num_kept < num_tokens)
    inattentive_tokens = "fused" if fuse else "dropped"
    return {"keep_rate": keep_rates, "reorganization_layers": layers, "inattentive_tokens": inattentive_tokens}


def translated(
    found: Weights, config: EViTConfig, allow_non_finite: bool
) -> tuple[EViTPreTrainedModel, dict[str, torch.Tensor]]:
    """The model for these weights, on the meta device, and copies of all its parameters under our names.

    Raises: ConversionError that lists all that does not fit: nothing is allocated before.
    """
    has_head = "head.weight" in found.tensors
    keys = DISTILLED_DEIT_KEYS if config.use_distillation_token else DEIT_KEYS
    model_class: type[EViTPreTrainedModel] = EViTForImageClassification
    if found.is_lvvit:
        model_class, keys = EViTLVForImageClassification, LVVIT_KEYS
    elif config.use_distillation_token and "head_dist.weight" in found.tensors:
        model_class = EViTForImageClassificationWithTeacher
    elif has_head:
        keys = {**keys, r"head\.(weight|bias)": r"classifier.\1"}
    else:
        model_class = EViTModel
    with torch.device("meta"):
        model = model_class(config, **({"add_pooling_layer": False} if model_class is EViTModel else {}))
    expected = model.state_dict()

    parts: dict[str, Any] = {}
    unexpected: list[str] = []
    for name, tensor in found.tensors.items():
        ours = [x if has_head else x.removeprefix("vit.") for x in _our_names(name, keys)]
        split = tensor.tensor_split(3) if len(ours) == 3 and tensor.ndim else [tensor] * len(ours)
        if not set(ours) <= expected.keys():
            unexpected.append(name)
        elif ours:
            parts |= {our_name: (name, part) for our_name, part in zip(ours, split, strict=True)}
        else:
            unexpected.append(name)
    _refuse_misfits(found, expected, parts, unexpected)
    if not allow_non_finite:
        wrong = non_finite({name: found.tensors[name] for name, _ in parts.values()})
        if wrong:
            raise ConversionError(
                f"`{found.source}` holds NaN or infinite values in {wrong}: the file is damaged or the training "
                "diverged. To convert it nevertheless, pass `allow_non_finite_weights=True` "
                "(`--allow-non-finite-weights`)."
            )
    state_dict = {}
    for our_name, (_, part) in parts.items():
        state_dict[our_name] = part.detach().to(expected[our_name].dtype, copy=True).contiguous()
    return model, state_dict


def _refuse_misfits(
    found: Weights,
    expected: dict[str, torch.Tensor],
    parts: dict[str, tuple[str, torch.Tensor]],
    unexpected: list[str],
) -> None:
    """Raise ConversionError with all parameters that are missing, superfluous, or of the wrong shape or type."""
    missing = sorted(set(expected) - set(parts))
    misshaped = [
        f"{our_name} {tuple(part.shape)} instead of {tuple(expected[our_name].shape)}"
        for our_name, (_, part) in parts.items()
        if part.shape != expected[our_name].shape
    ]
    mistyped = sorted(
        {
            f"{name} {part.dtype}"
            for our_name, (name, part) in parts.items()
            if expected[our_name].dtype.is_floating_point != part.dtype.is_floating_point
        }
    )
    if missing or unexpected or misshaped or mistyped:
        sentences = [f"The checkpoint `{found.source}` does not fit."]
        features = features_of_keys(unexpected)
        if features:
            sentences.append(f"It has {', '.join(features)}, which a plain ViT does not have.")
        sentences.append(f"Not filled: {missing}. No place for: {unexpected}. Of a different shape: {misshaped}.")
        if mistyped:
            sentences.append(f"Not of floating-point numbers: {mistyped}.")
        raise ConversionError(" ".join(sentences))


def _our_names(name: str, keys: dict[str, str]) -> list[str]:
    """Our name for one of their tensors, three names for a fused query, key and value, none if it is unknown."""
    for pattern, target in keys.items():
        match = re.fullmatch(pattern, name)
        if match:
            ours = match.expand(target)
            return [ours.format(letter) for letter in "qkv"] if "{}" in ours else [ours]
    return []
