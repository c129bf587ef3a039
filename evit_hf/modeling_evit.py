"""EViT models: Vision Transformers that reorganize their tokens between attention and MLP.

The classes are in the order in which data flows and take their parameters, and the names of their parameters, from
`transformers.models.vit`: an EViT has exactly the weights of a ViT, a distilled one those of a DeiT.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig
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
    ViTPatchEmbeddings,
    ViTPooler,
    ViTPreTrainedModel,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_evit import (
    OWN_FIELDS,
    EViTConfig,
    height_and_width,
    is_whole_number,
    patch_grid,
    python_value,
    refuse_misspelt_names,
)
from .cpu_inference import images_in_cache, linear, projection
from .gpu_inference import choose_tokens, embed_patches, rearrange_tokens
from .pictures import as_rgb
from .short_cuts import classes_of, modules_below, plain_road_wanted
from .token_labelling import mix_tokens
from .token_reorganization import (
    TokenChoice,
    all_patches,
    attention_by_patch,
    class_token_attention,
    class_token_probabilities,
    follow_patches,
    follow_tokens,
    log_sizes,
    mean_keys,
    reorganize_token_mask,
    scores_by_patch,
)
from .tokens_left import TokenPlan, check_scores, scored_layers, scores_by_layer, token_plan


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

# Fills up the shorter rows of `attentive_index` as one tensor.
NO_TOKEN = -2


class EViTForwardKeywords(TransformersKwargs, total=False):
    """Keywords of a classifier's forward that its backbone takes; `EViTModel.forward` explains them."""

    interpolate_pos_encoding: bool | None
    attention_mask: torch.Tensor | None
    keep_rate: float | Sequence[float] | None
    macs: float | None
    patch_scores: torch.Tensor | Sequence[torch.Tensor] | None
    mix_box: tuple[int, int, int, int] | None
    output_class_attention: bool | Sequence[int]


# Ours, which Transformers would not miss if they were misspelt.
FORWARD_KEYWORDS = (
    *(name for name in EViTForwardKeywords.__annotations__ if name not in TransformersKwargs.__annotations__),
    "labels",
    "prefix_tokens_only",
)


class AttentiveIndexOutput(ModelOutput):
    """An output whose `attentive_index` has one tensor for each layer and can still be cut by image.

    Pipelines of Transformers, Accelerate and `torch.jit.trace` go through the `items()` of an output and take them for
    tensors whose first dimension is the image. There, and only there, `attentive_index` is one tensor (batch_size,
    num_reorganization_layers, most tokens kept), filled up with -2. Attribute, `["attentive_index"]` and tuple have
    one tensor for each layer.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; `attentive_index` may come by layer or as one tensor."""
        super().__setattr__(name, value)
        self._split(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set a field; `attentive_index` may come by layer or as one tensor."""
        if name == "attentive_index" and name in self and value is self.attentive_index:
            return  # as it was set; what is made of it need not be made again
        super().__setitem__(name, value)
        self._split(name, value)

    def __getitem__(self, name: str | int | slice) -> Any:
        """Return a field by name, or by position among the fields that are set."""
        return self.attentive_index if name == "attentive_index" else super().__getitem__(name)

    def _split(self, name: str, value: Any) -> None:
        """Keep `attentive_index` by layer as the attribute, and as one tensor as the item."""
        if name != "attentive_index" or not isinstance(value, (tuple, torch.Tensor)):
            return
        if isinstance(value, torch.Tensor):
            lengths = (value[:1] != NO_TOKEN).sum(dim=2).flatten().tolist() if len(value) else [0] * value.shape[1]
            as_tensor, by_layer = value, tuple(value[:, i, :length] for i, length in enumerate(lengths))
        else:
            most = max([0, *(index.shape[1] for index in value)])
            filled = [nn.functional.pad(index, (0, most - index.shape[1]), value=NO_TOKEN) for index in value]
            as_tensor, by_layer = torch.stack(filled, dim=1) if filled else None, value
        object.__setattr__(self, name, by_layer)
        if as_tensor is not None:
            super(ModelOutput, self).__setitem__(name, as_tensor)
        elif name in self:  # a model that reorganizes nothing; `pop` of Python 3.10 would call `self.__delitem__`
            super(ModelOutput, self).__delitem__(name)


@dataclass
class EViTModelOutput(AttentiveIndexOutput, BaseModelOutputWithPooling):
    """Output of `EViTModel`.

    Args:
        last_hidden_state: (batch_size, num_tokens_left, hidden_size), after the final layer norm: prefix tokens (class
            token, distillation token if there is one), the attentive tokens of the last reorganization in descending
            order of score, the fused token. With `prefix_tokens_only` only the prefix tokens.
        pooler_output: (batch_size, pooler_output_size), or None without pooling layer.
        hidden_states: with `output_hidden_states=True`, num_hidden_layers + 1 tensors (batch_size, num_tokens,
            hidden_size); the number of tokens shrinks at each reorganization layer.
        attentions: with `output_attentions=True` and eager attention, one tensor (batch_size, num_heads, num_tokens,
            num_tokens) for each layer, over the tokens at that layer's input.
        attentive_index: one tensor (batch_size, num_attentive_tokens) for each reorganization layer: the kept tokens
            as positions in the original patch grid (row * grid width + column), in descending order of score; -1 is
            the fused token of an earlier layer, where it was kept. A layer that keeps all tokens lists all of them.
        patch_index: (batch_size, num_image_tokens_left), position in the original patch grid of each token that is
            left after the prefix tokens; -1 for a fused token.
        token_sizes: where inattentive tokens are counted, (batch_size, num_image_tokens_left), float32: how many
            patches each of those tokens counts, itself included. They sum to the number of patches (of those that
            `attention_mask` does not hide).
        counted_by: where inattentive tokens are counted, (batch_size, num_patches): which of those tokens, by position
            among them, counts each patch of the original grid. `features[:, num_prefix_tokens:].gather(1, counted_by)`
            (expanded by hidden_size) puts features back on the whole grid.
        class_attention: with `output_class_attention`, (batch_size, num_layers, num_patches), float32: attention that
            the class token pays to each patch of the original grid at each of those layers, mean over heads; 0 for
            patches that were given up before.
    """

    attentive_index: tuple[torch.LongTensor, ...] | None = None
    patch_index: torch.LongTensor | None = None
    token_sizes: torch.Tensor | None = None
    counted_by: torch.LongTensor | None = None
    class_attention: torch.Tensor | None = None


@dataclass
class EViTImageClassifierOutput(AttentiveIndexOutput, ImageClassifierOutput):
    """Output of `EViTForImageClassification`.

    Args:
        loss: scalar, if `labels` were given.
        logits: (batch_size, num_labels), before softmax.
        hidden_states: see `EViTModelOutput`.
        attentions: see `EViTModelOutput`.
        attentive_index: see `EViTModelOutput`.
        patch_index: see `EViTModelOutput`.
        token_sizes: see `EViTModelOutput`; those of the patches in `attentive_index[-1]`.
        counted_by: see `EViTModelOutput`.
        class_attention: see `EViTModelOutput`.
    """

    attentive_index: tuple[torch.LongTensor, ...] | None = None
    patch_index: torch.LongTensor | None = None
    token_sizes: torch.Tensor | None = None
    counted_by: torch.LongTensor | None = None
    class_attention: torch.Tensor | None = None


class EViTEmbeddings(ViTEmbeddings):
    """Patches to tokens: the class token first, then perhaps a distillation token, positions added.

    Differences from ViTEmbeddings:
        - a distillation token, as in DeiT, with its own position;
        - position embeddings of a model with a non-square `image_size` are interpolated on their true grid;
        - no mask token: masked image modeling needs all patches.
    """

    def __init__(self, config: EViTConfig) -> None:
        super().__init__(config)
        self.config = config
        self.num_prefix_tokens = config.num_prefix_tokens
        if config.use_distillation_token:
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
            num_positions = config.num_prefix_tokens + self.patch_embeddings.num_patches
            self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))

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
        grid, trained_grid = patch_grid(self.config, (height, width)), patch_grid(self.config, self.image_size)
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
        takes_short_cuts: bool = False,
    ) -> torch.Tensor:
        """Tokens of the images.

        Args:
            pixel_values: (batch_size, num_channels, height, width).
            interpolate_pos_encoding: whether to accept image sizes other than `image_size`.
            mix_box: see `EViTModel.forward`.
            takes_short_cuts: whether patches may be embedded by a matrix product, see `short_cuts`.

        Returns: (batch_size, num_prefix_tokens + num_patches, hidden_size).

        Raises: ValueError for a different number of channels, or a different size without
            `interpolate_pos_encoding`.
        """
        batch_size, num_channels, height, width = pixel_values.shape
        if not interpolate_pos_encoding and (height, width) != tuple(self.image_size):
            raise ValueError(
                f"`pixel_values` is {height}x{width} but this model expects "
                f"{self.image_size[0]}x{self.image_size[1]}: resize, or pass `interpolate_pos_encoding=True`."
            )
        is_plain = type(self.patch_embeddings) is ViTPatchEmbeddings
        if takes_short_cuts and is_plain and pixel_values.is_cuda and num_channels == self.config.num_channels:
            patches = embed_patches(self.patch_embeddings.projection, pixel_values)
        else:
            patches = self.patch_embeddings(pixel_values)
        if mix_box is not None:
            patches = mix_tokens(patches, mix_box, patch_grid(self.config, (height, width)))
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
          so that one row is computed from query and key as well; the eager map is read where it exists;
        - on request it returns the keys, by which tokens are compared;
        - as short cuts, only the first tokens can be the queries, the output projection can be left to the caller, and
          `linear` can run the projections.
    """

    def __init__(self, config: EViTConfig) -> None:
        super().__init__(config)
        self.num_prefix_tokens = config.num_prefix_tokens

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        score_tokens: bool = False,
        compare_tokens: bool = False,
        token_mask: torch.Tensor | None = None,
        num_queries: int | None = None,
        projects: bool = True,
        takes_short_cuts: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: (batch_size, sequence_length, hidden_size).
            attention_mask: in the form that the attention implementation wants, or None.
            score_tokens: whether to return the class token's attention.
            compare_tokens: whether to return the keys, see `token_reorganization.mean_keys`.
            token_mask: (batch_size, sequence_length), the mask that `attention_mask` was made of.
            num_queries: how many tokens, from the first on, look at all tokens; None for all of them.
            projects: False leaves the output projection to the caller.
            takes_short_cuts: whether `linear` may run the projections, see `short_cuts`.
            **kwargs: handed to the attention implementation.

        Returns: output (batch_size, num_queries, hidden_size); attention map or None; class token attention
            (batch_size, num_image_tokens) or None; keys (batch_size, num_image_tokens, head_dim) or None. Class token
            attention never passes through attention dropout: noise would choose the tokens (the official code lets
            it).
        """
        project = projection(hidden_states, takes_short_cuts)
        queries = hidden_states if num_queries is None else hidden_states[:, :num_queries]
        # `view` and not `unflatten`, of which `torch.onnx.export(dynamo=False)` makes a graph for one batch size.
        by_head = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = project(self.q_proj, queries).view(*queries.shape[:-1], -1, self.head_dim).transpose(1, 2)
        key = project(self.k_proj, hidden_states).view(by_head).transpose(1, 2)
        value = project(self.v_proj, hidden_states).view(by_head).transpose(1, 2)

        implementation = self.config._attn_implementation
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        bias = None  # what was added to the logits
        if isinstance(attention_mask, torch.Tensor) and attention_mask.is_floating_point():
            bias, attention_mask = attention_mask, attention_mask.to(query.dtype)
        output, attention_map = attention_interface(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output = output.flatten(2)
        if projects:
            output = project(self.o_proj, output)

        keys = mean_keys(key, self.num_prefix_tokens) if compare_tokens else None
        if not score_tokens:
            return output, attention_map, None, keys
        # An eager map has passed through dropout, and through float32 even in a float64 model.
        has_clean_map = implementation == "eager" and not dropout and query.dtype != torch.float64
        num_scoring = self.config.num_scoring_tokens
        probabilities = (
            attention_map
            if has_clean_map
            else class_token_probabilities(query, key, self.scaling, token_mask, num_scoring, bias)
        )
        scores = class_token_attention(probabilities, self.num_prefix_tokens, num_scoring)
        return output, attention_map, scores, keys


class EViTMLP(ViTMLP):
    """The MLP of a ViT.

    Differences from ViTMLP:
        - as a short cut, `linear` can run it, with the activation.
    """

    def forward(self, hidden_states: torch.Tensor, takes_short_cuts: bool = False) -> torch.Tensor:
        """Return (batch_size, sequence_length, hidden_size) for the same; see `short_cuts` for the short cuts."""
        project = projection(hidden_states, takes_short_cuts)
        return project(self.fc2, project(self.fc1, hidden_states, self.activation_fn))


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
        inattentive_tokens: str = "fused",
        token_scores: torch.Tensor | None = None,
        token_sizes: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        score_tokens: bool = False,
        num_queries: int | None = None,
        takes_short_cuts: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """One layer.

        Args:
            hidden_states: (batch_size, sequence_length, hidden_size).
            attention_mask: see `EViTAttention.forward`.
            num_attentive: image tokens to keep; None for a plain ViT layer.
            inattentive_tokens: what becomes of the others, see `token_reorganization.choose_tokens`.
            token_scores: (batch_size, num_image_tokens), scores from outside that choose the tokens.
            token_sizes: (batch_size, num_image_tokens), how many patches each of them counts; None for one each.
            token_mask: see `EViTAttention.forward`.
            score_tokens: whether to return the class token's attention from a plain ViT layer too.
            num_queries: compute only this many tokens, from the first on; None for all of them. Such a layer chooses
                tokens if it is asked to, and returns none of them.
            takes_short_cuts: whether nobody would see them, see `short_cuts`. The modules are called in the order of
                the paper otherwise.
            **kwargs: handed to the attention implementation.

        Returns: hidden states, (batch_size, sequence_length left, hidden_size), as from a layer of ViT. A layer that
            scores its image tokens returns a tuple: hidden states; the class token's attention to them, (batch_size,
            num_image_tokens); and if it chooses some, `TokenChoice.tensors`.
        """
        chooses, counts = num_attentive is not None, inattentive_tokens == "counted"
        reorganizes = chooses and num_queries is None
        # Averaged tokens keep their length, which projecting does not.
        projects_late = (
            takes_short_cuts
            and reorganizes
            and not counts
            and not (self.dropout.training and self.dropout.p)
            and not hidden_states.is_cuda  # where rearranging twice costs more
        )

        # Attend
        asked: dict[str, Any] = {}
        if chooses or score_tokens:
            asked = {"score_tokens": True, "token_mask": token_mask}
        if chooses and counts:
            asked["compare_tokens"] = True
        if takes_short_cuts:  # PyTorch 2.7 cannot compile `|=` between dictionaries
            asked.update(num_queries=num_queries, projects=not projects_late, takes_short_cuts=True)
        branch, _, *scored = self.attention(self.layernorm_before(hidden_states), attention_mask, **asked, **kwargs)
        attention, keys = scored if scored else (None, None)
        residual = hidden_states if num_queries is None else hidden_states[:, :num_queries]

        # Reorganize
        choice = None
        if chooses:
            choice = self.choose_tokens(attention, num_attentive, inattentive_tokens, token_scores, keys, token_sizes)
        if projects_late:
            residual, branch = (
                self.rearrange(residual, choice),
                self.project_late(self.rearrange(branch, choice), choice),
            )
        hidden_states = residual + self.residual_branch(branch, takes_short_cuts)
        if reorganizes and not projects_late:
            hidden_states = self.rearrange(hidden_states, choice)

        # MLP
        hidden_states = self.feed_forward(hidden_states, takes_short_cuts)
        if attention is None:
            return hidden_states
        return hidden_states, attention, *(() if choice is None else choice.tensors())

    def choose_tokens(
        self,
        attention: torch.Tensor,
        num_attentive: int,
        inattentive_tokens: str,
        token_scores: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        token_sizes: torch.Tensor | None = None,
    ) -> TokenChoice:
        """Choose the tokens that this layer keeps, see `token_reorganization.choose_tokens`."""
        return choose_tokens(
            attention,
            num_attentive,
            num_prefix_tokens=self.config.num_prefix_tokens,
            inattentive_tokens=inattentive_tokens,
            token_scores=token_scores,
            keys=keys,
            token_sizes=token_sizes,
        )

    def rearrange(self, hidden_states: torch.Tensor, choice: TokenChoice) -> torch.Tensor:
        """Carry out the choice, see `token_reorganization.rearrange_tokens`."""
        return rearrange_tokens(hidden_states, choice, self.config.num_prefix_tokens)

    def project_late(self, attended: torch.Tensor, choice: TokenChoice) -> torch.Tensor:
        """Project tokens that were reorganized before: exact, since fusing and projecting are both linear.

        The fused token's weights do not sum to one, so neither does its share of the bias: the difference is added.
        Saves the projection of the inattentive tokens, 0.6 % of the operations of DeiT-S at keep rate 0.7 and 1.1 % at
        0.5; see BENCHMARKS.md.

        Args:
            attended: (batch_size, sequence_length left, hidden_size), what attention gives before its projection.
            choice: of the tokens.

        Returns: (batch_size, sequence_length left, hidden_size).
        """
        branch = linear(self.attention.o_proj, attended)
        bias = self.attention.o_proj.bias
        if choice.weights is not None and bias is not None:
            branch[:, -1].add_(((choice.weights.sum(dim=1, keepdim=True) - 1) * bias).to(branch.dtype))
        return branch

    def feed_forward(self, hidden_states: torch.Tensor, takes_short_cuts: bool = False) -> torch.Tensor:
        """Second half of the layer, the MLP with its residual: (batch_size, sequence_length, hidden_size) for same."""
        asked = {"takes_short_cuts": True} if takes_short_cuts else {}
        branch = self.mlp(self.layernorm_after(hidden_states), **asked)
        return hidden_states + self.residual_branch(branch, takes_short_cuts)

    def residual_branch(self, branch: torch.Tensor, takes_short_cuts: bool = False) -> torch.Tensor:
        """Return a branch, (batch_size, sequence_length, hidden_size), after dropout and stochastic depth."""
        if takes_short_cuts and not (self.dropout.training or self.drop_path.training):
            return branch
        return self.drop_path(self.dropout(branch))


class EViTPreTrainedModel(ViTPreTrainedModel):
    """What all EViT models share: strict loading (no weight stays randomly initialized unnoticed), saving, keep rate.

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

    def post_init(self) -> None:
        """Initialize, and give the model its own configuration, which all its parts share.

        Two models that are built from one object do not change each other: `model.config` equals that object and is
        not the same one.
        """
        super().post_init()
        config = copy.deepcopy(self.config)
        for module in self.modules():
            if isinstance(getattr(module, "config", None), EViTConfig):
                module.config = config

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a configuration, which a model around this one may give it, reaches all parts."""
        before = self.__dict__.get("config")
        super().__setattr__(name, value)
        if name == "config" and before is not None:
            for module in self.modules():
                if module.__dict__.get("config") is before:
                    module.config = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EViTEmbeddings) and self.config.use_distillation_token:
            init.trunc_normal_(module.distillation_token, mean=0.0, std=self.config.initializer_range)

    def set_keep_rate(self, keep_rate: float | Sequence[float]) -> None:
        """Change the share of image tokens that is kept, from the next forward on. No weight depends on it.

        A model with `macs` becomes one with a keep rate: it reorganizes in the paper's layers, and fuses.

        Args:
            keep_rate: in (0, 1], one number for all reorganization layers or one for each. 1.0 is the plain ViT.

        Raises: ValueError if it is out of range or of the wrong length.
        """
        self.config.keep_rate = keep_rate

    def set_macs(self, macs: float) -> None:
        """Change the share of the dense model's operations, from the next forward on. No weight depends on it.

        A model with a keep rate becomes one with `macs`: every layer gives up tokens, and they are counted.

        Args:
            macs: in (0, 1]. 1.0 is the plain ViT.

        Raises: ValueError if it is out of range. If it is out of reach, the forward says so.
        """
        self.config.macs = macs

    @torch.no_grad()
    def set_image_size(self, image_size: int | Sequence[int]) -> None:
        """Change the size of the images that the model expects, and resize its position embeddings bicubically.

        For fine-tuning at a different resolution; the keep rate then decides what it costs. To run other sizes without
        changing the model, pass `interpolate_pos_encoding=True` to a forward.

        Args:
            image_size: pixels, (height, width) or one number for both.

        Raises: ValueError if it is not a number of pixels, or smaller than a patch.
        """
        image_size = python_value(image_size)
        sizes = list(image_size) if isinstance(image_size, (list, tuple)) else [image_size, image_size]
        if len(sizes) != 2 or not all(map(is_whole_number, sizes)):
            raise ValueError(
                f"`image_size` must be a whole number of pixels, or (height, width), got {image_size!r}: "
                "for example 384."
            )
        height, width = sizes
        rows, columns = patch_grid(self.config, (height, width))
        if rows < 1 or columns < 1:
            patch_height, patch_width = height_and_width(self.config.patch_size)
            raise ValueError(
                f"`image_size` is {height}x{width}, which is smaller than a patch of "
                f"{patch_height}x{patch_width} pixels."
            )
        embeddings = next(module for module in self.modules() if isinstance(module, EViTEmbeddings))
        before = embeddings.position_embeddings
        positions = embeddings.interpolate_pos_encoding(before, height, width)
        embeddings.position_embeddings = nn.Parameter(positions.clone(), requires_grad=before.requires_grad)
        self.config.image_size = image_size if isinstance(image_size, int) else sizes
        embeddings.image_size = embeddings.patch_embeddings.image_size = (height, width)
        embeddings.patch_embeddings.num_patches = rows * columns

    def _records(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward with these keywords records hidden states or attention maps."""
        recorded = ("output_hidden_states", "output_attentions")
        return any(kwargs.get(name, getattr(self.config, name, None)) not in (None, False) for name in recorded)

    def _backbone_outputs(
        self, pixel_values: torch.Tensor | None, prefix_tokens_only: bool = True, **kwargs: Any
    ) -> EViTModelOutput:
        """Outputs of the backbone for a classifier: no more than it reads, and as fast as this device allows.

        Whoever looks inside, or asks for hidden states or attention maps, gets those of all tokens and all images.

        Args:
            pixel_values: (batch_size, num_channels, height, width).
            prefix_tokens_only: whether the classifier reads only the prefix tokens.
            **kwargs: see `EViTModel.forward`.
        """
        backbone = self.vit
        if pixel_values is None or self._records(kwargs) or backbone.plain_road_wanted(pixel_values, itself=True):
            return backbone(pixel_values, **kwargs)
        kwargs.update(prefix_tokens_only=prefix_tokens_only, takes_short_cuts=True)
        num_images, chunk_size = pixel_values.shape[0], self._images_in_cache(pixel_values, kwargs)
        if num_images <= chunk_size:
            return backbone(pixel_values, **kwargs)
        chunks = [backbone(images, **kwargs) for images in pixel_values.split(chunk_size)]
        fields: dict[str, Any] = {}
        for name in ("last_hidden_state", "patch_index", "token_sizes", "counted_by", "class_attention"):
            if getattr(chunks[0], name) is not None:
                fields[name] = torch.cat([getattr(chunk, name) for chunk in chunks])
        by_layer = zip(*(chunk.attentive_index for chunk in chunks), strict=True)
        fields["attentive_index"] = tuple(map(torch.cat, by_layer))
        return EViTModelOutput(**fields)

    def _images_in_cache(self, pixel_values: torch.Tensor, kwargs: dict[str, Any]) -> int:
        """Images that go through all layers at once, see `cpu_inference.images_in_cache`.

        The whole batch where images are not independent: modules in training mode, keywords that belong to images.
        """
        by_image = any(kwargs.get(name) is not None for name in ("patch_scores", "attention_mask", "mix_box"))
        rows, columns = patch_grid(self.config, pixel_values.shape[-2:])
        limit = images_in_cache(pixel_values, rows * columns, self.config.intermediate_size)
        if by_image or (limit < pixel_values.shape[0] and any(module.training for module in self.modules())):
            return pixel_values.shape[0]
        return limit

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
        """Load an EViT, ViT or DeiT of Transformers 4.x or 5.x, or a ViT or DeiT of timm or in a single file.

        Keywords such as `keep_rate=0.7` go to the configuration, also to one that is passed as `config=` (which is not
        changed; that of a ViT or DeiT becomes one of ours). A classifier for a different number of classes, or for a
        backbone without one, is newly initialized, with a warning. A checkpoint without pooling layer loads into
        `EViTModel` without one.

        Args:
            pretrained_model_name_or_path: folder or Hub id, or a file of weights (.pth, .safetensors), which
                `convert_checkpoint` reads with its image processor.
            *model_args: handed to the model class.
            ignore_mismatched_sizes: False makes a different number of classes an error as well.
            output_loading_info: whether to return the lists of missing and unexpected keys too.
            allow_non_finite_weights: whether to accept NaN and infinite weights.
            **kwargs: see `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: the folder holds a model type other than 'evit', 'vit' or 'deit'.
            RuntimeError: a file is damaged, a weight is NaN or infinite, or a parameter other than the classifier
                would be left at its random initialization; the message names all of them.
        """
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig):
            refuse_misspelt_names(kwargs, OWN_FIELDS)
            changes = {name: kwargs.pop(name) for name in cls.config_class.field_names() & kwargs.keys()}
            kwargs["config"] = cls.config_class.from_config(config, **changes)
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
                f"random values. Missing: {sorted(missing)}. Of a different shape: {sorted(shapes)}. Unexpected in "
                f"the checkpoint: {sorted(loading_info['unexpected_keys'])}. Load a ViT or EViT checkpoint of the "
                f"same geometry, or correct what does not match it in the configuration: {self.config.geometry()}. To "
                "change the image size, load without `image_size` and call `set_image_size`."
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
    """The bare EViT: hidden states of the tokens that are left, and which tokens they are.

    Differences from ViTModel:
        - tokens are reorganized at `config.reorganization_layers`, as many as `keep_rate` or `macs` says;
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
        self._built_of = classes_of(self._inner_modules())
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        # Keep rate in training while a schedule is on its way to `config.keep_rate`; evaluation never sees it.
        self.training_keep_rate: float | list[float] | None = None
        self.costs = config.costs  # here, because PyTorch 2.7 cannot compile this property of a configuration
        self.post_init()

    def token_plan(self, keep_rate: float | Sequence[float] | None = None, macs: float | None = None) -> TokenPlan:
        """How many tokens each layer keeps: as this call, the schedule or the configuration wants.

        Raises: ValueError if `keep_rate` or `macs` is out of range, or both are given.
        """
        scheduled = self.training_keep_rate if self.training else None
        return token_plan(self.config, len(self.layers), keep_rate, macs, scheduled)

    def _inner_modules(self) -> list[nn.Module]:
        """All modules in which somebody could see a short cut."""
        return modules_below(self.embeddings, self.layers, self.layernorm)

    def plain_road_wanted(self, pixel_values: torch.Tensor, itself: bool = False) -> bool:
        """Whether to call module by module in the order of the paper, see `short_cuts.plain_road_wanted`.

        Args:
            pixel_values: the images.
            itself: whether hooks on this module count as well. They do where it is part of a classifier, which asks
                it for less than all tokens and all images.
        """
        if plain_road_wanted(self._inner_modules(), self._built_of, pixel_values, self if itself else None):
            return True
        # An attention function of somebody's own, which may look at what it is given.
        name = self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        module = getattr(attention, "func", attention).__module__
        return not torch.compiler.is_compiling() and module.split(".")[0] != "transformers"

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        keep_rate: float | Sequence[float] | None = None,
        macs: float | None = None,
        patch_scores: torch.Tensor | Sequence[torch.Tensor] | None = None,
        mix_box: tuple[int, int, int, int] | None = None,
        output_class_attention: bool | Sequence[int] = False,
        prefix_tokens_only: bool = False,
        takes_short_cuts: bool | None = None,
        **kwargs: Any,
    ) -> EViTModelOutput:
        """Run the images through all layers.

        Args:
            pixel_values: (batch_size, num_channels, height, width).
            interpolate_pos_encoding: whether to accept image sizes other than `config.image_size`.
            attention_mask: (batch_size, num_prefix_tokens + num_patches), 0 where a token must not be attended to.
            keep_rate: for this call, instead of what the configuration says: in (0, 1], one number or one for each
                reorganization layer.
            macs: for this call, instead of what the configuration says: share of the dense model's operations, in
                (0, 1].
            patch_scores: (batch_size, num_patches), or one such tensor for each reorganization layer: scores from
                outside, by patch of the original grid, that choose the tokens instead of the class token's attention
                (an oracle, a random baseline, a mask of ones and zeros). That attention still weighs the fused token.
            mix_box: (top, left, height, width) in patches: inside, each image takes the patch tokens of the image
                that mirrors it in the batch (mix-token of LV-ViT, for training). `mix_targets` mixes the labels alike.
            output_class_attention: whether to return the class token's attention to each patch, to look at it or as
                `patch_scores` of a different model: True for the reorganization layers, or a list of zero-based layer
                numbers. At `keep_rate=1.0` it covers all patches.
            prefix_tokens_only: whether only the class token (and distillation token) of the last layer are wanted,
                which then computes nothing else; see `last_layer_queries`.
            takes_short_cuts: what `plain_road_wanted` answered to a classifier, the opposite; asked here if None.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and what the attention takes.

        Returns: `EViTModelOutput`.

        Raises: ValueError for missing images, an empty batch, images of the wrong size, a keep rate out of range,
            operations out of reach, scores or a mask of the wrong shape. TypeError for a misspelt keyword.
        """
        unclaimed = [name for name in kwargs if name not in TransformersKwargs.__annotations__]
        refuse_misspelt_names(unclaimed, FORWARD_KEYWORDS)
        if kwargs.pop("bool_masked_pos", None) is not None:
            raise ValueError("`bool_masked_pos` is for masked image modeling, which needs all patches: take a ViT.")
        if pixel_values is None:
            raise ValueError("`pixel_values` is missing: pass a tensor (batch_size, num_channels, height, width).")
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and pixel_values.shape[0] == 0:
            raise ValueError("`pixel_values` holds no images, got a batch of 0: leave out the call.")
        if takes_short_cuts is None:
            takes_short_cuts = not self._records(kwargs) and not self.plain_road_wanted(pixel_values)
        plan = self.token_plan(keep_rate, macs)
        counts, implementation = plan.inattentive_tokens == "counted", self.config._attn_implementation
        if counts and implementation not in ("eager", "sdpa", "evit_export"):
            raise ValueError(
                f"`attn_implementation` is {implementation!r}, which cannot weigh counted tokens: set 'sdpa' or "
                "'eager', or `inattentive_tokens` 'fused' or 'dropped'."
            )
        layers_to_score = scored_layers(output_class_attention, plan.layers, len(self.layers))
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        asked: dict[str, Any] = {"takes_short_cuts": True} if takes_short_cuts else {}
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding, mix_box, **asked)

        num_prefix_tokens = self.embeddings.num_prefix_tokens
        batch_size, num_patches = hidden_states.shape[0], hidden_states.shape[1] - num_prefix_tokens
        if not interpolate_pos_encoding:  # a plain number while tracing too
            num_patches = self.embeddings.patch_embeddings.num_patches
        plan = plan.for_images(num_patches, self.costs)
        patch_scores = scores_by_layer(patch_scores, plan.layers)
        check_scores(patch_scores, batch_size, num_patches)
        token_mask = self._checked_token_mask(attention_mask, batch_size, num_patches)
        mask = self._attention_mask(hidden_states, token_mask)

        num_image_tokens = num_patches
        tokens = all_patches(batch_size, num_patches, hidden_states.device)
        if counts and token_mask is not None:
            tokens = tokens._replace(token_sizes=(token_mask[:, num_prefix_tokens:] != 0).float())
        kept_patches, class_attention = [], {}
        for i, layer in enumerate(self.layers):
            num_attentive = plan.num_attentive(i, num_image_tokens)
            reorganizes = bool(num_attentive != num_image_tokens)
            asked = {}
            if reorganizes:
                asked = {
                    "num_attentive": num_attentive,
                    "inattentive_tokens": plan.inattentive_tokens,
                    "token_scores": scores_by_patch(patch_scores[i], tokens.patch_index) if patch_scores else None,
                    "token_sizes": tokens.token_sizes,
                    "token_mask": token_mask,
                }
            if prefix_tokens_only and takes_short_cuts and layer is self.layers[-1]:
                asked["num_queries"] = self.last_layer_queries(mask)
            if i in layers_to_score:
                asked.update(score_tokens=True, token_mask=token_mask)
            if takes_short_cuts:
                asked["takes_short_cuts"] = True
            outputs = layer(hidden_states, mask, **asked, **kwargs)
            hidden_states, attention, *choice = outputs if isinstance(outputs, tuple) else (outputs, None)

            if i in layers_to_score:
                class_attention[i] = attention_by_patch(attention, tokens.patch_index, num_patches)
            if i in plan.layers:
                kept_patches.append(
                    follow_patches(tokens.patch_index, choice[0]) if reorganizes else tokens.patch_index
                )
            if not reorganizes:  # a plain ViT layer
                continue
            tokens = follow_tokens(tokens, plan.inattentive_tokens, *choice)
            num_image_tokens = num_attentive + int(plan.inattentive_tokens == "fused")
            if token_mask is not None:
                token_mask = reorganize_token_mask(token_mask, choice[0], num_prefix_tokens, plan.inattentive_tokens)
            if mask is not None or counts:  # flex attention has one without `attention_mask` too, made for one length
                mask = self._attention_mask(hidden_states, token_mask, tokens.token_sizes)

        if counts and tokens.counted_by is None:  # all tokens were kept
            sizes = torch.ones_like(tokens.patch_index, dtype=torch.float32)
            tokens = tokens._replace(token_sizes=sizes, counted_by=tokens.patch_index)
        hidden_states = self.layernorm(hidden_states)
        if prefix_tokens_only:
            hidden_states = hidden_states[:, :num_prefix_tokens]
        return EViTModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=self.pooler(hidden_states) if self.pooler is not None else None,
            attentive_index=tuple(kept_patches),
            patch_index=tokens.patch_index,
            token_sizes=tokens.token_sizes,
            counted_by=tokens.counted_by,
            class_attention=torch.stack([class_attention[i] for i in layers_to_score], dim=1)
            if layers_to_score
            else None,
        )

    def last_layer_queries(self, mask: Any) -> int | None:
        """Tokens that the last layer has to compute when the image tokens are not read: one for the class token.

        Keys and values are those of all tokens, so that the result is exact; queries, projection and MLP of the
        others are work that nobody uses, 5 % of a dense DeiT-S. BENCHMARKS.md has what it saves.

        Args:
            mask: what `_attention_mask` returned: it must be the same for all queries.

        Returns: their number, or None for all tokens.
        """
        is_for_all = mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[2] == 1)
        return self.config.num_prefix_tokens if is_for_all else None

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

    def _attention_mask(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None,
        token_sizes: torch.Tensor | None = None,
    ) -> Any:
        """Mask in the form that the attention implementation wants, for the tokens that are left."""
        mask = None
        # Transformers 5.17 makes a mask of ones while compiling or recording a CUDA graph, and that rules out
        # the fastest kernels.
        if token_mask is not None or self.config._attn_implementation not in ("eager", "sdpa"):
            mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=token_mask
            )
        if token_sizes is None:
            return mask
        bias = log_sizes(token_sizes, self.config.num_prefix_tokens)
        if mask is None:
            return bias
        if mask.dtype == torch.bool:
            return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        return mask + bias


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
        **kwargs: Unpack[EViTForwardKeywords],
    ) -> EViTImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (batch_size, num_channels, height, width).
            labels: (batch_size,) class numbers, or whatever `config.problem_type` asks for; gives `loss`.
            **kwargs: see `EViTModel.forward`; `token_labelling.mix_targets` mixes the labels for `mix_box`.

        Returns: `EViTImageClassifierOutput`.
        """
        outputs = self._backbone_outputs(pixel_values, **kwargs)
        logits = self.classifier(outputs.last_hidden_state[:, 0])
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return EViTImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attentive_index=outputs.attentive_index,
            patch_index=outputs.patch_index,
            token_sizes=outputs.token_sizes,
            counted_by=outputs.counted_by,
            class_attention=outputs.class_attention,
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
        patch_index: see `EViTModelOutput`.
        token_sizes: see `EViTModelOutput`; those of the patches in `attentive_index[-1]`.
        counted_by: see `EViTModelOutput`.
        class_attention: see `EViTModelOutput`.
    """

    cls_logits: torch.Tensor | None = None
    distillation_logits: torch.Tensor | None = None


class EViTForImageClassificationWithTeacher(EViTPreTrainedModel):
    """Distilled EViT: one classifier on the class token, one on the distillation token, as in DeiT.

    In training a distillation loss needs both logits; the answer is their mean.

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
        **kwargs: Unpack[EViTForwardKeywords],
    ) -> EViTForImageClassificationWithTeacherOutput:
        """Classify images; arguments as in `EViTForImageClassification.forward`.

        Returns: `EViTForImageClassificationWithTeacherOutput`.
        """
        outputs = self._backbone_outputs(pixel_values, **kwargs)
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
            patch_index=outputs.patch_index,
            token_sizes=outputs.token_sizes,
            counted_by=outputs.counted_by,
            class_attention=outputs.class_attention,
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
