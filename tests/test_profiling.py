import pytest
import torch
from conftest import tiny_config_with
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vision_families import timm_model

from evit_hf import (
    EViTConfig,
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVConfig,
    EViTLVForImageClassification,
    preset_config,
    reorganize,
)
from evit_hf.profiling import MacsFormula, count_macs, keep_rate_for_macs, num_macs, num_tokens_by_layer


DEIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}


def test_tokens_of_deit_s_at_the_papers_rates():
    tokens = num_tokens_by_layer(EViTConfig(**DEIT_S, keep_rate=0.7))
    assert tokens[2] == (197, 197)
    assert tokens[3] == (197, 140)
    assert tokens[6] == (140, 100)
    assert tokens[9] == (100, 72)
    assert tokens[11] == (72, 72)


@pytest.mark.parametrize(
    ("keep_rate", "fuse", "gmacs"),
    [
        (1.0, True, 4.599),
        (0.9, True, 4.022),
        (0.8, True, 3.477),
        (0.7, True, 3.029),
        (0.6, True, 2.635),
        (0.5, True, 2.309),
        (0.9, False, 3.988),
        (0.8, False, 3.444),
        (0.7, False, 2.997),
        (0.6, False, 2.608),
        (0.5, False, 2.282),
    ],
)
def test_gmacs_of_deit_s_are_the_papers(keep_rate, fuse, gmacs):
    config = EViTConfig(**DEIT_S, keep_rate=keep_rate, inattentive_tokens="fused" if fuse else "dropped")
    assert num_macs(config) / 1e9 == pytest.approx(gmacs, abs=0.001)


@pytest.mark.parametrize(("image_size", "keep_rate", "gmacs"), [(272, 0.7, 4.56), (288, 0.6, 4.50), (304, 0.5, 4.44)])
def test_higher_resolution_at_equal_cost(image_size, keep_rate, gmacs):
    assert num_macs(EViTConfig(**DEIT_S), keep_rate, image_size) / 1e9 == pytest.approx(gmacs, abs=0.005)


@pytest.mark.parametrize(
    ("model_class", "changes"),
    [
        (EViTForImageClassification, {}),
        (EViTForImageClassification, {"inattentive_tokens": "dropped"}),
        (EViTForImageClassification, {"reorganization_layers": [1, 3]}),  # the last layer too
        (EViTForImageClassificationWithTeacher, {"use_distillation_token": True}),
        (
            EViTForImageClassificationWithTeacher,
            {"use_distillation_token": True, "scoring_tokens": "class_and_distillation"},
        ),
    ],
)
@pytest.mark.parametrize("keep_rate", [1.0, 0.95, 0.6])  # of 16 tokens 15 are kept at 0.95, and one is fused
def test_formula_of_executed_operations_equals_the_count_of_pytorch(model_class, changes, keep_rate, images):
    model = model_class(tiny_config_with(**changes, attn_implementation="sdpa"))
    assert count_macs(model, images[:1], keep_rate=keep_rate) == num_macs(model.config, keep_rate, executed=True)
    assert model.training


@pytest.mark.parametrize("model_class", [EViTForImageClassification, EViTLVForImageClassification])
@pytest.mark.parametrize("macs", [0.6, 0.95])
def test_formula_of_executed_operations_holds_where_tokens_are_counted(model_class, macs):
    settings = {"image_size": 64, "keep_rate": None, "macs": macs}
    config = tiny_config_with(**settings)
    if model_class is EViTLVForImageClassification:
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 4}
        config = EViTLVConfig(**settings, **sizes, patch_size=8, stem_hidden_size=4, num_labels=5)
    counted = count_macs(model_class(config), torch.randn(1, 3, 64, 64))
    assert counted == num_macs(config, executed=True) == num_macs(config, executed=True, macs=macs)
    assert num_macs(config) / num_macs(config, 1.0) == pytest.approx(macs, abs=0.02)


@pytest.mark.parametrize("case", ["eva02", "pe", "dinov3", "beit"])
@pytest.mark.parametrize("settings", [{"keep_rate": 0.6}, {"macs": 0.7}], ids=["keep_rate", "macs"])
def test_formulas_of_timms_families_equal_the_count_of_pytorch(case, settings):
    model = reorganize(timm_model(case), **settings)
    formula = MacsFormula.of(model)
    counted = count_macs(model, torch.zeros(1, 3, 48, 48))
    left = model.tokens_of_a_pass(None, None, None)
    assert formula(executed=True) == counted
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert left.plan.layers


def test_formula_of_the_paper_equals_the_count_of_the_papers_order(images):
    """Dropout in training keeps the projection in its place, and hidden states keep the last layer whole."""
    config = tiny_config_with(attn_implementation="eager", hidden_dropout_prob=0.1)
    model = EViTForImageClassification(config)
    dense = count_macs(model, images[:1], keep_rate=1.0, output_hidden_states=True)
    assert dense == num_macs(config, 1.0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.train()(images[:1], keep_rate=0.6, output_hidden_states=True)
    # 16, 11 and 8 tokens are summed; the weighted sums are not in the formula.
    assert counter.get_total_flops() // 2 == num_macs(config, 0.6) + (16 + 11 + 8) * 32


def test_batches_cost_their_size(tiny_model):
    one, four = (count_macs(tiny_model, torch.randn(n, 3, 32, 32)) for n in (1, 4))
    assert four == 4 * one


def meta_model(name):
    config = preset_config(name)
    model_class = EViTForImageClassification
    if "lvvit" in name:
        model_class = EViTLVForImageClassification
    elif config.use_distillation_token:
        model_class = EViTForImageClassificationWithTeacher
    with torch.device("meta"):
        return model_class(config).eval()


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("evit-deit-ti", 5.72),
        ("evit-deit-s", 22.05),
        ("evit-deit-b", 86.57),
        ("evit-lvvit-t", 8.53),
        ("evit-lvvit-s", 26.15),
        ("evit-lvvit-m", 55.83),
    ],
)
def test_parameters_of_the_presets_are_the_published_ones(name, millions):
    num_parameters = sum(parameter.numel() for parameter in meta_model(name).parameters())
    assert num_parameters / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("name", "keep_rate", "gmacs"),
    [
        ("evit-deit-s", 1.0, 4.6),
        ("evit-deit-s", 0.9, 4.0),
        ("evit-deit-s", 0.8, 3.5),
        ("evit-deit-s", 0.7, 3.0),
        ("evit-deit-s", 0.6, 2.6),
        ("evit-deit-s", 0.5, 2.3),
        ("evit-deit-b", 1.0, 17.6),
        ("evit-deit-b", 0.7, 11.6),
        ("evit-lvvit-s", 1.0, 6.6),
        ("evit-lvvit-s", 0.7, 4.7),
        ("evit-deit-s-272", None, 4.6),
        ("evit-deit-s-288", None, 4.5),
        ("evit-deit-s-304", None, 4.4),
        ("evit-deit-s-distilled", 0.7, 3.1),
    ],
)
def test_gmacs_of_the_presets_by_formula_and_counted(name, keep_rate, gmacs):
    model = meta_model(name)
    formula = num_macs(model.config, keep_rate) / 1e9
    size = model.config.image_size
    pixel_values = torch.zeros(1, 3, size, size, device="meta")
    dense = count_macs(model, pixel_values, keep_rate=1.0, output_hidden_states=True)
    assert round(formula, 1) == gmacs
    assert dense == num_macs(model.config, 1.0)
    assert count_macs(model, pixel_values, keep_rate=keep_rate) == num_macs(model.config, keep_rate, executed=True)


def test_presets_take_overrides_and_are_known_by_name():
    config = preset_config("evit-deit-s-288", num_labels=7, inattentive_tokens="dropped")
    assert (config.image_size, config.keep_rate, config.num_labels) == (288, 0.6, 7)
    assert preset_config("evit-lvvit-m").model_type == "evit_lv"
    assert preset_config("evit-lvvit-s").reorganization_layers == [4, 8, 12]
    with pytest.raises(ValueError, match="There is no preset `evit-deit-small`: take one of evit-deit-s"):
        preset_config("evit-deit-small")


def test_bad_keep_rates_are_refused():
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        num_macs(EViTConfig(), keep_rate=2)


@pytest.mark.parametrize(("image_size", "keep_rate"), [(224, 1.0), (272, 0.7), (288, 0.6), (304, 0.5)])
def test_keep_rates_for_equal_cost_are_those_of_the_paper(image_size, keep_rate):
    config = preset_config("evit-deit-s")
    budget = num_macs(config, 1.0)
    assert keep_rate_for_macs(config, budget, image_size) == keep_rate
    assert num_macs(config, keep_rate, image_size) <= budget
    if keep_rate < 1:
        assert num_macs(config, keep_rate + 0.1, image_size) > budget
        finer = keep_rate_for_macs(config, budget, image_size, decimals=2)
        assert keep_rate <= finer < keep_rate + 0.1


def test_a_budget_that_no_keep_rate_meets_is_refused():
    config = preset_config("evit-deit-s")
    with pytest.raises(ValueError, match=r"down to 4.60 GMACs: at `image_size` 384 it costs 4.98 even at 0.1"):
        keep_rate_for_macs(config, num_macs(config, 1.0), 384)
