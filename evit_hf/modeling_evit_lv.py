"""EViT on LV-ViT: a convolutional stem, scaled residual branches, and a classifier on every image token."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils.generic import can_return_tuple

from .configuration_evit import EViTConfig, height_and_width  # noqa: F401 (remote code: Transformers 5.9 copies only direct imports)
from .configuration_evit_lv import EViTLVConfig
from .cpu_inference import linear  # noqa: F401 (as above)
from .gpu_inference import embed_patches  # noqa: F401 (as above)
from .modeling_evit import (
    EViTEmbeddings,
    EViTForwardKeywords,
    EViTImageClassifierOutput,
    EViTLayer,
    EViTModel,
    EViTPreTrainedModel,
)
from .pictures import as_rgb  # noqa: F401 (as above)
from .short_cuts import plain_road_wanted  # noqa: F401 (as above)
from .token_labelling import takes_part, token_labelling_loss
from .token_reorganization import reorganize_tokens  # noqa: F401 (as above)
from .tokens_left import TokensLeft  # noqa: F401 (as above)


@dataclass
class EViTLVImageClassifierOutput(EViTImageClassifierOutput):
    """Output of `EViTLVForImageClassification`.

    Args:
        loss: scalar, if `labels` were given: token labelling in training, cross-entropy of `logits` in evaluation.
            Regression and multi-label problems have the loss of `logits` in training too.
        logits: (batch_size, num_labels), `cls_logits` plus the weighted highest auxiliary logit of each class over the
            patches that are left; where tokens are labelled in training only `cls_logits`.
        hidden_states: see `EViTModelOutput`.
        attentions: see `EViTModelOutput`.
        attentive_index: see `EViTModelOutput`.
        patch_index: see `EViTModelOutput`.
        token_sizes: see `EViTModelOutput`.
        counted_by: see `EViTModelOutput`.
        class_attention: see `EViTModelOutput`.
        cls_logits: (batch_size, num_labels), from the class token.
        aux_logits: (batch_size, num_image_tokens_left, num_labels), from every image token that is left, in the order
            of `patch_index`.
    """

    cls_logits: torch.Tensor | None = None
    aux_logits: torch.Tensor | None = None


class EViTLVPatchEmbeddings(nn.Module):
    """Three convolutions at half the resolution, then one for each patch.

    Source: `PatchEmbed4_2` of https://github.com/zihangJiang/TokenLabeling/blob/main/models/layers.py.
    """

    def __init__(self, config: EViTLVConfig) -> None:
        super().__init__()
        self.image_size = height_and_width(config.image_size)
        rows, columns = config.patch_grid()
        self.num_patches = rows * columns
        stem = config.stem_hidden_size
        self.conv1 = nn.Conv2d(config.num_channels, stem, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.conv2 = nn.Conv2d(stem, stem, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem)
        self.conv3 = nn.Conv2d(stem, stem, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(stem)
        patch = config.patch_size // 2
        self.projection = nn.Conv2d(stem, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the patches, (batch_size, num_patches, hidden_size), of (batch_size, num_channels, height, width)."""
        features = self.bn1(self.conv1(pixel_values)).relu()
        features = self.bn2(self.conv2(features)).relu()
        features = self.bn3(self.conv3(features)).relu()
        return self.projection(features).flatten(2).transpose(1, 2)


class EViTLVEmbeddings(EViTEmbeddings):
    """Differences from EViTEmbeddings: the convolutional stem, and the patches that it makes."""

    def __init__(self, config: EViTLVConfig) -> None:
        super().__init__(config)
        self.patch_embeddings = EViTLVPatchEmbeddings(config)
        num_positions = config.num_prefix_tokens + self.patch_embeddings.num_patches
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))


class EViTLVLayer(EViTLayer):
    """Differences from EViTLayer: the residual branches are divided by `residual_scale`."""

    def residual_branch(self, branch: torch.Tensor, takes_short_cuts: bool = False) -> torch.Tensor:
        """Return a branch, (batch_size, sequence_length, hidden_size), scaled, in evaluation too."""
        return super().residual_branch(branch, takes_short_cuts) / self.config.residual_scale


class EViTLVPreTrainedModel(EViTPreTrainedModel):
    """Differences from EViTPreTrainedModel: the classes that a saved folder names."""

    config: EViTLVConfig
    auto_map = {
        "AutoConfig": "configuration_evit_lv.EViTLVConfig",
        "AutoModel": "modeling_evit_lv.EViTLVModel",
        "AutoModelForImageClassification": "modeling_evit_lv.EViTLVForImageClassification",
    }
    _no_split_modules = ["EViTLVEmbeddings", "EViTLVLayer"]


class EViTLVModel(EViTLVPreTrainedModel, EViTModel):
    """The bare EViT on LV-ViT; see `EViTModel`."""

    embeddings_class = EViTLVEmbeddings
    layer_class = EViTLVLayer


class EViTLVForImageClassification(EViTLVPreTrainedModel):
    """EViT on LV-ViT with a classifier on the class token and an auxiliary one on every image token."""

    # The loss is a mean over the images of the call: `Trainer` has to divide by its accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: EViTLVConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = EViTLVModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.aux_classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_targets: torch.Tensor | None = None,
        **kwargs: Unpack[EViTForwardKeywords],
    ) -> EViTLVImageClassifierOutput:
        """Classify images; arguments as in `EViTForImageClassification.forward`, and labels of patches.

        Args:
            pixel_values: (batch_size, num_channels, height, width).
            labels: (batch_size,) class numbers or (batch_size, num_labels) probabilities; gives `loss`.
            token_targets: (batch_size, num_patches, num_labels), probabilities by patch of the original grid, for the
                loss in training; without them every patch has the label of its image. (`Trainer` would require
                whatever is called a label.)
            **kwargs: see `EViTModel.forward`.

        Returns: `EViTLVImageClassifierOutput`.
        """
        outputs = self._backbone_outputs(pixel_values, prefix_tokens_only=False, **kwargs)
        mask, patch_mask = kwargs.get("attention_mask"), None
        if mask is not None:
            patch_mask = mask[:, self.config.num_prefix_tokens :]
        cls_logits = self.classifier(outputs.last_hidden_state[:, 0])
        aux_logits = self.aux_classifier(outputs.last_hidden_state[:, self.config.num_prefix_tokens :])
        learns_token_labels = (
            self.training
            and self.config.num_labels > 1
            and self.config.problem_type in (None, "single_label_classification")
        )
        logits = cls_logits
        if not learns_token_labels:
            is_silent = ~takes_part(outputs.patch_index, patch_mask).unsqueeze(-1)
            best = aux_logits.masked_fill(is_silent, float("-inf")).amax(dim=1)
            # Where only fused or hidden tokens are left, the class token answers.
            best = best.masked_fill(is_silent.all(dim=1), 0.0)
            logits = cls_logits + self.config.aux_logits_weight * best

        loss = None
        if labels is not None and learns_token_labels:
            loss = token_labelling_loss(
                cls_logits,
                aux_logits,
                outputs.patch_index,
                labels,
                token_targets,
                counted_by=outputs.counted_by,
                patch_mask=patch_mask,
            )
        elif labels is not None and self.config.problem_type is None and labels.ndim == 2 and self.num_labels > 1:
            # As in training; `loss_function` would take the labels for several of each image, and write that down.
            loss = nn.functional.cross_entropy(logits, labels.to(logits.dtype))
        elif labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return EViTLVImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attentive_index=outputs.attentive_index,
            patch_index=outputs.patch_index,
            token_sizes=outputs.token_sizes,
            counted_by=outputs.counted_by,
            class_attention=outputs.class_attention,
            cls_logits=cls_logits,
            aux_logits=aux_logits,
        )


EViTLVModel.register_for_auto_class("AutoModel")
EViTLVForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["EViTLVForImageClassification", "EViTLVImageClassifierOutput", "EViTLVModel", "EViTLVPreTrainedModel"]
