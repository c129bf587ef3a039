"""Whoever looks inside a model sees the modules of a ViT, in the order of the paper, with all tokens and images."""

import pytest
import torch
from conftest import tiny_config_with
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evit_hf import (
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVConfig,
    EViTLVForImageClassification,
    EViTModel,
)
from evit_hf.profiling import count_macs, num_macs


@pytest.fixture(params=["evit", "distilled", "lv"])
def model(request):
    """Its linear layers are large enough for oneDNN's kernel, and half of a batch of 3 is cut on a CPU."""
    torch.manual_seed(0)
    changes = {"hidden_size": 256, "intermediate_size": 512, "keep_rate": 0.6, "reorganization_layers": [1, 2]}
    if request.param == "evit":
        return EViTForImageClassification(tiny_config_with(**changes)).eval()
    if request.param == "distilled":
        return EViTForImageClassificationWithTeacher(tiny_config_with(**changes, use_distillation_token=True)).eval()
    config = EViTLVConfig(
        **changes, image_size=32, patch_size=8, num_hidden_layers=4, num_attention_heads=4, num_labels=5
    )
    return EViTLVForImageClassification(config).eval()


@pytest.fixture
def small_cache(monkeypatch):
    monkeypatch.setattr("evit_hf.cpu_inference.CACHE_BYTES_PER_THREAD", 2 * 16 * 512 * 4)


def tokens_by_module(model):
    """Number of images and tokens that each module below the layers is expected to return, by name."""
    prefix, expected, left = model.config.num_prefix_tokens, {}, 16
    for i in range(4):
        expected[f"{i}.attention"] = expected[f"{i}.attention.o_proj"] = (3, prefix + left)
        if i in (1, 2):
            left = -(-6 * left // 10) + 1
        for name in ("mlp", "mlp.fc1", "mlp.activation_fn", "mlp.fc2", "layernorm_after"):
            expected[f"{i}.{name}"] = (3, prefix + left)
        expected[f"{i}"] = (3, prefix + left)
    return expected


@pytest.mark.parametrize("gradients", [True, False])
def test_hooks_see_every_module_once_with_all_tokens_and_images(gradients, model, images, small_cache):
    with torch.set_grad_enabled(gradients):
        unwatched = model(images)
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            assert name not in seen, f"{name} is called twice"
            output = output[0] if isinstance(output, tuple) else output
            seen[name] = tuple(output.shape[:2])

        return hook

    for name, module in model.vit.layers.named_modules():
        if name and "drop" not in name:  # a layer calls those on both branches
            module.register_forward_hook(note(name))
    with torch.set_grad_enabled(gradients):
        watched = model(images)
    for name, shape in tokens_by_module(model).items():
        assert seen[name] == shape, name
    torch.testing.assert_close(watched.logits, unwatched.logits, rtol=1e-4, atol=1e-4)
    for one, other in zip(watched.attentive_index, unwatched.attentive_index, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["attention", "attention.o_proj", "mlp", "mlp.activation_fn", "layernorm_after"])
def test_what_a_hook_changes_reaches_the_answer(name, model, images):
    with torch.no_grad():
        before = model(images).logits
        module = model.vit.layers[1].get_submodule(name)
        module.register_forward_hook(lambda m, i, o: (o[0] * 2, *o[1:]) if isinstance(o, tuple) else o * 2)
        assert not torch.allclose(model(images).logits, before, atol=1e-4)


def test_steering_the_projection_equals_changing_its_bias(model, images):
    direction, projection = torch.randn(256), model.vit.layers[1].attention.o_proj
    with torch.no_grad():
        handle = projection.register_forward_hook(lambda module, inputs, output: output + direction)
        steered = model(images).logits
        handle.remove()
        projection.bias += direction
        torch.testing.assert_close(model(images).logits, steered, rtol=1e-4, atol=1e-4)


def by_forward_hook(module, call):
    module.register_forward_hook(lambda *_: call())


def by_forward_pre_hook(module, call):
    module.register_forward_pre_hook(lambda *_: call())


def by_patched_forward(module, call):
    forward = module.forward
    module.forward = lambda *arguments, **keywords: (call(), forward(*arguments, **keywords))[1]


@pytest.mark.parametrize("listen", [by_forward_hook, by_forward_pre_hook, by_patched_forward])
@pytest.mark.parametrize("name", ["layers.3.mlp.activation_fn", "layers.0.attention.q_proj", "layers.2", "layernorm"])
def test_each_way_to_listen_is_called_once(name, listen, model, images, small_cache):
    calls = []
    listen(model.vit.get_submodule(name), lambda: calls.append(1) or None)
    with torch.no_grad():
        model(images)
    assert len(calls) == 1


class Adapter(nn.Module):
    """A module around a linear layer, as PEFT makes them."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.seen = layer, []

    def forward(self, inputs):
        self.seen.append(tuple(inputs.shape[:2]))
        return self.layer(inputs)


def test_modules_in_the_place_of_others_see_all_tokens(model, images, small_cache):
    layer = model.vit.layers[3]
    layer.mlp, layer.attention.o_proj = Adapter(layer.mlp), Adapter(layer.attention.o_proj)
    with torch.no_grad():
        model(images)
    assert layer.mlp.seen == layer.attention.o_proj.seen == [tokens_by_module(model)["3"]]


@pytest.mark.parametrize("kind", ["full", "pre", "global"])
def test_backward_hooks_are_called_and_gradients_are_right(kind, model, images):
    labels = torch.tensor([0, 1, 2])
    model(images, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    calls, handles = [], []
    if kind == "global":
        register = torch.nn.modules.module.register_module_full_backward_hook
        handles.append(register(lambda module, *_: calls.append(module) if isinstance(module, nn.Linear) else None))
    for module in model.modules():
        if kind == "full" and isinstance(module, nn.Linear):
            module.register_full_backward_hook(lambda module, *_: calls.append(module))
        elif kind == "pre" and isinstance(module, nn.Linear):
            module.register_full_backward_pre_hook(lambda module, *_: calls.append(module))
    try:
        model(images, labels=labels).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    assert len({id(module) for module in calls}) >= 4 * 6
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() < 1e-4 * largest, name


@pytest.mark.parametrize("name", ["layer", "attention", "mlp", "norm", "function", "call"])
def test_who_patches_a_class_or_a_function_sees_all_tokens_and_images(name, model, images, small_cache, monkeypatch):
    layer, seen = model.vit.layers[3], []
    owner, attribute = {
        "layer": (type(layer), "forward"),
        "attention": (type(layer.attention), "forward"),
        "mlp": (type(layer.mlp), "forward"),
        "norm": (nn.LayerNorm, "forward"),
        "function": (nn.functional, "layer_norm"),
        "call": (nn.Module, "__call__"),
    }[name]
    original = getattr(owner, attribute)

    def noted(*arguments, **keywords):
        output = original(*arguments, **keywords)
        seen.append(output[0] if isinstance(output, tuple) else output)
        return output

    monkeypatch.setattr(owner, attribute, noted)
    with torch.no_grad():
        model(images)
    shapes = [tuple(output.shape[:2]) for output in seen if isinstance(output, torch.Tensor) and output.ndim == 3]
    assert shapes.count(tokens_by_module(model)["3"]) >= (2 if name in ("norm", "function") else 1)
    assert all(num_images == 3 for num_images, _ in shapes)


def test_attention_functions_of_ones_own_see_all_tokens_and_images(model, images, small_cache):
    seen = []

    def noted(module, query, key, value, attention_mask, scaling=None, **kwargs):
        seen.append(tuple(query.shape[::2]))
        return nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None

    with torch.no_grad():
        expected = model(images).logits
        ALL_ATTENTION_FUNCTIONS.register("noted", noted)
        model.set_attn_implementation("noted")
        torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-4)
    assert seen[0] == (3, tokens_by_module(model)["0"][1])
    assert seen[3] == tokens_by_module(model)["3"]
    assert len(seen) == 4


class CountLinears(TorchFunctionMode):
    """Counts `torch.nn.functional.linear`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is nn.functional.linear
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_counters_of_operations_see_all_of_them(images):
    model = EViTForImageClassification(tiny_config_with(hidden_size=256, intermediate_size=512)).eval()
    config, num_linears = model.config, 4 * 6 + 1
    with CountLinears() as linears:
        model(images[:1], keep_rate=1.0)
    assert linears.count == num_linears
    modules = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: modules.append(type(module)))
    model(images[:1], keep_rate=1.0)
    handle.remove()
    assert modules.count(nn.Linear) == num_linears
    with torch.profiler.profile(with_flops=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(images[:1], keep_rate=1.0)
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::linear") == num_linears
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images[:1], keep_rate=1.0)
    assert counter.get_total_flops() // 2 == num_macs(config, 1.0)
    linear, counted = nn.functional.linear, []
    nn.functional.linear = lambda *arguments: (counted.append(1), linear(*arguments))[1]
    try:
        model(images[:1], keep_rate=1.0)
    finally:
        nn.functional.linear = linear
    assert len(counted) == num_linears
    # And nobody listens any more.
    assert count_macs(model, images[:1], keep_rate=1.0) == num_macs(config, 1.0, executed=True) < num_macs(config, 1.0)


def test_recorded_outputs_are_no_listeners_once_they_were_returned(images):
    model = EViTForImageClassification(tiny_config_with(keep_rate=1.0, attn_implementation="sdpa")).eval()
    full = model(images, output_hidden_states=True)
    assert full.hidden_states[-1].shape == (3, 17, 32)
    assert count_macs(model, images[:1]) == num_macs(model.config, executed=True)


@torch.no_grad()
def test_forward_mode_derivatives_without_gradients_are_those_of_the_layers(images):
    size = {"hidden_size": 256, "intermediate_size": 512}
    model = EViTForImageClassification(tiny_config_with(**size, attn_implementation="eager")).eval()
    tangent = torch.randn_like(images)
    _, derivative = torch.func.jvp(lambda x: model(x).logits, (images,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(images, tangent)
        same = torch.autograd.forward_ad.unpack_dual(model(dual).logits).tangent
    torch.testing.assert_close(derivative, same, rtol=1e-4, atol=1e-4)
    with torch.enable_grad():
        leaf = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf).logits[0, 0], leaf)
    torch.testing.assert_close(derivative[0, 0], (gradient * tangent).sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_float64_models_score_in_float64(implementation):
    from evit_hf.token_reorganization import class_token_probabilities

    torch.manual_seed(0)
    query = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    row = class_token_probabilities(query, query, 0.5)
    assert torch.equal(row, (query[:, :, :1] @ query.mT * 0.5).softmax(-1))
    model = EViTModel(tiny_config_with(attn_implementation=implementation), add_pooling_layer=False).double().eval()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert model(images, output_class_attention=True).class_attention.dtype == torch.float64


def test_gradcheck_passes_where_that_of_a_vit_does():
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = tiny_config_with(
        **size,
        image_size=4,
        patch_size=2,
        num_labels=2,
        initializer_range=0.5,
        keep_rate=0.5,
        reorganization_layers=[0],
    )
    model = EViTForImageClassification(config).double().eval()
    images = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model(x).logits, (images,))


@pytest.mark.parametrize("rate", [1.0, 0.6])
def test_monte_carlo_dropout_acts_in_the_layers(rate, images):
    model = EViTForImageClassification(tiny_config_with(hidden_dropout_prob=0.3)).eval()
    with torch.no_grad():
        assert torch.equal(model(images, keep_rate=rate).logits, model(images, keep_rate=rate).logits)
        for layer in model.vit.layers:
            layer.dropout.train()
        samples = torch.stack([model(images, keep_rate=rate).logits for _ in range(4)])
    assert samples.std(0).min() > 0


def test_modules_in_training_mode_see_the_whole_batch(images, small_cache):
    """Batch normalization takes its statistics from the batch, so that it is not cut."""
    size = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = EViTLVForImageClassification(EViTLVConfig(**size, intermediate_size=512, num_labels=5)).eval()
    norm = model.vit.embeddings.patch_embeddings.bn1
    norm.train()
    with torch.no_grad():
        model(torch.cat([images, images]))
    assert norm.num_batches_tracked == 1


def test_a_hooked_dense_model_computes_what_a_vit_computes(images):
    """Module by module, to the last bit."""
    model = EViTForImageClassification(tiny_config_with(keep_rate=1.0)).eval()
    fields = {name: value for name, value in model.config.to_dict().items() if name in ViTConfig().to_dict()}
    vit = ViTForImageClassification(ViTConfig(**{**fields, "model_type": "vit"})).eval()
    vit.load_state_dict(model.state_dict())
    seen = {"evit": [], "vit": []}
    for kind, network in (("evit", model), ("vit", vit)):
        for name, module in network.named_modules():
            if "drop_path" not in name and name.startswith("vit.layer"):

                def note(module, inputs, output, kind=kind, name=name):
                    seen[kind].append((name, output[0] if isinstance(output, tuple) else output))

                module.register_forward_hook(note)
        with torch.no_grad():
            network(images)
    assert [name for name, _ in seen["evit"]] == [name for name, _ in seen["vit"]]
    for (name, ours), (_, theirs) in zip(seen["evit"], seen["vit"], strict=True):
        assert torch.equal(ours, theirs), name
