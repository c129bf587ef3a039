"""The network of a run: a checkpoint with a head for these classes, a model of the paper, or one of any size."""

from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from evit_hf import (
    EViTConfig,
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVForImageClassification,
    EViTLVModel,
    EViTModel,
    EViTPreTrainedModel,
    preset_config,
    reorganize,
)
from evit_hf.checkpoint_files import ConversionError
from evit_hf.configuration_evit import DEFAULT_KEEP_RATE, height_and_width
from evit_hf.profiling import MacsFormula, keep_rate_for_macs, num_macs
from evit_hf.reorganization import FAMILIES
from evit_hf.token_reorganization import tokens_left_at_macs
from evit_hf.towers import example_inputs, tower_of

from ..arguments import ModelArguments, TrainArguments
from ..data.augmentation import load_processor, output_size
from ..data.images import ImageSplits
from ..data.names import class_numbers, has_no_names


def build_model(arguments: TrainArguments, splits: ImageSplits) -> PreTrainedModel:
    """Build the network of a run.

    Args:
        arguments: which network, and how it reorganizes.
        splits: the data, whose classes go into the configuration, as does whether an image can have several of them.

    Raises: ValueError for a model that this trainer cannot train.
    """
    model = arguments.model
    is_asked = model.keep_rate is not None or model.macs is not None or model.match_macs_of is not None
    # What a model was trained for goes on, unless the run says otherwise.
    own = {} if model.model is None or is_asked else saved_budget(model.model)
    macs = own.get("macs", model.macs)
    settings: dict[str, Any] = {
        **label_maps(splits.label_names),
        "problem_type": "multi_label_classification" if splits.multi_label else "single_label_classification",
        **({} if own else {"keep_rate": arguments.keep_rate}),
        **({"inattentive_tokens": model.inattentive_tokens} if model.inattentive_tokens is not None else {}),
        **({"drop_path_rate": model.drop_path_rate} if model.drop_path_rate is not None else {}),
        **({"reorganization_layers": model.reorganization_layers} if model.reorganization_layers is not None else {}),
    }
    if model.model is not None:
        network = load_classifier(model.model, **settings)
        match_head(network, saved_classes(model.model), splits.label_names)
    if model.model is not None and not isinstance(network, EViTPreTrainedModel):
        check_family(network, arguments)
    elif model.model is not None:
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
    if macs is not None:
        image_size = square_image_size(network, model)
        rates = keep_rates_at_macs(network, macs, image_size, model.reorganization_layers)
        kind = tower_of(network).config.inattentive_tokens  # of a share of operations it would not stay
        reorganize(network, list(rates.values()), reorganization_layers=list(rates), inattentive_tokens=kind)
    if arguments.run.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return network


def keep_rates_at_macs(
    network: PreTrainedModel, macs: float, image_size: int, layers: list[int] | None = None
) -> dict[int, float]:
    """Keep rates at which all layers give up the same number of tokens, for a share of the dense operations.

    As keep rates they can be approached by a schedule.

    Args:
        network: a classifier that reorganizes.
        macs: share of the operations of the dense layers and patch embedding, in (0, 1].
        image_size: pixels.
        layers: that give up tokens; by default all.

    Returns: by layer number.

    Raises: ValueError for a share that is out of reach.
    """
    tower = tower_of(network)
    rows, columns = tower.patch_grid(image_size)
    left = tokens_left_at_macs(macs, rows * columns, layers or range(len(tower.layers)), tower.costs)
    return keep_rates_of(left, rows * columns)


def keep_rates_of(tokens_left: dict[int, int], num_patches: int) -> dict[int, float]:
    """Keep rates that leave these numbers of image tokens where none is fused, by layer number."""
    rates, before = {}, num_patches
    for layer, after in tokens_left.items():
        # Half a token of room for rounding, since the number of tokens is rounded up.
        rates[layer] = 1.0 if after == before else (after - 0.5) / before
        before = after
    return rates


def check_family(network: PreTrainedModel, arguments: TrainArguments) -> None:
    """Raise ValueError for a setting that only EViT's own classes know."""
    for is_asked, name in (
        (arguments.optimization.mix_token, "`--mix-token`"),
        (arguments.model.match_macs_of, "`--match-macs-of`"),
    ):
        if is_asked:
            raise ValueError(
                f"{name} is for EViT, ViT and DeiT, not for a '{network.config.model_type}': leave it out."
            )


def leave_out_unused(network: PreTrainedModel, image_size: int) -> None:
    """Exclude from training what no answer depends on, for whose gradients several processes would wait.

    Classifiers of some families pass by a norm, or have a mask token; those of EViT use all that they have.

    Args:
        network: a classifier that reorganizes, in training mode again afterwards.
        image_size: pixels.
    """
    if isinstance(network, EViTPreTrainedModel):
        return
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    answer = network.eval()(example_inputs(network, image_size)).logits.sum()
    gradients = torch.autograd.grad(answer, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    network.train()


@torch.no_grad()
def match_head(network: PreTrainedModel, id2label: dict[int, str], label_names: list[str]) -> None:
    """Put the rows of a loaded head into the order of the data's classes, which are found by name.

    Args:
        network: loaded for `label_names`, with the rows as they were saved.
        id2label: classes that the weights were saved with.
        label_names: classes of the data. If they are not those of the checkpoint, the head starts from what it was, or
            from random weights where the number of classes differs.
    """
    numbers, unknown = class_numbers(label_names, id2label)
    if unknown or len(id2label) != len(label_names) or sorted(numbers) != list(range(len(numbers))):
        return
    for head in heads_of(network).values():
        head.weight.copy_(head.weight[numbers])
        if head.bias is not None:
            head.bias.copy_(head.bias[numbers])


def knows_classes(name_or_path: str, label_names: list[str]) -> bool:
    """Whether a checkpoint has a classifier for these classes, by name, or by number where it has no names."""
    config, id2label = PreTrainedConfig.get_config_dict(name_or_path)[0], saved_classes(name_or_path)
    if "ForImageClassification" not in (config.get("architectures") or ["ForImageClassification"])[0]:
        return False
    if len(id2label) != len(label_names):  # as in `match_head`
        return False
    return has_no_names(id2label) or not class_numbers(label_names, id2label)[1]


def saved_classes(name_or_path: str) -> dict[int, str]:
    """Names of the classes that a checkpoint was saved with, by number; empty if it does not say."""
    saved = PreTrainedConfig.get_config_dict(name_or_path)[0]
    names = saved.get("id2label") or dict(enumerate(saved.get("label_names") or []))  # the latter are timm's
    return {int(number): name for number, name in names.items()}


def label_maps(label_names: list[str]) -> dict[str, dict[str, Any]]:
    """`id2label` and `label2id` of a configuration."""
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: number for number, name in enumerate(label_names)},
    }


def load_classifier(name_or_path: str, **settings: Any) -> PreTrainedModel:
    """Load a checkpoint as an image classifier that reorganizes its tokens.

    ViT and DeiT become an EViT, as do the ViTs of timm that EViT computes. Models of other families keep their class,
    see `evit_hf.reorganize`.

    Args:
        name_or_path: a folder or Hub id, see `resolve_model`.
        **settings: fields of the configuration to change. With `id2label` a head that the checkpoint lacks, or that is
            for a different number of classes, starts from random weights.

    Raises: ValueError if there is no such checkpoint, or it is not an image classifier that can be reorganized.
    """
    try:
        config_dict, _ = PreTrainedConfig.get_config_dict(name_or_path)
        model_type = config_dict.get("model_type")
        model_class: type[EViTPreTrainedModel] = EViTForImageClassification
        if model_type == "evit_lv":
            model_class = EViTLVForImageClassification
        elif (config_dict.get("architectures") or [""])[0].endswith("WithTeacher"):
            model_class = EViTForImageClassificationWithTeacher
        elif model_type not in (None, "evit", "vit", "deit", "timm_wrapper"):
            return _load_family(name_or_path, **settings)
        try:
            return model_class.from_pretrained(name_or_path, **settings)
        except ConversionError:
            if model_type != "timm_wrapper":
                raise
        return _load_family(name_or_path, **settings)
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError, UnpicklingError) as error:
        if hasattr(error, "status"):  # our own errors say it all
            raise
        reason = " ".join(str(error).split())
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise ValueError(f"`{name_or_path}` cannot be loaded as an image classifier: {kind}{reason}") from error


def load_model(name_or_path: str) -> PreTrainedModel:
    """Load a classifier, or the bare model where a folder holds no more than that.

    Args:
        name_or_path: a folder or Hub id, see `resolve_model`.

    Raises: ValueError for a model that cannot be reorganized.
    """
    config, _ = PreTrainedConfig.get_config_dict(name_or_path)
    own = {"EViTModel": EViTModel, "ViTModel": EViTModel, "DeiTModel": EViTModel, "EViTLVModel": EViTLVModel}
    architecture = (config.get("architectures") or [""])[0]
    if architecture in own:
        return own[architecture].from_pretrained(name_or_path)
    if is_of_a_family(config) and "Classification" not in architecture:
        keep_rate = None if was_reorganized(name_or_path) else DEFAULT_KEEP_RATE
        return reorganize(getattr(transformers, architecture).from_pretrained(name_or_path), keep_rate)
    return load_classifier(name_or_path)


def is_of_a_family(config: dict[str, Any]) -> bool:
    """Whether a config.json of Transformers is of a model that keeps its class when it is reorganized."""
    architecture = (config.get("architectures") or [""])[0]
    is_known = any(architecture in family.models for family in FAMILIES.values())
    return is_known and config.get("model_type") not in ("vit", "deit")


def _load_family(
    name_or_path: str,
    keep_rate: float | list[float] | None = None,
    reorganization_layers: list[int] | None = None,
    inattentive_tokens: str | None = None,
    drop_path_rate: float | None = None,
    id2label: dict[int, str] | None = None,
    image_size: int | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """Load a classifier of a family, see `load_classifier`; `image_size` changes nothing in it."""
    labels = {} if id2label is None else {"id2label": id2label, "num_labels": len(id2label)}
    config = AutoConfig.from_pretrained(name_or_path, **labels, **fields)
    model_class = AutoModelForImageClassification._model_mapping.get(type(config), None)
    if model_class is None:
        raise ValueError(
            f"`{name_or_path}` cannot be an image classifier: Transformers has none for models of type "
            f"'{config.model_type}'."
        )
    if drop_path_rate is not None:
        _set_drop_path_rate(config, drop_path_rate)
    model, info = model_class.from_pretrained(
        name_or_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    wrong = {*info["missing_keys"], *(key for key, _, _ in info["mismatched_keys"])}
    heads = [f"{name}." for name in heads_of(model)] if id2label is not None else []
    # The norm in front of BEiT's head, which models without a head lack.
    lost = sorted(key for key in wrong if not key.startswith((*heads, "beit.pooler.")))
    if lost:
        raise ValueError(
            f"`{name_or_path}` does not fill {len(lost)} parameters of a {type(model).__name__}, which would be left "
            f"at random values: {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}."
        )
    if keep_rate is None and not was_reorganized(name_or_path):
        keep_rate = DEFAULT_KEEP_RATE
    return reorganize(
        model,
        keep_rate,
        reorganization_layers=reorganization_layers,
        inattentive_tokens=inattentive_tokens,
    )


def _set_drop_path_rate(config: PreTrainedConfig, rate: float) -> None:
    if config.model_type == "timm_wrapper":
        config.model_args = {**(config.model_args or {}), "drop_path_rate": rate}
    elif hasattr(config, "drop_path_rate"):
        config.drop_path_rate = rate
    elif rate:
        raise ValueError(
            f"`--drop-path-rate`: models of type '{config.model_type}' have no stochastic depth, leave it out."
        )


def heads_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The classifiers of a model by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2].endswith(("classifier", "head", "head_dist"))
    }


def square_image_size(network: nn.Module, arguments: ModelArguments) -> int:
    """Pixels of the images that a network is trained on.

    Those that are asked for; by default those of an EViT's configuration, and of a family what the image processor of
    the checkpoint returns, since many of them take images of any size.

    Raises: ValueError if they are not square, or the network does not take them.
    """
    if isinstance(network, EViTPreTrainedModel):
        return network.config.image_size
    size = arguments.image_size or output_size(load_processor(arguments.model)) or tower_of(network).image_size
    height, width = height_and_width(size)
    if height != width:
        raise ValueError(
            f"`{arguments.model}` takes images of {height}x{width} pixels: this trainer takes square ones, "
            "`transformers.Trainer` takes all."
        )
    MacsFormula.of(network, height)  # raises for images that it does not take
    return height


def was_reorganized(name_or_path: str) -> bool:
    """Whether the config.json of a model has a keep rate, in the part of a model of several parts that sees images."""
    return _reorganized_part(name_or_path) is not None


def saved_budget(name_or_path: str) -> dict[str, Any]:
    """Keep rate or share of operations that a model was saved with; empty for a dense one."""
    part = _reorganized_part(name_or_path) or {}
    rate = part.get("keep_rate")
    if part.get("macs") is not None:
        return {"macs": part["macs"]}
    rates = rate if isinstance(rate, list) else [1.0 if rate is None else rate]
    return {"keep_rate": rate} if min(rates) < 1.0 else {}


def _reorganized_part(name_or_path: str) -> dict[str, Any] | None:
    config, _ = PreTrainedConfig.get_config_dict(name_or_path)
    parts = [part for part in (config, *config.values()) if isinstance(part, dict)]
    return next((part for part in parts if "keep_rate" in part), None)


def random_classifier(config: EViTConfig) -> EViTPreTrainedModel:
    """Classifier with random weights; with a distillation token it has a classifier on it."""
    if config.use_distillation_token and config.model_type == "evit":
        return EViTForImageClassificationWithTeacher(config)
    return AutoModelForImageClassification.from_config(config)


def compile_layers(model: nn.Module) -> None:
    """Compile the layers of a model in place, one graph for all of them and for any number of tokens.

    A whole model would be compiled again for each number of tokens, that is for each step of a schedule of the keep
    rate, and its graph with unknown numbers is slower than eager code. `evit benchmark --schedule` measures both.
    """
    for layer in tower_of(model).layers:
        layer.compile(dynamic=True)
