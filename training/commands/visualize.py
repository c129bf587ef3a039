"""The command `evit visualize`: what a model keeps of pictures, looks at and answers, drawn.

evit visualize runs/digits photo.jpg -o photo.png --keep-rates 0.9 0.7 0.5
evit visualize google/vit-base-patch16-224 holiday/ -o holiday.html
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..screen import bar, say, screen, show_result
from ..settings import AT_LEAST_ONE, KEEP_RATE, FlagParser, json_setting, macs_list_setting, quiet_setting, setting
from .errors import command


if TYPE_CHECKING:
    from evit_hf.visualization import View, Visualization


FILES = (".png", ".webp", ".gif", ".html")


@dataclass
class VisualizeArguments:
    """What to draw."""

    keep_rates: list[float] | None = setting(
        None,
        "Keep rates in (0, 1], a block of rows for each after the dense model's; by default the model's own.",
        KEEP_RATE,
    )
    macs: list[float] | None = macs_list_setting()
    animation: Literal["webp", "gif"] | None = setting(
        None, "For a folder OUT: an animation through the layers too, next to each PNG."
    )
    html: bool = setting(
        False, "For a folder OUT: one report of all pictures, OUT/index.html, instead of a PNG for each."
    )
    top_k: int = setting(3, "Answers to name.", AT_LEAST_ONE)
    device: str | None = setting(None, "cpu, cuda, mps ...; by default the best there is.")
    on_bad_image: Literal["report", "error"] = setting(
        "report", "What a picture that cannot be decoded does: be named and left out, or end the command."
    )
    json: bool = json_setting()
    quiet: bool = quiet_setting()


@command("visualize")
def main(argv: list[str]) -> None:
    """Draw with the settings of a command line."""
    parser = FlagParser(
        "visualize",
        [VisualizeArguments],
        usage="evit visualize MODEL IMAGE|FOLDER ... -o OUT [--keep-rates 0.7 0.5 | --macs 0.66] [--flag value ...]",
        description="Draw, for each reorganization layer, the patches that are kept, the class token's attention to "
        "all patches, and where the fused token drew its weight from or which patches each token counts, with answers "
        "and operations next to those of the dense model. MODEL is a model folder, a run folder or a Hub id. Files of "
        "the same name are replaced.",
    )
    parser.add_argument("model", help="Model folder, run folder or Hub id of an image classifier.")
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="Pictures, or folders of them.")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        required=True,
        help="For one picture a file, .png, or .webp or .gif for an animation; for any number a report, .html, or a "
        "folder.",
    )
    (arguments,), rest, _ = parser.parse(argv)
    output = Path(rest.output)
    check_output(output, arguments)
    from ..learning.sources import resolve_model

    with screen(arguments.quiet, arguments.json):
        show_result(None, visualize_all(resolve_model(rest.model), rest.images, output, arguments))


def check_output(output: Path, arguments: VisualizeArguments) -> None:
    """Refuse an output that cannot be, before anything heavy is imported.

    Raises: ValueError naming the flag.
    """
    suffix = output.suffix.lower()
    if suffix in FILES:
        if arguments.html or arguments.animation:
            raise ValueError(f"`--html` and `--animation` are for a folder, but `-o` is the file `{output}`.")
        if output.is_dir():
            raise ValueError(f"`-o` is a folder, `{output}`, with the name of a file: choose a different one.")
    elif output.is_file() or (suffix and not output.is_dir()):
        raise ValueError(f"`-o` must be a folder, or a file that ends in {', '.join(FILES)}, got `{output}`.")


def visualize_all(model: str, words: list[str], output: Path, arguments: VisualizeArguments) -> dict[str, Any]:
    """Draw pictures, and write what is asked for.

    Args:
        model: folder or Hub id of an image classifier.
        words: pictures and folders.
        output: file or folder.
        arguments: what to draw.

    Returns: {"model", "images": answers, operations and files of each picture, "bad_images": those left out}.

    Raises: ValueError if there is nothing to draw, or a picture cannot be decoded with `--on-bad-image error`.
    """
    from ..data.folders import picture_files
    from ..learning.sources import name_of
    from ..measuring.html_report import write_report

    files = picture_files(words)
    is_file, suffix = output.suffix.lower() in FILES, output.suffix.lower()
    if is_file and suffix != ".html" and len(files) > 1:
        raise ValueError(f"`-o {output}` is a file for one picture, but there are {len(files)}: name a folder.")
    see = seer(model, arguments)
    report: dict[str, Any] = {"model": model, "images": [], "bad_images": []}
    (output.parent if is_file else output).mkdir(parents=True, exist_ok=True)
    makes_report = suffix == ".html" or arguments.html

    def pictures() -> "Iterator[Visualization]":
        from ..data.images import BadImageError

        for name, path in bar(files.items(), unit="image"):
            try:
                yield see(name, path)
            except BadImageError as error:
                if arguments.on_bad_image == "error":
                    raise
                report["bad_images"].append(name)
                print(error, file=sys.stderr)

    def drawn() -> "Iterator[Visualization]":
        for seen in pictures():
            written = [] if makes_report else write_pictures(seen, output, arguments)
            report["images"].append(described(seen, written))
            yield seen

    if makes_report:
        target = output if is_file else output / "index.html"
        write_report(drawn(), target, title=name_of(model))
        report["report"] = str(target)
    else:
        for _ in drawn():
            pass
    if not report["images"]:
        raise ValueError(f"None of the {len(files)} pictures can be decoded.")
    bad = f", {len(report['bad_images'])} could not be decoded" if report["bad_images"] else ""
    say(f"Saved {report.get('report', output)}: {len(report['images'])} pictures{bad}.")
    return report


def seer(model: str, arguments: VisualizeArguments) -> Any:
    """Load a model, and return what visualizes a picture with it by name and path."""
    from evit_hf.visualization import visualize

    from ..data.augmentation import load_processor
    from ..data.images import decoded
    from ..learning.models import load_classifier
    from ..measuring.machine import best_device

    device = best_device(arguments.device)
    network = load_classifier(model).eval().to(device)
    processor = load_processor(model)
    keep_rates = [None] if arguments.keep_rates is None else arguments.keep_rates

    def see(name: str, path: str) -> "Visualization":
        picture = decoded({"bytes": None, "path": path}, f"`{name}`")
        return visualize(network, processor, picture, keep_rates, name, arguments.top_k, arguments.macs)

    return see


def write_pictures(seen: "Visualization", output: Path, arguments: VisualizeArguments) -> list[str]:
    """Write a picture's files, and return their names."""
    suffix = output.suffix.lower()
    if suffix in (".webp", ".gif"):
        seen.save_animation(output)
        return [str(output)]
    path = output if suffix == ".png" else output / f"{seen.name.replace('/', '__')}.png"
    seen.sheet().save(path)
    if arguments.animation is None:
        return [str(path)]
    seen.save_animation(path.with_suffix(f".{arguments.animation}"))
    return [str(path), str(path.with_suffix(f".{arguments.animation}"))]


def described(seen: "Visualization", files: list[str]) -> dict[str, Any]:
    """What was found in one picture, for JSON."""

    def of(view: "View") -> dict[str, Any]:
        return {
            **({"keep_rate": view.keep_rate} if view.share is None else {"macs": view.share}),
            "answers": [{"label": label, "score": score} for label, score in view.answers],
            "gmacs": view.macs / 1e9,
            "layers": [stage.layer for stage in view.trace.stages],
            "patches_kept": [int(view.trace.kept(i).sum()) for i in range(len(view.trace.stages))],
        }

    return {"image": seen.name, "files": files, "dense": of(seen.dense), "views": [of(view) for view in seen.views]}
