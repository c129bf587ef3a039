"""timm's Vision Transformers: what their `config.json` or the model object says, and which of them an EViT can be."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .checkpoint_files import ConversionError


# Published sizes by name: hidden size, layers, attention heads, MLP size. The first three are DeiT's as well.
SIZES = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "medium": (512, 12, 8, 2048),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
}
# Heads of published Vision Transformers with a class token: no tensor tells them.
PUBLISHED_HEADS = {(width, depth, mlp): heads for width, depth, heads, mlp in SIZES.values()}
DINOV2_GIANT = (1536, 40, 24, 8192)
PUBLISHED_HEADS[1536, 40, 8192] = 24

# Architectures of timm that are plain Vision Transformers with a class token. All others change something.
PLAIN_ARCHITECTURE = re.compile(
    rf"(?:vit|deit)_({'|'.join(SIZES)})_(?:distilled_)?patch\d+_\d+(?:_(?:in21k|miil|sam|dino))?"
)
# Those that DINOv2 of Transformers computes.
DINOV2_ARCHITECTURE = re.compile(
    rf"(?:vit_({'|'.join(SIZES)})_patch14_(?:reg4_)?dinov2|deit3_({'|'.join(SIZES)})_patch\d+_\d+)"
)
TEST_SIZES = {"test_vit": (64, 6, 2, 192)}
# What the others change, by a part of their names: for messages.
ARCHITECTURE_FEATURES = {
    "_rpn_": "blocks that normalize after attention and MLP (ResPostBlock)",
    "_xp_": "parallel blocks (ParallelScalingBlock)",
    "pwee": "parallel blocks (ParallelScalingBlock)",
    "18x2": "parallel blocks (ParallelThingsBlock)",
    "36x1": "layer scale",
    "_plus_": "layer scale",
    "_gap_": "average pooling",
    "eva_large": "average pooling",
    "siglip": "no class token",
    "_reg": "register tokens",
    "clip": "a norm before the blocks (pre-norm)",
    "dinov2": "layer scale",
    "deit3": "layer scale",
}
# Keys that only such models have.
KEY_FEATURES = {
    r"blocks\.\d+\.(ls[12]\.|gamma_[12])": "layer scale",
    r"(reg_token|register_tokens)$": "register tokens",
    r"norm_pre\.": "a norm before the blocks (pre-norm)",
    r"fc_norm\.": "a norm after pooling (average pooling)",
    r"attn_pool\.": "attention pooling",
    r"blocks\.\d+\.attn\.[qk]_norm\.": "normalized queries and keys (qk-norm)",
    r"blocks\.\d+\.(attn|mlp)\.norm\.": "a norm inside attention or MLP",
    r"blocks\.\d+\.attn\.gate\.": "gated attention",
    r"blocks\.\d+\.attn\.(q|k|v)(_proj)?\.": "separate queries, keys and values",
    r"blocks\.\d+\.(in_proj|attns|ffns|attn_out_proj|mlp_out_proj)\b": "parallel blocks",
    r"blocks\.\d+\.mlp\.(w\d+|fc1_[gx])\.": "a gated MLP (SwiGLU)",
    r".*(relative_position_|rel_pos)": "relative positions",
    r"patch_embed\.(backbone|norm)\.": "a different patch embedding (hybrid, or with a norm)",
}
# What DINOv2 of Transformers has and EViT does not.
DINOV2_FEATURES = ("layer scale", "register tokens")
# What timm's models have and `reorganize` can take as it is, but neither EViT nor DINOv2 can.
TIMM_FEATURES = (
    *DINOV2_FEATURES,
    "a norm before the blocks (pre-norm)",
    "normalized queries and keys (qk-norm)",
    "a norm inside attention or MLP",
    "gated attention",
    "a gated MLP (SwiGLU)",
    "a different patch embedding (hybrid, or with a norm)",
)
# Arguments of timm's VisionTransformer that a plain one may have with these values, or with any (None).
PLAIN_ARGUMENTS: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads")),
    **dict.fromkeys(("mlp_ratio", "qkv_bias", "proj_bias", "dynamic_img_size", "strict_img_size", "weight_init")),
    **dict.fromkeys(("fix_init", "distilled", "pool_include_prefix", "act_layer", "global_pool")),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate")),
    **dict.fromkeys(("drop_path_rate", "no_embed_class", "reg_tokens", "init_values")),
    "class_token": (True,),
    "pre_norm": (False,),
    "final_norm": (True,),
    "fc_norm": (False, None),
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "pos_embed": ("learn",),
    "norm_layer": (None, "layernorm"),
    "embed_norm_layer": (None,),
    "dynamic_img_pad": (False,),
}
ARGUMENT_FEATURES = {
    "class_token": "no class token",
    "pre_norm": "a norm before the blocks (pre-norm)",
    "fc_norm": "a norm after pooling (average pooling)",
    "qk_norm": "normalized queries and keys (qk-norm)",
}

# Where data parallelism, torch.compile, weight averages and Transformers keep the model itself.
WRAPPERS = ("module", "_orig_mod", "timm_model", "model")
# timm's activations -> Transformers' names.
ACTIVATIONS = {
    "gelu": "gelu",
    "GELU": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "GELUTanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "QuickGELU": "quick_gelu",
}


@dataclass
class TimmDescription:
    """What timm says of a model besides its tensors.

    Args:
        known: fields of the configuration: `num_attention_heads`, `hidden_act`, `layer_norm_eps`, `image_size`, as far
            as they are said.
        preprocessing: timm's `pretrained_cfg`: `mean`, `std`, `crop_pct`, `crop_mode`, `interpolation`.
        label_names: of all classes in order, or by class number.
        num_classes: of the classifier, None if it is not said.
    """

    known: dict[str, Any]
    preprocessing: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] | dict[int, str] = field(default_factory=dict)
    num_classes: int | None = None


def is_timm_config(config: Any) -> bool:
    """Whether a `config.json` describes a timm model, as saved by timm or by Transformers' `TimmWrapperModel`."""
    return (
        isinstance(config, Mapping)
        and "architecture" in config
        and (config.get("model_type", "timm_wrapper") == "timm_wrapper")
    )


def features_of_keys(names: Iterable[str]) -> list[str]:
    """What the names of parameters tell that a plain Vision Transformer does not have."""
    names = list(names)
    return [
        feature for pattern, feature in KEY_FEATURES.items() if any(re.match(pattern, str(name)) for name in names)
    ]


def refuse_features(source: Any, features: Iterable[str]) -> None:
    """Raise ConversionError if a model has any feature that neither an EViT nor a DINOv2 has."""
    features = list(dict.fromkeys(features))
    if set(features) <= set(DINOV2_FEATURES):
        return
    way_out = ""
    if all(feature.startswith(TIMM_FEATURES) for feature in features):
        way_out = (
            " `reorganize` takes the model of timm as it is: `reorganize(timm.create_model(...), keep_rate=0.7)`."
        )
    raise ConversionError(
        f"`{source}` is a Vision Transformer with {', with '.join(features)}: the EViT classes compute a plain "
        f"ViT, so its outputs would differ.{way_out}"
    )


def dinov2_features(names: Iterable[str]) -> list[str]:
    """What the names of parameters tell that DINOv2 of Transformers has and an EViT does not.

    A stray tensor does not make a DINOv2: layer scale must be in the first block.
    """
    names = [name for name in names if not name.startswith("blocks.") or name.startswith("blocks.0.")]
    return [feature for feature in features_of_keys(names) if feature in DINOV2_FEATURES]


def is_packed_swiglu(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the first matrix of the MLP is gate and value in one: it has twice as many rows as the second reads."""
    first, second = (tensors.get(f"blocks.0.mlp.fc{number}.weight") for number in (1, 2))
    return (
        first is not None
        and second is not None
        and first.ndim == second.ndim == 2
        and (first.shape[0] == 2 * second.shape[1])
    )


def describe_config(config: Mapping[str, Any], names: Iterable[str], source: Any) -> TimmDescription:
    """Read timm's `config.json`.

    Args:
        config: its content.
        names: of the parameters in the weight file.
        source: for messages.

    Raises: ConversionError for a model that is not a plain Vision Transformer with a class token, with what it has
        instead, and for fields of the wrong type.
    """
    architecture = str(config["architecture"])
    preprocessing = _mapping(config, "pretrained_cfg", source) if "pretrained_cfg" in config else dict(config)
    arguments = _mapping(config, "model_args", source)
    names = list(names)
    has_head = any(name.startswith("head.") for name in names)

    features = features_of_keys(names)
    claimed = [text for part, text in ARCHITECTURE_FEATURES.items() if part in architecture]
    claimed += ["layer scale"] * bool(arguments.get("init_values"))
    claimed += ["register tokens"] * bool(arguments.get("reg_tokens"))
    absent = [feature for feature in claimed if feature in DINOV2_FEATURES and feature not in features]
    features += claimed
    for name, value in arguments.items():
        accepted = PLAIN_ARGUMENTS.get(name, ())
        if accepted is not None and value not in accepted:
            features.append(f"{ARGUMENT_FEATURES.get(name, 'a changed architecture')} (`{name}` is {value!r})")
    pooling = config.get("global_pool", arguments.get("global_pool", "token"))
    features += _pooling(pooling, has_head)
    activation = str(arguments.get("act_layer") or "gelu")
    if activation not in ACTIVATIONS:
        raise ConversionError(f"The activation is {activation}, but a ViT of Transformers has GELU: `{source}`.")
    refuse_features(source, features)
    if absent:
        raise ConversionError(
            f"`{source}` is a Vision Transformer with {', with '.join(absent)} by its config.json, but has no such "
            "tensors: take both files from one model."
        )
    size = PLAIN_ARCHITECTURE.fullmatch(architecture) or DINOV2_ARCHITECTURE.fullmatch(architecture)
    if size is None and architecture not in TEST_SIZES:
        raise ConversionError(
            f"`{source}` has the architecture '{architecture}', which is not one of timm's plain Vision Transformers "
            "with a class token (vit_*_patch*, deit_*_patch*). If yours is one, build it with timm and pass the model "
            "object to `convert_checkpoint`."
        )
    width, _, heads, _ = SIZES[next(filter(None, size.groups()))] if size else TEST_SIZES[architecture]
    if architecture.startswith("vit_giant_patch14") and architecture.endswith("dinov2"):
        width, _, heads, _ = DINOV2_GIANT

    known: dict[str, Any] = {"hidden_act": ACTIVATIONS[activation], "layer_norm_eps": 1e-6}
    if "num_heads" in arguments:
        known["num_attention_heads"] = arguments["num_heads"]
    elif arguments.get("embed_dim", width) == width:
        known["num_attention_heads"] = heads
        known["hidden_size"] = width  # what the heads belong to
    input_size = preprocessing.get("input_size")
    image_size = arguments.get("img_size") or (input_size[-2:] if isinstance(input_size, list) else input_size)
    if image_size:
        known["image_size"] = image_size
    labels = config.get("label_names", preprocessing.get("label_names", config.get("labels")))
    num_classes = config.get("num_classes", preprocessing.get("num_classes"))
    return TimmDescription(known, preprocessing, _labels(labels, source), num_classes)


def _mapping(config: Mapping[str, Any], name: str, source: Any) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConversionError(f"`{name}` in the config.json of `{source}` must be an object, got {value!r:.100}.")
    return dict(value)


def _labels(labels: Any, source: Any) -> list[str] | dict[int, str]:
    """Names of all classes, or by class number where there are gaps."""
    try:
        if not labels:
            return {}
        if isinstance(labels, Mapping):
            return {int(number): str(name) for number, name in labels.items()}
        if isinstance(labels, (list, tuple)):
            return [str(name) for name in labels]
    except (TypeError, ValueError):
        pass
    raise ConversionError(
        f"`label_names` of `{source}` must be a list of names or an object that maps class numbers to names, got "
        f"{labels!r:.100}."
    )


def _pooling(pooling: Any, has_head: bool) -> list[str]:
    """Name a pooling other than the class token's; without a classifier nothing need be pooled."""
    if pooling == "token" or (not has_head and pooling in ("", None)):
        return []
    return [f"a classifier that pools '{pooling}', but EViT classifies, and scores, with the class token"]


def describe_model(module: Any) -> tuple[TimmDescription, dict[str, torch.Tensor]]:
    """Read a VisionTransformer object of timm, in the wrappers of trainers or without.

    Returns: what it says, and its tensors.

    Raises: ConversionError for other objects, and for a model that is not a plain Vision Transformer with a class
        token, with what it has instead.
    """
    for name in WRAPPERS * 4:
        inner = module._modules.get(name)
        module = module if inner is None or _is_vision_transformer(module) else inner
    kind = type(module).__name__
    if not _is_vision_transformer(module) or not len(module.blocks):
        raise ConversionError(f"A {kind} is not a VisionTransformer of timm: pass one, or a file or folder.")
    features, activation, epsilon = _features_of_model(module)
    is_swiglu = activation == "SiLU" and is_packed_swiglu(module.state_dict())
    if activation not in ACTIVATIONS.values() and not is_swiglu:
        raise ConversionError(f"The activation is {activation}, but a ViT of Transformers has GELU.")
    refuse_features(kind, features)
    known = {
        "num_attention_heads": module.blocks[0].attn.num_heads,
        "hidden_act": activation,
        "layer_norm_eps": epsilon,
    }
    if getattr(module.patch_embed, "img_size", None) is not None:
        known["image_size"] = list(module.patch_embed.img_size)
    preprocessing = dict(getattr(module, "pretrained_cfg", None) or {})
    description = TimmDescription(known, preprocessing, _labels(preprocessing.get("label_names"), kind))
    return description, dict(module.state_dict())


def _is_vision_transformer(module: nn.Module) -> bool:
    return any(ancestor.__name__ == "VisionTransformer" for ancestor in type(module).__mro__)


def _features_of_model(module: Any) -> tuple[list[str], str, float]:
    """What a plain ViT does not have, the activation in Transformers' words, and epsilon of the norms."""
    blocks = list(module.blocks)
    features = sorted({f"{type(block).__name__} blocks" for block in blocks} - {"Block blocks"})
    features += features_of_keys(module.state_dict())
    if features and features[0].endswith(" blocks"):
        return features, "gelu", 0.0
    heads = {block.attn.num_heads for block in blocks}
    activations = {_activation(block.mlp.act) for block in blocks}
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    if isinstance(module.norm, nn.Identity):
        features.append("no norm after the blocks")
    else:
        norms.append(module.norm)
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms) or len({norm.eps for norm in norms}) > 1:
        features.append("norms other than one kind of layer norm")
    if len(heads) > 1 or len(activations) > 1:
        features.append("blocks of several kinds")
    odd = {f"{type(part).__name__} layers" for block in blocks for part in (block.attn, block.mlp)}
    if activations == {"SiLU"} and not any(getattr(block.mlp, "gate_last", True) for block in blocks):
        odd.discard("GluMlp layers")
    features += sorted(odd - {"Attention layers", "Mlp layers"})
    projection = getattr(module.patch_embed, "proj", None)
    if not isinstance(projection, nn.Conv2d) or projection.stride != projection.kernel_size:
        features.append("overlapping or otherwise different patches")
    if not getattr(module, "has_class_token", True):
        features.append("no class token")
    if getattr(module, "pos_embed", None) is None:
        features.append("no position embeddings")
    features += _pooling(getattr(module, "global_pool", "token"), isinstance(module.head, nn.Linear))
    return features, activations.pop(), getattr(norms[0], "eps", 0.0)


def _activation(module: nn.Module) -> str:
    """Transformers' name of an activation module, or the name of its class."""
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_pytorch_tanh"
    return ACTIVATIONS.get(type(module).__name__, type(module).__name__)
