"""Networks that help in training and are not trained: the oracle that names tokens, the teacher to learn from.

What the paper says about its oracle, as far as it could be found: a ViT that was trained before supplies the
importance of the tokens, and training under it is longer and ends above the plain ViT (a published review quotes
80.7 % against 79.8 % for DeiT-S). Which network it is, from which layer its attention is taken, for how many epochs it
helps, and whether the student starts from its weights was never published
(https://github.com/youweiliang/evit/issues/2 and /23). Here all of that is a setting; the defaults are inferred: the
student's own initialization as the oracle, its attention at the layer that reorganizes, in all epochs.
"""

import copy
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torchvision.transforms.v2 import functional as F
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from evit_hf import EViTPreTrainedModel
from evit_hf.profiling import MacsFormula
from evit_hf.towers import reorganizes, tower_of

from ..data.augmentation import load_processor, output_size
from ..data.names import class_numbers, has_no_names


if TYPE_CHECKING:
    from ..arguments import TeacherArguments


Normalization: TypeAlias = tuple[list[float], list[float]]  # mean and standard deviation of each channel


class Renormalize(nn.Module):
    """Images with the mean and standard deviation of one image processor as those of another would have them.

    Args:
        before: (mean, standard deviation) that the images were normalized with.
        after: those that are wanted.
    """

    def __init__(self, before: Normalization, after: Normalization) -> None:
        super().__init__()
        own, other = ([torch.tensor(x).view(-1, 1, 1) for x in pair] for pair in (before, after))
        # One affine map.
        self.register_buffer("scale", own[1] / other[1], persistent=False)
        self.register_buffer("shift", (own[0] - other[0]) / other[1], persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return pixels, (batch_size, num_channels, height, width)."""
        return pixel_values * self.scale + self.shift


def normalization_of(processor: BaseImageProcessor) -> Normalization:
    """Mean and standard deviation of an image processor; 0 and 1 of one that does not normalize."""
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    return (list(mean), list(std)) if getattr(processor, "do_normalize", False) else ([0.0] * 3, [1.0] * 3)


class Oracle(nn.Module):
    """Scores of all patches by a frozen dense ViT: its class token's attention, averaged over heads.

    Args:
        model: a classifier that reorganizes; it runs at keep rate 1.0.
        layers: zero-based layers of the student that reorganize; each takes the attention of the oracle's layer of the
            same number, or of the last one.
        from_layer: "same" or "last".
        renormalize: from the student's images to the oracle's; None where they are normalized alike.

    Raises: ValueError if the oracle has fewer layers than the student needs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[int],
        from_layer: str = "same",
        renormalize: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.renormalize = renormalize if renormalize is not None else nn.Identity()
        self.model = model.eval().requires_grad_(False)
        num_layers = len(tower_of(model).layers)
        self.layers = [num_layers - 1] * len(layers) if from_layer == "last" else layers
        if max(self.layers) >= num_layers:
            raise ValueError(
                f"`--oracle` has {num_layers} layers, but layer {max(self.layers)} of the student "
                "reorganizes: take a deeper one, or `--oracle-layer last`."
            )

    def train(self, mode: bool = True) -> "Oracle":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, pixel_values: torch.Tensor, mix_box: tuple[int, int, int, int] | None = None
    ) -> list[torch.Tensor]:
        """Return scores, (batch_size, num_patches), for each reorganization layer of the student.

        Args:
            pixel_values: what the student sees.
            mix_box: what the student is given, see `EViTModel.forward`.
        """
        mixing = {} if mix_box is None else {"mix_box": mix_box}
        images = self.renormalize(pixel_values)
        outputs = self.model(images, keep_rate=1.0, output_class_attention=self.layers, **mixing)
        return list(outputs.class_attention.unbind(dim=1))


def build_oracle(
    arguments: "TeacherArguments",
    student: PreTrainedModel,
    load: Any,
    image_size: int | None = None,
    processor: BaseImageProcessor | None = None,
) -> Oracle | None:
    """Build the oracle of a run, or None if it has none.

    Args:
        arguments: which oracle.
        student: the model to be trained, with the weights that it starts from.
        load: function from a folder or Hub id to a classifier that reorganizes.
        image_size: pixels that both see; by default their own.
        processor: of the student; None for images that are already as the oracle wants them.

    Raises: ValueError if the oracle sees other patches than the student.
    """
    if arguments.oracle is None:
        return None
    size = {} if image_size is None else {"image_size": image_size}
    model = copy.deepcopy(student) if arguments.oracle == "initial" else load(arguments.oracle, **size)
    model.gradient_checkpointing_disable()
    MacsFormula.of(model, image_size)  # raises for images that it does not take
    grids = [
        # Positions of an EViT are for images of one size, and families take images of several.
        tower_of(network).patch_grid(None if isinstance(network, EViTPreTrainedModel) else image_size)
        for network in (model, student)
    ]
    if grids[0] != grids[1]:
        raise ValueError(
            f"`--oracle {arguments.oracle}` has {grids[0][0]}x{grids[0][1]} patches and the student "
            f"{grids[1][0]}x{grids[1][1]}: scores are by patch, so take an oracle for the same grid."
        )
    renormalize = None
    if arguments.oracle != "initial" and processor is not None:
        renormalize = Renormalize(normalization_of(processor), normalization_of(load_processor(arguments.oracle)))
    layers = tower_of(student).config.reorganization_layers
    return Oracle(model, layers, arguments.oracle_layer, renormalize)


class Teacher(nn.Module):
    """Logits of a frozen classifier for the images that the student sees.

    Args:
        model: any image classifier of Transformers; one that reorganizes runs at keep rate 1.0.
        renormalize: from the student's images to the teacher's.
        image_size: (height, width) in pixels that the teacher wants, None for the student's.
        class_numbers: the teacher's number of each of the student's classes.
        patch_size: the student's, (height, width) in pixels.
    """

    def __init__(
        self,
        model: nn.Module,
        renormalize: nn.Module,
        image_size: tuple[int, int] | None,
        class_numbers: list[int],
        patch_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.renormalize = renormalize
        self.image_size = image_size
        self.patch_size = patch_size
        self.register_buffer("class_numbers", torch.tensor(class_numbers), persistent=False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, pixel_values: torch.Tensor, mix_box: tuple[int, int, int, int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Look at the student's images.

        Args:
            pixel_values: (batch_size, 3, height, width), as the student sees them.
            mix_box: what the student is given; the teacher sees the pixels mixed alike.

        Returns: logits, (batch_size, num_labels), in the order of the student's classes; and of an LV-ViT
            probabilities of every patch, (batch_size, num_patches, num_labels), for token labelling, else None.
        """
        images = self.renormalize(pixel_values)
        if mix_box is not None:
            top, left, height, width = (
                size * pixels for size, pixels in zip(mix_box, 2 * self.patch_size, strict=True)
            )
            box = (..., slice(top, top + height), slice(left, left + width))
            images = images.clone()  # they may be the student's
            images[box] = images.flip(0)[box]
        if self.image_size is not None and images.shape[-2:] != self.image_size:
            images = F.resize(images, list(self.image_size), F.InterpolationMode.BICUBIC, antialias=True)
        outputs = self.model(images, **({"keep_rate": 1.0} if reorganizes(self.model) else {}))
        logits = outputs.logits.float()[:, self.class_numbers]
        patch_logits = outputs.get("aux_logits")
        if patch_logits is None:
            return logits, None
        return logits, patch_logits.float()[:, :, self.class_numbers].softmax(dim=-1)


def build_teacher(
    arguments: "TeacherArguments",
    student: PreTrainedModel,
    processor: BaseImageProcessor,
    label_names: list[str],
) -> Teacher | None:
    """Build the teacher of a run, or None if it has none.

    Args:
        arguments: which teacher; "initial" is a copy of the student as it starts, at keep rate 1.0.
        student: the model to be trained.
        processor: of the student.
        label_names: the student's classes, found in the teacher by name, or by number where the counts agree and the
            teacher has no names.

    Raises: ValueError if the teacher does not know the classes, lacks weights, or sees other patches where it teaches
        each of them.
    """
    if arguments.teacher is None:
        return None
    if student.config.problem_type == "multi_label_classification":
        raise ValueError("`--teacher` teaches one class for each image; the data has several: leave it out.")
    if arguments.teacher == "initial":
        model = copy.deepcopy(student)
        model.gradient_checkpointing_disable()
        return Teacher(model, nn.Identity(), None, list(range(len(label_names))), tower_of(student).patch_size)
    model, loading = AutoModelForImageClassification.from_pretrained(arguments.teacher, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(
            f"`--teacher {arguments.teacher}` lacks weights of a classifier, {sorted(loading['missing_keys'])[:3]}: "
            "take one that was trained."
        )
    its_processor = load_processor(arguments.teacher)
    id2label = model.config.id2label
    numbers, unknown = class_numbers(label_names, id2label)
    if has_no_names(id2label) and len(id2label) == len(label_names):
        numbers, unknown = list(range(len(label_names))), []
    if unknown:
        raise ValueError(
            f"`--teacher {arguments.teacher}` knows {len(id2label)} classes but not {unknown[:5]} of the "
            f"{len(label_names)} of the data: take a teacher that was trained on these classes."
        )
    if hasattr(student, "aux_classifier") and hasattr(model, "aux_classifier"):
        grids = [tower_of(network).patch_grid(None) for network in (model, student)]
        if grids[0] != grids[1]:
            raise ValueError(
                f"`--teacher {arguments.teacher}` has {grids[0][0]}x{grids[0][1]} patches and the student "
                f"{grids[1][0]}x{grids[1][1]}: it teaches each patch, so take one with the same grid."
            )
    renormalize = Renormalize(normalization_of(processor), normalization_of(its_processor))
    return Teacher(model, renormalize, output_size(its_processor), numbers, tower_of(student).patch_size)
