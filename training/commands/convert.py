"""The command `evit convert SOURCE DEST`: a public checkpoint becomes a folder with an EViT."""

from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..settings import (
    AT_LEAST_ONE,
    KEEP_RATE,
    NOT_NEGATIVE,
    FlagParser,
    budget,
    check_new_folder,
    flag,
    macs_setting,
    setting,
)
from .errors import command


@dataclass
class ConvertArguments:
    """What the EViT is to have; flags not given keep what the source says."""

    keep_rate: list[float] | None = setting(None, "In (0, 1]: one, or one for each layer.", KEEP_RATE)
    macs: float | None = macs_setting()
    reorganization_layers: list[int] | None = setting(None, "Zero-based layers.", NOT_NEGATIVE)
    inattentive_tokens: Literal["fused", "dropped", "counted"] | None = setting(
        None, "What becomes of the inattentive tokens: fused into one token, dropped, or counted by the kept ones."
    )
    labels: str | None = setting(None, "File with the names of the classes: one a line, or JSON.")
    image_size: list[int] | None = setting(
        None, "Pixels: one number, or height and width; resizes the position embeddings bicubically.", AT_LEAST_ONE
    )
    num_attention_heads: int | None = setting(None, "For a state dict that is not of a published size.", AT_LEAST_ONE)
    residual_scale: float | None = setting(None, "`skip_lam` of an LV-ViT that is not of a published size.")
    weights: str | None = setting(
        None, "Which ones to take of a file that holds several: state_dict_ema, teacher, ..."
    )
    allow_non_finite_weights: bool = setting(False, "Accept NaN and infinite weights.")


def parser() -> FlagParser:
    """Parser of `evit convert`."""
    parser = FlagParser(
        "convert",
        [ConvertArguments],
        usage="evit convert SOURCE DEST [--keep-rate 0.7 | --macs 0.66] [--flag value ...]",
        description="Make an EViT from a public checkpoint: official EViT, DeiT, TokenReduction or LV-ViT files, timm "
        "folders and state dicts, Transformers ViT and DeiT folders, or Hub ids. Other families (DINOv2, CLIP, BEiT) "
        "keep their class and get the settings. What no flag says is taken from the "
        "source.",
        renamed={"fuse": "`--inattentive-tokens dropped`"},
    )
    parser.add_argument("source", help="File, model folder, run folder or Hub id.")
    parser.add_argument("dest", help="Folder to write; it must not exist or be empty.")
    return parser


@command("convert")
def main(argv: list[str]) -> None:
    """Convert with the settings of a command line."""
    (arguments,), rest, _ = parser().parse(argv)
    dest = Path(rest.dest)
    check_new_folder(dest)
    from ..learning.sources import resolve_model

    source = rest.source if Path(rest.source).is_file() else resolve_model(rest.source, "SOURCE")
    if not Path(source).is_file() and reorganize_family(source, dest, arguments):
        return
    from evit_hf.conversion import convert_checkpoint, read_labels
    from evit_hf.profiling import num_macs

    image_size = arguments.image_size
    converted = convert_checkpoint(
        source,
        **budget(arguments),
        reorganization_layers=arguments.reorganization_layers,
        inattentive_tokens=arguments.inattentive_tokens,
        image_size=image_size[0] if image_size and len(image_size) == 1 else image_size,
        labels=read_labels(arguments.labels) if arguments.labels else None,
        num_attention_heads=arguments.num_attention_heads,
        residual_scale=arguments.residual_scale,
        weights=arguments.weights,
        allow_non_finite_weights=arguments.allow_non_finite_weights,
    )
    converted.save_pretrained(dest)
    model, config = converted.model, converted.model.config
    lines = [
        f"{rest.source}: {converted.source_format}",
        *(f"left out: {name} ({reason})" for name, reason in converted.unused.items()),
        *(f"note: {note}" for note in converted.notes),
        f"{dest}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{config.image_size} pixels, {in_words(config)}, {num_macs(model) / 1e9:.3f} GMACs",
    ]
    print("\n".join(lines))


def reorganize_family(source: str, dest: Path, arguments: ConvertArguments) -> bool:
    """Write a model of a family, which keeps its class and weights, with settings that reorganize it.

    Returns: whether the source is one; EViT, ViT, DeiT and timm's are not.

    Raises: ValueError for a flag that says how an EViT is made.
    """
    from transformers import AutoImageProcessor, PreTrainedConfig

    from evit_hf import reorganize
    from evit_hf.towers import tower_of

    from ..learning.models import is_of_a_family, load_model

    if not is_of_a_family(PreTrainedConfig.get_config_dict(source)[0]):
        return False
    for one in fields(arguments):
        is_ours = one.name in ("keep_rate", "macs", "reorganization_layers", "inattentive_tokens")
        if not is_ours and getattr(arguments, one.name) not in (None, False):
            raise ValueError(f"`{flag(one.name)}` is for EViT: `{source}` keeps its class and weights, leave it out.")
    model = reorganize(
        load_model(source),
        **budget(arguments),
        reorganization_layers=arguments.reorganization_layers,
        inattentive_tokens=arguments.inattentive_tokens,
    )
    model.save_pretrained(dest)
    with suppress(OSError):  # a folder without image processor
        AutoImageProcessor.from_pretrained(source).save_pretrained(dest)
    config = tower_of(model).config
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{dest}: {type(model).__name__}, {num_parameters / 1e6:.2f} M parameters, {in_words(config)}")
    return True


def in_words(config: Any) -> str:
    """What a configuration says of the tokens to keep."""
    kept = f"keep rate {config.keep_rate}" if config.macs is None else f"{config.macs} of the dense operations"
    return f"{kept} at layers {config.reorganization_layers}, {config.inattentive_tokens}"
