"""Public checkpoints to EViT: one key table for each format, every tensor accounted for.

Formats, recognized from what a file or folder holds:
    - official EViT, DeiT and TokenReduction `.pth` (a pickle of weights, optimizer and settings), timm ViT and DeiT
      state dicts (pickle or safetensors) and model objects: the same parameter names, wherever training scripts nest
      them and whatever prefix they leave;
    - folders and Hub ids of timm, with their `config.json`;
    - official LV-ViT `.pth` and `.pth.tar`;
    - folders and Hub ids of Transformers 4.x and 5.x: ViT, DeiT, distilled DeiT, EViT.

Importing this module also teaches `from_pretrained` of the EViT models to read timm's folders and to check files.
"""

import argparse
import ast
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .checkpoint_files import (
    WEIGHT_FILES,
    ConversionError,
    check_tensors,
    chosen_weights,
    non_finite,
    read_checkpoint,
    tensor_shapes,
    weight_files,
)
from .configuration_evit import EViTConfig
from .configuration_evit_lv import EViTLVConfig
from .image_processors import processor_for_size, timm_processor
from .modeling_evit import (
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTModel,
    EViTPreTrainedModel,
)
from .modeling_evit_lv import EViTLVForImageClassification
from .profiling import height_and_width
from .timm_checkpoints import (
    PUBLISHED_HEADS,
    TimmDescription,
    describe_config,
    describe_model,
    features_of_keys,
    is_timm_config,
    refuse_features,
)
from .token_reorganization import num_attentive_tokens


logger = logging.get_logger(__name__)

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
# Fields of a configuration that decide how much memory is allocated.
SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "intermediate_size", "image_size", "patch_size")
# Keywords of `from_pretrained` that say where on the Hub a file is.
HUB_KEYWORDS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


@dataclass
class ConvertedCheckpoint:
    """An EViT made from a public checkpoint, and what there is to say about it.

    Args:
        model: in evaluation mode.
        source_format: what the source was recognized as.
        image_processor: does what the source's images went through.
        unused: entries of the source that were left out on purpose, with the reason.
        notes: what was chosen or assumed where the source does not say, and what was changed.
    """

    model: EViTPreTrainedModel
    source_format: str
    image_processor: Any
    unused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save model, image processor and the code for `trust_remote_code=True` into a folder."""
        self.model.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


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
        """Class token and, in distilled models, distillation token."""
        return 2 if "dist_token" in self.tensors else 1


def convert_checkpoint(
    source: str | os.PathLike | nn.Module | Mapping[str, Any],
    *,
    keep_rate: float | list[float] | None = None,
    reorganization_layers: list[int] | None = None,
    fuse_inattentive_tokens: bool | None = None,
    image_size: int | Sequence[int] | None = None,
    labels: list[str] | None = None,
    num_attention_heads: int | None = None,
    residual_scale: float | None = None,
    weights: str | None = None,
    allow_non_finite_weights: bool = False,
) -> ConvertedCheckpoint:
    """Make an EViT from a public checkpoint.

    Args:
        source: a file, a folder, a Hub id, a timm model, or a state dict with official, DeiT, timm or LV-ViT names.
        keep_rate: in (0, 1]; by default what the source was trained with, 1.0 for a dense model.
        reorganization_layers: zero-based; by default the source's, or one, two and three quarters of the depth.
        fuse_inattentive_tokens: by default the source's, or True.
        image_size: pixels, one number or (height, width). Another size than the source's resizes the position
            embeddings bicubically. A state dict does not say its image size: a rectangle with as many patches as it
            has positions is taken as the source's own.
        labels: names of the classes, in the order of the classifier; by default the source's.
        num_attention_heads: for a state dict that is not of a published size, since no tensor tells the heads.
        residual_scale: `skip_lam` of an LV-ViT that is not of a published size.
        weights: which ones to take from a file that holds several: 'state_dict', 'state_dict_ema', 'teacher', ... By
            default what the framework's own loader takes; a note says which.
        allow_non_finite_weights: whether to accept NaN and infinite weights.

    Returns: the model, its image processor, and what was left out or assumed.

    Raises: ConversionError if the source cannot be read or is not recognized, holds anything that would have to be
        executed, does not say what is needed, computes something that an EViT does not, leaves a parameter unfilled
        or has a tensor that the model has no place for; the message lists all of them.
    """
    overrides = {
        "keep_rate": keep_rate,
        "reorganization_layers": reorganization_layers,
        "fuse_inattentive_tokens": fuse_inattentive_tokens,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    given = {"num_attention_heads": num_attention_heads, "residual_scale": residual_scale}
    given = {name: value for name, value in given.items() if value is not None}

    found = _weights_of(source, weights)
    if weights is not None and (found is None or isinstance(source, nn.Module)):
        raise ConversionError(f"`weights` is '{weights}', but only files and state dicts hold several: leave it out.")
    if found is None:
        converted = _from_transformers(str(source), given, overrides, allow_non_finite_weights)
    else:
        converted = _from_weights(found, given, overrides, image_size, allow_non_finite_weights)
    size = converted.model.config.image_size
    if image_size is not None and height_and_width(size) != height_and_width(image_size):
        converted.model.set_image_size(image_size)
        converted.notes.append(f"position embeddings were resized bicubically to {image_size} pixels")
    size = converted.model.config.image_size
    converted.image_processor, notes = processor_for_size(converted.image_processor, size)
    converted.notes += notes
    if labels is not None:
        _name_labels(converted.model, labels)
    converted.model.eval()
    return converted


# Sources


def _weights_of(source: Any, wanted: str | None) -> Weights | None:
    """Find tensors with timm's, DeiT's, EViT's or LV-ViT's names; None for anything else, such as a Hub id."""
    if isinstance(source, nn.Module):
        description, tensors = describe_model(source)
        return Weights(tensors, type(source).__name__, description=description)
    if isinstance(source, Mapping):
        return _weights_in(source, "the state dict", wanted)
    if Path(source).is_file():
        return _weights_in(read_checkpoint(Path(source)), source, wanted)
    config, folder = _raw_config(source, {})
    return _timm_weights(source, config, folder, {}, wanted) if is_timm_config(config) else None


def _weights_in(content: Mapping, source: Any, wanted: str | None) -> Weights:
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


def _raw_config(source: str | os.PathLike, hub: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """Content of the source's config.json, empty if there is none that can be read, and the folder it is in."""
    try:
        path = cached_file(
            source,
            "config.json",
            **hub,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
        config = json.loads(Path(path).read_text()) if path is not None else {}
    except (OSError, ValueError, RecursionError):  # Transformers says what is wrong
        return {}, None
    return config if isinstance(config, dict) else {}, Path(path).parent if path is not None else None


def _timm_weights(
    source: str | os.PathLike, config: dict[str, Any], folder: Path, hub: dict[str, Any], wanted: str | None = None
) -> Weights:
    """Read a folder or Hub id as timm saves them."""
    for name in WEIGHT_FILES if not Path(source).is_dir() else ():  # from the Hub, into the folder of config.json
        if cached_file(source, name, **hub, _raise_exceptions_for_missing_entries=False) is not None:
            break
    files = weight_files(folder)
    if not files:
        raise ConversionError(
            f"`{source}` has a config.json of timm, but neither model.safetensors nor pytorch_model.bin."
        )
    content: dict[str, Any] = {}
    for file in files:
        content.update(read_checkpoint(file))
    names = chosen_weights(content, "patch_embed.proj.weight", wanted, source)[0] or content
    description = describe_config(config, names, source)
    found = _weights_in(content, files[0] if len(files) == 1 else source, wanted)
    found.description = description
    return found


def _from_weights(
    found: Weights, given: dict[str, Any], overrides: dict[str, Any], image_size: Any, allow_non_finite: bool
) -> ConvertedCheckpoint:
    """Build the model that the tensors and their source describe."""
    fields = _fields(found, given, image_size)
    source_format, trained = _trained_reorganization(found)
    config_class = EViTLVConfig if found.is_lvvit else EViTConfig
    try:
        config = config_class(**{**fields, "keep_rate": 1.0, **trained, **overrides})
    except StrictDataclassError as error:
        raise ConversionError(f"`{found.source}` cannot be an EViT with these settings: {error}") from None
    model, state_dict = _translated(found, config, allow_non_finite)
    model.load_state_dict(state_dict, assign=True)
    preprocessing = found.description.preprocessing if found.description else {}
    if found.is_lvvit:
        preprocessing = {"crop_pct": 0.9}
    elif not found.settings and not found.description:
        found.notes.append("images are normalized and cropped as for DeiT: no tensor tells")
    processor, notes = timm_processor(preprocessing, config.image_size, config.num_channels)
    return ConvertedCheckpoint(model, source_format, processor, found.unused, found.notes + notes)


def _from_transformers(
    source: str, given: dict[str, Any], overrides: dict[str, Any], allow_non_finite: bool
) -> ConvertedCheckpoint:
    """A folder or Hub id of Transformers."""
    try:
        config_dict, _ = EViTConfig.get_config_dict(source)
    except OSError as error:
        raise ConversionError(
            f"`{source}` is not a file, a Transformers folder, or a reachable Hub id: {error}"
        ) from None
    except ValueError as error:
        raise ConversionError(str(error)) from None
    architecture = str((config_dict.get("architectures") or ["ViTForImageClassification"])[0])
    model_class = EViTForImageClassification
    if architecture.endswith("WithTeacher"):
        model_class = EViTForImageClassificationWithTeacher
    elif architecture.endswith("Model"):
        model_class = EViTModel
    elif not architecture.endswith("ForImageClassification"):
        raise ConversionError(f"`{source}` is a {architecture}: EViT has classifiers and plain models only.")
    if "keep_rate" not in config_dict:
        overrides = {"keep_rate": 1.0, **overrides}
    for name, value in given.items():
        if config_dict.get(name, value) != value:
            raise ConversionError(f"`{name}` is {value}, but `{source}` has {config_dict[name]}: leave it out.")
    try:
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, allow_non_finite_weights=allow_non_finite, **overrides
        )
    except (RuntimeError, OSError) as error:
        raise ConversionError(str(error)) from None
    unfilled = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if unfilled or info["mismatched_keys"]:
        folder = _raw_config(source, {})[1]
        names = [file.name for file in weight_files(folder)] if folder else []
        raise ConversionError(
            f"`{source}` ({', '.join(names)}) does not fill its model. Not filled: {unfilled}. Of another shape: "
            f"{info['mismatched_keys']}. No place for: {sorted(info['unexpected_keys'])}."
        )
    unused = {key: f"{model_class.__name__} has no place for it" for key in info["unexpected_keys"]}
    processor, notes = _source_processor(source, model.config)
    return ConvertedCheckpoint(model, f"Transformers {architecture}", processor, unused, notes)


def _source_processor(source: str, config: EViTConfig) -> tuple[Any, list[str]]:
    """The image processor of a Transformers folder, whole, or ViT's if there is none."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source), []
    except Exception as error:  # a damaged file makes it fail in any way
        for name in ("preprocessor_config.json", "processor_config.json"):
            try:
                file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            except OSError:
                file = None
            if file is not None:
                raise ConversionError(f"`{file}` is not the configuration of an image processor: {error}") from None
    settings = {"mean": (0.5,), "std": (0.5,), "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}
    processor, _ = timm_processor(settings, config.image_size, config.num_channels)
    return processor, ["the source has no image processor: ViT's was taken (mean and deviation 0.5)"]


# Opening for `from_pretrained`


def open_checkpoint(
    model_class: type[EViTPreTrainedModel], source: str | os.PathLike, kwargs: dict[str, Any]
) -> tuple[type[EViTPreTrainedModel], str | os.PathLike | None, dict[str, Any]]:
    """Prepare what `from_pretrained` was given: read timm's folders, check files of Transformers'.

    Args:
        model_class: that is loaded.
        source: folder or Hub id.
        kwargs: keywords of `from_pretrained`.

    Returns: class, source and keywords for Transformers. For a timm checkpoint the keywords hold `config` and
        `state_dict`, the source is None, and a distilled classifier gets the class that has both heads.

    Raises: ConversionError for files that are damaged, hold less than the configuration says, or a timm model that
        an EViT cannot be.
    """
    if kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None:
        return model_class, source, kwargs
    hub = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
    config, folder = _raw_config(source, hub)
    if not is_timm_config(config):
        if folder is None and Path(source).is_dir():
            folder = Path(source) / (kwargs.get("subfolder") or "")
        if folder is not None:
            _check_files(model_class, folder, config, kwargs)
        return model_class, source, kwargs
    if issubclass(model_class.config_class, EViTLVConfig):
        raise ConversionError(f"`{source}` is a timm checkpoint: load it with EViTForImageClassification.")
    return _opened_timm(model_class, _timm_weights(source, config, folder, hub), kwargs)


def _opened_timm(
    model_class: type[EViTPreTrainedModel], found: Weights, kwargs: dict[str, Any]
) -> tuple[type[EViTPreTrainedModel], None, dict[str, Any]]:
    """Class and keywords for Transformers that load weights of timm."""
    kwargs = {name: value for name, value in kwargs.items() if name not in HUB_KEYWORDS}
    heads = kwargs.pop("num_attention_heads", None)
    fields = _fields(found, {} if heads is None else {"num_attention_heads": heads}, kwargs.get("image_size"))
    own, state_dict = _translated(found, EViTConfig(**fields), allow_non_finite=True)  # checked after loading
    if model_class is EViTForImageClassification and isinstance(own, EViTForImageClassificationWithTeacher):
        model_class = EViTForImageClassificationWithTeacher
    if not isinstance(kwargs.get("config"), EViTConfig):
        config, kwargs = EViTConfig.from_dict(
            {**fields, "architectures": [model_class.__name__]}, return_unused_kwargs=True, **kwargs
        )
        kwargs["config"] = config
    for note in found.notes:
        logger.warning(f"`{found.source}`: {note}.")
    if isinstance(own, EViTModel):
        state_dict = {f"vit.{name}": tensor for name, tensor in state_dict.items()}
    return model_class, None, {**kwargs, "state_dict": state_dict}


def _check_files(
    model_class: type[EViTPreTrainedModel], folder: Path, config: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    """Refuse weight files that are damaged, or that hold less than the configuration would have to allocate."""
    files = weight_files(folder, kwargs.get("variant"), kwargs.get("use_safetensors"))
    if not files or "quantization_config" in config or kwargs.get("quantization_config") is not None:
        return
    num_stored = sum(math.prod(shape) for file in files for shape in tensor_shapes(file).values())
    # config.json leaves out what is the default
    fields = {name: getattr(model_class.config_class, name) for name in SIZE_FIELDS}
    given = kwargs.get("config")
    fields |= {name: getattr(given, name, config.get(name, default)) for name, default in fields.items()}
    fields |= {
        name: kwargs[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size") if name in kwargs
    }
    try:
        hidden, layers, intermediate, image_size, patch_size = fields.values()
        image, patch = height_and_width(image_size), height_and_width(patch_size)
        num_positions = (image[0] // patch[0]) * (image[1] // patch[1])
        num_needed = layers * (4 * hidden * hidden + 2 * hidden * intermediate) + hidden * num_positions
        is_too_little = num_needed > num_stored
    except (TypeError, ArithmeticError, LookupError):
        return  # the configuration's own checks say what is wrong
    if is_too_little:
        raise ConversionError(
            f"`{folder}` does not fill its model: config.json and keywords ask for {num_needed} weights "
            f"({', '.join(f'`{name}` {size}' for name, size in fields.items())}), but "
            f"{', '.join(file.name for file in files)} has {num_stored} in all. Load the checkpoint with its own "
            "configuration."
        )


EViTPreTrainedModel.checkpoint_opener = staticmethod(open_checkpoint)


# Pieces


def _fields(found: Weights, given: dict[str, Any], image_size: Any) -> dict[str, Any]:
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
            f"An LV-ViT of width {size[0]} and depth {size[1]} is none of the published ones: give its `skip_lam` as "
            "`residual_scale` (`--residual-scale`)."
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


def _trained_reorganization(found: Weights) -> tuple[str, dict[str, Any]]:
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
                "fuse_inattentive_tokens": bool(settings.get("fuse_token", False)),
            }
        if "reduction_loc" in settings:
            num_patches = found.tensors["pos_embed"].shape[1] - found.num_prefix_tokens
            return "TokenReduction", token_reduction_settings(settings, num_patches)
    except (ValueError, SyntaxError, TypeError, LookupError, ArithmeticError) as error:
        names = ("base_keep_rate", "drop_loc", "fuse_token", "keep_rate", "reduction_loc")
        known = {name: settings[name] for name in names if name in settings}
        raise ConversionError(f"The settings `args` of `{found.source}` make no sense: {known} ({error}).") from None
    return "timm" if found.description else "DeiT or timm", {}


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


def _translated(
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

    parts, unexpected = {}, []
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
    """Raise ConversionError with all parameters that are missing, superfluous, or of another shape or type."""
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
        features = features_of_keys(unexpected)
        raise ConversionError(
            f"The checkpoint `{found.source}` does not fit. "
            f"{f'It has {chr(32).join(features)}, which a plain ViT has not. ' if features else ''}"
            f"Not filled: {missing}. No place for: {unexpected}. Of another shape: {misshaped}."
            f"{f' Not of floating-point numbers: {mistyped}.' if mistyped else ''}"
        )


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


__all__ = ["ConversionError", "ConvertedCheckpoint", "convert_checkpoint", "open_checkpoint", "read_labels"]
