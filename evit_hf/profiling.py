"""What a model that reorganizes costs: multiply-accumulate operations, by formula and counted."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .configuration_evit import EViTConfig, height_and_width
from .configuration_evit_lv import EViTLVConfig
from .short_cuts import short_cuts_counted
from .token_reorganization import TowerCosts
from .tokens_left import TokenPlan, token_plan
from .towers import example_inputs, tower_of


KeepRates = float | Sequence[float] | dict[int, float] | None


def num_tokens_by_layer(
    config: EViTConfig,
    keep_rate: float | list[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
    macs: float | None = None,
) -> list[tuple[int, int]]:
    """Tokens that each layer's attention and MLP see.

    Args:
        config: the model's configuration.
        keep_rate: instead of the configuration's: in (0, 1], one number or one for each reorganization layer.
        image_size: pixels, (height, width) or one number for both, instead of `config.image_size`.
        macs: instead of the configuration's: share of the dense model's operations, in (0, 1].

    Returns: (tokens in attention, tokens in the MLP) of each layer, prefix tokens included. DeiT-S at keep rate 0.7
        with fusion has 197 tokens before the first reorganization and 140, 100, 72 after the three.
    """
    return [(before, after) for before, after, _ in _token_counts(config, keep_rate, image_size, macs)[0]]


def _token_counts(
    config: EViTConfig,
    keep_rate: float | list[float] | None,
    image_size: int | tuple[int, int] | None,
    macs: float | None,
) -> tuple[list[tuple[int, int, bool]], str]:
    """See `_tokens_by_layer`, and what becomes of the inattentive tokens."""
    rows, columns = config.patch_grid(image_size)
    plan = token_plan(config, config.num_hidden_layers, keep_rate, macs)
    return _tokens_by_layer(plan, rows * columns, config.costs), plan.inattentive_tokens


def _tokens_by_layer(plan: TokenPlan, num_image_tokens: int, costs: TowerCosts) -> list[tuple[int, int, bool]]:
    """Tokens in attention and in the MLP of each layer, and whether it reorganizes: it may fuse just one token."""
    plan = plan.for_images(num_image_tokens, costs)
    num_tokens = []
    for i in range(costs.num_layers):
        before = num_image_tokens
        num_attentive = plan.num_attentive(i, before)
        if num_attentive < before:
            num_image_tokens = num_attentive + (plan.inattentive_tokens == "fused")
        after = costs.num_prefix_tokens + num_image_tokens
        num_tokens.append((costs.num_prefix_tokens + before, after, num_attentive < before))
    return num_tokens


def num_macs(
    config: EViTConfig | nn.Module,
    keep_rate: float | list[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
    executed: bool = False,
    macs: float | None = None,
) -> int:
    """Multiply-accumulate operations of one image through the classifier, by formula.

    Counted are the patch embedding (with LV-ViT's stem), the attention layers (3 T d^2 for query, key and value,
    2 T^2 d for the map and its product with the values, T d^2 for the projection), the MLP (2 T' d m) and the
    classifiers, as the official code counts them; norms, activations, softmax and the reorganization itself (below
    0.1 %; 0.2 % where tokens are counted) are not. T and T' are the tokens before and after the reorganization.

    Args:
        config: the configuration of an EViT; or a model, EViT or reorganized, see `MacsFormula`.
        keep_rate: instead of the configuration's: in (0, 1], one number or one for each reorganization layer.
        image_size: pixels, (height, width) or one number for both, instead of the model's own.
        executed: count what this code actually runs under sdpa when nobody looks inside (see `short_cuts`): after the
            last attention only the prefix tokens (LV-ViT reads all of them), no output projection of tokens that are
            given up, the class token's row of attention, the sums of the inattentive tokens or, where those are
            counted, the comparison of tokens.
        macs: instead of the configuration's: share of the dense model's operations, in (0, 1].

    Returns: MACs; divide by 1e9 for GMACs. DeiT-S: 4.60 GMACs dense, 3.03 at keep rate 0.7 with fusion, 2.31 at 0.5,
        the 4.6, 3.0 and 2.3 of the paper. Executed are 4.28, 2.90 and 2.25.
    """
    if isinstance(config, nn.Module):
        return MacsFormula.of(config, image_size)(keep_rate, executed, macs)
    num_tokens, inattentive_tokens = _token_counts(config, keep_rate, image_size, macs)
    hidden_size, num_prefix_tokens = config.hidden_size, config.num_prefix_tokens
    size = height_and_width(config.image_size if image_size is None else image_size)
    operations = _patch_embedding_macs(config, *size)
    for i, (attention_tokens, mlp_tokens, reorganizes) in enumerate(num_tokens):
        is_last = i + 1 == len(num_tokens)
        num_queries = attention_tokens
        left = mlp_tokens
        if executed and is_last and not isinstance(config, EViTLVConfig):
            num_queries = mlp_tokens = num_prefix_tokens
        projects_late = executed and inattentive_tokens != "counted"  # averaging comes after the projection
        num_projected = min(num_queries, mlp_tokens) if projects_late else num_queries
        operations += (2 * attention_tokens + num_queries + num_projected) * hidden_size**2
        operations += 2 * num_queries * attention_tokens * hidden_size
        operations += 2 * mlp_tokens * hidden_size * config.intermediate_size
        if executed and reorganizes:
            operations += config.num_scoring_tokens * attention_tokens * hidden_size
            num_image_tokens, num_given_up = attention_tokens - num_prefix_tokens, attention_tokens - left
            # After the last attention tokens are chosen only. They are fused before and after the output projection.
            summed = 0 if is_last and not isinstance(config, EViTLVConfig) else hidden_size
            times = 2 if inattentive_tokens == "fused" else 1
            operations += times * _reorganization_macs(
                inattentive_tokens, num_image_tokens, num_given_up, summed, config.costs.key
            )
    # One classifier for each prefix token and, in LV-ViT, for every image token that is left.
    num_classified = num_tokens[-1][1] if isinstance(config, EViTLVConfig) else num_prefix_tokens
    return operations + num_classified * hidden_size * config.num_labels


@dataclass(frozen=True)
class MacsFormula:
    """Multiply-accumulate operations of one image through a model, as a function of its keep rates.

    For an EViT it is `num_macs`. Of other models that reorganize, PyTorch counts one dense forward pass, since each
    family has its own embeddings and classifiers; what the layers save follows from their weights.

    Args:
        model: which one, for its settings.
        image_size: pixels, (height, width) or one number for both; None for the model's own.
        outside: operations of the whole image that are neither in the layers nor in the patch embedding; 0 for an
            EViT.
        num_image_tokens: of the whole image; 0 for an EViT.
        pooled: of the operations outside, those for each image token that is left: attention pooling has some.
    """

    model: nn.Module
    image_size: int | Sequence[int] | None
    outside: int = 0
    num_image_tokens: int = 0
    pooled: int = 0

    @classmethod
    def of(cls, model: nn.Module, image_size: int | Sequence[int] | None = None) -> "MacsFormula":
        """Build the formula of a model; one of a family runs once, on one image.

        Args:
            model: an EViT, or a model that `reorganize` was called on.
            image_size: pixels, (height, width) or one number for both; by default the model's own.

        Raises: ValueError for a model that does not reorganize, or images that it does not take.
        """
        if isinstance(getattr(model, "config", None), EViTConfig):
            return cls(model, image_size)
        tower, lengths = tower_of(model), []
        if not tower.is_reorganized:
            raise ValueError(f"`{type(model).__name__}` gives up no tokens: call `reorganize(model)` first.")
        handle = tower.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        try:
            macs = count_macs(model, example_inputs(model, image_size), keep_rate=1.0)
        except (AssertionError, RuntimeError, ValueError) as error:
            size = "images of its own size" if image_size is None else f"images of {image_size} pixels"
            raise ValueError(f"`{type(model).__name__}` does not take {size}: {error}") from None
        finally:
            handle.remove()
        num_image_tokens = lengths[0] - tower.num_prefix_tokens
        outside = macs - tower.costs.macs(num_image_tokens, {})
        return cls(model, image_size, outside, num_image_tokens, _pooling_macs(tower.owner))

    def __call__(self, keep_rate: KeepRates = None, executed: bool = False, macs: float | None = None) -> int:
        """Multiply-accumulate operations of an image.

        Args:
            keep_rate: in (0, 1], one number or one for each reorganization layer; with other layers than the model's,
                a dictionary of rates by layer number; by default the model's own.
            executed: see `num_macs`; without short cuts these are the class token's row of attention, and the sums of
                the inattentive tokens or the comparison of tokens.
            macs: share of the dense model's operations, in (0, 1]; by default the model's own.
        """
        if isinstance(self.model.config, EViTConfig):
            config = self.model.config
            if isinstance(keep_rate, dict):
                config, rates = copy.deepcopy(config), keep_rate
                config.keep_rate, config.reorganization_layers = 1.0, sorted(rates)
                keep_rate = [rates[layer] for layer in sorted(rates)]
            return num_macs(config, keep_rate, self.image_size, executed, macs)
        tower = tower_of(self.model)
        costs = tower.costs
        if isinstance(keep_rate, dict):
            plan = TokenPlan(sorted(keep_rate), tower.config.inattentive_tokens, keep_rate, None)
        else:
            plan = token_plan(tower.config, costs.num_layers, keep_rate, macs)
        num_tokens = _tokens_by_layer(plan, self.num_image_tokens, costs)
        left = {i: after - costs.num_prefix_tokens for i, (_, after, _) in enumerate(num_tokens)}
        operations = self.outside + costs.macs(self.num_image_tokens, left)
        if plan.inattentive_tokens != "counted":  # those are pooled on the whole grid
            operations -= (self.num_image_tokens - left[costs.num_layers - 1]) * self.pooled
        for before, after, reorganizes in num_tokens:
            if executed and reorganizes:
                operations += tower.num_scoring_tokens * before * costs.pair // 2
                operations += _reorganization_macs(
                    plan.inattentive_tokens,
                    before - costs.num_prefix_tokens,
                    before - after,
                    costs.pair // 2,
                    costs.key,
                )
        return operations


def _pooling_macs(owner: nn.Module) -> int:
    """Operations of timm's attention pooling for each token: its key and value, and what the latents do with them."""
    pool = getattr(owner, "attn_pool", None)
    if pool is None:
        return 0
    return pool.kv.in_features * pool.kv.out_features + pool.latent_len * pool.kv.out_features


def _reorganization_macs(
    inattentive_tokens: str, num_image_tokens: int, num_given_up: int, hidden_size: int, key_size: int
) -> int:
    """Operations of one layer's fused token, or of comparing and averaging tokens."""
    if inattentive_tokens == "fused":
        return num_image_tokens * hidden_size
    if inattentive_tokens == "counted":
        num_kept = num_image_tokens - num_given_up
        num_averaged = min(num_kept, num_given_up)
        return (num_image_tokens**2 + num_kept * num_given_up) * key_size + num_averaged * num_given_up * hidden_size
    return 0


def keep_rate_for_macs(
    config: EViTConfig, macs: float, image_size: int | tuple[int, int] | None = None, decimals: int = 1
) -> float:
    """Highest keep rate at which a model costs no more than a number of multiply-accumulate operations.

    Args:
        config: the model's configuration; its own keep rate is ignored.
        macs: operations of one image, for example `num_macs(config, 1.0, 224)`.
        image_size: pixels, (height, width) or one number for both, instead of `config.image_size`.
        decimals: of the keep rate.

    Returns: a rate in (0, 1], the same for all reorganization layers. What DeiT-S costs at 224 pixels, it costs at
        272, 288 and 304 pixels at keep rates 0.7, 0.6 and 0.5, the paper's three.

    Raises: ValueError if even the lowest rate costs more.
    """
    steps = 10**decimals
    for i in range(steps, 0, -1):
        if num_macs(config, i / steps, image_size) <= macs:
            return i / steps
    size = config.image_size if image_size is None else image_size
    lowest = num_macs(config, 1 / steps, image_size)
    raise ValueError(
        f"No keep rate brings the model down to {macs / 1e9:.2f} GMACs: at `image_size` {size} it costs "
        f"{lowest / 1e9:.2f} even at {1 / steps}. Take smaller images."
    )


def _patch_embedding_macs(config: EViTConfig, height: int, width: int) -> int:
    """Multiply-accumulate operations from the image to its patches."""
    patch_height, patch_width = height_and_width(config.patch_size)
    rows, columns = config.patch_grid((height, width))
    num_patches = rows * columns
    if not isinstance(config, EViTLVConfig):
        return num_patches * config.hidden_size * config.num_channels * patch_height * patch_width
    stem = config.stem_hidden_size
    stem_pixels = -(-height // 2) * -(-width // 2)
    convolutions = stem_pixels * stem * (7 * 7 * config.num_channels + 2 * 3 * 3 * stem)
    return convolutions + num_patches * config.hidden_size * stem * (patch_height // 2) * (patch_width // 2)


def count_macs(model: nn.Module, pixel_values: torch.Tensor, **kwargs: object) -> int:
    """Multiply-accumulate operations that one forward actually runs, counted by PyTorch for the whole batch.

    Args:
        model: any image model; it runs once, in evaluation mode, without gradients.
        pixel_values: (batch_size, num_channels, height, width).
        **kwargs: handed to the model, for example `keep_rate=0.5`.

    Returns: MACs of matrix products and convolutions, half of the FLOPs of `torch.utils.flop_counter`. For an EViT
        those of its short cuts, which it takes when nobody counts; your own counter sees the paper's order.
    """
    was_training = model.training
    counter = FlopCounterMode(display=False)
    # The counter asks for gradients of a parameter that is itself the input of a module, as latents of timm are.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad = False
        # As plain matrix products attention is counted by every version of PyTorch; 2.7 overlooks its kernel for CPUs.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), short_cuts_counted(), counter:
            model.eval()(pixel_values, **kwargs)
    finally:
        for parameter in trained:
            parameter.requires_grad = True
        model.train(was_training)
    return counter.get_total_flops() // 2


__all__ = ["MacsFormula", "count_macs", "keep_rate_for_macs", "num_macs", "num_tokens_by_layer"]
