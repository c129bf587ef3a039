import math

import pytest
import torch
from conftest import tiny_config_with

from evit_hf import EViTConfig, EViTForImageClassification
from evit_hf.profiling import count_macs, num_macs, num_tokens_by_layer


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
    config = EViTConfig(**DEIT_S, keep_rate=keep_rate, fuse_inattentive_tokens=fuse)
    assert num_macs(config) / 1e9 == pytest.approx(gmacs, abs=0.001)


@pytest.mark.parametrize(("image_size", "keep_rate", "gmacs"), [(272, 0.7, 4.56), (288, 0.6, 4.50), (304, 0.5, 4.44)])
def test_higher_resolution_at_equal_cost(image_size, keep_rate, gmacs):
    assert num_macs(EViTConfig(**DEIT_S), keep_rate, image_size) / 1e9 == pytest.approx(gmacs, abs=0.005)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("keep_rate", "fuse"), [(1.0, True), (0.6, True), (0.6, False), ([0.9, 0.5, 0.3], True)])
def test_formula_equals_the_count_of_pytorch(implementation, keep_rate, fuse, images):
    config = tiny_config_with(fuse_inattentive_tokens=fuse, attn_implementation=implementation)
    model = EViTForImageClassification(config)
    counted = count_macs(model, images[:1], keep_rate=keep_rate)
    formula = num_macs(config, keep_rate)
    # The reorganization itself is not in the formula: a row of attention beside sdpa, the weighted sum of the tokens.
    reorganization = 0
    rates = dict(zip((1, 2, 3), keep_rate if isinstance(keep_rate, list) else [keep_rate] * 3, strict=True))
    for i, (before, _) in enumerate(num_tokens_by_layer(config, keep_rate)):
        if i in rates and math.ceil(rates[i] * (before - 1)) < before - 1:
            reorganization += (before * 32 if implementation == "sdpa" else 0) + ((before - 1) * 32 if fuse else 0)
    assert counted == formula + reorganization
    assert model.training


def test_batches_cost_their_size(tiny_model):
    one, four = (count_macs(tiny_model, torch.randn(n, 3, 32, 32)) for n in (1, 4))
    assert four == 4 * one


def test_bad_keep_rates_are_refused():
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        num_macs(EViTConfig(), keep_rate=2)
