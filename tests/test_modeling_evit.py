import copy
import json

import numpy as np
import pytest
import torch
from conftest import tiny_config_with
from golden import official_cases, official_names, official_state_dict, official_tensors
from reference import reorganize_slowly
from transformers import (
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
)

from evit_hf import (
    EViTConfig,
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVConfig,
    EViTLVForImageClassification,
    EViTModel,
    short_cuts,
)
from evit_hf.modeling_evit import EViTDropPath, EViTEmbeddings, EViTMLP


def official_model(case, attention_implementation):
    config = EViTConfig(
        image_size=64,
        patch_size=8,
        hidden_size=48,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=192,
        num_labels=10,
        layer_norm_eps=1e-6,
        keep_rate=case["keep"],
        inattentive_tokens="fused" if case["fuse"] else "dropped",
        attn_implementation=attention_implementation,
    )
    model = EViTForImageClassification(config).eval()
    model.load_state_dict(official_state_dict())
    return model


def relative_difference(ours, official):
    return ((ours - official).abs().max() / official.abs().max()).item()


def plain_vit_like(model):
    """A transformers ViT with the weights of an EViT."""
    fields = {name: value for name, value in model.config.to_dict().items() if name in ViTConfig().to_dict()}
    vit = ViTForImageClassification(ViTConfig(**{**fields, "model_type": "vit"})).eval()
    vit.load_state_dict(model.state_dict())
    return vit


# Against the official implementation


@pytest.mark.parametrize("attention_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", official_cases())
def test_outputs_indices_and_gradients_are_the_official_ones(name, attention_implementation):
    case, golden = official_cases()[name], official_tensors()
    model = official_model(case, attention_implementation)
    pixel_values = golden[f"{name}.pixel_values"].clone().requires_grad_()
    outputs = model(
        pixel_values,
        keep_rate=case.get("runtime_keep"),
        interpolate_pos_encoding="side" in case,
        output_hidden_states=True,
    )
    assert relative_difference(outputs.logits, golden[f"{name}.logits"]) < 1e-4
    class_feature = model.vit.layernorm(outputs.hidden_states[-1])[:, 0]
    assert relative_difference(class_feature, golden[f"{name}.cls_feature"]) < 1e-4

    num_tokens_left = [hidden_states.shape[1] - 1 for hidden_states in outputs.hidden_states[1:]]
    assert num_tokens_left == golden[f"{name}.left_tokens"].tolist()

    # The official indices count each stage's input; ours are followed back to the patch grid.
    patch_index = torch.arange(outputs.hidden_states[0].shape[1] - 1).expand(2, -1)
    for stage, attentive_index in enumerate(outputs.attentive_index):
        if f"{name}.topk_index.{stage}" not in golden:
            assert case["keep"] == 1.0
            continue
        patch_index = patch_index.gather(1, golden[f"{name}.topk_index.{stage}"])
        assert torch.equal(attentive_index, patch_index)
        if case["fuse"]:
            patch_index = torch.cat((patch_index, torch.full((2, 1), -1)), dim=1)

    logits = outputs.logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    ours = dict(model.named_parameters())
    for key in golden:
        if not key.startswith(f"{name}.grad."):
            continue
        official_name = key.removeprefix(f"{name}.grad.")
        if official_name == "pixel_values":
            gradient = pixel_values.grad
        elif ".qkv." in official_name:
            layer, kind = official_name.split(".")[1], official_name.split(".")[-1]
            thirds = [ours[f"vit.layers.{layer}.attention.{letter}_proj.{kind}"].grad for letter in "qkv"]
            gradient = torch.cat(thirds)
        else:
            our_name = next(name for name, official in official_names().items() if official == official_name)
            gradient = ours[our_name].grad
        assert relative_difference(gradient, golden[key]) < 1e-4, key


# Against a plain ViT


@pytest.mark.parametrize("attention_implementation", ["eager", "sdpa"])
def test_keep_rate_one_equals_plain_vit(attention_implementation, images):
    model = EViTForImageClassification(
        tiny_config_with(keep_rate=1.0, attn_implementation=attention_implementation)
    ).eval()
    vit = plain_vit_like(model)
    vit.set_attn_implementation(attention_implementation)
    # To the last bit where the last layer computes all tokens, as ViT does; only the class token is rounded otherwise.
    assert torch.equal(model(images, output_hidden_states=True).logits, vit(images).logits)
    torch.testing.assert_close(model(images).logits, vit(images).logits, rtol=1e-5, atol=1e-5)
    reorganized = EViTForImageClassification(
        tiny_config_with(keep_rate=0.5, attn_implementation=attention_implementation)
    ).eval()
    reorganized.load_state_dict(model.state_dict())
    assert torch.equal(reorganized(images, keep_rate=1.0, output_hidden_states=True).logits, vit(images).logits)
    assert not torch.allclose(reorganized(images).logits, vit(images).logits, atol=1e-3)


def test_evit_has_the_parameters_of_a_vit(tiny_model):
    assert set(tiny_model.state_dict()) == set(plain_vit_like(tiny_model).state_dict())


def test_same_seed_gives_a_vits_initial_weights(tiny_config):
    torch.manual_seed(5)
    evit = EViTForImageClassification(tiny_config)
    fields = {name: value for name, value in tiny_config.to_dict().items() if name in ViTConfig().to_dict()}
    torch.manual_seed(5)
    vit = ViTForImageClassification(ViTConfig(**{**fields, "model_type": "vit"}))
    for name, parameter in vit.named_parameters():
        assert torch.equal(evit.get_parameter(name), parameter), name


# The reorganization inside the model


def test_each_layer_does_what_the_loop_over_tokens_does(images):
    model = EViTForImageClassification(tiny_config_with(attn_implementation="eager")).eval()
    outputs = model(images, output_hidden_states=True, output_attentions=True)
    for i, layer in enumerate(model.vit.layers):
        before = outputs.hidden_states[i]
        attended = before + layer.attention(layer.layernorm_before(before))[0]
        if i in model.config.reorganization_layers:
            attention = outputs.attentions[i][:, :, 0, 1:].mean(1)
            attended, _ = reorganize_slowly(attended, attention, 0.6)
        expected = attended + layer.mlp(layer.layernorm_after(attended))
        torch.testing.assert_close(outputs.hidden_states[i + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuse", [True, False])
def test_eager_and_sdpa_agree(fuse, images):
    model = EViTForImageClassification(tiny_config_with(inattentive_tokens="fused" if fuse else "dropped")).eval()
    model.set_attn_implementation("eager")
    eager = model(images)
    model.set_attn_implementation("sdpa")
    sdpa = model(images)
    torch.testing.assert_close(eager.logits, sdpa.logits, rtol=1e-4, atol=1e-5)
    for one, other in zip(eager.attentive_index, sdpa.attentive_index, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("implementation", "num_rows"), [("eager", 0), ("sdpa", 3)])
def test_the_row_is_computed_only_where_no_map_exists(implementation, num_rows, images, monkeypatch):
    from evit_hf import modeling_evit

    calls = []
    original = modeling_evit.class_token_probabilities
    monkeypatch.setattr(
        modeling_evit, "class_token_probabilities", lambda *args: calls.append(args[0].shape) or original(*args)
    )
    model = EViTForImageClassification(tiny_config_with(attn_implementation=implementation)).eval()
    model(images)
    assert len(calls) == num_rows
    model(images, keep_rate=1.0)
    assert len(calls) == num_rows  # a plain ViT layer needs no scores


def test_sdpa_never_materializes_a_map(images):
    """No tensor with two token dimensions is made, in a model whose other sizes differ from its token counts."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2:
                    self.seen.add(tuple(tensor.shape[-2:]))
            return output

    maps = {"eager": 0, "sdpa": 0}
    for implementation in maps:
        model = EViTForImageClassification(tiny_config_with(attn_implementation=implementation)).eval()
        with torch.no_grad(), Shapes() as shapes:
            model(images)
        maps[implementation] = sum(rows == columns and rows in (17, 12, 9) for rows, columns in shapes.seen)
    assert maps["eager"] > 0
    assert maps["sdpa"] == 0


def test_attention_dropout_does_not_choose_the_tokens(images):
    config = tiny_config_with(attention_probs_dropout_prob=0.5, attn_implementation="eager", keep_rate=[0.6, 1.0, 1.0])
    model = EViTForImageClassification(config)
    model.train()
    first_choices = {tuple(model(images).attentive_index[0].flatten().tolist()) for _ in range(4)}
    model.eval()
    # Dropout acted in the layer before; with none there, the choice must be that of evaluation.
    model.config.reorganization_layers = [0, 1, 2]
    choices = [model(images).attentive_index[0]]
    model.train()
    choices += [model(images).attentive_index[0] for _ in range(4)]
    assert len(first_choices) > 1
    assert all(torch.equal(choice, choices[0]) for choice in choices)


# What the outputs hold


def test_attentive_index_names_patches_of_the_original_grid(images):
    model = EViTForImageClassification(tiny_config_with()).eval()
    outputs = model(images)
    assert [tuple(index.shape) for index in outputs.attentive_index] == [(3, 10), (3, 7), (3, 5)]
    kept_before = [set(range(16))] * 3
    for index in outputs.attentive_index:
        kept = [set(row.tolist()) - {-1} for row in index]
        assert all(now <= before for now, before in zip(kept, kept_before, strict=True))
        for row in index:
            patches = row[row >= 0]  # several fused tokens may be kept
            assert len(patches.unique()) == len(patches)
        kept_before = kept


def test_attentive_index_moves_with_the_patches():
    """Images whose content sits in one patch: kept tokens are reported where the content is."""
    torch.manual_seed(0)
    model = EViTForImageClassification(tiny_config_with(keep_rate=0.01, inattentive_tokens="dropped")).eval()
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.zero_()  # only the content tells the patches apart
    image = torch.randn(1, 3, 32, 32)
    rolled = image.roll(shifts=(8, 16), dims=(2, 3))  # one patch down, two to the right
    here = model(image).attentive_index[0].item()
    there = model(rolled).attentive_index[0].item()
    row, column = divmod(here, 4)
    assert there == (row + 1) % 4 * 4 + (column + 2) % 4


def test_layers_that_keep_all_tokens_list_all_of_them(tiny_model, images):
    outputs = tiny_model(images, keep_rate=[1.0, 0.5, 1.0])
    assert [index.shape[1] for index in outputs.attentive_index] == [16, 8, 9]
    assert outputs.attentive_index[0][0].tolist() == list(range(16))
    assert (outputs.attentive_index[2] == -1).sum(1).tolist() == [1, 1, 1]


def test_hidden_states_and_attentions_follow_the_token_counts(images):
    model = EViTForImageClassification(tiny_config_with(attn_implementation="eager")).eval()
    outputs = model(images, output_hidden_states=True, output_attentions=True)
    assert [x.shape[1] for x in outputs.hidden_states] == [17, 17, 12, 9, 7]
    assert [x.shape[2:] for x in outputs.attentions] == [(17, 17), (17, 17), (12, 12), (9, 9)]


def test_return_dict_false_gives_a_tuple(tiny_model, images):
    logits, attentive_index, patch_index = tiny_model(images, return_dict=False)
    assert logits.shape == (3, 5)
    assert len(attentive_index) == 3
    assert patch_index.shape == (3, 6)


def test_labels_give_the_cross_entropy(tiny_model, images):
    labels = torch.tensor([0, 3, 4])
    outputs = tiny_model(images, labels=labels)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))


def test_model_without_head_pools_the_class_token(tiny_config, images):
    model = EViTModel(tiny_config).eval()
    outputs = model(images)
    assert outputs.last_hidden_state.shape == (3, 7, 32)
    torch.testing.assert_close(outputs.pooler_output, model.pooler(outputs.last_hidden_state))
    assert EViTModel(tiny_config, add_pooling_layer=False)(images).pooler_output is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fuse", [True, False])
def test_class_attention_is_that_of_the_map_by_patch(fuse, implementation, images):
    config = tiny_config_with(inattentive_tokens="fused" if fuse else "dropped", attn_implementation="eager")
    model = EViTForImageClassification(config).eval()
    maps = model(images, output_attentions=True)
    model.set_attn_implementation(implementation)
    outputs = model(images, output_class_attention=True)
    assert torch.equal(outputs.logits, model(images).logits)
    assert outputs.class_attention.shape == (3, 3, 16)
    torch.testing.assert_close(outputs.class_attention[:, 0], maps.attentions[1][:, :, 0, 1:].mean(1))
    for image, kept in enumerate(maps.attentive_index[0]):  # what layer 2 sees, with the fused token last
        expected = torch.zeros(16)
        expected[kept] = maps.attentions[2][image, :, 0, 1:11].mean(0)
        torch.testing.assert_close(outputs.class_attention[image, 1], expected)


def test_class_attention_of_any_layer_of_the_dense_model(images):
    model = EViTForImageClassification(tiny_config_with(attn_implementation="eager", keep_rate=1.0)).eval()
    maps = model(images, output_attentions=True).attentions
    with torch.no_grad():
        attention = model(images, output_class_attention=[3, 0, 3]).class_attention
    for i, layer in enumerate([3, 0, 3]):
        torch.testing.assert_close(attention[:, i], maps[layer][:, :, 0, 1:].mean(1))
    assert model(images).class_attention is None
    for bad in ([4], [-1], 2, ["0"]):
        with pytest.raises(ValueError, match=r"`output_class_attention` must be .* a list of layers in \[0, 3\], got"):
            model(images, output_class_attention=bad)


# Keep rates


def test_keep_rate_of_a_call_and_of_the_model(tiny_model, images):
    half = tiny_model(images, keep_rate=0.5).logits
    assert not torch.equal(half, tiny_model(images).logits)
    tiny_model.set_keep_rate(0.5)
    assert torch.equal(tiny_model(images).logits, half)
    tiny_model.set_keep_rate((0.5, 0.5, 0.5))
    assert tiny_model.config.keep_rate == [0.5, 0.5, 0.5]
    assert torch.equal(tiny_model(images).logits, half)


def test_training_keep_rate_acts_in_training_alone(tiny_model, images):
    tiny_model.vit.training_keep_rate = 1.0
    assert tiny_model(images).attentive_index[0].shape[1] == 10
    assert tiny_model.train()(images).attentive_index[0].shape[1] == 16
    assert tiny_model(images, keep_rate=0.5).attentive_index[0].shape[1] == 8


def test_bad_keep_rates_are_refused(tiny_model, images):
    with pytest.raises(ValueError, match=r"`keep_rate` must be in \(0, 1\].*got 0"):
        tiny_model(images, keep_rate=0)
    with pytest.raises(ValueError, match="has 2 entries"):
        tiny_model(images, keep_rate=[0.5, 0.5])
    with pytest.raises(ValueError, match="got 1.5"):
        tiny_model.set_keep_rate(1.5)
    assert tiny_model.config.keep_rate == 0.6
    with pytest.raises(TypeError, match="`keep_rat` is not a keyword of EViT: did you mean `keep_rate`"):
        tiny_model(images, keep_rat=0.5)


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, np.array])
def test_numbers_of_numpy_and_tensors_are_numbers(kind, tiny_model, images):
    expected = tiny_model(images, keep_rate=0.5).logits
    assert torch.equal(tiny_model(images, keep_rate=kind(0.5)).logits, expected)
    assert torch.equal(tiny_model(images, keep_rate=[kind(0.5)] * 3).logits, expected)
    tiny_model.set_keep_rate(kind(0.5))
    assert type(tiny_model.config.keep_rate) is float
    assert torch.equal(tiny_model(images).logits, expected)
    config = tiny_config_with(keep_rate=kind(0.5), drop_path_rate=kind(0.25), reorganization_layers=np.array([1, 2]))
    assert json.loads(config.to_json_string())["reorganization_layers"] == [1, 2]
    assert tiny_config_with(image_size=np.int64(48), hidden_size=np.int32(64)).patch_grid() == (6, 6)
    tiny_model.set_image_size(np.int64(48))
    tiny_model.set_image_size(torch.tensor(40))
    assert tiny_model.config.image_size == 40


@pytest.mark.parametrize("bad", [0.0, "0.5", 1.5, float("nan"), None, [0.5, 0.5], [0.5, None, 0.5]])
def test_a_bad_keep_rate_that_reached_the_configuration_is_refused_by_the_forward(bad, tiny_model, images):
    """By a different thread, or by code that writes into the object's dictionary."""
    tiny_model.config.__dict__["keep_rate"] = bad
    with pytest.raises(ValueError, match="`keep_rate` (must be in|has 2 entries)"):
        tiny_model(images)
    tiny_model.vit.training_keep_rate = bad
    if bad is not None:
        with pytest.raises(ValueError, match="`keep_rate` (must be in|has 2 entries)"):
            tiny_model.train()(images)


def test_an_empty_batch_is_refused(tiny_model, images):
    for network in (tiny_model, tiny_model.vit):
        with pytest.raises(ValueError, match="`pixel_values` holds no images, got a batch of 0: leave out the call"):
            network(images[:0])


# One model's settings are its own


def test_models_of_one_configuration_do_not_change_each_other(tiny_config, images, tmp_path):
    student, teacher = (EViTForImageClassification(tiny_config).eval() for _ in range(2))
    teacher.set_keep_rate(1.0)
    teacher.set_image_size(64)
    teacher.set_attn_implementation("eager")
    teacher.config.reorganization_layers = [1]
    assert (student.config.keep_rate, student.config.image_size) == (0.6, 32)
    assert student.config.reorganization_layers == tiny_config.reorganization_layers == [1, 2, 3]
    assert student.config._attn_implementation == "sdpa"
    assert tiny_config.keep_rate == 0.6
    for name, model in (("student", student), ("teacher", teacher)):
        assert all(part.config is model.config for part in model.modules() if hasattr(part, "config"))
        model.save_pretrained(tmp_path / name)
        again = EViTForImageClassification.from_pretrained(tmp_path / name, attn_implementation="sdpa")
        assert again.config.image_size == model.config.image_size
    assert teacher(torch.randn(1, 3, 64, 64)).attentive_index[0].shape == (1, 64)
    copied = copy.deepcopy(student)
    copied.set_keep_rate(0.1)
    assert student(images).attentive_index[0].shape == (3, 10)


def test_frozen_positions_stay_frozen_at_a_new_size(tiny_model):
    tiny_model.requires_grad_(False).set_image_size(48)
    assert not any(parameter.requires_grad for parameter in tiny_model.parameters())
    tiny_model.requires_grad_(True).set_image_size(40)
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())


@pytest.mark.parametrize("bad", [7, (48, 7), 0, -8, True, 48.5, "48", None, (48,), (48, 48, 48)])
def test_impossible_image_sizes_are_refused_and_leave_no_trace(bad, tiny_model, images):
    before = tiny_model.config.to_dict()
    with pytest.raises(ValueError, match="`image_size`"):
        tiny_model.set_image_size(bad)
    assert tiny_model.config.to_dict() == before
    tiny_model(images)


# The choice from outside


def test_patch_scores_choose_the_patches(tiny_model, images):
    scores = torch.rand(3, 16)
    outputs = tiny_model(images, patch_scores=scores)
    order = scores.argsort(dim=1, descending=True)
    for index, count in zip(outputs.attentive_index, (10, 7, 5), strict=True):
        assert torch.equal(index, order[:, :count])


def test_own_attention_as_patch_scores_changes_nothing_at_the_first_layer(images):
    model = EViTForImageClassification(tiny_config_with(attn_implementation="eager", keep_rate=[0.6, 1.0, 1.0])).eval()
    outputs = model(images, output_attentions=True)
    scores = outputs.attentions[1][:, :, 0, 1:].mean(1)
    again = model(images, patch_scores=scores, output_attentions=True)
    assert torch.equal(again.logits, outputs.logits)
    scores = [scores, torch.rand(3, 16), torch.rand(3, 16)]
    per_layer = model(images, patch_scores=scores, output_attentions=True)
    assert torch.equal(per_layer.logits, outputs.logits)


def test_bad_patch_scores_are_refused(tiny_model, images):
    with pytest.raises(
        ValueError, match=r"`patch_scores` must be .* = \(3, 16\), got \(3, 17\): .*none for the class"
    ):
        tiny_model(images, patch_scores=torch.rand(3, 17))
    with pytest.raises(ValueError, match="has 2 tensors but there are 3 reorganization layers"):
        tiny_model(images, patch_scores=[torch.rand(3, 16)] * 2)


# Masks


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fuse", [True, False])
def test_masked_patches_cannot_be_seen(implementation, fuse, images):
    config = tiny_config_with(attn_implementation=implementation, inattentive_tokens="fused" if fuse else "dropped")
    model = EViTForImageClassification(config).eval()
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[:, 1:5] = 0  # the first row of patches
    changed = images.clone()
    changed[:, :, :8] = 100.0
    assert not torch.allclose(model(images).logits, model(changed).logits, atol=1e-3)
    masked = model(images, attention_mask=mask)
    torch.testing.assert_close(masked.logits, model(changed, attention_mask=mask).logits)
    assert not (torch.stack([masked.attentive_index[0]]) < 4).logical_and(masked.attentive_index[0] >= 0).any()
    everything = torch.ones(3, 17, dtype=torch.long)
    torch.testing.assert_close(model(images, attention_mask=everything).logits, model(images).logits)


def test_masks_that_cannot_follow_the_tokens_are_refused(tiny_model, images):
    with pytest.raises(ValueError, match=r"`attention_mask` must be .* = \(3, 17\), got \(3, 1, 17, 17\)"):
        tiny_model(images, attention_mask=torch.ones(3, 1, 17, 17))


# Image sizes


@pytest.mark.parametrize("size", [(48, 48), (40, 64), (35, 50), (8, 8)])
def test_interpolated_positions_equal_a_plain_vit(size, tiny_model):
    images = torch.randn(2, 3, *size)
    vit = plain_vit_like(tiny_model)
    ours = tiny_model(images, keep_rate=1.0, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(ours, vit(images, interpolate_pos_encoding=True).logits)
    num_patches = (size[0] // 8) * (size[1] // 8)
    outputs = tiny_model(images, interpolate_pos_encoding=True)
    assert outputs.attentive_index[0].shape[1] == -(-6 * num_patches // 10)
    assert outputs.attentive_index[0].max() < num_patches


def test_non_square_models_and_images_not_divisible_by_the_patch_size():
    model = EViTForImageClassification(tiny_config_with(image_size=(36, 52))).eval()
    vit = plain_vit_like(model)
    images = torch.randn(2, 3, 36, 52)
    assert torch.equal(model(images, keep_rate=1.0, output_hidden_states=True).logits, vit(images).logits)
    torch.testing.assert_close(model(images, interpolate_pos_encoding=True).logits, model(images).logits)
    assert model(torch.randn(2, 3, 64, 40), interpolate_pos_encoding=True).attentive_index[0].shape[1] == 24


def test_wrong_images_are_refused_with_the_way_out(tiny_model):
    with pytest.raises(ValueError, match="is 48x32 but this model expects 32x32: resize, or pass `interpolate_pos"):
        tiny_model(torch.randn(1, 3, 48, 32))
    with pytest.raises(ValueError, match="Expected 3 but got 1"):
        tiny_model(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match="`pixel_values` is missing"):
        tiny_model()
    with pytest.raises(ValueError, match="`bool_masked_pos` is for masked image modeling"):
        tiny_model(torch.randn(1, 3, 32, 32), bool_masked_pos=torch.ones(1, 16))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_images_of_a_batch_do_not_see_each_other(batch_size, tiny_model):
    images = torch.randn(batch_size, 3, 32, 32)
    together = tiny_model(images).logits
    alone = torch.cat([tiny_model(image[None]).logits for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# Precision, memory, compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_runs_and_stays_close(dtype, tiny_model, images):
    expected = tiny_model(images).logits
    low = copy.deepcopy(tiny_model).to(dtype)(images)
    assert low.logits.dtype == dtype
    # A flipped choice among nearly equal scores is allowed for; a different function is not.
    assert (low.logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_autocast_gives_finite_gradients_in_training(tiny_model, images):
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiny_model.train()(images, labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in tiny_model.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, images):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = EViTForImageClassification(tiny_config_with(drop_path_rate=0.3, hidden_dropout_prob=0.1)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        model(images.clone().requires_grad_(), labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.slow  # traces each layer, for each keep rate and batch size
def test_compiles_into_one_graph(tiny_model, images):
    compiled = torch.compile(tiny_model, fullgraph=True, backend="aot_eager")
    for keep_rate in (None, 0.5):
        for batch in (images, images[:1]):
            torch.testing.assert_close(
                compiled(batch, keep_rate=keep_rate).logits, tiny_model(batch, keep_rate=keep_rate).logits
            )


@pytest.mark.slow
def test_compiles_with_inductor(tiny_model, images):
    compiled = torch.compile(tiny_model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, tiny_model(images).logits, rtol=1e-4, atol=1e-5)
    # Or Transformers sets it in the first forward pass, which PyTorch 2.7 cannot compile in a ViT either.
    tiny_model.config.problem_type = "single_label_classification"
    loss = torch.compile(tiny_model.train(), fullgraph=True)(images, labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in tiny_model.parameters())


@pytest.mark.slow  # compiles a kernel for each length
@pytest.mark.parametrize("implementation", ["flex_attention"])
def test_other_attention_backends_choose_the_same_tokens(implementation, images):
    # Flex attention wants head dimensions of at least 16.
    model = EViTForImageClassification(tiny_config_with(hidden_size=64, intermediate_size=64)).eval()
    expected = model(images)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        outputs = model(images)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-3, atol=1e-3)
    for one, other in zip(outputs.attentive_index, expected.attentive_index, strict=True):
        assert torch.equal(one, other)


# Only work that is used


@pytest.mark.parametrize("attention_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", official_cases())
def test_logits_and_gradients_without_hidden_states_are_the_official_ones(name, attention_implementation):
    """The last layer then computes only the class token."""
    case, golden = official_cases()[name], official_tensors()
    model = official_model(case, attention_implementation)
    pixel_values = golden[f"{name}.pixel_values"].clone()
    keywords = {"keep_rate": case.get("runtime_keep"), "interpolate_pos_encoding": "side" in case}
    outputs = model(pixel_values, **keywords)
    assert relative_difference(outputs.logits, golden[f"{name}.logits"]) < 1e-4
    gradients = {}
    for hidden in (False, True):
        model.zero_grad()
        logits = model(pixel_values, **keywords, output_hidden_states=hidden).logits
        (logits * torch.linspace(-1, 1, logits.shape[1])).sum().backward()
        gradients[hidden] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients[True].values())
    for parameter, gradient in gradients[True].items():
        assert (gradients[False][parameter] - gradient).abs().max() < 1e-5 * largest, parameter


def called_with(monkeypatch, module_class, note):
    """What `note` says about each forward and its first argument; patched in the class, and models do not notice."""
    notes, forward = [], module_class.forward

    def noting(module, *arguments, **keywords):
        notes.append(note(module, arguments[0]))
        return forward(module, *arguments, **keywords)

    monkeypatch.setattr(module_class, "forward", noting)
    for kind in [kind for kind in short_cuts._FORWARDS if issubclass(kind, module_class)]:
        monkeypatch.setitem(short_cuts._FORWARDS, kind, kind.forward)
    return notes


def test_last_layer_computes_the_prefix_tokens_alone(images, monkeypatch):
    model = EViTForImageClassificationWithTeacher(tiny_config_with(use_distillation_token=True)).eval()
    seen = called_with(
        monkeypatch, EViTMLP, lambda mlp, inputs: inputs.shape[1] if mlp is model.vit.layers[-1].mlp else None
    )

    def lengths():
        return [length for length in seen if length]

    alone, full = model(images), model(images, output_hidden_states=True)
    assert lengths() == [2, 8]  # also if the last layer chooses tokens: nobody reads them after it
    torch.testing.assert_close(alone.logits, full.logits)
    assert all(map(torch.equal, alone.attentive_index, full.attentive_index))
    model.config.reorganization_layers, model.config.keep_rate = [1], 0.5
    seen.clear()
    alone, full = model(images), model(images, output_hidden_states=True)
    assert lengths() == [2, 2 + 8 + 1]
    torch.testing.assert_close(alone.logits, full.logits)
    assert torch.equal(alone.attentive_index[0], full.attentive_index[0])
    hidden = model.vit(images, prefix_tokens_only=True)
    torch.testing.assert_close(hidden.last_hidden_state, model.vit(images).last_hidden_state[:, :2])
    assert hidden.patch_index.shape == (3, 9)


def test_masked_tokens_keep_the_last_layer_whole_and_exact(tiny_model, images):
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[:, 5:9] = 0
    tiny_model.config.reorganization_layers = [1, 2]
    alone = tiny_model(images, attention_mask=mask)
    torch.testing.assert_close(alone.logits, tiny_model(images, attention_mask=mask, output_hidden_states=True).logits)


@pytest.mark.parametrize("backbone", ["evit", "lv"])
def test_large_batches_are_cut_on_a_cpu_and_give_the_same_outputs(backbone, images, monkeypatch):
    if backbone == "evit":
        model = EViTForImageClassification(tiny_config_with()).eval()
    else:
        size = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4}
        config = EViTLVConfig(**size, num_attention_heads=4, intermediate_size=64, num_labels=5, keep_rate=0.6)
        model = EViTLVForImageClassification(config).eval()
    sizes = called_with(monkeypatch, EViTEmbeddings, lambda module, inputs: len(inputs))
    with torch.no_grad():
        whole = model(images)
        # The MLP of an image has 16 patches of 64 numbers of 4 bytes.
        monkeypatch.setattr("evit_hf.cpu_inference.CACHE_BYTES_PER_THREAD", 2 * 16 * 64 * 4)
        cut = model(images)
        with_hidden_states = model(images, output_hidden_states=True)
        with_scores = model(images, patch_scores=torch.rand(3, 16))
    model(images)  # with gradients
    assert sizes == [3, 2, 1, 3, 3, 3]
    torch.testing.assert_close(cut.logits, whole.logits)
    for one, other in zip(cut.attentive_index, whole.attentive_index, strict=True):
        assert torch.equal(one, other)
    assert with_hidden_states.hidden_states[0].shape[0] == with_scores.logits.shape[0] == 3


# Stochastic depth


def test_drop_path_rises_linearly_over_depth():
    model = EViTModel(tiny_config_with(drop_path_rate=0.3))
    assert [layer.drop_path.drop_probability for layer in model.layers] == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_drop_path_drops_whole_images_and_keeps_the_expectation():
    drop_path = EViTDropPath(0.25).train()
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 2, 3))
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)  # 4 standard errors
    assert torch.equal(drop_path.eval()(torch.ones(9, 2)), torch.ones(9, 2))


def test_drop_path_acts_on_both_branches(tiny_model, images):
    layer = tiny_model.vit.layers[0].train()
    layer.drop_path.drop_probability = 1 - 1e-9
    hidden_states = torch.randn(3, 17, 32)
    assert torch.equal(layer(hidden_states), hidden_states)


# Distillation token


def test_prefix_tokens_are_never_candidates(images):
    """The official distilled model may prune its distillation token and then reads a different token in its place."""
    config = tiny_config_with(use_distillation_token=True, keep_rate=0.05, attn_implementation="eager")
    model = EViTForImageClassificationWithTeacher(config).eval()
    outputs = model(images, output_hidden_states=True, output_attentions=True)
    assert [x.shape[1] for x in outputs.hidden_states] == [18, 18, 4, 4, 4]  # 2 prefix, 1 attentive, 1 fused
    attention = outputs.attentions[1][:, :, 0, 2:].mean(1)
    assert torch.equal(outputs.attentive_index[0][:, 0], attention.argmax(1))
    layer = model.vit.layers[1]
    before = outputs.hidden_states[1]
    attended = before + layer.attention(layer.layernorm_before(before))[0]
    expected, _ = reorganize_slowly(attended, attention, 0.05, num_prefix_tokens=2)
    expected = expected + layer.mlp(layer.layernorm_after(expected))
    torch.testing.assert_close(outputs.hidden_states[2], expected, rtol=1e-4, atol=1e-5)


def test_answer_is_the_mean_of_both_classifiers(images):
    model = EViTForImageClassificationWithTeacher(tiny_config_with(use_distillation_token=True)).eval()
    outputs = model(images, labels=torch.tensor([0, 1, 2]))
    last = model.vit(images).last_hidden_state
    torch.testing.assert_close(outputs.cls_logits, model.cls_classifier(last[:, 0]))
    torch.testing.assert_close(outputs.distillation_logits, model.distillation_classifier(last[:, 1]))
    torch.testing.assert_close(outputs.logits, (outputs.cls_logits + outputs.distillation_logits) / 2)
    expected = torch.nn.functional.cross_entropy(outputs.logits, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_prefix_tokens_can_score(implementation, images):
    config = tiny_config_with(use_distillation_token=True, scoring_tokens="class_and_distillation", keep_rate=0.5)
    model = EViTForImageClassification(config).eval()
    model.set_attn_implementation("eager")
    attention = model(images, output_attentions=True).attentions[1][:, :, :2, 2:].mean((1, 2))
    model.set_attn_implementation(implementation)
    kept = model(images).attentive_index[0]
    assert torch.equal(kept, attention.topk(8).indices)
    model.config.scoring_tokens = "class"
    assert not torch.equal(model(images).attentive_index[0], kept)


def test_distilled_model_interpolates_its_positions():
    model = EViTForImageClassification(tiny_config_with(use_distillation_token=True)).eval()
    images = torch.randn(2, 3, 48, 64)
    embeddings = model.vit.embeddings
    positions = embeddings.interpolate_pos_encoding(torch.empty(1, 50, 32), 48, 64)
    assert positions.shape == (1, 50, 32)
    assert torch.equal(positions[:, :2], embeddings.position_embeddings[:, :2])
    assert model(images, interpolate_pos_encoding=True).attentive_index[0].shape[1] == 29  # ceil(0.6 * 48)


def test_a_distillation_token_starts_at_random_like_the_class_token():
    embeddings = EViTForImageClassification(tiny_config_with(use_distillation_token=True)).vit.embeddings
    assert embeddings.distillation_token.std() > 0.05
    assert embeddings.position_embeddings.std() > 0.05


def test_two_classifiers_need_a_distillation_token(tiny_config):
    with pytest.raises(ValueError, match="needs a distillation token: pass `use_distillation_token=True`"):
        EViTForImageClassificationWithTeacher(tiny_config)


def test_contradictory_config_is_refused_by_the_model(tiny_config):
    tiny_config.num_hidden_layers = 2
    with pytest.raises(Exception, match=r"`reorganization_layers` must be in \[0, 1\]"):
        EViTForImageClassification(tiny_config)


# Counted tokens


def counting_model(macs=0.6, **changes):
    """64 patches, reorganized at all five layers."""
    torch.manual_seed(0)
    settings = {"image_size": 64, "num_hidden_layers": 5, "keep_rate": None, "macs": macs, **changes}
    return EViTForImageClassification(tiny_config_with(**settings)).eval()


@pytest.fixture
def larger_images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_macs_of_the_model_of_a_call_and_set_later(larger_images):
    model = counting_model()
    output = model(larger_images)
    assert [index.shape[1] for index in output.attentive_index] == [53, 42, 31, 20, 16]
    assert output.token_sizes.sum(dim=1).tolist() == [64.0] * 3
    assert output.counted_by.shape == (3, 64)
    assert torch.equal(model(larger_images, keep_rate=1.0).logits, model(larger_images, macs=1.0).logits)
    expected = model(larger_images, macs=0.8).logits
    model.set_macs(0.8)
    assert torch.equal(model(larger_images).logits, expected)
    model.set_keep_rate(0.5)
    output = model(larger_images)
    assert output.token_sizes is None
    assert [index.shape[1] for index in output.attentive_index] == [32, 17, 9]
    assert torch.equal(model(larger_images, macs=0.8).logits, expected)
    with pytest.raises(ValueError, match="`keep_rate` 0.5 and `macs` 0.8 both say how many tokens"):
        model(larger_images, keep_rate=0.5, macs=0.8)
    with pytest.raises(TypeError, match="`mac` is not a keyword of EViT: did you mean `macs`"):
        model(larger_images, mac=0.5)
    with pytest.raises(ValueError, match="`macs` 0.1 is out of reach: with 16 of 64 image tokens"):
        model(larger_images, macs=0.1)


@torch.no_grad()
def test_all_operations_are_the_dense_model_bit_by_bit(larger_images):
    model = counting_model(macs=1.0)
    dense = EViTForImageClassification(tiny_config_with(image_size=64, num_hidden_layers=5, keep_rate=1.0)).eval()
    dense.load_state_dict(model.state_dict())
    output = model(larger_images)
    assert torch.equal(output.logits, dense(larger_images).logits)
    assert torch.equal(output.token_sizes, torch.ones(3, 64))
    assert torch.equal(output.counted_by, torch.arange(64).expand(3, -1))


@torch.no_grad()
def test_counting_is_the_same_on_every_road(larger_images):
    model = counting_model()
    expected = model(larger_images)
    eager, double = copy.deepcopy(model), copy.deepcopy(model).double()
    eager.set_attn_implementation("eager")
    others = {
        "plain road": model(larger_images, output_hidden_states=True),
        "eager": eager(larger_images),
        "float64": double(larger_images.double()),
        "cut into pieces": model(larger_images.repeat(30, 1, 1, 1)),
    }
    for name, output in others.items():
        torch.testing.assert_close(output.logits[:3].float(), expected.logits, rtol=1e-4, atol=1e-4, msg=name)
        assert torch.equal(output.counted_by[:3], expected.counted_by), name
        assert torch.equal(output.token_sizes[:3].float(), expected.token_sizes), name
    hidden = others["plain road"].hidden_states
    assert [state.shape[1] for state in hidden] == [65, 54, 43, 32, 21, 17]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(larger_images)
    assert output.token_sizes.dtype == torch.float32
    assert (output.logits - expected.logits).abs().max() < 0.1 * expected.logits.abs().max()


@torch.no_grad()
def test_features_go_back_on_the_whole_grid(larger_images):
    model = counting_model().vit
    output = model(larger_images)
    on_grid = output.last_hidden_state[:, 1:].gather(1, output.counted_by.unsqueeze(-1).expand(-1, -1, 32))
    kept = output.patch_index.unsqueeze(-1).expand(-1, -1, 32)
    assert torch.equal(on_grid.gather(1, kept), output.last_hidden_state[:, 1:])
    torch.testing.assert_close(
        on_grid.mean(dim=1), (output.last_hidden_state[:, 1:] * output.token_sizes.unsqueeze(-1)).sum(dim=1) / 64
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_masked_patches_have_no_size(larger_images, implementation):
    model = counting_model()
    model.set_attn_implementation(implementation)
    mask = torch.ones(3, 65)
    mask[:, 45:] = 0
    output = model(larger_images, attention_mask=mask)
    assert output.token_sizes.sum(dim=1).tolist() == [44.0] * 3
    changed = larger_images.clone()
    changed[:, :, 48:] = 7.0  # the last 16 patches
    torch.testing.assert_close(model(changed, attention_mask=mask).logits, output.logits)


@torch.no_grad()
def test_macs_follow_the_image_size():
    model = counting_model()
    images = torch.randn(2, 3, 96, 48, generator=torch.Generator().manual_seed(2))
    output = model(images, interpolate_pos_encoding=True)
    assert output.token_sizes.sum(dim=1).tolist() == [72.0] * 2
    assert [index.shape[1] for index in output.attentive_index] == [60, 48, 36, 24, 16]


def test_counted_tokens_have_the_gradients_of_a_run_without_checkpointing(larger_images):
    gradients = []
    for checkpoints in (False, True):
        model = counting_model().train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(larger_images, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
        assert gradient.isfinite().all()


@torch.no_grad()
def test_counted_tokens_need_an_attention_that_can_weigh_them(larger_images):
    model = counting_model()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="`attn_implementation` is 'flex_attention', which cannot weigh counted"):
        model(larger_images)


@torch.no_grad()
def test_lv_vit_counts():
    config = EViTLVConfig(
        image_size=64, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        stem_hidden_size=8, num_labels=5, initializer_range=0.2, macs=0.7,
    )  # fmt: skip
    torch.manual_seed(0)
    model, images = EViTLVForImageClassification(config).eval(), torch.randn(2, 3, 64, 64)
    output = model(images)
    assert output.token_sizes.sum(dim=1).tolist() == [64.0] * 2
    assert output.aux_logits.shape[1] == output.token_sizes.shape[1] == output.patch_index.shape[1]
    torch.testing.assert_close(model(images, output_hidden_states=True).logits, output.logits)


@pytest.mark.slow
@torch.no_grad()
def test_counted_tokens_compile_into_one_graph(larger_images):
    model = counting_model()
    expected = model(larger_images)
    torch._dynamo.reset()
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(larger_images)
    torch.testing.assert_close(output.logits, expected.logits)
    assert torch.equal(output.counted_by, expected.counted_by)


@torch.no_grad()
def test_a_mask_of_ones_and_zeros_chooses_whatever_its_dtype():
    torch.manual_seed(0)
    model, images = EViTForImageClassification(tiny_config_with()).eval(), torch.rand(2, 3, 32, 32)
    mask = torch.rand(2, 16) > 0.5
    expected = model(images, patch_scores=mask.float())
    for scores in (mask, mask.long()):
        assert torch.equal(model(images, patch_scores=scores).logits, expected.logits)


@torch.no_grad()
def test_an_encoder_of_a_larger_model_has_one_configuration(tmp_path):
    decoder = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=20, add_cross_attention=True, is_decoder=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(tiny_config_with(), decoder)
    VisionEncoderDecoderModel(config=config).save_pretrained(tmp_path)
    encoder = VisionEncoderDecoderModel.from_pretrained(tmp_path).eval().encoder
    assert all(module.config is encoder.config for module in encoder.modules() if hasattr(module, "config"))
    encoder.set_attn_implementation("eager")
    assert len(encoder(torch.rand(1, 3, 32, 32), output_attentions=True).attentions) == 4
