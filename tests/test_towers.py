"""What EViT and the families of `reorganize` have in common: settings, layers, operations, attention."""

import pytest
import timm
import torch
import transformers
from conftest import tiny_config_with
from vision_families import CASES, HAS_DINOV2, LAYERS, build, inputs

from evit_hf import EViTForImageClassification, EViTModel, reorganize
from evit_hf.profiling import MacsFormula, count_macs, num_macs
from evit_hf.towers import example_inputs, tower_of


TIMM_ARGS = {"img_size": (32, 48), "patch_size": 8, "depth": 4, "embed_dim": 24}


def timm_vit(**settings):
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
    return timm.models.VisionTransformer(**{**sizes, **settings}).eval()


def model_and_input(case):
    if case == "timm":
        return timm_vit(reg_tokens=2), torch.zeros(1, 3, 48, 48)
    if case == "timm-wrapper":
        config = transformers.TimmWrapperConfig(
            architecture="vit_tiny_patch16_224", model_args=TIMM_ARGS, num_labels=5
        )
        return transformers.TimmWrapperForImageClassification(config).eval(), torch.zeros(1, 3, 32, 48)
    return build(case), next(iter(inputs(case, 1).values()))


@pytest.mark.parametrize("case", [*CASES, "timm", "timm-wrapper"])
def test_formula_of_every_family_equals_the_count_of_pytorch(case):
    model, pixels = model_and_input(case)
    reorganize(model, 0.7, reorganization_layers=LAYERS)
    formula = MacsFormula.of(model, 48 if case == "radio" else None)
    dense = count_macs(model, pixels, keep_rate=1.0)
    for inattentive in ("fused", "dropped", "counted"):
        reorganize(model, inattentive_tokens=inattentive)
        assert formula(0.7, executed=True) == count_macs(model, pixels)
        assert formula(1.0) == formula({}) == dense
        assert formula() == formula(0.7) == formula(dict.fromkeys(LAYERS, 0.7)) < formula({1: 0.7}) < dense
    reorganize(model, 0.5, reorganization_layers=[1])
    assert formula() == formula({1: 0.5})


@pytest.mark.parametrize("rates", [1.0, 0.6, {1: 0.5}, {}])
def test_formulas_of_evit_and_of_vit_with_the_same_sizes_are_equal(rates):
    evit = EViTForImageClassification(tiny_config_with(keep_rate=0.6))
    sizes = {name: getattr(evit.config, name) for name in ("image_size", "patch_size", "hidden_size", "num_labels")}
    sizes |= {name: getattr(evit.config, name) for name in ("num_hidden_layers", "num_attention_heads")}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, intermediate_size=64))
    reorganize(vit, 0.6, reorganization_layers=[1, 2, 3])
    assert MacsFormula.of(vit)(rates) == MacsFormula.of(evit)(rates)
    assert MacsFormula.of(evit)() == num_macs(evit) == num_macs(evit.config)
    assert evit.config.keep_rate == 0.6


def test_operations_follow_the_size_of_the_images():
    model = reorganize(build("dinov2" if HAS_DINOV2 else "dinov3"), 0.7)
    assert num_macs(model, 1.0, (32, 48)) == count_macs(model, torch.zeros(1, 3, 32, 48), keep_rate=1.0)
    with pytest.raises(ValueError, match="does not take images of 40 pixels: "):
        num_macs(reorganize(timm_vit(), 0.7), 0.7, 40)
    with pytest.raises(ValueError, match=r"call `reorganize\(model\)` first"):
        num_macs(build("dinov2"))
    clip = transformers.CLIPModel(CASES["clip-classifier"][1]())
    with pytest.raises(ValueError, match=r"take its image part, `model.vision_model`"):
        num_macs(reorganize(clip))
    assert num_macs(clip.vision_model) == num_macs(reorganize(build("clip")))


@pytest.mark.parametrize(
    ("case", "name", "num_prefix_tokens"),
    [
        ("vit", "layers", 1),
        ("dinov3", "model.layer", 3),
    ]
    + [("dinov2-registers", "dinov2_with_registers.encoder.layer", 4)] * HAS_DINOV2
    + [("clip-classifier", "vision_model.encoder.layers", 1), ("beit", "beit.layers", 1), ("timm", "blocks", 3)],
)
def test_towers_of_families(case, name, num_prefix_tokens):
    model, pixels = model_and_input(case)
    tower = tower_of(model)
    assert (tower.name, tower.num_prefix_tokens, tower.is_reorganized) == (name, num_prefix_tokens, False)
    assert len(tower.layers) == 4
    assert (tower.image_size, tower.patch_size) == ((48, 48), (8, 8))
    assert example_inputs(model).shape == pixels.shape
    reorganize(model, 0.6)
    assert tower_of(model).is_reorganized
    assert tower_of(model).config.keep_rate == 0.6


def test_sound_has_no_patches_of_pictures():
    with pytest.raises(ValueError, match="has no patches of pictures"):
        _ = tower_of(transformers.ASTModel(transformers.ASTConfig(hidden_size=24, num_hidden_layers=1))).patch_size


def test_the_tower_of_an_evit_is_its_backbone(tiny_model):
    tower = tower_of(tiny_model)
    assert (tower.name, tower.config, tower.is_reorganized) == ("vit.layers", tiny_model.config, True)
    assert tower_of(EViTModel(tiny_config_with())).name == "layers"


def test_reorganize_changes_the_settings_of_an_evit(tiny_model):
    assert reorganize(tiny_model) is tiny_model
    assert tiny_model.config.keep_rate == 0.6
    reorganize(tiny_model, [0.9, 0.5], reorganization_layers=(1, 3), inattentive_tokens="dropped")
    config = tiny_model.config
    assert (config.keep_rate, config.reorganization_layers, config.inattentive_tokens) == (
        [0.9, 0.5],
        [1, 3],
        "dropped",
    )
    with pytest.raises(ValueError, match="`keep_rate` has 1 entries"):
        reorganize(tiny_model, [0.9], reorganization_layers=[1, 2])
    assert (config.keep_rate, config.reorganization_layers) == ([0.9, 0.5], [1, 3])


@torch.no_grad()
def test_class_attention_of_a_family_is_that_of_its_attention_maps():
    model = reorganize(build("dinov2-registers", "eager"), 0.5, reorganization_layers=LAYERS)
    pixels = inputs("dinov2")["pixel_values"]
    outputs = model(pixels, keep_rate=1.0, output_class_attention=[0, 3], output_attentions=True)
    maps = torch.stack([outputs.attentions[layer][:, :, 0, -36:].mean(1) for layer in (0, 3)], dim=1)
    torch.testing.assert_close(outputs.class_attention, maps)
    outputs = model(pixels, output_class_attention=True)
    assert outputs.class_attention.shape == (2, 3, 36)
    assert (outputs.class_attention > 0).sum(-1).tolist() == [[36, 18, 10]] * 2 or outputs.patch_index.min() == -1
    assert not hasattr(model(pixels), "class_attention")
    with pytest.raises(ValueError, match=r"list of layers in \[0, 3\], got \[4\]"):
        model(pixels, output_class_attention=[4])
