"""timm's Vision Transformers, saved by timm itself, against timm's outputs."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import QuickGELU, SwiGLUPacked
from timm.models._hub import save_for_hf
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock
from transformers import AutoImageProcessor, TimmWrapperForImageClassification
from vision_families import HAS_DINOV2

from evit_hf import (
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVForImageClassification,
    EViTModel,
    convert_checkpoint,
    reorganize,
)
from evit_hf.checkpoint_files import ConversionError


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 5}
SETTINGS = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 0.9, "interpolation": "bilinear"}


def build(architecture="vit_tiny_patch16_224", **changes):
    """A small model of timm whose every parameter matters, none at its initial zero or one."""
    torch.manual_seed(0)
    arguments = {**SMALL, **changes}
    model = timm.create_model(architecture, **arguments).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.arguments = arguments
    return model


def save(model, folder, weights="safetensors", **config):
    """Save as on the Hub, with timm's own function."""
    settings = {**model.pretrained_cfg, **SETTINGS, **config.pop("pretrained_cfg", {})}
    save_for_hf(
        model,
        folder,
        model_config={"pretrained_cfg": settings, **config},
        model_args=model.arguments,
        safe_serialization=weights == "safetensors",
    )
    return folder


# Folders


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_timm_folder_loads_in_one_line(weights, tmp_path, images):
    vit = build()
    save(vit, tmp_path / "vit", weights, label_names=["ant", "bee", "cat", "dog", "elk"])
    model = EViTForImageClassification.from_pretrained(tmp_path / "vit", keep_rate=0.7)
    assert (model.config.keep_rate, model.config.num_attention_heads, model.config.image_size) == (0.7, 4, 32)
    assert model.config.id2label[3] == "dog"
    assert model.config.label2id["elk"] == 4
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(images, keep_rate=1.0).logits, vit(images), rtol=1e-4, atol=1e-5)
        assert [x.shape[1] for x in model(images).attentive_index] == [12, 10, 8]
        converted = convert_checkpoint(tmp_path / "vit")
        torch.testing.assert_close(converted.model(images).logits, vit(images), rtol=1e-4, atol=1e-5)
    assert converted.source_format == "timm"
    assert converted.model.config.keep_rate == 1.0
    assert converted.notes == []  # all is known
    assert converted.model.config.id2label[3] == "dog"
    converted.save_pretrained(tmp_path / "evit")
    again = EViTForImageClassification.from_pretrained(tmp_path / "evit")
    torch.testing.assert_close(again(images).logits, vit(images), rtol=1e-4, atol=1e-5)


def test_keywords_of_from_pretrained_reach_a_timm_folder(tmp_path, images):
    vit = build()
    save(vit, tmp_path)
    model, info = EViTForImageClassification.from_pretrained(
        tmp_path, num_labels=3, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
    )
    assert info["mismatched_keys"]
    assert model.classifier.out_features == 3
    assert model.dtype == torch.float64
    assert model.config._attn_implementation == "eager"
    backbone = EViTModel.from_pretrained(tmp_path, keep_rate=1.0)
    assert backbone.pooler is None
    features = backbone(images).last_hidden_state
    torch.testing.assert_close(features, vit.forward_features(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConversionError, match="is a timm checkpoint: load it with EViTForImageClassification"):
        EViTLVForImageClassification.from_pretrained(tmp_path)


def test_headless_timm_folder_gets_a_new_classifier(tmp_path, images):
    vit = build(num_classes=0)
    save(vit, tmp_path)
    model = EViTForImageClassification.from_pretrained(tmp_path, num_labels=7, keep_rate=1.0)
    torch.testing.assert_close(model.vit(images).last_hidden_state[:, 0], vit(images), rtol=1e-4, atol=1e-5)
    assert model(images).logits.shape == (3, 7)


def test_distilled_timm_folder_keeps_both_classifiers(tmp_path, images):
    deit = build("deit_tiny_distilled_patch16_224")
    save(deit, tmp_path)
    for model in (
        EViTForImageClassification.from_pretrained(tmp_path, keep_rate=1.0),
        EViTForImageClassificationWithTeacher.from_pretrained(tmp_path, keep_rate=1.0),
        convert_checkpoint(tmp_path).model,
    ):
        assert isinstance(model, EViTForImageClassificationWithTeacher)
        torch.testing.assert_close(model(images).logits, deit(images), rtol=1e-4, atol=1e-5)


def test_folder_of_transformers_wrapper_is_a_timm_folder(tmp_path, images):
    vit = build()
    save(vit, tmp_path / "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    del config["model_args"]["num_classes"]  # which Transformers gives to timm twice
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    wrapper = TimmWrapperForImageClassification.from_pretrained(tmp_path / "timm").eval()
    wrapper.save_pretrained(tmp_path / "wrapper")
    model = EViTForImageClassification.from_pretrained(tmp_path / "wrapper", keep_rate=1.0)
    torch.testing.assert_close(model(images).logits, vit(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"img_size": (64, 16)}, {"image_size": [64, 16]}),
        ({"img_size": (56, 48)}, {"image_size": [56, 48]}),
        ({"img_size": 36}, {"image_size": 36}),
        ({"patch_size": (8, 4)}, {"patch_size": [8, 4]}),
        ({"act_layer": "gelu_tanh"}, {"hidden_act": "gelu_pytorch_tanh"}),
        ({"act_layer": "quick_gelu"}, {"hidden_act": "quick_gelu"}),
        ({"qkv_bias": False}, {"qkv_bias": False}),
        ({"mlp_ratio": 3.0}, {"intermediate_size": 192}),
        ({"in_chans": 1}, {"num_channels": 1}),
        ({"in_chans": 4}, {"num_channels": 4}),
        ({"dynamic_img_size": True}, {"image_size": 32}),
    ],
    ids=str,
)
def test_geometry_is_timms(changes, fields, tmp_path):
    vit = build(**changes)
    save(vit, tmp_path)
    size = changes.get("img_size", 32)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(2, changes.get("in_chans", 3), height, width)
    for source in (vit, tmp_path):
        model = convert_checkpoint(source).model
        assert {name: getattr(model.config, name) for name in fields} == fields
        with torch.no_grad():
            torch.testing.assert_close(model(pixels).logits, vit(pixels), rtol=1e-4, atol=1e-5)


def test_published_architectures_know_their_heads(monkeypatch):
    """timm builds each without memory: the table gives the heads, widths, depths and MLP sizes that timm gives."""
    from evit_hf.timm_checkpoints import PLAIN_ARCHITECTURE, SIZES, TEST_SIZES

    names = [name for name in timm.list_models() if PLAIN_ARCHITECTURE.fullmatch(name) or name in TEST_SIZES]
    assert len(names) >= 25
    linspace = torch.linspace  # whose values timm 1.0.20 reads
    monkeypatch.setattr(torch, "linspace", lambda *args, **settings: linspace(*args, **{**settings, "device": "cpu"}))
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=1)
        block = model.blocks[0]
        match = PLAIN_ARCHITECTURE.fullmatch(name)
        size = SIZES[match[1]] if match else TEST_SIZES[name]
        assert size == (model.embed_dim, len(model.blocks), block.attn.num_heads, block.mlp.fc1.out_features), name
        assert block.norm1.eps == 1e-6, name


def test_architecture_without_recorded_arguments_tells_the_heads(tmp_path):
    """Folders on the Hub have no `model_args`: the architecture says how many heads its width has."""
    vit = build(embed_dim=192, num_heads=3, depth=2)
    save(vit, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_args"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    converted = convert_checkpoint(tmp_path)
    assert converted.model.config.num_attention_heads == 3
    assert converted.model.config.image_size == 32
    narrow = build()  # 64 wide, which no vit_tiny is
    torch.save(narrow.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="is not one of the published models: it has width 64"):
        convert_checkpoint(tmp_path)
    with pytest.raises(ConversionError, match="No tensor tells the number of attention heads"):
        EViTForImageClassification.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    for model in (
        convert_checkpoint(tmp_path, num_attention_heads=4).model,
        EViTForImageClassification.from_pretrained(tmp_path, num_attention_heads=4, keep_rate=1.0),
    ):
        torch.testing.assert_close(model(pixels).logits, narrow(pixels), rtol=1e-4, atol=1e-5)


def test_heads_that_contradict_the_source_are_refused(tmp_path):
    vit = build()
    save(vit, tmp_path)
    for source in (vit, tmp_path):
        with pytest.raises(ConversionError, match="`num_attention_heads` is 8, but .* has 4: leave it out"):
            convert_checkpoint(source, num_attention_heads=8)


# Labels


def test_labels_are_taken_from_the_folder(tmp_path):
    vit = build()
    save(vit, tmp_path, label_names={"0": "ant", "4": "elk"}, label_descriptions={"ant": "an insect"})
    converted = convert_checkpoint(tmp_path)
    model = converted.model
    assert converted.unused == {"label_descriptions": "classes are called by their `label_names`"}
    assert model.config.id2label == {0: "ant", 1: "LABEL_1", 2: "LABEL_2", 3: "LABEL_3", 4: "elk"}
    assert convert_checkpoint(tmp_path, labels=list("abcde")).model.config.id2label[0] == "a"
    for names, sentence in (
        (["ant"] * 7, "has 7 names, but `head.weight` has 5 rows"),
        ({"9": "ant"}, "names classes 9 to 9, but `head.weight` has 5 rows"),
        ("ant", "must be a list of names or an object"),
        ({"x": "ant"}, "must be a list of names or an object"),
    ):
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "label_names": names}))
        with pytest.raises(ConversionError, match=sentence):
            convert_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "label_names": None, "num_classes": 1000}))
    with pytest.raises(ConversionError, match="`num_classes` .* is 1000, but `head.weight` has 5 rows"):
        convert_checkpoint(tmp_path)


# Images


def photograph(mode="RGB", size=(152, 100)):
    """Noise. Cropping leaves an even number of pixels: timm and Transformers round halves differently."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("crop", [{"crop_pct": 0.96}, {"crop_pct": 1.0}, {"crop_pct": 0.8, "crop_mode": "squash"}])
def test_processor_gives_timms_pixels(crop, tmp_path):
    vit = build(img_size=48)
    settings = {**SETTINGS, **crop}
    save(vit, tmp_path / "timm", pretrained_cfg=settings)
    transform = timm.data.create_transform((3, 48, 48), **settings)
    converted = convert_checkpoint(tmp_path / "timm")
    converted.save_pretrained(tmp_path / "evit")
    image = photograph()
    for processor in (converted.image_processor, AutoImageProcessor.from_pretrained(tmp_path / "evit")):
        pixels = processor(image, return_tensors="pt").pixel_values[0]
        assert pixels.shape == (3, 48, 48)
        # one step of 255, as torchvision and Pillow round differently
        torch.testing.assert_close(pixels, transform(image), rtol=0, atol=1.01 / 255 / 0.5)


def test_processor_of_the_timm_folder_itself_is_timms(tmp_path):
    """Transformers gives timm's own transform for the folder as it is."""
    save(build(img_size=48), tmp_path, pretrained_cfg={"input_size": (3, 48, 48)})
    image = photograph()
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(pixels, timm.data.create_transform((3, 48, 48), **SETTINGS)(image))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_processor_of_other_channels_gives_their_pixels(channels, mode, tmp_path):
    vit = build(in_chans=channels)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
    converted = convert_checkpoint(vit)
    converted.save_pretrained(tmp_path)
    image = photograph(mode, size=(32, 32))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    # told where the channels are, as older Transformers do not recognize 4 of them
    pixels = processor(image, return_tensors="pt", input_data_format="channels_first").pixel_values
    array = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
    expected = (torch.from_numpy(array / 255).float() - 0.5) / 0.25
    torch.testing.assert_close(pixels[0], expected)
    assert converted.model(pixels).logits.shape == (1, 5)
    vit.pretrained_cfg["mean"] = (0.3, 0.4, 0.5)
    converted = convert_checkpoint(vit)
    assert any("the source gives 3, each is their average" in note for note in converted.notes)
    torch.testing.assert_close(torch.tensor(converted.image_processor.image_mean), torch.tensor([0.4] * channels))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mean": "grey"}, "`mean` must be a list of numbers"),
        ({"std": [0.5, 0.0, 0.5]}, "`std` must be a list of numbers"),
        ({"crop_pct": -1}, "`crop_pct` must be a positive fraction"),
        ({"interpolation": "cubist"}, "`interpolation` must be one of"),
    ],
)
def test_image_settings_that_mean_nothing_are_refused(settings, sentence, tmp_path):
    save(build(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=sentence):
        convert_checkpoint(tmp_path)


# What a ViT is not


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"qk_norm": True}, "qk-norm"),
        ({"pre_norm": True}, "pre-norm"),
        ({"class_token": False, "global_pool": "avg"}, "no class token"),
        ({"global_pool": "avg"}, "pools 'avg'"),
        ({"global_pool": "avg", "fc_norm": False}, "pools 'avg'"),
        ({"global_pool": "map"}, "attention pooling"),
        ({"fc_norm": True}, "average pooling"),
        ({"final_norm": False}, "no norm after the blocks|`final_norm` is False"),
        ({"scale_attn_norm": True}, "a norm inside attention or MLP"),
        ({"act_layer": "relu"}, "The activation is (ReLU|relu)"),
    ],
    ids=str,
)
def test_what_a_vit_is_not_is_named(changes, feature, tmp_path):
    vit = build(**changes)
    save(vit, tmp_path)
    for load in (
        lambda: convert_checkpoint(vit),
        lambda: convert_checkpoint(tmp_path),
        lambda: EViTForImageClassification.from_pretrained(tmp_path),
    ):
        with pytest.raises(ConversionError, match=feature):
            load()


@pytest.mark.parametrize("block", [ResPostBlock, ParallelThingsBlock])
def test_other_blocks_are_named(block):
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(**SMALL, block_fn=block)
    with pytest.raises(ConversionError, match=f"{block.__name__} blocks"):
        convert_checkpoint(vit)
    if block is ParallelThingsBlock:
        with pytest.raises(ConversionError, match="parallel blocks"):
            convert_checkpoint(vit.state_dict(), num_attention_heads=4)


@pytest.mark.parametrize(
    ("architecture", "feature"),
    [
        ("vit_base_patch16_rpn_224", "ResPostBlock"),
        ("vit_base_patch16_xp_224", "parallel blocks"),
        ("vit_small_patch16_18x2_224", "parallel blocks"),
        ("vit_base_patch16_clip_224", "pre-norm"),
        ("deit3_small_patch16_224", "layer scale by its config.json, but has no such tensors"),
        ("vit_small_patch14_reg4_dinov2", "register tokens, with layer scale by its config.json"),
        ("vit_base_patch16_siglip_224", "no class token"),
        ("eva_large_patch14_196", "average pooling"),
        ("resnet18", "the architecture 'resnet18', which is not one of timm's plain Vision Transformers"),
    ],
)
def test_other_architectures_are_named(architecture, feature, tmp_path):
    """Blocks in a different order have the same tensors: the architecture tells."""
    save(build(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_args"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": architecture}))
    with pytest.raises(ConversionError, match=re.escape(feature)):
        convert_checkpoint(tmp_path)


def test_what_timm_alone_computes_is_left_to_reorganize():
    vit, images = build(pre_norm=True, init_values=0.5), torch.randn(2, 3, 32, 32)
    with pytest.raises(ConversionError, match=r"`reorganize` takes the model of timm as it is"):
        convert_checkpoint(vit)
    assert reorganize(vit, keep_rate=0.5)(images, output_attentive_index=True)[1][0].shape == (2, 8)
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(build(global_pool="avg"))
    assert "reorganize" not in str(error.value)  # which refuses it as well


# What DINOv2 of Transformers is


SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 5.5}
DINOV2_CHANGES = {
    "deit3": {"init_values": 0.5, "no_embed_class": True},
    "layer-scale": {"init_values": 0.5, "qkv_bias": False},
    "registers": {"reg_tokens": 2},
    "dinov2-registers": {"init_values": 0.5, "reg_tokens": 4, "no_embed_class": True, "num_classes": 0},
    "giant": {"init_values": 0.5, "num_classes": 0, **SWIGLU},
}


def output_of(model, images, **settings):
    output = model(images, **settings)
    return output.logits if "logits" in output else output.pooler_output


@pytest.mark.parametrize("case", DINOV2_CHANGES if HAS_DINOV2 else [])
@torch.no_grad()
def test_models_with_layer_scale_or_registers_become_dinov2(case, tmp_path, images):
    vit = build(**DINOV2_CHANGES[case])
    expected = vit(images)
    sources = [vit]
    if case != "giant":
        sources.append(save(vit, tmp_path / "timm"))
    for source in sources:
        converted = convert_checkpoint(source, keep_rate=0.7)
        assert type(converted.model).__name__.startswith("Dinov2")
        torch.testing.assert_close(output_of(converted.model, images, keep_rate=1.0), expected, rtol=1e-5, atol=1e-5)
    # The same tokens are kept as by timm's model.
    reorganize(vit, keep_rate=0.7)
    logits, kept = vit(images, output_attentive_index=True)
    output = converted.model(images)
    assert all(torch.equal(index, other) for index, other in zip(output.attentive_index, kept, strict=True))
    torch.testing.assert_close(output_of(converted.model, images), logits, rtol=1e-5, atol=1e-5)
    converted.save_pretrained(tmp_path / "dinov2")
    again = reorganize(type(converted.model).from_pretrained(tmp_path / "dinov2").eval())
    assert torch.equal(output_of(again, images), output_of(converted.model, images))
    assert AutoImageProcessor.from_pretrained(tmp_path / "dinov2").crop_size["height"] == 32


@torch.no_grad()
def test_models_without_a_position_of_the_class_token_become_evit(tmp_path, images):
    vit = build(no_embed_class=True)
    state_dict = vit.state_dict()
    for source in (vit, save(vit, tmp_path), state_dict):
        converted = convert_checkpoint(source, num_attention_heads=4)
        assert type(converted.model) is EViTForImageClassification
        torch.testing.assert_close(converted.model(images).logits, vit(images), rtol=1e-5, atol=1e-5)
    assert state_dict["pos_embed"].shape[1] == 16
    model = EViTForImageClassification.from_pretrained(tmp_path, keep_rate=1.0)
    torch.testing.assert_close(model(images).logits, vit(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_official_files_of_dinov2_and_deit3_are_read(images):
    vit = build(init_values=0.5, num_classes=0)
    state_dict = {**vit.state_dict(), "mask_token": torch.zeros(1, 64)}
    if not HAS_DINOV2:
        with pytest.raises(ConversionError, match=r"update Transformers to 5\.18 or newer"):
            convert_checkpoint(state_dict, num_attention_heads=4)
        return
    converted = convert_checkpoint(state_dict, num_attention_heads=4)
    torch.testing.assert_close(converted.model(images).pooler_output, vit(images), rtol=1e-5, atol=1e-5)
    deit = build(init_values=0.5, no_embed_class=True)
    state_dict = {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): x for name, x in deit.state_dict().items()}
    converted = convert_checkpoint({"model": state_dict}, num_attention_heads=4, labels=list("abcde"))
    torch.testing.assert_close(converted.model(images).logits, deit(images), rtol=1e-5, atol=1e-5)
    assert converted.model.config.id2label[4] == "e"


@pytest.mark.parametrize("changes", [{"init_values": 0.5}, {"reg_tokens": 2}], ids=str)
def test_evit_says_that_dinov2_is_what_a_folder_becomes(changes, tmp_path):
    save(build(**changes), tmp_path)
    with pytest.raises(
        ConversionError, match=r"which no EViT has: `convert_checkpoint` \(`evit convert`\) makes a DINOv2"
    ):
        EViTForImageClassification.from_pretrained(tmp_path)


def test_what_dinov2_is_not_is_named():
    with pytest.raises(ConversionError, match="not a whole number of times as wide"):
        convert_checkpoint(build(init_values=0.5, mlp_ratio=2.5))
    with pytest.raises(ConversionError, match="takes its positions for a square"):
        convert_checkpoint(build(init_values=0.5, img_size=(32, 48)))
    broken = build(init_values=0.5).state_dict()
    with pytest.raises(ConversionError, match="No place for: \\['extra'\\]"):
        convert_checkpoint({**broken, "extra": torch.zeros(1)}, num_attention_heads=4)
    broken["norm.weight"][0] = float("nan")
    with pytest.raises(ConversionError, match="NaN or infinite"):
        convert_checkpoint(broken, num_attention_heads=4)


def test_activations_of_model_objects():
    pixels = torch.randn(2, 3, 32, 32)
    for layer, name in ((QuickGELU, "quick_gelu"), (lambda: torch.nn.GELU("tanh"), "gelu_pytorch_tanh")):
        torch.manual_seed(0)
        vit = timm.models.VisionTransformer(**SMALL, act_layer=layer).eval()
        model = convert_checkpoint(vit).model
        assert model.config.hidden_act == name
        torch.testing.assert_close(model(pixels).logits, vit(pixels), rtol=1e-4, atol=1e-5)


def test_wrapped_model_objects_are_unwrapped():
    vit = build()
    pixels = torch.randn(2, 3, 32, 32)
    for wrapped in (torch.nn.DataParallel(vit), torch.compile(vit), timm.utils.ModelEmaV3(vit)):
        torch.testing.assert_close(convert_checkpoint(wrapped).model(pixels).logits, vit(pixels), rtol=1e-4, atol=1e-5)


def test_timm_models_load_from_the_hub(tmp_path, images):
    """Here from its cache, as no test may need the network."""
    vit = build()
    snapshot = tmp_path / "models--timm--tiny" / "snapshots" / ("0" * 40)
    save(vit, snapshot)
    (tmp_path / "models--timm--tiny" / "refs").mkdir()
    (tmp_path / "models--timm--tiny" / "refs" / "main").write_text("0" * 40)
    model = EViTForImageClassification.from_pretrained("timm/tiny", cache_dir=tmp_path, keep_rate=1.0)
    torch.testing.assert_close(model(images).logits, vit(images), rtol=1e-4, atol=1e-5)
    assert model.config.name_or_path == "timm/tiny"


def test_another_number_of_classes_replaces_the_names(tmp_path):
    save(build(), tmp_path, label_names=list("abcde"))
    model = EViTForImageClassification.from_pretrained(tmp_path, num_labels=2)
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert model.classifier.out_features == 2
    model = EViTForImageClassification.from_pretrained(tmp_path, id2label={0: "x", 1: "y"}, label2id={"x": 0, "y": 1})
    assert model.config.num_labels == 2
    assert model.classifier.out_features == 2
