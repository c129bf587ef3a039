"""The command `evit inspect`: what a model keeps over a whole data set.

evit inspect runs/digits --dataset digits -o inspection
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import DataArguments
from ..screen import bar, say, screen, show_result
from ..settings import (
    AT_LEAST_ONE,
    KEEP_RATE,
    NOT_NEGATIVE,
    FlagParser,
    budget_in_words,
    budget_of,
    json_setting,
    kept_of,
    macs_list_setting,
    quiet_setting,
    setting,
)
from .errors import command


@dataclass
class InspectArguments:
    """What to look at."""

    keep_rates: list[float] = setting(
        [0.7, 0.5], "Keep rates below 1; the first is the one drawn by class. Dense is always compared.", KEEP_RATE
    )
    macs: list[float] | None = macs_list_setting()
    batch_size: int = setting(32, "Images for each forward.", AT_LEAST_ONE)
    device: str | None = setting(None, "cpu, cuda, mps ...; by default the best there is.")
    num_pictures: int = setting(6, "Images with the most different answers to draw.", NOT_NEGATIVE)
    json: bool = json_setting()
    quiet: bool = quiet_setting()


@command("inspect")
def main(argv: list[str]) -> None:
    """Inspect with the settings of a command line."""
    parser = FlagParser(
        "inspect",
        [InspectArguments, DataArguments],
        usage="evit inspect MODEL --dataset DATA -o OUT [--keep-rates 0.7 0.5 | --macs 0.66] [--flag value ...]",
        description="How often each place of the patch grid survives each reorganization layer, also by class; how "
        "much kept patches overlap between keep rates, or shares of operations, and with what the dense model attends "
        "to; how often answers agree with the dense model's, and the images on which they differ most. OUT gets "
        "inspection.json, survival.png, survival_by_class.png, overlap.png, agreement.png and most_different.png. "
        "MODEL is a model folder, a run folder or a Hub id.",
        leave_out=lambda field: field.metadata.get("only_for_training", False) or field.name == "streaming",
    )
    parser.add_argument("model", help="Model folder, run folder or Hub id of an image classifier.")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="Folder for the report and its figures.")
    (arguments, data), rest, _ = parser.parse(argv)
    keep_rates = [rate for rate in dict.fromkeys(kept_of(arguments)) if float(rate) < 1]
    if not keep_rates:
        raise ValueError("`--keep-rates` must name a keep rate below 1, to be compared with the dense model.")
    if Path(rest.output).is_file():
        raise ValueError(f"`-o` is a file, `{rest.output}`: name a folder.")
    from ..learning.sources import resolve_model

    with screen(arguments.quiet, arguments.json):
        show_result(None, inspect_data(resolve_model(rest.model), Path(rest.output), keep_rates, arguments, data))


def inspect_data(
    model: str, folder: Path, keep_rates: list[Any], arguments: InspectArguments, data: DataArguments
) -> dict[str, Any]:
    """Look at what a model keeps of a data set, and write the report and its figures.

    Args:
        model: folder or Hub id of an image classifier.
        folder: for the files.
        keep_rates: below 1, or shares of operations; the first is drawn by class.
        arguments: batches and the like.
        data: images of the evaluation split.

    Returns: what inspection.json holds.

    Raises: ValueError for data or a model that cannot be read.
    """
    from evit_hf.visualization import visualize

    from ..data.augmentation import ProcessorTransform, load_processor
    from ..data.images import EvaluationImages
    from ..data.loaders import evaluation_loader
    from ..data.splits import describe_splits, load_evaluation_split, with_classes_of
    from ..learning.models import load_classifier
    from ..measuring import inspection, inspection_figures
    from ..measuring.machine import accelerator_on

    accelerator = accelerator_on(arguments.device)
    if accelerator.num_processes > 1:
        raise ValueError("`evit inspect` runs in one process: start it without torchrun or accelerate.")
    network, processor = load_classifier(model).eval().to(accelerator.device), load_processor(model)
    splits = load_evaluation_split(data)
    say(describe_splits(splits, ("evaluation",)))
    knows_classes = True
    try:
        splits = with_classes_of(network, splits)
    except ValueError as error:
        knows_classes = False
        say(f"No accuracy: {error}")
    if splits.multi_label:
        network.config.problem_type = "multi_label_classification"
    loader = evaluation_loader(
        splits, processor, arguments.batch_size, data.num_workers, accelerator, data.on_bad_image
    )
    batches = bar(loader, unit="batch")
    found = inspection.inspect_model(
        network, batches, keep_rates, splits.label_names, splits.multi_label, knows_classes
    )
    labels = [str(network.config.id2label[i]) for i in range(network.config.num_labels)]
    report = {"model": model, "dataset": data.dataset, **found.as_json(labels, arguments.num_pictures)}
    folder.mkdir(parents=True, exist_ok=True)
    inspection.write_inspection(report, folder)
    inspection_figures.draw_survival(found, folder / "survival.png")
    inspection_figures.draw_survival_by_class(found, folder / "survival_by_class.png")
    inspection_figures.draw_overlap(found, folder / "overlap.png")
    inspection_figures.draw_agreement(found, folder / "agreement.png")
    images = EvaluationImages(splits, ProcessorTransform(processor))
    different = []
    for (rate, _), row in zip(found.most_different(arguments.num_pictures), report["most_different"], strict=True):
        kept, about = budget_of(rate.keep_rate), f"image {row['image']}, labelled {row['label']}"
        title = f"{about}: distance {row['distance']:.2f} at {budget_in_words(rate.keep_rate)}"
        kept = {"macs": [kept["macs"]]} if "macs" in kept else {"keep_rates": [kept["keep_rate"]]}
        different.append((title, visualize(network, processor, images.image(row["image"]), **kept)))
    if different:
        inspection_figures.draw_most_different(different, folder / "most_different.png")
    for rate in found.rates:
        accuracy = found.accuracy(rate.answers)
        right = "" if accuracy is None else f", {100 * accuracy:.1f} % right"
        say(f"{budget_in_words(rate.keep_rate)}: {100 * found.agreement(rate):.1f} % answers as dense{right}")
    say(f"Saved {folder / 'inspection.json'} and {4 + bool(different)} figures next to it.")
    return report
