"""Configuration of EViT on LV-ViT."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_evit import EViTConfig


# A class of its own, not more fields of EViTConfig: an LV-ViT has other parameters than a ViT (stem, auxiliary head),
# so its checkpoints fit no other class, and EViTConfig keeps its promise of adding nothing to a ViT.
@strict
class EViTLVConfig(EViTConfig):
    r"""Configuration of an EViT whose backbone is an LV-ViT: all fields of `EViTConfig`, and three of its own.

    Args:
        stem_hidden_size: channels of the convolutional stem, 64 in LV-ViT-T, S and M.
        residual_scale: every residual branch is divided by it (`skip_lam` in the official code): 1 in LV-ViT-T, 2 in S
            and M.
        aux_logits_weight: weight of the highest auxiliary logit over the image tokens in the answer, 0.5 in LV-ViT.

    Source: https://github.com/zihangJiang/TokenLabeling/blob/main/models/lvvit.py.

    Example:
        >>> from evit_hf import EViTLVConfig, EViTLVForImageClassification
        >>> model = EViTLVForImageClassification(EViTLVConfig.preset("evit-lvvit-s", keep_rate=0.7))
    """

    model_type = "evit_lv"
    source_model_types: ClassVar[tuple[str, ...]] = ()

    hidden_size: int = 384
    num_hidden_layers: int = 16
    num_attention_heads: int = 6
    intermediate_size: int = 1152
    layer_norm_eps: float = 1e-5
    qkv_bias: bool = False
    stem_hidden_size: Any = 64  # int
    residual_scale: Any = 2.0  # float
    aux_logits_weight: Any = 0.5  # float

    def validate_lv_fields(self) -> None:
        """Raise ValueError for values that no LV-ViT can have."""
        for name in ("stem_hidden_size", "residual_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"`{name}` must be a positive number, got {value!r}: LV-ViT-S has 64 and 2.0.")
        patch_size = self.patch_size if isinstance(self.patch_size, int) else None
        if patch_size is None or patch_size % 2:
            raise ValueError(
                f"`patch_size` must be one even number, got {self.patch_size!r}: the stem halves the image before the "
                "patches are cut."
            )


EViTLVConfig.register_for_auto_class()

__all__ = ["EViTLVConfig"]
