"""Exports that run without Python: torch.export, AOTInductor, ONNX and OpenVINO, checked against the model.

An exported folder holds the model, the names of its classes, `export.json` (what it is and how it was checked), the
`config.json` and `preprocessor_config.json` that Optimum and transformers.js read, and `example.py`, which classifies
images and needs neither this package nor, for ONNX and OpenVINO, PyTorch. Images and answers are float32 everywhere.
"""

import copy
import inspect
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from .configuration_evit import keep_rate_by_layer, python_value
from .modeling_evit import EViTForImageClassificationWithTeacher, EViTPreTrainedModel
from .modeling_evit_lv import EViTLVForImageClassification
from .pictures import as_rgb, upright
from .pixels import processed_pixels, robust_keep_rates
from .towers import example_inputs, tower_of


logger = transformers_logging.get_logger(__name__)

# The file that holds the model, for each format. That of ONNX is where Optimum and transformers.js look for it.
FORMATS = {"onnx": "onnx/model.onnx", "openvino": "model.xml", "torch-export": "model.pt2", "aoti": "model.pt2"}
# What the writers and loaders of a format import.
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino", "onnx", "onnxscript")}
# Largest difference of answers, relative to the largest answer, that is rounding and not an error. In half precision
# rounding also decides between tokens of nearly equal attention.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 3e-1}
MAX_BATCH_SIZE = 2**16


class ExportError(RuntimeError):
    """An export that cannot be made, or that does not answer as its model does."""

    status = 2  # of a command that it ends


class Answer(nn.Module):
    """The model as a function of one tensor, which is what deployment formats know.

    Args:
        model: classifier, which answers logits, or a model without one, which answers its last hidden state.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Answer, see `answer_of`, to images (batch_size, num_channels, height, width), both float32."""
        return answer_of(self.model(pixel_values)).float()


def answer_of(outputs: Any) -> torch.Tensor:
    """Logits of a classifier, (batch_size, num_labels), or features, (batch_size, num_tokens_left, hidden_size)."""
    logits = getattr(outputs, "logits", None)
    return outputs.last_hidden_state if logits is None else logits


def gives_features(model: nn.Module) -> bool:
    """Whether a model has no classifier, so that its answer is its last hidden state."""
    return not any("ForImageClassification" in base.__name__ for base in type(model).__mro__)


class AnswerAtKeepRate(nn.Module):
    """The model as a function of images and keep rates: the number of tokens is computed while the graph runs.

    The layers are those of the model, in a loop without questions that only Python can answer. A layer that keeps all
    tokens gets no fused token, as in the model: keep rate 1.0 is the dense ViT here too.

    Args:
        model: `EViTForImageClassification`, `EViTForImageClassificationWithTeacher` or `EViTModel`.
    """

    def __init__(self, model: EViTPreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, keep_rate: torch.Tensor) -> torch.Tensor:
        """Answer, float32, see `answer_of`.

        Args:
            pixel_values: (batch_size, num_channels, height, width), float32.
            keep_rate: (num_reorganization_layers,), float64 as in Python, each in (0, 1].
        """
        model, config = self.model, self.model.config
        num_prefix_tokens = config.num_prefix_tokens
        backbone = model.base_model
        gives_features = model is backbone
        hidden_states = backbone.embeddings(pixel_values.to(next(backbone.parameters()).dtype))
        num_image_tokens = hidden_states.shape[1] - num_prefix_tokens
        rates = dict(zip(config.reorganization_layers, keep_rate.unbind(), strict=True))
        for i, layer in enumerate(backbone.layers):
            if i not in rates:
                reads_prefix_only = i + 1 == len(backbone.layers) and not gives_features
                num_queries = num_prefix_tokens if reads_prefix_only else None
                hidden_states = layer(hidden_states, num_queries=num_queries, takes_short_cuts=True)
                continue
            # Attend
            attended, _, scores, _ = layer.attention(layer.layernorm_before(hidden_states), score_tokens=True)
            hidden_states = hidden_states + layer.residual_branch(attended)

            # Reorganize
            kept = torch.ceil(rates[i] * num_image_tokens).to(torch.int64)
            num_attentive, num_fused = kept.item(), (num_image_tokens - kept).clamp(max=1).item()
            for bound in (num_attentive >= 1, num_attentive <= num_image_tokens, num_fused >= 0, num_fused <= 1):
                torch._check(bound)
            order = None
            if gives_features:  # where nothing is given up, the model leaves the tokens in their order
                in_order = -torch.arange(num_image_tokens, device=scores.device, dtype=scores.dtype)
                order = torch.where(kept == num_image_tokens, in_order, scores)
            hidden_states = layer.rearrange(
                hidden_states, layer.choose_tokens(scores, num_attentive, config.inattentive_tokens, order)
            )
            num_image_tokens = num_attentive
            if config.inattentive_tokens == "fused":
                num_image_tokens = num_attentive + num_fused
                # Not a slice, whose length torch.export of 2.7 cannot tell.
                left = torch.arange(num_prefix_tokens + num_image_tokens, device=hidden_states.device)
                hidden_states = hidden_states.index_select(1, left)

            # MLP
            hidden_states = layer.feed_forward(hidden_states)
        if gives_features:
            return backbone.layernorm(hidden_states).float()
        hidden_states = backbone.layernorm(hidden_states[:, :num_prefix_tokens])
        if isinstance(model, EViTForImageClassificationWithTeacher):
            cls_logits = model.cls_classifier(hidden_states[:, 0])
            return ((cls_logits + model.distillation_classifier(hidden_states[:, 1])) / 2).float()
        return model.classifier(hidden_states[:, 0]).float()


def _plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention without asking how long the sequence is, which a graph does not know."""
    output = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=kwargs["scaling"])
    return output.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("evit_export", _plain_attention)


def exported_program(
    model: PreTrainedModel, keep_rate_is_input: bool = False, image_size: int | Sequence[int] | None = None
) -> tuple[torch.export.ExportedProgram, tuple[torch.Tensor, ...]]:
    """Trace a model with `torch.export`, for batches of any size.

    Args:
        model: any EViT, or a model that `reorganize` was called on; its own keep rate is part of the graph unless it
            is an input.
        keep_rate_is_input: whether each call gives its keep rates, see `AnswerAtKeepRate.forward`.
        image_size: pixels, (height, width) or one number for both; by default the model's own.

    Returns: the program, and the inputs it was traced with.

    Raises: ExportError for a model whose keep rate cannot be an input.
    """
    _check_keep_rate_input(model, keep_rate_is_input)
    model = copy.deepcopy(model).eval()
    if isinstance(model, EViTPreTrainedModel):
        model.config._attn_implementation = "evit_export"
    inputs: tuple[torch.Tensor, ...] = (torch.randn_like(example_inputs(model, image_size, batch_size=2)).float(),)
    dynamic: list[Any] = [{0: torch.export.Dim("batch_size", min=1, max=MAX_BATCH_SIZE)}]
    wrapper: nn.Module = Answer(model)
    if keep_rate_is_input:
        wrapper = AnswerAtKeepRate(model)
        inputs += (torch.full((len(model.config.reorganization_layers),), 0.7, dtype=torch.float64),)
        dynamic.append(None)
    with torch.no_grad(), _quiet():
        return torch.export.export(wrapper.eval(), inputs, dynamic_shapes=tuple(dynamic), strict=False), inputs


def _check_keep_rate_input(model: PreTrainedModel, keep_rate_is_input: bool) -> None:
    """Raise ExportError if the keep rate is to be an input and cannot be one."""
    if keep_rate_is_input and not isinstance(model, EViTPreTrainedModel):
        raise ExportError(
            f"The layers of `{type(model).__name__}` count their tokens in Python, so its keep rate has to be fixed: "
            "leave out the input."
        )
    if keep_rate_is_input and isinstance(model, EViTLVForImageClassification):
        raise ExportError("LV-ViT classifies every token, so its keep rate has to be fixed: leave out the input.")
    if keep_rate_is_input and (model.config.macs is not None or model.config.inattentive_tokens == "counted"):
        raise ExportError(
            "Only the keep rate of a model whose inattentive tokens are fused or dropped can be an input: leave it "
            "out, or call `set_keep_rate` first."
        )
    if keep_rate_is_input and not model.config.reorganization_layers:
        raise ExportError("`reorganization_layers` is empty: there is no keep rate that could be an input.")


def export_model(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    export_format: str,
    keep_rate_is_input: bool = False,
    processor: BaseImageProcessor | None = None,
    image_size: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """Export a model and make sure that the export answers as the model does.

    A bfloat16 model becomes float32 in ONNX and OpenVINO, which have no arithmetic for it, with a warning. The folder
    is written whole or not at all.

    Args:
        model: any EViT, or a model that `reorganize` was called on; one without classifier is exported as a function
            that returns its last hidden state.
        folder: written to; made if needed. Files of an earlier export are replaced.
        export_format: "onnx", "openvino", "torch-export" or "aoti".
        keep_rate_is_input: see `exported_program`.
        processor: of the model, for `example.py`.
        image_size: pixels, (height, width) or one number for both; by default the model's own.

    Returns: what `export.json` holds: format, sizes, keep rate, largest difference found.

    Raises:
        ExportError: an unknown format, a missing package, classes that are not numbered from 0, or outputs that
            differ.
    """
    if export_format not in FORMATS:
        raise ExportError(f"There is no format `{export_format}`: take one of {', '.join(FORMATS)}.")
    _needs(*PACKAGES.get(export_format, ()))
    _check_keep_rate_input(model, keep_rate_is_input)
    config, tower, features = model.config, tower_of(model), gives_features(model)
    if not features and sorted(config.id2label) != list(range(config.num_labels)):
        raise ExportError(
            f"`id2label` must number the {config.num_labels} classes from 0, as the model's logits are numbered, got "
            f"{sorted(config.id2label)[:5]}: set `model.config.id2label`."
        )
    if export_format in ("onnx", "openvino") and next(model.parameters()).dtype == torch.bfloat16:
        logger.warning(f"{export_format} has no arithmetic for bfloat16: the model is exported in float32.")
        model = copy.deepcopy(model).float()
    num_channels, height, width = example_inputs(model, image_size).shape[1:]
    record = {
        "format": export_format,
        "file": FORMATS[export_format],
        "output": "last_hidden_state" if features else "logits",
        "problem_type": config.problem_type,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "image_size": [height, width],
        "num_channels": num_channels,
        "keep_rate": "input" if keep_rate_is_input else tower.config.keep_rate,
        "num_keep_rates": len(tower.config.reorganization_layers) if keep_rate_is_input else 0,
        "default_keep_rate": tower.config.keep_rate,
        "num_patches": math.prod(tower.patch_grid((height, width))),
        "macs": tower.config.macs,
        "inattentive_tokens": tower.config.inattentive_tokens,
        "torch": torch.__version__,
    }
    with complete_folder(folder) as work:
        _write_settings(model, work, record, processor)
        program, inputs = exported_program(model, keep_rate_is_input, image_size)
        path = work / FORMATS[export_format]
        path.parent.mkdir(exist_ok=True)
        with torch.no_grad(), _quiet():
            _WRITERS[export_format](program, inputs, path, record["output"])
        write_record(work, record)
        record["largest_difference"] = check_parity(
            model, load_exported(work), keep_rate_is_input, image_size=image_size
        )
        write_record(work, record)
    return record


def _write_settings(
    model: PreTrainedModel, folder: Path, record: dict[str, Any], processor: BaseImageProcessor | None
) -> None:
    """Write what others read: config.json, labels.json, preprocessor_config.json and example.py."""
    config = model.config.to_dict()
    config.pop("auto_map", None)
    gives_features = record["output"] == "last_hidden_state"
    if isinstance(model, EViTPreTrainedModel):
        # Optimum and transformers.js know ViT, and an exported EViT is called as one.
        kind = "ViTModel" if gives_features else "ViTForImageClassification"
        config |= {"model_type": "vit", "architectures": [kind]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not gives_features:
        names = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
        (folder / "labels.json").write_text(json.dumps(names, ensure_ascii=False) + "\n", encoding="utf-8")
    if processor is None:
        return
    processor.save_pretrained(folder)
    reason = why_pixels_differ(processor, record)
    if reason is None:
        (folder / "example.py").write_text(example_code(record, processor), encoding="utf-8")
    else:
        logger.warning(f"No `example.py` is written: {type(processor).__name__} {reason}")


@contextmanager
def complete_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, whose files move to `folder` if nothing fails; otherwise `folder` stays as it was.

    `export.json` comes last, so that a folder that was interrupted while files moved is not taken for an export.

    Args:
        folder: made if needed, with its parents. Files of the same name are replaced.

    Raises: ExportError if it is a file.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"`{folder}` is a file: name a folder.")
    ancestor = next(parent for parent in folder.parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=ancestor) as temporary:
        work = Path(temporary) / "export"
        work.mkdir()
        yield work
        files = sorted(path.relative_to(work) for path in work.rglob("*") if path.is_file())
        (folder / "export.json").unlink(missing_ok=True)
        for file in sorted(files, key=lambda file: file.name == "export.json"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(work / file, folder / file)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `export.json`."""
    (folder / "export.json").write_text(json.dumps(record, indent=2) + "\n")


def check_parity(
    model: PreTrainedModel,
    exported: Callable[..., torch.Tensor],
    keep_rate_is_input: bool = False,
    batch_sizes: Sequence[int] = (1, 2, 5),
    image_size: int | Sequence[int] | None = None,
) -> float:
    """Compare an exported model with the one it was made from, on random images in batches of several sizes.

    Args:
        model: the original.
        exported: see `load_exported`.
        keep_rate_is_input: whether to compare at several keep rates too, 1.0 among them.
        batch_sizes: of the images.
        image_size: pixels, (height, width) or one number for both; by default the model's own.

    Returns: the largest difference of answers, relative to the largest answer.

    Raises: ExportError if it is more than rounding (1e-3; 0.1 in float16, 0.3 in bfloat16), or a shape differs.
    """
    model = copy.deepcopy(model).eval()
    settings = tower_of(model).config
    num_layers = len(settings.reorganization_layers)
    keep_rates: list[Any] = [None]
    if keep_rate_is_input:
        keep_rates = [[rate] * num_layers for rate in (1.0, 0.7, 0.5)] + [[0.9 - 0.1 * i for i in range(num_layers)]]
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    parameter = next(model.parameters())
    tolerance = TOLERANCE[parameter.dtype]
    for batch_size in batch_sizes:
        shape = example_inputs(model, image_size, batch_size).shape
        images = torch.randn(shape, generator=generator).to(parameter.device)
        for keep_rate in keep_rates:
            with torch.no_grad():
                expected = answer_of(model(images, keep_rate=keep_rate)).float().cpu()
            answer = exported(images, keep_rate).float().cpu()
            difference = float("inf")
            if answer.shape == expected.shape:
                difference = ((answer - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
            if not difference <= tolerance:
                raise ExportError(
                    f"The exported model answers {tuple(answer.shape)} with a relative difference of {difference:.2g} "
                    f"for {batch_size} images at keep rate {keep_rate or settings.keep_rate}; rounding explains "
                    f"{tolerance}. Do not use it."
                )
            worst = max(worst, difference)
    return worst


def load_exported(folder: str | os.PathLike[str], num_threads: int | None = None) -> Callable[..., torch.Tensor]:
    """Load an exported folder as a function of (pixel_values, keep_rate=None) that returns the answer, float32.

    The keep rate is one number or one for each reorganization layer, as in the model's forward; None takes the
    model's own. Where it is fixed in the export any other is a ValueError.

    Args:
        folder: see `export_model`.
        num_threads: of ONNX Runtime or OpenVINO; PyTorch's formats run on those that PyTorch has.

    Raises: ExportError if the folder holds no export, or a package is missing.
    """
    folder = Path(folder)
    if not (folder / "export.json").is_file():
        raise ExportError(
            f"`{folder}` holds no export.json: name a folder that `evit export` or `export_model` wrote."
        )
    record = json.loads((folder / "export.json").read_text())
    run = _LOADERS[record["format"]](folder / record["file"], num_threads)
    num_keep_rates, default = record["num_keep_rates"], record["default_keep_rate"]
    fuses = record.get("inattentive_tokens") == "fused" or record.get("fuse_inattentive_tokens", False)  # the old name

    def answer(pixel_values: torch.Tensor, keep_rate: float | Sequence[float] | None = None) -> torch.Tensor:
        pixel_values = pixel_values.float()
        if not num_keep_rates:
            if keep_rate is not None and python_value(keep_rate) != default:
                raise ValueError(
                    f"`keep_rate` is {default} in this export, got {keep_rate}: leave it out, or export the model "
                    "with the keep rate as an input."
                )
            return run(pixel_values)
        by_layer = keep_rate_by_layer(default if keep_rate is None else keep_rate, range(num_keep_rates))
        rates = list(by_layer.values())
        if record["format"] == "openvino":
            rates = robust_keep_rates(rates, record["num_patches"], fuses)
        return run(pixel_values, torch.tensor(rates, dtype=torch.float64))

    return answer


# One writer and one loader for each format


def _write_torch_export(
    program: torch.export.ExportedProgram, inputs: tuple[Any, ...], path: Path, output: str
) -> None:
    torch.export.save(program, path)


def _write_aoti(program: torch.export.ExportedProgram, inputs: tuple[Any, ...], path: Path, output: str) -> None:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _write_onnx(program: torch.export.ExportedProgram, inputs: tuple[Any, ...], path: Path, output: str) -> None:
    names = ["pixel_values", "keep_rate"][: len(inputs)]
    # PyTorch's exporter knows no stable sort. TopK of all values is one: of equals ONNX takes the first one first.
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    if any(node.target is torch.ops.aten.sort.stable for graph in graphs for node in graph.nodes):
        program = program.run_decompositions({torch.ops.aten.sort.stable: _sort})
    exported = torch.onnx.export(
        program, dynamo=True, input_names=names, output_names=[output], verbose=False, optimize=True
    )
    exported.save(str(path), external_data=False)
    _name_batch_axis(path)


def _sort(
    values: torch.Tensor, *, stable: bool, dim: int = -1, descending: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`aten.sort.stable` as `aten.topk`."""
    return torch.ops.aten.topk.default(values, values.shape[dim], dim, descending, True)


def _name_batch_axis(path: Path) -> None:
    """Call the first axis of inputs and answers `batch_size`, as Optimum does; the exporter numbers it."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    axis = graph.input[0].type.tensor_type.shape.dim[0]
    name = axis.dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if name and dim.dim_param == name:
                dim.dim_param = "batch_size"
    # The exporter of PyTorch 2.7 also notes the shapes of weights, which quantizing transposes.
    weights = {weight.name for weight in graph.initializer}
    noted = [value for value in graph.value_info if value.name not in weights]
    del graph.value_info[:]
    graph.value_info.extend(noted)
    onnx.save(model, path)


def _write_openvino(program: torch.export.ExportedProgram, inputs: tuple[Any, ...], path: Path, output: str) -> None:
    import openvino

    onnx_path = path.with_suffix(".onnx")
    _write_onnx(program, inputs, onnx_path, output)
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


# The example next to the model

_RUN = {
    "onnx": ("onnxruntime", "onnxruntime.InferenceSession(MODEL)", "model.run(None, {INPUTS})[0]"),
    "openvino": (
        "openvino",
        'openvino.Core().compile_model(MODEL, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})',
        "model({INPUTS})[0]",
    ),
    "torch-export": ("torch", "torch.export.load(MODEL).module()", "model(TENSORS).detach().numpy()"),
    "aoti": ("torch", "torch._inductor.aoti_load_package(str(MODEL))", "model(TENSORS).numpy()"),
}


def why_pixels_differ(processor: BaseImageProcessor, record: dict[str, Any]) -> str | None:
    """What keeps `processed_pixels` from giving a processor's pixels; None if they are equal but for rounding.

    Rounding is three levels of 255: Pillow and torchvision resize differently.
    """
    from PIL import Image

    settings = json.loads(processor.to_json_string())
    num_channels, size = record["num_channels"], tuple(record["image_size"])
    if num_channels not in (1, 3, 4):
        return f"gets images of {num_channels} channels, which are not pictures."
    scale = settings.get("rescale_factor") if settings.get("do_rescale") else 1.0
    if settings.get("do_normalize"):
        scale /= float(np.min(settings["image_std"]))
    for width, height in ((90, 60), (41, 70)):
        image = (
            Image.effect_noise((9, 6), 90).resize((width, height)).convert({1: "L", 3: "RGB", 4: "RGBA"}[num_channels])
        )
        try:
            expected = np.asarray(processor(image, return_tensors="np")["pixel_values"])
            pixels = processed_pixels(image, settings, num_channels)
        except Exception as error:  # whatever a processor of a different family raises
            return f"fails, or is not one that it can repeat: {type(error).__name__}: {error}"
        if expected.shape != (1, num_channels, *size):
            return f"makes images {expected.shape[1:]} of a picture, but the model takes {(num_channels, *size)}."
        if pixels.shape != expected.shape or np.abs(pixels - expected).max() > 3 * scale:
            return "does more than resize, crop, rescale and normalize."
    return None


def example_code(record: dict[str, Any], processor: BaseImageProcessor) -> str:
    """Write the program that classifies images with an exported model.

    It reads the settings of the processor from the preprocessor_config.json next to it.

    Args:
        record: of the export.
        processor: of the model.
    """
    library, load, run = _RUN[record["format"]]
    has_rate = record["keep_rate"] == "input"
    is_robust = has_rate and record["format"] == "openvino"
    inputs = '"pixel_values": pixels' + (', "keep_rate": keep_rates' if has_rate else "")
    tensors = "torch.from_numpy(pixels)" + (", torch.from_numpy(keep_rates)" if has_rate else "")
    run = run.replace("INPUTS", inputs).replace("TENSORS", tensors)
    functions = [upright, as_rgb, processed_pixels, *([robust_keep_rates] if is_robust else [])]
    source = "\n\n".join(inspect.getsource(function) for function in functions)
    flag = rates = ""
    if has_rate:
        flag = 'parser.add_argument("--keep-rate", type=float, default=0.7, help="share of patches kept, in (0, 1]")'
        rates = f"""
    if not 0 < arguments.keep_rate <= 1:
        parser.error(f"--keep-rate must be in (0, 1], got {{arguments.keep_rate}}")
    keep_rates = [arguments.keep_rate] * {record["num_keep_rates"]}  # one for each layer that gives up patches"""
        if is_robust:
            rates += f"""
    keep_rates = robust_keep_rates(keep_rates, {record["num_patches"]}, {record["inattentive_tokens"] == "fused"})"""
        rates += "\n    keep_rates = np.array(keep_rates)"
    if record.get("output") == "last_hidden_state":
        show = 'print(f"{path}: features {answer.shape[1:]} of class token and patches, {answer[0, 0, :4]} ...")'
    else:
        scores = {
            "multi_label_classification": "1 / (1 + np.exp(-answer))",
            "regression": "answer",
        }.get(record.get("problem_type"), "np.exp(answer - answer.max()) / np.exp(answer - answer.max()).sum()")
        show = f"""scores = {scores}
        order = scores[0].argsort()[::-1][: arguments.top]
        print(path, labels[order[0]])
        for number in order:
            print(f"{{scores[0, number]:8.3f}}  {{labels[number]}}")"""
    labels = 'labels = json.loads((HERE / "labels.json").read_text(encoding="utf-8"))'
    return f"""\"\"\"Classify pictures with this exported EViT: python example.py [--top 5] IMAGE [IMAGE ...]\"\"\"

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import {library}
    from PIL import Image, ImageOps
except ImportError as error:
    sys.exit(f"{{error.name}} is not installed: pip install {library} numpy pillow")

HERE = Path(__file__).parent
MODEL = HERE / "{record.get("file", FORMATS[record["format"]])}"


{source}

def main() -> None:
    parser = argparse.ArgumentParser(description="Classify pictures with this exported EViT.")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--top", type=int, default=5, help="how many classes to print")
    {flag or "# The keep rate is fixed in this model."}
    arguments = parser.parse_args(){rates}
    settings = json.loads((HERE / "preprocessor_config.json").read_text(encoding="utf-8"))
    {"" if record.get("output") == "last_hidden_state" else labels}
    model = {load}
    failed = False
    for path in arguments.images:
        try:
            pixels = processed_pixels(Image.open(path), settings, {record.get("num_channels", 3)})
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            sys.stderr.write(f"{{path}} is not a picture that can be read: {{error}}\\n")
            failed = True
            continue
        answer = {run}
        {show}
    sys.exit(1 if failed else 0)


main()
"""


__all__ = ["FORMATS", "ExportError", "check_parity", "export_model", "exported_program", "load_exported"]
