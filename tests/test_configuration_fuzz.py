"""A damaged config.json is refused by the name of its field, or it loads and answers with numbers."""

import copy
import json
import random
import time

import pytest
import torch
from conftest import tiny_config_with

from evit_hf import EViTConfig, EViTForImageClassification, EViTLVConfig, EViTLVForImageClassification


# What a flipped bit, a wrong hand or a wrong tool leaves in a value.
VALUES = [None, True, False, 0, 1, 2, 3, -1, 7, 48, 1000, 10**5, 2**31, 10**12, 10**30, 0.0, -0.0, 0.3, 1.0, 1.5, -2.5]
VALUES += [
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "0.7",
    "gelu",
    "relu",
    "softmax",
    "float16",
]
VALUES += [
    "load",
    "NaN",
    "a" * 5000,
    [],
    [0],
    [1, 2],
    [32, 32],
    [0.5, 0.5, 0.5],
    [-1],
    [None],
    [[]],
    ["a"],
    [1] * 10**4,
]
VALUES += [{}, {"a": 1}, {"0": "a"}, {"0": "a", "1": "b"}, {"-1": "a"}, {"x": {}}, {"0": 1}]
EXTRA_KEYS = ["head_dim", "num_labels", "torch_dtype", "output_attentions", "quantization_config", "per_layer_config"]


def mutated(config, rng):
    """The same configuration with one or two entries changed, and their names."""
    config = copy.deepcopy(config)
    names = rng.sample([*config, *EXTRA_KEYS], rng.choice([1, 1, 1, 2]))
    for name in names:
        value, kind = config.get(name), rng.random()
        if kind < 0.05:
            config.pop(name, None)
        elif kind < 0.3 and isinstance(value, (int, float)) and not isinstance(value, bool):
            config[name] = rng.choice(
                [-value, value * 2, value / 2, value + 1, value - 1, value * 10**6, str(value), [value]]
            )
        else:
            config[name] = rng.choice(VALUES)
    return config, names


def outcome(folder, model_class, config):
    """Load it and run it: the error, or None if the logits are numbers."""
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = model_class.from_pretrained(folder).eval()
        height, width = model.vit.embeddings.image_size
        with torch.no_grad():
            outputs = model(torch.randn(1, model.config.num_channels, height, width), return_dict=True)
    except Exception as error:
        return error
    assert outputs.logits.isfinite().all()
    return None


def survive(folder, kind, num_mutations, seed):
    torch.manual_seed(0)
    if kind == "evit":
        model_class, model = EViTForImageClassification, EViTForImageClassification(tiny_config_with(num_labels=3))
    else:
        size = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = EViTLVConfig(**size, intermediate_size=32, num_labels=3, stem_hidden_size=4)
        model_class, model = EViTLVForImageClassification, EViTLVForImageClassification(config)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    rng, num_refused = random.Random(seed), 0
    for i in range(num_mutations):
        damaged, names = mutated(config, rng)
        start = time.process_time()
        error = outcome(folder, model_class, damaged)
        what = f"mutation {i} of seed {seed}: { {name: damaged.get(name) for name in names} }"[:500]
        assert time.process_time() - start < 20, what
        if error is not None:
            num_refused += 1
            named = [name for name in {*config, *EXTRA_KEYS, "position_embeddings"} if name in str(error)]
            assert named, f"{what} raised {type(error).__name__}: {str(error)[:500]}"
            assert not isinstance(error, (AttributeError, KeyError, IndexError, MemoryError)), what
    assert num_refused > num_mutations / 4


@pytest.mark.parametrize(("kind", "num_mutations"), [("evit", 200), ("lv", 50)])
def test_damaged_configurations_are_refused_by_field_or_give_numbers(kind, num_mutations, tmp_path):
    survive(tmp_path, kind, num_mutations, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_mutations"), [("evit", 2000), ("lv", 500)])
def test_2500_damaged_configurations(kind, num_mutations, tmp_path):
    survive(tmp_path, kind, num_mutations, seed=1)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"hidden_size": 0}, "`hidden_size` must be a whole number from 1 to 65536, got 0: ViT-B has 768"),
        ({"hidden_size": 2**31}, "`hidden_size` must be a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers` must be a whole number from 1 to 256, got 1000000000"),
        ({"num_attention_heads": 5}, "`num_attention_heads` must divide `hidden_size`, got 5 and 768"),
        ({"image_size": [224]}, r"`image_size` must be one whole number of pixels.*got \[224\]"),
        ({"image_size": 8}, "`image_size` 8 with `patch_size` 16 makes 0x0 patches"),
        ({"image_size": 2**14, "patch_size": 1}, "`image_size` 16384 with `patch_size` 1 makes 16384x16384 patches"),
        ({"hidden_size": 2**16, "num_attention_heads": 1024, "num_hidden_layers": 256}, "billion parameters"),
        ({"layer_norm_eps": -1.0}, r"`layer_norm_eps` must be in \(0, 1\], got -1.0: ViT has 1e-12"),
        ({"layer_norm_eps": float("nan")}, "`layer_norm_eps` must be in"),
        ({"initializer_range": float("inf")}, "`initializer_range` must be in"),
        ({"hidden_dropout_prob": 1.5}, r"`hidden_dropout_prob` must be in \[0, 1\), got 1.5"),
        ({"attention_probs_dropout_prob": -0.1}, "`attention_probs_dropout_prob` must be in"),
        ({"hidden_act": "gelo"}, "`hidden_act` must be the name of an activation of Transformers, got 'gelo'"),
        ({"num_labels": 10**9}, "`num_labels` must be a whole number from 0 to"),
        ({"num_labels": -1}, "`num_labels` must be a whole number from 0 to"),
        ({"id2label": {"cat": "0"}}, "`id2label` must have class numbers as keys"),
        ({"dtype": "load"}, "`dtype` must be one of float32, float16, bfloat16, float64, got 'load': leave it out"),
        ({"torch_dtype": "int8"}, "`torch_dtype` must be one of"),
        ({"drop_path_rate": float("nan")}, "`drop_path_rate` must be in"),
    ],
)
def test_sizes_that_no_vit_has_are_refused_before_anything_is_built(bad, sentence):
    with pytest.raises(Exception, match=sentence):
        EViTConfig(**bad)


def test_quantization_by_null_is_none():
    assert not hasattr(EViTConfig(quantization_config=None), "quantization_config")
