"""Inference on CPUs: linear layers on oneDNN, and batches cut to the size of the cache.

Both give the answers of the plain computation up to rounding, and both are visible to somebody who looks at single
modules; `short_cuts.plain_road_wanted` says when they may be taken. On other devices, with gradients, while tracing or
compiling neither happens. Nothing here has parameters: a model is saved and loaded as if this file did not exist.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers.activations import GELUActivation


# Weights of a layer below which calling oneDNN costs more than it saves: 192 x 192 (DeiT-Ti) breaks even.
MIN_ONEDNN_WEIGHTS = 2**16
HAS_MKL_AND_ONEDNN = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
# Hidden activations of an MLP that a thread may have in flight, see `images_in_cache`.
CACHE_BYTES_PER_THREAD = 20 * 2**20


def projection(inputs: torch.Tensor, takes_short_cuts: bool) -> Callable[..., torch.Tensor]:
    """What runs the linear layers of a module: `linear` on CPUs, if nobody would see it, or else `called`."""
    return linear if takes_short_cuts and inputs.device.type == "cpu" else called


def called(layer: nn.Module, inputs: torch.Tensor, activation: nn.Module | None = None) -> torch.Tensor:
    """`activation(layer(inputs))`, module by module."""
    outputs = layer(inputs)
    return outputs if activation is None else activation(outputs)


def linear(layer: nn.Module, inputs: torch.Tensor, activation: nn.Module | None = None) -> torch.Tensor:
    """`activation(layer(inputs))`, in inference on x86 CPUs with oneDNN's kernel instead of MKL's.

    That kernel, the one of `torch.compile`, spends less on rearranging the weights, which for few tokens is a large
    part of a product's time, and has bias and GELU done before the outputs leave the cache. Equal up to rounding.
    DeiT-S gains 6 to 9 %, see BENCHMARKS.md. `torch.backends.mkldnn.enabled = False` switches it off.

    Remove when PyTorch itself calls oneDNN for float32 linear layers on x86 (`torch.nn.functional.linear` then is as
    fast): the operator is private and may change with any version.

    Args:
        layer: a linear layer, or a module in its place (an adapter, a quantized layer), which is then called.
        inputs: (..., in_features).
        activation: applied to the outputs, None for none. Only GELU is fused; hooks on it are not called, so that the
            caller has to make sure that there are none.

    Returns: (..., out_features).

    Source: the operator is found in Inductor,
        https://github.com/pytorch/pytorch/blob/v2.7.0/torch/_inductor/fx_passes/mkldnn_fusion.py.
    """
    if not runs_on_onednn(layer, inputs):
        return called(layer, inputs, activation)
    kernel = torch.ops.mkldnn._linear_pointwise
    if type(activation) is GELUActivation and activation.act is nn.functional.gelu:
        return kernel(inputs, layer.weight, layer.bias, "gelu", [], "none")
    outputs = kernel(inputs, layer.weight, layer.bias, "none", [], "")
    return outputs if activation is None else activation(outputs)


def runs_on_onednn(layer: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether `linear` may call the kernel itself: where that is faster, and gives the same answer.

    Gradients, tracing, compiling, counting operations, hooks on the layer or a weight of a different kind all get the
    layer.
    """
    return _is_plain_inference(inputs) and _is_plain_layer(layer)


def _is_plain_inference(inputs: torch.Tensor) -> bool:
    """Whether these inputs are computed eagerly, in float32, without gradients, by oneDNN and MKL."""
    if inputs.device.type != "cpu" or inputs.dtype != torch.float32 or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return False
    return HAS_MKL_AND_ONEDNN and torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")


def _is_plain_layer(layer: nn.Module) -> bool:
    """Whether a layer is its weights and nothing more, and the kernel can read them."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    weight, bias = layer.weight, layer.bias
    return (
        type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and weight.numel() >= MIN_ONEDNN_WEIGHTS
        and (bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()))  # it reads no strides of a bias
    )


def images_in_cache(pixel_values: torch.Tensor, num_patches: int, intermediate_size: int) -> int:
    """Images that a CPU runs through all layers while their activations stay in its cache.

    A large batch streams every activation through memory. In inference the images of a batch are independent, so it
    may be cut; DeiT-S runs 64 images faster in batches of 17. BENCHMARKS.md has what it saves.

    Args:
        pixel_values: (batch_size, num_channels, height, width).
        num_patches: of one image.
        intermediate_size: of the MLP.

    Returns: their number, or the whole batch where cutting does not help: on other devices, with gradients, while
        tracing or compiling.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if pixel_values.device.type != "cpu" or is_traced or torch.is_grad_enabled():
        return pixel_values.shape[0]  # not `len`, which would fix the batch size of an exported model
    image_bytes = num_patches * intermediate_size * pixel_values.element_size()
    return max(1, CACHE_BYTES_PER_THREAD * torch.get_num_threads() // max(image_bytes, 1))


__all__ = ["called", "images_in_cache", "linear", "projection", "runs_on_onednn"]
