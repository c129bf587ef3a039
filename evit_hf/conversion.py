"""Public checkpoints to EViT: one key table for each format, every tensor accounted for.

Formats, recognized from what a file holds:
    - official EViT, DeiT and TokenReduction `.pth` (a pickle of weights, optimizer and settings), timm ViT and DeiT
      state dicts (pickle or safetensors) and model objects: the same parameter names;
    - official LV-ViT `.pth` and `.pth.tar`;
    - folders and Hub ids of Transformers 4.x and 5.x: ViT, DeiT, distilled DeiT, EViT.

Pickles are opened with `torch.load(weights_only=True)` and a short list of harmless types; nothing in them is run.
"""

import argparse
import ast
import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from .configuration_evit import EViTConfig
from .configuration_evit_lv import EViTLVConfig
from .modeling_evit import (
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTModel,
    EViTPreTrainedModel,
)
from .modeling_evit_lv import EViTLVForImageClassification
from .profiling import height_and_width
from .token_reorganization import num_attentive_tokens


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = 3  # PIL's number

# Types beside tensors that the public pickles hold.
HARMLESS_TYPES = [argparse.Namespace]

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


class ConversionError(RuntimeError):
    """A checkpoint that cannot become an EViT; the message says why, and names every tensor concerned."""


@dataclass
class ImageSettings:
    """What the checkpoint's images went through: goes into the image processor."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_fraction: float = 0.875
    resample: int = BICUBIC


@dataclass
class ConvertedCheckpoint:
    """An EViT made from a public checkpoint, and what there is to say about it.

    Args:
        model: in evaluation mode.
        source_format: what the source was recognized as.
        unused: entries of the source that were left out on purpose, with the reason.
        notes: what was assumed where the source does not say.
        images: for the image processor; None takes the processor of the source folder.
    """

    model: EViTPreTrainedModel
    source_format: str
    unused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    images: ImageSettings | None = field(default_factory=ImageSettings)
    source: str | None = None

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save model, image processor and the code for `trust_remote_code=True` into a folder."""
        from transformers import AutoImageProcessor, ViTImageProcessor

        self.model.save_pretrained(folder)
        image_size = self.model.config.image_size
        if self.images is None:
            try:
                processor = AutoImageProcessor.from_pretrained(self.source)
            except (OSError, ValueError):
                self.images = ImageSettings(mean=(0.5,) * 3, std=(0.5,) * 3, crop_fraction=1.0)
                self.notes.append("the source has no image processor: ViT's was taken (mean and deviation 0.5)")
            else:
                size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
                if (size.get("height"), size.get("width")) == height_and_width(image_size):
                    processor.save_pretrained(folder)
                    return
                self.images = ImageSettings(
                    tuple(processor.image_mean), tuple(processor.image_std), 1.0, processor.resample
                )
        height, width = height_and_width(image_size)
        crop = {"height": height, "width": width}
        style = {
            "image_mean": list(self.images.mean),
            "image_std": list(self.images.std),
            "resample": self.images.resample,
        }
        if self.images.crop_fraction == 1.0:
            processor = ViTImageProcessor(size=crop, **style)
        else:
            shortest_edge = int(math.floor(max(height, width) / self.images.crop_fraction))
            processor = ViTImageProcessor(
                size={"shortest_edge": shortest_edge}, do_center_crop=True, crop_size=crop, **style
            )
        processor.save_pretrained(folder)


def convert_checkpoint(
    source: str | os.PathLike | nn.Module | Mapping[str, torch.Tensor],
    *,
    keep_rate: float | list[float] | None = None,
    reorganization_layers: list[int] | None = None,
    fuse_inattentive_tokens: bool | None = None,
    image_size: int | None = None,
    labels: list[str] | None = None,
    num_attention_heads: int | None = None,
    residual_scale: float | None = None,
) -> ConvertedCheckpoint:
    """Make an EViT from a public checkpoint.

    Args:
        source: a file, a folder, a Hub id, a timm model, or a state dict with official, DeiT, timm or LV-ViT names.
        keep_rate: in (0, 1]; by default what the source was trained with, 1.0 for a dense model.
        reorganization_layers: zero-based; by default the source's, or one, two and three quarters of the depth.
        fuse_inattentive_tokens: by default the source's, or True.
        image_size: pixels; another size than the source's resizes the position embeddings bicubically.
        labels: names of the classes, in the order of the classifier.
        num_attention_heads: for a state dict of unusual geometry; by default the published model's, or one head for
            every 64 channels.
        residual_scale: `skip_lam` of an LV-ViT of unusual geometry; by default the published model's.

    Returns: the model and what was left out or assumed.

    Raises: ConversionError if the source is not recognized, holds anything that would have to be executed, leaves a
        parameter unfilled or has a tensor that the model has no place for; the message lists all of them.
    """
    overrides = {
        "keep_rate": keep_rate,
        "reorganization_layers": reorganization_layers,
        "fuse_inattentive_tokens": fuse_inattentive_tokens,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    geometry = {"num_attention_heads": num_attention_heads, "residual_scale": residual_scale}
    geometry = {name: value for name, value in geometry.items() if value is not None}

    if isinstance(source, nn.Module):
        converted = _from_timm_model(source, overrides)
    elif isinstance(source, Mapping):
        converted = _from_state_dict(dict(source), {}, geometry, overrides)
    elif Path(source).is_file():
        converted = _from_file(Path(source), geometry, overrides)
    else:
        converted = _from_transformers(str(source), overrides)
    if image_size is not None and height_and_width(converted.model.config.image_size) != (image_size, image_size):
        converted.model.set_image_size(image_size)
        converted.notes.append(f"position embeddings were resized bicubically to {image_size} pixels")
    if labels is not None:
        _name_labels(converted.model, labels)
    converted.model.eval()
    return converted


# Sources


def _from_file(path: Path, geometry: dict, overrides: dict) -> ConvertedCheckpoint:
    """A `.safetensors` file, or a pickle of weights, optimizer and settings."""
    if path.suffix == ".safetensors":
        return _from_state_dict(load_file(path), {}, geometry, overrides)
    try:
        with torch.serialization.safe_globals(HARMLESS_TYPES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"GLOBAL (\S+)|Unsupported \S+ (\S+)", str(error))
        raise ConversionError(
            f"`{path}` is no plain pickle of tensors and settings: it wants "
            f"{(reason.group(1) or reason.group(2)) if reason else 'something else'}, and nothing in it was executed. "
            "If you trust it, open it yourself and save its state dict."
        ) from None
    except RuntimeError as error:
        raise ConversionError(f"`{path}` is no checkpoint that PyTorch can read: {error}") from None
    if not isinstance(content, Mapping):
        raise ConversionError(f"`{path}` holds a {type(content).__name__}, not a dictionary of tensors.")
    unused = {}
    state_dict, settings = content, {}
    for name in ("model", "state_dict"):
        if isinstance(content.get(name), Mapping):
            state_dict = content[name]
            settings = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
            unused = {key: "belongs to training" for key in content if key not in (name, "args")}
            break
    converted = _from_state_dict(dict(state_dict), settings, geometry, overrides)
    converted.unused.update(unused)
    return converted


def _from_state_dict(
    state_dict: dict[str, torch.Tensor], settings: dict, geometry: dict, overrides: dict
) -> ConvertedCheckpoint:
    """Tensors with DeiT's, timm's, EViT's or LV-ViT's names, and the settings that they were trained with."""
    state_dict = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    needed = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"}
    if not needed <= set(state_dict):
        raise ConversionError(
            f"Not recognized: no {sorted(needed - set(state_dict))} among {len(state_dict)} entries, which begin with "
            f"{sorted(state_dict)[:5]}. EViT, DeiT, timm ViT and LV-ViT files have them; for Transformers give the "
            "folder."
        )
    is_lvvit = "patch_embed.conv1.weight" in state_dict
    is_distilled = "dist_token" in state_dict
    fields, notes = _geometry(state_dict, geometry, is_lvvit, is_distilled)
    source_format, trained = _trained_reorganization(settings, fields)
    source_format = "LV-ViT" if is_lvvit else source_format
    config_class, keys = EViTConfig, DISTILLED_DEIT_KEYS if is_distilled else DEIT_KEYS
    images = ImageSettings()
    if not settings and not is_lvvit:
        notes.append("images are normalized and cropped as for DeiT: no tensor tells")
    if is_lvvit:
        config_class, keys = EViTLVConfig, LVVIT_KEYS
        images = ImageSettings(crop_fraction=0.9)
    config = config_class(**{**fields, "keep_rate": 1.0, **trained, **overrides})
    model = _filled_model(config, state_dict, keys, has_head="head.weight" in state_dict)
    return ConvertedCheckpoint(model, source_format, notes=notes, images=images)


def _from_timm_model(module: nn.Module, overrides: dict) -> ConvertedCheckpoint:
    """A `timm` VisionTransformer: tensors and geometry from the object itself."""
    block = module.blocks[0] if hasattr(module, "blocks") else None
    if block is None or not hasattr(block.attn, "num_heads"):
        raise ConversionError(f"A {type(module).__name__} is no VisionTransformer of timm.")
    if not isinstance(block.mlp.act, nn.GELU):
        raise ConversionError(f"The activation is {type(block.mlp.act).__name__}, but a ViT of Transformers has GELU.")
    if getattr(module, "global_pool", "token") != "token":
        raise ConversionError(
            f"The classifier pools '{module.global_pool}', but EViT classifies, and scores, with the class token."
        )
    state_dict = module.state_dict()
    is_distilled = "dist_token" in state_dict
    fields, _ = _geometry(state_dict, {"num_attention_heads": block.attn.num_heads}, False, is_distilled)
    fields["layer_norm_eps"] = block.norm1.eps
    config = EViTConfig(**{**fields, "keep_rate": 1.0, **overrides})
    keys = DISTILLED_DEIT_KEYS if is_distilled else DEIT_KEYS
    model = _filled_model(config, state_dict, keys, has_head="head.weight" in state_dict)
    settings = getattr(module, "pretrained_cfg", None) or {}
    images = ImageSettings(
        mean=tuple(settings.get("mean", IMAGENET_MEAN)),
        std=tuple(settings.get("std", IMAGENET_STD)),
        crop_fraction=settings.get("crop_pct", 0.875),
        resample={"bilinear": 2, "bicubic": BICUBIC}.get(settings.get("interpolation", "bicubic"), BICUBIC),
    )
    return ConvertedCheckpoint(model, "timm", images=images)


def _from_transformers(source: str, overrides: dict) -> ConvertedCheckpoint:
    """A folder or Hub id of Transformers."""
    try:
        config_dict, _ = EViTConfig.get_config_dict(source)
    except OSError as error:
        raise ConversionError(
            f"`{source}` is no file, no folder of Transformers, and no Hub id at hand: {error}"
        ) from None
    except ValueError as error:
        raise ConversionError(str(error)) from None
    architecture = (config_dict.get("architectures") or ["ViTForImageClassification"])[0]
    model_class = EViTForImageClassification
    if architecture.endswith("WithTeacher"):
        model_class = EViTForImageClassificationWithTeacher
    elif architecture.endswith("Model"):
        model_class = EViTModel
    elif not architecture.endswith("ForImageClassification"):
        raise ConversionError(f"`{source}` is a {architecture}: EViT has classifiers and plain models only.")
    if "keep_rate" not in config_dict:
        overrides = {"keep_rate": 1.0, **overrides}
    try:
        model, info = model_class.from_pretrained(source, output_loading_info=True, **overrides)
    except RuntimeError as error:
        raise ConversionError(str(error)) from None
    unfilled = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if unfilled or info["mismatched_keys"]:
        raise ConversionError(f"`{source}` does not fill {unfilled or info['mismatched_keys']}.")
    unused = {key: f"{model_class.__name__} has no place for it" for key in info["unexpected_keys"]}
    return ConvertedCheckpoint(model, f"Transformers {architecture}", unused=unused, images=None, source=source)


# Pieces


def _geometry(
    state_dict: dict[str, torch.Tensor], given: dict, is_lvvit: bool, is_distilled: bool
) -> tuple[dict[str, Any], list[str]]:
    """Fields of the configuration that the shapes of the tensors tell, and what had to be assumed."""
    notes = []
    hidden_size = state_dict["cls_token"].shape[-1]
    num_layers = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    patch_size = state_dict["patch_embed.proj.weight"].shape[-1] * (2 if is_lvvit else 1)
    num_positions = state_dict["pos_embed"].shape[1] - (2 if is_distilled else 1)
    side = math.isqrt(max(num_positions, 0))
    if side**2 != num_positions:
        raise ConversionError(
            f"`pos_embed` has {state_dict['pos_embed'].shape[1]} positions: {num_positions} for image tokens, which "
            "is no square grid. EViT wants one position for each prefix token and each patch of a square image."
        )
    fields = {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "intermediate_size": state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
        "layer_norm_eps": 1e-6,
        "num_channels": state_dict["patch_embed.conv1.weight" if is_lvvit else "patch_embed.proj.weight"].shape[1],
        "use_distillation_token": is_distilled,
    }
    if "head.weight" in state_dict:
        fields["num_labels"] = state_dict["head.weight"].shape[0]
    if is_lvvit:
        heads, scale = LVVIT_GEOMETRY.get((hidden_size, num_layers), (None, None))
        fields["residual_scale"] = given.get("residual_scale", scale)
        fields["stem_hidden_size"] = state_dict["patch_embed.conv1.weight"].shape[0]
        fields["layer_norm_eps"] = 1e-5
        if fields["residual_scale"] is None:
            raise ConversionError(
                f"An LV-ViT of width {hidden_size} and depth {num_layers} is none of the published ones: give its "
                "`skip_lam` as `residual_scale`."
            )
    else:
        heads = hidden_size // 64 if hidden_size % 64 == 0 else None
    fields["num_attention_heads"] = given.get("num_attention_heads", heads)
    if fields["num_attention_heads"] is None:
        raise ConversionError(
            f"No tensor tells the number of attention heads, and a width of {hidden_size} is none of the published "
            "models': give `num_attention_heads`."
        )
    if "num_attention_heads" not in given and not is_lvvit:
        notes.append(f"{fields['num_attention_heads']} attention heads, one for every 64 channels, as in DeiT and ViT")
    return fields, notes


def _trained_reorganization(settings: dict, fields: dict) -> tuple[str, dict[str, Any]]:
    """Name the format and say how the source reorganized, from the settings in the file."""
    if "base_keep_rate" in settings:
        layers = settings.get("drop_loc", "(3, 6, 9)")
        layers = ast.literal_eval(layers) if isinstance(layers, str) else layers
        return "official EViT", {
            "keep_rate": settings["base_keep_rate"],
            "reorganization_layers": list(layers),
            "fuse_inattentive_tokens": bool(settings.get("fuse_token", False)),
        }
    if "reduction_loc" in settings:
        return "TokenReduction", token_reduction_settings(
            settings, (fields["image_size"] // fields["patch_size"]) ** 2
        )
    return "DeiT or timm", {}


def token_reduction_settings(settings: dict, num_patches: int) -> dict[str, Any]:
    """Per-layer keep rates that leave as many tokens as a TokenReduction model keeps.

    TokenReduction keeps int(keep_rate ** i * num_patches) tokens at its i-th layer, of the *initial* patches; EViT
    keeps ceil(rate * N) of the N tokens that arrive.

    Args:
        settings: the `args` of the file: `model`, `keep_rate`, `reduction_loc`.
        num_patches: patches of the image.

    Returns: `keep_rate`, `reorganization_layers` and `fuse_inattentive_tokens`.

    Raises: ConversionError for other methods than EViT and Top-K, or counts that grow.

    Source: https://github.com/JoakimHaurum/TokenReduction (models/evit.py, models/topk.py).
    """
    method = str(settings.get("model", "")).split("_")[0].lower()
    if method not in ("evit", "topk"):
        raise ConversionError(
            f"A TokenReduction model `{settings.get('model')}` reduces tokens in another way: only its `evit` and "
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
    return {"keep_rate": keep_rates, "reorganization_layers": layers, "fuse_inattentive_tokens": fuse}


def _filled_model(
    config: EViTConfig, state_dict: dict[str, torch.Tensor], keys: dict[str, str], has_head: bool
) -> EViTPreTrainedModel:
    """The model with every parameter from the source, or a ConversionError that lists all that is wrong."""
    if isinstance(config, EViTLVConfig):
        model: EViTPreTrainedModel = EViTLVForImageClassification(config)
    elif config.use_distillation_token and "head_dist.weight" in state_dict:
        model = EViTForImageClassificationWithTeacher(config)
    elif has_head:
        model, keys = EViTForImageClassification(config), {**keys, r"head\.(weight|bias)": r"classifier.\1"}
    else:
        model = EViTModel(config, add_pooling_layer=False)
    translated, unexpected = {}, []
    for name, tensor in state_dict.items():
        ours = _our_names(name, keys)
        if not ours:
            unexpected.append(name)
        parts = tensor.chunk(3) if len(ours) == 3 else [tensor] * len(ours)
        for our_name, part in zip(ours, parts, strict=True):
            translated[our_name if has_head else our_name.removeprefix("vit.")] = part.clone()
    expected = model.state_dict()
    missing = sorted(set(expected) - set(translated))
    unexpected += sorted(set(translated) - set(expected))
    misshaped = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in translated.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if missing or unexpected or misshaped:
        raise ConversionError(
            f"The checkpoint does not fit. Not filled: {missing}. No place for: {unexpected}. Of another shape: "
            f"{misshaped}."
        )
    model.load_state_dict(translated)
    return model


def _our_names(name: str, keys: dict[str, str]) -> list[str]:
    """Our name for one of their tensors, three names for a fused query, key and value, none if it is unknown."""
    for pattern, target in keys.items():
        match = re.fullmatch(pattern, name)
        if match:
            ours = match.expand(target)
            return [ours.format(letter) for letter in "qkv"] if "{}" in ours else [ours]
    return []


def _name_labels(model: EViTPreTrainedModel, labels: list[str]) -> None:
    if len(labels) != model.config.num_labels:
        raise ConversionError(
            f"There are {len(labels)} labels, but the classifier has {model.config.num_labels} classes: give one name "
            "for each, in its order."
        )
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: number for number, label in enumerate(labels)}


def read_labels(path: str | os.PathLike) -> list[str]:
    """Names of classes from a file: one in each line, a JSON list, or a JSON object of numbers and names.

    Raises: ConversionError if the numbers of an object are not 0, 1, 2, ...
    """
    text = Path(path).read_text()
    if not str(path).endswith(".json"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    labels = json.loads(text)
    if isinstance(labels, dict):
        by_number = {int(number): name for number, name in labels.items()}
        if sorted(by_number) != list(range(len(by_number))):
            raise ConversionError(f"`{path}` must number its labels 0, 1, 2, ..., got {sorted(by_number)[:5]} ...")
        labels = [by_number[number] for number in range(len(by_number))]
    return [str(label) for label in labels]


__all__ = ["ConversionError", "ConvertedCheckpoint", "ImageSettings", "convert_checkpoint", "read_labels"]
