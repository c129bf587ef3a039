"""The command `evit convert SOURCE DEST`: a public checkpoint becomes a folder with an EViT."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="evit convert",
        description="Make an EViT from a public checkpoint: official EViT, DeiT, TokenReduction or LV-ViT files, timm "
        "folders and state dicts, Transformers ViT and DeiT folders, or Hub ids. What no flag says is taken from the "
        "source.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="File, folder or Hub id.")
    parser.add_argument("dest", help="Folder to write; it must not exist or be empty.")
    parser.add_argument(
        "--keep-rate", type=float, nargs="+", metavar="R", help="In (0, 1]: one, or one for each layer."
    )
    parser.add_argument("--reorganization-layers", type=int, nargs="+", metavar="L", help="Zero-based layers.")
    parser.add_argument("--no-fuse", action="store_true", help="Drop inattentive tokens instead of fusing them.")
    parser.add_argument("--labels", help="File with the names of the classes: one a line, or JSON.")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="One number, or height and width; resizes the position embeddings bicubically.",
    )
    parser.add_argument("--num-attention-heads", type=int, help="For a state dict that is not of a published size.")
    parser.add_argument(
        "--residual-scale", type=float, help="`skip_lam` of an LV-ViT that is not of a published size."
    )
    parser.add_argument(
        "--weights", help="Which ones to take of a file that holds several: state_dict_ema, teacher, ..."
    )
    parser.add_argument("--allow-non-finite-weights", action="store_true", help="Accept NaN and infinite weights.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Convert with the settings of a command line; what cannot work ends with one line and status 2."""
    arguments = parser().parse_args(argv)
    dest = Path(arguments.dest)
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        parser().error(f"`{dest}` is there already: name a new folder.")

    from huggingface_hub.errors import StrictDataclassError

    from evit_hf.conversion import ConversionError, convert_checkpoint, read_labels
    from evit_hf.profiling import num_macs

    try:
        keep_rate, image_size = arguments.keep_rate, arguments.image_size
        converted = convert_checkpoint(
            arguments.source,
            keep_rate=keep_rate[0] if keep_rate and len(keep_rate) == 1 else keep_rate,
            reorganization_layers=arguments.reorganization_layers,
            fuse_inattentive_tokens=False if arguments.no_fuse else None,
            image_size=image_size[0] if image_size and len(image_size) == 1 else image_size,
            labels=read_labels(arguments.labels) if arguments.labels else None,
            num_attention_heads=arguments.num_attention_heads,
            residual_scale=arguments.residual_scale,
            weights=arguments.weights,
            allow_non_finite_weights=arguments.allow_non_finite_weights,
        )
    except (ConversionError, StrictDataclassError, ValueError, OSError) as error:
        parser().error(str(error))
    converted.save_pretrained(dest)
    model, config = converted.model, converted.model.config
    lines = [
        f"{arguments.source}: {converted.source_format}",
        *(f"left out: {name} ({reason})" for name, reason in converted.unused.items()),
        *(f"note: {note}" for note in converted.notes),
        f"{dest}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{config.image_size} pixels, keep rate {config.keep_rate} at layers {config.reorganization_layers}, "
        f"{'fused' if config.fuse_inattentive_tokens else 'dropped'}, {num_macs(config) / 1e9:.3f} GMACs",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
