"""The kernel of linear layers gives the layers' answers, and steps aside where someone would notice."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from conftest import tiny_config_with
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from evit_hf import EViTForImageClassification
from evit_hf.cpu_inference import HAS_MKL_AND_ONEDNN, MIN_ONEDNN_WEIGHTS, linear, runs_on_onednn


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(256, 320)


@pytest.fixture
def inputs():
    return torch.randn(2, 7, 256, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def kernel_calls(monkeypatch):
    """Activation of each call of the kernel, which still does its work."""
    kernel, calls = torch.ops.mkldnn._linear_pointwise, []

    def counted(*arguments):
        calls.append(arguments[3])
        return kernel(*arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls


@pytest.fixture
def model():
    """Its linear layers are just large enough for the kernel, all but the classifier."""
    torch.manual_seed(0)
    return EViTForImageClassification(tiny_config_with(hidden_size=256, intermediate_size=512)).eval()


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new", "gelu_python", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_kernel_gives_the_layers_outputs(activation, bias, inputs, kernel_calls):
    layer = nn.Linear(256, 320, bias=bias)
    activation = activation and ACT2FN[activation]
    with torch.no_grad():
        expected = layer(inputs) if activation is None else activation(layer(inputs))
        outputs = linear(layer, inputs, activation)
    torch.testing.assert_close(outputs, expected)
    fused = activation is not None and getattr(activation, "act", None) is nn.functional.gelu
    assert kernel_calls == ["gelu" if fused else "none"] * HAS_MKL_AND_ONEDNN


def test_one_token_of_longer_sequences_is_a_view_that_the_kernel_reads_right(layer, inputs, kernel_calls):
    with torch.no_grad():
        torch.testing.assert_close(linear(layer, inputs[:, :1]), layer(inputs[:, :1]))
    assert len(kernel_calls) == HAS_MKL_AND_ONEDNN


def test_the_kernel_follows_weights_that_change(layer, inputs):
    with torch.no_grad():
        linear(layer, inputs)
        layer.weight.data.mul_(2)
        torch.testing.assert_close(linear(layer, inputs), layer(inputs))


@torch.no_grad()
def test_weights_may_be_views_and_inputs_of_any_layout(layer, inputs, kernel_calls):
    """As they are when q, k and v of other code bases are taken apart."""
    layer.weight = nn.Parameter(torch.randn(256, 960).t()[320:640])
    layer.bias = nn.Parameter(torch.randn(960)[320:640])
    odd = [inputs, inputs.transpose(0, 1), inputs[:, ::2], inputs[0, 0], inputs[:0], inputs.mT.contiguous().mT]
    for some in odd:
        torch.testing.assert_close(linear(layer, some), layer(some), rtol=1e-4, atol=1e-4)
    assert len(kernel_calls) == len(odd) * HAS_MKL_AND_ONEDNN


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.weight = layer, layer.weight

    def forward(self, inputs):
        return self.base_layer(inputs) + 1


class OtherWeight(torch.Tensor):
    """In place of quantized and distributed weights, which are tensors of a different class."""


def small(layer):
    return nn.Linear(256, MIN_ONEDNN_WEIGHTS // 256 - 1)


def wrapped(layer):
    return Wrapped(layer)


def hooked(layer):
    layer.register_forward_hook(lambda module, arguments, output: output + 1)
    return layer


def hooked_before(layer):
    layer.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,))
    return layer


def patched(layer):
    layer.forward = lambda inputs: nn.Linear.forward(layer, inputs) + 1
    return layer


def parametrized(layer):
    return nn.utils.parametrizations.weight_norm(layer)


def with_another_weight(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(OtherWeight))
    return layer


def with_every_second_bias(layer):
    layer.bias = nn.Parameter(torch.randn(2 * layer.out_features)[::2])
    return layer


@pytest.mark.parametrize(
    "change",
    [small, with_every_second_bias, wrapped, hooked, hooked_before, patched, parametrized, with_another_weight],
)
def test_layers_that_are_more_than_their_weights_are_called(change, layer, inputs, kernel_calls):
    changed = change(layer)
    with torch.no_grad():
        assert torch.equal(linear(changed, inputs), changed(inputs))
    assert kernel_calls == []


def test_gradients_flow(layer, inputs, kernel_calls):
    linear(layer, inputs, ACT2FN["gelu"]).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert kernel_calls == []


@torch.no_grad()
def test_who_listens_or_wants_another_precision_gets_the_layer(layer, inputs, kernel_calls):
    assert runs_on_onednn(layer, inputs) == HAS_MKL_AND_ONEDNN
    assert not runs_on_onednn(copy.deepcopy(layer).double(), inputs.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(layer, inputs).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        linear(layer, inputs)
    assert counter.get_total_flops() == 2 * inputs.numel() * layer.out_features
    assert "aten::linear" in str(torch.jit.trace(Called(layer), inputs, check_trace=False).inlined_graph)
    torch.compile(Called(layer), backend=graph_of_one_linear, fullgraph=True)(inputs)
    exported = torch.export.export(Called(layer), (inputs,))
    assert [node.name for node in exported.graph.nodes if node.op == "call_function"] == ["linear"]
    torch.backends.mkldnn.enabled = False
    try:
        linear(layer, inputs)
    finally:
        torch.backends.mkldnn.enabled = True
    assert kernel_calls == []


class Called(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        return linear(self.layer, inputs)


def graph_of_one_linear(graph, inputs):
    """A compiler for `torch.compile` that wants to see the layer."""
    assert "torch._C._nn.linear" in graph.code
    return graph


# In a model


@pytest.mark.parametrize("keep_rate", [1.0, 0.6])
def test_a_model_answers_alike_with_and_without_the_kernel(keep_rate, model, images, kernel_calls):
    expected = model(images, keep_rate=keep_rate)
    assert kernel_calls == []
    with torch.no_grad():
        outputs = model(images, keep_rate=keep_rate)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for index, expected_index in zip(outputs.attentive_index, expected.attentive_index, strict=True):
        assert torch.equal(index, expected_index)
    one_layer = ["none"] * 4 + ["gelu", "none"]
    assert kernel_calls == one_layer * model.config.num_hidden_layers * HAS_MKL_AND_ONEDNN


def test_counted_operations_of_a_model_do_not_depend_on_gradients(model, images):
    counts = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            model(images[:1])
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("keep_rate", [1.0, 0.6])
def test_a_model_whose_weights_are_offloaded_answers_alike(keep_rate, model, images):
    """Accelerate brings weights in only for a layer's call: whoever reads them otherwise finds the meta device."""
    with torch.no_grad():
        expected = model(images, keep_rate=keep_rate).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.vit.layers[1].attention.o_proj.weight.device.type == "meta"
        torch.testing.assert_close(model(images, keep_rate=keep_rate).logits, expected, rtol=1e-4, atol=1e-4)
