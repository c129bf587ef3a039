import json
import logging

import pytest
from conftest import DATA
from huggingface_hub.errors import StrictDataclassError
from transformers import ViTConfig

from evit_hf import EViTConfig, EViTLVConfig


def test_defaults_are_the_papers():
    config = EViTConfig()
    assert config.reorganization_layers == [3, 6, 9]
    assert config.keep_rate == 0.7
    assert config.inattentive_tokens == "fused"
    assert config.layer_keep_rates == {3: 0.7, 6: 0.7, 9: 0.7}


@pytest.mark.parametrize(("depth", "layers"), [(16, [4, 8, 12]), (24, [6, 12, 18]), (4, [1, 2, 3]), (2, [0, 1])])
def test_other_depths_reorganize_at_the_same_quarters(depth, layers):
    assert EViTConfig(num_hidden_layers=depth).reorganization_layers == layers


def test_json_round_trip_is_equal(tmp_path):
    config = EViTConfig(keep_rate=(0.9, 0.8), reorganization_layers=(2, 5), drop_path_rate=0.1, num_labels=3)
    config.save_pretrained(tmp_path)
    assert EViTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert config.keep_rate == [0.9, 0.8]


def test_config_json_holds_our_keys_and_a_vits(tmp_path):
    EViTConfig().save_pretrained(tmp_path)
    keys = set(json.loads((tmp_path / "config.json").read_text()))
    vit = json.loads((DATA / "transformers_4" / "vit_backbone" / "config.json").read_text())
    ours = {"keep_rate", "macs", "reorganization_layers", "inattentive_tokens", "drop_path_rate", "auto_map"}
    ours |= {"use_distillation_token", "scoring_tokens"}
    assert keys - set(vit) == ours | ({"return_dict", "output_hidden_states"} & keys)


def test_a_vits_configuration_becomes_an_evits():
    config = EViTConfig.from_pretrained(DATA / "transformers_4" / "vit", keep_rate=0.5)
    assert config.model_type == "evit"
    assert config.to_dict()["model_type"] == "evit"
    assert (config.keep_rate, config.reorganization_layers, config.hidden_size) == (0.5, [3, 6, 9], 48)


def test_overrides_are_checked_together(tmp_path):
    EViTConfig(keep_rate=[0.9, 0.8, 0.7]).save_pretrained(tmp_path)
    config = EViTConfig.from_pretrained(tmp_path, reorganization_layers=[2, 4], keep_rate=[0.5, 0.4])
    assert config.layer_keep_rates == {2: 0.5, 4: 0.4}


def test_a_deits_configuration_has_a_distillation_token():
    config = EViTConfig.from_pretrained(DATA / "transformers_4" / "deit")
    assert (config.model_type, config.use_distillation_token, config.num_prefix_tokens) == ("evit", True, 2)
    assert config.num_scoring_tokens == 1
    config.scoring_tokens = "class_and_distillation"
    assert config.num_scoring_tokens == 2


def test_a_foreign_model_type_never_shadows_ours():
    assert EViTConfig(model_type="vit").model_type == "evit"
    assert EViTConfig(**ViTConfig().to_dict()).to_dict()["model_type"] == "evit"


def test_other_model_types_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    with pytest.raises(ValueError, match="model of type 'swin', but EViTConfig loads 'evit', 'vit', 'deit'"):
        EViTConfig.from_pretrained(tmp_path)
    EViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model of type 'evit', but EViTLVConfig loads 'evit_lv': its weights"):
        EViTLVConfig.from_pretrained(tmp_path)


BAD_VALUES = [
    ({"keep_rate": 0}, r"`keep_rate` must be in \(0, 1\].*got 0: pass the share"),
    ({"keep_rate": 1.01}, r"`keep_rate` must be in \(0, 1\].*got 1.01"),
    ({"keep_rate": float("nan")}, r"`keep_rate` must be in"),
    ({"keep_rate": "0.7"}, r"`keep_rate` must be in .*got '0.7'"),
    ({"keep_rate": True}, r"`keep_rate` must be in .*got True"),
    ({"keep_rate": [0.7, 0.7, -1]}, r"`keep_rate` must be in .*got \[0.7, 0.7, -1\]"),
    ({"keep_rate": [0.7, 0.7]}, r"has 2 entries.*names 3 layers: pass one number for all layers, or one for each"),
    ({"reorganization_layers": [3, 3]}, r"strictly increasing, got \[3, 3\]: pass \[3\]"),
    ({"reorganization_layers": [6, 3]}, r"strictly increasing, got \[6, 3\]"),
    ({"reorganization_layers": [12]}, r"must be in \[0, 11\] for 12 layers, got \[12\]"),
    ({"reorganization_layers": [-1]}, r"must be in \[0, 11\]"),
    ({"reorganization_layers": 3}, r"must be a list of zero-based layer numbers, got 3: for example \[3, 6, 9\]"),
    ({"reorganization_layers": [3.0]}, r"must be a list of zero-based layer numbers"),
    ({"inattentive_tokens": "merged"}, r"must be 'fused', 'dropped' or 'counted', got 'merged': the paper's is"),
    ({"inattentive_tokens": 1}, r"must be 'fused', 'dropped' or 'counted', got 1"),
    ({"macs": 0}, r"`macs` must be in \(0, 1\], got 0: pass the share of"),
    ({"macs": "half"}, r"`macs` must be in \(0, 1\], got 'half'"),
    ({"drop_path_rate": 1.0}, r"`drop_path_rate` must be in \[0, 1\), got 1.0"),
    ({"drop_path_rate": "a"}, r"`drop_path_rate` must be in \[0, 1\), got 'a'"),
    ({"use_distillation_token": 1}, r"`use_distillation_token` must be True or False, got 1"),
    ({"scoring_tokens": "mean"}, r"`scoring_tokens` must be 'class' or 'class_and_distillation', got 'mean'"),
    ({"scoring_tokens": "class_and_distillation"}, r"there is no distillation token: pass 'class', or"),
]


@pytest.mark.parametrize(("bad", "sentence"), BAD_VALUES)
def test_bad_values_are_refused_when_built(bad, sentence):
    with pytest.raises(StrictDataclassError, match=sentence):
        EViTConfig(**bad)


@pytest.mark.parametrize(("bad", "sentence"), BAD_VALUES)
def test_bad_values_are_refused_when_set_later_and_leave_no_trace(bad, sentence):
    config = EViTConfig()
    before = config.to_dict()
    (name, value), *_ = bad.items()
    with pytest.raises(ValueError, match=sentence):
        setattr(config, name, value)
    assert config.to_dict() == before


def test_no_keep_rate_can_be_set_later():
    config = EViTConfig()
    with pytest.raises(ValueError, match=r"`keep_rate` must be in .*got None"):
        config.keep_rate = None
    assert config.keep_rate == 0.7


def test_macs_and_keep_rate_replace_each_other():
    config = EViTConfig(macs=0.66)
    recipe = {"keep_rate": None, "macs": 0.66, "reorganization_layers": [*range(12)], "inattentive_tokens": "counted"}
    assert {name: getattr(config, name) for name in recipe} == recipe
    config.macs = 0.5
    assert (config.macs, config.inattentive_tokens) == (0.5, "counted")
    config.keep_rate = 0.5
    papers = {"keep_rate": 0.5, "macs": None, "reorganization_layers": [3, 6, 9], "inattentive_tokens": "fused"}
    assert {name: getattr(config, name) for name in recipe} == papers
    config.inattentive_tokens = "dropped"
    config.keep_rate = 0.7  # within one way the other settings stay
    assert config.inattentive_tokens == "dropped"
    config.macs = 0.66
    assert config.to_dict() == EViTConfig(macs=0.66).to_dict()


def test_macs_survive_json(tmp_path):
    config = EViTConfig(macs=0.6, reorganization_layers=[2, 4])
    config.save_pretrained(tmp_path)
    assert EViTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert EViTConfig.from_pretrained(tmp_path, macs=0.5).reorganization_layers == [2, 4]
    changed = EViTConfig.from_pretrained(tmp_path, keep_rate=0.5)
    assert (changed.macs, changed.reorganization_layers, changed.inattentive_tokens) == (None, [3, 6, 9], "fused")
    EViTConfig(inattentive_tokens="dropped").save_pretrained(tmp_path)
    changed = EViTConfig.from_pretrained(tmp_path, macs=0.5)
    assert (changed.keep_rate, changed.inattentive_tokens) == (None, "counted")


def test_macs_together_with_keep_rate_are_refused():
    with pytest.raises(ValueError, match=r"`keep_rate` 0.7 and `macs` 0.5 both say how many tokens are kept: pass"):
        EViTConfig(macs=0.5, keep_rate=0.7)


def test_the_old_name_of_inattentive_tokens_is_read_with_a_word(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("evit_hf"), "propagate", True)
    for fuses, value in ((True, "fused"), (False, "dropped")):
        assert EViTConfig(fuse_inattentive_tokens=fuses).inattentive_tokens == value
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "evit", "fuse_inattentive_tokens": fuses}))
        config = EViTConfig.from_pretrained(tmp_path)
        assert config.inattentive_tokens == value
        assert "fuse_inattentive_tokens" not in config.to_dict()
        config.fuse_inattentive_tokens = not fuses
        assert config.inattentive_tokens != value
        assert f"`fuse_inattentive_tokens={fuses}` is `inattentive_tokens='{value}'` now" in caplog.text
    assert EViTConfig.from_pretrained(tmp_path, fuse_inattentive_tokens=True).inattentive_tokens == "fused"
    assert EViTConfig.from_pretrained(tmp_path, inattentive_tokens="counted").inattentive_tokens == "counted"
    with pytest.raises(ValueError, match="must be True or False, got 'no': it is `inattentive_tokens` now"):
        EViTConfig(fuse_inattentive_tokens="no")
    with pytest.raises(ValueError, match="`fuse_inattentive_tokens` True contradicts `inattentive_tokens` 'counted'"):
        EViTConfig(fuse_inattentive_tokens=True, inattentive_tokens="counted")


def test_good_values_can_be_set_later():
    config = EViTConfig()
    config.keep_rate = (0.9, 0.8, 0.7)
    assert config.layer_keep_rates == {3: 0.9, 6: 0.8, 9: 0.7}
    config.keep_rate = 1
    config.reorganization_layers = []
    assert config.layer_keep_rates == {}


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("keep_rat", "keep_rate"),
        ("keep_rates", "keep_rate"),
        ("keep_ratio", "keep_rate"),
        ("reorganisation_layers", "reorganization_layers"),
        ("reorganization_layer", "reorganization_layers"),
        ("inattentive_token", "inattentive_tokens"),
        ("droppath_rate", "drop_path_rate"),
        ("base_keep_rate", "keep_rate"),
        ("drop_loc", "reorganization_layers"),
        ("fuse_token", "inattentive_tokens"),
    ],
)
def test_misspelt_fields_are_refused_with_the_right_name(misspelt, meant, tmp_path):
    with pytest.raises(TypeError, match=f"`{misspelt}` is not a keyword of EViT: did you mean `{meant}`"):
        EViTConfig(**{misspelt: 0.5})
    EViTConfig().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=f"did you mean `{meant}`"):
        EViTConfig.from_pretrained(tmp_path, **{misspelt: 0.5})


def test_foreign_fields_pass():
    config = EViTConfig(num_labels=7, my_note="x", drop_rate=0.1, num_register_tokens=4)
    assert (config.num_labels, config.my_note, config.num_register_tokens) == (7, "x", 4)
