"""Linear layers for inference on CPUs, where they are four fifths of a Vision Transformer's time."""

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers.activations import GELUActivation


# Weights of a layer below which calling oneDNN costs more than it saves: 192 x 192 (DeiT-Ti) breaks even.
MIN_ONEDNN_WEIGHTS = 2**16
HAS_MKL_AND_ONEDNN = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def linear(layer: nn.Module, inputs: torch.Tensor, activation: nn.Module | None = None) -> torch.Tensor:
    """`activation(layer(inputs))`, in inference on x86 CPUs with oneDNN's kernel instead of MKL's.

    That kernel, the one of `torch.compile`, spends less on rearranging the weights, which for few tokens is a large
    part of a product's time, and has bias and GELU done before the outputs leave the cache. Equal up to rounding.
    DeiT-S gains 6 to 9 %, see BENCHMARKS.md. `torch.backends.mkldnn.enabled = False` switches it off.

    Args:
        layer: a linear layer, or a module in its place (an adapter, a quantized layer), which is then called.
        inputs: (..., in_features).
        activation: applied to the outputs, None for none.

    Returns: (..., out_features).

    Source: the operator is found in Inductor,
        https://github.com/pytorch/pytorch/blob/v2.7.0/torch/_inductor/fx_passes/mkldnn_fusion.py.
    """
    if runs_on_onednn(layer, inputs):
        kernel = torch.ops.mkldnn._linear_pointwise
        if type(activation) is GELUActivation and activation.act is nn.functional.gelu:
            return kernel(inputs, layer.weight, layer.bias, "gelu", [], "none")
        outputs = kernel(inputs, layer.weight, layer.bias, "none", [], "")
    else:
        outputs = layer(inputs)
    return outputs if activation is None else activation(outputs)


def runs_on_onednn(layer: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether `linear` may call the kernel itself: where that is faster, and nobody could tell the difference.

    Whoever wants gradients, traces, compiles, counts operations, has put hooks on the layer or another kind of
    weight into it gets the layer.
    """
    if inputs.device.type != "cpu" or inputs.dtype != torch.float32 or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return False
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    weight, bias = layer.weight, layer.bias
    return (
        type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and weight.numel() >= MIN_ONEDNN_WEIGHTS
        and (bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()))  # it reads no strides of a bias
        and HAS_MKL_AND_ONEDNN
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


__all__ = ["linear", "runs_on_onednn"]
