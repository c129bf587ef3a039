import copy
import functools
import json
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
import transformers
from conftest import run_python
from transformers import ViTConfig
from vision_families import (
    CASES,
    EXAMPLE,
    HAS_NEW_TIMM,
    LAYERS,
    SIZES,
    TIMM_CASES,
    build,
    inputs,
    reference,
    timm_model,
)

from evit_hf import EViTConfig, EViTForImageClassification, KeepRateCallback, families, reorganize
from evit_hf.reorganization import FAMILIES, ReorganizingLayer, find_tower
from evit_hf.towers import tower_of


def owner_of(model):
    return next(module for module in model.modules() if hasattr(module, "training_keep_rate"))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, ReorganizingLayer)]


def tensors(output):
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def reorganized(case, implementation="sdpa", **settings):
    return reorganize(build(case, implementation), **{"keep_rate": 0.7, "reorganization_layers": LAYERS, **settings})


def installed(*cases):
    return [case for case in cases if case in CASES]


# --- The paper, family by family ------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_keep_rate_one_is_bit_equal(case, implementation):
    dense = build(case, implementation)
    expected = tensors(dense(**inputs(case)))
    model = reorganize(copy.deepcopy(dense), keep_rate=1.0)
    output = model(**inputs(case))
    for name, value in expected.items():
        assert torch.equal(output[name], value), name


@pytest.mark.parametrize("inattentive", ["fused", "dropped", "counted"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_a_loop_over_tokens(case, inattentive, leave_at_least):
    leave_at_least(6)  # ViViT's 18 tokens can be given up too
    dense = build(case)
    budget = {"macs": 0.7} if inattentive == "counted" else {"keep_rate": 0.7, "reorganization_layers": LAYERS}
    model = reorganize(copy.deepcopy(dense), **budget, inattentive_tokens=inattentive)
    entered = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: entered.append((args[0], kwargs)), with_kwargs=True)
        for layer in layers_of(model)
    ]
    left = []
    layers_of(model)[-1].register_forward_hook(lambda *call: left.append(call[-1]))
    output = model(**inputs(case))
    for handle in handles:
        handle.remove()
    owner = owner_of(model)
    family = FAMILIES[owner.config.model_type]
    num_prefix, num_scoring = family.num_prefix_tokens(owner), family.num_class_tokens(owner)
    first, kwargs = entered[0]
    rotary = kwargs.get("position_embeddings")
    rotary = None if rotary is None else [table.double() for table in rotary]
    plan = entered[0][1]["tokens"].plan
    for image in range(2):
        tokens = first[image].double()
        patches, kept_patches = list(range(len(tokens) - num_prefix)), []
        sizes, whole_grid = [1] * len(patches), list(range(len(patches)))
        for number, layer in enumerate(copy.deepcopy(layers_of(model))):
            layer = layer.double()
            bias = kwargs.get("attention_mask")
            if getattr(layer, "relative_position_bias", None) is not None:
                window = (6, 6)
                own = layer.relative_position_bias(window, False, dim_size=37)
                bias = own if bias is None else own + bias
            bias = None if bias is None else bias[0].double()
            num_kept = plan.num_attentive(number, len(patches))
            tokens, patches, sizes, kept, counted_by = reference(
                layer, tokens, num_prefix, num_scoring, num_kept, inattentive, patches, sizes, rotary, bias
            )
            if number in plan.layers:
                kept = patches if kept is None else kept  # a layer may have no token left to give up
                kept_patches.append([-1 if patch is None else patch for patch in kept])
            if counted_by is not None:
                whole_grid = [counted_by[token] for token in whole_grid]
        assert [index[image].tolist() for index in output.attentive_index] == kept_patches
        assert output.patch_index[image].tolist() == [-1 if patch is None else patch for patch in patches]
        error = (left[0][image].double() - tokens).norm() / tokens.norm()
        assert error < 1e-5, error
        if inattentive == "counted":
            assert output.token_sizes[image].tolist() == sizes
            assert output.counted_by[image].tolist() == whole_grid
            assert sum(sizes) == len(whole_grid)
            assert len(kept_patches) == len(layers_of(model))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_halves_are_the_layer(case):
    # Notices when Transformers changes a layer that our halves repeat.
    model = reorganized(case, keep_rate=1.0)
    calls = []
    for layer in layers_of(model):
        layer.register_forward_hook(
            lambda layer, args, kwargs, output: calls.append((layer, args, dict(kwargs), output)), with_kwargs=True
        )
    model(**inputs(case))
    for layer, args, kwargs, output in calls:
        del kwargs["tokens"]
        layer = copy.deepcopy(layer)
        layer._forward_hooks.clear()
        layer.__class__ = type(layer).dense_class
        assert torch.equal(layer(*args, **kwargs), output)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_eager_and_sdpa_agree(case):
    outputs = [reorganized(case, implementation)(**inputs(case)) for implementation in ("eager", "sdpa")]
    for name, value in tensors(outputs[0]).items():
        torch.testing.assert_close(outputs[1][name], value, rtol=1e-4, atol=1e-4)
    for kept, other in zip(outputs[0].attentive_index, outputs[1].attentive_index, strict=True):
        assert torch.equal(kept, other)


@pytest.mark.parametrize("inattentive", ["fused", "dropped", "counted"])
@torch.no_grad()
def test_vit_equals_evit(inattentive):
    vit = build("vit-classifier")
    budget = {"macs": 0.7} if inattentive == "counted" else {"keep_rate": 0.7, "reorganization_layers": LAYERS}
    budget["inattentive_tokens"] = inattentive
    evit = EViTForImageClassification(EViTConfig(**{**vit.config.to_dict(), "model_type": "evit"}, **budget)).eval()
    evit.load_state_dict(vit.state_dict())
    model = reorganize(vit, **budget)
    expected, output = evit(**inputs("vit")), model(**inputs("vit"))
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
    for kept, other in zip(output.attentive_index, expected.attentive_index, strict=True):
        assert torch.equal(kept, other)
    if inattentive == "counted":
        assert torch.equal(output.token_sizes, expected.token_sizes)
        assert torch.equal(output.counted_by, expected.counted_by)


@pytest.mark.parametrize("case", installed("vit", "dinov2", "sapiens2", "clip-classifier", "beit"))
@torch.no_grad()
def test_counting_is_the_same_in_eager_and_sdpa(case):
    outputs = [reorganize(build(case, name), macs=0.6)(**inputs(case)) for name in ("eager", "sdpa")]
    for name, value in tensors(outputs[0]).items():
        torch.testing.assert_close(outputs[1][name], value, rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs[0].counted_by, outputs[1].counted_by)


@pytest.mark.parametrize("case", installed("dinov2", "dinov2-registers", "clip-classifier", "metaclip2", "beit"))
@torch.no_grad()
def test_averages_over_patches_weigh_tokens_by_size(case):
    model = reorganize(build(case), macs=0.6)
    averaged = []
    classifier = model.classifier
    classifier.register_forward_pre_hook(lambda _, args: averaged.append(args[0]))
    left = []
    inner = next(child for child in model.children() if isinstance(child, transformers.PreTrainedModel))
    bare = type(inner).forward

    def forward(*args, **kwargs):
        left.append(bare(*args, **kwargs))
        return copy.copy(left[-1])

    inner.forward = functools.partial(forward, inner)
    output = model(**inputs(case))
    sizes, features = output.token_sizes.unsqueeze(-1), left[0].last_hidden_state[:, -output.token_sizes.shape[1] :]
    mean = (features * sizes).sum(dim=1) / sizes.sum(dim=1)
    if case == "beit":
        mean = inner.pooler.layernorm(mean)
    torch.testing.assert_close(averaged[0][:, -32:], mean, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(averaged[0][:, -32:], features.mean(dim=1), rtol=1e-2)


@torch.no_grad()
@torch.no_grad()
def test_averages_weigh_tokens_by_size_however_a_model_is_called():
    config = transformers.BeitConfig(**SIZES, use_mean_pooling=True, vocab_size=10, initializer_range=0.2)
    beit, images = reorganize(transformers.BeitModel(config).eval(), macs=0.7), inputs("vit")["pixel_values"]
    torch.testing.assert_close(beit(images, return_dict=False)[1], beit(images).pooler_output)
    dinov2 = transformers.BeitForImageClassification(config).eval()
    reorganize(dinov2, macs=0.7)
    torch.testing.assert_close(dinov2(images, return_dict=False)[0], dinov2(images).logits)


@torch.no_grad()
def test_timm_in_transformers_without_its_classifier_weighs_tokens_by_size():
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "global_pool": "avg"}
    config = transformers.TimmWrapperConfig(
        architecture="eva02_tiny_patch14_224", do_pooling=True, num_labels=5, model_args=sizes
    )
    model = reorganize(transformers.TimmWrapperModel(config).eval(), macs=0.7)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model(images).pooler_output, model.timm_model(images))
    torch.testing.assert_close(model(images, return_dict=False)[1], model.timm_model(images))


@pytest.mark.parametrize("case", installed("dinov2", "beit", "clip-classifier"))
@torch.no_grad()
def test_a_model_whose_part_was_reorganized_first_is_like_any(case, tmp_path):
    whole = build(case)
    in_parts = copy.deepcopy(whole)
    reorganize(whole, macs=0.8)
    _, path, _ = find_tower(in_parts)
    reorganize(path[1], macs=0.9)
    reorganize(in_parts, macs=0.8)
    output, other = whole(**inputs(case)), in_parts(**inputs(case))
    torch.testing.assert_close(output.logits, other.logits, rtol=0, atol=0)
    assert torch.equal(output.attentive_index[0], other.attentive_index[0])
    in_parts.save_pretrained(tmp_path)
    saved = reorganize(type(in_parts).from_pretrained(tmp_path).eval())
    torch.testing.assert_close(saved(**inputs(case)).logits, output.logits)


@torch.no_grad()
def test_scores_of_other_shapes_are_refused_and_masks_are_scores():
    model, images = reorganized("vit-classifier"), inputs("vit-classifier")["pixel_values"]
    scores = torch.rand(len(images), 36)
    for wrong in (torch.rand(len(images), 37), torch.rand(len(images) + 1, 36), scores[:1]):
        with pytest.raises(ValueError, match=r"`patch_scores` must be \(batch_size, num_patches\) = .*, got"):
            model(images, patch_scores=wrong)
    for mask in (scores > 0.3, (scores > 0.3).long()):
        of_mask, of_numbers = (model(images, patch_scores=one) for one in (mask, mask.float()))
        assert torch.equal(of_mask.attentive_index[-1], of_numbers.attentive_index[-1])


def test_pushing_while_saving_takes_the_code_along(tmp_path):
    model, seen = reorganized("vit"), []
    model.push_to_hub = lambda repo_id, **settings: seen.append((repo_id, settings, {*os.listdir(tmp_path / "m")}))
    model.save_pretrained(tmp_path / "m", push_to_hub=True, repo_id="org/name", private=True)
    model.save_pretrained(tmp_path / "m", True)
    ((repo_id, settings, files),) = seen
    assert (repo_id, settings) == ("org/name", {"private": True})
    assert {"reorganization.py", "config.json", "model.safetensors"} <= files


def test_a_configuration_of_a_reorganized_vit_makes_an_evit():
    config = EViTConfig.from_config(reorganized("vit-classifier").config, macs=None, keep_rate=0.7)
    assert config._attn_implementation == "sdpa"
    assert "reorganization" not in str(config.to_dict().get("auto_map"))
    EViTForImageClassification(config).eval()(**inputs("vit-classifier"))


def test_rotary_positions_follow_tokens(monkeypatch):
    model = reorganized("dinov3")
    expected = model(**inputs("dinov3")).last_hidden_state
    monkeypatch.setattr(
        ReorganizingLayer,
        "follow_tokens",
        lambda self, tokens, patch_index, mask, kwargs: (
            mask,
            {**kwargs, "position_embeddings": tuple(x[: patch_index.shape[1]] for x in kwargs["position_embeddings"])},
        ),
    )
    assert (model(**inputs("dinov3")).last_hidden_state - expected).abs().max() > 0.1


# --- One call, one model --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_keep_rate_of_a_call_of_the_model_and_by_layer():
    model = reorganized(EXAMPLE)
    assert [index.shape[1] for index in model(**inputs(EXAMPLE)).attentive_index] == [26, 19, 14]
    assert [index.shape[1] for index in model(**inputs(EXAMPLE), keep_rate=0.5).attentive_index] == [18, 10, 6]
    kept = model(**inputs(EXAMPLE), keep_rate=[1.0, 0.5, 1.0]).attentive_index
    assert [index.shape[1] for index in kept] == [36, 18, 19]
    reorganize(model, keep_rate=[0.9, 0.8], reorganization_layers=(1, 3), inattentive_tokens="dropped")
    assert [index.shape[1] for index in model(**inputs(EXAMPLE)).attentive_index] == [33, 27]


@torch.no_grad()
def test_macs_in_one_call():
    model, images = build(EXAMPLE), inputs(EXAMPLE)
    dense = model(**images).logits
    reorganize(model)  # nothing said: a sensible budget
    assert owner_of(model).config.macs == 0.66
    left = {"dinov2": [30, 23, 17, 16], "vit-msn": [27, 18, 16, 16]}[EXAMPLE]
    assert [index.shape[1] for index in model(**images).attentive_index] == left
    assert torch.equal(model(**images, macs=1.0).logits, dense)
    assert torch.equal(model(**images, macs=1.0).token_sizes, torch.ones(2, 36))
    expected = model(**images, macs=0.8)
    assert torch.equal(reorganize(model, macs=0.8)(**images).logits, expected.logits)
    assert [index.shape[1] for index in model(**images, keep_rate=0.5).attentive_index] == [18, 10, 6]  # the paper's
    fused = model(**images, keep_rate=0.5).logits
    reorganize(model, 0.5)
    assert torch.equal(model(**images).logits, fused)
    assert torch.equal(model(**images, macs=0.8).logits, expected.logits)
    with pytest.raises(ValueError, match="`keep_rate` 0.5 and `macs` 0.8 both say how many"):
        model(**images, keep_rate=0.5, macs=0.8)
    with pytest.raises(ValueError, match="`keep_rate` 0.5 and `macs` 0.8 both say how many"):
        reorganize(model, 0.5, macs=0.8)
    with pytest.raises(ValueError, match="`macs` 0.2 is out of reach"):
        model(**images, macs=0.2)
    with pytest.raises(ValueError, match=r"`macs` must be in \(0, 1\], got 1.2"):
        model(**images, macs=1.2)


@torch.no_grad()
def test_macs_at_other_image_sizes():
    model = reorganize(build("dinov3"), macs=0.7)
    images = torch.randn(1, 3, 64, 40, generator=torch.Generator().manual_seed(0))
    output = model(images)
    assert output.counted_by.shape == (1, 40)
    assert output.token_sizes.sum() == 40


@pytest.mark.parametrize("case", installed("dinov2", "beit"))
@torch.no_grad()
def test_macs_are_saved_with_the_model(case, tmp_path):
    model = reorganize(build(case), macs=0.6)
    model.save_pretrained(tmp_path)
    again = reorganize(type(model).from_pretrained(tmp_path))
    expected, output = model(**inputs(case)), again(**inputs(case))
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.counted_by, expected.counted_by)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["macs"], settings["inattentive_tokens"]) == (0.6, "counted")
    # A folder of an earlier version.
    del settings["macs"], settings["inattentive_tokens"]
    settings |= {"keep_rate": 0.7, "reorganization_layers": LAYERS, "fuse_inattentive_tokens": False}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = reorganize(type(model).from_pretrained(tmp_path)).config
    assert (config.keep_rate, config.macs, config.inattentive_tokens) == (0.7, None, "dropped")


@torch.no_grad()
def test_scores_from_outside_choose_the_patches():
    scores = torch.rand(2, 36, generator=torch.Generator().manual_seed(0))
    kept = reorganized("clip")(**inputs("clip"), patch_scores=scores).attentive_index[0]
    assert torch.equal(kept, scores.topk(26).indices)


@torch.no_grad()
def test_hidden_states_shrink_and_nothing_else_becomes_a_field():
    output = reorganized("vit-classifier")(**inputs("vit"), output_hidden_states=True)
    assert [state.shape[1] for state in output.hidden_states] == [37, 37, 28, 21, 16]
    assert list(output) == ["logits", "hidden_states"]


def test_parameters_classes_and_model_type_are_untouched():
    dense = build(EXAMPLE)
    names = {type(module).__name__ for module in dense.modules() if type(module).__name__.endswith("Layer")}
    model = reorganize(copy.deepcopy(dense), 0.7)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert type(model) is type(dense)
    assert model.config.model_type == dense.config.model_type
    assert {type(layer).__name__ for layer in layers_of(model)} == names


def test_another_model_of_the_same_configuration_keeps_its_own():
    config = ViTConfig(**{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 48})
    models = [transformers.ViTModel(config) for _ in range(2)]
    reorganize(models[0], 0.7)
    assert not hasattr(models[1].config, "keep_rate")
    assert models[1].config._attn_implementation == "sdpa"
    assert models[1](torch.zeros(1, 3, 48, 48)).last_hidden_state.shape[1] == 10


@torch.no_grad()
def test_copies_and_pickles_are_reorganized():
    model = reorganized("beit")
    expected = model(**inputs("beit"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = twin(**inputs("beit"))
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.patch_index, expected.patch_index)
        assert owner_of(twin) is not owner_of(model)


@pytest.mark.parametrize("case", ["vit-classifier", EXAMPLE, "clip", "clip-classifier", "dinov3", "beit"])
@torch.no_grad()
def test_saved_and_reorganized_again(case, tmp_path):
    model = reorganized(case, keep_rate=[0.9, 0.7, 0.5], inattentive_tokens="dropped")
    model.save_pretrained(tmp_path)
    dense, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    expected = tensors(build(case)(**inputs(case)))
    for name, value in tensors(dense(**inputs(case))).items():
        assert torch.equal(value, expected[name])  # without a call of `reorganize`: the dense model
    again = reorganize(type(model).from_pretrained(tmp_path))
    expected, output = model(**inputs(case)), again(**inputs(case))
    for name, value in tensors(expected).items():
        assert torch.equal(output[name], value)
    assert len(output.attentive_index) == 3


@pytest.mark.slow
@pytest.mark.parametrize("case", [EXAMPLE, "clip-classifier", "beit"])
@torch.no_grad()
def test_saved_folders_reorganize_by_themselves(case, tmp_path):
    model = reorganized(case, keep_rate=0.5)
    model.save_pretrained(tmp_path / "model")
    pixels = inputs(case)["pixel_values"]
    torch.save(pixels, tmp_path / "pixels.pt")
    torch.save(model(pixels).logits, tmp_path / "logits.pt")
    code = """
import torch
from transformers import AutoModelForImageClassification, pipeline
pixels, expected = torch.load("pixels.pt"), torch.load("logits.pt")
for _ in range(2):
    model = AutoModelForImageClassification.from_pretrained("model", trust_remote_code=True).eval()
    output = model(pixels)
    torch.testing.assert_close(output.logits, expected)
    assert len(output.attentive_index) == 3
dense = AutoModelForImageClassification.from_pretrained("model").eval()
assert not hasattr(dense(pixels), "attentive_index")
model.save_pretrained("again")
again = AutoModelForImageClassification.from_pretrained("again", trust_remote_code=True).eval()
torch.testing.assert_close(again(pixels).logits, expected)
print("equal")
"""
    assert run_python(code, tmp_path, without_package=True, HF_HOME=str(tmp_path / "home")).strip() == "equal"


def test_gradients_are_those_of_the_model_without_checkpointing():
    images = inputs("dinov3")["pixel_values"]
    gradients = []
    for use_reentrant in (None, False, True):
        model = reorganized("dinov3").train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.get_input_embeddings().weight.requires_grad_(True)
        # Two passes at different rates before one backward: state on a module would be that of the second.
        first = model(images, keep_rate=0.7).last_hidden_state[:, 0].sum()
        second = model(images.flip(0), macs=0.6).last_hidden_state[:, 0].pow(2).sum()
        (first + second).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        assert set(other) == set(gradients[0])
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in ("vit-classifier", "dinov3", "radio", "clip-classifier", "beit") if case in CASES]
)
@torch.no_grad()
@pytest.mark.parametrize("budget", [{"keep_rate": 0.7}, {"macs": 0.7}], ids=["fused", "counted"])
def test_compiles_into_one_graph(case, budget):
    model = reorganize(build(case), **budget)
    expected = tensors(model(**inputs(case)))
    torch._dynamo.reset()
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs(case))
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value, rtol=1e-5, atol=1e-5)


def test_callback_schedules_foreign_models(tmp_path):
    model = reorganized(EXAMPLE, keep_rate=0.5)
    rates = []
    layers_of(model)[0].register_forward_pre_hook(
        lambda module, args, kwargs: rates.append(kwargs["tokens"].plan.keep_rates[1]), with_kwargs=True
    )
    rows = [{"pixel_values": torch.randn(3, 48, 48), "labels": i % 5} for i in range(8)]
    arguments = transformers.TrainingArguments(
        tmp_path, num_train_epochs=4, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="epoch"
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[KeepRateCallback(1, 2)])
    trainer.train()
    assert rates[:2] == [1.0, 1.0]
    assert rates[-1] == 0.5
    assert rates == sorted(rates, reverse=True)
    # Its checkpoints are found again, whole: upstream leaves an encoder at random here.
    fresh = reorganized(EXAMPLE, keep_rate=0.5)
    trainer = transformers.Trainer(fresh, arguments, train_dataset=rows, callbacks=[KeepRateCallback(1, 2)])
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-8"))
    for name, parameter in model.named_parameters():
        assert torch.equal(fresh.get_parameter(name), parameter), name


def test_predictions_of_the_trainer_are_logits(tmp_path):
    rows = [{"pixel_values": torch.randn(3, 48, 48), "labels": i % 5} for i in range(4)]
    arguments = transformers.TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    predictions = transformers.Trainer(reorganized(EXAMPLE), arguments).predict(rows).predictions
    assert predictions.shape == (4, 5)


@torch.no_grad()
def test_the_image_tower_of_a_clip_model_is_reorganized():
    torch.manual_seed(0)
    _, config = CASES["clip-classifier"]
    model = transformers.CLIPModel(config()).eval()
    words = torch.tensor([[1, 2, 49]])
    text = model.get_text_features(words)
    images = inputs("clip")["pixel_values"]
    dense = model(input_ids=words, pixel_values=images).logits_per_image
    reorganize(model, 0.7, reorganization_layers=LAYERS)
    assert torch.equal(model.get_text_features(words).pooler_output, text.pooler_output)
    output = model(input_ids=words, pixel_values=images, attention_mask=torch.ones_like(words), keep_rate=1.0)
    assert torch.equal(output.logits_per_image, dense)
    features = model.get_image_features(images)
    assert features.patch_index.shape == (2, 15)


# --- What is refused, and why ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("SiglipVisionModel", "SiglipVisionConfig", "no class token"),
        ("IJepaModel", "IJepaConfig", "no class token"),
        ("ViTMAEModel", "ViTMAEConfig", "load the checkpoint as a ViT"),
        ("MLCDVisionModel", "MLCDVisionConfig", "one set for the whole batch"),
        ("Data2VecVisionModel", "Data2VecVisionConfig", "out of reach"),
        ("Dinov2Backbone", "Dinov2Config", "one answer for each patch"),
        ("ViTForMaskedImageModeling", "ViTConfig", "one answer for each patch"),
        ("BeitForSemanticSegmentation", "BeitConfig", "one answer for each patch"),
        ("CLIPTextModel", "CLIPTextConfig", "no layers of a known Vision Transformer"),
        ("ResNetModel", "ResNetConfig", "no layers of a known Vision Transformer"),
    ],
)
def test_other_models_are_refused_with_the_reason(name, config, reason):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    if "Segmentation" in name:
        sizes["out_indices"] = [0, 1, 2, 3]
    config = getattr(transformers, config)(**({} if name == "ResNetModel" else {**sizes, "intermediate_size": 48}))
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    with pytest.raises(ValueError, match=f"cannot be reorganized: .*{reason}"):
        reorganize(model)


def test_old_versions_of_transformers_are_refused_by_name(monkeypatch):
    module = transformers.models.dinov2.modeling_dinov2

    def forward(self, hidden_states):
        """As before Transformers 5.18: without keywords."""

    monkeypatch.setattr(module.Dinov2Layer, "forward", forward)
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match=r"`Dinov2Layer` takes no keywords: update Transformers to 5\.18 or newer"):
        reorganize(model)


def test_settings_out_of_range_are_refused():
    model = build("vit")
    with pytest.raises(ValueError, match=r"`keep_rate` must be in \(0, 1\]"):
        reorganize(model, 1.5)
    with pytest.raises(ValueError, match=r"`reorganization_layers` must be in \[0, 3\]"):
        reorganize(model, 0.5, reorganization_layers=[4])
    with pytest.raises(ValueError, match="`keep_rate` has 2 entries"):
        reorganize(model, [0.5, 0.5])
    reorganize(model, 0.7)
    with pytest.raises(ValueError, match=r"`keep_rate` must be in \(0, 1\]"):
        model(**inputs("vit"), keep_rate=0.0)
    with pytest.raises(TypeError, match="did you mean `keep_rate`"):
        model(**inputs("vit"), keep_rat=0.5)
    with pytest.raises(ValueError, match="`attention_mask` cannot follow"):
        model(**inputs("vit"), attention_mask=torch.ones(2, 37))
    with pytest.raises(ValueError, match="`output_attentions=True` needs"):
        model(**inputs("vit"), output_attentions=True)


def test_masks_are_refused_by_position_as_well():
    images, mask = inputs("vit")["pixel_values"], torch.ones(2, 37)
    with pytest.raises(ValueError, match="`attention_mask` cannot follow"):
        reorganized("vit")(images, None, None, mask)
    with pytest.raises(ValueError, match="`bool_masked_pos` and reorganized tokens do not go together"):
        reorganized("dinov3")(images, torch.zeros(2, 36, dtype=torch.bool))


def test_kernels_without_a_class_row_are_refused():
    model = build("vit")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="load the model with `attn_implementation='sdpa'`"):
        reorganize(model)
    model = reorganized("vit")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"call `reorganize\(model\)` again"):
        model(**inputs("vit"))
    reorganize(model)(**inputs("vit"))


def test_attention_dropout_never_chooses_tokens():
    model = build("vit", "eager", attention_probs_dropout_prob=0.1)
    with pytest.raises(ValueError, match="would choose the tokens"):
        reorganize(model, 0.7).train()(**inputs("vit"))


def test_sharded_layers_are_found_under_the_names_that_fsdp2_gives_them():
    model = reorganized(EXAMPLE)
    tower = tower_of(model)
    for module in (model, *tower.layers):
        module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
    assert tower_of(model).layers is tower.layers


def test_families_are_listed():
    listed = families()
    assert listed["dinov2"].startswith("works: Dinov2Model")
    assert listed["siglip"].startswith("refused: it has no class")
    assert set(FAMILIES) < set(listed)
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text()
    for name, verdict in listed.items():
        assert f"| `{name}` | {verdict.split(': ', 1)[1]} |" in page


# --- timm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TIMM_CASES)
@torch.no_grad()
def test_timm_models_are_reorganized(case):
    dense, images = timm_model(case), inputs("vit")["pixel_values"]
    expected = dense(images)
    model = reorganize(copy.deepcopy(dense), 0.7, reorganization_layers=LAYERS)
    assert torch.equal(model(images, keep_rate=1.0), expected)
    logits, kept = model(images, output_attentive_index=True)
    assert [index.shape[1] for index in kept] == [26, 19, 14]
    assert not torch.allclose(logits, expected)
    assert torch.equal(model.forward_head(model.forward_features(images)), logits)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), logits)
    assert model.forward_features(images, keep_rate=1.0).shape[1] == model.num_prefix_tokens + 36
    assert list(model.state_dict()) == list(dense.state_dict())
    for block in model.blocks:
        block.attn.fused_attn = False
    unfused, other = model(images, output_attentive_index=True)
    torch.testing.assert_close(unfused, logits, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(index, again) for index, again in zip(kept, other, strict=True))


@pytest.mark.parametrize("inattentive", ["fused", "dropped", "counted"])
@pytest.mark.parametrize("case", TIMM_CASES)
@torch.no_grad()
def test_timm_equals_a_loop_over_tokens(case, inattentive):
    budget = {"macs": 0.7} if inattentive == "counted" else {"keep_rate": 0.7, "reorganization_layers": LAYERS}
    model = reorganize(timm_model(case), **budget, inattentive_tokens=inattentive)
    entered, left, num_prefix = [], [], model.num_prefix_tokens
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args, kwargs: entered.append((args[0], kwargs)), with_kwargs=True)
    model.blocks[-1].register_forward_hook(lambda *call: left.append(call[-1]))
    _, kept_index = model(inputs("vit")["pixel_values"], output_attentive_index=True)
    plan = entered[0][1]["tokens"].plan
    for image in range(2):
        tokens = entered[0][0][image].double()
        patches, sizes, kept_patches = list(range(36)), [1] * 36, []
        for number, block in enumerate(copy.deepcopy(model.blocks)):
            block, (_, kwargs) = block.double(), entered[number]
            rope, bias = kwargs.get("rope"), kwargs.get("attention_mask")
            rotary = None if rope is None else [table.double() for table in reversed(rope.chunk(2, dim=-1))]
            if getattr(block.attn, "relative_position_bias_table", None) is not None:
                bias = block.attn._get_rel_pos_bias()[0]
            bias, num_kept = None if bias is None else bias.double(), plan.num_attentive(number, len(patches))
            tokens, patches, sizes, kept, _ = reference(
                block, tokens, num_prefix, 1, num_kept, inattentive, patches, sizes, rotary, bias
            )
            if number in plan.layers:
                kept = patches if kept is None else kept  # a layer may have no token left to give up
                kept_patches.append([-1 if patch is None else patch for patch in kept])
        assert [index[image].tolist() for index in kept_index] == kept_patches
        error = (left[0][image].double() - tokens).norm() / tokens.norm()
        assert error < 1e-5, error


@pytest.mark.slow
@pytest.mark.parametrize("case", ["deit3", "eva02", "dinov3", "rope-mixed", "beit"])
@torch.no_grad()
def test_timm_models_compile_into_one_graph(case):
    model, images = reorganize(timm_model(case), 0.7, reorganization_layers=LAYERS), inputs("vit")["pixel_values"]
    expected = model(images)
    torch._dynamo.reset()
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inattentive", ["fused", "dropped", "counted"])
@torch.no_grad()
def test_timm_equals_transformers_with_the_same_weights(inattentive):
    vit, model = build("vit-classifier"), timm_model(qkv_bias=True, mlp_ratio=1.5)
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    names |= {f"patch_embed.proj.{x}": f"embeddings.patch_embeddings.projection.{x}" for x in ("weight", "bias")}
    names |= {f"norm.{x}": f"layernorm.{x}" for x in ("weight", "bias")}
    weights = vit.state_dict()
    state = {mine: weights[f"vit.{theirs}"] for mine, theirs in names.items()}
    for x in ("weight", "bias"):
        state[f"head.{x}"] = weights[f"classifier.{x}"]
        for i in range(4):
            layer = f"vit.layers.{i}."
            qkv = [weights[f"{layer}attention.{part}_proj.{x}"] for part in "qkv"]
            state[f"blocks.{i}.attn.qkv.{x}"] = torch.cat(qkv)
            pairs = {"attn.proj": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after"}
            for mine, theirs in {**pairs, "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():
                state[f"blocks.{i}.{mine}.{x}"] = weights[f"{layer}{theirs}.{x}"]
    model.load_state_dict(state)
    for norm in [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]:
        norm.eps = vit.config.layer_norm_eps
    images = inputs("vit")["pixel_values"]
    settings = {"keep_rate": 0.7, "reorganization_layers": LAYERS, "inattentive_tokens": inattentive}
    settings = {"macs": 0.7} if inattentive == "counted" else settings
    expected = reorganize(vit, **settings)(images)
    logits, kept = reorganize(model, **settings)(images, output_attentive_index=True)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    for index, other in zip(kept, expected.attentive_index, strict=True):
        assert torch.equal(index, other)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 48}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 48}),
        ("eva02_tiny_patch14_224", {"img_size": 42, "global_pool": "token"}),
        ("vit_small_patch16_dinov3", {"img_size": 48, "global_pool": "token", "embed_dim": 96, "num_heads": 3}),
        ("beit_base_patch16_224", {"img_size": 48, "embed_dim": 96, "num_heads": 3}),
    ][: 5 if HAS_NEW_TIMM else 2],
)
@torch.no_grad()
def test_timm_inside_transformers_is_reorganized_saved_and_restored(name, options, tmp_path):
    config = transformers.TimmWrapperConfig(architecture=name, model_args={**options, "depth": 4}, num_labels=5)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    size = options["img_size"]
    images = inputs("vit")["pixel_values"][:, :, :size, :size]
    dense = model(images).logits
    reorganize(model, [0.8, 0.5], reorganization_layers=[1, 2])
    output = model(images)
    assert [index.shape[1] for index in output.attentive_index] == [8, 5]
    assert torch.equal(model(images, keep_rate=1.0).logits, dense)
    model.save_pretrained(tmp_path)
    again = reorganize(transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval())
    assert torch.equal(again(images).logits, output.logits)


@pytest.mark.parametrize("case", ["vit", "rope-mixed", "beit"])
def test_timm_models_checkpoint_their_blocks(case):
    gradients, images = [], inputs("vit")["pixel_values"]
    for checkpointing in (False, True):
        model = reorganize(timm_model(case), 0.7, reorganization_layers=LAYERS).train()
        model.set_grad_checkpointing(checkpointing)
        # Two passes at different rates before one backward: state on a module would be that of the second.
        (model(images).sum() + model(images.flip(0), keep_rate=0.5).pow(2).sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "global_pool='avg'"),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "no class token"),
        ("vit_tiny_patch16_224", {"block_fn": timm.models.vision_transformer.ResPostBlock}, "ResPostBlock"),
        ("vit_small_patch16_dinov3", {"global_pool": "max"}, "global_pool='max'"),
        ("vit_medium_patch16_rope_reg1_gap_256", {}, "no class token"),
        ("eva02_tiny_patch14_224", {"patch_drop_rate": 0.1}, "create it with `patch_drop_rate=0`"),
        ("resnet18", {}, "those of the class `VisionTransformer`, `Eva` or `Beit`"),
    ],
)
def test_other_timm_models_are_refused_with_the_reason(name, settings, reason):
    with torch.device("meta"):
        model = timm.create_model(name, **settings)
    with pytest.raises(ValueError, match=f"cannot be reorganized: .*{reason}"):
        reorganize(model)
