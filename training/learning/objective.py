"""The loss of a micro-batch: mixed images and tokens, labels, and what an oracle and a teacher add."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torchvision.transforms import v2
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from evit_hf.keep_rate_schedule import KeepRate
from evit_hf.token_labelling import mix_targets, random_mix_box, token_labelling_loss

from ..arguments import TeacherArguments
from .teachers import Oracle, Teacher


if TYPE_CHECKING:
    Box = tuple[int, int, int, int]


@dataclass
class Objective:
    """What a model learns from a micro-batch; called, it returns the loss.

    Args:
        config: of the model; says whether images have several labels (`problem_type`), and for `mix_token` its grid
            of patches.
        label_smoothing: share of the target that is spread over all classes.
        mix_token: probability of mixing the tokens of a micro-batch.
        mixing: MixUp or CutMix, from (images, labels) to (images, probabilities).
        oracle: names the tokens to keep, instead of the model's own attention.
        oracle_steps: optimizer steps in which it does; None for all.
        teacher: whose answers the model learns too.
        teaching: how it learns from them.
        autocast: context in which oracle and teacher run, for example `accelerator.autocast`.
    """

    config: PreTrainedConfig
    label_smoothing: float = 0.0
    mix_token: float = 0.0
    mixing: v2.Transform | None = None
    oracle: Oracle | None = None
    oracle_steps: int | None = None
    teacher: Teacher | None = None
    teaching: TeacherArguments = field(default_factory=TeacherArguments)
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext

    def __call__(
        self, model: nn.Module, batch: dict[str, torch.Tensor], keep_rate: KeepRate, step: int
    ) -> torch.Tensor:
        """Return the loss of one forward pass in training; random numbers are those of PyTorch's generator.

        Args:
            model: as prepared for training; put into training mode.
            batch: "pixel_values", (batch_size, num_channels, height, width), and "labels", (batch_size,) class numbers
                or (batch_size, num_labels) zeros and ones.
            keep_rate: of this step.
            step: optimizer steps that counted so far.

        Returns: scalar, the mean over the images.
        """
        images, labels = batch["pixel_values"], batch["labels"]
        if self.mixing is not None:
            order = torch.randperm(len(images))  # MixUp and CutMix pair neighbours, which may be copies of an image
            images, labels = self.mixing(images[order], labels[order])
        mix_box = random_mix_box(self.config.patch_grid()) if torch.rand(()) < self.mix_token else None
        asks_oracle = self.oracle is not None and (self.oracle_steps is None or step < self.oracle_steps)
        with self.autocast():
            scores = self.oracle(images, mix_box) if asks_oracle else None
            taught = self.teacher(images, mix_box) if self.teacher is not None else None
        model.train()
        mixing = {} if mix_box is None else {"mix_box": mix_box}  # of EViT's own classes
        outputs = model(images, keep_rate=keep_rate, patch_scores=scores, **mixing)
        if taught is None:
            return self.label_loss(outputs, labels, mix_box)
        teacher_logits, token_targets = taught
        base_loss = self.label_loss(outputs, labels, mix_box, token_targets)
        return distillation_loss(outputs, teacher_logits, base_loss, self.teaching)

    def label_loss(
        self,
        outputs: ModelOutput,
        labels: torch.Tensor,
        mix_box: "Box | None" = None,
        token_targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy, for mixed images with mixed labels; token labelling too if there is an auxiliary classifier.

        Args:
            outputs: of the model in training.
            labels: (batch_size,) class numbers, or (batch_size, num_labels) probabilities.
            mix_box: what the model was given, or None.
            token_targets: (batch_size, num_patches, num_labels), a teacher's probabilities of the patches, mixed
                already.

        Returns: scalar. With a teacher and a distillation token, only the class token learns the labels.
        """
        class_logits = outputs.get("cls_logits") if self.teacher is not None else None
        logits = (outputs.logits if class_logits is None else class_logits).float()
        num_labels = logits.shape[-1]
        targets = labels if labels.ndim == 2 else nn.functional.one_hot(labels, num_labels)
        # One class of many shares its smoothing with all of them, a yes or no of a multi-label problem with its other.
        num_answers = 2 if self._is_multi_label else num_labels
        targets = targets.to(logits.dtype) * (1 - self.label_smoothing) + self.label_smoothing / num_answers
        mixed_tokens = None
        if mix_box is not None:
            rows, columns = self.config.patch_grid()
            each_token = targets.unsqueeze(1).expand(-1, rows * columns, -1)
            targets, mixed_tokens = mix_targets(targets, each_token, mix_box, self.config.patch_grid())
        if self._is_multi_label:
            return nn.functional.binary_cross_entropy_with_logits(logits, targets)
        if outputs.get("aux_logits") is None:
            return nn.functional.cross_entropy(logits, targets)
        token_targets = mixed_tokens if token_targets is None else token_targets
        return token_labelling_loss(
            logits,
            outputs.aux_logits.float(),
            outputs.patch_index,
            targets,
            token_targets,
            counted_by=outputs.get("counted_by"),
        )

    @property
    def evaluation_oracle(self) -> Oracle | None:
        """The oracle, if it names the tokens in evaluation too."""
        return self.oracle if self.teaching.oracle_in_evaluation else None

    @property
    def _is_multi_label(self) -> bool:
        return self.config.problem_type == "multi_label_classification"


def distillation_loss(
    outputs: ModelOutput, teacher_logits: torch.Tensor, base_loss: torch.Tensor, teaching: TeacherArguments
) -> torch.Tensor:
    """Loss of a student with a teacher.

    Args:
        outputs: of the student; of a model with distillation token, the logits of that token learn from the teacher.
        teacher_logits: (batch_size, num_labels).
        base_loss: loss against the labels, of the class token where there are two.
        teaching: "hard" learns the teacher's first choice; "soft" its distribution at temperature T, as T^2 KL.

    Returns: scalar, (1 - weight) * base_loss + weight * the teacher's part.

    Source: https://github.com/facebookresearch/deit/blob/7e160fe/losses.py.
    """
    student_logits = outputs.get("distillation_logits")
    student_logits = (outputs.logits if student_logits is None else student_logits).float()
    if teaching.distillation == "hard":
        loss = nn.functional.cross_entropy(student_logits, teacher_logits.argmax(dim=1))
    else:
        temperature = teaching.distillation_temperature
        loss = temperature**2 * nn.functional.kl_div(
            (student_logits / temperature).log_softmax(dim=1),
            (teacher_logits / temperature).log_softmax(dim=1),
            reduction="batchmean",
            log_target=True,
        )
    return (1 - teaching.distillation_weight) * base_loss + teaching.distillation_weight * loss
