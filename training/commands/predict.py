"""The command `evit predict`: names for pictures.

evit predict runs/digits photo.jpg holiday/
evit predict google/vit-base-patch16-224 holiday/ --keep-rate 0.7 --output holiday.csv
evit predict runs/digits digits --split test --output digits.parquet --features
"""

import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..arguments import DataArguments
from ..screen import bar, say, screen, show_result
from ..settings import (
    AT_LEAST_ONE,
    KEEP_RATE,
    FlagParser,
    budget,
    flag,
    json_setting,
    macs_setting,
    quiet_setting,
    setting,
)
from .errors import command


@dataclass
class PredictArguments:
    """What to predict, and where to write it."""

    output: str | None = setting(
        None, "File for the rows, .csv, .jsonl or .parquet; a run that was killed resumes. By default the screen."
    )
    top_k: int = setting(5, "Labels of each image.", AT_LEAST_ONE)
    features: bool = setting(False, "Write what the classifier is given too, a vector for each image.")
    keep_rate: list[float] | None = setting(
        None, "Keep rate, or one for each reorganization layer; by default the model's own.", KEEP_RATE
    )
    macs: float | None = macs_setting()
    split: str | None = setting(None, "Split of data sets; by default all.")
    image_column: str | None = setting(None, "Column with the images of data sets; by default the only one.")
    dataset_config: str | None = setting(None, "Configuration of a Hub data set that has several.")
    allow_outside_files: bool = setting(False, "Let data name URLs, and files outside its own folder.")
    batch_size: int = setting(32, "Images for each forward.", AT_LEAST_ONE)
    num_threads: int = setting(4, "Threads that decode and resize images while the model works.", AT_LEAST_ONE)
    device: str | None = setting(None, "cpu, cuda, mps ...; by default the best there is.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Precision of the model.")
    on_bad_image: Literal["report", "error"] = setting(
        "report", "What an image that cannot be decoded does: become a row that says so, or end the command."
    )
    ray: str | None = setting(
        None,
        "Address of a Ray cluster, or `local` for one on this machine: reads pictures or Parquet files, also from "
        "object stores, and writes a folder of Parquet files.",
    )
    overwrite: bool = setting(False, "Replace the output file and start over.")
    json: bool = json_setting()
    quiet: bool = quiet_setting()

    def check_road(self, given: Collection[str]) -> None:
        """Refuse what Ray would ignore.

        Args:
            given: names of the settings on the command line.

        Raises: ValueError naming a flag.
        """
        if self.ray is None:
            return
        if self.output is None:
            raise ValueError("`--ray` needs `--output`, a folder for Parquet files.")
        for name in sorted(set(given) & {"split", "dataset_config", "allow_outside_files", "on_bad_image", "device"}):
            raise ValueError(f"`{flag(name)}` is not used with `--ray`: leave it out.")


@command("predict")
def main(argv: list[str]) -> None:
    """Predict with the settings of a command line."""
    parser = FlagParser(
        "predict",
        [PredictArguments],
        usage="evit predict MODEL IMAGE|FOLDER|DATASET ... [--output FILE] [--macs 0.66] [--flag value ...]",
        description="Classify pictures. MODEL is a model folder, a run folder or a Hub id; the rest are pictures, "
        "folders of pictures with any folders below them, data sets in folders or files, and Hub ids of data sets.",
    )
    parser.add_argument("model", help="Model folder, run folder or Hub id of an image classifier.")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="Pictures, folders or data sets.")
    (arguments,), rest, given = parser.parse(argv)
    from ..learning.sources import resolve_model

    arguments.check_road(given)
    if arguments.ray is None and arguments.output is not None:
        from ..prediction.rows_file import check_rows_path

        check_rows_path(Path(arguments.output), arguments.overwrite)
    run = predict if arguments.ray is None else predict_on_cluster
    with screen(arguments.quiet, arguments.json, notes_to_stderr=True):
        run(resolve_model(rest.model), rest.inputs, arguments)


def predict(model: str, words: list[str], arguments: PredictArguments) -> None:
    """Predict images, and print or write a row for each.

    Args:
        model: folder or Hub id of an image classifier.
        words: see `find_inputs`.
        arguments: what to write, and how.

    Raises: ValueError for inputs that are not there, a model that cannot be loaded, or an image that cannot be
        decoded, with `--on-bad-image error`.
    """
    from ..prediction.inputs import find_inputs
    from ..prediction.predictor import Predictor
    from ..prediction.rows_file import RowsFile

    shared = ("image_column", "dataset_config", "allow_outside_files")
    data = DataArguments(**{name: getattr(arguments, name) for name in shared})
    inputs = find_inputs(words, data, arguments.split)
    for note in inputs.notes:
        say(note)
    predictor = Predictor(
        model,
        top_k=arguments.top_k,
        features=arguments.features,
        device=arguments.device,
        dtype=arguments.dtype,
        roots=inputs.roots,
        **budget(arguments),
    )
    rows_file = None
    if arguments.output is not None:
        of_rows = ("features", "keep_rate", "macs", "dtype", "split", "image_column", "dataset_config")
        settings = {
            "model": _absolute(model),
            "inputs": {word: _absolute(word) for word in words},
            "top_k": predictor.top_k,
            **{name: getattr(arguments, name) for name in of_rows},
        }
        rows_file = RowsFile(Path(arguments.output), settings, arguments.overwrite)
    done = rows_file.done if rows_file is not None else set()
    numbers = [i for i, name in enumerate(inputs.names) if name not in done]
    if len(numbers) < len(inputs.names):
        say(f"Resuming: {len(inputs.names) - len(numbers)} of {len(inputs.names)} images are done.")
    bad: list[str] = []
    start = time.perf_counter()
    with bar(total=len(numbers), unit="image") as images:
        for rows in predictor.rows(inputs, numbers, arguments.batch_size, arguments.num_threads):
            errors = [row["error"] for row in rows if row["error"] is not None]
            if errors and arguments.on_bad_image == "error":
                raise ValueError(errors[0])
            bad += errors
            if rows_file is not None:
                rows_file.write(rows)
            if rows_file is None or arguments.json:
                for row in rows:
                    show_result(_in_words(row), row)
            images.update(len(rows))
    if rows_file is not None:
        rows_file.finish()
        say(f"Saved {rows_file.path}.")
    for error in bad[:10]:
        say(error)
    say(_summary(len(numbers), time.perf_counter() - start, predictor.own_speed(), len(bad)))


def predict_on_cluster(model: str, words: list[str], arguments: PredictArguments) -> None:
    """Predict with Ray Data, see `predict_with_ray`.

    Args:
        model: folder that all machines see, or Hub id.
        words: pictures, Parquet files, folders of either, or URIs.
        arguments: what to write, and how.
    """
    from ..prediction.ray_data import predict_with_ray

    settings = {name: getattr(arguments, name) for name in ("top_k", "features", "dtype")}
    settings |= budget(arguments)
    start = time.perf_counter()
    num_rows, num_errors = predict_with_ray(
        arguments.ray or "local",
        words,
        arguments.output or "",
        {"model": _absolute(model), **settings},
        batch_size=arguments.batch_size,
        image_column=arguments.image_column,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )
    show_result(None, {"output": arguments.output, "num_rows": num_rows, "num_errors": num_errors})
    text = f"Saved {num_rows} rows in {arguments.output}, in {time.perf_counter() - start:.1f} s"
    say(f"{text}; {num_errors} could not be decoded." if num_errors else f"{text}.")


def _absolute(word: str) -> str:
    """A path, whatever the current folder; an id of the Hub or the name of a data set as it is."""
    return os.path.abspath(word) if os.path.exists(word) else word


def _in_words(row: dict[str, Any]) -> str:
    if row["error"] is not None:
        return f"{row['path']}: not decoded"
    pairs = zip(row["labels"], row["scores"], strict=True)
    return f"{row['path']}: " + ", ".join(f"{label} {100 * score:.1f} %" for label, score in pairs)


def _summary(num_images: int, seconds: float, own_speed: float | None, num_bad: int) -> str:
    text = f"{num_images} images in {seconds:.1f} s"
    if own_speed is not None:
        text += f": {num_images / seconds:.0f} images/s with reading, the model by itself {own_speed:.0f}"
    return text + (f"; {num_bad} could not be decoded." if num_bad else ".")
