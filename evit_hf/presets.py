"""The models of the paper by name, as configurations; nothing is downloaded."""

import difflib
from typing import Any

from .configuration_evit import EViTConfig
from .configuration_evit_lv import EViTLVConfig


# hidden size, attention heads
DEIT_SIZES = {"ti": (192, 3), "s": (384, 6), "b": (768, 12)}
# hidden size, layers, attention heads, residual scale, channels of the stem
LVVIT_SIZES = {
    "t": (240, 12, 4, 1.0, 64),
    "s": (384, 16, 6, 2.0, 64),
    "m": (512, 20, 8, 2.0, 64),
    "l": (768, 24, 12, 3.0, 128),
}


def _presets() -> dict[str, dict[str, Any]]:
    """All presets: fields of the configuration by name."""
    presets: dict[str, dict[str, Any]] = {}
    for size, (hidden_size, num_heads) in DEIT_SIZES.items():
        deit = {
            "hidden_size": hidden_size,
            "num_attention_heads": num_heads,
            "intermediate_size": 4 * hidden_size,
            "layer_norm_eps": 1e-6,
            "num_labels": 1000,
        }
        for image_size, suffix in ((224, ""), (384, "-384")):
            presets[f"evit-deit-{size}{suffix}"] = {**deit, "image_size": image_size}
            presets[f"evit-deit-{size}-distilled{suffix}"] = {
                **deit,
                "image_size": image_size,
                "use_distillation_token": True,
            }
    # Higher resolution at the cost of a dense DeiT-S at 224 pixels, the models registered in the official evit.py.
    for image_size, keep_rate in ((272, 0.7), (288, 0.6), (304, 0.5)):
        presets[f"evit-deit-s-{image_size}"] = {
            **presets["evit-deit-s"],
            "image_size": image_size,
            "keep_rate": keep_rate,
        }
    for size, (hidden_size, num_layers, num_heads, residual_scale, stem_hidden_size) in LVVIT_SIZES.items():
        presets[f"evit-lvvit-{size}"] = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "intermediate_size": 3 * hidden_size,
            "residual_scale": residual_scale,
            "stem_hidden_size": stem_hidden_size,
            "num_labels": 1000,
        }
    return presets


PRESETS = _presets()


def preset_config(name: str, **overrides: Any) -> EViTConfig:
    """Build the configuration of one of the paper's models.

    Args:
        name: "evit-deit-ti", "-s" or "-b", optionally followed by "-distilled" and "-384"; "evit-deit-s-272", "-288"
            and "-304", as costly as DeiT-S at 224 pixels; "evit-lvvit-t", "-s", "-m" and "-l".
        **overrides: fields of the configuration, for example `keep_rate=0.5` or `num_labels=10`.

    Returns: an `EViTConfig`, or an `EViTLVConfig` for LV-ViT.

    Raises: ValueError for an unknown name.

    Example:
        >>> preset_config("evit-deit-s", keep_rate=0.7).hidden_size
        384
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(str(name), PRESETS, n=3)
        raise ValueError(f"There is no preset `{name}`: take one of {', '.join(close or PRESETS)}.")
    config_class = EViTLVConfig if name.startswith("evit-lvvit") else EViTConfig
    return config_class(**{**PRESETS[name], **overrides})


__all__ = ["PRESETS", "preset_config"]
