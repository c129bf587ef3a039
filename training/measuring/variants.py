"""What `evit benchmark` compares: one set of weights as EViT and as dense ViTs, on every backend."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from evit_hf import EViTForImageClassification, EViTPreTrainedModel, preset_config, reorganize
from evit_hf.export import FORMATS, answer_of, export_model, gives_features, load_exported
from evit_hf.presets import PRESETS
from evit_hf.profiling import MacsFormula

from ..learning.models import compile_layers, load_classifier, load_model, random_classifier
from ..settings import budget_of
from .timing import Variant


BASELINES = ("timm", "timm-unfused", "transformers", "transformers-eager")
COMPILE_MODES = {
    "compile": {},
    # Weights are packed once for CPU kernels, the fastest is tried out, and C++ calls them: only for inference.
    "compile-freezing": {
        "options": {
            "freezing": True,
            "cpp_wrapper": True,
            "max_autotune": True,
            "max_autotune_gemm_backends": "CPP,ATEN",
        }
    },
    "compile-reduce-overhead": {"mode": "reduce-overhead"},
    "compile-max-autotune": {"mode": "max-autotune"},
}
BACKENDS = ("sdpa", "sdpa-mkl", "eager", "compile-layers", *COMPILE_MODES, *FORMATS, "onnx-int8")


def build_model(
    name: str, image_size: int | None = None, inattentive_tokens: str | None = None, macs: float | None = None
) -> PreTrainedModel:
    """Model of that name with its weights, or of that preset with random ones; speed does not depend on them.

    Args:
        name: preset, folder or Hub id; of a family also a model without a classifier.
        image_size: pixels instead of the model's own; families take images of several sizes as they are.
        inattentive_tokens: "fused", "dropped" or "counted" instead of the model's own.
        macs: share of the dense model's operations instead of the model's own keep rate.

    Raises: ValueError for an unknown preset or folder.
    """
    if name in PRESETS:
        # Attention that is far from uniform, so that rounding rarely changes which tokens are kept.
        model = random_classifier(preset_config(name, initializer_range=0.05))
    else:
        model = load_model(name)
        if isinstance(model, EViTPreTrainedModel) and gives_features(model):
            model = load_classifier(name)
    if isinstance(model, EViTPreTrainedModel) and image_size not in (None, model.config.image_size):
        model.set_image_size(image_size)
    if inattentive_tokens is not None or macs is not None:
        reorganize(model, macs=macs, inattentive_tokens=inattentive_tokens)
    return model.eval()


def check_classifier(model: PreTrainedModel, flag: str) -> None:
    """Refuse to train a model that has nothing to learn from labels.

    Raises: ValueError naming the flag that trains.
    """
    if gives_features(model):
        raise ValueError(f"`{flag}` needs a classifier, and `{type(model).__name__}` has none.")


def default_baselines(model: PreTrainedModel) -> list[str]:
    """Dense code that a model is compared with where nobody says which.

    All that there are for EViT; of a family its own code in Transformers. timm's code knows no eager attention there.
    """
    if isinstance(model, EViTPreTrainedModel):
        return list(BASELINES)
    return ["transformers"] if model.config.model_type == "timm_wrapper" else ["transformers", "transformers-eager"]


def dense_family(model: PreTrainedModel, name: str) -> nn.Module:
    """A model of a family in its own dense code, with the same weights.

    Raises: ValueError for a baseline other than those of `default_baselines`.
    """
    known = default_baselines(model)
    if name not in known:
        raise ValueError(f"`--baselines {name}` has no {type(model).__name__}: take {' '.join(known)}, or none.")
    config = copy.deepcopy(model.config)
    is_eager = name.endswith("eager") or not type(model)._supports_sdpa  # as timm's models in Transformers 5.9
    config._attn_implementation = "eager" if is_eager else "sdpa"
    dense = type(model)(config)
    dense.load_state_dict(model.state_dict())
    return dense.eval()


def dense_baseline(model: PreTrainedModel, name: str) -> nn.Module:
    """The dense ViT with the weights of a model in a different code base.

    Args:
        model: an `EViTForImageClassification` without distillation token, or a model of a family.
        name: one of `BASELINES`.

    Raises: ValueError for models that those code bases lack, or if timm is not installed.
    """
    if not isinstance(model, EViTPreTrainedModel):
        return dense_family(model, name)
    config = model.config
    if type(model) is not EViTForImageClassification or config.use_distillation_token:
        raise ValueError(
            f"`--baselines {name}` has no {type(model).__name__} with its distillation token or auxiliary classifier: "
            "take `--baselines none`, so that keep rate 1.0 of the model itself is the baseline."
        )
    if name.startswith("transformers"):
        fields = {key: x for key, x in config.to_dict().items() if key in ViTConfig().to_dict()}
        implementation = "eager" if name.endswith("eager") else "sdpa"
        vit = ViTForImageClassification(
            ViTConfig(**{**fields, "model_type": "vit"}, attn_implementation=implementation)
        )
        vit.load_state_dict(model.state_dict())
        return vit.eval()
    return _timm_vit(model, is_fused=name == "timm")


def _timm_vit(model: PreTrainedModel, is_fused: bool) -> nn.Module:
    try:
        import timm.layers
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        raise ValueError(
            "timm is not installed: `pip install timm`, or `--baselines transformers transformers-eager`."
        ) from None
    config = model.config
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(is_fused)
    try:
        vit = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            in_chans=config.num_channels,
            num_classes=config.num_labels,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            qkv_bias=config.qkv_bias,
            norm_layer=functools.partial(nn.LayerNorm, eps=config.layer_norm_eps),
        )
    finally:
        timm.layers.set_fused_attn(bool(before))
    vit.load_state_dict(_timm_state_dict(model.state_dict(), config.num_hidden_layers))
    return vit.eval()


def _timm_state_dict(ours: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Weights under timm's names, query, key and value in one matrix."""
    theirs = {
        "cls_token": ours["vit.embeddings.cls_token"],
        "pos_embed": ours["vit.embeddings.position_embeddings"],
    }
    pairs = {"vit.embeddings.patch_embeddings.projection": "patch_embed.proj"}
    pairs |= {"vit.layernorm": "norm", "classifier": "head"}
    for i in range(num_layers):
        layer, block = f"vit.layers.{i}", f"blocks.{i}"
        pairs |= {f"{layer}.layernorm_before": f"{block}.norm1", f"{layer}.layernorm_after": f"{block}.norm2"}
        pairs |= {f"{layer}.attention.o_proj": f"{block}.attn.proj"}
        pairs |= {f"{layer}.mlp.fc1": f"{block}.mlp.fc1", f"{layer}.mlp.fc2": f"{block}.mlp.fc2"}
        for kind in ("weight", "bias"):
            parts = [ours.get(f"{layer}.attention.{name}_proj.{kind}") for name in "qkv"]
            if parts[0] is not None:
                theirs[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
    for ours_name, theirs_name in pairs.items():
        for kind in ("weight", "bias"):
            if f"{ours_name}.{kind}" in ours:
                theirs[f"{theirs_name}.{kind}"] = ours[f"{ours_name}.{kind}"]
    return theirs


def reference_logits(model: PreTrainedModel, pixel_values: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """The plainest implementation as a function of the keep rate: eager, float32, every token, no oneDNN."""
    plain = copy.deepcopy(model).float()
    set_attention(plain, "eager")
    plain_road = {"output_hidden_states": True} if isinstance(plain, EViTPreTrainedModel) else {}
    answers: dict[str, torch.Tensor] = {}

    def logits(keep_rate: Any) -> torch.Tensor:
        if str(keep_rate) not in answers:
            with torch.no_grad(), without_onednn():
                answers[str(keep_rate)] = answer_of(plain(pixel_values.float(), **budget_of(keep_rate), **plain_road))
        return answers[str(keep_rate)]

    return logits


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Let a model attend in "sdpa" or "eager"."""
    model.set_attn_implementation(implementation)
    reorganize(model)


def inference_variants(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    keep_rates: Sequence[Any],
    backends: Sequence[str],
    baselines: Sequence[str],
    folder: Path,
    num_threads: int | None = None,
) -> list[Variant]:
    """Everything to be timed in one setting.

    Args:
        model: on the device and in the dtype to measure.
        pixel_values: likewise.
        keep_rates: of the EViT variants, or shares of operations, see `Macs`.
        backends: of `BACKENDS`.
        baselines: of `BASELINES`, always eager code.
        folder: for exported models.
        num_threads: for engines that bring their own.

    Returns: baselines first.

    Raises: ValueError for an unknown name.
    """
    for names, known, flag in ((backends, BACKENDS, "--backends"), (baselines, BASELINES, "--baselines")):
        for name in names:
            if name not in known:
                raise ValueError(f"`{flag}` knows {', '.join(known)}, got {name!r}.")
    macs = MacsFormula.of(model, tuple(pixel_values.shape[-2:]))
    dense_macs = macs(1.0)
    if pixel_values.dtype == torch.bfloat16 and {"onnx", "onnx-int8", "openvino"} & set(backends):
        raise ValueError("`--dtypes bfloat16` does not reach ONNX Runtime and OpenVINO: take float32 or float16.")
    variants = [
        Variant(f"dense {name}", _runner(dense_baseline(model, name), pixel_values), dense_macs, dense_macs, 1.0)
        for name in baselines
    ]
    for backend in backends:
        for keep_rate in keep_rates:
            variants.append(
                Variant(
                    f"{code_name(model)} {shown(keep_rate)} {backend}",
                    _backend(model, pixel_values, keep_rate, backend, folder, num_threads),
                    macs(**budget_of(keep_rate)),
                    macs(executed=True, **budget_of(keep_rate)),
                    keep_rate,
                    is_exact=not backend.endswith("int8"),
                )
            )
    return variants


def _runner(network: nn.Module, pixel_values: torch.Tensor, **keywords: Any) -> Callable[[], torch.Tensor]:
    network = network.to(pixel_values.device, pixel_values.dtype)

    def run() -> torch.Tensor:
        with torch.no_grad():
            outputs = network(pixel_values, **keywords)
        return outputs if isinstance(outputs, torch.Tensor) else answer_of(outputs)

    return run


@contextmanager
def without_onednn() -> Iterator[None]:
    """Leave linear layers to PyTorch's own choice, MKL; see `evit_hf.cpu_inference`.

    `torch.backends.mkldnn.flags` would set precisions as well, and warn about them.
    """
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def _backend(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    keep_rate: Any,
    backend: str,
    folder: Path,
    num_threads: int | None,
) -> Callable[[], torch.Tensor]:
    """One model on one backend at one keep rate, ready to run."""
    fixed = reorganize(copy.deepcopy(model), **budget_of(keep_rate))
    if backend in ("sdpa", "eager"):
        set_attention(fixed, backend)
        return _runner(fixed, pixel_values)
    if backend == "sdpa-mkl":
        return without_onednn()(_runner(fixed, pixel_values))
    if backend == "compile-layers":
        compile_layers(fixed)
        return _runner(fixed, pixel_values)
    if backend in COMPILE_MODES:
        options = COMPILE_MODES[backend]
        run = _runner(torch.compile(fixed, fullgraph=True, dynamic=False, **options), pixel_values)
        with torch._inductor.config.patch(options.get("options", {})):  # Dynamo reads `freezing` only here
            run()
        return run
    export_format = "onnx" if backend == "onnx-int8" else backend
    image_size = tuple(pixel_values.shape[-2:])
    path = folder / f"{export_format}-{shown(keep_rate)}-{image_size[-1]}"
    if not (path / "export.json").exists():
        export_model(fixed, path, export_format, image_size=image_size)
    if backend == "onnx-int8":
        path = quantized_copy(path)
    exported = load_exported(path, num_threads)
    return lambda: exported(pixel_values)


def quantized_copy(folder: Path) -> Path:
    """A folder next to an ONNX export, with its matrix products in 8 bits, the ranges found while running."""
    import shutil

    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder.with_name(f"{folder.name}-int8")
    if not path.exists():
        shutil.copytree(folder, path)
        model = str(path / FORMATS["onnx"])
        quantize_dynamic(model, model, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
    return path


def shown(keep_rate: Any) -> str:
    """Return a keep rate, or one for each layer, as a word."""
    return "-".join(str(rate) for rate in keep_rate) if isinstance(keep_rate, (list, tuple)) else str(keep_rate)


def code_name(model: PreTrainedModel) -> str:
    """Word for the code that runs a model: EViT's own, or that of its family, reorganized."""
    return "EViT" if isinstance(model, EViTPreTrainedModel) else "reorganized"


def training_variants(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    keep_rates: Sequence[Any],
    backends: Sequence[str],
    baselines: Sequence[str],
) -> list[Variant]:
    """Forward, backward and AdamW step of everything to be timed.

    Args:
        model: on the device and in the dtype to measure.
        pixel_values: a batch.
        labels: (batch_size,) class numbers.
        keep_rates: of the EViT variants, or shares of operations, see `Macs`.
        backends: "sdpa", "eager", "compile" or "compile-layers".
        baselines: of `BASELINES`.

    Raises: ValueError for a backend that cannot train.
    """
    macs = MacsFormula.of(model, tuple(pixel_values.shape[-2:]))
    dense_macs = macs(1.0)
    variants = []
    for name in baselines:
        step, forward, network = _training_step(dense_baseline(model, name), pixel_values, labels)
        variants.append(Variant(f"dense {name}", step, dense_macs, dense_macs, 1.0, model=network, forward=forward))
    for backend in backends:
        if backend not in ("sdpa", "eager", "compile", "compile-layers"):
            raise ValueError(f"`--training` runs on sdpa, eager, compile and compile-layers, not on {backend!r}.")
        for keep_rate in keep_rates:
            fixed = reorganize(copy.deepcopy(model), **budget_of(keep_rate))
            set_attention(fixed, "eager" if backend == "eager" else "sdpa")
            if backend == "compile":
                fixed.compile(dynamic=False)
            if backend == "compile-layers":
                compile_layers(fixed)
            step, forward, network = _training_step(fixed, pixel_values, labels)
            title = f"{code_name(model)} {shown(keep_rate)} {backend}"
            operations = (macs(**budget_of(keep_rate)), macs(executed=True, **budget_of(keep_rate)))
            variants.append(Variant(title, step, *operations, keep_rate, model=network, forward=forward))
    return variants


def _training_step(network: nn.Module, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[Any, ...]:
    """Functions that do a whole step and only a forward, and the network."""
    network = network.to(pixel_values.device, pixel_values.dtype).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)

    def forward() -> torch.Tensor:
        outputs = network(pixel_values)
        return nn.functional.cross_entropy(getattr(outputs, "logits", outputs).float(), labels)

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, forward, network
