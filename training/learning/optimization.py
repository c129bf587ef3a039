"""Which parameters are trained, how fast each, and the average of their weights."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from evit_hf.towers import tower_of

from ..arguments import OptimizationArguments


# Tokens, positions and biases of pairs of positions, in the words of all families.
TOKENS = re.compile(r"(tokens?|pos_embed|position_embeddings?(\.weight)?|relative_position_bias_table)$")
EMBEDDINGS = re.compile(r"(^|\.)(embeddings|patch_embed|(cls|dist|reg)_token|pos_embed|pre_layrnorm|norm_pre)(\.|$)")
CLASSIFIER = re.compile(r"(classifier|\bhead(_dist)?)\.(weight|bias)$")


def layer_number(name: str, num_layers: int) -> int:
    """Depth of a parameter: 0 for the embeddings, 1 to `num_layers` for the layers, one more for what follows.

    Args:
        name: of the parameter, for example "vit.layers.3.mlp.fc1.weight".
        num_layers: layers of the model.
    """
    if match := re.search(r"\b(?:layers?|blocks)\.(\d+)\.", name):
        return int(match.group(1)) + 1
    return 0 if EMBEDDINGS.search(name) else num_layers + 1


def freeze(model: nn.Module, trainable: str, num_frozen_layers: int) -> None:
    """Exclude parameters from training.

    Args:
        model: a classifier that reorganizes.
        trainable: "all", or "head" for only the classifiers.
        num_frozen_layers: this many of the first layers, and the embeddings below them, stay as they are.

    Raises: ValueError if there are not as many layers.
    """
    num_layers = len(tower_of(model).layers)
    if num_frozen_layers > num_layers:
        raise ValueError(f"`--freeze-layers` is {num_frozen_layers}, but the model has {num_layers} layers.")
    for name, parameter in model.named_parameters():
        is_below = num_frozen_layers > 0 and layer_number(name, num_layers) <= num_frozen_layers
        is_trained = trainable == "all" or CLASSIFIER.search(name) is not None
        parameter.requires_grad_(is_trained and not is_below)


def build_optimizer(model: nn.Module, arguments: OptimizationArguments, learning_rate: float) -> torch.optim.AdamW:
    """Build AdamW without weight decay on norms, biases, positions and tokens, slower for lower layers if wanted.

    Args:
        model: a classifier that reorganizes; parameters that need no gradient are left out.
        arguments: weight decay, and the layer decay d: a layer that is n layers below the head has d ** n of the
            learning rate.
        learning_rate: peak of the head's.
    """
    num_layers = len(tower_of(model).layers)
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_spared = parameter.ndim < 2 or TOKENS.search(name) is not None
            depth = layer_number(name, num_layers) if arguments.layer_decay != 1 else num_layers + 1
            groups.setdefault((depth, 0.0 if is_spared else arguments.weight_decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "weight_decay": decay, "lr": learning_rate * arguments.layer_decay**below}
            for (depth, decay), params in groups.items()
            for below in [num_layers + 1 - depth]
        ],
        lr=learning_rate,
    )


def warmup_steps(arguments: OptimizationArguments, steps_per_epoch: int, num_steps: int) -> int:
    """Optimizer steps of the warm-up: those of its epochs, by default a tenth of all, but at most five epochs."""
    if arguments.warmup_epochs is None:
        return round(min(5 * steps_per_epoch, num_steps / 10))
    return round(arguments.warmup_epochs * steps_per_epoch)


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, arguments: OptimizationArguments, steps_per_epoch: int, num_steps: int, step: int
) -> LambdaLR:
    """Linear warm-up and cosine, at optimizer step `step`: a function of only the step, so nothing of it is saved."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    peak = optimizer.defaults["lr"]
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=warmup_steps(arguments, steps_per_epoch, num_steps),
        num_training_steps=num_steps,
        min_lr_rate=arguments.min_learning_rate / peak if peak else 0.0,
        last_epoch=step - 1,
    )


class WeightAverage:
    """Exponential moving average of a model's parameters (EMA).

    The decay is min(decay, (1 + step) / (10 + step)), so that the random weights of the beginning do not linger, as in
    TensorFlow's and timm's. Buffers (the running statistics of LV-ViT's stem) are not averaged.

    Args:
        model: as prepared for training, sharded or not.
        decay: of one optimizer step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.parameters = list(model.parameters())
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self.averages, self.parameters, None)

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange the weights of the model with their averages."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            weights = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weights)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Put the averages into the model for a while."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()
