"""EViT models: Vision Transformers that reorganize their tokens between attention and MLP.

The classes stand in the order in which data flows and take their parameters, and the names of their parameters, from
`transformers.models.vit`: an EViT has no weights that a ViT has not, a distilled one none that a DeiT has not.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTEmbeddings,
    ViTForImageClassification,
    ViTLayer,
    ViTMLP,
    ViTModel,
    ViTPooler,
    ViTPreTrainedModel,
    eager_attention_forward,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_evit import EViTConfig, check_keep_rate, keep_rate_by_layer, refuse_misspelt_names
from .linear import linear
from .pictures import as_rgb
from .token_labelling import mix_tokens
from .token_reorganization import (
    append_fused_patch,
    attentive_rows,
    class_token_attention,
    class_token_probabilities,
    follow_patches,
    inattentive_weights,
    num_attentive_tokens,
    rearrange_tokens,
    reorganize_token_mask,
    reorganize_tokens,
    scores_by_patch,
    top_attentive_index,
)


logger = logging.get_logger(__name__)

# Until 5.8 Transformers named the parameters of a ViT differently, and it still writes those names to disk.
register_checkpoint_conversion_mapping(
    "evit",
    [
        WeightRenaming(r"^deit\.", "vit."),
        WeightRenaming(r"encoder\.layer\.", "layers."),
        WeightRenaming("attention.query", "q_proj"),
        WeightRenaming("attention.key", "k_proj"),
        WeightRenaming("attention.value", "v_proj"),
        WeightRenaming("attention.output.dense", "attention.o_proj"),
        WeightRenaming("intermediate.dense", "mlp.fc1"),
        WeightRenaming("output.dense", "mlp.fc2"),
    ],
    overwrite=True,
)

# Hidden activations of an MLP that a thread may have in flight, see `EViTPreTrainedModel._images_in_cache`.
CACHE_BYTES_PER_THREAD = 20 * 2**20

FORWARD_KEYWORDS = (
    "keep_rate",
    "patch_scores",
    "mix_box",
    "interpolate_pos_encoding",
    "attention_mask",
    "labels",
    "prefix_tokens_only",
)


@dataclass
class EViTModelOutput(BaseModelOutputWithPooling):
    """Output of `EViTModel`.

    Args:
        last_hidden_state: (batch_size, num_tokens_left, hidden_size), after the final layer norm: prefix tokens (class
            token, distillation token if there is one), the attentive tokens of the last reorganization by falling
            score, the fused token. With `prefix_tokens_only` the prefix tokens alone.
        pooler_output: (batch_size, pooler_output_size), or None without pooling layer.
        hidden_states: with `output_hidden_states=True`, num_hidden_layers + 1 tensors (batch_size, num_tokens,
            hidden_size); the number of tokens shrinks at each reorganization layer.
        attentions: with `output_attentions=True` and eager attention, one tensor (batch_size, num_heads, num_tokens,
            num_tokens) for each layer, over the tokens at that layer's input.
        attentive_index: one tensor (batch_size, num_attentive_tokens) for each reorganization layer: the kept tokens
            as positions in the original patch grid (row * grid width + column), by falling score; -1 stands for the
            fused token of an earlier layer, where it was kept. A layer that keeps all tokens lists all of them.
        patch_index: (batch_size, num_image_tokens_left), position in the original patch grid of each token that is
            left behind the prefix tokens; -1 for a fused token.
    """

    attentive_index: tuple[torch.LongTensor, ...] | None = None
    patch_index: torch.LongTensor | None = None


@dataclass
class EViTImageClassifierOutput(ImageClassifierOutput):
    """Output of `EViTForImageClassification`.

    Args:
        loss: scalar, if `labels` were given.
        logits: (batch_size, num_labels), before softmax.
        hidden_states: see `EViTModelOutput`.
        attentions: see `EViTModelOutput`.
        attentive_index: see `EViTModelOutput`.
    """

    attentive_index: tuple[torch.LongTensor, ...] | None = None


class EViTEmbeddings(ViTEmbeddings):
    """Patches to tokens: a class token in front, perhaps a distillation token behind it, positions added.

    Differences from ViTEmbeddings:
        - a distillation token, as in DeiT, with a position of its own;
        - position embeddings of a model with a non-square `image_size` are interpolated on their true grid;
        - no mask token: masked image modeling needs all patches.
    """

    def __init__(self, config: EViTConfig) -> None:
        super().__init__(config)
        self.num_prefix_tokens = config.num_prefix_tokens
        if config.use_distillation_token:
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
            num_positions = config.num_prefix_tokens + self.patch_embeddings.num_patches
            self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))
        patch_size = config.patch_size
        self.patch_height, self.patch_width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Resize the position embeddings bicubically to the patch grid of a height x width image.

        Args:
            embeddings: (batch_size, num_prefix_tokens + num_patches, hidden_size), the tokens that need positions.
            height: image height in pixels.
            width: image width in pixels.

        Returns: (1, num_prefix_tokens + num_patches, hidden_size); positions of prefix tokens are not resized.

        Source: transformers.models.vit.modeling_vit.ViTEmbeddings, after
            https://github.com/facebookresearch/dinov2/blob/e1277af/dinov2/models/vision_transformer.py#L179-L211.
        """
        grid = (height // self.patch_height, width // self.patch_width)
        trained_grid = (self.image_size[0] // self.patch_height, self.image_size[1] // self.patch_width)
        if not torch.jit.is_tracing() and grid == trained_grid:
            return self.position_embeddings
        prefix_positions = self.position_embeddings[:, : self.num_prefix_tokens]
        patch_positions = self.position_embeddings[:, self.num_prefix_tokens :]
        patch_positions = patch_positions.unflatten(1, trained_grid).permute(0, 3, 1, 2)
        patch_positions = nn.functional.interpolate(patch_positions, size=grid, mode="bicubic", align_corners=False)
        return torch.cat((prefix_positions, patch_positions.flatten(2).transpose(1, 2)), dim=1)

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool | None = None,
        mix_box: tuple[int, int, int, int] | None = None,
    ) -> torch.Tensor:
        """Tokens of the images.

        Args:
            pixel_values: (batch_size, num_channels, height, width).
            interpolate_pos_encoding: whether images of another size than `image_size` are welcome.
            mix_box: see `EViTModel.forward`.

        Returns: (batch_size, num_prefix_tokens + num_patches, hidden_size).

        Raises: ValueError for another number of channels, or another size without `interpolate_pos_encoding`.
        """
        batch_size, _, height, width = pixel_values.shape
        if not interpolate_pos_encoding and (height, width) != tuple(self.image_size):
            raise ValueError(
                f"`pixel_values` is {height}x{width} but this model expects "
                f"{self.image_size[0]}x{self.image_size[1]}: resize, or pass `interpolate_pos_encoding=True`."
            )
        patches = self.patch_embeddings(pixel_values)
        if mix_box is not None:
            patches = mix_tokens(patches, mix_box, (height // self.patch_height, width // self.patch_width))
        prefix = [self.cls_token] if self.num_prefix_tokens == 1 else [self.cls_token, self.distillation_token]
        embeddings = torch.cat([*(token.expand(batch_size, -1, -1) for token in prefix), patches], dim=1)
        if interpolate_pos_encoding:
            embeddings = embeddings + self.interpolate_pos_encoding(embeddings, height, width)
        else:
            embeddings = embeddings + self.position_embeddings
        return self.dropout(embeddings)


class EViTAttention(ViTAttention):
    """Self-attention that can also tell what the class token looks at.

    Differences from ViTAttention:
        - on request it returns the class token's attention to the image tokens. Fused kernels return no attention map,
          so that one row is computed beside them from query and key; the eager map is read where it exists;
        - some tokens alone can be the queries;
        - `linear` runs the projections, which is faster on CPUs.
    """

    def __init__(self, config: EViTConfig) -> None:
        super().__init__(config)
        self.num_prefix_tokens = config.num_prefix_tokens

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        score_tokens: bool = False,
        token_mask: torch.Tensor | None = None,
        num_queries: int | None = None,
        projects: bool = True,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: (batch_size, sequence_length, hidden_size).
            attention_mask: in the form that the attention implementation wants, or None.
            score_tokens: whether to return the class token's attention.
            token_mask: (batch_size, sequence_length), the mask that `attention_mask` was made of.
            num_queries: how many tokens, from the first on, look at all tokens; None for all of them.
            projects: False leaves the output projection to the caller.
            **kwargs: handed to the attention implementation.

        Returns: output (batch_size, num_queries, hidden_size); attention map or None; class token attention
            (batch_size, num_image_tokens) or None. The latter never passes through attention dropout: noise would
            choose the tokens (the official code lets it).
        """
        queries = hidden_states if num_queries is None else hidden_states[:, :num_queries]
        input_shape = queries.shape[:-1]
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = linear(self.q_proj, queries).view(*input_shape, -1, self.head_dim).transpose(1, 2)
        key = linear(self.k_proj, hidden_states).view(hidden_shape).transpose(1, 2)
        value = linear(self.v_proj, hidden_states).view(hidden_shape).transpose(1, 2)

        implementation = self.config._attn_implementation
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, attention_map = attention_interface(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output = output.reshape(*input_shape, -1)
        if projects:
            output = linear(self.o_proj, output)

        if not score_tokens:
            return output, attention_map, None
        has_clean_map = implementation == "eager" and not dropout
        num_scoring = self.config.num_scoring_tokens
        probabilities = (
            attention_map
            if has_clean_map
            else class_token_probabilities(query, key, self.scaling, token_mask, num_scoring)
        )
        scores = class_token_attention(probabilities, self.num_prefix_tokens, num_scoring)
        return output, attention_map, scores


class EViTMLP(ViTMLP):
    """The MLP of a ViT.

    Differences from ViTMLP:
        - `linear` runs it, with the activation, which is faster on CPUs.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return (batch_size, sequence_length, hidden_size) for the same."""
        return linear(self.fc2, linear(self.fc1, hidden_states, self.activation_fn))


class EViTDropPath(nn.Module):
    """Stochastic depth: drop a residual branch for some images, and scale it up for the others, in training.

    Source: "Deep Networks with Stochastic Depth", arXiv 1603.09382.
    """

    def __init__(self, drop_probability: float) -> None:
        super().__init__()
        self.drop_probability = drop_probability

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """Return `branch`, (batch_size, ...), with whole images set to zero and its expectation unchanged."""
        if not self.training or self.drop_probability == 0.0:
            return branch
        keep_probability = 1 - self.drop_probability
        mask = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1)).bernoulli_(keep_probability)
        return branch * mask / keep_probability

    def extra_repr(self) -> str:
        """Show the probability in `print(model)`."""
        return f"drop_probability={self.drop_probability:.3f}"


class EViTLayer(ViTLayer):
    """The paper in three steps: attend, reorganize, MLP.

    Differences from ViTLayer:
        - tokens may be reorganized between attention and MLP;
        - stochastic depth on both residual branches.
    """

    def __init__(self, config: EViTConfig, drop_path_rate: float = 0.0) -> None:
        super(ViTLayer, self).__init__()  # ViTLayer would build its own attention first
        self.config = config
        self.attention = EViTAttention(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = EViTDropPath(drop_path_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_attentive: int | None = None,
        token_scores: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        num_queries: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One layer.

        Args:
            hidden_states: (batch_size, sequence_length, hidden_size).
            attention_mask: see `EViTAttention.forward`.
            num_attentive: image tokens to keep; None for a plain ViT layer.
            token_scores: (batch_size, num_image_tokens), scores from outside that choose the tokens.
            token_mask: see `EViTAttention.forward`.
            num_queries: compute this many tokens alone, from the first on; None for all of them. Such a layer
                reorganizes nothing.
            **kwargs: handed to the attention implementation.

        Returns: hidden states, (batch_size, sequence_length left, hidden_size), and the kept tokens as positions among
            this layer's image tokens, (batch_size, num_attentive), or None.
        """
        # Attend
        reorganizes = num_attentive is not None
        projects_late = reorganizes and self.can_project_late
        residual = hidden_states if num_queries is None else hidden_states[:, :num_queries]
        branch, _, attention = self.attention(
            self.layernorm_before(hidden_states),
            attention_mask,
            reorganizes,
            token_mask,
            num_queries,
            not projects_late,
            **kwargs,
        )

        # Reorganize
        attentive_index = None
        if projects_late:
            hidden_states, attentive_index = self.reorganize_and_project(
                residual, branch, attention, num_attentive, token_scores
            )
        else:
            hidden_states = residual + self.residual_branch(branch)
            if reorganizes:
                hidden_states, attentive_index = reorganize_tokens(
                    hidden_states,
                    attention,
                    num_attentive,
                    num_prefix_tokens=self.attention.num_prefix_tokens,
                    fuse_inattentive_tokens=self.config.fuse_inattentive_tokens,
                    token_scores=token_scores,
                )

        # MLP
        residual = hidden_states
        hidden_states = self.mlp(self.layernorm_after(hidden_states))
        hidden_states = residual + self.residual_branch(hidden_states)
        return hidden_states, attentive_index

    @property
    def can_project_late(self) -> bool:
        """Whether tokens may be reorganized before the output projection: if nothing acts on single tokens behind it.

        Wrapped projections (adapters, quantization) keep the order of the paper, and so do those whose weights are
        elsewhere (offloaded by Accelerate).
        """
        projection = self.attention.o_proj
        is_plain = type(projection) is nn.Linear and not hasattr(projection, "_hf_hook")
        return is_plain and not (self.training and self.dropout.p)

    def reorganize_and_project(
        self,
        residual: torch.Tensor,
        attended: torch.Tensor,
        attention: torch.Tensor,
        num_attentive: int,
        token_scores: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reorganize first and project what is left: exact, since fusing and projecting are both linear.

        A sum weighted by attention has the weights' sum of biases, where the projection of the sum has one: the
        difference is added to the fused token. Saves the projection of the inattentive tokens, 0.6 % of the operations
        of DeiT-S at keep rate 0.7 and 1.1 % at 0.5; see BENCHMARKS.md.

        Args:
            residual: (batch_size, sequence_length, hidden_size), the layer's input.
            attended: likewise, what attention gives before its output projection.
            attention: (batch_size, num_image_tokens), the class token's attention.
            num_attentive: image tokens to keep.
            token_scores: see `forward`.

        Returns: see `reorganize_tokens`.
        """
        num_prefix_tokens = self.attention.num_prefix_tokens
        attentive_index = top_attentive_index(attention if token_scores is None else token_scores, num_attentive)
        rows = attentive_rows(attentive_index, residual.shape[1], num_prefix_tokens)
        weights = inattentive_weights(attention, attentive_index) if self.config.fuse_inattentive_tokens else None
        residual = rearrange_tokens(residual, rows, weights, num_prefix_tokens)
        branch = linear(self.attention.o_proj, rearrange_tokens(attended, rows, weights, num_prefix_tokens))
        bias = self.attention.o_proj.bias
        if weights is not None and bias is not None:
            branch[:, -1].add_(((weights.sum(dim=1, keepdim=True) - 1) * bias).to(branch.dtype))
        return residual + self.residual_branch(branch), attentive_index

    def residual_branch(self, branch: torch.Tensor) -> torch.Tensor:
        """Return a branch, (batch_size, sequence_length, hidden_size), behind dropout and stochastic depth."""
        return self.drop_path(self.dropout(branch)) if self.training else branch


class EViTPreTrainedModel(ViTPreTrainedModel):
    """What all EViT models share: loading that leaves no weight to chance, saving, and the keep rate.

    Differences from ViTPreTrainedModel:
        - `from_pretrained` raises where Transformers would only log that parameters stay random;
        - `save_pretrained` writes the names that the model has in memory, and a folder that loads with
          `trust_remote_code=True`.
    """

    config: EViTConfig
    # Classes that load a saved folder with `trust_remote_code=True`, without this package. The one that is registered
    # for the saving class itself wins.
    auto_map = {
        "AutoConfig": "configuration_evit.EViTConfig",
        "AutoModel": "modeling_evit.EViTModel",
        "AutoModelForImageClassification": "modeling_evit.EViTForImageClassification",
    }
    # Reads what `from_pretrained` is given before Transformers does: timm's checkpoints become EViT's, damaged files
    # are named. Set by `evit_hf.conversion`, which does not travel with saved models.
    checkpoint_opener: ClassVar[Callable | None] = None
    _no_split_modules = ["EViTEmbeddings", "EViTLayer"]
    _can_record_outputs = {"hidden_states": EViTLayer, "attentions": EViTAttention}

    # What a picture must go through before the image processor, also for those who load with `trust_remote_code=True`.
    as_rgb = staticmethod(as_rgb)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EViTEmbeddings) and self.config.use_distillation_token:
            init.trunc_normal_(module.distillation_token, mean=0.0, std=self.config.initializer_range)

    def set_keep_rate(self, keep_rate: float | Sequence[float]) -> None:
        """Change the share of image tokens that is kept, from the next forward on. No weight depends on it.

        Args:
            keep_rate: in (0, 1], one number for all reorganization layers or one for each. 1.0 is the plain ViT.

        Raises: ValueError if it is out of range or of the wrong length.
        """
        self.config.keep_rate = list(keep_rate) if isinstance(keep_rate, (list, tuple)) else keep_rate

    @torch.no_grad()
    def set_image_size(self, image_size: int | Sequence[int]) -> None:
        """Change the size of the images that the model expects, and resize its position embeddings bicubically.

        For fine-tuning at another resolution; the keep rate then decides what it costs. To run other sizes without
        changing the model, pass `interpolate_pos_encoding=True` to a forward.

        Args:
            image_size: pixels, (height, width) or one number for both.

        Raises: ValueError if it is smaller than a patch.
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        embeddings = next(module for module in self.modules() if isinstance(module, EViTEmbeddings))
        if height < embeddings.patch_height or width < embeddings.patch_width:
            raise ValueError(
                f"`image_size` is {height}x{width}, which is smaller than a patch of "
                f"{embeddings.patch_height}x{embeddings.patch_width} pixels."
            )
        positions = embeddings.interpolate_pos_encoding(embeddings.position_embeddings, height, width)
        embeddings.position_embeddings = nn.Parameter(positions.clone())
        self.config.image_size = image_size if isinstance(image_size, int) else list(image_size)
        num_patches = positions.shape[1] - embeddings.num_prefix_tokens
        embeddings.image_size = embeddings.patch_embeddings.image_size = (height, width)
        embeddings.patch_embeddings.num_patches = num_patches

    def _backbone_outputs(
        self, pixel_values: torch.Tensor | None, prefix_tokens_only: bool = True, **kwargs: Any
    ) -> EViTModelOutput:
        """Outputs of the backbone for a classifier: no more than it reads, and as fast as this device allows.

        Args:
            pixel_values: (batch_size, num_channels, height, width).
            prefix_tokens_only: whether the classifier reads the prefix tokens alone. A caller who asks for hidden
                states or attention maps gets those of all tokens all the same.
            **kwargs: see `EViTModel.forward`.
        """
        recorded = ("output_hidden_states", "output_attentions")
        if any(kwargs.get(name, getattr(self.config, name, None)) not in (None, False) for name in recorded):
            return self.vit(pixel_values, **kwargs)
        kwargs["prefix_tokens_only"] = prefix_tokens_only
        chunk_size = None if pixel_values is None else self._images_in_cache(pixel_values, kwargs)
        if chunk_size is None or pixel_values.shape[0] <= chunk_size:
            return self.vit(pixel_values, **kwargs)
        chunks = [self.vit(images, **kwargs) for images in pixel_values.split(chunk_size)]
        return EViTModelOutput(
            last_hidden_state=torch.cat([chunk.last_hidden_state for chunk in chunks]),
            attentive_index=tuple(map(torch.cat, zip(*(chunk.attentive_index for chunk in chunks), strict=True))),
            patch_index=torch.cat([chunk.patch_index for chunk in chunks]),
        )

    def _images_in_cache(self, pixel_values: torch.Tensor, kwargs: dict[str, Any]) -> int:
        """Images that a CPU runs through all layers while their activations stay in its cache.

        A large batch streams every activation through memory. In inference images do not know of each other, so that
        a batch may be cut; DeiT-S runs 64 images faster in 17s. BENCHMARKS.md has what it saves.

        Args:
            pixel_values: (batch_size, num_channels, height, width).
            kwargs: of the forward; what belongs to single images is not cut.

        Returns: their number, the whole batch where cutting is of no use: on other devices, with gradients, while
            tracing or compiling.
        """
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        by_image = any(kwargs.get(name) is not None for name in ("patch_scores", "attention_mask", "mix_box"))
        if pixel_values.device.type != "cpu" or is_traced or by_image or self.training or torch.is_grad_enabled():
            return pixel_values.shape[0]  # not `len`, which would fix the batch size of an exported model
        height, width = pixel_values.shape[-2:]
        embeddings = self.vit.embeddings
        num_patches = (height // embeddings.patch_height) * (width // embeddings.patch_width)
        image_bytes = num_patches * self.config.intermediate_size * pixel_values.element_size()
        return max(1, CACHE_BYTES_PER_THREAD * torch.get_num_threads() // max(image_bytes, 1))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        ignore_mismatched_sizes: bool = True,
        output_loading_info: bool = False,
        allow_non_finite_weights: bool = False,
        **kwargs: Any,
    ) -> "EViTPreTrainedModel | tuple[EViTPreTrainedModel, dict]":
        """Load an EViT, ViT or DeiT checkpoint of Transformers 4.x or 5.x, or a ViT or DeiT of timm.

        Keywords such as `keep_rate=0.7` go to the configuration. A classifier for another number of classes, or for a
        backbone without one, is newly initialized, with a warning. A checkpoint without pooling layer loads into
        `EViTModel` without one.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            *model_args: handed to the model class.
            ignore_mismatched_sizes: False makes another number of classes an error as well.
            output_loading_info: whether to return the lists of missing and unexpected keys too.
            allow_non_finite_weights: whether to accept NaN and infinite weights.
            **kwargs: see `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: the folder holds another model type than 'evit', 'vit' or 'deit'.
            RuntimeError: a file is damaged, a weight is NaN or infinite, or a parameter other than the classifier
                would be left at its random initialization; the message names all of them.
        """
        model_class, source = cls, pretrained_model_name_or_path
        opener = EViTPreTrainedModel.checkpoint_opener
        if opener is not None and source is not None:
            model_class, source, kwargs = opener(cls, source, kwargs)
        model, loading_info = super(EViTPreTrainedModel, model_class).from_pretrained(
            source,
            *model_args,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            output_loading_info=True,
            **kwargs,
        )
        if source is None and pretrained_model_name_or_path is not None:  # the opener read it
            model.config.name_or_path = str(pretrained_model_name_or_path)
        model._accept_loaded_weights(str(pretrained_model_name_or_path), loading_info, allow_non_finite_weights)
        return (model, loading_info) if output_loading_info else model

    def _accept_loaded_weights(self, source: str, loading_info: dict, allow_non_finite: bool = False) -> None:
        """Raise RuntimeError for weights that are random, NaN or infinite; warn of newly initialized classifiers."""
        missing = set(loading_info["missing_keys"])
        mismatched = {key: (tuple(found), tuple(here)) for key, found, here in loading_info["mismatched_keys"]}

        heads = ("classifier.", "cls_classifier.", "distillation_classifier.", "aux_classifier.")
        if len(files := [path for path in Path(source).glob("*") if path.suffix in (".safetensors", ".bin")]) == 1:
            source = str(files[0])
        lost = sorted(key for key in missing | mismatched.keys() if not key.startswith((*heads, "pooler.")))
        if lost:
            shapes = [
                f"{key} ({mismatched[key][0]} in the checkpoint, {mismatched[key][1]} here)" for key in mismatched
            ]
            raise RuntimeError(
                f"`{source}` does not fill {len(lost)} of {len(self.state_dict())} parameters, which would be left at "
                f"random values. Missing: {sorted(missing)}. Of another shape: {sorted(shapes)}. Unexpected in the "
                f"checkpoint: {sorted(loading_info['unexpected_keys'])}. Load a ViT or EViT checkpoint of the same "
                "geometry, or change the configuration to match it."
            )
        wrong = (
            []
            if allow_non_finite
            else [
                name
                for name, tensor in self.state_dict().items()
                if tensor.is_floating_point() and tensor.device.type != "meta" and not tensor.isfinite().all()
            ]
        )
        if wrong:
            raise RuntimeError(
                f"`{source}` holds NaN or infinite values in {wrong}: the file is damaged or the training diverged. "
                "Pass `allow_non_finite_weights=True` to load it nevertheless."
            )
        if any(key.startswith("pooler.") for key in missing | mismatched.keys()):
            self.pooler = None
            logger.warning(
                f"`{source}` has no pooling layer: the model is loaded without one, `pooler_output` is None."
            )
        for head in heads:
            renewed = {key for key in missing | mismatched.keys() if key.startswith(head)}
            if renewed:
                num_classes = next((mismatched[key][0][0] for key in renewed if key in mismatched), "none")
                logger.warning(
                    f"The {head.removesuffix('.')} for {self.config.num_labels} classes is newly initialized, "
                    f"`{source}` has {num_classes}: train it."
                )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        save_original_format: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save weights, configuration and the code that `trust_remote_code=True` needs.

        The weights carry the names of the modules in memory. Transformers' default, the names of 4.x, is read back by
        `from_pretrained` but not by `Trainer.train(resume_from_checkpoint=...)` and `load_best_model_at_end`, which
        load the raw file with `strict=False` and leave the encoder at its random initialization (5.9 to 5.23).

        Args:
            save_directory: folder, made if needed.
            *args: see `transformers.PreTrainedModel.save_pretrained`.
            save_original_format: True writes the names of Transformers 4.x.
            **kwargs: see `transformers.PreTrainedModel.save_pretrained`.
        """
        self.config.auto_map = dict(self.auto_map)
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


class EViTModel(EViTPreTrainedModel, ViTModel):
    """The bare EViT: hidden states of the tokens that are left, and which those are.

    Differences from ViTModel:
        - tokens are reorganized at `config.reorganization_layers`, as many as `keep_rate` says;
        - the output tells which patches were kept.

    Args:
        config: the configuration.
        add_pooling_layer: whether to add ViT's pooling layer.
    """

    embeddings_class = EViTEmbeddings
    layer_class = EViTLayer

    def __init__(self, config: EViTConfig, add_pooling_layer: bool = True) -> None:
        config.validate()
        super(ViTModel, self).__init__(config)  # ViTModel would build its own layers first
        self.embeddings = self.embeddings_class(config)
        last_layer = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            self.layer_class(config, config.drop_path_rate * i / last_layer) for i in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        # Keep rate in training while a schedule is on its way to `config.keep_rate`; evaluation never sees it.
        self.training_keep_rate: float | list[float] | None = None
        self.post_init()

    def layer_keep_rates(self, keep_rate: float | Sequence[float] | None = None) -> dict[int, float]:
        """Keep rate of each reorganization layer, by layer number: this call's, the schedule's or the configuration's.

        Raises: ValueError if `keep_rate` is out of range or of the wrong length.
        """
        if keep_rate is None and self.training:
            keep_rate = self.training_keep_rate
        if keep_rate is None:
            return self.config.layer_keep_rates
        check_keep_rate(keep_rate, len(self.config.reorganization_layers))
        return keep_rate_by_layer(keep_rate, self.config.reorganization_layers)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        keep_rate: float | Sequence[float] | None = None,
        patch_scores: torch.Tensor | Sequence[torch.Tensor] | None = None,
        mix_box: tuple[int, int, int, int] | None = None,
        prefix_tokens_only: bool = False,
        **kwargs: Any,
    ) -> EViTModelOutput:
        """Run the images through all layers.

        Args:
            pixel_values: (batch_size, num_channels, height, width).
            interpolate_pos_encoding: whether images of another size than `config.image_size` are welcome.
            attention_mask: (batch_size, num_prefix_tokens + num_patches), 0 where a token must not be attended to.
            keep_rate: for this call, instead of `config.keep_rate`: in (0, 1], one number or one for each
                reorganization layer.
            patch_scores: (batch_size, num_patches), or one such tensor for each reorganization layer: scores from
                outside, by patch of the original grid, that choose the tokens instead of the class token's attention
                (an oracle, a random baseline, a mask of ones and zeros). That attention still weighs the fused token.
            mix_box: (top, left, height, width) in patches: inside, each image takes the patch tokens of the image
                that mirrors it in the batch (mix-token of LV-ViT, for training). `mix_targets` mixes the labels alike.
            prefix_tokens_only: whether the class token (and distillation token) are all that is wanted of the last
                layer, which then computes nothing else; see `last_layer_queries`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and what the attention takes.

        Returns: `EViTModelOutput`.

        Raises: ValueError for missing images, images of the wrong size, a keep rate out of range, scores or a mask of
            the wrong shape. TypeError for a misspelt keyword.
        """
        refuse_misspelt_names(kwargs, FORWARD_KEYWORDS)
        if kwargs.pop("bool_masked_pos", None) is not None:
            raise ValueError("`bool_masked_pos` is for masked image modeling, which needs all patches: take a ViT.")
        if pixel_values is None:
            raise ValueError("`pixel_values` is missing: pass a tensor (batch_size, num_channels, height, width).")
        keep_rates = self.layer_keep_rates(keep_rate)
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding, mix_box)

        num_prefix_tokens = self.embeddings.num_prefix_tokens
        batch_size, num_patches = hidden_states.shape[0], hidden_states.shape[1] - num_prefix_tokens
        patch_scores = self._scores_by_layer(patch_scores, batch_size, num_patches)
        token_mask = self._checked_token_mask(attention_mask, batch_size, num_patches)
        mask = self._attention_mask(hidden_states, token_mask)

        fuse = self.config.fuse_inattentive_tokens
        patch_index = torch.arange(num_patches, device=hidden_states.device).expand(batch_size, -1)
        kept_patches = []
        for i, layer in enumerate(self.layers):
            num_image_tokens = patch_index.shape[1]
            num_attentive = num_attentive_tokens(keep_rates.get(i, 1.0), num_image_tokens)
            if num_attentive == num_image_tokens:  # a plain ViT layer
                is_last = i + 1 == len(self.layers)
                num_queries = self.last_layer_queries(mask) if prefix_tokens_only and is_last else None
                hidden_states, _ = layer(hidden_states, mask, num_queries=num_queries, **kwargs)
                if i in keep_rates:
                    kept_patches.append(patch_index)
                continue

            token_scores = scores_by_patch(patch_scores[i], patch_index) if patch_scores else None
            hidden_states, attentive_index = layer(
                hidden_states, mask, num_attentive, token_scores, token_mask, **kwargs
            )
            patch_index = follow_patches(patch_index, attentive_index)
            kept_patches.append(patch_index)
            if fuse:
                patch_index = append_fused_patch(patch_index)
            if token_mask is not None:
                token_mask = reorganize_token_mask(token_mask, attentive_index, num_prefix_tokens, fuse)
            if mask is not None:  # flex attention has one without `attention_mask` too, made for one length
                mask = self._attention_mask(hidden_states, token_mask)

        hidden_states = self.layernorm(hidden_states)
        return EViTModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=self.pooler(hidden_states) if self.pooler is not None else None,
            attentive_index=tuple(kept_patches),
            patch_index=patch_index,
        )

    def last_layer_queries(self, mask: Any) -> int | None:
        """Tokens that the last layer has to compute when the image tokens are not read: one for the class token.

        Keys and values are those of all tokens, so that the result is exact; queries, projection and MLP of the
        others are work that nobody uses, 5 % of a dense DeiT-S. BENCHMARKS.md has what it saves.

        Args:
            mask: what `_attention_mask` returned: its rows can be left out unless it is made for one kernel.

        Returns: their number, or None for all tokens.
        """
        return self.config.num_prefix_tokens if mask is None else None

    def _scores_by_layer(
        self, patch_scores: torch.Tensor | Sequence[torch.Tensor] | None, batch_size: int, num_patches: int
    ) -> dict[int, torch.Tensor]:
        """Scores from outside, (batch_size, num_patches), by number of the reorganization layer that uses them."""
        if patch_scores is None:
            return {}
        layers = self.config.reorganization_layers
        by_layer = [patch_scores] * len(layers) if isinstance(patch_scores, torch.Tensor) else list(patch_scores)
        if len(by_layer) != len(layers):
            raise ValueError(
                f"`patch_scores` has {len(by_layer)} tensors but there are {len(layers)} reorganization layers: "
                "pass one tensor for all of them, or one for each."
            )
        for scores in by_layer:
            if tuple(scores.shape) != (batch_size, num_patches):
                raise ValueError(
                    f"`patch_scores` must be (batch_size, num_patches) = {(batch_size, num_patches)}, got "
                    f"{tuple(scores.shape)}: give one score for each patch, none for the class token."
                )
        return dict(zip(layers, by_layer, strict=True))

    def _checked_token_mask(
        self, attention_mask: torch.Tensor | None, batch_size: int, num_patches: int
    ) -> torch.Tensor | None:
        """Return the mask, (batch_size, num_prefix_tokens + num_patches), if it is one that can follow the tokens."""
        expected = (batch_size, self.config.num_prefix_tokens + num_patches)
        if attention_mask is not None and tuple(attention_mask.shape) != expected:
            raise ValueError(
                f"`attention_mask` must be (batch_size, num_prefix_tokens + num_patches) = {expected}, got "
                f"{tuple(attention_mask.shape)}: it follows the tokens, so it needs one entry for each of them."
            )
        return attention_mask

    def _attention_mask(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Mask in the form that the attention implementation wants, for the tokens that are left."""
        return create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=token_mask)


class EViTForImageClassification(EViTPreTrainedModel, ViTForImageClassification):
    """EViT with a linear classifier on the class token.

    Example:
        >>> from evit_hf import EViTForImageClassification
        >>> model = EViTForImageClassification.from_pretrained("google/vit-base-patch16-224", keep_rate=0.7)
        >>> model.set_keep_rate(0.5)  # faster, from the next forward on
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> "EViTPreTrainedModel | tuple[EViTPreTrainedModel, dict]":
        """Load a checkpoint, see `EViTPreTrainedModel.from_pretrained`.

        Auto classes know one class for each configuration, this one, and hand over the configuration; where that names
        `EViTForImageClassificationWithTeacher`, what was saved with two classifiers keeps them.
        """
        architectures = getattr(kwargs.get("config"), "architectures", None) or [""]
        if architectures[0] == "EViTForImageClassificationWithTeacher":
            return EViTForImageClassificationWithTeacher.from_pretrained(
                pretrained_model_name_or_path, *model_args, **kwargs
            )
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def __init__(self, config: EViTConfig) -> None:
        super(ViTForImageClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.vit = EViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        keep_rate: float | Sequence[float] | None = None,
        patch_scores: torch.Tensor | Sequence[torch.Tensor] | None = None,
        mix_box: tuple[int, int, int, int] | None = None,
        **kwargs: Any,
    ) -> EViTImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (batch_size, num_channels, height, width).
            labels: (batch_size,) class numbers, or whatever `config.problem_type` asks for; gives `loss`.
            interpolate_pos_encoding: see `EViTModel.forward`.
            attention_mask: see `EViTModel.forward`.
            keep_rate: see `EViTModel.forward`.
            patch_scores: see `EViTModel.forward`.
            mix_box: see `EViTModel.forward`; `token_labelling.mix_targets` mixes the labels.
            **kwargs: see `EViTModel.forward`.

        Returns: `EViTImageClassifierOutput`.
        """
        outputs = self._backbone_outputs(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            keep_rate=keep_rate,
            patch_scores=patch_scores,
            mix_box=mix_box,
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0])
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return EViTImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attentive_index=outputs.attentive_index,
        )


@dataclass
class EViTForImageClassificationWithTeacherOutput(EViTImageClassifierOutput):
    """Output of `EViTForImageClassificationWithTeacher`.

    Args:
        loss: scalar, if `labels` were given, from `logits`.
        logits: (batch_size, num_labels), mean of the two below.
        cls_logits: (batch_size, num_labels), from the class token.
        distillation_logits: (batch_size, num_labels), from the distillation token.
        hidden_states: see `EViTModelOutput`.
        attentions: see `EViTModelOutput`.
        attentive_index: see `EViTModelOutput`.
    """

    cls_logits: torch.Tensor | None = None
    distillation_logits: torch.Tensor | None = None


class EViTForImageClassificationWithTeacher(EViTPreTrainedModel):
    """Distilled EViT: one classifier on the class token, one on the distillation token, as in DeiT.

    In training a distillation loss wants the two logits apart; the answer is their mean.

    Args:
        config: with `use_distillation_token=True`.

    Raises: ValueError without distillation token.
    """

    def __init__(self, config: EViTConfig) -> None:
        super().__init__(config)
        if not config.use_distillation_token:
            raise ValueError(
                "EViTForImageClassificationWithTeacher needs a distillation token: pass "
                "`use_distillation_token=True`, or take EViTForImageClassification."
            )
        self.num_labels = config.num_labels
        self.vit = EViTModel(config, add_pooling_layer=False)
        self.cls_classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.distillation_classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        keep_rate: float | Sequence[float] | None = None,
        patch_scores: torch.Tensor | Sequence[torch.Tensor] | None = None,
        mix_box: tuple[int, int, int, int] | None = None,
        **kwargs: Any,
    ) -> EViTForImageClassificationWithTeacherOutput:
        """Classify images; arguments as in `EViTForImageClassification.forward`.

        Returns: `EViTForImageClassificationWithTeacherOutput`.
        """
        outputs = self._backbone_outputs(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            keep_rate=keep_rate,
            patch_scores=patch_scores,
            mix_box=mix_box,
            **kwargs,
        )
        cls_logits = self.cls_classifier(outputs.last_hidden_state[:, 0])
        distillation_logits = self.distillation_classifier(outputs.last_hidden_state[:, 1])
        logits = (cls_logits + distillation_logits) / 2
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return EViTForImageClassificationWithTeacherOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attentive_index=outputs.attentive_index,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
        )


EViTModel.register_for_auto_class("AutoModel")
EViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
EViTForImageClassificationWithTeacher.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "EViTForImageClassification",
    "EViTForImageClassificationWithTeacher",
    "EViTForImageClassificationWithTeacherOutput",
    "EViTImageClassifierOutput",
    "EViTModel",
    "EViTModelOutput",
    "EViTPreTrainedModel",
]
