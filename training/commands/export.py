"""The command `evit export MODEL DEST`: a model for ONNX Runtime, OpenVINO, torch.export or AOTInductor, checked."""

import json
import shlex
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..arguments import DataArguments
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


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.images import ImageSplits


class AccuracyLostError(RuntimeError):
    """Quantization cost more accuracy than was allowed."""

    status = 3


@dataclass
class ExportArguments:
    """What to make of a model."""

    format: str = setting("onnx", "onnx, openvino, torch-export or aoti.")
    keep_rate: list[float] | None = setting(
        None, "Fixed in the export, in (0, 1]: one, or one for each layer; by default the model's.", KEEP_RATE
    )
    macs: float | None = macs_setting()
    keep_rate_input: bool = setting(
        False, "Make the keep rate an input instead: each call then gives one number for each reorganization layer."
    )
    image_size: int | None = setting(None, "Pixels; resizes the position embeddings bicubically.", AT_LEAST_ONE)
    int8: Literal["no", "dynamic", "static"] = setting(
        "no",
        "Matrix products of an ONNX model in 8 bits, with ranges found while running (dynamic) or from calibration "
        "images (static). What it does to the accuracy is measured on --dataset.",
    )
    calibration_images: int = setting(
        64, "For static: images of the training split that set the ranges.", AT_LEAST_ONE
    )
    max_accuracy_drop: float = setting(
        1.0, "Points of accuracy that int8 may cost; more ends with status 3.", NOT_NEGATIVE
    )

    def check_int8(self, given: Collection[str]) -> None:
        """Refuse what only other kinds of int8 would use, and int8 that cannot be.

        Args:
            given: names of the settings on the command line.

        Raises: ValueError naming a flag.
        """
        if self.int8 != "no" and (self.format != "onnx" or "dataset" not in given):
            raise ValueError(
                "`--int8` needs `--format onnx`, and `--dataset` to measure what it does to the accuracy."
            )
        if self.int8 == "static" and self.keep_rate_input:
            raise ValueError("`--int8 static` calibrates one keep rate: leave out `--keep-rate-input`.")
        used = {
            name: ("dynamic", "static") for name in (*(one.name for one in fields(DataArguments)), "max_accuracy_drop")
        }
        used["calibration_images"] = ("static",)
        for name in sorted(used.keys() & given):
            if self.int8 not in used[name]:
                ways = " or ".join(f"`--int8 {kind}`" for kind in used[name])
                raise ValueError(f"`{flag(name)}` is only used with {ways}: leave it out.")


@command("export")
def main(argv: list[str]) -> None:
    """Export with the settings of a command line; status 3 for lost accuracy."""
    parser = FlagParser(
        "export",
        [ExportArguments, DataArguments],
        usage="evit export MODEL DEST [--format onnx] [--keep-rate 0.7 | --macs 0.66] [--flag value ...]",
        description="Export a model with a dynamic batch size and compare it with the original. DEST gets the model, "
        "labels.json, export.json, config.json, preprocessor_config.json and example.py, which needs no part of this "
        "package. A bare model is exported as a function that returns features.",
    )
    parser.add_argument("model", help="Model folder, run folder or Hub id.")
    parser.add_argument("dest", type=Path, help="Folder to write; it must not exist or be empty.")
    (arguments, data), rest, given = parser.parse(argv)
    arguments.check_int8(given)
    check_new_folder(rest.dest)
    from ..learning.sources import resolve_model

    record = export(resolve_model(rest.model), rest.dest, arguments, data)
    example = shlex.quote(str(rest.dest / "example.py"))
    print(f"{json.dumps(record)}\nSaved in {rest.dest}. Try it: python {example} IMAGE")
    if record.get("accuracy_change", 0.0) < -arguments.max_accuracy_drop:
        raise AccuracyLostError(
            f"int8 costs {-record['accuracy_change']:.2f} points of accuracy, more than `--max-accuracy-drop` "
            f"{arguments.max_accuracy_drop}: export without it, or try the other kind."
        )


def export(name: str, dest: Path, arguments: ExportArguments, data: DataArguments) -> dict[str, Any]:
    """Export a model and check it.

    Args:
        name: folder or Hub id.
        dest: folder to write.
        arguments: see `ExportArguments`.
        data: images for int8.

    Returns: what export.json holds.

    Raises:
        ValueError: for settings that cannot work.
        ExportError: if the result differs from the original.
    """
    from evit_hf import EViTPreTrainedModel, reorganize
    from evit_hf.export import complete_folder, export_model, write_record

    from ..data.augmentation import image_processor, load_processor, output_size
    from ..learning.models import load_model

    model = load_model(name).eval()
    reorganize(model, **budget(arguments))
    processor, image_size = load_processor(name), arguments.image_size
    if isinstance(model, EViTPreTrainedModel):
        if image_size is not None:
            model.set_image_size(image_size)
    else:  # takes images of several sizes as it is, or of one
        image_size = image_size or output_size(processor)
    if arguments.image_size is not None:
        processor = image_processor(name, arguments.image_size)
    with complete_folder(dest) as work:
        record = export_model(model, work, arguments.format, arguments.keep_rate_input, processor, image_size)
        if arguments.int8 != "no":
            record |= quantize(model, work, arguments, data, processor)
            write_record(work, record)
    return record


def quantize(
    model: "PreTrainedModel", dest: Path, arguments: ExportArguments, data: DataArguments, processor: Any
) -> dict[str, Any]:
    """Put an ONNX model's matrix products into 8 bits, and measure the accuracy before and after.

    Returns: {"file", "int8", "accuracy", "int8_accuracy", "accuracy_change" (points), "num_images"}.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    from evit_hf.export import FORMATS, gives_features, load_exported, write_record

    from ..data.loaders import batches
    from ..data.splits import load_evaluation_split, load_splits, with_classes_of

    if gives_features(model):
        raise ValueError("`--int8` measures top-1 accuracy, and this model gives features: name a classifier.")
    if model.config.problem_type == "multi_label_classification":
        raise ValueError("`--int8` measures top-1 accuracy, and this model can give several labels.")
    splits = with_classes_of(model, load_evaluation_split(data))
    path = str(dest / FORMATS["onnx"])
    quantized = "onnx/model_quantized.onnx"
    products = ["MatMul", "Gemm"]
    before = accuracy(load_exported(dest), splits, processor, arguments, model)
    if arguments.int8 == "dynamic":
        quantize_dynamic(path, dest / quantized, op_types_to_quantize=products, weight_type=QuantType.QInt8)
    else:
        train = load_splits(data, seed=0)

        class Images(CalibrationDataReader):
            def __init__(self) -> None:
                self.batches = batches(train, "train", processor, arguments.calibration_images)

            def get_next(self) -> dict[str, Any] | None:
                batch = next(self.batches, None)
                return None if batch is None else {"pixel_values": batch[0].numpy()}

        quantize_static(
            path,
            str(dest / quantized),
            Images(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=products,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )
    write_record(dest, json.loads((dest / "export.json").read_text()) | {"file": quantized})
    after = accuracy(load_exported(dest), splits, processor, arguments, model)
    return {
        "file": quantized,
        "int8": arguments.int8,
        "accuracy": before,
        "int8_accuracy": after,
        "accuracy_change": 100 * (after - before),
        "num_images": len(splits.evaluation),
    }


def accuracy(
    exported: Any, splits: "ImageSplits", processor: Any, arguments: ExportArguments, model: "PreTrainedModel"
) -> float:
    """Share of evaluation images whose class an exported model names."""
    keep_rate = None
    if arguments.keep_rate_input:
        rate, num_layers = model.config.keep_rate, len(model.config.reorganization_layers)
        keep_rate = rate if isinstance(rate, list) else [rate] * num_layers
    from ..data.loaders import batches

    right = total = 0
    for images, labels in batches(splits, "evaluation", processor):
        right += (exported(images, keep_rate).argmax(-1) == labels).sum().item()
        total += len(labels)
    return right / total
