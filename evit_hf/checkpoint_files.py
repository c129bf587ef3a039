"""Weight files: read without executing anything, checked before memory is allocated, errors that name file and tensor.

Pickles are opened with `torch.load(weights_only=True)` and a short list of harmless types; nothing in them is run.
"""

import argparse
import json
import pickle
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file


# Types other than tensors that the public pickles hold.
HARMLESS_TYPES = [argparse.Namespace]

# Where Transformers and timm look for weights, in this order.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
BYTES_PER_VALUE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

# Sets of weights that training scripts save next to each other, the preferred one first: what each framework's own
# loader takes. DeiT's scripts evaluate `model`, timm's loader prefers the average, DINO publishes the teacher.
WEIGHT_SETS = ("model", "state_dict_ema", "state_dict", "teacher", "student", "model_ema")
MAX_NESTING = 6


class ConversionError(RuntimeError):
    """A checkpoint that cannot become an EViT; the message says why and names every tensor concerned."""

    status = 2  # of a command that it ends


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Content of a `.safetensors` file (tensors by name) or of a pickle (the nested dictionaries of a training run).

    Tensors of a zipped pickle stay mapped to the file: copy what is kept.

    Raises: ConversionError if the file cannot be read, is damaged, claims more data than it has, or holds anything
        that would have to be executed.
    """
    try:
        num_bytes = path.stat().st_size
        if num_bytes == 0:
            raise ConversionError(f"`{path}` is empty: download or save it again.")
        if path.suffix == ".safetensors":
            return load_file(path)
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            _check_archive(path, num_bytes)
        with torch.serialization.safe_globals([*HARMLESS_TYPES]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except ConversionError:
        raise
    except Exception as error:  # a damaged file makes readers fail in any way
        raise ConversionError(_reason(path, error)) from None
    if not isinstance(content, Mapping):
        raise ConversionError(f"`{path}` holds a {type(content).__name__}, not a dictionary of tensors.")
    return content


def _check_archive(path: Path, num_bytes: int) -> None:
    """Refuse a zip file that unpacks to more than its own size: PyTorch stores tensors uncompressed."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > num_bytes:
        raise ConversionError(
            f"`{path}` has {num_bytes} bytes but claims to unpack to {unpacked}: PyTorch does not compress "
            "checkpoints, so it is damaged or was made to fill the memory."
        )


def _reason(path: Path, error: Exception) -> str:
    """Say why a file could not be read, in one sentence that names it."""
    if path.suffix == ".safetensors":
        return f"`{path}` is not a readable safetensors file: {safetensors_damage(path) or error}"
    if isinstance(error, OSError) and error.strerror:
        return f"`{path}` cannot be opened: {error.strerror}."
    if isinstance(error, pickle.UnpicklingError):
        wanted = re.search(r"GLOBAL (\S+)|Unsupported \S+ (\S+)", str(error))
        return (
            f"`{path}` is not a plain pickle of tensors and settings: it wants "
            f"{(wanted.group(1) or wanted.group(2)) if wanted else 'something else'}, and nothing in it was executed. "
            "If you trust it, open it yourself and save its state dict."
        )
    detail = str(error).strip().splitlines() or [""]
    return f"`{path}` is not a checkpoint that PyTorch can read ({type(error).__name__}: {detail[0][:200]})."


def safetensors_damage(path: Path) -> str | None:
    """Say what is wrong with the header of a safetensors file, with the tensor concerned; None if nothing is found."""
    num_bytes = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if num_bytes < 8 or header_size > num_bytes - 8:
            return f"its first 8 bytes announce a header of {header_size} bytes, but it has {num_bytes} bytes in all."
        try:
            header = json.loads(file.read(header_size))
        except (ValueError, RecursionError) as error:
            return f"its header is not JSON ({str(error)[:100]})."
    if not isinstance(header, dict):
        return f"its header is a {type(header).__name__} instead of an object of tensors."
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            shape, (start, stop) = entry["shape"], entry["data_offsets"]
            size = BYTES_PER_VALUE[entry["dtype"]]
            for length in shape:
                size *= length
            fits = start <= stop <= num_bytes - 8 - header_size and stop - start == size
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            return (
                f"tensor `{name}` is said to be {str(entry)[:150]}, which is incomplete, contradictory, or more than "
                f"the {num_bytes - 8 - header_size} bytes of data."
            )
        end = max(end, stop)
    if end != num_bytes - 8 - header_size:
        return f"its tensors end after {end} bytes of data, but it has {num_bytes - 8 - header_size}."
    return None


def weight_files(folder: Path, variant: str | None = None, use_safetensors: bool | None = None) -> list[Path]:
    """Files that Transformers reads the weights of a folder from: one, or the shards that an index lists.

    Raises: ConversionError for an index that is damaged or names files that are not there.
    """
    for name in WEIGHT_FILES:
        if use_safetensors is not None and use_safetensors != name.startswith("model"):
            continue
        stem, rest = name.split(".", 1)
        path = folder / (f"{stem}.{variant}.{rest}" if variant else name)
        if path.is_file():
            return _shards(path) if path.suffix == ".json" else [path]
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        shards = [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"`{index}` must be a JSON object whose `weight_map` names the file of each tensor: {error!r}."
        ) from None
    absent = [shard.name for shard in shards if shard.name not in names or not shard.is_file()]
    if absent:
        raise ConversionError(f"`{index}` names files in its `weight_map` that are not in its folder: {absent}.")
    return shards


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a weight file of a folder, by name, after checking that it is whole.

    Raises: ConversionError as `read_checkpoint`, and for tensors that are not floating-point numbers.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
                described = {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
        except Exception as error:  # a damaged file makes the reader fail in any way
            raise ConversionError(_reason(path, error)) from None
        wrong = {name: dtype for name, (_, dtype) in described.items() if not dtype.startswith(("F", "BF"))}
        shapes = {name: shape for name, (shape, _) in described.items()}
    else:
        content = read_checkpoint(path)
        tensors = {str(name): x for name, x in content.items() if isinstance(x, torch.Tensor)}
        check_tensors(tensors, path)
        wrong = {str(name): type(x).__name__ for name, x in content.items() if not isinstance(x, torch.Tensor)}
        wrong |= {name: x.dtype for name, x in tensors.items() if not x.dtype.is_floating_point}
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    wrong = {name: kind for name, kind in wrong.items() if not name.endswith("num_batches_tracked")}
    if wrong:
        raise ConversionError(f"`{path}` holds entries that are not floating-point tensors: {_listed(wrong)}.")
    return shapes


def set_modes_by_umask(folder: Path) -> None:
    """Give the weights of a model folder the permissions of its config.json, which follow the umask.

    safetensors writes files that only their owner may read.
    """
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(stat.S_IMODE(mode))


def check_tensors(tensors: Mapping[str, torch.Tensor], source: Any) -> None:
    """Refuse tensors that are not plain arrays, or that claim more values than are stored.

    Raises: ConversionError with the name of each.
    """
    wrong = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            wrong[name] = f"{tensor.layout}, quantized or nested: save it as a plain tensor"
        elif tensor.device.type != "meta" and tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            wrong[name] = f"{tuple(tensor.shape)}, but only {tensor.untyped_storage().nbytes()} bytes are stored"
    if wrong:
        raise ConversionError(f"`{source}` holds tensors that cannot be read: {_listed(wrong)}.")


def non_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors with a NaN or an infinite value, sorted."""
    return sorted(
        name
        for name, tensor in tensors.items()
        if tensor.dtype.is_floating_point and tensor.device.type != "meta" and not _is_finite(tensor)
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.itemsize == 1:  # no operators for float8
        tensor = tensor.float()
    return bool(tensor.isfinite().all())


def _listed(entries: Mapping[str, Any], num_shown: int = 20) -> str:
    shown = ", ".join(f"`{name}` ({text})" for name, text in list(entries.items())[:num_shown])
    return shown + (f" and {len(entries) - num_shown} more" if len(entries) > num_shown else "")


def chosen_weights(
    content: Mapping[str, Any], landmark: str, wanted: str | None, source: Any
) -> tuple[dict[str, Any], str, dict[str, str]]:
    """The weights of one Vision Transformer, wherever a training script left them.

    Looks through nested dictionaries and below any prefix (`module.`, `_orig_mod.`, `model.`, `backbone.`, ...).

    Args:
        content: of the file.
        landmark: name of a parameter that every such model has.
        wanted: which weights to take where there are several, such as 'teacher' or 'state_dict_ema'.
        source: for messages.

    Returns: entries by name without prefix, none if there is no such model; where they were, such as
        'teacher.backbone', '' for the top level; what was left out and why.

    Raises: ConversionError if there are several and none is well known, or if `wanted` is not one of them.
    """
    found: dict[str, Any] = {}
    for path, mapping in _mappings(content):
        for name in mapping:
            if isinstance(name, str) and (name == landmark or name.endswith(f".{landmark}")):
                prefix = name.removesuffix(landmark)
                place = ".".join((*path, prefix.rstrip("."))).strip(".")
                found.setdefault(place, (path, prefix, mapping))
    if not found:
        return {}, "", {}
    place = _preferred(list(found), wanted, source)
    path, prefix, mapping = found[place]
    unused = {}
    outer = content
    for depth, key in enumerate(path):
        for name in outer:
            if name != key and not (depth == 0 and name == "args"):
                other = ".".join((*path[:depth], str(name)))
                is_rival = any(rival == other or rival.startswith(f"{other}.") for rival in found)
                unused[other] = f"`{place}` was taken" if is_rival else "belongs to training"
        outer = outer[key]
    weights = {}
    for name, value in mapping.items():
        if str(name).startswith(prefix):
            weights[str(name)[len(prefix) :]] = value
        else:
            unused[str(name)] = f"is not below `{prefix.rstrip('.')}`"
    return weights, place, unused


def _mappings(
    content: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The dictionary and those in it, with their keys, as deep as training scripts nest them."""
    yield path, content
    if len(path) < MAX_NESTING:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping) and value:
                yield from _mappings(value, (*path, key))


def _preferred(places: list[str], wanted: str | None, source: Any) -> str:
    """The place that is wanted, the only one, or the best-known one."""
    if wanted is not None:
        matches = [place for place in places if place == wanted or place.startswith(f"{wanted}.")]
        if len(matches) != 1:
            raise ConversionError(
                f"`weights` is '{wanted}', but `{source}` has weights at {places}: name one of them."
            )
        return matches[0]
    if len(places) == 1:
        return places[0]
    if "" in places:  # a plain state dict: what else has such names is a part of it, or belongs to training
        return ""
    for name in WEIGHT_SETS:
        matches = [place for place in places if place.split(".")[0] == name]
        if len(matches) == 1:
            return matches[0]
    raise ConversionError(
        f"`{source}` has several sets of weights, at {places}: choose one as `weights` (`--weights`)."
    )
