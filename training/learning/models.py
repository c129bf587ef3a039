"""The network of a run: a checkpoint with a head for these classes, a model of the paper, or one of any size."""

from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
)

from evit_hf import (
    EViTConfig,
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVForImageClassification,
    EViTPreTrainedModel,
    preset_config,
)
from evit_hf.profiling import keep_rate_for_macs, num_macs

from ..arguments import TrainArguments
from ..data.images import ImageSplits
from ..data.names import class_numbers


def build_model(arguments: TrainArguments, splits: ImageSplits) -> EViTPreTrainedModel:
    """Build the network of a run.

    Args:
        arguments: which network, and how it reorganizes.
        splits: the data, whose classes go into the configuration, as does whether an image can have several of them.

    Raises: ValueError for a model that this trainer cannot train.
    """
    model = arguments.model
    settings: dict[str, Any] = {
        **label_maps(splits.label_names),
        "problem_type": "multi_label_classification" if splits.multi_label else "single_label_classification",
        "keep_rate": arguments.keep_rate,
        "fuse_inattentive_tokens": model.inattentive_tokens == "fused",
        "drop_path_rate": model.drop_path_rate,
        **({"reorganization_layers": model.reorganization_layers} if model.reorganization_layers is not None else {}),
    }
    if model.model is not None:
        network = load_classifier(model.model, **settings)
        match_head(network, PreTrainedConfig.get_config_dict(model.model)[0], splits.label_names)
        config = network.config
        if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
            raise ValueError(
                f"`{model.model}` was made for images of {config.image_size} pixels in patches of "
                f"{config.patch_size}: this trainer takes square ones, `transformers.Trainer` takes all."
            )
        if model.image_size not in (None, config.image_size):
            network.set_image_size(model.image_size)
    elif model.preset is not None:
        size = {} if model.image_size is None else {"image_size": model.image_size}
        network = random_classifier(
            preset_config(model.preset, num_labels=len(splits.label_names), **settings, **size)
        )
    else:
        network = random_classifier(
            EViTConfig(
                image_size=model.image_size or 224,
                patch_size=model.patch_size,
                hidden_size=model.hidden_size,
                num_hidden_layers=model.num_hidden_layers,
                num_attention_heads=model.num_attention_heads,
                intermediate_size=4 * model.hidden_size,
                initializer_range=model.initializer_range,
                use_distillation_token=model.use_distillation_token,
                layer_norm_eps=1e-6,
                **settings,
            )
        )
    if model.match_macs_of is not None:
        dense = num_macs(network.config, 1.0, model.match_macs_of)
        network.set_keep_rate(keep_rate_for_macs(network.config, dense))
    if arguments.run.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return network


@torch.no_grad()
def match_head(network: EViTPreTrainedModel, saved: dict[str, Any], label_names: list[str]) -> None:
    """Put the rows of a loaded head into the order of the data's classes, which are found by name.

    Args:
        network: loaded for `label_names`, with the rows as they were saved.
        saved: configuration that the weights were saved with.
        label_names: classes of the data. If they are not those of the checkpoint, the head starts from what it was, or
            from random weights where the number of classes differs.
    """
    id2label = {int(number): name for number, name in (saved.get("id2label") or {}).items()}
    numbers, unknown = class_numbers(label_names, id2label)
    if unknown or len(id2label) != len(label_names) or sorted(numbers) != list(range(len(numbers))):
        return
    for name, layer in network.named_modules():
        if name.rpartition(".")[2].endswith("classifier") and isinstance(layer, nn.Linear):
            layer.weight.copy_(layer.weight[numbers])
            layer.bias.copy_(layer.bias[numbers])


def label_maps(label_names: list[str]) -> dict[str, dict]:
    """`id2label` and `label2id` of a configuration."""
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: number for number, name in enumerate(label_names)},
    }


def load_classifier(name_or_path: str, **settings: Any) -> EViTPreTrainedModel:
    """Load a checkpoint as the EViT classifier that its configuration asks for; a ViT or DeiT becomes one.

    Args:
        name_or_path: a folder or Hub id, see `resolve_model`.
        **settings: fields of the configuration to change.

    Raises: ValueError if there is no such checkpoint, or it is not an image classifier that EViT can be.
    """
    try:
        config_dict, _ = PreTrainedConfig.get_config_dict(name_or_path)
        model_class: type[EViTPreTrainedModel] = EViTForImageClassification
        if config_dict.get("model_type") == "evit_lv":
            model_class = EViTLVForImageClassification
        elif (config_dict.get("architectures") or [""])[0].endswith("WithTeacher"):
            model_class = EViTForImageClassificationWithTeacher
        return model_class.from_pretrained(name_or_path, **settings)
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError, UnpicklingError) as error:
        if hasattr(error, "status"):  # of our own, which says it all
            raise
        reason = " ".join(str(error).split())
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise ValueError(f"`{name_or_path}` cannot be loaded as an image classifier: {kind}{reason}") from error


def load_processor(name_or_path: str) -> BaseImageProcessor:
    """Load the image processor of a model.

    Raises: ValueError if it has none.
    """
    try:
        return AutoImageProcessor.from_pretrained(name_or_path)
    except OSError as error:
        raise ValueError(
            f"`{name_or_path}` has no readable preprocessor_config.json, which says how images are resized and "
            "normalized: copy it from the model that it was made of."
        ) from error


def random_classifier(config: EViTConfig) -> EViTPreTrainedModel:
    """Classifier with random weights; with a distillation token it has a classifier on it."""
    if config.use_distillation_token and config.model_type == "evit":
        return EViTForImageClassificationWithTeacher(config)
    return AutoModelForImageClassification.from_config(config)


def compile_layers(model: EViTPreTrainedModel) -> None:
    """Compile the layers of a model in place, one graph for all of them and for any number of tokens.

    A whole model would be compiled again for each number of tokens, that is for each step of a schedule of the keep
    rate, and its graph with unknown numbers is slower than eager code. `evit benchmark --schedule` measures both.
    """
    for layer in model.base_model.layers:
        layer.compile(dynamic=True)
