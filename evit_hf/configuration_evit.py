"""EViT configuration: a ViT configuration that says where and how much to reorganize."""

import copy
import difflib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, TypeVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, ViTConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from .token_reorganization import INATTENTIVE_TOKENS, TowerCosts


logger = logging.get_logger(__name__)

# Of the whole package; it is kept here because this file travels with every saved model.
__version__ = "0.1.0"

# Words of the official implementation (youweiliang/evit) for the same things.
OFFICIAL_NAMES = {
    "base_keep_rate": "keep_rate",
    "drop_loc": "reorganization_layers",
    "fuse_token": "inattentive_tokens",
}
DEFAULT_KEEP_RATE = 0.7
# What `reorganize` takes by default: on CLIP ViT-B/16, untrained, at most a point under the dense model.
DEFAULT_MACS = 0.66

# The largest ViT that was published has 22 billion parameters; more than this is a damaged file.
MAX_PARAMETERS = 40 * 10**9
MAX_PATCHES = 2**20
DTYPES = ("float32", "float16", "bfloat16", "float64")

Class = TypeVar("Class", bound=type)


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a size that is one number or both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def python_value(value: Any) -> Any:
    """Python's own numbers for those of numpy and PyTorch: what JSON can hold, and what `isinstance` knows."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(python_value(entry) for entry in value)
    return value.tolist() if hasattr(value, "tolist") else value


def shown(value: Any) -> str:
    """Show a value in an error message, cut off if it is long."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole_number(value: Any) -> bool:
    """Whether a value is a whole number of Python."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_keep_rate(keep_rate: float | Sequence[float], num_reorganization_layers: int) -> None:
    """Refuse a keep rate that is not a share of tokens, or a list that does not fit the reorganization layers.

    Args:
        keep_rate: one share of tokens for all reorganization layers, or one for each of them.
        num_reorganization_layers: entries that a list must have.

    Raises: ValueError.
    """
    rates = list(keep_rate) if isinstance(keep_rate, (list, tuple)) else None
    for rate in [keep_rate] if rates is None else rates:
        if not is_number(rate) or not 0 < rate <= 1:  # type: ignore[operator]
            raise ValueError(
                "`keep_rate` must be in (0, 1], one number or one for each reorganization layer, got "
                f"{shown(keep_rate)}: pass the share of image tokens to keep, for example 0.7."
            )
    if rates is not None and len(rates) != num_reorganization_layers:
        raise ValueError(
            f"`keep_rate` has {len(rates)} entries, {shown(keep_rate)}, but `reorganization_layers` names "
            f"{num_reorganization_layers} layers: pass one number for all layers, or one for each."
        )


def keep_rate_by_layer(keep_rate: float | Sequence[float], reorganization_layers: Sequence[int]) -> dict[int, float]:
    """Keep rate of each reorganization layer, by zero-based layer number, for one rate or one for each layer.

    Numbers of numpy and tensors are numbers.

    Raises: ValueError if a rate is out of range, or their number is wrong.
    """
    keep_rate = python_value(keep_rate)
    check_keep_rate(keep_rate, len(reorganization_layers))
    rates = keep_rate if isinstance(keep_rate, (list, tuple)) else [keep_rate] * len(reorganization_layers)
    return dict(zip(reorganization_layers, rates, strict=True))


def check_macs(macs: float) -> None:
    """Refuse a share of operations that is not one.

    Raises: ValueError.
    """
    if not is_number(macs) or not 0 < macs <= 1:
        raise ValueError(
            f"`macs` must be in (0, 1], got {shown(macs)}: pass the share of the dense model's multiply-accumulate "
            "operations, for example 0.66."
        )


# Settings whose defaults depend on whether `keep_rate` or `macs` says how many tokens are kept.
BUDGET_FIELDS = ("keep_rate", "macs", "reorganization_layers", "inattentive_tokens")


def budget_defaults(settings: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Values of `BUDGET_FIELDS`, with defaults for those that are None.

    Args:
        settings: some or all of the fields.
        num_layers: of the model.

    Returns: with `macs` no keep rate, every layer and "counted"; without it keep rate 0.7, the paper's three layers
        and "fused".

    Raises: ValueError if both `keep_rate` and `macs` are given.
    """
    settings = {name: settings.get(name) for name in BUDGET_FIELDS}
    if settings["macs"] is None:
        defaults = {
            "keep_rate": DEFAULT_KEEP_RATE,
            "reorganization_layers": default_reorganization_layers(num_layers),
            "inattentive_tokens": "fused",
        }
    else:
        if settings["keep_rate"] is not None:
            raise ValueError(
                f"`keep_rate` {shown(settings['keep_rate'])} and `macs` {shown(settings['macs'])} both say how many "
                "tokens are kept: pass `macs` for a model that was not trained to lose tokens, `keep_rate` for one "
                "that was or will be."
            )
        defaults = {"reorganization_layers": list(range(num_layers)), "inattentive_tokens": "counted"}
    return {name: defaults.get(name) if value is None else value for name, value in settings.items()}


def changed_budget(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes, where `keep_rate` replaces `macs` or `macs` replaces `keep_rate`.

    Args:
        settings: entries of a configuration, `BUDGET_FIELDS` among them. Those that belong to what is replaced are
            left out, so that the others take their defaults.
        changes: of `BUDGET_FIELDS`; None changes nothing.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    by_macs = settings.get("macs") is not None
    if ("keep_rate" if by_macs else "macs") in changes or {"keep_rate", "macs"} <= set(changes):
        settings = {name: value for name, value in settings.items() if name not in BUDGET_FIELDS}
    return {**settings, **changes}


def renamed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with `inattentive_tokens` for `fuse_inattentive_tokens`, which it replaced, and a warning.

    Raises: ValueError if both are given and contradict each other, or the old one is not True or False.
    """
    if "fuse_inattentive_tokens" not in settings:
        return settings
    fuses = settings["fuse_inattentive_tokens"]
    if not isinstance(fuses, bool):
        raise ValueError(
            f"`fuse_inattentive_tokens` must be True or False, got {shown(fuses)}: it is `inattentive_tokens` now, "
            "'fused', 'dropped' or 'counted'."
        )
    value = "fused" if fuses else "dropped"
    given = settings.get("inattentive_tokens")
    if given not in (None, value):
        raise ValueError(
            f"`fuse_inattentive_tokens` {fuses} contradicts `inattentive_tokens` {shown(given)}: leave out the first, "
            "which is the old name."
        )
    logger.warning(f"`fuse_inattentive_tokens={fuses}` is `inattentive_tokens={value!r}` now.")
    rest = {name: entry for name, entry in settings.items() if name != "fuse_inattentive_tokens"}
    return {**rest, "inattentive_tokens": value}


def refuse_misspelt_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a keyword that looks like a misspelling of one of ours; foreign keywords pass.

    Transformers stores unknown configuration keywords, and drops unknown forward keywords, without a word.

    Args:
        names: keywords that nobody claimed.
        known: our own keywords.

    Raises: TypeError with the keyword that was probably meant.
    """
    for name in set(names).difference(known):
        meant = OFFICIAL_NAMES.get(name) or next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), None)
        if meant is not None:
            raise TypeError(f"`{name}` is not a keyword of EViT: did you mean `{meant}`?")


def patch_grid(config: "EViTConfig", image_size: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of patches of an image, see `EViTConfig.patch_grid`.

    Models call this and not the method: PyTorch 2.7 cannot compile methods of a configuration.
    """
    (height, width), stride = height_and_width(image_size), config.stem_stride
    patch_height, patch_width = height_and_width(config.patch_size)
    if stride > 1:
        height, width = -(-height // stride), -(-width // stride)
        patch_height, patch_width = patch_height // stride, patch_width // stride
    return height // patch_height, width // patch_width


def default_reorganization_layers(num_hidden_layers: int) -> list[int]:
    """Layers at one, two and three quarters of the depth: [3, 6, 9] of 12, as in the paper; [4, 8, 12] of 16."""
    return sorted({num_hidden_layers * quarter // 4 for quarter in (1, 2, 3)})


class Rule(NamedTuple):
    """What a field accepts, in words and as a question, and an example of a good value."""

    accepts: str
    is_met_by: Callable[[Any], bool]
    example: str

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError with the name of the field, what it accepts, its value and the way out."""
        if not self.is_met_by(value):
            raise ValueError(f"`{name}` must be {self.accepts}, got {shown(value)}: {self.example}.")


def _whole(low: int, high: int, example: str) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda x: is_whole_number(x) and low <= x <= high, example)


def _one_or_two(low: int, high: int, example: str) -> Rule:
    def is_met_by(size: Any) -> bool:
        entries = size if isinstance(size, (list, tuple)) else [size, size]
        return len(entries) == 2 and all(is_whole_number(x) and low <= x <= high for x in entries)

    return Rule(f"one whole number of pixels from {low} to {high}, or [height, width]", is_met_by, example)


def _probability(example: str) -> Rule:
    return Rule("in [0, 1)", lambda x: is_number(x) and 0 <= x < 1, example)


def _activation(example: str) -> Rule:
    return Rule("the name of an activation of Transformers", lambda x: isinstance(x, str) and x in ACT2FN, example)


NUM_LABELS = _whole(0, 2**20, "ImageNet has 1000 classes")
# Fields of a ViT: what its parameters are made from. Transformers checks their types at most.
VIT_RULES = {
    "hidden_size": _whole(1, 2**16, "ViT-B has 768"),
    "num_hidden_layers": _whole(1, 256, "ViT-B has 12"),
    "num_attention_heads": _whole(1, 2**12, "ViT-B has 12"),
    "intermediate_size": _whole(1, 2**18, "ViT-B has 3072"),
    "image_size": _one_or_two(1, 2**14, "ViT-B has 224"),
    "patch_size": _one_or_two(1, 2**14, "ViT-B has 16"),
    "num_channels": _whole(1, 2**12, "colour images have 3"),
    "encoder_stride": _whole(1, 2**14, "ViT-B has 16"),
    "pooler_output_size": _whole(1, 2**16, "it is `hidden_size` by default"),
    "layer_norm_eps": Rule("in (0, 1]", lambda x: is_number(x) and 0 < x <= 1, "ViT has 1e-12, DeiT 1e-6"),
    "initializer_range": Rule("in [0, 10]", lambda x: is_number(x) and 0 <= x <= 10, "ViT has 0.02"),
    "hidden_dropout_prob": _probability("0.0 is no dropout"),
    "attention_probs_dropout_prob": _probability("0.0 is no dropout"),
    "hidden_act": _activation("ViT has 'gelu'"),
    "pooler_act": _activation("ViT has 'tanh'"),
}


def takes_foreign_numbers(config_class: Class) -> Class:
    """Decorate a configuration whose fields take numbers of numpy and PyTorch, before `@strict` looks at types."""
    set_attribute: Callable[..., None] = config_class.__setattr__

    def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807
        set_attribute(self, name, python_value(value))

    config_class.__setattr__ = __setattr__  # type: ignore[assignment]
    return config_class


@takes_foreign_numbers
@strict
class EViTConfig(ViTConfig):
    r"""Configuration of an EViT: all fields of `transformers.ViTConfig`, and seven more.

    It holds what rebuilds the network, not schedules and other matters of training.

    Args:
        keep_rate: share of image tokens kept at each reorganization layer, in (0, 1]: one number for all of them, or a
            list with one for each. 1.0 is the plain ViT. For a model that is or will be trained for it. Default: 0.7,
            or None with `macs`.
        macs: instead of `keep_rate`, for a model that was not trained to lose tokens: share of the dense model's
            multiply-accumulate operations (patch embedding and layers), in (0, 1]. Every reorganization layer gives up
            the same number of tokens, and at least 16 are left.
        reorganization_layers: zero-based layers that reorganize their tokens between attention and MLP, strictly
            increasing. Default: one, two and three quarters of the depth, [3, 6, 9] for 12 layers, and with `macs` all
            layers. An empty list is the plain ViT.
        inattentive_tokens: what becomes of the tokens that are not kept. "fused": they become one token, weighted by
            the class token's attention (the paper's default). "dropped": nothing. "counted": each is counted by the
            kept token that it resembles most, which is attended to the more (the default with `macs`).
        drop_path_rate: stochastic depth rate of the last layer, in [0, 1); layer i of n gets `rate * i / (n - 1)`. It
            acts only in training. The paper trains with 0.1.
        use_distillation_token: whether a distillation token follows the class token, as in distilled DeiT. It is not
            a candidate: never dropped, fused or moved.
        scoring_tokens: whose attention scores the image tokens: "class", as in the paper, or "class_and_distillation",
            the mean over both tokens.

    Raises: an error that names the field, its value and the way out, for values out of range, of the wrong type or
        in contradiction. It is a `StrictDataclassError` of huggingface_hub when the configuration is built and a
        ValueError when a field is set later, or for keywords that contradict each other. TypeError for a misspelt
        field.

    Example:
        >>> from evit_hf import EViTConfig, EViTForImageClassification
        >>> config = EViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, keep_rate=0.7)
        >>> config.reorganization_layers
        [3, 6, 9]
        >>> model = EViTForImageClassification(config)
    """

    model_type = "evit"
    # Whose config.json becomes one of ours when it is read.
    source_model_types: ClassVar[tuple[str, ...]] = ("vit", "deit")
    # By which a stem reduces the image, rounding up, before the patches are cut.
    stem_stride: ClassVar[int] = 1
    # What transformers.Trainer leaves out of its predictions: metrics need only the logits.
    keys_to_ignore_at_inference = [
        "attentive_index",
        "patch_index",
        "token_sizes",
        "counted_by",
        "class_attention",
        "cls_logits",
        "distillation_logits",
        "aux_logits",
        "hidden_states",
        "attentions",
    ]

    # In quotes for `@strict`, whose own type errors name no way out: `_check_own_fields` checks types as well.
    # Those that are None here are filled in by `__post_init__`.
    keep_rate: "float | list[float]" = None  # type: ignore[assignment]
    macs: "float | None" = None
    reorganization_layers: "list[int]" = None  # type: ignore[assignment]
    inattentive_tokens: "str" = None  # type: ignore[assignment]
    drop_path_rate: "float" = 0.0
    use_distillation_token: "bool" = False
    scoring_tokens: "str" = "class"

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what depends on other fields and refuse misspelt ones."""
        # A ViT's config.json names its own model type; as an instance attribute it would shadow ours.
        kwargs.pop("model_type", None)
        if "fuse_inattentive_tokens" in kwargs:
            old = {"fuse_inattentive_tokens": kwargs.pop("fuse_inattentive_tokens")}
            self.inattentive_tokens = renamed_settings({**vars(self), **old})["inattentive_tokens"]
        refuse_misspelt_names(kwargs, OWN_FIELDS)
        self._check_what_transformers_reads(kwargs)
        if kwargs.get("quantization_config") is None:  # null in config.json, which Transformers 5.9 takes for a method
            kwargs.pop("quantization_config", None)
        for name, value in budget_defaults(vars(self), self.num_hidden_layers).items():
            setattr(self, name, value)
        try:
            super().__post_init__(**kwargs)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            names = ", ".join(f"`{name}`" for name in (*kwargs, "id2label", "label2id", "problem_type"))
            raise ValueError(
                f"Transformers cannot read one of {names} ({type(error).__name__}: {error}): correct it or leave it "
                "out."
            ) from error
        self._is_complete = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; once the configuration is built, our own fields are checked before anything changes."""
        if name == "num_labels":
            NUM_LABELS.check(name, value)
        if name == "fuse_inattentive_tokens":
            name, value = "inattentive_tokens", renamed_settings({name: value})["inattentive_tokens"]
        if name not in OWN_FIELDS:
            return super().__setattr__(name, value)
        if isinstance(value, tuple):
            value = list(value)  # JSON has no tuples: a saved and reloaded configuration must equal this one
        if not self.__dict__.get("_is_complete"):
            return super().__setattr__(name, value)
        changes = {name: value}
        if name in ("keep_rate", "macs") and value is not None:  # the other one gives way
            now = {field: getattr(self, field) for field in BUDGET_FIELDS}
            changes = budget_defaults(changed_budget(now, changes), self.num_hidden_layers)
        before = {field: self.__dict__.get(field) for field in changes}
        for field, entry in changes.items():
            super().__setattr__(field, entry)
        try:
            self._check_own_fields()
        except ValueError:
            for field, entry in before.items():
                super().__setattr__(field, entry)
            raise

    def validate_fields(self) -> None:
        """Raise ValueError unless all fields have values that a model can be built from."""
        for name, rule in VIT_RULES.items():
            rule.check(name, getattr(self, name))
        self._check_own_fields()
        self._check_geometry()

    def _check_what_transformers_reads(self, others: dict[str, Any]) -> None:
        """Check what Transformers turns into something else, with errors that name no field.

        Args:
            others: entries of config.json that are not fields.
        """
        for name, dtype in (("dtype", self.dtype), ("torch_dtype", others.get("torch_dtype"))):
            if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
                raise ValueError(f"`{name}` must be one of {', '.join(DTYPES)}, got {shown(dtype)}: leave it out.")
        labels = {} if self.id2label is None else self.id2label
        if not isinstance(labels, dict) or not all(str(number).isdecimal() for number in labels):
            raise ValueError(
                f"`id2label` must have class numbers as keys, got {shown(self.id2label)}: count from 0, "
                "{0: 'cat', 1: 'dog'}."
            )
        if (num_labels := others.get("num_labels")) is not None:
            NUM_LABELS.check("num_labels", num_labels)
        if others.get("per_layer_config"):
            raise ValueError(
                f"`per_layer_config` must be left out, got {shown(others['per_layer_config'])}: the layers of an EViT "
                "have the same sizes, and `keep_rate` can be a list with one for each reorganization layer."
            )
        quantization = others.get("quantization_config")
        if quantization is not None and not hasattr(quantization, "to_dict"):
            if not isinstance(quantization, dict) or not isinstance(quantization.get("quant_method"), str):
                raise ValueError(
                    f"`quantization_config` must be a dictionary with a `quant_method`, got {shown(quantization)}: "
                    "leave it out."
                )
        if "head_dim" in others:  # read by Transformers' attention
            _whole(1, 2**12, "leave it out for `hidden_size / num_attention_heads`").check(
                "head_dim", others["head_dim"]
            )

    def _check_geometry(self) -> None:
        """Raise ValueError for sizes that do not fit together, or ask for more memory than any ViT has."""
        if not hasattr(self, "head_dim") and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` must divide `hidden_size`, got {self.num_attention_heads} and "
                f"{self.hidden_size}: a head of a ViT has 64 numbers, which makes {max(self.hidden_size // 64, 1)} "
                "heads."
            )
        rows, columns = self.patch_grid()
        if not 1 <= rows * columns <= MAX_PATCHES:
            raise ValueError(
                f"`image_size` {self.image_size} with `patch_size` {self.patch_size} makes {rows}x{columns} patches, "
                f"which must be from 1 to {MAX_PATCHES} in all: take images that are larger than a patch, ViT-B has "
                "14x14."
            )
        weights = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        height, width = height_and_width(self.patch_size)
        inputs = rows * columns + height * width * self.num_channels + (self.num_labels or 0)
        num_parameters = self.num_hidden_layers * weights + self.hidden_size * (
            inputs + (self.pooler_output_size or 0)
        )
        if num_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"`hidden_size` {self.hidden_size}, `intermediate_size` {self.intermediate_size}, `num_hidden_layers` "
                f"{self.num_hidden_layers}, `num_channels` {self.num_channels}, `image_size` {self.image_size} and "
                f"`patch_size` {self.patch_size} make {num_parameters / 1e9:.0f} billion parameters: the largest "
                "ViT has 22 billion."
            )

    def _check_own_fields(self) -> None:
        """Raise ValueError unless the fields that a ViT does not have are right, by themselves and together."""
        self._check_reorganization_layers()
        if self.macs is None:
            check_keep_rate(self.keep_rate, len(self.reorganization_layers))
        else:
            check_macs(self.macs)
        if self.inattentive_tokens not in INATTENTIVE_TOKENS:
            raise ValueError(
                f"`inattentive_tokens` must be 'fused', 'dropped' or 'counted', got {shown(self.inattentive_tokens)}: "
                "the paper's is 'fused'."
            )
        rate = self.drop_path_rate
        if not is_number(rate) or not 0 <= rate < 1:
            raise ValueError(
                f"`drop_path_rate` must be in [0, 1), got {shown(rate)}: 0 switches stochastic depth off, the paper "
                "has 0.1."
            )
        if not isinstance(self.use_distillation_token, bool):
            raise ValueError(
                f"`use_distillation_token` must be True or False, got {shown(self.use_distillation_token)}: distilled "
                "DeiT has True."
            )
        if self.scoring_tokens not in ("class", "class_and_distillation"):
            raise ValueError(
                "`scoring_tokens` must be 'class' or 'class_and_distillation', got "
                f"{shown(self.scoring_tokens)}: the paper's is 'class'."
            )
        if self.scoring_tokens == "class_and_distillation" and not self.use_distillation_token:
            raise ValueError(
                "`scoring_tokens` is 'class_and_distillation' but there is no distillation token: pass 'class', or "
                "`use_distillation_token=True`."
            )

    def _check_reorganization_layers(self) -> None:
        """Raise ValueError unless `reorganization_layers` names existing layers in strictly increasing order."""
        layers = self.reorganization_layers
        if not isinstance(layers, list) or not all(map(is_whole_number, layers)):
            raise ValueError(
                f"`reorganization_layers` must be a list of zero-based layer numbers, got {shown(layers)}: "
                f"for example {default_reorganization_layers(self.num_hidden_layers)}."
            )
        if any(not 0 <= layer < self.num_hidden_layers for layer in layers):
            raise ValueError(
                f"`reorganization_layers` must be in [0, {self.num_hidden_layers - 1}] for "
                f"{self.num_hidden_layers} layers, got {shown(layers)}: layers are counted from zero."
            )
        if any(after <= before for before, after in zip(layers, layers[1:], strict=False)):
            raise ValueError(
                f"`reorganization_layers` must be strictly increasing, got {shown(layers)}: "
                f"pass {shown(sorted(set(layers)))}, and per-layer keep rates in the same order."
            )

    @classmethod
    def get_config_dict(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json of an EViT, or of a ViT or DeiT, which becomes one.

        Raises: ValueError for other model types, whose weights would not fit.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls._as_own(config_dict, str(pretrained_model_name_or_path)), kwargs

    @classmethod
    def _as_own(cls, config_dict: dict[str, Any], source: str) -> dict[str, Any]:
        """Entries of a config.json as those of one of ours; `source` is what it is called in the error."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in (cls.model_type, *cls.source_model_types):
            raise ValueError(
                f"`{source}` holds a model of type '{model_type}', but {cls.__name__} loads "
                f"{', '.join(repr(name) for name in (cls.model_type, *cls.source_model_types))}: its weights have "
                "different names or tokens. Correct `model_type` if it is wrong."
            )
        own: dict[str, Any] = {"model_type": cls.model_type}
        if model_type == "deit":  # Transformers' DeiT always has the token, also with a single classifier
            own["use_distillation_token"] = True
        return {**config_dict, **own}

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **changes: Any) -> "EViTConfig":
        """Configuration of an EViT, ViT or DeiT as one of ours, with changes; `config` itself stays as it is.

        Args:
            config: for example what `AutoConfig.from_pretrained` returned for a ViT.
            **changes: fields, for example `keep_rate=0.5`.

        Raises: ValueError for other model types.
        """
        if isinstance(config, cls) and config.model_type == cls.model_type and not changes:
            return config
        entries = copy.deepcopy({**config.to_dict(), "model_type": config.model_type})
        entries.pop("auto_map", None)  # of a family's model that was reorganized
        own = cls.from_dict(cls._as_own(entries, type(config).__name__), **changes)
        own.name_or_path = config.name_or_path
        implementation = config._attn_implementation
        own._attn_implementation = implementation and implementation.removesuffix("_with_class_row")
        return own

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "EViTConfig":
        """Build the configuration from a dictionary, overridden by keywords, and check the result as a whole.

        Transformers sets the keywords one after the other on the finished object; a new `keep_rate` list would then be
        compared with the old `reorganization_layers`.
        """
        kwargs = renamed_settings(kwargs)
        refuse_misspelt_names(kwargs, OWN_FIELDS)
        names = (*OWN_FIELDS, *VIT_RULES)
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        budget = {name: given.pop(name) for name in BUDGET_FIELDS if name in given}
        return super().from_dict({**changed_budget(renamed_settings(config_dict), budget), **given}, **kwargs)

    @classmethod
    def field_names(cls) -> set[str]:
        """Names of all fields that a keyword of `from_pretrained` can set."""
        return {field.name for field in fields(cls)} - {"dtype"} | {"num_labels", "fuse_inattentive_tokens"}

    def to_dict(self) -> dict[str, Any]:
        """Return all that config.json needs, without what this object keeps for itself."""
        output = super().to_dict()
        output.pop("_is_complete", None)
        return output

    def geometry(self) -> str:
        """Fields that decide which parameters there are, in words for an error message."""
        names = [name for name in GEOMETRY if hasattr(self, name)]
        return ", ".join(f"`{name}` {shown(getattr(self, name))}" for name in names)

    def patch_grid(self, image_size: int | Sequence[int] | None = None) -> tuple[int, int]:
        """Rows and columns of patches of an image.

        With the stem of LV-ViT an image that is one pixel short of a whole number of patches still has that number.

        Args:
            image_size: pixels, (height, width) or one number for both, instead of the field `image_size`.
        """
        return patch_grid(self, self.image_size if image_size is None else image_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the image tokens: the class token, and the distillation token if there is one."""
        return 2 if self.use_distillation_token else 1

    @property
    def num_scoring_tokens(self) -> int:
        """Prefix tokens whose attention scores the image tokens."""
        return 2 if self.scoring_tokens == "class_and_distillation" else 1

    @property
    def layer_keep_rates(self) -> dict[int, float]:
        """Keep rate of each reorganization layer, by zero-based layer number; none with `macs`."""
        return {} if self.macs is not None else keep_rate_by_layer(self.keep_rate, self.reorganization_layers)

    @property
    def costs(self) -> TowerCosts:
        """Multiply-accumulate operations by what they are proportional to."""
        patch_height, patch_width = height_and_width(self.patch_size)
        return TowerCosts(
            patch=self.hidden_size * self.num_channels * patch_height * patch_width,
            attention=4 * self.hidden_size**2,
            pair=2 * self.hidden_size,
            feed_forward=2 * self.hidden_size * self.intermediate_size,
            key=getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads,
            num_layers=self.num_hidden_layers,
            num_prefix_tokens=self.num_prefix_tokens,
        )


OWN_FIELDS = (
    "keep_rate",
    "macs",
    "reorganization_layers",
    "inattentive_tokens",
    "drop_path_rate",
    "use_distillation_token",
    "scoring_tokens",
)

GEOMETRY = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "num_channels",
    "patch_size",
    "image_size",
    "qkv_bias",
    "pooler_output_size",
    "hidden_act",
    "use_distillation_token",
    "stem_hidden_size",
)

EViTConfig.register_for_auto_class()

__all__ = [
    "BUDGET_FIELDS",
    "DEFAULT_KEEP_RATE",
    "DEFAULT_MACS",
    "EViTConfig",
    "budget_defaults",
    "changed_budget",
    "check_keep_rate",
    "check_macs",
    "default_reorganization_layers",
    "height_and_width",
    "keep_rate_by_layer",
    "python_value",
    "refuse_misspelt_names",
    "renamed_settings",
]
