"""Weight files: where training scripts leave weights, and files that are damaged or made to do harm."""

import argparse
import json
import random
import struct
import time
import zipfile

import pytest
import timm
import torch
from conftest import tiny_config_with
from safetensors.torch import save_file
from timm.models._hub import save_for_hf

from evit_hf import EViTForImageClassification, EViTModel, convert_checkpoint
from evit_hf.checkpoint_files import ConversionError


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def tiny_vit(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.models.VisionTransformer(**{**settings, **changes}).eval()


def logits(source, **settings):
    with torch.no_grad():
        return convert_checkpoint(source, num_attention_heads=2, **settings).model(IMAGES).logits


# Where training scripts leave weights

HEADS = {"num_attention_heads": 2}


def prefixed(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("place", "nest"),
    [
        ("", lambda w: w),
        ("module", lambda w: prefixed("module.", w)),
        ("_orig_mod", lambda w: prefixed("_orig_mod.", w)),
        ("model.module", lambda w: {"model": prefixed("module.", w), "optimizer": {"state": {0: {"step": 3}}}}),
        ("state_dict.model", lambda w: {"state_dict": prefixed("model.", w), "hyper_parameters": {"lr": 0.1}}),
        ("state_dict_ema", lambda w: {"state_dict_ema": w, "epoch": 3}),
        ("teacher.backbone", lambda w: {"teacher": prefixed("backbone.", w)}),
        ("module._orig_mod.model.backbone", lambda w: prefixed("module._orig_mod.model.backbone.", w)),
        ("a.b.c.encoder", lambda w: {"a": {"b": {"c": prefixed("encoder.", w)}}}),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_weights_are_found_in_any_nesting(place, nest, tmp_path):
    vit = tiny_vit()
    torch.save(nest(vit.state_dict()), tmp_path / "vit.pth")
    converted = convert_checkpoint(tmp_path / "vit.pth", **HEADS)
    torch.testing.assert_close(converted.model(IMAGES).logits, vit(IMAGES), rtol=1e-4, atol=1e-5)
    assert (f"the weights are those at `{place}`" in converted.notes) == bool(place)


def test_dino_checkpoint_gives_the_teachers_backbone(tmp_path):
    student, teacher = tiny_vit(1, num_classes=0), tiny_vit(2, num_classes=0)
    head = {"head.mlp.0.weight": torch.zeros(4, 16)}
    content = {
        "student": prefixed("module.backbone.", student.state_dict()) | prefixed("module.", head),
        "teacher": prefixed("backbone.", teacher.state_dict()) | head,
        "dino_loss": {"center": torch.zeros(1, 4)},
        "epoch": 100,
    }
    torch.save(content, tmp_path / "dino.pth")
    converted = convert_checkpoint(tmp_path / "dino.pth", **HEADS)
    assert isinstance(converted.model, EViTModel)
    torch.testing.assert_close(converted.model(IMAGES).last_hidden_state[:, 0], teacher(IMAGES), rtol=1e-4, atol=1e-5)
    assert "the weights are those at `teacher.backbone`" in converted.notes
    assert converted.unused == {
        "student": "`teacher.backbone` was taken",
        "dino_loss": "belongs to training",
        "epoch": "belongs to training",
        "head.mlp.0.weight": "is not below `backbone`",
    }
    converted = convert_checkpoint(tmp_path / "dino.pth", **HEADS, weights="student")
    torch.testing.assert_close(converted.model(IMAGES).last_hidden_state[:, 0], student(IMAGES), rtol=1e-4, atol=1e-5)
    assert "the weights are those at `student.module.backbone`" in converted.notes
    assert converted.unused["teacher"] == "`student.module.backbone` was taken"
    with pytest.raises(ConversionError, match="`weights` is 'ema', but .* has weights at .*'teacher.backbone'"):
        convert_checkpoint(tmp_path / "dino.pth", **HEADS, weights="ema")


def test_averaged_weights_of_timm_are_preferred_as_timm_does(tmp_path):
    vit, average = tiny_vit(1), tiny_vit(2)
    torch.save({"state_dict": vit.state_dict(), "state_dict_ema": average.state_dict()}, tmp_path / "last.pth.tar")
    converted = convert_checkpoint(tmp_path / "last.pth.tar", **HEADS)
    torch.testing.assert_close(converted.model(IMAGES).logits, average(IMAGES), rtol=1e-4, atol=1e-5)
    assert converted.unused == {"state_dict": "`state_dict_ema` was taken"}
    torch.testing.assert_close(logits(tmp_path / "last.pth.tar", weights="state_dict"), vit(IMAGES).detach())
    # DeiT's own scripts evaluate `model`
    torch.save({"model": vit.state_dict(), "model_ema": average.state_dict()}, tmp_path / "deit.pth")
    torch.testing.assert_close(logits(tmp_path / "deit.pth"), vit(IMAGES).detach())


def test_unknown_sets_of_weights_are_not_chosen_by_chance(tmp_path):
    torch.save({"first": tiny_vit(1).state_dict(), "second": tiny_vit(2).state_dict()}, tmp_path / "two.pth")
    with pytest.raises(ConversionError, match="several sets of weights, at .'first', 'second'.: choose one"):
        convert_checkpoint(tmp_path / "two.pth", **HEADS)
    torch.testing.assert_close(logits(tmp_path / "two.pth", weights="second"), tiny_vit(2)(IMAGES).detach())


# Files made to do harm


def test_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path):
    torch.save(tiny_vit().state_dict(), tmp_path / "vit.pth")
    with zipfile.ZipFile(tmp_path / "vit.pth", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/bomb", bytes(10**8))
    assert (tmp_path / "vit.pth").stat().st_size < 10**6
    with pytest.raises(ConversionError, match="vit.pth` has .* bytes but claims to unpack to 100"):
        convert_checkpoint(tmp_path / "vit.pth", **HEADS)


@pytest.mark.parametrize("old_format", [False, True])
def test_tensor_that_claims_more_than_is_stored_is_refused(old_format, tmp_path):
    """A view with stride 0 takes 4 bytes in the file and 4 TB once it is copied."""
    weights = {**tiny_vit().state_dict(), "cls_token": torch.zeros(1).expand(1, 1, 10**12)}
    torch.save(weights, tmp_path / "vit.pth", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ConversionError, match=r"vit.pth` holds .*`cls_token` \(\(1, 1, 1000000000000\), but only 4 "):
        convert_checkpoint(tmp_path / "vit.pth", **HEADS)


def test_sizes_are_checked_before_anything_is_allocated(tmp_path):
    weights = tiny_vit().state_dict()
    wide = {**weights, "cls_token": torch.zeros(1, 1, 60000)}
    with pytest.raises(
        ConversionError, match=r"Of a different shape: .*q_proj.weight \(16, 16\) instead of \(60000, 60000\)"
    ):
        convert_checkpoint(wide, num_attention_heads=4)
    deep = {**weights, "blocks.900000.norm1.weight": torch.ones(16)}
    with pytest.raises(ConversionError, match=r"blocks up to number 900000, but lacks blocks \[2, 3, 4, 5, 6\]"):
        convert_checkpoint(deep, **HEADS)
    folder = evit_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for field, value in (("hidden_size", 2**20), ("num_hidden_layers", 5000), ("intermediate_size", 2**30)):
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ConversionError, match=f"`{field}` {value}.*, but model.safetensors has"):
            EViTForImageClassification.from_pretrained(folder)


def test_dictionary_that_holds_itself_ends(tmp_path):
    content = {"weights": {"x": torch.zeros(1)}}
    content["weights"]["again"] = content
    torch.save(content, tmp_path / "circle.pth")
    with pytest.raises(ConversionError, match="Not recognized"):
        convert_checkpoint(tmp_path / "circle.pth")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("cls_token", "text", "some entries are not: {'cls_token': 'str'}"),
        ("cls_token", torch.zeros(16), "wrong shape: {'cls_token': \\(16,\\)}"),
        ("pos_embed", torch.zeros(1, 0, 16), "wrong shape: {'pos_embed': \\(1, 0, 16\\)}"),
        (
            "norm.weight",
            torch.ones(16, dtype=torch.int64),
            "Not of floating-point numbers: .'norm.weight torch.int64'",
        ),
        ("norm.weight", torch.ones(16, dtype=torch.complex64), "Not of floating-point numbers"),
        ("norm.weight", torch.ones(16).to_sparse(), "holds tensors that cannot be read: `norm.weight`"),
        ("blocks.0.attn.qkv.weight", torch.ones(()), "Of a different shape: .'vit.layers.0.attention.q_proj.weight"),
        ("blocks.0.attn.qkv.bias", torch.ones(2), "Of a different shape: .'vit.layers.0.attention.q_proj.bias"),
        ("head.weight", torch.ones(()), "head.weight|different shape"),
    ],
    ids=str,
)
def test_entries_that_are_not_such_tensors_are_named(name, value, sentence, tmp_path):
    torch.save({**tiny_vit().state_dict(), name: value}, tmp_path / "vit.pth")
    with pytest.raises(ConversionError, match=sentence) as error:
        convert_checkpoint(tmp_path / "vit.pth", **HEADS)
    assert "vit.pth" in str(error.value)


def test_half_precision_is_converted_to_float32():
    vit = tiny_vit()
    weights = {name: tensor.half() for name, tensor in vit.state_dict().items()}
    model = convert_checkpoint(weights, **HEADS).model
    assert model.dtype == torch.float32
    torch.testing.assert_close(model(IMAGES).logits, vit(IMAGES), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_weights_that_are_not_finite_are_an_error_unless_asked_for(number, weights, tmp_path):
    folder = evit_folder(tmp_path / "evit", weights)
    model = EViTForImageClassification.from_pretrained(folder)
    model.vit.layers[1].mlp.fc1.weight.data[3, 5] = number
    if weights == "bin":  # the model may still be mapped to the old file
        torch.save(model.state_dict(), tmp_path / "new.bin")
        (tmp_path / "new.bin").replace(folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder)
    for load in (EViTForImageClassification.from_pretrained, convert_checkpoint):
        with pytest.raises(RuntimeError, match="NaN or infinite values in .'vit.layers.1.mlp.fc1.weight'") as error:
            load(folder)
        assert {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[weights] in str(error.value)
        load(folder, allow_non_finite_weights=True)
    vit = tiny_vit()
    vit.blocks[1].attn.qkv.weight.data[0] = number
    with pytest.raises(ConversionError, match="NaN or infinite values in .'blocks.1.attn.qkv.weight'"):
        convert_checkpoint(vit)
    assert convert_checkpoint(vit, allow_non_finite_weights=True).model is not None


def test_folders_in_place_of_files_and_empty_files(tmp_path):
    folder = evit_folder(tmp_path / "evit")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(OSError, match="model.safetensors"):
        EViTForImageClassification.from_pretrained(folder)
    (folder / "model.safetensors").rmdir()
    (folder / "model.safetensors").touch()
    with pytest.raises(ConversionError, match="model.safetensors` .*first 8 bytes"):
        EViTForImageClassification.from_pretrained(folder)
    (tmp_path / "vit.pth").touch()
    with pytest.raises(ConversionError, match="vit.pth` is empty"):
        convert_checkpoint(tmp_path / "vit.pth")


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("{", "must be a JSON object whose `weight_map`"),
        ("[]", "must be a JSON object whose `weight_map`"),
        ('{"weight_map": {"x": 3}}', "must be a JSON object whose `weight_map`"),
        ('{"weight_map": {"x": "gone.safetensors"}}', "not in its folder: .'gone.safetensors'"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "not in its folder: .'model.safetensors'"),
    ],
)
def test_index_of_shards_is_checked(index, sentence, tmp_path):
    folder = evit_folder(tmp_path / "evit")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConversionError, match=sentence) as error:
        EViTForImageClassification.from_pretrained(folder)
    assert "model.safetensors.index.json" in str(error.value)


def test_shards_are_read(tmp_path):
    folder = evit_folder(tmp_path / "evit")
    model = EViTForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    again = EViTForImageClassification.from_pretrained(tmp_path / "shards")
    assert torch.equal(again(IMAGES).logits, model(IMAGES).logits)


def test_tensor_with_a_damaged_header_is_named(tmp_path):
    folder = evit_folder(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    size = LENGTH.unpack(data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["vit.layernorm.weight"]["shape"] = [17]
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(LENGTH.pack(len(text)) + text + data[8 + size :])
    with pytest.raises(ConversionError, match="model.safetensors` .* tensor `vit.layernorm.weight` is said to be"):
        EViTForImageClassification.from_pretrained(folder)


# Damaged files

LENGTH = struct.Struct("<Q")


def evit_folder(folder, weights="safetensors"):
    """A saved EViT, its weights in a safetensors file or a pickle."""
    torch.manual_seed(0)
    config = tiny_config_with(image_size=16, hidden_size=16, num_hidden_layers=2, intermediate_size=32)
    model = EViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    if weights == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def flip_bits(data, dice):
    data = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8, 64])):
        limit = dice.choice([min(len(data), 64), min(len(data), 4096), len(data)])
        data[dice.randrange(limit)] ^= 1 << dice.randrange(8)
    return bytes(data)


def cut(data, dice):
    return data[: dice.choice([0, 1, 7, 8, 9, dice.randrange(len(data)), len(data) - 1])]


def add(data, dice):
    return data + dice.randbytes(dice.choice([1, 8, 100]))


def repeat(data, dice):
    start = dice.randrange(len(data))
    piece = data[start : start + dice.choice([1, 16, 256])]
    place = dice.randrange(len(data))
    return data[:place] + piece + data[place:]


def erase(data, dice):
    start = dice.randrange(len(data))
    return data[:start] + data[start + dice.choice([1, 4, 32, 500]) :]


def fill(data, dice):
    start = dice.randrange(len(data))
    piece = dice.choice([b"\0", b"\xff", b"\x7f", b"\x80\x7f", b"{", b"\x80\x02c"]) * dice.choice([1, 8, 200])
    return data[:start] + piece + data[start + len(piece) :]


def non_numbers(data, dice):
    """Write NaN or infinity over some numbers near the end, where the data are."""
    start = dice.randrange(len(data) // 2, len(data) - 8) & ~3
    return (
        data[:start] + struct.pack("<f", dice.choice([float("nan"), float("inf"), -float("inf")])) + data[start + 4 :]
    )


def noise(data, dice):
    return dice.randbytes(dice.choice([1, 8, 64, 5000]))


def header_edit(data, dice):
    """Change the header of a safetensors file: length, types, shapes, offsets, names."""
    if data[8:9] != b"{":
        return flip_bits(data, dice)
    size = LENGTH.unpack(data[:8])[0]
    if dice.random() < 0.2:
        return LENGTH.pack(dice.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])) + data[8:]
    header = json.loads(data[8 : 8 + size])
    name = dice.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    change = dice.randrange(9)
    if change == 0:
        entry["dtype"] = dice.choice(["F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "X", 5, None])
    elif change == 1:
        entry["shape"] = dice.choice([[], [0], [-1], [2**40, 2**40], entry["shape"][::-1], [*entry["shape"], 1], "x"])
    elif change == 2:
        entry["data_offsets"] = dice.choice([[0, 0], [0, 2**50], [8, 4], [-4, 4], [1], "x", [0, len(data)]])
    elif change == 3:
        header[dice.choice(["x", "", "vit", name + "x", "\0"])] = header.pop(name)
    elif change == 4:
        del header[name]
    elif change == 5:
        header["__metadata__"] = dice.choice([None, 5, {"format": "tf"}, {"format": 3}, {}])
    elif change == 6:
        header = dice.choice([[], {}, 3, None, "x"])
    elif change == 7:
        entry["dtype"] = dice.choice(["I32", "U32"])  # as many bytes
    else:
        header[name] = dice.choice([None, 3, [], {}])
    text = json.dumps(header).encode()
    return LENGTH.pack(len(text)) + text + data[8 + size :]


MUTATIONS = (flip_bits, flip_bits, cut, add, repeat, erase, fill, non_numbers, noise, header_edit, header_edit)


def sources(tmp_path):
    """Each kind of file: (path of the file, how to load it)."""

    def load(folder):
        return lambda: EViTForImageClassification.from_pretrained(folder)

    def convert(path, **heads):
        return lambda: convert_checkpoint(path, **heads).model

    for weights, file in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        folder = evit_folder(tmp_path / weights, weights)
        yield folder / file, load(folder)
        yield folder / file, convert(folder)
    vit = tiny_vit().state_dict()
    save_file(vit, tmp_path / "vit.safetensors")
    torch.save({"model": vit, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "vit.pth")
    torch.save(vit, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for file in ("vit.safetensors", "vit.pth", "old.pth"):
        yield tmp_path / file, convert(tmp_path / file, **HEADS)
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    save_for_hf(
        timm.create_model("vit_tiny_patch16_224", **small),
        tmp_path / "timm",
        model_args=small,
        safe_serialization=True,
    )
    yield tmp_path / "timm" / "model.safetensors", load(tmp_path / "timm")


def fuzz(tmp_path, num_mutations, seed):
    """Mutate each file in turn; returns what was neither loaded finite nor refused by a sentence with its name."""
    files = [(path, path.read_bytes(), load) for path, load in sources(tmp_path)]
    dice = random.Random(seed)
    failures, num_loaded = [], 0
    for i in range(num_mutations):
        path, data, load = files[i % len(files)]
        mutation = dice.choice(MUTATIONS)
        path.write_bytes(mutation(data, dice))
        start = time.monotonic()
        try:
            model = load()
            num_loaded += 1
            if not all(x.isfinite().all() for x in model.state_dict().values()):
                failures.append((i, path.name, mutation.__name__, "loaded NaN"))
        except (RuntimeError, OSError, ValueError) as error:
            if type(error) not in (ConversionError, RuntimeError, OSError) or path.name not in str(error):
                failures.append((i, path.name, mutation.__name__, repr(error)[:300]))
        except Exception as error:  # what the reader did not expect
            failures.append((i, path.name, mutation.__name__, "foreign " + repr(error)[:300]))
        if time.monotonic() - start > 20:
            failures.append((i, path.name, mutation.__name__, "slow"))
        path.write_bytes(data)
    return failures, num_loaded


def test_damaged_files_are_refused_by_name(tmp_path):
    failures, num_loaded = fuzz(tmp_path, 300, seed=0)
    assert failures == []
    assert num_loaded > 20  # some mutations do no harm


@pytest.mark.slow
def test_many_damaged_files_are_refused_by_name(tmp_path):
    failures, _ = fuzz(tmp_path, 2500, seed=1)
    assert failures == []
