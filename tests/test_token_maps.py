"""Maps over the patch grid, for EViT and for families; with pytorch-grad-cam itself."""

import pytest
import torch
from conftest import tiny_config_with
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from vision_families import CASES, HAS_DINOV2, LAYERS, build, inputs

from evit_hf import (
    EViTConfig,
    EViTForImageClassification,
    EViTLVConfig,
    EViTLVForImageClassification,
    EViTModel,
    reorganize,
)
from evit_hf.token_maps import ReshapeTransform, attention_rollout, tokens_on_grid, trace_tokens
from evit_hf.towers import tower_of


PICTURES = [case for case in CASES if case not in ("vivit", "ast")]


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


def tiny_lv():
    torch.manual_seed(0)
    config = EViTLVConfig(
        image_size=32,
        patch_size=8,
        num_hidden_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        stem_hidden_size=8,
        num_labels=5,
        initializer_range=0.2,
        keep_rate=0.6,
    )
    return EViTLVForImageClassification(config).eval()


@torch.no_grad()
def test_several_fused_tokens_are_told_apart_in_families_as_in_evit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 64}
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=64, patch_size=8, initializer_range=0.3)).eval()
    layers = {"keep_rate": 0.8, "reorganization_layers": [0, 1, 2, 3, 4]}
    evit = EViTForImageClassification(EViTConfig.from_config(vit.config, **layers)).eval()
    evit.load_state_dict(vit.state_dict())
    images = torch.rand(8, 3, 64, 64)
    one, other = trace_tokens(evit, images), trace_tokens(reorganize(vit, **layers), images)
    assert (one.output.patch_index < 0).sum(1).max() > 1
    for i in range(5):
        assert torch.equal(one.stages[i].attentive_index, other.stages[i].attentive_index)
        torch.testing.assert_close(one.attention(i), other.attention(i), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.fused_weights(i), other.fused_weights(i), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_image_one_pixel_short_has_the_grid_of_the_stem():
    model, images = tiny_lv(), torch.rand(2, 3, 31, 31)
    trace = trace_tokens(model, images, interpolate_pos_encoding=True)
    assert trace.grid == (4, 4)
    assert trace.kept(0).shape == (2, 4, 4)


def test_tokens_go_back_to_their_places():
    tokens = torch.arange(1.0, 7).view(1, 3, 2).requires_grad_()
    features, mask = tokens_on_grid(tokens, torch.tensor([[5, 0, -1]]), (2, 3), fill=-7.0)
    assert mask.tolist() == [[[True, False, False], [False, False, True]]]
    assert features.tolist() == [[[[3, 4], [-7, -7], [-7, -7]], [[-7, -7], [-7, -7], [1, 2]]]]
    features[0, 1, 2].sum().backward()
    assert tokens.grad.tolist() == [[[1, 1], [0, 0], [0, 0]]]
    fused, _ = tokens_on_grid(tokens, torch.tensor([[5, 0, -1]]), (2, 3), fill=tokens[:, -1:])
    assert fused[0, 0].tolist() == [[3, 4], [5, 6], [5, 6]]
    numbers, _ = tokens_on_grid(torch.tensor([[9, 8, 7]]), torch.tensor([[1, 2, -1]]), (1, 4))
    assert numbers.tolist() == [[[0, 9, 8, 0]]]


@pytest.mark.parametrize(
    ("tokens", "grid", "sentence"),
    [((1, 4, 2), (2, 3), "leave out the prefix"), ((1, 3, 2), (2, 2), "goes up to 5: divide the image's height")],
)
def test_tokens_of_something_else_are_refused(tokens, grid, sentence):
    with pytest.raises(ValueError, match=sentence):
        tokens_on_grid(torch.zeros(tokens), torch.tensor([[5, 0, -1]]), grid)


@torch.no_grad()
def test_every_output_tells_where_its_tokens_are(tiny_model, images):
    torch.manual_seed(0)
    for model in (tiny_model, tiny_lv(), EViTModel(tiny_config_with())):
        output = model(images)
        assert output.patch_index.shape == (3, 6)
        assert torch.equal(output.patch_index[:, :5], output.attentive_index[-1])
        assert (output.patch_index[:, 5] == -1).all()
    assert torch.equal(tiny_model(images)["patch_index"], tiny_model(images).patch_index)


def slow_maps(attention, kept, fuses):
    """Maps of one image, by a loop: attention and kept positions of each stage as lists, kept as patches."""
    made_of = [{patch: 1.0} for patch in range(len(attention[0]))]
    found = []
    for scores, positions in zip(attention, kept, strict=True):
        heat, weights = dict.fromkeys(range(len(attention[0])), 0.0), {}
        for score, parts in zip(scores, made_of, strict=True):
            for patch, weight in parts.items():
                heat[patch] += score * weight / sum(parts.values())
        for i in set(range(len(scores))) - set(positions):
            for patch, weight in made_of[i].items():
                weights[patch] = weights.get(patch, 0.0) + scores[i] * weight
        made_of = [made_of[i] for i in positions] + ([weights] if fuses else [])
        found.append((heat, weights))
    return found


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "dropped"])
@torch.no_grad()
def test_maps_equal_a_loop_and_follow_fused_tokens(fuse, images):
    """With scores from outside the fused token of stage 1 is kept in stage 2 or fused again, image by image."""
    images = torch.cat([images, 2 - images])
    torch.manual_seed(0)
    model = EViTForImageClassification(
        tiny_config_with(inattentive_tokens="fused" if fuse else "dropped", keep_rate=0.5)
    ).eval()
    trace = trace_tokens(model, images)
    assert [stage.layer for stage in trace.stages] == [1, 2, 3]
    assert torch.allclose(trace.output.logits, model(images).logits, atol=1e-6)
    plain = model(images)
    was_fused_again = was_kept = False
    for image in range(6):
        expected = slow_maps(
            [stage.attention[image].tolist() for stage in trace.stages],
            [stage.attentive_index[image].tolist() for stage in trace.stages],
            fuse,
        )
        for i, (heat, weights) in enumerate(expected):
            assert torch.equal(trace.stages[i].kept_patches, plain.attentive_index[i])
            kept = {patch for patch in plain.attentive_index[i][image].tolist() if patch >= 0}
            assert trace.kept(i)[image].flatten().nonzero().flatten().tolist() == sorted(kept)
            assert trace.attention(i)[image].flatten().tolist() == pytest.approx(list(heat.values()), abs=1e-6)
            if not fuse:
                assert trace.fused_weights(i) is None
                continue
            by_patch = [weights.get(patch, 0.0) for patch in range(16)]
            assert trace.fused_weights(i)[image].flatten().tolist() == pytest.approx(by_patch, abs=1e-6)
            has_earlier = bool((trace.stages[i].patch_index[image] < 0).any())
            was_kept |= has_earlier and -1 in plain.attentive_index[i][image].tolist()
            was_fused_again |= has_earlier and -1 not in plain.attentive_index[i][image].tolist()
    assert not fuse or was_fused_again
    if fuse:  # the fused token is kept where its score is raised
        scores = torch.where(torch.arange(16) < 8, 1.0, 0.0).expand(6, -1)
        trace = trace_tokens(model, images, patch_scores=scores)
        assert trace.fused_weights(2).sum() > 0
    assert torch.equal(trace_tokens(model, images, 1.0).attention(0), trace.attention(0))


@torch.no_grad()
def test_a_dense_trace_has_attention_and_keeps_all(tiny_model, images):
    trace = trace_tokens(tiny_model, images, keep_rate=1.0)
    hook = tiny_model.vit.layernorm.register_forward_hook(lambda *_: None)  # the plain road, as the trace takes it
    expected = tiny_model(images, keep_rate=1.0, output_class_attention=True).class_attention
    hook.remove()
    for i, stage in enumerate(trace.stages):
        assert not stage.reorganizes
        assert trace.kept(i).all()
        assert torch.equal(trace.attention(i).flatten(1), expected[:, i])
    assert not any("token_maps" in str(module._forward_hooks) for module in tiny_model.modules())


@pytest.mark.parametrize("case", PICTURES)
@torch.no_grad()
def test_families_are_traced(case):
    model = reorganize(build(case), keep_rate=0.6, reorganization_layers=LAYERS)
    pixel_values = inputs(case)["pixel_values"]
    output = model(pixel_values)
    trace = trace_tokens(model, pixel_values)
    assert trace.grid == (6, 6)
    for i, stage in enumerate(trace.stages):
        assert torch.equal(stage.kept_patches, output.attentive_index[i])
        assert stage.fuses
        assert not (trace.fused_weights(i).bool() & trace.kept(i)).any()
    assert torch.equal(trace.fused_weights(0).bool(), ~trace.kept(0))
    assert torch.equal(trace.stages[-1].patches_left, output.patch_index)
    dense = trace_tokens(model, pixel_values, keep_rate=1.0)
    assert all(dense.kept(i).all() for i in range(3))
    assert torch.allclose(dense.attention(0), trace.attention(0))
    assert (dense.attention(2) > 0).all()


@torch.no_grad()
def test_a_timm_model_is_traced():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, depth=4).eval()
    pixel_values = torch.randn(2, 3, 48, 48)
    with pytest.raises(ValueError, match="gives up no tokens: call `reorganize"):
        trace_tokens(model, pixel_values)
    model = reorganize(model, keep_rate=0.6, reorganization_layers=LAYERS)
    _, attentive_index = model(pixel_values, output_attentive_index=True)
    trace = trace_tokens(model, pixel_values)
    assert all(torch.equal(a.kept_patches, b) for a, b in zip(trace.stages, attentive_index, strict=True))
    with pytest.raises(ValueError, match="gives no attention maps"):
        attention_rollout(model, pixel_values)


def slow_rollout(attentions, stages):
    """Rollout of one image, prefix of one class token, by whole matrices of zeros and weights for the selection."""
    rows = torch.eye(attentions[0].shape[-1], dtype=torch.float64)
    for number, attention in enumerate(attentions):
        mean = attention.double().mean(0)
        rows = (0.5 * mean + 0.5 * torch.eye(len(mean))) @ rows
        for stage in stages:
            if stage.layer != number:
                continue
            positions, scores = stage.attentive_index[0].tolist(), stage.attention[0].double()
            select = torch.zeros(1 + len(positions) + stage.fuses, len(mean), dtype=torch.float64)
            select[0, 0] = 1
            for row, position in enumerate(positions):
                select[1 + row, 1 + position] = 1
            if stage.fuses:
                rest = [i for i in range(len(scores)) if i not in positions]
                for i in rest:
                    select[-1, 1 + i] = scores[i] / scores[rest].sum()
            rows = select @ rows
    return rows[0, 1:]


@pytest.mark.parametrize("keep_rate", [0.5, 1.0])
@torch.no_grad()
def test_rollout_follows_kept_tokens(keep_rate, images):
    torch.manual_seed(0)
    model = EViTForImageClassification._from_config(tiny_config_with(), attn_implementation="eager").eval()
    rollout = attention_rollout(model, images[:1], keep_rate)
    trace = trace_tokens(model, images[:1], keep_rate, output_attentions=True)
    expected = slow_rollout([attention[0] for attention in trace.output.attentions], trace.stages)
    assert rollout.shape == (1, 4, 4)
    assert torch.allclose(rollout.flatten().double(), expected, atol=1e-6)
    family = reorganize(build("dinov2-registers", "eager"), keep_rate=keep_rate, reorganization_layers=LAYERS)
    shares = attention_rollout(family, inputs("dinov2-registers")["pixel_values"]).sum((1, 2))
    assert ((0.1 < shares) & (shares < 1)).all()
    with pytest.raises(ValueError, match="load the model with `attn_implementation='eager'`"):
        attention_rollout(EViTForImageClassification(tiny_config_with()), images)


def gradient_map(model, pixel_values, number):
    """Grad-CAM by hand, from the inputs of a layer's first norm, token by token."""
    seen = []
    norm = tower_of(model).layers[number].layernorm_before
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(pixel_values)
    handle.remove()
    best = output.logits.amax(dim=1).sum()
    (gradient,) = torch.autograd.grad(best, seen[0])
    patches = output.attentive_index[number - 2] if number > 1 else torch.arange(16).expand(len(pixel_values), -1)
    weights = torch.zeros(len(pixel_values), gradient.shape[-1])
    heat = torch.zeros(len(pixel_values), 16)
    for image in range(len(pixel_values)):
        for token, patch in enumerate(patches[image].tolist()):
            if patch >= 0:
                weights[image] += gradient[image, 1 + token] / 16
        for token, patch in enumerate(patches[image].tolist()):
            if patch >= 0:
                heat[image, patch] = (weights[image] * seen[0][image, 1 + token]).sum().relu()
    return heat.detach().view(-1, 4, 4)


@pytest.mark.parametrize("number", [1, 3])
def test_reshape_transform_puts_gradients_where_the_patches_are(number, tiny_model, images):
    expected = gradient_map(tiny_model, images, number)
    transform = ReshapeTransform(tiny_model)
    layer = tower_of(tiny_model).layers[number].layernorm_before
    maps = []
    layer.register_forward_hook(lambda module, args, output: maps.append(transform(output)))
    layer.register_forward_hook(
        lambda module, args, output: output.register_hook(lambda gradient: maps.append(transform(gradient))) and None
    )
    tiny_model(images).logits.amax(dim=1).sum().backward()
    activations, gradients = maps
    assert activations.shape == (3, 32, 4, 4)
    heat = (gradients.mean((2, 3), keepdim=True) * activations).sum(1).relu()
    assert torch.allclose(heat, expected, atol=1e-6)
    with pytest.raises(ValueError, match="which is not what a layer was given in the last forward pass"):
        transform(torch.zeros(3, 4, 32))
    transform.remove()
    layer._forward_hooks.clear()
    with torch.no_grad():
        tiny_model(images[:1])
    assert transform(torch.zeros(3, 17, 32)).shape == (3, 32, 4, 4)  # still that of the last forward it saw


@pytest.mark.slow  # pytorch-grad-cam imports scikit-learn and OpenCV, whose library libGL .ci/run installs
def test_pytorch_grad_cam_draws_kept_patches_in_their_places(images):
    from pytorch_grad_cam import EigenCAM, GradCAM

    torch.manual_seed(0)
    models = [EViTForImageClassification(tiny_config_with()).eval(), tiny_lv()]
    for model in models:
        target = tower_of(model).layers[3].layernorm_before
        with GradCAM(Logits(model), [target], reshape_transform=ReshapeTransform(model)) as cam:
            heat = torch.as_tensor(cam(input_tensor=images, targets=None))
        expected = nn.functional.interpolate(gradient_map(model, images, 3)[:, None], size=(32, 32), mode="bilinear")
        assert heat.shape == (3, 32, 32)
        gone = ~trace_tokens(model, images).kept(1)
        by_patch = heat.unflatten(2, (4, 8)).unflatten(1, (4, 8)).permute(0, 1, 3, 2, 4)[..., 4, 4]
        for image in range(3):  # each map is scaled to [0, 1]
            wanted = expected[image, 0, 4::8, 4::8]
            assert torch.allclose(by_patch[image] / by_patch[image].max(), wanted / wanted.max(), atol=0.01)
        assert by_patch[gone].mean() < 0.5 * by_patch[~gone].mean()
    family = reorganize(build("dinov2"), keep_rate=0.6, reorganization_layers=LAYERS)
    target = tower_of(family).layers[3].get_submodule("norm1" if HAS_DINOV2 else "layernorm_before")
    with EigenCAM(Logits(family), [target], reshape_transform=ReshapeTransform(family)) as cam:
        assert cam(input_tensor=inputs("dinov2")["pixel_values"], targets=None).shape == (2, 48, 48)
