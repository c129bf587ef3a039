"""Ways to give up tokens without training, compared on one model at equal operations: `evit evaluate --compare`.

The recipe for models that were not trained to lose tokens (`macs=`: class attention times novelty chooses, what is
given up is counted) next to the paper's ways, to itself without one of its parts, and to ToMe. What no setting of a
model says is put in the place of the functions of `token_reorganization` while a forward pass runs, so that models
know nothing of it and nothing of it is saved.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from evit_hf import modeling_evit, reorganization, reorganization_timm, reorganize, token_reorganization
from evit_hf.configuration_evit import default_reorganization_layers
from evit_hf.profiling import MacsFormula
from evit_hf.token_reorganization import TokenChoice
from evit_hf.towers import tower_of

from ..learning.models import heads_of
from .metrics import standard_error
from .tuning import uniform


Choose = Callable[..., TokenChoice]
DEFAULT_MACS = (0.66, 0.5)
REFERENCE = "ToMe"


@dataclass(frozen=True)
class Way:
    """One way to give up tokens.

    Args:
        inattentive_tokens: setting of the model.
        in_papers_layers: whether three layers keep the same share of tokens, as in the paper; otherwise every layer
            gives up the same number.
        functions: what is put in the place of functions of `token_reorganization`, by their names.
    """

    inattentive_tokens: str = "counted"
    in_papers_layers: bool = False
    functions: dict[str, Any] | None = None


def by_attention(attention: torch.Tensor, num_attentive: int, **keywords: Any) -> TokenChoice:
    """Choose by class attention, without novelty; see `token_reorganization.choose_tokens`."""
    return token_reorganization.choose_tokens(attention, num_attentive, **{**keywords, "token_scores": attention})


def by_lowest_attention(attention: torch.Tensor, num_attentive: int, **keywords: Any) -> TokenChoice:
    """Choose the tokens that the class token attends to least."""
    return token_reorganization.choose_tokens(attention, num_attentive, **{**keywords, "token_scores": -attention})


class AtRandom:
    """Choose at random, the same tokens in every run.

    Args:
        seed: of the generator.
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, attention: torch.Tensor, num_attentive: int, **keywords: Any) -> TokenChoice:
        """Choose, see `token_reorganization.choose_tokens`."""
        scores = torch.rand(attention.shape, generator=self.generator).to(attention.device)
        return token_reorganization.choose_tokens(attention, num_attentive, **{**keywords, "token_scores": scores})


def whole_map(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    token_mask: torch.Tensor | None = None,
    num_scoring_tokens: int = 1,
    position_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """All rows of the attention map, see `token_reorganization.class_token_probabilities`.

    Returns: (batch_size, num_heads, sequence_length, sequence_length), after softmax.
    """
    return token_reorganization.class_token_probabilities(
        query, key, scaling, token_mask, query.shape[2], position_bias
    )


def received_attention(
    attention_probabilities: torch.Tensor, num_prefix_tokens: int = 1, num_scoring_tokens: int = 1
) -> torch.Tensor:
    """Attention that each image token receives, averaged over heads and queries, instead of the class token's.

    Args:
        attention_probabilities: (batch_size, num_heads, sequence_length, sequence_length), after softmax.
        num_prefix_tokens: tokens before the image tokens.
        num_scoring_tokens: not used: all tokens look.

    Returns: (batch_size, num_image_tokens), float32.
    """
    return attention_probabilities[..., num_prefix_tokens:].float().mean(dim=(1, 2))


def merged_pairs(
    attention: torch.Tensor | None,
    num_attentive: int,
    *,
    num_prefix_tokens: int = 1,
    keys: torch.Tensor,
    token_sizes: torch.Tensor | None = None,
    **keywords: Any,
) -> TokenChoice:
    """Pairs that ToMe merges: of every other token the most similar one among the rest, the most similar pairs first.

    At most half of the tokens can be merged in a layer.

    Args:
        attention: not used.
        num_attentive: tokens that are left.
        num_prefix_tokens: tokens before the image tokens, which are never merged.
        keys: see `token_reorganization.mean_keys`.
        token_sizes: see `token_reorganization.CountedTokens`.
        **keywords: not used.

    Returns: a choice whose kept tokens become the mean, weighted by size, of themselves and what they count, see
        `merged_tokens`.

    Raises: ValueError if more than half of the tokens are to go.

    Source: "Token Merging: Your ViT But Faster", arXiv 2210.09461, written from the paper.
    """
    (batch_size, num_tokens), device = keys.shape[:2], keys.device
    num_merged, num_first = num_tokens - num_attentive, (num_tokens + 1) // 2
    if num_merged > num_first:
        raise ValueError(f"ToMe merges at most half of {num_tokens} tokens in a layer, not {num_merged}.")
    position = torch.arange(num_tokens, device=device)
    first, second = position[0::2], position[1::2]
    alike, partner = (keys[:, first] @ keys[:, second].transpose(1, 2)).max(dim=2)
    ranked = alike.argsort(dim=1, descending=True, stable=True)
    merged, single = ranked[:, :num_merged], ranked[:, num_merged:].sort(dim=1).values
    order = torch.cat((first[single], second.expand(batch_size, -1), first[merged]), dim=1)
    into = single.shape[1] + partner.gather(1, merged)  # position among the kept tokens
    sizes = torch.ones_like(keys[:, :, 0]) if token_sizes is None else token_sizes
    return token_reorganization.counted_choice(order, into, sizes, num_prefix_tokens)


def merged_tokens(attentive: torch.Tensor, inattentive: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The mean, weighted by size, of each kept token and what it counts; see `averaged_tokens`."""
    shares = shares.to(attentive.dtype)
    return attentive * (1 - shares.sum(dim=2, keepdim=True)) + shares @ inattentive.to(attentive.dtype)


def untouched_tokens(attentive: torch.Tensor, inattentive: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Kept tokens as they are."""
    return attentive


def replacements() -> dict[str, dict[str, Any]]:
    """What chooses or merges tokens in another way, by name: functions for those of `token_reorganization`."""
    return {
        "ToMe": {"choose_tokens": merged_pairs, "averaged_tokens": merged_tokens},
        "without novelty": {"choose_tokens": by_attention},
        "attention received": {"class_token_probabilities": whole_map, "class_token_attention": received_attention},
        "random": {"choose_tokens": AtRandom()},
        "lowest attention": {"choose_tokens": by_lowest_attention},
    }


def all_ways() -> dict[str, Way]:
    """All ways, by their names in tables."""
    functions = replacements()
    return {
        REFERENCE: Way(functions=functions["ToMe"]),
        "counted (macs=)": Way(),
        "counted, kept tokens untouched": Way(functions={"averaged_tokens": untouched_tokens}),
        "counted, without novelty": Way(functions=functions["without novelty"]),
        "counted, attention received": Way(functions=functions["attention received"]),
        "counted, random": Way(functions=functions["random"]),
        "counted, lowest attention": Way(functions=functions["lowest attention"]),
        "dropped in every layer": Way("dropped"),
        "dropped in three layers": Way("dropped", in_papers_layers=True),
        "fused in three layers (EViT)": Way("fused", in_papers_layers=True),
    }


@contextmanager
def in_place(functions: dict[str, Any]) -> Iterator[None]:
    """Let models call other functions than those of `token_reorganization`, by the names that they import.

    Args:
        functions: by name.
    """
    users = (modeling_evit, reorganization, reorganization_timm)
    before = []
    for name, function in functions.items():
        # Those that the functions here call themselves, by their module, stay the real ones there.
        is_called_here = name in ("choose_tokens", "class_token_probabilities")
        for module in users if is_called_here else (*users, token_reorganization):
            if hasattr(module, name):
                before.append((module, name, getattr(module, name)))
                setattr(module, name, function)
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


@dataclass(frozen=True)
class Comparison:
    """One way at one budget, in numbers over images; differences are paired and have their standard error.

    Args:
        way: its name.
        macs: share of the dense model's operations that was asked for.
        gmacs: of an image, by the paper's count: what comparing tokens costs is not in it.
        top1: share of right answers.
        top1_minus_dense: difference to the dense model, and its standard error.
        agreement: share of images with the dense model's answer, and its standard error.
        agreement_minus_tome: difference to ToMe, and its standard error; None where ToMe cannot run.
        cosine: mean cosine between features and those of the dense model, after the mean of the dense model's
            features is taken off, and its standard error.
        cosine_minus_tome: difference to ToMe, and its standard error.
    """

    way: str
    macs: float
    gmacs: float
    top1: float
    top1_minus_dense: tuple[float, float]
    agreement: tuple[float, float]
    agreement_minus_tome: tuple[float, float] | None
    cosine: tuple[float, float]
    cosine_minus_tome: tuple[float, float] | None


@dataclass(frozen=True)
class Comparisons:
    """All ways at all budgets.

    Args:
        num_images: images.
        dense_top1: share of right answers of the dense model.
        dense_gmacs: its operations.
        rows: by budget.
        left_out: ways that cannot run at a budget, with the reason.
    """

    num_images: int
    dense_top1: float
    dense_gmacs: float
    rows: list[Comparison]
    left_out: list[str]

    def as_json(self) -> dict[str, Any]:
        """All numbers."""
        return asdict(self)

    def table(self) -> str:
        """All numbers as text, a line for each way."""
        lines = [
            f"{self.num_images} images; dense: top-1 {100 * self.dense_top1:.2f} %, {self.dense_gmacs:.4f} GMACs; "
            "± is one standard error, of the paired difference where it is one",
            f"{'MACs':<6}{'':<32}{'GMACs':>9}{'top-1 %':>9}{'- dense':>15}{'as dense %':>12}{'- ToMe':>15}"
            f"{'cosine':>9}{'- ToMe':>19}",
        ]
        for row in self.rows:
            lines.append(
                f"{row.macs:<6}{row.way:<32}{row.gmacs:>9.4f}{100 * row.top1:>9.2f}"
                f"{_difference(row.top1_minus_dense, 100, 2):>15}{100 * row.agreement[0]:>12.2f}"
                f"{_difference(row.agreement_minus_tome, 100, 2):>15}{row.cosine[0]:>9.4f}"
                f"{_difference(row.cosine_minus_tome, 1, 4):>19}"
            )
        return "\n".join([*lines, *self.left_out])


def _difference(pair: tuple[float, float] | None, scale: float, digits: int) -> str:
    if pair is None:
        return "-"
    return f"{scale * pair[0]:+.{digits}f} ± {scale * pair[1]:.{digits}f}"


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean over images, and its standard error.

    Args:
        values: (num_images,).
    """
    error = standard_error(values.double().tolist())
    return values.double().mean().item(), math.nan if error is None else error


@dataclass(frozen=True)
class Answers:
    """What the dense model and each way at each budget answered.

    Args:
        labels: (num_images,), class numbers.
        outputs: logits (num_images, num_labels) and features (num_images, num_features) of "dense" and of each
            (budget, name of the way).
        gmacs: operations of the same.
        left_out: (budget, name of the way) that cannot run, with the reason.
    """

    labels: torch.Tensor
    outputs: dict[Any, tuple[torch.Tensor, torch.Tensor]]
    gmacs: dict[Any, float]
    left_out: dict[Any, str]

    def in_numbers(self) -> Comparisons:
        """The ways compared with the dense model and with ToMe."""
        logits, features = self.outputs["dense"]
        dense_answers, mean = logits.argmax(dim=1), features.mean(dim=0)
        per_image = {}
        for key, (logits, found) in self.outputs.items():
            guess = logits.argmax(dim=1)
            cosine = nn.functional.cosine_similarity(found - mean, features - mean, dim=1)
            per_image[key] = ((guess == self.labels).double(), (guess == dense_answers).double(), cosine)
        dense_right = per_image.pop("dense")[0]
        rows = []
        for key, (right, agrees, cosine) in per_image.items():
            tome = per_image.get((key[0], REFERENCE))
            rows.append(
                Comparison(
                    way=key[1],
                    macs=key[0],
                    gmacs=self.gmacs[key],
                    top1=right.mean().item(),
                    top1_minus_dense=mean_and_error(right - dense_right),
                    agreement=mean_and_error(agrees),
                    agreement_minus_tome=None if tome is None else mean_and_error(agrees - tome[1]),
                    cosine=mean_and_error(cosine),
                    cosine_minus_tome=None if tome is None else mean_and_error(cosine - tome[2]),
                )
            )
        return Comparisons(
            num_images=len(self.labels),
            dense_top1=dense_right.mean().item(),
            dense_gmacs=self.gmacs["dense"],
            rows=rows,
            left_out=list(self.left_out.values()),
        )


@torch.no_grad()
def compare_ways(
    model: PreTrainedModel,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    macs: Iterable[float] = DEFAULT_MACS,
    ways: dict[str, Way] | None = None,
    autocast: Any = None,
) -> Answers:
    """Run the dense model, and each way to give up tokens at each budget, on the same images.

    Args:
        model: a classifier that reorganizes, in evaluation mode on its device; afterwards it has other settings.
        batches: images on that device, and class numbers.
        macs: shares of the dense model's operations.
        ways: by name; by default all.
        autocast: returns a context for the forward passes.

    Raises: ValueError if there are no images, or no way can run.
    """
    ways, autocast = all_ways() if ways is None else ways, autocast or contextlib.nullcontext
    budgets, labels = list(macs), []
    settings: dict[Any, dict[str, Any]] = {}
    outputs: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {"dense": []}
    gmacs, left_out = dict[Any, float](), dict[Any, str]()
    with _features_of(model) as features_of:
        for pixel_values, numbers in batches:
            if not settings:
                formula = MacsFormula.of(model, tuple(pixel_values.shape[-2:]))
                settings = {
                    (m, name): _settings(model, way, m, formula) for m in budgets for name, way in ways.items()
                }
                outputs |= {key: [] for key in settings}
                gmacs = {key: _gmacs(model, formula, chosen) for key, chosen in settings.items()}
                gmacs["dense"] = formula(1.0) / 1e9
            labels.append(numbers.cpu())
            with autocast():
                outputs["dense"].append(features_of(pixel_values, keep_rate=1.0))
                for key, chosen in settings.items():
                    if key in left_out:
                        continue
                    way = ways[key[1]]
                    reorganize(model, **chosen)
                    try:
                        with in_place(way.functions or {}):
                            outputs[key].append(features_of(pixel_values))
                    except ValueError as error:
                        left_out[key] = f"{key[0]:<6}{key[1]}: {error}"
    if not labels:
        raise ValueError("There is no image to compare on.")
    joined = {key: _joined(batches) for key, batches in outputs.items() if key not in left_out}
    return Answers(torch.cat(labels), joined, gmacs, left_out)


def _settings(model: PreTrainedModel, way: Way, macs: float, formula: MacsFormula) -> dict[str, Any]:
    """Arguments of `reorganize`."""
    if not way.in_papers_layers:
        every = list(range(len(tower_of(model).layers)))
        return {"macs": macs, "reorganization_layers": every, "inattentive_tokens": way.inattentive_tokens}
    layers = default_reorganization_layers(len(tower_of(model).layers))
    reorganize(model, 1.0, reorganization_layers=layers, inattentive_tokens=way.inattentive_tokens)
    rates = uniform(model, formula, macs * formula(1.0))
    if rates is None:
        raise ValueError(f"`--macs` {macs} is out of reach for three layers: ask for more.")
    return {
        "keep_rate": next(iter(rates.values()), 1.0),
        "reorganization_layers": layers,
        "inattentive_tokens": way.inattentive_tokens,
    }


def _gmacs(model: PreTrainedModel, formula: MacsFormula, settings: dict[str, Any]) -> float:
    reorganize(model, **settings)
    return formula() / 1e9


@contextmanager
def _features_of(model: PreTrainedModel) -> Iterator[Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    """A function that returns logits and what the first classifier is given, both on the CPU in float32."""
    seen: list[torch.Tensor] = []
    head = next(iter(heads_of(model).values()))
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def features_of(pixel_values: torch.Tensor, **budget: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.clear()
        logits = model(pixel_values, **budget).logits
        return logits.float().cpu(), seen[0].flatten(1).float().cpu()

    try:
        yield features_of
    finally:
        handle.remove()


def _joined(outputs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    logits, features = zip(*outputs, strict=True)
    return torch.cat(logits), torch.cat(features)
