"""EViT configuration: a ViT configuration that says where and how much to reorganize."""

import difflib
import importlib
import os
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig


# Of the whole package; it stands here because this file travels with every saved model.
__version__ = "0.1.0"

# Words of the official implementation (youweiliang/evit) for the same things.
OFFICIAL_NAMES = {
    "base_keep_rate": "keep_rate",
    "drop_loc": "reorganization_layers",
    "fuse_token": "fuse_inattentive_tokens",
}


def check_keep_rate(keep_rate: float | Sequence[float], num_reorganization_layers: int) -> None:
    """Refuse a keep rate that is no share of tokens, or a list that does not fit the reorganization layers.

    Args:
        keep_rate: one share of tokens for all reorganization layers, or one for each of them.
        num_reorganization_layers: entries that a list must have.

    Raises: ValueError.
    """
    per_layer = isinstance(keep_rate, (list, tuple))
    for rate in keep_rate if per_layer else [keep_rate]:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(
                f"`keep_rate` must be in (0, 1], one number or one for each reorganization layer, got {keep_rate!r}: "
                "pass the share of image tokens to keep, for example 0.7."
            )
    if per_layer and len(keep_rate) != num_reorganization_layers:
        raise ValueError(
            f"`keep_rate` has {len(keep_rate)} entries, {keep_rate!r}, but `reorganization_layers` names "
            f"{num_reorganization_layers} layers: pass one number for all layers, or one for each."
        )


def refuse_misspelt_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a keyword that looks like a misspelling of one of ours; foreign keywords pass.

    Transformers stores unknown configuration keywords, and drops unknown forward keywords, without a word.

    Args:
        names: keywords that nobody claimed.
        known: our own keywords.

    Raises: TypeError with the keyword that was probably meant.
    """
    for name in names:
        meant = OFFICIAL_NAMES.get(name) or next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), None)
        if meant is not None:
            raise TypeError(f"`{name}` is not a keyword of EViT: did you mean `{meant}`?")


def default_reorganization_layers(num_hidden_layers: int) -> list[int]:
    """Layers at one, two and three quarters of the depth: [3, 6, 9] of 12, as in the paper; [4, 8, 12] of 16."""
    return sorted({num_hidden_layers * quarter // 4 for quarter in (1, 2, 3)})


@strict
class EViTConfig(ViTConfig):
    r"""Configuration of an EViT: all fields of `transformers.ViTConfig`, and six of its own.

    What rebuilds the network stands here; schedules and other matters of training do not.

    Args:
        keep_rate: share of image tokens kept at each reorganization layer, in (0, 1]: one number for all of them, or a
            list with one for each. 1.0 is the plain ViT.
        reorganization_layers: zero-based layers that reorganize their tokens between attention and MLP, strictly
            increasing. Default: one, two and three quarters of the depth, [3, 6, 9] for 12 layers. An empty list is
            the plain ViT.
        fuse_inattentive_tokens: whether one token, weighted by class token attention, stands for the inattentive ones
            (the paper's default) or they are dropped.
        drop_path_rate: stochastic depth rate of the last layer, in [0, 1); layer i of n gets `rate * i / (n - 1)`. It
            acts in training alone. The paper trains with 0.1.
        use_distillation_token: whether a distillation token stands behind the class token, as in distilled DeiT. It
            is no candidate: never dropped, fused or moved.
        scoring_tokens: whose attention scores the image tokens: "class", as in the paper, or "class_and_distillation",
            the mean over both tokens.

    Raises: an error that names the field, its value and the way out, for values out of range, of the wrong type or
        in contradiction. It is a `StrictDataclassError` of huggingface_hub when the configuration is built and a
        ValueError when a field is set later. TypeError for a misspelt field.

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
    # What transformers.Trainer leaves out of its predictions: metrics want the logits alone.
    keys_to_ignore_at_inference = [
        "attentive_index",
        "patch_index",
        "cls_logits",
        "distillation_logits",
        "aux_logits",
        "hidden_states",
        "attentions",
    ]

    # Typed `Any` for `@strict`, whose own type errors name no way out: the validators below check types as well.
    keep_rate: Any = 0.7  # float | list[float]
    reorganization_layers: Any = None  # list[int] | None
    fuse_inattentive_tokens: Any = True  # bool
    drop_path_rate: Any = 0.0  # float
    use_distillation_token: Any = False  # bool
    scoring_tokens: Any = "class"  # "class" | "class_and_distillation"

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what depends on other fields and refuse misspelt ones."""
        # A ViT's config.json names its own model type; as an instance attribute it would shadow ours.
        kwargs.pop("model_type", None)
        refuse_misspelt_names(kwargs, OWN_FIELDS)
        if self.reorganization_layers is None:
            self.reorganization_layers = default_reorganization_layers(self.num_hidden_layers)
        super().__post_init__(**kwargs)
        self._is_complete = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; once the configuration is built, our own fields are checked before anything changes."""
        if name in OWN_FIELDS and isinstance(value, tuple):
            value = list(value)  # JSON has no tuples: a saved and reloaded configuration must equal this one
        before = self.__dict__.get(name)
        super().__setattr__(name, value)
        if name in OWN_FIELDS and self.__dict__.get("_is_complete"):
            try:
                self._check_own_fields()
            except ValueError:
                super().__setattr__(name, before)
                raise

    def _check_own_fields(self) -> None:
        self.validate_keep_rate()
        self.validate_fuse_inattentive_tokens()
        self.validate_drop_path_rate()
        self.validate_scoring_tokens()

    def validate_reorganization_layers(self) -> None:
        """Raise ValueError unless `reorganization_layers` names existing layers in strictly increasing order."""
        layers = self.reorganization_layers
        if not isinstance(layers, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
            raise ValueError(
                f"`reorganization_layers` must be a list of zero-based layer numbers, got {layers!r}: "
                f"for example {default_reorganization_layers(self.num_hidden_layers)}."
            )
        if any(not 0 <= layer < self.num_hidden_layers for layer in layers):
            raise ValueError(
                f"`reorganization_layers` must be in [0, {self.num_hidden_layers - 1}] for "
                f"{self.num_hidden_layers} layers, got {layers}: layers are counted from zero."
            )
        if any(after <= before for before, after in zip(layers, layers[1:], strict=False)):
            raise ValueError(
                f"`reorganization_layers` must be strictly increasing, got {layers}: "
                f"pass {sorted(set(layers))}, and per-layer keep rates in the same order."
            )

    def validate_keep_rate(self) -> None:
        """Raise ValueError unless `keep_rate` is one share of tokens, or one for each reorganization layer."""
        self.validate_reorganization_layers()  # validators run in alphabetical order, and this one counts the layers
        check_keep_rate(self.keep_rate, len(self.reorganization_layers))

    def validate_fuse_inattentive_tokens(self) -> None:
        """Raise ValueError unless `fuse_inattentive_tokens` is True or False."""
        if not isinstance(self.fuse_inattentive_tokens, bool):
            raise ValueError(
                f"`fuse_inattentive_tokens` must be True or False, got {self.fuse_inattentive_tokens!r}: "
                "pass True to fuse the inattentive tokens into one, False to drop them."
            )

    def validate_drop_path_rate(self) -> None:
        """Raise ValueError unless `drop_path_rate` is a probability below 1."""
        rate = self.drop_path_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(
                f"`drop_path_rate` must be in [0, 1), got {rate!r}: 0 switches stochastic depth off, the paper has "
                "0.1."
            )

    def validate_scoring_tokens(self) -> None:
        """Raise ValueError unless the tokens that shall score are there."""
        if not isinstance(self.use_distillation_token, bool):
            raise ValueError(f"`use_distillation_token` must be True or False, got {self.use_distillation_token!r}.")
        if self.scoring_tokens not in ("class", "class_and_distillation"):
            raise ValueError(
                "`scoring_tokens` must be 'class' or 'class_and_distillation', got "
                f"{self.scoring_tokens!r}: the paper's is 'class'."
            )
        if self.scoring_tokens == "class_and_distillation" and not self.use_distillation_token:
            raise ValueError(
                "`scoring_tokens` is 'class_and_distillation' but there is no distillation token: pass 'class', or "
                "`use_distillation_token=True`."
            )

    @classmethod
    def get_config_dict(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json of an EViT, or of a ViT or DeiT, which becomes one.

        Raises: ValueError for other model types, whose weights would not fit.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in (cls.model_type, *cls.source_model_types):
            raise ValueError(
                f"`{pretrained_model_name_or_path}` holds a model of type '{model_type}', but {cls.__name__} loads "
                f"{', '.join(repr(name) for name in (cls.model_type, *cls.source_model_types))}: its weights have "
                "other names or tokens."
            )
        own = {"model_type": cls.model_type}
        if model_type == "deit":  # Transformers' DeiT always has the token, also with a single classifier
            own["use_distillation_token"] = True
        return {**config_dict, **own}, kwargs

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "EViTConfig":
        """Build the configuration of one of the paper's models, see `presets.preset_config`.

        Example:
            >>> EViTConfig.preset("evit-deit-s", keep_rate=0.7).hidden_size
            384
        """
        # Not a relative import: the presets are no part of a model, and stay behind when its files travel.
        return importlib.import_module("evit_hf.presets").preset_config(name, **overrides)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "EViTConfig":
        """Build the configuration from a dictionary, overridden by keywords, and check the result as a whole.

        Transformers sets the keywords one after another on the finished object; a new `keep_rate` list would then be
        compared with the old `reorganization_layers`.
        """
        refuse_misspelt_names((name for name in kwargs if name not in OWN_FIELDS), OWN_FIELDS)
        own = {name: kwargs.pop(name) for name in OWN_FIELDS if name in kwargs}
        if "num_hidden_layers" in kwargs:  # decides which layers exist
            own["num_hidden_layers"] = kwargs.pop("num_hidden_layers")
        return super().from_dict({**config_dict, **own}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return all that config.json needs, without what this object keeps for itself."""
        output = super().to_dict()
        output.pop("_is_complete", None)
        return output

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the image tokens: the class token, and the distillation token if there is one."""
        return 2 if self.use_distillation_token else 1

    @property
    def num_scoring_tokens(self) -> int:
        """Prefix tokens whose attention scores the image tokens."""
        return 2 if self.scoring_tokens == "class_and_distillation" else 1

    @property
    def layer_keep_rates(self) -> dict[int, float]:
        """Keep rate of each reorganization layer, by zero-based layer number."""
        return keep_rate_by_layer(self.keep_rate, self.reorganization_layers)


def keep_rate_by_layer(keep_rate: float | Sequence[float], reorganization_layers: Sequence[int]) -> dict[int, float]:
    """Keep rate of each reorganization layer, by zero-based layer number, for one rate or one for each layer."""
    rates = keep_rate if isinstance(keep_rate, (list, tuple)) else [keep_rate] * len(reorganization_layers)
    return dict(zip(reorganization_layers, rates, strict=True))


OWN_FIELDS = (
    "keep_rate",
    "reorganization_layers",
    "fuse_inattentive_tokens",
    "drop_path_rate",
    "use_distillation_token",
    "scoring_tokens",
)

EViTConfig.register_for_auto_class()

__all__ = ["EViTConfig"]
