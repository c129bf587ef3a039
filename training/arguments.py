"""Settings of a training run: one dataclass for each concern, all of them flags of `evit train`.

A recipe is a YAML file with these names; flags stand over the recipe.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


RECIPES = Path(__file__).parent / "recipes"


def setting(default: Any, text: str) -> Any:
    """A dataclass field with its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class DataArguments:
    """Which images to train and to evaluate on."""

    dataset: list[str] = setting(
        ["digits"],
        "Data: the name of a packaged data set (digits), a Hub id, a folder of images or parquet files, or the files "
        "themselves (their names say the split: train, validation, test).",
    )
    dataset_config: str | None = setting(None, "Configuration of a Hub data set that has several.")
    train_split: str = setting("train", "Split to train on.")
    eval_split: str | None = setting(
        None, "Split to evaluate on; by default validation, val, dev or test, or else a part of the training split."
    )
    eval_fraction: float = setting(0.1, "Part of the training split held out where there is no evaluation split.")
    image_column: str | None = setting(None, "Column with the images; by default the only one that holds images.")
    label_column: str | None = setting(None, "Column with the labels; by default label, labels, fine_label or class.")
    max_train_samples: int | None = setting(None, "Train on so many images only, drawn with the seed.")
    max_eval_samples: int | None = setting(None, "Evaluate on so many images only, drawn with the seed.")
    num_workers: int = setting(4, "Processes that load images; 0 loads them in the training process.")


@dataclass
class AugmentationArguments:
    """How training images are varied. Evaluation resizes and crops as the image processor says."""

    crop: Literal["random_resized", "padded", "none"] = setting(
        "random_resized", "random_resized: ImageNet's; padded: random crop behind a margin, CIFAR's; none: resize."
    )
    crop_min_scale: float = setting(0.08, "Smallest part of the image's area that a random resized crop takes.")
    horizontal_flip: float = setting(0.5, "Probability of a horizontal flip.")
    affine_degrees: float = setting(0.0, "Random rotation up to so many degrees, with a tenth of shift and scale.")
    rand_augment: int = setting(0, "Magnitude of RandAugment with two operations, 0 to 30; 0 is off, the paper has 9.")
    color_jitter: float = setting(0.0, "Strength of brightness, contrast and saturation changes; 0 is off.")
    random_erasing: float = setting(0.0, "Probability of erasing a rectangle; the paper has 0.25.")


@dataclass
class ModelArguments:
    """Which network to train: a checkpoint, or one from scratch."""

    model: str | None = setting(
        None, "ViT, DeiT or EViT checkpoint to fine-tune, a folder or Hub id; by default a model from scratch."
    )
    preset: str | None = setting(
        None, "Model of the paper to train from scratch, for example evit-deit-s or evit-lvvit-s."
    )
    keep_rate: list[float] = setting(
        [0.7], "Share of image tokens to keep, in (0, 1]: one number, or one for each reorganization layer."
    )
    reorganization_layers: list[int] | None = setting(
        None, "Zero-based layers that reorganize; by default at one, two and three quarters of the depth."
    )
    fuse_inattentive_tokens: bool = setting(True, "Fuse the inattentive tokens into one; otherwise drop them.")
    image_size: int | None = setting(None, "Pixels; by default the checkpoint's or preset's, 224 from scratch.")
    drop_path_rate: float = setting(0.0, "Stochastic depth rate of the last layer; the paper has 0.1.")
    patch_size: int = setting(16, "Pixels, from scratch.")
    hidden_size: int = setting(384, "Width, from scratch.")
    num_hidden_layers: int = setting(12, "Depth, from scratch.")
    num_attention_heads: int = setting(6, "Heads, from scratch.")
    initializer_range: float = setting(0.02, "Standard deviation of random weights, from scratch.")


@dataclass
class OptimizationArguments:
    """How long and how fast to train."""

    epochs: int = setting(30, "Passes over the training images.")
    max_steps: int | None = setting(None, "Stop after so many optimizer steps; the schedules end there too.")
    batch_size: int = setting(64, "Images for each optimizer step and process.")
    eval_batch_size: int = setting(128, "Images for each evaluation step and process.")
    learning_rate: float = setting(2e-5, "Peak learning rate of AdamW.")
    min_learning_rate: float = setting(0.0, "Learning rate at the end of the cosine.")
    warmup_epochs: float = setting(0.0, "Epochs of linear warm-up from zero.")
    weight_decay: float = setting(0.05, "Weight decay; norms, biases, positions and tokens have none.")
    label_smoothing: float = setting(0.0, "Share of the target spread over all classes; the paper has 0.1.")
    mix_token: float = setting(
        0.0, "Probability that a step mixes the patch tokens of two images, and their labels; LV-ViT has 1."
    )
    max_grad_norm: float = setting(0.0, "Clip gradients to this norm; 0 is off.")
    keep_rate_dense_epochs: float = setting(0.0, "Epochs at keep rate 1.0; the paper has 10 from scratch.")
    keep_rate_shrink_epochs: float = setting(0.0, "Epochs of cosine down to the keep rate; the paper has 100.")


@dataclass
class RunArguments:
    """Where and on what to run."""

    output_dir: str = setting("runs/evit", "Folder for the model, metrics and pictures; it must not hold a run yet.")
    overwrite: bool = setting(False, "Delete what an earlier run left in the output folder.")
    seed: int = setting(0, "Seed of weights, order, augmentation and held-out images.")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "Precision of matrix products in training.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    log_steps: int = setting(50, "Optimizer steps between two lines of the training log.")
    num_pictures: int = setting(8, "Evaluation images drawn with their kept patches; 0 draws none.")


@dataclass
class TrainArguments:
    """All settings of a run."""

    data: DataArguments
    augmentation: AugmentationArguments
    model: ModelArguments
    optimization: OptimizationArguments
    run: RunArguments

    def as_dict(self) -> dict[str, Any]:
        """All settings under their flat names, as a recipe would give them."""
        return {name: value for part in vars(self).values() for name, value in dataclasses.asdict(part).items()}

    def check(self) -> None:
        """Raise ValueError for values that no run can have."""
        settings = self.as_dict()
        for name in ("epochs", "batch_size", "eval_batch_size", "log_steps"):
            if settings[name] < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {settings[name]}.")
        for name in ("max_steps", "max_train_samples", "max_eval_samples", "image_size"):
            if settings[name] is not None and settings[name] < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {settings[name]}: leave it out for no limit.")
        shares = (
            "horizontal_flip",
            "random_erasing",
            "label_smoothing",
            "mix_token",
            "eval_fraction",
            "crop_min_scale",
        )
        for name in shares:
            if not 0 <= settings[name] <= 1:
                raise ValueError(f"`--{name}` must be in [0, 1], got {settings[name]}.")
        for name in ("keep_rate_dense_epochs", "keep_rate_shrink_epochs", "warmup_epochs", "weight_decay"):
            if settings[name] < 0:
                raise ValueError(f"`--{name}` must not be negative, got {settings[name]}.")
        if self.model.model is not None and self.model.preset is not None:
            raise ValueError("`--model` and `--preset` both name the model: give one of them.")
        if self.data.num_workers < 0:
            raise ValueError(f"`--num_workers` must not be negative, got {self.data.num_workers}.")

    @property
    def keep_rate(self) -> float | list[float]:
        """The target keep rate as a model takes it: a number, or a list with one for each reorganization layer."""
        rates = self.model.keep_rate
        return rates[0] if len(rates) == 1 else list(rates)


PARTS = (DataArguments, AugmentationArguments, ModelArguments, OptimizationArguments, RunArguments)
SETTINGS = [field.name for part in PARTS for field in dataclasses.fields(part)]


def probably_meant(name: str) -> str:
    """Return the way out for a setting that does not exist."""
    close = difflib.get_close_matches(str(name).lstrip("-").replace("-", "_"), SETTINGS, n=1)
    return f"did you mean `{close[0]}`?" if close else "see `evit train --help`."


def recipe_path(name_or_path: str) -> Path:
    """The file of a recipe, given by path or by the name of a packaged one.

    Raises: ValueError naming the packaged recipes.
    """
    for path in (Path(name_or_path), RECIPES / f"{name_or_path}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise ValueError(f"There is no recipe `{name_or_path}`: give the path of a YAML file, or one of {names}.")


def recipe_flags(path: Path) -> list[str]:
    """The settings of a recipe as command-line flags, so that both go through the same checks.

    Raises: ValueError for a file that is no mapping, or a setting that does not exist.
    """
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"`{path}` is no YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"`{path}` must hold `name: value` lines, got a {type(settings).__name__}.")
    flags = []
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ValueError(f"`{path}` has an unknown setting `{name}`: {probably_meant(name)}")
        if value is not None:
            flags += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return flags


def parse_train_arguments(argv: Sequence[str]) -> TrainArguments:
    """Settings from a command line: an optional recipe first, then flags, which win.

    Args:
        argv: for example ["digits", "--epochs", "5", "--keep-rate", "0.5"].

    Returns: the settings.

    Raises: SystemExit with status 2 and a message on standard error, as argparse does.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        PARTS,
        prog="evit train",
        usage="evit train [RECIPE] [--flag value ...]",
        description="Train or fine-tune an EViT. RECIPE is a YAML file or the name of a packaged recipe.",
        allow_abbrev=False,
    )
    argv = list(argv)
    try:
        if argv and not argv[0].startswith("-"):
            argv = recipe_flags(recipe_path(argv[0])) + argv[1:]
        *parts, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise ValueError(f"unknown flag `{unknown[0]}`: {probably_meant(unknown[0])}")
        arguments = TrainArguments(*parts)
        arguments.check()
    except ValueError as error:
        parser.error(str(error))
    return arguments
