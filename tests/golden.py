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
