"""EViT without Python around it: torch.export, AOTInductor, ONNX and OpenVINO, each checked against the model.

An exported folder holds the model, the names of its classes, `export.json` (what it is and how it was checked) and
`example.py`, which classifies images and needs neither this package nor, for ONNX and OpenVINO, PyTorch.
"""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BaseImageProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_evit import height_and_width
from .modeling_evit import EViTForImageClassificationWithTeacher, EViTPreTrainedModel
from .modeling_evit_lv import EViTLVForImageClassification


# The file that holds the model, for each format.
FORMATS = {"onnx": "model.onnx", "openvino": "model.xml", "torch-export": "model.pt2", "aoti": "model.pt2"}
# Largest difference of logits, relative to the largest logit, that is rounding and not an error.
TOLERANCE = 1e-3
MAX_BATCH_SIZE = 2**16


class ExportError(RuntimeError):
    """An exported model that does not answer as the model it was made from, or cannot be made."""

    status = 2  # of a command that it ends


class Logits(nn.Module):
    """The model as a function of one tensor, which is what deployment formats know."""

    def __init__(self, model: EViTPreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits, (batch_size, num_labels), of images (batch_size, num_channels, height, width)."""
        return self.model(pixel_values).logits


class LogitsAtKeepRate(nn.Module):
    """The model as a function of images and keep rates: the number of tokens is computed while the graph runs.

    The layers are those of the model, in a loop without questions that only Python can answer. A layer that keeps all
    tokens gets no fused token, as in the model: keep rate 1.0 is the dense ViT here too.

    Args:
        model: `EViTForImageClassification` or `EViTForImageClassificationWithTeacher`.
    """

    def __init__(self, model: EViTPreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, keep_rate: torch.Tensor) -> torch.Tensor:
        """Logits, (batch_size, num_labels).

        Args:
            pixel_values: (batch_size, num_channels, height, width).
            keep_rate: (num_reorganization_layers,), float64 as in Python, each in (0, 1].
        """
        model, config = self.model, self.model.config
        num_prefix_tokens = config.num_prefix_tokens
        hidden_states = model.vit.embeddings(pixel_values)
        num_image_tokens = hidden_states.shape[1] - num_prefix_tokens
        rates = dict(zip(config.reorganization_layers, keep_rate.unbind(), strict=True))
        for i, layer in enumerate(model.vit.layers):
            if i not in rates:
                is_last = i + 1 == len(model.vit.layers)
                num_queries = num_prefix_tokens if is_last else None
                hidden_states, *_ = layer(hidden_states, num_queries=num_queries, takes_short_cuts=True)
                continue
            # Attend
            attended, _, scores = layer.attention(layer.layernorm_before(hidden_states), score_tokens=True)
            hidden_states = hidden_states + layer.residual_branch(attended)

            # Reorganize
            kept = torch.ceil(rates[i] * num_image_tokens).to(torch.int64)
            num_attentive, num_fused = kept.item(), (num_image_tokens - kept).clamp(max=1).item()
            for is_sure in (num_attentive >= 1, num_attentive <= num_image_tokens, num_fused >= 0, num_fused <= 1):
                torch._check(is_sure)
            hidden_states = layer.rearrange(hidden_states, layer.choose_tokens(scores, num_attentive))
            num_image_tokens = num_attentive
            if config.fuse_inattentive_tokens:
                num_image_tokens = num_attentive + num_fused
                hidden_states = hidden_states[:, : num_prefix_tokens + num_image_tokens]

            # MLP
            hidden_states = layer.feed_forward(hidden_states)
        hidden_states = model.vit.layernorm(hidden_states[:, :num_prefix_tokens])
        if isinstance(model, EViTForImageClassificationWithTeacher):
            return (model.cls_classifier(hidden_states[:, 0]) + model.distillation_classifier(hidden_states[:, 1])) / 2
        return model.classifier(hidden_states[:, 0])


def _plain_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attention without mask and without asking how long the sequence is, which a graph does not know."""
    output = nn.functional.scaled_dot_product_attention(query, key, value, scale=kwargs["scaling"])
    return output.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("evit_export", _plain_attention)


def exported_program(
    model: EViTPreTrainedModel, keep_rate_is_input: bool = False
) -> tuple[torch.export.ExportedProgram, tuple[torch.Tensor, ...]]:
    """Trace a classifier with `torch.export`, for batches of any size.

    Args:
        model: any EViT classifier; its own keep rate is part of the graph unless it is an input.
        keep_rate_is_input: whether each call gives its keep rates, see `LogitsAtKeepRate.forward`.

    Returns: the program, and the inputs it was traced with.

    Raises: ExportError for LV-ViT with the keep rate as an input, or a model that reorganizes nothing.
    """
    config = model.config
    if keep_rate_is_input and isinstance(model, EViTLVForImageClassification):
        raise ExportError("LV-ViT classifies every token, so its keep rate has to be fixed: leave out the input.")
    if keep_rate_is_input and not config.reorganization_layers:
        raise ExportError("`reorganization_layers` is empty: there is no keep rate that could be an input.")
    model = copy.deepcopy(model).eval()
    model.config._attn_implementation = "evit_export"
    height, width = height_and_width(config.image_size)
    pixel_values = torch.randn(2, config.num_channels, height, width).to(next(model.parameters()))
    dynamic: list[Any] = [{0: torch.export.Dim("batch", min=1, max=MAX_BATCH_SIZE)}]
    inputs: tuple[torch.Tensor, ...] = (pixel_values,)
    wrapper: nn.Module = Logits(model)
    if keep_rate_is_input:
        wrapper = LogitsAtKeepRate(model)
        inputs += (torch.full((len(config.reorganization_layers),), 0.7, dtype=torch.float64),)
        dynamic.append(None)
    with torch.no_grad(), _quiet():
        return torch.export.export(wrapper.eval(), inputs, dynamic_shapes=tuple(dynamic)), inputs


def export_model(
    model: EViTPreTrainedModel,
    folder: Path,
    export_format: str,
    keep_rate_is_input: bool = False,
    processor: BaseImageProcessor | None = None,
) -> dict[str, Any]:
    """Export a classifier and make sure that it answers as the model does.

    Args:
        model: any EViT classifier.
        folder: written to; made if needed.
        export_format: "onnx", "openvino", "torch-export" or "aoti".
        keep_rate_is_input: see `exported_program`.
        processor: of the model, for `example.py`.

    Returns: what `export.json` holds: format, sizes, keep rate, largest difference found.

    Raises:
        ExportError: another format, a missing package, or outputs that differ.
    """
    if export_format not in FORMATS:
        raise ExportError(f"There is no format `{export_format}`: take one of {', '.join(FORMATS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    program, inputs = exported_program(model, keep_rate_is_input)
    path = folder / FORMATS[export_format]
    with torch.no_grad(), _quiet():
        _WRITERS[export_format](program, inputs, path)
    config = model.config
    record = {
        "format": export_format,
        "image_size": list(height_and_width(config.image_size)),
        "num_channels": config.num_channels,
        "keep_rate": "input" if keep_rate_is_input else config.keep_rate,
        "num_keep_rates": len(config.reorganization_layers) if keep_rate_is_input else 0,
        "torch": torch.__version__,
    }
    write_record(folder, record)
    (folder / "labels.json").write_text(json.dumps([str(config.id2label[i]) for i in range(config.num_labels)]) + "\n")
    if processor is not None:
        (folder / "example.py").write_text(example_code(record, processor))
    record["largest_difference"] = check_parity(model, load_exported(folder), keep_rate_is_input)
    write_record(folder, record)
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `export.json`."""
    (folder / "export.json").write_text(json.dumps(record, indent=2) + "\n")


def check_parity(
    model: EViTPreTrainedModel,
    exported: Callable[..., torch.Tensor],
    keep_rate_is_input: bool = False,
    batch_sizes: Sequence[int] = (1, 2, 5),
) -> float:
    """Compare an exported model with the one it was made from, on random images in batches of several sizes.

    Args:
        model: the original.
        exported: see `load_exported`.
        keep_rate_is_input: whether to compare at several keep rates too, 1.0 among them.
        batch_sizes: of the images.

    Returns: the largest difference of logits, relative to the largest logit.

    Raises: ExportError if it is more than rounding (1e-3), or a shape differs.
    """
    was_training = model.training
    model.eval()
    num_layers = len(model.config.reorganization_layers)
    keep_rates: list[Any] = [None]
    if keep_rate_is_input:
        keep_rates = [[rate] * num_layers for rate in (1.0, 0.7, 0.5)] + [[0.9 - 0.1 * i for i in range(num_layers)]]
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    parameter = next(model.parameters())
    for batch_size in batch_sizes:
        size = height_and_width(model.config.image_size)
        images = torch.randn(batch_size, model.config.num_channels, *size, generator=generator).to(parameter)
        for keep_rate in keep_rates:
            with torch.no_grad():
                expected = model(images, keep_rate=keep_rate).logits.float().cpu()
            answer = exported(images, keep_rate).float().cpu()
            difference = float("inf")
            if answer.shape == expected.shape:
                difference = ((answer - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"The exported model answers {tuple(answer.shape)} with a relative difference of {difference:.2g} "
                    f"for {batch_size} images at keep rate {keep_rate or model.config.keep_rate}; rounding explains "
                    f"{TOLERANCE}. Do not use it."
                )
            worst = max(worst, difference)
    model.train(was_training)
    return worst


def load_exported(folder: Path, num_threads: int | None = None) -> Callable[..., torch.Tensor]:
    """Load an exported folder as a function of (pixel_values, keep_rate=None) that returns logits.

    Args:
        folder: see `export_model`.
        num_threads: of ONNX Runtime or OpenVINO; PyTorch's formats run on those that PyTorch has.
    """
    record = json.loads((folder / "export.json").read_text())
    path = folder / FORMATS[record["format"]]
    run = _LOADERS[record["format"]](path, num_threads)
    num_keep_rates = record["num_keep_rates"]

    def logits(pixel_values: torch.Tensor, keep_rate: float | Sequence[float] | None = None) -> torch.Tensor:
        if not num_keep_rates:
            return run(pixel_values)
        rates = [keep_rate] * num_keep_rates if isinstance(keep_rate, float) else keep_rate
        return run(pixel_values, torch.tensor(rates, dtype=torch.float64))

    return logits


# One writer and one loader for each format


def _write_torch_export(program: torch.export.ExportedProgram, inputs: tuple, path: Path) -> None:
    torch.export.save(program, path)


def _write_aoti(program: torch.export.ExportedProgram, inputs: tuple, path: Path) -> None:
    path.unlink(missing_ok=True)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _write_onnx(program: torch.export.ExportedProgram, inputs: tuple, path: Path) -> None:
    _needs("onnx", "onnxscript")
    names = ["pixel_values", "keep_rate"][: len(inputs)]
    exported = torch.onnx.export(
        program, dynamo=True, input_names=names, output_names=["logits"], verbose=False, optimize=True
    )
    exported.save(str(path), external_data=False)


def _write_openvino(program: torch.export.ExportedProgram, inputs: tuple, path: Path) -> None:
    _needs("openvino", "onnx", "onnxscript")
    import openvino

    onnx_path = path.with_suffix(".onnx")
    _write_onnx(program, inputs, onnx_path)
    openvino.save_model(openvino.convert_model(str(onnx_path)), str(path), compress_to_fp16=False)
    onnx_path.unlink()


def _load_torch_export(path: Path, num_threads: int | None) -> Callable[..., torch.Tensor]:
    return torch.export.load(path).module()


def _load_aoti(path: Path, num_threads: int | None) -> Callable[..., torch.Tensor]:
    package = torch._inductor.aoti_load_package(str(path))

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        # The compiled code reads memory as if it were contiguous, and does not look whether it is.
        return package(*(tensor.contiguous() for tensor in tensors))

    return run


def _load_onnx(path: Path, num_threads: int | None) -> Callable[..., torch.Tensor]:
    _needs("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = num_threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=onnxruntime.get_available_providers())
    names = [entry.name for entry in session.get_inputs()]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        arrays = [tensor.detach().cpu().numpy() for tensor in tensors]
        return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])

    return run


def _load_openvino(path: Path, num_threads: int | None) -> Callable[..., torch.Tensor]:
    _needs("openvino")
    import openvino

    # Its default precision is half of float32 on some processors.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if num_threads is not None:
        settings["INFERENCE_NUM_THREADS"] = num_threads
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(compiled([tensor.detach().cpu().numpy() for tensor in tensors])[0])

    return run


_WRITERS = {
    "torch-export": _write_torch_export,
    "aoti": _write_aoti,
    "onnx": _write_onnx,
    "openvino": _write_openvino,
}
_LOADERS = {"torch-export": _load_torch_export, "aoti": _load_aoti, "onnx": _load_onnx, "openvino": _load_openvino}


def _needs(*packages: str) -> None:
    """Raise ExportError for a package that is not installed."""
    import importlib.util

    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ExportError(f"{', '.join(missing)} is not installed: `pip install 'evit-hf[export]'`.")


@contextmanager
def _quiet() -> Any:
    """Keep the exporters' own logs down to errors."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._inductor", "torch.fx")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


# The example beside the model

_RUN = {
    "onnx": (
        "import onnxruntime",
        'session = onnxruntime.InferenceSession(HERE / "model.onnx")',
        "session.run(None, {INPUTS})[0]",
    ),
    "openvino": (
        "import openvino",
        'model = openvino.Core().compile_model(HERE / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})',
        "model({INPUTS})[0]",
    ),
    "torch-export": (
        "import torch",
        'model = torch.export.load(HERE / "model.pt2").module()',
        "model(TENSORS).detach().numpy()",
    ),
    "aoti": (
        "import torch",
        'model = torch._inductor.aoti_load_package(str(HERE / "model.pt2"))',
        "model(TENSORS).numpy()",
    ),
}


def example_code(record: dict[str, Any], processor: BaseImageProcessor) -> str:
    """Write the program that classifies images with an exported model.

    Args:
        record: of the export.
        processor: whose resizing and normalization it repeats with Pillow and numpy.
    """
    library, load, run = _RUN[record["format"]]
    height, width = record["image_size"]
    size = dict(processor.size or {})
    resample = int(getattr(processor, "resample", None) or 2)
    resize = f"image = image.resize(({width}, {height}), {resample})"
    if "shortest_edge" in size:  # resize, then cut out the middle
        resize = (
            f"image = ImageOps.scale(image, {size['shortest_edge']} / min(image.size), {resample})\n    "
            f"left, top = (image.width - {width}) // 2, (image.height - {height}) // 2\n    "
            f"image = image.crop((left, top, left + {width}, top + {height}))"
        )
    mean, std = (
        [round(float(x), 6) for x in (getattr(processor, name, None) or fallback)]
        for name, fallback in (("image_mean", [0.0] * 3), ("image_std", [1.0] * 3))
    )
    has_rate = record["keep_rate"] == "input"
    inputs = '"pixel_values": pixels' + (', "keep_rate": KEEP_RATE' if has_rate else "")
    tensors = "torch.from_numpy(pixels)" + (", torch.from_numpy(KEEP_RATE)" if has_rate else "")
    run = run.replace("INPUTS", inputs).replace("TENSORS", tensors)
    rate = f"KEEP_RATE = np.full({record['num_keep_rates']}, 0.7)  # one for each layer that drops patches\n"
    return f'''"""Classify images with this exported EViT: python example.py IMAGE [IMAGE ...]"""
import json
import sys
from pathlib import Path

import numpy as np
{library}
from PIL import Image{", ImageOps" if "shortest_edge" in size else ""}

HERE = Path(__file__).parent
{rate if has_rate else ""}{load}
for path in sys.argv[1:]:
    image = Image.open(path).convert("RGB")
    {resize}
    pixels = ((np.asarray(image) / 255 - {mean}) / {std}).transpose(2, 0, 1)[None].astype("float32", order="C")
    logits = {run}
    print(path, json.loads((HERE / "labels.json").read_text())[logits[0].argmax()])
'''


__all__ = ["FORMATS", "ExportError", "check_parity", "export_model", "exported_program", "load_exported"]
