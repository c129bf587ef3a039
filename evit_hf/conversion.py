"""Public checkpoints to EViT: every tensor accounted for, nothing guessed and nothing executed.

Formats, recognized from what a file or folder holds:
    - official EViT, DeiT and TokenReduction `.pth` (a pickle of weights, optimizer and settings), timm ViT and DeiT
      state dicts (pickle or safetensors) and model objects: the same parameter names, wherever training scripts nest
      them and whatever prefix they leave;
    - folders and Hub ids of timm, with their `config.json`;
    - official LV-ViT `.pth` and `.pth.tar`;
    - folders and Hub ids of Transformers 4.x and 5.x: ViT, DeiT, distilled DeiT, EViT.

Importing this module also teaches `from_pretrained` of the EViT models to read timm's folders and to check files.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .checkpoint_files import (
    WEIGHT_FILES,
    ConversionError,
    chosen_weights,
    read_checkpoint,
    set_modes_by_umask,
    tensor_shapes,
    weight_files,
)
from .configuration_evit import EViTConfig, changed_budget
from .configuration_evit_lv import EViTLVConfig
from .dinov2_weights import dinov2_model
from .image_processors import processor_for_size, timm_processor
from .modeling_evit import (
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTModel,
    EViTPreTrainedModel,
)
from .profiling import height_and_width
from .reorganization import reorganize
from .timm_checkpoints import describe_config, describe_model, dinov2_features, is_packed_swiglu, is_timm_config
from .vit_weights import Weights, configuration_fields, trained_reorganization, translated, weights_in


logger = logging.get_logger(__name__)

# Fields of a configuration that decide how much memory is allocated.
SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "intermediate_size", "image_size", "patch_size")
# Keywords of `from_pretrained` that say where on the Hub a file is.
HUB_KEYWORDS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


@dataclass
class ConvertedCheckpoint:
    """A model that reorganizes, made from a public checkpoint, and what there is to say about it.

    Args:
        model: in evaluation mode: an EViT, or for sources with layer scale or registers a DINOv2 of Transformers that
            `reorganize` was called on.
        source_format: what the source was recognized as.
        image_processor: does what the source's images went through.
        unused: entries of the source that were left out on purpose, with the reason.
        notes: what was chosen or assumed where the source does not say, and what was changed.
    """

    model: PreTrainedModel
    source_format: str
    image_processor: Any
    unused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save model, image processor and the code for `trust_remote_code=True` into a folder."""
        self.model.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        set_modes_by_umask(Path(folder))


def convert_checkpoint(
    source: str | os.PathLike[str] | nn.Module | Mapping[str, Any],
    *,
    keep_rate: float | list[float] | None = None,
    reorganization_layers: list[int] | None = None,
    macs: float | None = None,
    inattentive_tokens: str | None = None,
    image_size: int | Sequence[int] | None = None,
    labels: list[str] | None = None,
    num_attention_heads: int | None = None,
    residual_scale: float | None = None,
    weights: str | None = None,
    allow_non_finite_weights: bool = False,
) -> ConvertedCheckpoint:
    """Make a model that reorganizes from a public checkpoint: an EViT, or a DINOv2 where the source is one.

    Args:
        source: a file, a folder, a Hub id, a timm model, or a state dict with official, DeiT, timm or LV-ViT names.
        keep_rate: in (0, 1]; by default what the source was trained with, 1.0 for a dense model.
        reorganization_layers: zero-based; by default the source's, or one, two and three quarters of the depth.
        macs: instead of `keep_rate`, for a source that was not trained to lose tokens: share of the dense model's
            operations, see `EViTConfig`.
        inattentive_tokens: "fused", "dropped" or "counted"; by default the source's, or "fused" ("counted" with
            `macs`).
        image_size: pixels, one number or (height, width). A size other than the source's resizes the position
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
        "macs": macs,
        "inattentive_tokens": inattentive_tokens,
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
        if isinstance(converted.model, EViTPreTrainedModel):
            converted.model.set_image_size(image_size)
            converted.notes.append(f"position embeddings were resized bicubically to {image_size} pixels")
        else:
            converted.notes.append(f"DINOv2 resizes its position embeddings to {image_size} pixels at each call")
        size = image_size
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
        return weights_in(source, "the state dict", wanted)
    if Path(source).is_file():
        return weights_in(read_checkpoint(Path(source)), source, wanted)
    config, folder = _raw_config(source, {})
    return _timm_weights(source, config, folder, {}, wanted) if is_timm_config(config) else None


def _raw_config(source: str | os.PathLike[str], hub: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
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
    source: str | os.PathLike[str],
    config: dict[str, Any],
    folder: Path,
    hub: dict[str, Any],
    wanted: str | None = None,
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
    found = weights_in(content, files[0] if len(files) == 1 else source, wanted)
    found.description = description
    if config.get("label_descriptions"):
        found.unused["label_descriptions"] = "classes are called by their `label_names`"
    return found


def _from_weights(
    found: Weights, given: dict[str, Any], overrides: dict[str, Any], image_size: Any, allow_non_finite: bool
) -> ConvertedCheckpoint:
    """Build the model that the tensors and their source describe."""
    fields = configuration_fields(found, given, image_size)
    source_format, trained = trained_reorganization(found)
    if dinov2_features(found.tensors) or is_packed_swiglu(found.tensors):
        return _from_dinov2(found, fields, changed_budget({"keep_rate": 1.0}, overrides), allow_non_finite)
    config_class = EViTLVConfig if found.is_lvvit else EViTConfig
    try:
        config = config_class(**changed_budget({**fields, "keep_rate": 1.0, **trained}, overrides))
    except StrictDataclassError as error:
        raise ConversionError(f"`{found.source}` cannot be an EViT: {error.__cause__ or error}") from None
    model, state_dict = translated(found, config, allow_non_finite)
    model.load_state_dict(state_dict, assign=True)
    return _with_processor(found, model, source_format)


def _from_dinov2(
    found: Weights, fields: dict[str, Any], settings: dict[str, Any], allow_non_finite: bool
) -> ConvertedCheckpoint:
    """Build the DINOv2 of Transformers that computes the same, and reorganize it."""
    model = dinov2_model(found, fields, allow_non_finite)
    try:
        model = reorganize(model, **settings)
    except ValueError as error:
        raise ConversionError(f"`{found.source}`: {error}") from None
    return _with_processor(found, model, f"timm, as {type(model).__name__}")


def _with_processor(found: Weights, model: PreTrainedModel, source_format: str) -> ConvertedCheckpoint:
    """The model and the image processor that the source describes."""
    preprocessing = found.description.preprocessing if found.description else {}
    if found.is_lvvit:
        preprocessing = {"crop_pct": 0.9}
    elif not found.settings and not found.description:
        found.notes.append("images are normalized and cropped as for DeiT: no tensor tells")
    processor, notes = timm_processor(preprocessing, model.config.image_size, model.config.num_channels)
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
    if not {"keep_rate", "macs"} & (config_dict.keys() | overrides.keys()):
        overrides = {"keep_rate": 1.0, **overrides}
    for name, value in given.items():
        if config_dict.get(name, value) != value:
            raise ConversionError(f"`{name}` is {value}, but `{source}` has {config_dict[name]}: leave it out.")
    try:
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, allow_non_finite_weights=allow_non_finite, **overrides
        )
    except StrictDataclassError as error:
        raise ConversionError(f"`{source}` cannot be an EViT: {error.__cause__ or error}") from None
    except (RuntimeError, OSError) as error:
        raise ConversionError(str(error)) from None
    unfilled = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if unfilled or info["mismatched_keys"]:
        folder = _raw_config(source, {})[1]
        names = [file.name for file in weight_files(folder)] if folder else []
        raise ConversionError(
            f"`{source}` ({', '.join(names)}) does not fill its model. Not filled: {unfilled}. Of a different shape: "
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
    model_class: type[EViTPreTrainedModel], source: str | os.PathLike[str], kwargs: dict[str, Any]
) -> tuple[type[EViTPreTrainedModel], str | os.PathLike[str] | None, dict[str, Any]]:
    """Prepare what `from_pretrained` was given: read timm's folders and single files, check files of Transformers'.

    Args:
        model_class: that is loaded.
        source: folder, Hub id, or a file of weights.
        kwargs: keywords of `from_pretrained`.

    Returns: class, source and keywords for Transformers. For a timm checkpoint or a file the keywords hold `config`
        and `state_dict`, the source is None, and a distilled classifier gets the class that has both heads.

    Raises: ConversionError for files that are damaged, hold less than the configuration says, or a timm model that
        an EViT cannot be.
    """
    if kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None:
        return model_class, source, kwargs
    if Path(source).is_file():
        return _opened_weights(model_class, weights_in(read_checkpoint(Path(source)), source, None), kwargs)
    hub = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
    config, folder = _raw_config(source, hub)
    if not is_timm_config(config):
        if folder is None and Path(source).is_dir():
            folder = Path(source) / (kwargs.get("subfolder") or "")
        if folder is not None:
            _check_files(model_class, folder, config, kwargs)
        return model_class, source, kwargs
    return _opened_weights(model_class, _timm_weights(source, config, folder, hub), kwargs)


def _opened_weights(
    model_class: type[EViTPreTrainedModel], found: Weights, kwargs: dict[str, Any]
) -> tuple[type[EViTPreTrainedModel], None, dict[str, Any]]:
    """Class and keywords for Transformers that load weights with other names."""
    features = dinov2_features(found.tensors)
    if features:
        raise ConversionError(
            f"`{found.source}` is a Vision Transformer with {', with '.join(features)}, which no EViT has: "
            "`convert_checkpoint` (`evit convert`) makes a DINOv2 of Transformers of it, with the same outputs."
        )
    config_class = model_class.config_class
    if found.is_lvvit != issubclass(config_class, EViTLVConfig):
        kind, prefix = ("an LV-ViT", "EViTLV") if found.is_lvvit else ("a timm checkpoint", "EViT")
        raise ConversionError(f"`{found.source}` is {kind}: load it with {prefix}ForImageClassification.")
    kwargs = {name: value for name, value in kwargs.items() if name not in HUB_KEYWORDS}
    given = {name: kwargs.pop(name) for name in ("num_attention_heads", "residual_scale") if name in kwargs}
    fields = configuration_fields(found, given, kwargs.get("image_size"))
    own, state_dict = translated(found, config_class(**fields), allow_non_finite=True)  # checked after loading
    fields |= trained_reorganization(found)[1]
    if model_class is EViTForImageClassification and isinstance(own, EViTForImageClassificationWithTeacher):
        model_class = EViTForImageClassificationWithTeacher
    if not isinstance(kwargs.get("config"), EViTConfig):
        config, kwargs = config_class.from_dict(
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


def _name_labels(model: PreTrainedModel, labels: list[str]) -> None:
    if len(labels) != model.config.num_labels:
        raise ConversionError(
            f"There are {len(labels)} labels, but the classifier has {model.config.num_labels} classes: give one name "
            "for each, in its order."
        )
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: number for number, label in enumerate(labels)}


def read_labels(path: str | os.PathLike[str]) -> list[str]:
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
