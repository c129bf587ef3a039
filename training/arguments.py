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
        "Data: the name of a packaged data set (digits), a Hub id, a folder (images, data files, or what "
        "`save_to_disk` wrote), or parquet, arrow or CSV files (their names say the split: train, validation, test).",
    )
    dataset_config: str | None = setting(None, "Configuration of a Hub data set that has several.")
    train_split: str = setting("train", "Split to train on.")
    eval_split: str | None = setting(
        None, "Split to evaluate on; by default validation, val, dev or test, or else a part of the training split."
    )
    eval_fraction: float = setting(0.1, "Part of the training split held out where there is no evaluation split.")
    image_column: str | None = setting(None, "Column with the images; by default the only one that holds images.")
    label_column: str | None = setting(
        None,
        "Column with the labels; by default label, labels, fine_label, class and the like. Lists are multi-label.",
    )
    max_train_samples: int | None = setting(None, "Train on so many images only, drawn with the seed.")
    max_eval_samples: int | None = setting(None, "Evaluate on so many images only, drawn with the seed.")
    num_workers: int = setting(4, "Processes that load images; 0 loads them in the training process.")
    streaming: bool = setting(False, "Read the data while training instead of before; needs --max_steps.")
    shuffle_buffer: int = setting(1000, "Images among which a streamed data set is shuffled.")
    check_images: int = setting(
        1000, "Decode so many images of each split, evenly spread, before training starts; -1 decodes all, 0 none."
    )
    on_bad_image: Literal["error", "skip"] = setting(
        "error", "What an image that cannot be decoded does: end the run, or give its place to the next one, counted."
    )
    max_bad_images: float = setting(0.01, "Share of bad images that ends the run all the same.")


@dataclass
class AugmentationArguments:
    """How training images are varied. Evaluation resizes and crops as the image processor says."""

    crop: Literal["random_resized", "padded", "none"] = setting(
        "random_resized", "random_resized: ImageNet's; padded: random crop behind a margin, CIFAR's; none: resize."
    )
    crop_min_scale: float = setting(0.08, "Smallest part of the image's area that a random resized crop takes.")
    horizontal_flip: float = setting(0.5, "Probability of a horizontal flip.")
    affine_degrees: float = setting(0.0, "Random rotation up to so many degrees, with a tenth of shift and scale.")
    rand_augment: float = setting(
        0.0, "Magnitude of RandAugment with two operations, up to 10; 0 is off, the paper has 9."
    )
    rand_augment_std: float = setting(
        0.0, "Standard deviation of that magnitude from image to image; the paper has 0.5."
    )
    three_augment: bool = setting(False, "DeiT III: grey, solarized or blurred, one of the three for each image.")
    color_jitter: float = setting(0.0, "Strength of brightness, contrast and saturation changes; 0 is off.")
    random_erasing: float = setting(0.0, "Probability of filling a rectangle with noise; the paper has 0.25.")
    repeated_augmentation: int = setting(
        1, "Differently augmented copies of an image in one batch; an epoch stays as long. The paper has 3."
    )
    mixup: float = setting(0.0, "Parameter of MixUp's Beta distribution; 0 is off, the paper has 0.8.")
    cutmix: float = setting(0.0, "Parameter of CutMix's Beta distribution; 0 is off, the paper has 1.0.")
    mix_switch: float = setting(0.5, "Share of the mixed batches that CutMix gets, where both are on.")


@dataclass
class ModelArguments:
    """Which network to train: a checkpoint, or one from scratch."""

    model: str | None = setting(
        None, "ViT, DeiT or EViT checkpoint to fine-tune, a folder or Hub id; by default a model from scratch."
    )
    preset: str | None = setting(
        None, "Model of the paper to train from scratch, for example evit-deit-s or evit-lvvit-s."
    )
    keep_rate: list[float] | None = setting(
        None,
        "Share of image tokens to keep, in (0, 1]: one number, or one for each reorganization layer; default 0.7.",
    )
    match_macs_of: int | None = setting(
        None,
        "Choose the keep rate at which a model for --image_size costs as much as the dense one at so many pixels.",
    )
    reorganization_layers: list[int] | None = setting(
        None, "Zero-based layers that reorganize; by default at one, two and three quarters of the depth."
    )
    fuse_inattentive_tokens: bool = setting(True, "Fuse the inattentive tokens into one; otherwise drop them.")
    image_size: int | None = setting(
        None, "Pixels; by default the checkpoint's or preset's, 224 from scratch. Positions are interpolated."
    )
    drop_path_rate: float = setting(0.0, "Stochastic depth rate of the last layer; the paper has 0.1.")
    patch_size: int = setting(16, "Pixels, from scratch.")
    hidden_size: int = setting(384, "Width, from scratch.")
    num_hidden_layers: int = setting(12, "Depth, from scratch.")
    num_attention_heads: int = setting(6, "Heads, from scratch.")
    use_distillation_token: bool = setting(
        False, "A second token and classifier for a teacher, as DeiT, from scratch."
    )
    initializer_range: float = setting(0.02, "Standard deviation of random weights, from scratch.")
    trainable: Literal["all", "head"] = setting("all", "Train everything, or the classifier alone (linear probe).")
    freeze_layers: int = setting(0, "Keep the embeddings and so many of the first layers as they are.")


@dataclass
class OptimizationArguments:
    """How long and how fast to train."""

    epochs: int = setting(30, "Passes over the training images.")
    max_steps: int | None = setting(None, "Stop after so many optimizer steps; the schedules end there too.")
    batch_size: int = setting(64, "Images for each optimizer step, over all processes and accumulated.")
    gradient_accumulation_steps: int = setting(1, "Forward passes into which each process cuts its share of a batch.")
    drop_last: bool = setting(
        True, "Leave out the last, smaller batch of an epoch; otherwise it counts by its images."
    )
    eval_batch_size: int = setting(128, "Images for each evaluation step and process.")
    learning_rate: float = setting(2e-5, "Peak learning rate of AdamW.")
    scale_learning_rate: bool = setting(
        False, "Take the learning rate as that of batch size 512, and scale it linearly."
    )
    min_learning_rate: float = setting(0.0, "Learning rate at the end of the cosine; it is not scaled.")
    layer_decay: float = setting(1.0, "Factor on the learning rate from each layer to the one below it.")
    warmup_epochs: float = setting(0.0, "Epochs of linear warm-up from zero.")
    weight_decay: float = setting(0.05, "Weight decay; norms, biases, positions and tokens have none.")
    label_smoothing: float = setting(0.0, "Share of the target spread over all classes; the paper has 0.1.")
    mix_token: float = setting(
        0.0, "Probability that a step mixes the patch tokens of two images, and their labels; LV-ViT has 1."
    )
    max_grad_norm: float = setting(0.0, "Clip gradients to this norm; 0 is off.")
    max_skipped_steps: int = setting(
        5, "Steps in a row with a loss or gradient that is not finite before the run ends."
    )
    ema_decay: float = setting(
        0.0, "Decay of an average of the weights, evaluated beside them and saved as the model; the paper has 0.99996."
    )
    keep_rate_dense_epochs: float = setting(0.0, "Epochs at keep rate 1.0; the paper has 10 from scratch.")
    keep_rate_shrink_epochs: float = setting(0.0, "Epochs of cosine down to the keep rate; the paper has 100.")
    keep_rate_levels: int | None = setting(
        None, "Round the schedule up to so many keep rates above the target; by default it is exact."
    )
    keep_rate_range: list[float] | None = setting(
        None, "Lowest and highest keep rate, drawn anew for each step, for a model that serves many rates."
    )


@dataclass
class TeacherArguments:
    """Other networks that take part in training and are not trained."""

    oracle: str | None = setting(
        None, "Dense ViT that names the important tokens: a folder or Hub id, or `initial` for the weights of --model."
    )
    oracle_epochs: float | None = setting(None, "Epochs under the oracle, from the first on; by default all.")
    oracle_layer: Literal["same", "last"] = setting(
        "same", "The oracle's attention that scores the tokens: of the same layer, or of its last."
    )
    oracle_in_evaluation: bool = setting(False, "Let the oracle choose the tokens in evaluation too.")
    teacher: str | None = setting(
        None, "Image classifier to learn from: a folder or Hub id, or `initial` for the dense --model itself."
    )
    distillation: Literal["soft", "hard"] = setting(
        "hard", "Learn the teacher's probabilities, or its first choice as DeiT does."
    )
    distillation_weight: float = setting(0.5, "Share of the teacher in the loss; DeiT has 0.5.")
    distillation_temperature: float = setting(1.0, "Temperature of soft distillation; DeiT has 3.")


@dataclass
class HubArguments:
    """Whether and how the model goes to the Hugging Face Hub."""

    push_to_hub: str | None = setting(None, "Push the model to this repository, ORG/NAME; made if there is none.")
    push_when: Literal["end", "best", "epoch"] = setting(
        "end", "Push at the end alone, or also after each epoch, or each epoch that is the best so far."
    )
    push_private: bool = setting(False, "Make a new repository private.")
    push_revision: str | None = setting(None, "Branch to push to; made if there is none.")
    push_minutes: float = setting(10.0, "Minutes after which a push is given up.")
    model_license: str = setting("apache-2.0", "Licence of the trained model, for its card.")


@dataclass
class RunArguments:
    """Where and on what to run, and what to leave behind."""

    output_dir: str = setting("runs/evit", "Folder for model, checkpoints, metrics and pictures; one run, one folder.")
    overwrite: bool = setting(False, "Delete what an earlier run left in the output folder.")
    resume: str | None = setting(
        None, "`auto` goes on from the newest intact checkpoint in the output folder; or the path of a checkpoint."
    )
    resume_override: bool = setting(False, "Go on under settings that differ from those of the checkpoint.")
    checkpoint_steps: int | None = setting(
        None, "Optimizer steps between two checkpoints; there is one after each epoch in any case."
    )
    keep_checkpoints: int = setting(2, "Newest checkpoints to keep, at least 2; the best one is kept beside them.")
    final_weights: Literal["last", "best"] = setting(
        "last", "Weights that the saved model has: the last ones (averaged, with --ema_decay), or the best evaluated."
    )
    seed: int = setting(0, "Seed of weights, order, augmentation and held-out images.")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "Precision of matrix products in training.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    compile: bool = setting(
        False, "Compile the layers with torch.compile, for any number of tokens: no keep rate compiles them again."
    )
    log_steps: int = setting(50, "Optimizer steps between two lines of the training log.")
    trackers: list[str] = setting(
        [], "Trackers beside metrics.jsonl, through Accelerate: tensorboard, wandb, trackio."
    )
    compare_keep_rates: list[float] | None = setting(
        None, "Keep rates to measure the final model at, for its card, besides 1.0 and its own; none by default."
    )
    num_pictures: int = setting(8, "Evaluation images drawn with their kept patches; 0 draws none.")
    dry_run: bool = setting(
        False, "Build everything, train two steps, report memory, GMACs and the projected time, and leave nothing."
    )


@dataclass
class TrainArguments:
    """All settings of a run."""

    data: DataArguments
    augmentation: AugmentationArguments
    model: ModelArguments
    optimization: OptimizationArguments
    teacher: TeacherArguments
    hub: HubArguments
    run: RunArguments

    def as_dict(self) -> dict[str, Any]:
        """All settings under their flat names, as a recipe would give them."""
        return {name: value for part in vars(self).values() for name, value in dataclasses.asdict(part).items()}

    def check(self) -> None:
        """Raise ValueError for values that no run can have."""
        settings = self.as_dict()
        for names, accepted, holds in _RANGES:
            for name in names:
                value = settings[name]
                if value is not None and not holds(value):
                    way_out = " Leave it out for no limit." if name in _LIMITS else ""
                    raise ValueError(f"`--{name}` must be {accepted}, got {value}.{way_out}")
        model, teacher, augmentation = self.model, self.teacher, self.augmentation
        if model.model is not None and model.preset is not None:
            raise ValueError("`--model` and `--preset` both name the model: give one of them.")
        if model.match_macs_of is not None and model.keep_rate is not None:
            raise ValueError("`--match_macs_of` chooses the keep rate: leave out `--keep_rate`.")
        rates = self.optimization.keep_rate_range
        if rates is not None and not (len(rates) == 2 and 0 < rates[0] <= rates[1] <= 1):
            raise ValueError(f"`--keep_rate_range` must be two rates in (0, 1], the lower one first, got {rates}.")
        for rate in self.run.compare_keep_rates or []:
            if not 0 < rate <= 1:
                raise ValueError(f"`--compare_keep_rates` must be in (0, 1], got {rate}.")
        if self.optimization.mix_token and (augmentation.mixup or augmentation.cutmix):
            raise ValueError("`--mix_token` mixes images already: leave out `--mixup` and `--cutmix`.")
        for name in ("oracle", "teacher"):
            if getattr(teacher, name) == "initial" and model.model is None:
                raise ValueError(f"`--{name} initial` takes the weights of `--model`, which is missing.")
        if self.data.streaming and self.optimization.max_steps is None:
            raise ValueError("`--streaming` data has no known length: say with `--max_steps` how long to train.")
        if self.data.streaming and self.augmentation.repeated_augmentation > 1:
            raise ValueError("`--repeated_augmentation` needs data with a known order: leave out `--streaming`.")

    @property
    def keep_rate(self) -> float | list[float]:
        """The target keep rate as a model takes it: a number, or a list with one for each reorganization layer."""
        rates = self.model.keep_rate or [0.7]
        return rates[0] if len(rates) == 1 else list(rates)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate, scaled by batch size / 512 where that is wanted."""
        optimization = self.optimization
        return optimization.learning_rate * (
            optimization.batch_size / 512 if optimization.scale_learning_rate else 1.0
        )


_LIMITS = ("max_steps", "max_train_samples", "max_eval_samples", "checkpoint_steps", "oracle_epochs")

# Settings, what they accept in words, and the test of it.
_RANGES = (
    (
        (
            "epochs",
            "batch_size",
            "eval_batch_size",
            "log_steps",
            "gradient_accumulation_steps",
            "repeated_augmentation",
            "max_skipped_steps",
            "shuffle_buffer",
            "max_steps",
            "max_train_samples",
            "max_eval_samples",
            "image_size",
            "match_macs_of",
            "checkpoint_steps",
            "keep_rate_levels",
        ),
        "at least 1",
        lambda value: value >= 1,
    ),
    (("keep_checkpoints",), "at least 2, so that a damaged one loses little", lambda value: value >= 2),
    (
        (
            "horizontal_flip",
            "random_erasing",
            "label_smoothing",
            "mix_token",
            "mix_switch",
            "eval_fraction",
            "crop_min_scale",
            "max_bad_images",
            "distillation_weight",
        ),
        "in [0, 1]",
        lambda value: 0 <= value <= 1,
    ),
    (("rand_augment",), "in [0, 10]", lambda value: 0 <= value <= 10),
    (("layer_decay",), "in (0, 1]", lambda value: 0 < value <= 1),
    (("ema_decay",), "in [0, 1)", lambda value: 0 <= value < 1),
    (("distillation_temperature", "push_minutes"), "above 0", lambda value: value > 0),
    (("check_images",), "-1, 0 or a number of images", lambda value: value >= -1),
    (
        (
            "keep_rate_dense_epochs",
            "keep_rate_shrink_epochs",
            "warmup_epochs",
            "weight_decay",
            "learning_rate",
            "max_grad_norm",
            "mixup",
            "cutmix",
            "rand_augment_std",
            "color_jitter",
            "num_workers",
            "num_pictures",
            "freeze_layers",
            "oracle_epochs",
        ),
        "0 or more",
        lambda value: value >= 0,
    ),
)


PARTS = (
    DataArguments,
    AugmentationArguments,
    ModelArguments,
    OptimizationArguments,
    TeacherArguments,
    HubArguments,
    RunArguments,
)
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


def recipe_flags(path: Path, without: Sequence[str] = ()) -> list[str]:
    """The settings of a recipe as command-line flags, so that both go through the same checks.

    Args:
        path: of the recipe.
        without: settings to leave out.

    Raises: ValueError for a file that is no mapping, or a setting that does not exist.
    """
    text = path.read_text()
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"`{path}` is no YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"`{path}` must hold `name: value` lines, got a {type(settings).__name__}.")
    lines = {key.value: key.start_mark.line + 1 for key, _ in getattr(yaml.compose(text), "value", [])}
    flags = []
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ValueError(f"`{path}:{lines[str(name)]}` has an unknown setting `{name}`: {probably_meant(name)}")
        if value is not None and value != [] and name not in without:
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
            # A flag that chooses the keep rate stands over the rate of the recipe, as every flag does.
            chooses = any(flag.replace("-", "_").startswith("__match_macs_of") for flag in argv)
            argv = recipe_flags(recipe_path(argv[0]), ["keep_rate"] if chooses else []) + argv[1:]
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
