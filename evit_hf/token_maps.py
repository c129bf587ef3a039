"""Maps over the patch grid: what a model kept, what its class token looked at, what its fused tokens are made of.

For EViT, EViT on LV-ViT and every model that `reorganize` takes. `trace_tokens` runs a model and writes down what each
reorganization layer did; everything else follows from that, without knowing the model.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .reorganization import WITH_CLASS_ROW
from .token_reorganization import append_fused_patch, follow_patches, inattentive_weights
from .tokens_left import token_plan
from .towers import Tower, tower_of


def tokens_on_grid(
    tokens: torch.Tensor, patch_index: torch.Tensor, grid: tuple[int, int], fill: float | torch.Tensor = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that are left, back at their places in the patch grid, and a mask of these places.

    Args:
        tokens: (batch_size, num_image_tokens, ...), features or one number for each image token, prefix excluded.
        patch_index: (batch_size, num_image_tokens), position in the patch grid of each, -1 for a fused token, as in
            the `patch_index` of a model's output.
        grid: rows and columns of patches.
        fill: what fills places whose patch is gone: a number, or a tensor that broadcasts to (batch_size, 1, ...),
            for example the fused token, `tokens[:, -1:]`.

    Returns: (batch_size, rows, columns, ...), through which gradients flow, and (batch_size, rows, columns), True
        where a token is left. A fused token has no place.

    Raises: ValueError for tensors that do not belong together, or positions outside of the grid.

    Example:
        >>> outputs = model(pixel_values)  # an EViTModel, without distillation token
        >>> features, mask = tokens_on_grid(outputs.last_hidden_state[:, 1:], outputs.patch_index, (14, 14))
    """
    num_patches = grid[0] * grid[1]
    if tokens.shape[:2] != patch_index.shape:
        raise ValueError(
            f"`tokens` is {tuple(tokens.shape)} but `patch_index` is {tuple(patch_index.shape)}: leave out the prefix "
            "tokens, and take both from one output."
        )
    if patch_index.numel() and int(patch_index.max()) >= num_patches:
        raise ValueError(
            f"`grid` is {grid[0]}x{grid[1]} but `patch_index` goes up to {int(patch_index.max())}: divide the image's "
            "height and width by those of a patch."
        )
    rest = tokens.shape[2:]
    places = torch.as_tensor(fill, dtype=tokens.dtype, device=tokens.device)
    places = places.expand(tokens.shape[0], num_patches + 1, *rest)
    # Position -1 lands in an extra place, which is cut off again.
    index = torch.where(patch_index < 0, num_patches, patch_index)
    mask = torch.zeros(tokens.shape[0], num_patches + 1, dtype=torch.bool, device=tokens.device)
    mask = mask.scatter(1, index, True)[:, :num_patches]
    index = index.view(*index.shape, *[1] * len(rest)).expand(tokens.shape)
    on_grid = places.scatter(1, index, tokens)[:, :num_patches]
    return on_grid.reshape(tokens.shape[0], *grid, *rest), mask.view(-1, *grid)


@dataclass(frozen=True)
class Stage:
    """What one reorganization layer did with the image tokens of a batch.

    Args:
        layer: its zero-based number.
        patch_index: (batch_size, num_image_tokens), position in the patch grid of the tokens that entered the layer,
            -1 for a fused token.
        attention: (batch_size, num_image_tokens), float32, the class token's attention, see `class_token_attention`.
        attentive_index: (batch_size, num_attentive), positions of the kept ones among these tokens; all of them where
            the layer kept all.
        fuses: whether the others became one token that follows the kept ones.
    """

    layer: int
    patch_index: torch.Tensor
    attention: torch.Tensor
    attentive_index: torch.Tensor
    fuses: bool

    @property
    def reorganizes(self) -> bool:
        """Whether the layer gave up tokens."""
        return self.attentive_index.shape[1] < self.patch_index.shape[1]

    @property
    def kept_patches(self) -> torch.Tensor:
        """Kept tokens as positions in the patch grid, (batch_size, num_attentive), -1 for an earlier fused token."""
        return follow_patches(self.patch_index, self.attentive_index)

    @property
    def patches_left(self) -> torch.Tensor:
        """Positions of the tokens that leave the layer, (batch_size, num_image_tokens_left), -1 for a fused token."""
        return append_fused_patch(self.kept_patches) if self.fuses else self.kept_patches


@dataclass(frozen=True)
class TokenTrace:
    """What the reorganization layers of a model did with a batch of images.

    Args:
        grid: rows and columns of patches.
        stages: one for each reorganization layer, in their order.
        output: what the model answered.
        num_prefix_tokens: tokens before the image tokens.
    """

    grid: tuple[int, int]
    stages: tuple[Stage, ...]
    output: Any
    num_prefix_tokens: int

    def kept(self, stage: int) -> torch.Tensor:
        """Patches that were kept by a stage and all before it, (batch_size, rows, columns), bool.

        Args:
            stage: number among the reorganization layers, from 0 on.
        """
        index = self.stages[stage].kept_patches
        return tokens_on_grid(torch.ones_like(index), index, self.grid)[1]

    def attention(self, stage: int) -> torch.Tensor:
        """The class token's attention in a stage by patch, (batch_size, rows, columns), float32.

        What it pays to a fused token is shared out among the patches in it by their weights, so that given-up patches
        have a value too. Without fused tokens theirs is 0. The sum is what the prefix tokens leave of 1.

        Args:
            stage: number among the reorganization layers, from 0 on.
        """
        made_of = self._made_of(stage)
        made_of = made_of / made_of.sum(dim=2, keepdim=True).clamp(min=torch.finfo(made_of.dtype).tiny)
        return (self.stages[stage].attention.unsqueeze(1) @ made_of).view(-1, *self.grid)

    def fused_weights(self, stage: int) -> torch.Tensor | None:
        """Weight of each patch in the fused token that a stage makes, (batch_size, rows, columns), float32.

        Where an earlier fused token is among the inattentive ones, the weight that it has is followed to the patches
        in it, times theirs. As in the paper weights are not renormalised: they sum to less than 1.

        Args:
            stage: number among the reorganization layers, from 0 on.

        Returns: None where the stage makes no fused token.
        """
        if not self.stages[stage].fuses:
            return None
        return self._after(self.stages[stage], self._made_of(stage))[:, -1].view(-1, *self.grid)

    def _made_of(self, stage: int) -> torch.Tensor:
        """Weight of each patch in each token that enters a stage, (batch_size, num_image_tokens, num_patches)."""
        num_images, num_patches = self.stages[stage].patch_index.shape[0], self.grid[0] * self.grid[1]
        made_of = torch.eye(num_patches, device=self.stages[stage].attention.device).expand(num_images, -1, -1)
        for earlier in self.stages[:stage]:
            made_of = self._after(earlier, made_of)
        return made_of

    @staticmethod
    def _after(stage: Stage, made_of: torch.Tensor, normalizes: bool = False) -> torch.Tensor:
        """The same for the tokens that leave a stage."""
        kept = made_of.gather(1, stage.attentive_index.unsqueeze(2).expand(-1, -1, made_of.shape[2]))
        if not stage.fuses:
            return kept
        weights = inattentive_weights(stage.attention, stage.attentive_index)
        if normalizes:
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return torch.cat((kept, weights.unsqueeze(1) @ made_of), dim=1)


def trace_tokens(
    model: nn.Module,
    pixel_values: torch.Tensor,
    keep_rate: float | Sequence[float] | None = None,
    macs: float | None = None,
    **kwargs: Any,
) -> TokenTrace:
    """Run a model and write down what its reorganization layers do.

    Args:
        model: an EViT, or a model that `reorganize` was called on; in the mode that it is in.
        pixel_values: (batch_size, num_channels, height, width).
        keep_rate: for this call: in (0, 1], one number or one for each reorganization layer. At 1.0 the trace has the
            dense model's attention, and all patches are kept.
        macs: for this call: share of the dense model's operations, in (0, 1].
        **kwargs: for the model's forward.

    Raises: ValueError for a model that does not reorganize tokens of pictures.
    """
    tower = tower_of(model)
    if not tower.is_reorganized:
        raise ValueError(f"`{type(model).__name__}` gives up no tokens: call `reorganize(model)` first.")
    grid = tower.patch_grid(pixel_values.shape[-2:])
    stages: list[Stage] = []
    layers = token_plan(tower.config, len(tower.layers), keep_rate, macs).layers
    with _Follower(tower, stages.append, wants_attention=True, layers=layers):
        output = model(pixel_values, keep_rate=keep_rate, macs=macs, **kwargs)
    return TokenTrace(grid, tuple(stages), output, tower.num_prefix_tokens)


def attention_rollout(
    model: nn.Module, pixel_values: torch.Tensor, keep_rate: float | Sequence[float] | None = None
) -> torch.Tensor:
    """Attention rollout: where the class token's answer comes from, by patch, through all layers.

    The rows of the product of all layers' attention, each averaged with the identity for its residual, follow the
    kept tokens; that of a fused token is the average of its tokens' rows by their weights.

    Args:
        model: an EViT, or a model that `reorganize` was called on, with `attn_implementation="eager"`.
        pixel_values: (batch_size, num_channels, height, width).
        keep_rate: see `trace_tokens`.

    Returns: (batch_size, rows, columns), float32; the sum is what the prefix tokens leave of 1.

    Raises: ValueError for a model that gives no attention maps.

    Source: "Quantifying Attention Flow in Transformers", arXiv 2005.00928.
    """
    tower = tower_of(model)
    implementation = getattr(tower.config, "_attn_implementation", None)
    if implementation not in ("eager", WITH_CLASS_ROW["eager"]):
        raise ValueError(
            f"`attn_implementation` is {implementation!r}, which gives no attention maps: load the model with "
            "`attn_implementation='eager'`."
        )
    trace = trace_tokens(model, pixel_values, keep_rate, output_attentions=True)
    attentions = getattr(trace.output, "attentions", None) or ()
    if len(attentions) != len(tower.layers):
        raise ValueError(f"`{type(model).__name__}` gives no attention maps: it has no rollout.")
    stages, num_prefix = {stage.layer: stage for stage in trace.stages}, trace.num_prefix_tokens
    num_tokens = attentions[0].shape[-1]
    rows = torch.eye(num_tokens, device=pixel_values.device).expand(pixel_values.shape[0], -1, -1)
    for number, attention in enumerate(attentions):
        mean = attention.float().mean(dim=1)
        rows = (mean @ rows + rows) / 2
        if number in stages:
            image_rows = trace._after(stages[number], rows[:, num_prefix:], normalizes=True)
            rows = torch.cat((rows[:, :num_prefix], image_rows), dim=1)
    return rows[:, 0, num_prefix:].reshape(-1, *trace.grid)


class ReshapeTransform:
    """`reshape_transform` for pytorch-grad-cam: what a module gives for each token, back on the patch grid.

    It follows the tokens of each forward pass by hooks on the layers, so that activations and gradients of kept tokens
    land where their patches are. Places whose patch is gone are 0, as are the class and fused tokens, which have none.
    Target modules see whole tokens: a norm in front of the attention, or an MLP.

    Args:
        model: an EViT, or a model that `reorganize` was called on, perhaps inside a module that returns its logits.

    Raises: ValueError for a model that does not reorganize.

    Example:
        >>> from pytorch_grad_cam import GradCAM
        >>> class Logits(torch.nn.Module):
        ...     def __init__(self, model):
        ...         super().__init__()
        ...         self.model = model
        ...     def forward(self, pixel_values):
        ...         return self.model(pixel_values).logits
        >>> target = model.vit.layers[-1].layernorm_before
        >>> cam = GradCAM(Logits(model), [target], reshape_transform=ReshapeTransform(model))
        >>> heat = cam(pixel_values)  # (batch_size, height, width)
    """

    def __init__(self, model: nn.Module) -> None:
        tower = tower_of(model)
        if not tower.is_reorganized:
            raise ValueError(f"`{type(model).__name__}` gives up no tokens: call `reorganize(model)` first.")
        self._patch_grid, self._num_prefix_tokens = tower.patch_grid, tower.num_prefix_tokens
        self._grid = (0, 0)
        # Patch positions of this forward's tokens by their number, which shrinks with each reorganization.
        self._patches: dict[int, torch.Tensor] = {}
        begins = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._handles = [begins, *_Follower(tower, self._follow).handles]

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Put tokens on the grid.

        Args:
            tokens: (batch_size, num_prefix_tokens + num_image_tokens, num_features), of a layer in the last
                forward.

        Returns: (batch_size, num_features, rows, columns).

        Raises: ValueError if no layer had this many tokens.
        """
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        patch_index = self._patches.get(tokens.shape[1])
        if patch_index is None or len(patch_index) != len(tokens):
            raise ValueError(
                f"`tokens` is {tuple(tokens.shape)}, which is not what a layer was given in the last forward pass: "
                "for target modules take norms in front of the attention (`layernorm_before`, `norm1`)."
            )
        image_tokens = tokens[:, self._num_prefix_tokens :]
        return tokens_on_grid(image_tokens, patch_index.to(tokens.device), self._grid)[0].permute(0, 3, 1, 2)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixel_values = args[0] if args else next(kwargs[name] for name in ("pixel_values", "x") if name in kwargs)
        self._grid = self._patch_grid(pixel_values.shape[-2:])
        num_patches = self._grid[0] * self._grid[1]
        every = torch.arange(num_patches, device=pixel_values.device).expand(len(pixel_values), -1)
        self._patches = {self._num_prefix_tokens + num_patches: every}

    def _follow(self, stage: Stage) -> None:
        left = stage.patches_left
        self._patches[self._num_prefix_tokens + left.shape[1]] = left


class _Follower:
    """Hooks on the reorganization layers of a tower that tell of each stage of a forward pass.

    Args:
        tower: of the model.
        tell: is called with a stage when its layer is done.
        wants_attention: whether all stages must have their attention, also those that keep all tokens.
        layers: that reorganize; by default those of the configuration.
    """

    def __init__(
        self,
        tower: Tower,
        tell: Callable[[Stage], None],
        wants_attention: bool = False,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.tower, self.tell, self.wants_attention = tower, tell, wants_attention
        self.layers = tower.config.reorganization_layers if layers is None else layers
        self.handles = []
        for number in self.layers:
            layer = tower.layers[number]
            self.handles += [
                layer.register_forward_pre_hook(functools.partial(self._before, number), with_kwargs=True),
                layer.register_forward_hook(functools.partial(self._after, number), with_kwargs=True),
            ]
        self._patch_index: torch.Tensor | None = None

    def __enter__(self) -> "_Follower":
        """Follow."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def _before(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Ask for the class token's attention."""
        tokens = kwargs.get("tokens")
        if number == self.layers[0]:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            num_images, length = hidden_states.shape[:2]
            patches = torch.arange(length - self.tower.num_prefix_tokens, device=hidden_states.device)
            self._patch_index = patches.expand(num_images, -1)
        if not self.wants_attention:
            return args, kwargs
        if tokens is None:
            return args, {**kwargs, "score_tokens": True}
        if number not in tokens.scored_layers:  # a reorganized model of a family
            tokens.scored_layers = (*tokens.scored_layers, number)
        return args, kwargs

    def _after(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Tell what the layer did."""
        tokens, patch_index = kwargs.get("tokens"), self._patch_index
        if tokens is not None:
            hidden_states, attention = output, tokens.class_attention.get(number)
            index = tokens.chosen.get(number)
        else:
            hidden_states, attention, *choice = output if isinstance(output, tuple) else (output, None)
            index = choice[0] if choice else None
        if index is None:  # all are kept
            index = torch.arange(patch_index.shape[1], device=patch_index.device).expand(len(patch_index), -1)
        fuses = hidden_states.shape[1] > self.tower.num_prefix_tokens + index.shape[1]
        stage = Stage(number, patch_index, attention.detach() if self.wants_attention else attention, index, fuses)
        self._patch_index = stage.patches_left
        self.tell(stage)


__all__ = ["ReshapeTransform", "Stage", "TokenTrace", "attention_rollout", "tokens_on_grid", "trace_tokens"]
