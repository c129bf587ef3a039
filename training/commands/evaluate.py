"""Measure a model at a list of keep rates: `evit evaluate MODEL --dataset DATA --keep-rates 1.0 0.7 0.5`."""

import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..arguments import DataArguments
from ..screen import say, screen, show_result
from ..settings import (
    AT_LEAST_ONE,
    KEEP_RATE,
    FlagParser,
    json_setting,
    kept_of,
    macs_list_setting,
    make_output_dir,
    quiet_setting,
    setting,
)
from .errors import command


if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from ..measuring.evaluation import Measurement


@dataclass
class EvaluateArguments:
    """What to measure, and where to write it."""

    keep_rates: list[float] = setting(
        [1.0, 0.9, 0.8, 0.7, 0.6, 0.5], "Keep rates in (0, 1]; the first is the baseline.", KEEP_RATE
    )
    macs: list[float] | None = macs_list_setting()
    compare: bool = setting(
        False,
        "Compare ways to give up tokens at the same operations (--macs, by default 0.66 and 0.5) instead: ToMe, "
        "fused, dropped, counted, and counted without each of its parts.",
    )
    batch_size: int = setting(
        128, "Images for each forward and process, also in the measurement of speed.", AT_LEAST_ONE
    )
    output_dir: str | None = setting(
        None, "Folder for evaluation.json and evaluation.png; by default the model's, if local."
    )
    device: str | None = setting(None, "cpu, cuda, mps ...; by default the best there is.")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "Precision of matrix products.")
    json: bool = json_setting()
    quiet: bool = quiet_setting()


@command("evaluate")
def main(argv: list[str]) -> None:
    """Evaluate with the settings of a command line."""
    parser = FlagParser(
        "evaluate",
        [EvaluateArguments, DataArguments],
        usage="evit evaluate MODEL --dataset DATA [--keep-rates 1.0 0.7 0.5 | --macs 0.66 0.5] [--flag value ...]",
        description="Accuracy, GMACs and images per second of one model at several keep rates, or at shares of the "
        "dense model's operations, on all processes that were launched. MODEL is a model folder, a run folder or a "
        "Hub id.",
        leave_out=lambda field: field.metadata.get("only_for_training", False),
    )
    parser.add_argument("model", help="Model folder, run folder or Hub id of an image classifier.")
    (arguments, data), rest, given = parser.parse(argv)
    if arguments.compare and "keep_rates" in given:
        raise ValueError("`--compare` is at shares of operations: give `--macs` instead of `--keep-rates`.")
    from ..learning.sources import resolve_model

    with screen(arguments.quiet, arguments.json):
        evaluate_model(resolve_model(rest.model), arguments, data)


def evaluate_model(model: str, arguments: EvaluateArguments, data: DataArguments) -> "list[Measurement]":
    """Measure a model.

    Args:
        model: folder or Hub id of an image classifier, see `load_classifier`.
        arguments: keep rates and where to write.
        data: evaluation images; classes are matched with the model's by name.

    Returns: for each keep rate, or for the dense model and each share of operations, what `compare_keep_rates`
        returns; written to evaluation.json and drawn into evaluation.png too. With `compare` nothing is returned, and
        comparisons.json is written.

    Raises: ValueError if the model does not know the classes of the data, or for keep rates out of range.
    """
    from ..data.augmentation import load_processor
    from ..data.loaders import evaluation_loader
    from ..data.splits import describe_splits, load_evaluation_split, with_classes_of
    from ..learning.models import load_classifier
    from ..measuring.evaluation import compare_keep_rates, comparison_table, draw_tradeoff
    from ..measuring.machine import accelerator_on, check_launcher, end_training

    check_launcher(arguments.mixed_precision)
    make_output_dir(arguments.output_dir)
    accelerator = accelerator_on(arguments.device, mixed_precision=arguments.mixed_precision)
    network = load_classifier(model)
    splits = load_evaluation_split(data)
    say(describe_splits(splits, ("evaluation",)))
    splits = with_classes_of(network, splits)
    # The data knows; not every checkpoint says.
    network.config.problem_type = "multi_label_classification" if splits.multi_label else "single_label_classification"
    processor = load_processor(model)
    loader = evaluation_loader(
        splits, processor, arguments.batch_size, data.num_workers, accelerator, data.on_bad_image
    )
    prepared = accelerator.prepare_model(network, evaluation_mode=True)
    folder = Path(arguments.output_dir or model)
    about: dict[str, Any] = {"model": model, "dataset": data.dataset}
    with closing(loader):
        if arguments.compare:
            compare(accelerator, network, loader, arguments, folder, about)
            end_training(accelerator)
            return []
        results = compare_keep_rates(accelerator, prepared, loader, kept_of(arguments))
    report = {**about, "label_names": splits.label_names, "results": [result.as_json() for result in results]}
    show_result(comparison_table(results), report)
    if accelerator.is_main_process and (arguments.output_dir or folder.is_dir()):
        (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
        draw_tradeoff(results, folder / "evaluation.png")
        say(f"Saved {folder / 'evaluation.json'} and {folder / 'evaluation.png'}.")
    end_training(accelerator)
    return results


def compare(
    accelerator: "Accelerator",
    model: "PreTrainedModel",
    loader: Iterable[dict[str, Any]],
    arguments: EvaluateArguments,
    folder: Path,
    about: dict[str, Any],
) -> None:
    """Compare ways to give up tokens, see `measuring.comparisons`.

    Args:
        accelerator: with one process.
        model: a classifier with one label for each image.
        loader: evaluation images.
        arguments: shares of operations, and where to write.
        folder: for comparisons.json, if it is there or asked for.
        about: model and data, for the file.

    Raises: ValueError for several processes or labels.
    """
    from ..measuring.comparisons import DEFAULT_MACS, compare_ways

    if accelerator.num_processes > 1:
        raise ValueError("`--compare` runs in one process: start it without torchrun or accelerate.")
    if model.config.problem_type == "multi_label_classification":
        raise ValueError("`--compare` counts right answers, and this model can give several labels.")
    batches = (
        tuple(batch[name][batch["is_counted"].bool()].to(accelerator.device) for name in ("pixel_values", "labels"))
        for batch in loader
    )
    found = compare_ways(model, batches, arguments.macs or DEFAULT_MACS, autocast=accelerator.autocast).in_numbers()
    report = {**about, "mixed_precision": arguments.mixed_precision, **found.as_json()}
    show_result(found.table(), report)
    if arguments.output_dir or folder.is_dir():
        (folder / "comparisons.json").write_text(json.dumps(report, indent=2) + "\n")
        say(f"Saved {folder / 'comparisons.json'}.")
