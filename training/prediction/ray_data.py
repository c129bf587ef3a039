"""Prediction on a cluster by Ray Data: it reads, hands out, resumes and writes; actors hold one `Predictor` each."""

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import pyarrow.dataset
import pyarrow.fs

from ..data.folders import picture_suffixes
from .predictor import Predictor


def predict_with_ray(
    address: str,
    words: Sequence[str],
    output: str,
    settings: dict[str, Any],
    *,
    batch_size: int,
    image_column: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[int, int]:
    """Predict pictures or Parquet files and write Parquet files, on all machines of a cluster.

    What was killed resumes where it was, by Ray's own checkpoints in `OUTPUT.partial`, and no row is written twice.

    Args:
        address: of the cluster, or "local" for one on this machine.
        words: picture files and folders of them, or Parquet files and folders of them; paths that all machines see,
            or URIs that pyarrow reads (`s3://`, `gs://`).
        output: folder or URI for the Parquet files.
        settings: of `Predictor`.
        batch_size: images for each forward.
        image_column: of Parquet files, with bytes or {"bytes", "path"}; by default `image`.
        overwrite: whether to delete what is in `output`, and start over.
        progress: whether Ray draws its bars.

    Returns: numbers of rows, and of those with an error.

    Raises: ValueError for an output that exists, or was begun with other settings; or for columns that rows have
        themselves.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    filesystem, folder = _filesystem(output)
    words = [word if "://" in word else os.path.abspath(word) for word in words]
    _check_output(filesystem, folder, output, {**settings, "inputs": words}, overwrite)
    if address == "local":
        # Reading, resuming and predicting each hold CPUs: with two of them they would wait for each other forever.
        ray.init(num_cpus=max(4, os.cpu_count() or 1), log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        context = ray.data.DataContext.get_current()
        for name in ("ray.data", "ray"):  # after the context, which sets its own levels
            logging.getLogger(name).setLevel(logging.ERROR)
        context.enable_progress_bars = progress
        is_table = _is_parquet(words[0])
        context.checkpoint_config = ray.data.checkpoint.CheckpointConfig(
            id_column="row_hash" if is_table else "path",
            checkpoint_path=f"{output}.partial/rows" if "://" in output else f"{os.path.abspath(output)}.partial/rows",
            delete_checkpoint_on_success=True,
        )
        if is_table:
            column = image_column or "image"
            images = ray.data.read_parquet(words, include_paths=True, include_row_hash=True)
            _check_columns(images.schema().names, column)
        else:
            column = "bytes"
            suffixes = sorted(suffix.removeprefix(".") for suffix in picture_suffixes())
            images = ray.data.read_binary_files(words, include_paths=True, file_extensions=suffixes)
        has_gpus = bool(ray.cluster_resources().get("GPU"))
        num_actors = int(ray.cluster_resources().get("GPU" if has_gpus else "CPU", 1))
        rows = images.map_batches(
            Predictor,
            fn_constructor_kwargs={**settings, "device": "cuda" if has_gpus else "cpu", "threads": 1},
            fn_kwargs={"column": column},
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=num_actors),
            **({"num_gpus": 1} if has_gpus else {"num_cpus": 0.5}),
        )
        rows.write_parquet(output if "://" in output else folder)
        filesystem.delete_dir(f"{folder}.partial")
        errors = pyarrow.dataset.dataset(folder, filesystem=filesystem).to_table(["error"])["error"]
        return len(errors), len(errors) - errors.null_count
    finally:
        ray.shutdown()


def _filesystem(output: str) -> tuple[pyarrow.fs.FileSystem, str]:
    if "://" in output:
        return pyarrow.fs.FileSystem.from_uri(output.rstrip("/"))
    return pyarrow.fs.LocalFileSystem(), os.path.abspath(output)


def _check_output(
    filesystem: pyarrow.fs.FileSystem, folder: str, output: str, settings: dict[str, Any], overwrite: bool
) -> None:
    """Note the settings where the run begins, and compare them where it resumes."""
    partial, note = f"{folder}.partial", f"{folder}.partial/settings.json"
    there = {
        info.path for info in filesystem.get_file_info([folder, note]) if info.type != pyarrow.fs.FileType.NotFound
    }
    if overwrite:
        for path in (folder, partial):
            if filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory:
                filesystem.delete_dir(path)
    elif note in there:
        with filesystem.open_input_stream(note) as file:
            begun = json.loads(file.read())
        if begun != settings:
            different = sorted(name for name in settings if settings[name] != begun.get(name))
            raise ValueError(
                f"`{output}` was begun with other settings ({', '.join(different)}): choose a different `--output`, "
                "or `--overwrite` to start over."
            )
        return
    elif folder in there:
        raise ValueError(f"`--output`: `{output}` already exists: choose a different folder, or pass `--overwrite`.")
    filesystem.create_dir(partial)
    with filesystem.open_output_stream(note) as file:
        file.write(json.dumps(settings).encode())


def _check_columns(names: Sequence[str], column: str) -> None:
    clash = sorted({"labels", "scores", "error", "features"} & set(names))
    if column not in names:
        raise ValueError(f"`--image-column` is `{column}`, but the Parquet files have {sorted(names)}.")
    if clash:
        raise ValueError(f"The Parquet files have columns {clash}, which the rows have too: rename or remove them.")


def _is_parquet(word: str) -> bool:
    """Whether a file, or a folder's first file, is Parquet."""
    if word.lower().endswith(".parquet"):
        return True
    filesystem, path = _filesystem(word)
    if filesystem.get_file_info(path).type != pyarrow.fs.FileType.Directory:
        return False
    files = filesystem.get_file_info(pyarrow.fs.FileSelector(path))
    return any(file.path.lower().endswith(".parquet") for file in files)
