"""Settings of a training run: one dataclass for each concern, all of them flags of `evit train`.

A recipe is a YAML file with these names; flags override the recipe.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from .settings import (
    AT_LEAST_ONE,
    KEEP_RATE,
    LIMIT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Accepted,
    FlagParser,
    check_settings,
    closest,
    default_of,
    flag,
    json_setting,
    quiet_setting,
    setting,
)


RECIPES = Path(__file__).parent / "recipes"
BELOW_ONE = Accepted("in [0, 1)", lambda value: 0 <= value < 1)


@dataclass
class DataArguments:
    """Which images to train and to evaluate on."""

    dataset: list[str] = setting(
        ["digits"],
        "Data: a folder (pictures in class folders, data files, zip files, or what `save_to_disk` wrote), Parquet, "
        "Arrow, CSV, TSV or JSON-lines files (their names or a column `split` tell the split: train, validation, "
        "test), a Hub id, or the packaged data set digits.",
    )
    dataset_config: str | None = setting(None, "Configuration of a Hub data set that has several.")
    train_split: str = setting("train", "Split to train on.", only_for_training=True)
    eval_split: str | None = setting(
        None, "Split to evaluate on; by default validation, val, dev or test, or else a part of the training split."
    )
    eval_fraction: float = setting(
        0.1, "Share of the training split held out where there is no evaluation split.", SHARE, only_for_training=True
    )
    image_column: str | None = setting(None, "Column with the images; by default the only one that holds images.")
    label_column: str | None = setting(
        None,
        "Column with the labels; by default label, labels, fine_label, class and the like, or columns of zeros and "
        "ones. Lists and `a|b` are several labels.",
    )
    balanced_sampling: bool = setting(
        False,
        "Draw all classes equally often: images of rare classes several times in an epoch, those of frequent ones not "
        "in every epoch.",
        only_for_training=True,
    )
    allow_missing_classes: bool = setting(
        False, "Accept classes that only the training or only the evaluation split has.", only_for_training=True
    )
    allow_outside_files: bool = setting(
        False, "Let the data name URLs, and files outside its own folder.", changes_training=False
    )
    max_train_samples: int | None = setting(
        None, "Train on at most this many images, drawn with the seed.", LIMIT, only_for_training=True
    )
    max_eval_samples: int | None = setting(None, "Evaluate on at most this many images, drawn with the seed.", LIMIT)
    num_workers: int = setting(
        4, "Processes that load images; 0 loads them in the training process.", NOT_NEGATIVE, changes_training=False
    )
    streaming: bool = setting(False, "Read the data while training instead of before; needs --max-steps.")
    shuffle_buffer: int = setting(
        1000, "Images among which a streamed data set is shuffled.", AT_LEAST_ONE, only_for_training=True
    )
    check_images: int = setting(
        1000,
        "Decode this many images of each split, evenly spread, before training starts; -1 decodes all, 0 none.",
        Accepted("-1, 0 or a number of images", lambda value: value >= -1),
        changes_training=False,
        only_for_training=True,
    )
    on_bad_image: Literal["error", "skip"] = setting(
        "error",
        "What an image that cannot be decoded does: end the run, or give its place to the next one, counted.",
        changes_training=False,
    )
    max_bad_images: float = setting(
        0.01, "Share of bad images that still ends the run.", SHARE, changes_training=False, only_for_training=True
    )


@dataclass
class AugmentationArguments:
    """How training images are varied (evaluation resizes and crops as the image processor says)."""

    crop: Literal["random_resized", "padded", "none"] = setting(
        "random_resized",
        "random_resized: ImageNet's; padded: random crop after adding a margin, as for CIFAR; none: resize.",
    )
    crop_min_scale: float = setting(0.08, "Smallest part of the image's area that a random resized crop takes.", SHARE)
    horizontal_flip: float = setting(0.5, "Probability of a horizontal flip.", SHARE)
    affine_degrees: float = setting(
        0.0, "Random rotation by up to this many degrees, with a tenth of shift and scale.", NOT_NEGATIVE
    )
    rand_augment: float = setting(
        0.0,
        "Magnitude of timm's RandAugment (inc1), up to 10; 0 is off, the paper has 9.",
        Accepted("in [0, 10]", lambda value: 0 <= value <= 10),
    )
    rand_augment_std: float = setting(
        0.0, "Standard deviation of that magnitude from image to image; the paper has 0.5.", NOT_NEGATIVE
    )
    three_augment: bool = setting(False, "DeiT III: grey, solarized or blurred, one of the three for each image.")
    color_jitter: float = setting(
        0.0, "Strength of brightness, contrast and saturation changes; 0 is off.", NOT_NEGATIVE
    )
    random_erasing: float = setting(0.0, "Probability of filling a rectangle with noise; the paper has 0.25.", SHARE)
    repeated_augmentation: int = setting(
        1,
        "Differently augmented copies of an image in one batch; an epoch stays as long as without. The paper has 3.",
        AT_LEAST_ONE,
    )
    mixup: float = setting(0.0, "Parameter of MixUp's Beta distribution; 0 is off, the paper has 0.8.", NOT_NEGATIVE)
    cutmix: float = setting(0.0, "Parameter of CutMix's Beta distribution; 0 is off, the paper has 1.0.", NOT_NEGATIVE)
    mix_switch: float = setting(0.5, "Share of the mixed batches that CutMix gets, where both are on.", SHARE)


@dataclass
class ModelArguments:
    """Which network to train: a checkpoint, or one from scratch."""

    model: str | None = setting(
        None,
        "Checkpoint to fine-tune, a folder or Hub id: EViT, ViT, DeiT, DINOv2, CLIP, BEiT or timm; by default a model "
        "from scratch.",
    )
    preset: str | None = setting(
        None, "Model of the paper to train from scratch, for example evit-deit-s or evit-lvvit-s."
    )
    keep_rate: list[float] | None = setting(
        None,
        "Share of image tokens to keep, in (0, 1]: one number, or one for each reorganization layer; by default what "
        "--model was trained for, else 0.7.",
        KEEP_RATE,
    )
    macs: float | None = setting(
        None,
        "Share of the dense model's operations, in (0, 1], instead of a keep rate: all layers then have keep rates at "
        "which they give up the same number of tokens, and each is counted by the kept one that it resembles most.",
        KEEP_RATE,
        instead_of="keep_rate",
    )
    match_macs_of: int | None = setting(
        None,
        "Choose the keep rate at which a model for --image-size costs as much as the dense one at this many pixels.",
        AT_LEAST_ONE,
    )
    reorganization_layers: list[int] | None = setting(
        None,
        "Zero-based layers that reorganize; by default those of --model, else at one, two and three quarters of the "
        "depth.",
    )
    inattentive_tokens: Literal["fused", "dropped", "counted"] | None = setting(
        None,
        "What becomes of the inattentive tokens: fused into one token, dropped, or counted by the kept ones; by "
        "default counted with --macs, what --model was trained for, else fused.",
    )
    image_size: int | None = setting(
        None,
        "Pixels; by default the checkpoint's (of DINOv2 and others its processor's) or preset's, 224 from scratch. "
        "Positions are interpolated.",
        AT_LEAST_ONE,
    )
    drop_path_rate: float | None = setting(
        None,
        "Stochastic depth rate of the last layer; the paper has 0.1. By default the checkpoint's, 0 from scratch.",
        BELOW_ONE,
    )
    patch_size: int = setting(16, "Pixels, from scratch.", AT_LEAST_ONE)
    hidden_size: int = setting(384, "Width, from scratch.", AT_LEAST_ONE)
    num_hidden_layers: int = setting(12, "Depth, from scratch.", AT_LEAST_ONE)
    num_attention_heads: int = setting(6, "Heads, from scratch.", AT_LEAST_ONE)
    use_distillation_token: bool = setting(
        False, "A second token and classifier for a teacher, as in DeiT, from scratch."
    )
    initializer_range: float = setting(0.02, "Standard deviation of random weights, from scratch.", NOT_NEGATIVE)
    trainable: Literal["all", "head"] = setting("all", "Train everything, or only the classifier (linear probe).")
    freeze_layers: int = setting(0, "Freeze the embeddings and this many of the first layers.", NOT_NEGATIVE)


@dataclass
class OptimizationArguments:
    """How long and how fast to train."""

    epochs: int = setting(30, "Passes over the training images.", AT_LEAST_ONE)
    max_steps: int | None = setting(None, "Stop after this many optimizer steps; the schedules end there too.", LIMIT)
    batch_size: int = setting(64, "Images for each optimizer step, over all processes and accumulated.", AT_LEAST_ONE)
    gradient_accumulation_steps: int = setting(
        1, "Forward passes into which each process cuts its share of a batch.", AT_LEAST_ONE
    )
    drop_last: bool = setting(
        True, "Leave out the last, smaller batch of an epoch; otherwise its images weigh as much as any."
    )
    eval_batch_size: int = setting(
        128, "Images for each evaluation step and process.", AT_LEAST_ONE, changes_training=False
    )
    learning_rate: float | None = setting(
        None, "Peak learning rate of AdamW; by default 2e-5 to fine-tune, 5e-4 from scratch.", NOT_NEGATIVE
    )
    scale_learning_rate: bool = setting(
        False, "The learning rate is meant for batch size 512: scale it linearly with the batch size."
    )
    min_learning_rate: float = setting(0.0, "Learning rate at the end of the cosine; it is not scaled.", NOT_NEGATIVE)
    layer_decay: float = setting(1.0, "Factor on the learning rate from each layer to the one below it.", KEEP_RATE)
    warmup_epochs: float | None = setting(
        None,
        "Epochs of linear warm-up from zero; by default 0 to fine-tune, from scratch a tenth of all, but at most 5.",
        NOT_NEGATIVE,
    )
    weight_decay: float = setting(0.05, "Weight decay; norms, biases, positions and tokens have none.", NOT_NEGATIVE)
    label_smoothing: float = setting(0.0, "Share of the target spread over all classes; the paper has 0.1.", SHARE)
    mix_token: float = setting(
        0.0, "Probability that a step mixes the patch tokens of two images, and their labels; LV-ViT has 1.", SHARE
    )
    max_grad_norm: float = setting(0.0, "Clip gradients to this norm; 0 is off.", NOT_NEGATIVE)
    max_skipped_steps: int = setting(
        5, "Steps in a row with a loss or gradient that is not finite before the run ends.", AT_LEAST_ONE
    )
    ema_decay: float = setting(
        0.0,
        "Decay of an average of the weights, evaluated next to them and saved as the model; the paper has 0.99996.",
        BELOW_ONE,
    )
    keep_rate_dense_epochs: float = setting(
        0.0, "Epochs at keep rate 1.0; the paper has 10 from scratch.", NOT_NEGATIVE
    )
    keep_rate_shrink_epochs: float = setting(
        0.0, "Epochs of cosine down to the keep rate; the paper has 100.", NOT_NEGATIVE
    )
    keep_rate_levels: int | None = setting(
        None,
        "Round the schedule up to one of this many keep rates above the target; by default it is exact.",
        AT_LEAST_ONE,
    )
    keep_rate_range: list[float] | None = setting(
        None,
        "Lowest and highest keep rate: each step draws one between them, for a model that serves many rates.",
        KEEP_RATE,
    )


@dataclass
class TeacherArguments:
    """Other networks that take part in training and are not trained."""

    oracle: str | None = setting(
        None, "Dense ViT that names the important tokens: a folder or Hub id, or `initial` for the weights of --model."
    )
    oracle_epochs: float | None = setting(
        None,
        "First epochs, in which the oracle chooses the tokens; by default all.",
        dataclasses.replace(NOT_NEGATIVE, way_out=LIMIT.way_out),
    )
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
    distillation_weight: float = setting(0.5, "Share of the teacher in the loss; DeiT has 0.5.", SHARE)
    distillation_temperature: float = setting(1.0, "Temperature of soft distillation; DeiT has 3.", POSITIVE)


@dataclass
class HubArguments:
    """Whether and how the model goes to the Hugging Face Hub."""

    push_to_hub: str | None = setting(
        None, "Push the model to this repository, ORG/NAME; made if there is none.", changes_training=False
    )
    push_when: Literal["end", "best", "epoch"] = setting(
        "end",
        "Push only at the end, or also after each epoch that is the best so far, or after each epoch.",
        changes_training=False,
    )
    push_private: bool = setting(False, "Make a new repository private.", changes_training=False)
    push_revision: str | None = setting(None, "Branch to push to; made if there is none.", changes_training=False)
    push_minutes: float = setting(10.0, "Minutes after which a push is given up.", POSITIVE, changes_training=False)
    model_license: str = setting("apache-2.0", "Licence of the trained model, for its card.", changes_training=False)


@dataclass
class RunArguments:
    """Where and how to run, and what to save."""

    output_dir: str = setting(
        "runs/evit",
        "Folder for model, checkpoints, metrics and pictures; one run, one folder.",
        changes_training=False,
    )
    overwrite: bool = setting(False, "Delete what an earlier run left in the output folder.", changes_training=False)
    resume: str | None = setting(
        None,
        "`auto` resumes from the newest intact checkpoint in the output folder; or the path of a checkpoint.",
        changes_training=False,
    )
    resume_override: bool = setting(
        False, "Resume although settings differ from those of the checkpoint.", changes_training=False
    )
    checkpoint_steps: int | None = setting(
        None,
        "Optimizer steps between two checkpoints; one is also written after each epoch.",
        LIMIT,
        changes_training=False,
    )
    eval_steps: int | None = setting(
        None,
        "Optimizer steps between two evaluations, each of which follows a checkpoint; by default one epoch.",
        LIMIT,
        changes_training=False,
    )
    early_stopping_patience: int | None = setting(
        None,
        "Stop after this many evaluations in a row none of which was better than the best; by default never.",
        LIMIT,
        changes_training=False,
    )
    keep_checkpoints: int = setting(
        2,
        "Newest checkpoints to keep, at least 2; the best one is kept in addition.",
        Accepted("at least 2, so that a damaged one loses little", lambda value: value >= 2),
        changes_training=False,
    )
    final_weights: Literal["last", "best"] = setting(
        "last",
        "Weights that the saved model has: the last ones (averaged, with --ema-decay), or the best evaluated.",
        changes_training=False,
    )
    seed: int = setting(0, "Seed of weights, order, augmentation and held-out images.")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "Precision of matrix products in training.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    compile: bool = setting(
        False,
        "Compile the layers with torch.compile for any number of tokens, so that no keep rate is compiled again.",
    )
    log_steps: int = setting(
        50, "Optimizer steps between two lines of the training log.", AT_LEAST_ONE, changes_training=False
    )
    trackers: list[str] = setting(
        [],
        "Trackers in addition to metrics.jsonl, through Accelerate: tensorboard, wandb, trackio and others. They get "
        "the numbers and all settings; their files are in `trackers/` of the output folder.",
        changes_training=False,
    )
    tracker_project: str = setting("evit_hf", "Name of the project in trackers.", changes_training=False)
    tracker_run: str | None = setting(
        None,
        "Name of the run in trackers that name runs; by default that of the output folder.",
        changes_training=False,
    )
    compare_keep_rates: list[float] | None = setting(
        None,
        "Keep rates to measure the final model at, for its card, besides 1.0 and its own; none by default.",
        KEEP_RATE,
        changes_training=False,
    )
    num_pictures: int = setting(
        8, "Evaluation images drawn with their kept patches; 0 draws none.", NOT_NEGATIVE, changes_training=False
    )
    dry_run: bool = setting(
        False,
        "Build everything, train two steps, report memory, GMACs and the projected time, and save nothing.",
        changes_training=False,
    )
    json: bool = json_setting()
    quiet: bool = quiet_setting()


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

    def __post_init__(self) -> None:
        """Give the settings whose defaults depend on others their values."""
        for part in vars(self).values():
            for name, value in self._fitting_defaults().items():
                if getattr(part, name, value) is None:
                    setattr(part, name, value)

    def _fitting_defaults(self) -> dict[str, Any]:
        """Defaults that depend on other settings."""
        is_scratch, max_steps = self.model.model is None, self.optimization.max_steps
        return {
            "learning_rate": 5e-4 if is_scratch else 2e-5,
            # Of `--max-steps` a tenth, which is known where an epoch is, see `warmup_steps`.
            "warmup_epochs": 0.0 if not is_scratch else None if max_steps else min(5.0, self.optimization.epochs / 10),
            # Of a model that is fine-tuned its own, see `build_model`.
            "inattentive_tokens": "counted" if self.model.macs is not None else "fused" if is_scratch else None,
        }

    def as_flags(self) -> list[str]:
        """The settings that differ from their defaults, as words of a command line."""
        fitting = self._fitting_defaults()
        flags = []
        for name, value in self.as_dict().items():
            if value in (None, []) or value == fitting.get(name, default_of(FIELDS[name])):
                continue
            flags += [flag(name), *map(str, value if isinstance(value, list) else [value])]
        return flags

    def as_dict(self) -> dict[str, Any]:
        """All settings under their flat names, as a recipe would give them."""
        return {name: value for part in vars(self).values() for name, value in dataclasses.asdict(part).items()}

    def check(self) -> None:
        """Raise ValueError for values that no run can have, or that contradict each other."""
        for part in vars(self).values():
            check_settings(part)
        model, augmentation, optimization = self.model, self.augmentation, self.optimization
        rates = optimization.keep_rate_range
        if rates is not None and not (len(rates) == 2 and rates[0] <= rates[1]):
            raise ValueError(f"`--keep-rate-range` must be two rates in (0, 1], the lower one first, got {rates}.")
        needs_model = "takes the weights of `--model`, which is missing."
        has_repeats = augmentation.repeated_augmentation > 1
        for is_contradiction, sentence in (
            (model.model and model.preset, "`--model` and `--preset` both name the model: give one of them."),
            (
                model.match_macs_of and model.keep_rate,
                "`--match-macs-of` chooses the keep rate: leave out `--keep-rate`.",
            ),
            (model.match_macs_of and model.macs, "`--match-macs-of` chooses the keep rate: leave out `--macs`."),
            (
                rates is not None and model.macs,
                "`--keep-rate-range` draws one rate for all layers, `--macs` has one for each: give one of them.",
            ),
            (
                optimization.mix_token and (augmentation.mixup or augmentation.cutmix),
                "`--mix-token` mixes images already: leave out `--mixup` and `--cutmix`.",
            ),
            (self.teacher.oracle == "initial" and not model.model, f"`--oracle initial` {needs_model}"),
            (self.teacher.teacher == "initial" and not model.model, f"`--teacher initial` {needs_model}"),
            (
                self.data.streaming and optimization.max_steps is None,
                "`--streaming` data has no known length: say with `--max-steps` how long to train.",
            ),
            (
                self.data.streaming and self.run.early_stopping_patience and not self.run.eval_steps,
                "`--early-stopping-patience` needs evaluations before the end, which `--streaming` has only with "
                "`--eval-steps`.",
            ),
            (
                self.data.streaming and has_repeats,
                "`--repeated-augmentation` needs data with a known order: leave out `--streaming`.",
            ),
            (
                self.data.streaming and self.data.balanced_sampling,
                "`--balanced-sampling` needs data whose labels are known: leave out `--streaming`.",
            ),
        ):
            if is_contradiction:
                raise ValueError(sentence)

    @property
    def keep_rate(self) -> float | list[float]:
        """The target keep rate as a model takes it: a number, or a list with one for each reorganization layer.

        A model that is fine-tuned without any has its own, see `build_model`.
        """
        rates = self.model.keep_rate or [0.7]
        return rates[0] if len(rates) == 1 else list(rates)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate, scaled by batch size / 512 where that is wanted."""
        optimization = self.optimization
        assert optimization.learning_rate is not None
        return optimization.learning_rate * (
            optimization.batch_size / 512 if optimization.scale_learning_rate else 1.0
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
FIELDS = {field.name: field for part in PARTS for field in dataclasses.fields(part)}
SETTINGS = list(FIELDS)
RENAMED_FLAGS = {"fuse-inattentive-tokens": "`--inattentive-tokens fused|dropped`"}


def in_todays_words(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version wrote, under the names and values that they have now."""
    settings = dict(settings)
    if "fuse_inattentive_tokens" in settings:
        is_fused = str(settings.pop("fuse_inattentive_tokens")).lower() in ("true", "yes", "on")
        settings.setdefault("inattentive_tokens", "fused" if is_fused else "dropped")
    return settings


def packaged_names(folder: Path) -> str:
    """Names of the packaged YAML files of a folder, in words."""
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))


def recipe_path(name_or_path: str) -> Path:
    """The file of a recipe, given by path or by the name of a packaged one.

    Raises: ValueError naming the packaged recipes.
    """
    return packaged_file(name_or_path, RECIPES, "recipe")


def packaged_file(name_or_path: str, folder: Path, kind: str) -> Path:
    """A YAML file, given by path or by the name of one that is packaged.

    Args:
        name_or_path: as on the command line.
        folder: of the packaged ones.
        kind: word for the error, "recipe" or "study".

    Raises: ValueError naming the packaged ones.
    """
    for path in (Path(name_or_path), folder / f"{name_or_path}.yaml"):
        if path.is_file():
            return path
    raise ValueError(
        f"There is no {kind} `{name_or_path}`: give the path of a YAML file, or one of {packaged_names(folder)}."
    )


def read_mapping(path: Path, kind: str) -> tuple[dict[str, Any], yaml.Node | None]:
    """The `name: value` lines of a YAML file, as values and as nodes, which know their lines and spelling.

    Args:
        path: of the file.
        kind: word for the error, "recipe" or "study".

    Raises: ValueError for a file that is not a mapping in YAML.
    """
    try:
        text = path.read_text("utf-8")
        settings, root = yaml.safe_load(text) or {}, yaml.compose(text)
    except UnicodeDecodeError:
        raise ValueError(f"`{path}` is not a text file: a {kind} is YAML.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"`{path}` is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"`{path}` must hold `name: value` lines, got a {type(settings).__name__}.")
    return settings, root


def recipe_flags(path: Path, without: Sequence[str] = ()) -> list[str]:
    """The settings of a recipe as command-line flags, so that both go through the same checks.

    Args:
        path: of the recipe.
        without: settings to leave out.

    Raises: ValueError for a file that is not a mapping in YAML, or for a setting that does not exist.
    """
    settings, root = read_mapping(path, "recipe")
    nodes = dict(root.value) if isinstance(root, yaml.MappingNode) else {}
    lines = {key.value: key.start_mark.line + 1 for key in nodes}
    # As the file spells it: YAML reads `no` as False, and 1e-3 as a string.
    spelled = {key.value: value.value for key, value in nodes.items() if isinstance(value, yaml.ScalarNode)}
    flags = []
    for name, value in settings.items():
        where, value = f"{path}:{lines.get(str(name), '?')}", spelled.get(name, value)
        if name == "fuse_inattentive_tokens":
            ((name, value),) = in_todays_words({name: value}).items()
            sys.stderr.write(f"`{where}`: `fuse_inattentive_tokens` is `inattentive_tokens: {value}` now.\n")
        if name not in FIELDS:
            raise ValueError(
                f"`{where}` has an unknown setting `{name}`: "
                f"{closest(str(name).replace('-', '_'), FIELDS, 'see `evit train --help`.')}"
            )
        if settings.get(name, value) is None or value == [] or name in without:
            continue
        if value == "" or isinstance(value, dict):
            raise ValueError(f"`{where}`: `{name}` must be a word, a number or a list of them, got {value!r}.")
        flags += [flag(name), *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return flags


def train_parser() -> FlagParser:
    """Parser of `evit train`."""
    return FlagParser(
        "train",
        PARTS,
        usage="evit train [RECIPE] [--flag value ...]",
        description="Train or fine-tune an EViT. RECIPE is a YAML file or the name of a packaged recipe "
        f"({packaged_names(RECIPES)}); flags override it.",
        renamed=RENAMED_FLAGS,
    )


def parse_train_arguments(argv: Sequence[str]) -> TrainArguments:
    """Settings from a command line: an optional recipe, and flags, which override it.

    Args:
        argv: for example ["digits", "--epochs", "5", "--keep-rate", "0.5"].

    Returns: the settings.

    Raises: SystemExit with status 2 and one line on standard error, as argparse does.
    """
    parser = train_parser()
    try:
        words, flags = parser.sorted_apart(argv)
        if len(words) > 1:
            raise ValueError(f"`{words[1]}` is one word too many after the recipe: see `evit train --help`.")
        if words:
            # A flag that chooses the keep rate overrides what the recipe says of it, as every flag does.
            ways = ("keep_rate", "macs", "match_macs_of")
            chosen = {word.split("=")[0] for word in flags} & {flag(name) for name in ways}
            path = recipe_path(words[0])
            of_recipe = recipe_flags(path, [name for name in ways if flag(name) not in chosen] if chosen else [])
            parser.source = str(path)
            parser.parse(of_recipe)  # by themselves, so that errors name the file
            parser.source = ""
            flags = of_recipe + flags
        parts, _, _ = parser.parse(flags)
        arguments = TrainArguments(*parts)
        arguments.check()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments
