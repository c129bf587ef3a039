import math

import pytest
import torch
from conftest import tiny_config_with

from evit_hf import EViTForImageClassification, EViTForImageClassificationWithTeacher, EViTLVForImageClassification
from evit_hf.configuration_evit_lv import EViTLVConfig
from evit_training.arguments import OptimizationArguments
from evit_training.learning.optimization import (
    WeightAverage,
    build_optimizer,
    freeze,
    layer_number,
    learning_rate_schedule,
)


def test_norms_biases_positions_and_tokens_have_no_weight_decay(tiny_model):
    optimizer = build_optimizer(tiny_model, OptimizationArguments(weight_decay=0.3), 1e-3)
    names = {id(parameter): name for name, parameter in tiny_model.named_parameters()}
    by_decay = {0.0: set(), 0.3: set()}
    for group in optimizer.param_groups:
        by_decay[group["weight_decay"]] |= {names[id(p)] for p in group["params"]}
    assert by_decay[0.0] | by_decay[0.3] == set(names.values())
    tokens = {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "vit.layernorm.weight"}
    assert tokens <= by_decay[0.0]
    assert all(name.endswith("weight") and "norm" not in name for name in by_decay[0.3])


@pytest.mark.parametrize("family", ["vit", "distilled", "lvvit"])
def test_layer_decay_slows_every_layer_by_the_same_factor(family):
    if family == "lvvit":
        small = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 4, "hidden_size": 32, "stem_hidden_size": 8}
        model = EViTLVForImageClassification(EViTLVConfig(**small, num_attention_heads=2, intermediate_size=64))
    elif family == "distilled":
        model = EViTForImageClassificationWithTeacher(tiny_config_with(use_distillation_token=True))
    else:
        model = EViTForImageClassification(tiny_config_with())
    optimizer = build_optimizer(model, OptimizationArguments(layer_decay=0.5), 1.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(set(rates.values())) == 4 + 2  # embeddings, four layers, what follows
    for name, parameter in model.named_parameters():
        layer = layer_number(name, 4)
        expected = 0 if ".embeddings." in name else int(name.split(".")[2]) + 1 if ".layers." in name else 5
        assert layer == expected, name
        assert rates[id(parameter)] == 0.5 ** (5 - layer), name


def test_a_linear_probe_trains_the_classifier_alone_and_frozen_layers_stay(tiny_model):
    freeze(tiny_model, "head", 0)
    assert {n for n, p in tiny_model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
    optimizer = build_optimizer(tiny_model, OptimizationArguments(), 1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    freeze(tiny_model, "all", 3)
    trained = {name for name, p in tiny_model.named_parameters() if p.requires_grad}
    assert trained == {name for name in dict(tiny_model.named_parameters()) if layer_number(name, 4) > 3}
    freeze(tiny_model, "all", 0)
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())
    with pytest.raises(ValueError, match="`--freeze-layers` is 5, but the model has 4 layers"):
        freeze(tiny_model, "all", 5)


def test_learning_rate_is_a_function_of_the_step(tiny_model):
    arguments = OptimizationArguments(warmup_epochs=2, min_learning_rate=1e-4, layer_decay=0.5)

    def schedule(step):
        optimizer = build_optimizer(tiny_model, arguments, 1e-3)
        return optimizer, learning_rate_schedule(optimizer, arguments, 5, 30, step)

    optimizer, straight = schedule(0)
    for step in range(30):
        resumed, there = schedule(step)
        assert there.get_last_lr() == straight.get_last_lr()
        assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]
        share = step / 10 if step < 10 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 20)) / 2
        assert straight.get_last_lr()[-1] == pytest.approx(1e-3 * share)
        optimizer.step()
        straight.step()


def test_weight_average_follows_the_formula_and_can_be_exchanged():
    model = torch.nn.Linear(2, 1, bias=False)
    average = WeightAverage(model, 0.5)
    expected = model.weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            model.weight.copy_(torch.full((1, 2), float(step)))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.averages[0], expected)
    with average.in_model():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert model.weight.tolist() == [[19.0, 19.0]]
    torch.testing.assert_close(average.averages[0], expected)
