"""Who would see a short cut: one question, asked once per forward.

The plain computation is the paper's order, module by module, as in Transformers' ViT. The short cuts give the same
answers: fused linear layers and batches cut into pieces (`cpu_inference`), tokens reorganized before the output
projection, a last layer that computes the prefix tokens only. But whoever hooks, patches, counts, differentiates or
explains modules sees the order in which they are called, and gets the plain computation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode


# What libraries replace that count or rewrite operations by name.
_PLACES: list[tuple[Any, str]] = [
    (nn.functional, name) for name in ("linear", "gelu", "layer_norm", "softmax", "scaled_dot_product_attention")
]
_PLACES.append((nn.Module, "__call__"))
_ORIGINALS = [getattr(owner, name) for owner, name in _PLACES]
# `forward` of each class of modules when it was first seen.
_FORWARDS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary(
    {kind: kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Conv2d)}
)
# Transformers' own hooks, which record `output_hidden_states` and `output_attentions`, stay in a model forever.
_RECORDER = "transformers.utils.output_capturing"
_counts_short_cuts: ContextVar[bool] = ContextVar("counts_short_cuts", default=False)


def plain_road_wanted(
    inner_modules: list[nn.Module], built_of: tuple[type, ...], inputs: torch.Tensor, outer: nn.Module | None = None
) -> bool:
    """Whether somebody could tell a short cut from the plain computation.

    That is whoever has put a hook on a module inside the model (forward, backward, before or after, or on all modules
    of the process), a `forward` of their own, on a module or its class, or a module of a different class (an adapter,
    a quantized layer, a sharded one); counts or rewrites operations (function and dispatch modes, profilers, replaced
    functions of `torch.nn.functional`); differentiates in forward mode or with `torch.func`.

    Compiled and exported graphs are made for speed and keep the short cuts that fit into a graph: hooks in them see
    what the graph computes.

    Args:
        inner_modules: see `modules_below`.
        built_of: their classes when the model was built.
        inputs: the images.
        outer: a module around them, where its hooks would see a short cut too.
    """
    if torch.compiler.is_compiling():
        return False
    if outer is not None and _is_watched(outer):
        return True
    if any(map(_is_watched, inner_modules)) or tuple(map(type, inner_modules)) != built_of:
        return True
    if _forwards_are_replaced(set(built_of)):
        return True
    return operations_are_watched(inputs)


def classes_of(modules: list[nn.Module]) -> tuple[type, ...]:
    """Classes of the modules of a model that is being built; who replaces their `forward` afterwards is noticed."""
    built_of = tuple(map(type, modules))
    _forwards_are_replaced(set(built_of))
    return built_of


def _forwards_are_replaced(kinds: set[Any]) -> bool:
    """Whether a class of modules has a `forward` other than when it was first seen."""
    return any(_FORWARDS.setdefault(kind, kind.forward) is not kind.forward for kind in kinds)


def modules_below(*modules: nn.Module) -> list[nn.Module]:
    """These modules and all modules inside them; an order that depends on the structure only."""
    found, pending = [], list(modules)
    while pending:
        module = pending.pop()
        found.append(module)
        if module._modules:
            pending.extend([child for child in module._modules.values() if child is not None])
    return found


def _is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks or a `forward` that its class does not have."""
    state = module.__dict__  # read directly: this is asked of every module in every forward
    hooks = state["_forward_hooks"]
    return bool(
        state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or (hooks and any(getattr(hook, "__module__", None) != _RECORDER for hook in hooks.values()))
    )


def operations_are_watched(inputs: torch.Tensor) -> bool:
    """Whether somebody in this process or thread follows modules or operations, whichever model they belong to."""
    return not _counts_short_cuts.get() and bool(
        nn_module._global_forward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_backward_pre_hooks
        or nn_module._global_backward_hooks
        or _get_current_dispatch_mode() is not None
        or any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or type(inputs) is not torch.Tensor
        or any(
            getattr(owner, name) is not original for (owner, name), original in zip(_PLACES, _ORIGINALS, strict=True)
        )
    )


@contextmanager
def short_cuts_counted() -> Iterator[None]:
    """Let whoever counts operations in this block see the short cuts: what a forward costs when nobody looks."""
    token = _counts_short_cuts.set(True)
    try:
        yield
    finally:
        _counts_short_cuts.reset(token)


__all__ = ["classes_of", "modules_below", "operations_are_watched", "plain_road_wanted", "short_cuts_counted"]
