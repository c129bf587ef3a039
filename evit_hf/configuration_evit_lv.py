"""EViT on LV-ViT: its configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_evit import EViTConfig, height_and_width, is_number, is_whole_number, shown, takes_foreign_numbers
from .token_reorganization import TowerCosts


# A separate class, not more fields of EViTConfig: an LV-ViT has other parameters than a ViT (stem, auxiliary head),
# so its checkpoints fit no other class, and EViTConfig keeps its promise of adding nothing to a ViT.
@takes_foreign_numbers
@strict
class EViTLVConfig(EViTConfig):
    r"""Configuration of an EViT whose backbone is an LV-ViT: all fields of `EViTConfig`, and three more.

    Args:
        stem_hidden_size: channels of the convolutional stem, 64 in LV-ViT-T, S and M.
        residual_scale: every residual branch is divided by it (`skip_lam` in the official code): 1 in LV-ViT-T, 2 in S
            and M.
        aux_logits_weight: weight of the highest auxiliary logit over the image tokens in the answer, 0.5 in LV-ViT.

    Source: https://github.com/zihangJiang/TokenLabeling/blob/main/models/lvvit.py.

    Example:
        >>> from evit_hf import EViTLVForImageClassification, preset_config
        >>> model = EViTLVForImageClassification(preset_config("evit-lvvit-s", keep_rate=0.7))
    """

    model_type = "evit_lv"
    source_model_types: ClassVar[tuple[str, ...]] = ()
    stem_stride: ClassVar[int] = 2

    hidden_size: int = 384
    num_hidden_layers: int = 16
    num_attention_heads: int = 6
    intermediate_size: int = 1152
    layer_norm_eps: float = 1e-5
    qkv_bias: bool = False
    # In quotes for `@strict`, as in EViTConfig.
    stem_hidden_size: "int" = 64
    residual_scale: "float" = 2.0
    aux_logits_weight: "float" = 0.5

    def _check_geometry(self) -> None:
        """Raise ValueError for values that no LV-ViT can have."""
        if not is_whole_number(self.stem_hidden_size) or not 0 < self.stem_hidden_size <= 2**12:
            raise ValueError(
                "`stem_hidden_size` must be a positive number of channels, a whole one up to 4096, got "
                f"{shown(self.stem_hidden_size)}: LV-ViT-S has 64."
            )
        if not is_number(self.residual_scale) or not 1e-3 <= self.residual_scale <= 1e3:
            raise ValueError(
                f"`residual_scale` must be a positive number, got {shown(self.residual_scale)}: LV-ViT-S has 2.0, and "
                "below 0.001 or above 1000 nothing is learned."
            )
        if not is_number(self.aux_logits_weight) or not abs(self.aux_logits_weight) <= 1e3:
            raise ValueError(
                f"`aux_logits_weight` must be a number from -1000 to 1000, got {shown(self.aux_logits_weight)}: "
                "LV-ViT has 0.5."
            )
        if not isinstance(self.patch_size, int) or self.patch_size % 2:
            raise ValueError(
                f"`patch_size` must be one even number, got {shown(self.patch_size)}: the stem halves the image "
                "before the patches are cut."
            )
        super()._check_geometry()

    @property
    def costs(self) -> TowerCosts:
        """Multiply-accumulate operations by what they are proportional to; the stem's are those of whole patches."""
        stem, patch = self.stem_hidden_size, height_and_width(self.patch_size)[0] // 2
        convolutions = patch**2 * stem * (7 * 7 * self.num_channels + 2 * 3 * 3 * stem)
        return super().costs._replace(patch=convolutions + self.hidden_size * stem * patch**2)


EViTLVConfig.register_for_auto_class()

__all__ = ["EViTLVConfig"]
