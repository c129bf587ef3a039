"""Outputs of the official implementation, recorded in data/evit_official_tiny.safetensors."""

import json
from functools import lru_cache

from conftest import DATA
from safetensors import safe_open
from safetensors.torch import load_file


OFFICIAL_FILE = DATA / "evit_official_tiny.safetensors"


@lru_cache
def official_tensors():
    return load_file(OFFICIAL_FILE)


@lru_cache
def official_cases():
    with safe_open(OFFICIAL_FILE, "pt") as file:
        return json.loads(file.metadata()["cases"])


def official_names():
    """Official parameter names by ours; query, key and value are thirds of one official tensor."""
    names = {
        "classifier": "head",
        "vit.layernorm": "norm",
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    }
    for i in range(12):
        ours, official = f"vit.layers.{i}.", f"blocks.{i}."
        names[ours + "layernorm_before"], names[ours + "layernorm_after"] = official + "norm1", official + "norm2"
        names[ours + "attention.o_proj"] = official + "attn.proj"
        names[ours + "mlp.fc1"], names[ours + "mlp.fc2"] = official + "mlp.fc1", official + "mlp.fc2"
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in names.items() for kind in ("weight", "bias")} | {
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.position_embeddings": "pos_embed",
    }


def official_state_dict():
    """The official weights under our names."""
    weights = {
        name.removeprefix("weights."): x for name, x in official_tensors().items() if name.startswith("weights.")
    }
    state_dict = {ours: weights[official] for ours, official in official_names().items()}
    for i in range(12):
        for kind in ("weight", "bias"):
            thirds = weights[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            for letter, third in zip("qkv", thirds, strict=True):
                state_dict[f"vit.layers.{i}.attention.{letter}_proj.{kind}"] = third.clone()
    return state_dict


@lru_cache
def lvvit_tensors():
    """Weights and dense outputs of the official LV-ViT."""
    return load_file(DATA / "lvvit_official_tiny.safetensors")


def lvvit_state_dict():
    """The official LV-ViT weights under our names."""
    weights = {name.removeprefix("weights."): x for name, x in lvvit_tensors().items() if name.startswith("weights.")}
    state_dict = {}
    for name, tensor in weights.items():
        head, _, rest = name.partition(".")
        if head in ("head", "aux_head"):
            state_dict[{"head": "classifier", "aux_head": "aux_classifier"}[head] + f".{rest}"] = tensor
        elif head == "norm":
            state_dict[f"vit.layernorm.{rest}"] = tensor
        elif head == "patch_embed":
            state_dict["vit.embeddings.patch_embeddings." + rest.replace("proj", "projection")] = tensor
        elif head == "blocks":
            layer, _, part = rest.partition(".")
            part = part.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
            part = part.replace("attn.proj", "attention.o_proj")
            if part == "attn.qkv.weight":
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    state_dict[f"vit.layers.{layer}.attention.{letter}_proj.weight"] = third.clone()
            else:
                state_dict[f"vit.layers.{layer}.{part}"] = tensor
    state_dict["vit.embeddings.cls_token"] = weights["cls_token"]
    state_dict["vit.embeddings.position_embeddings"] = weights["pos_embed"]
    return state_dict
