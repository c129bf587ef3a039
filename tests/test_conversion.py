"""Each public format, written as its own framework writes it, against that framework's outputs."""

import argparse
import json
import os

import pytest
import timm
import torch
from conftest import DATA, tiny_config_with
from golden import official_cases, official_tensors
from real_processes import evit
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from evit_hf import (
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVForImageClassification,
    EViTModel,
    preset_config,
)
from evit_hf.conversion import ConversionError, convert_checkpoint, read_labels
from evit_hf.profiling import num_tokens_by_layer


def official_weights(file="evit_official_tiny"):
    tensors = load_file(DATA / f"{file}.safetensors")
    return {name.removeprefix("weights."): x for name, x in tensors.items() if name.startswith("weights.")}


def write_official(path, weights=None, **settings):
    """A file as the official training script writes it."""
    torch.save(
        {
            "model": weights or official_weights(),
            "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]},
            "lr_scheduler": {"base_values": [1e-3]},
            "epoch": 29,
            "scaler": {"scale": 65536.0},
            "args": argparse.Namespace(model="deit_small_patch16_shrink_base", input_size=64, lr=2e-5, **settings),
        },
        path,
    )
    return path


def timm_vit(**settings):
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**{**small, **settings}).eval()


# Formats


@pytest.mark.parametrize("name", ["keep_0.7_fuse", "keep_0.7_drop", "keep_0.5_fuse", "keep_0.9_drop"])
def test_official_evit_file_gives_the_official_outputs(name, tmp_path):
    case, golden = official_cases()[name], official_tensors()
    file = write_official(
        tmp_path / "evit.pth", base_keep_rate=case["keep"], drop_loc="(3, 6, 9)", fuse_token=case["fuse"]
    )
    converted = convert_checkpoint(file, num_attention_heads=3)
    assert converted.source_format == "official EViT"
    assert set(converted.unused) == {"optimizer", "lr_scheduler", "epoch", "scaler"}
    config = converted.model.config
    assert (config.keep_rate, config.reorganization_layers) == (case["keep"], [3, 6, 9])
    assert (config.inattentive_tokens == "fused") == case["fuse"]
    logits = converted.model(golden[f"{name}.pixel_values"]).logits
    torch.testing.assert_close(logits, golden[f"{name}.logits"], rtol=1e-4, atol=1e-5)


def test_deit_file_gives_the_official_dense_outputs(tmp_path):
    golden = official_tensors()
    torch.save({"model": official_weights()}, tmp_path / "deit.pth")
    converted = convert_checkpoint(tmp_path / "deit.pth", num_attention_heads=3)
    assert converted.source_format == "DeiT or timm"
    assert converted.model.config.keep_rate == 1.0
    logits = converted.model(golden["keep_1.0.pixel_values"]).logits
    torch.testing.assert_close(logits, golden["keep_1.0.logits"], rtol=1e-4, atol=1e-5)
    reorganized = convert_checkpoint(tmp_path / "deit.pth", num_attention_heads=3, keep_rate=0.7)
    logits = reorganized.model(golden["keep_0.7_fuse.pixel_values"]).logits
    torch.testing.assert_close(logits, golden["keep_0.7_fuse.logits"], rtol=1e-4, atol=1e-5)


def test_token_reduction_file_keeps_its_own_token_counts(tmp_path):
    """Of 64 initial patches rate 0.7 keeps 44, 31 and 21, where EViT's own rate 0.7 keeps 45, 33 and 24."""
    settings = {"keep_rate": [0.7], "reduction_loc": [3, 6, 9]}
    file = tmp_path / "checkpoint.pth"
    for method, fuse in (("evit", True), ("topk", False)):
        namespace = argparse.Namespace(model=f"{method}_small_patch16_224", **settings)
        torch.save({"model": official_weights(), "args": namespace}, file)
        converted = convert_checkpoint(file, num_attention_heads=3)
        assert converted.source_format == "TokenReduction"
        config = converted.model.config
        assert (config.inattentive_tokens == "fused") == fuse
        after = [num_tokens_by_layer(config)[layer][1] - 1 - fuse for layer in (3, 6, 9)]
        assert after == [int(0.7**i * 64) for i in (1, 2, 3)] == [44, 31, 21]
        outputs = converted.model(official_tensors()["keep_1.0.pixel_values"])
        assert [index.shape[1] for index in outputs.attentive_index] == after


def test_token_reduction_models_that_do_something_else_are_refused(tmp_path):
    namespace = argparse.Namespace(model="tome_small_patch16_224", keep_rate=[0.7], reduction_loc=[3, 6, 9])
    torch.save({"model": official_weights(), "args": namespace}, tmp_path / "tome.pth")
    with pytest.raises(ConversionError, match="`tome_small_patch16_224` reduces tokens in a different way"):
        convert_checkpoint(tmp_path / "tome.pth", num_attention_heads=3)
    growing = argparse.Namespace(model="topk_small_patch16_224", keep_rate=[0.5, 0.9], reduction_loc=[3, 6])
    torch.save({"model": official_weights(), "args": growing}, tmp_path / "growing.pth")
    with pytest.raises(ConversionError, match="keeps 51 of 64 initial tokens, but only 32 arrive"):
        convert_checkpoint(tmp_path / "growing.pth", num_attention_heads=3)


@pytest.mark.parametrize("wrapped", [True, False])
def test_lvvit_file_gives_the_official_dense_outputs(wrapped, tmp_path):
    golden = load_file(DATA / "lvvit_official_tiny.safetensors")
    weights = {f"module.{name}": x for name, x in official_weights("lvvit_official_tiny").items()}
    torch.save({"state_dict": weights, "epoch": 1} if wrapped else weights, tmp_path / "lvvit_s.pth.tar")
    converted = convert_checkpoint(tmp_path / "lvvit_s.pth.tar", num_attention_heads=3, residual_scale=2.0)
    assert converted.source_format == "LV-ViT"
    assert isinstance(converted.model, EViTLVForImageClassification)
    logits = converted.model(golden["pixel_values"]).logits
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ConversionError, match="width 48 and depth 16 is not one of the published ones: give its `skip_lam`"
    ):
        convert_checkpoint(tmp_path / "lvvit_s.pth.tar", num_attention_heads=3)


def test_published_lvvits_are_known_by_their_size():
    torch.manual_seed(0)
    model = EViTLVForImageClassification(preset_config("evit-lvvit-t", num_labels=3))
    names = {"classifier": "head", "aux_classifier": "aux_head"}
    weights = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("vit.").replace("layers.", "blocks.").replace("layernorm_before", "norm1")
        name = name.replace("layernorm_after", "norm2").replace("attention.o_proj", "attn.proj")
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("embeddings.patch_embeddings", "patch_embed").replace("embeddings.cls_token", "cls_token")
        name = name.replace("embeddings.position_embeddings", "pos_embed").replace("layernorm.", "norm.")
        head, _, rest = name.partition(".")
        weights[f"{names[head]}.{rest}" if head in names else name] = tensor
    for i in range(12):
        parts = [weights.pop(f"blocks.{i}.attention.{letter}_proj.weight") for letter in "qkv"]
        weights[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
    config = convert_checkpoint(weights).model.config
    assert (config.num_attention_heads, config.residual_scale, config.image_size) == (4, 1.0, 224)


@pytest.mark.parametrize("form", ["object", "state_dict", "pth", "safetensors"])
def test_timm_vit_gives_timms_outputs(form, tmp_path, images):
    vit = timm_vit()
    source = vit
    if form == "state_dict":
        source = vit.state_dict()
    elif form == "pth":
        source = tmp_path / "vit.pth"
        torch.save(vit.state_dict(), source)
    elif form == "safetensors":
        source = tmp_path / "model.safetensors"
        save_file(vit.state_dict(), source)
    heads = {} if form == "object" else {"num_attention_heads": 2}  # no tensor tells them
    converted = convert_checkpoint(source, **heads)
    assert converted.model.config.num_attention_heads == 2
    assert (form == "object") == (not converted.notes)  # the images are assumed where no object tells them
    torch.testing.assert_close(converted.model(images).logits, vit(images), rtol=1e-4, atol=1e-5)
    assert convert_checkpoint(source, **heads, keep_rate=0.5).model(images).attentive_index[0].shape == (3, 8)


def test_timm_distilled_deit_gives_timms_outputs(images):
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 5}
    deit = timm.models.deit.VisionTransformerDistilled(**small).eval()
    torch.nn.init.normal_(deit.dist_token)
    converted = convert_checkpoint(deit)
    assert isinstance(converted.model, EViTForImageClassificationWithTeacher)
    assert converted.model.config.num_attention_heads == 4
    torch.testing.assert_close(converted.model(images).logits, deit(images), rtol=1e-4, atol=1e-5)


def test_timm_backbone_without_head(images):
    vit = timm_vit(num_classes=0)
    converted = convert_checkpoint(vit)
    assert isinstance(converted.model, EViTModel)
    torch.testing.assert_close(converted.model(images).last_hidden_state[:, 0], vit(images), rtol=1e-4, atol=1e-5)


def test_timms_image_settings_go_into_the_processor(tmp_path):
    vit = timm_vit(img_size=224, patch_size=32)
    vit.pretrained_cfg = {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.4, 0.4, 0.4),
        "crop_pct": 0.9,
        "interpolation": "bilinear",
    }
    convert_checkpoint(vit).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (settings["image_mean"], settings["image_std"], settings["resample"]) == ([0.5] * 3, [0.4] * 3, 2)
    assert settings["size"] == {"shortest_edge": 248}
    assert settings["crop_size"] == {"height": 224, "width": 224}


@pytest.mark.parametrize("folder", ["vit", "deit", "deit_distilled", "vit_backbone"])
def test_transformers_4_folders_give_their_dense_outputs(folder):
    expected = load_file(DATA / "transformers_4" / folder / "expected_dense_output.safetensors")
    converted = convert_checkpoint(DATA / "transformers_4" / folder)
    assert converted.model.config.keep_rate == 1.0
    outputs = converted.model(expected["pixel_values"])
    output = outputs.last_hidden_state if folder == "vit_backbone" else outputs.logits
    torch.testing.assert_close(output, expected["output"], rtol=1e-5, atol=1e-5)


def test_transformers_5_folders_give_their_own_outputs(tmp_path, images):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    small |= {"image_size": 32, "patch_size": 8, "num_labels": 5, "initializer_range": 0.2}
    vit, vit_model = ViTForImageClassification(ViTConfig(**small)), ViTModel(ViTConfig(**small))
    deit = DeiTForImageClassificationWithTeacher(DeiTConfig(**small))
    for i, source in enumerate((vit, vit_model, deit)):
        source.eval().save_pretrained(tmp_path / str(i))
        converted = convert_checkpoint(tmp_path / str(i)).model(images)
        for name in ("logits", "pooler_output"):
            if hasattr(source(images), name):
                torch.testing.assert_close(converted[name], source(images)[name], rtol=1e-5, atol=1e-5)


# What goes in must come out


def test_every_tensor_is_named_if_it_does_not_fit():
    weights = official_weights()
    weights["blocks.2.ls1.gamma"] = torch.ones(48)
    weights["fc_norm.weight"] = torch.ones(48)
    del weights["blocks.7.mlp.fc1.bias"]
    weights["head.bias"] = torch.zeros(9)
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(weights, num_attention_heads=3)
    for part in (
        "Not filled: ['vit.layers.7.mlp.fc1.bias']",
        "No place for: ['blocks.2.ls1.gamma', 'fc_norm.weight']",
        "Of a different shape: ['classifier.bias (9,) instead of (10,)']",
    ):
        assert part in str(error.value)


def test_sources_that_cannot_be_evits_are_refused(tmp_path):
    def refused(sentence, source, **settings):
        with pytest.raises(ConversionError, match=sentence):
            convert_checkpoint(source, **settings)

    refused("Not recognized: no .* among 1 entries", {"weight": torch.zeros(2)})
    refused("No tensor tells the number of attention heads", official_weights())
    refused("pools 'avg', but EViT classifies, and scores, with the class token", timm_vit(global_pool="avg"))
    refused(
        "17 for image tokens, which is not a square grid", {**official_weights(), "pos_embed": torch.zeros(1, 18, 48)}
    )
    refused("A Linear is not a VisionTransformer", torch.nn.Linear(1, 1))
    refused("The activation is ReLU", timm_vit(act_layer=torch.nn.ReLU))
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    refused("holds a model of type 'swin'", tmp_path)
    (tmp_path / "text.pth").write_text("no checkpoint")
    refused("is not a (plain pickle|checkpoint)", tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    refused("holds a list, not a dictionary", tmp_path / "list.pth")
    refused("is not a file, a Transformers folder, or a reachable Hub id", "nobody/nothing")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("key", ["model", "args", "optimizer"])
def test_a_malicious_pickle_is_refused_and_never_executed(key, tmp_path):
    trap = tmp_path / "executed"
    content = {"model": official_weights(), "args": argparse.Namespace(), "optimizer": {}}
    content[key] = Malicious(str(trap))
    torch.save(content, tmp_path / "evil.pth")
    with pytest.raises(ConversionError, match="is not a plain pickle .*mkdir.* nothing in it was executed"):
        convert_checkpoint(tmp_path / "evil.pth", num_attention_heads=3)
    assert not trap.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert trap.exists()  # the trap works


# Image size, labels


def test_positions_are_resized_bicubically(images):
    vit = timm_vit()
    model = convert_checkpoint(vit, image_size=48).model
    assert model.config.image_size == 48
    large = torch.randn(2, 3, 48, 48)
    original = convert_checkpoint(vit).model
    torch.testing.assert_close(model(large).logits, original(large, interpolate_pos_encoding=True).logits)
    resampled = torch.nn.functional.interpolate(
        vit.pos_embed[:, 1:].view(1, 4, 4, 128).permute(0, 3, 1, 2), size=(6, 6), mode="bicubic"
    )
    positions = model.vit.embeddings.position_embeddings
    torch.testing.assert_close(positions[:, 1:], resampled.flatten(2).transpose(1, 2))
    assert torch.equal(positions[:, :1], vit.pos_embed[:, :1])
    backbone = convert_checkpoint(timm_vit(num_classes=0), image_size=48).model
    assert backbone(large).last_hidden_state.shape == (2, 37, 128)


def test_labels_are_named_from_a_file(tmp_path):
    names = ["ant", "bee", "cat", "dog", "elk"]
    (tmp_path / "labels.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "list.json").write_text(json.dumps(names))
    (tmp_path / "object.json").write_text(json.dumps({str(i): name for i, name in reversed(list(enumerate(names)))}))
    for file in ("labels.txt", "list.json", "object.json"):
        assert read_labels(tmp_path / file) == names
    model = convert_checkpoint(timm_vit(), labels=names).model
    assert model.config.id2label[3] == "dog"
    assert model.config.label2id["dog"] == 3
    with pytest.raises(ConversionError, match="There are 2 labels, but the classifier has 5 classes"):
        convert_checkpoint(timm_vit(), labels=names[:2])
    (tmp_path / "gap.json").write_text('{"0": "a", "2": "b"}')
    with pytest.raises(ConversionError, match=r"must number its labels 0, 1, 2"):
        read_labels(tmp_path / "gap.json")


# The command


def run_convert(*arguments, cwd):
    ended = evit("convert", *arguments, cwd=cwd)
    return ended.status, ended.stdout, ended.stderr


def test_command_writes_a_folder_that_loads_everywhere(tmp_path):
    file = write_official(tmp_path / "evit.pth", base_keep_rate=0.7, drop_loc="(3, 6, 9)", fuse_token=True)
    (tmp_path / "labels.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    flags = [
        "--keep-rate",
        "0.9",
        "0.8",
        "0.7",
        "--reorganization-layers",
        "2",
        "5",
        "8",
        "--inattentive-tokens",
        "dropped",
    ]
    status, out, err = run_convert(
        file,
        "evit",
        *flags,
        "--labels",
        "labels.txt",
        "--image-size",
        "96",
        "--num-attention-heads",
        "3",
        cwd=tmp_path,
    )
    assert status == 0, err
    for part in ("official EViT", "left out: optimizer (belongs to training)", "resized bicubically to 96", "GMACs"):
        assert part in out
    names = {path.name for path in (tmp_path / "evit").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "modeling_evit.py"} <= names
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "evit")
    assert model.config.layer_keep_rates == {2: 0.9, 5: 0.8, 8: 0.7}
    assert model.config.inattentive_tokens == "dropped"
    assert model.config.id2label[9] == "class 9"
    assert dict(AutoImageProcessor.from_pretrained(tmp_path / "evit").crop_size) == {"height": 96, "width": 96}

    status, _, err = run_convert(file, "evit", cwd=tmp_path)
    assert status == 2
    assert "`evit` exists already" in err
    status, _, err = run_convert(file, "other", cwd=tmp_path)
    assert status == 2
    assert "give `num_attention_heads`" in err
    assert "Traceback" not in err
    assert not (tmp_path / "other").exists()


def test_a_source_folders_own_processor_is_kept(tmp_path):
    EViTForImageClassification(tiny_config_with()).save_pretrained(tmp_path / "source")
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1] * 3).save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source").save_pretrained(tmp_path / "same")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "same")
    assert list(processor.image_mean) == [0.1] * 3
    assert dict(processor.size) == {"height": 32, "width": 32}
    convert_checkpoint(tmp_path / "source", image_size=64).save_pretrained(tmp_path / "larger")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "larger")
    assert list(processor.image_mean) == [0.1] * 3
    assert dict(processor.size) == {"height": 64, "width": 64}
    assert EViTForImageClassification.from_pretrained(tmp_path / "larger").config.keep_rate == 0.6


# What the source says


def test_heads_of_published_sizes_are_known_and_others_are_asked_for():
    """A ViT-H has 16 heads of 80 channels: one for every 64 would be 20."""
    from evit_hf.timm_checkpoints import PUBLISHED_HEADS

    assert PUBLISHED_HEADS[1280, 32, 5120] == 16
    wide = timm_vit(embed_dim=1280, depth=1, num_heads=16, img_size=16)
    with pytest.raises(ConversionError, match="width 1280, depth 1 and MLP size 5120: give `num_attention_heads`"):
        convert_checkpoint(wide.state_dict())
    tiny = timm_vit(embed_dim=192, depth=12, num_heads=3)
    converted = convert_checkpoint(tiny.state_dict())
    assert converted.model.config.num_attention_heads == 3
    assert "3 attention heads, as in the published model of this width and depth" in converted.notes
    for heads in (0, 5, True, "3"):
        with pytest.raises(ConversionError, match="`num_attention_heads` of .* must divide the hidden size of 192"):
            convert_checkpoint(tiny.state_dict(), num_attention_heads=heads)


def test_rectangles_of_state_dicts_are_asked_for(images):
    vit = timm_vit(img_size=(64, 16))
    pixels = torch.randn(2, 3, 64, 16)
    converted = convert_checkpoint(vit.state_dict(), num_attention_heads=2, image_size=(64, 16))
    assert converted.model.config.image_size == [64, 16]
    torch.testing.assert_close(converted.model(pixels).logits, vit(pixels), rtol=1e-4, atol=1e-5)
    converted = convert_checkpoint(vit.state_dict(), num_attention_heads=2)
    assert "images are square, 4x4 patches: no tensor tells" in converted.notes
    vit = timm_vit(img_size=(56, 48))
    with pytest.raises(ConversionError, match="42 for image tokens, which is not a square grid"):
        convert_checkpoint(vit.state_dict(), num_attention_heads=2)
    pixels = torch.randn(2, 3, 56, 48)
    model = convert_checkpoint(vit.state_dict(), num_attention_heads=2, image_size=(56, 48)).model
    torch.testing.assert_close(model(pixels).logits, vit(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"drop_loc": "(3, "}, {"drop_loc": 3}, {"base_keep_rate": "x"}], ids=str)
def test_settings_that_make_no_sense_are_named(settings, tmp_path):
    file = write_official(tmp_path / "evit.pth", **{"base_keep_rate": 0.7, **settings})
    with pytest.raises(ConversionError, match="evit.pth") as error:
        convert_checkpoint(file, num_attention_heads=3)
    assert str(next(iter(settings.values()))) in str(error.value)


def test_what_does_not_apply_to_the_source_is_refused(tmp_path):
    EViTForImageClassification(tiny_config_with()).save_pretrained(tmp_path)
    for source, settings, sentence in (
        (tmp_path, {"num_attention_heads": 8}, "`num_attention_heads` is 8, but .* has 4: leave it out"),
        (tmp_path, {"weights": "ema"}, "only files and state dicts hold several"),
        (timm_vit(), {"weights": "ema"}, "only files and state dicts hold several"),
        (timm_vit(), {"residual_scale": 2.0}, "`residual_scale` is for LV-ViTs"),
    ):
        with pytest.raises(ConversionError, match=sentence):
            convert_checkpoint(source, **settings)


def test_sizes_that_are_the_default_are_checked_as_such(tmp_path):
    """config.json leaves out what is the default of its class: 384 channels in an LV-ViT-S, 768 in a ViT."""
    torch.manual_seed(0)
    config = EViTLVForImageClassification.config_class(num_labels=2, num_hidden_layers=1, reorganization_layers=[])
    EViTLVForImageClassification(config).save_pretrained(tmp_path)
    assert EViTLVForImageClassification.from_pretrained(tmp_path).config.hidden_size == 384


def test_command_converts_a_timm_folder(tmp_path, capsys):
    from evit_training.commands.convert import main

    settings = {"img_size": (64, 32), "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    vit = timm.create_model("vit_tiny_patch16_224", **settings)
    save_for_hf(vit, tmp_path / "timm", model_args=settings, safe_serialization=True)
    main([str(tmp_path / "timm"), str(tmp_path / "evit"), "--image-size", "32", "48", "--keep-rate", "0.7"])
    out = capsys.readouterr().out
    assert "timm: timm\n" in out
    assert "note: position embeddings were resized bicubically to [32, 48] pixels" in out
    model = EViTForImageClassification.from_pretrained(tmp_path / "evit")
    assert (model.config.image_size, model.config.num_attention_heads) == ([32, 48], 4)
    torch.save({"state_dict": vit.state_dict(), "state_dict_ema": vit.state_dict()}, tmp_path / "last.pth")
    flags = ["--num-attention-heads", "4", "--image-size", "64", "32", "--weights", "state_dict"]
    main([str(tmp_path / "last.pth"), str(tmp_path / "plain"), *flags])
    assert "left out: state_dict_ema (`state_dict` was taken)" in capsys.readouterr().out


def test_settings_out_of_range_are_one_sentence(tmp_path):
    EViTForImageClassification(tiny_config_with()).save_pretrained(tmp_path)
    for source in (tmp_path, timm_vit()):
        with pytest.raises(ConversionError, match=r"` cannot be an EViT: `keep_rate` must be in \(0, 1\]"):
            convert_checkpoint(source, keep_rate=1.5)


# Single files and `from_pretrained`


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_loads_in_one_line(suffix, tmp_path):
    vit, path = timm_vit(), tmp_path / f"vit.{suffix}"
    torch.save({"model": vit.state_dict()}, path) if suffix == "pth" else save_file(vit.state_dict(), path)
    pixels = torch.randn(2, 3, 32, 32)
    model = EViTForImageClassification.from_pretrained(path, keep_rate=1.0, num_attention_heads=2)
    torch.testing.assert_close(model(pixels).logits, vit(pixels), rtol=1e-4, atol=1e-5)
    assert not model.training
    assert model.config.name_or_path == str(path)
    bare = EViTModel.from_pretrained(str(path), keep_rate=1.0, num_attention_heads=2)
    torch.testing.assert_close(bare(pixels).last_hidden_state, vit.forward_features(pixels), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConversionError, match="give `num_attention_heads`"):
        EViTForImageClassification.from_pretrained(path)
    with pytest.raises(ConversionError, match="is a timm checkpoint: load it with EViTForImageClassification"):
        EViTLVForImageClassification.from_pretrained(path, num_attention_heads=2)


def test_an_official_file_loads_with_its_reorganization(tmp_path):
    file = write_official(tmp_path / "evit.pth", base_keep_rate=0.5, drop_loc="(3, 6, 9)", fuse_token=False)
    expected = convert_checkpoint(file, num_attention_heads=3).model
    model = EViTForImageClassification.from_pretrained(file, num_attention_heads=3)
    assert (model.config.keep_rate, model.config.inattentive_tokens) == (0.5, "dropped")
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(pixels).logits, expected(pixels).logits)
    assert (
        EViTForImageClassification.from_pretrained(file, num_attention_heads=3, keep_rate=0.8).config.keep_rate == 0.8
    )


def test_an_lvvit_file_loads_into_its_own_class(tmp_path):
    weights = official_weights("lvvit_official_tiny")
    torch.save(weights, tmp_path / "lvvit.pth.tar")
    given = {"num_attention_heads": 3, "residual_scale": 2.0}
    expected = convert_checkpoint(weights, keep_rate=0.7, **given).model
    model = EViTLVForImageClassification.from_pretrained(tmp_path / "lvvit.pth.tar", keep_rate=0.7, **given)
    pixels = torch.randn(1, 3, *[expected.config.image_size] * 2)
    torch.testing.assert_close(model(pixels).logits, expected(pixels).logits)
    with pytest.raises(ConversionError, match="is an LV-ViT: load it with EViTLVForImageClassification"):
        EViTForImageClassification.from_pretrained(tmp_path / "lvvit.pth.tar")


def test_files_that_are_no_weights_of_a_vit_are_refused_with_the_way_out(tmp_path):
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(**size, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="for Transformers give the folder"):
        EViTForImageClassification.from_pretrained(tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="config.json` is not a plain pickle of tensors"):
        EViTForImageClassification.from_pretrained(tmp_path / "config.json")
