"""Tiny models of several families, saved as users have them, with an image processor."""

import json

import timm
import torch
from safetensors.torch import save_file
from transformers import BitImageProcessor
from vision_families import build


# Names of the classes of the packaged data set.
DIGITS = [str(number) for number in range(10)]
TIMM = {"img_size": 48, "patch_size": 8, "depth": 4, "embed_dim": 24, "reg_tokens": 2}
PROCESSOR = {"size": {"shortest_edge": 54}, "do_center_crop": True, "crop_size": {"height": 48, "width": 48}}


def save_family(case, folder, names=DIGITS):
    """A folder with a classifier of a family (see `vision_families.CASES`), or with one of timm as timm saves it."""
    if case == "timm":
        return save_timm(folder, len(names))
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = build(case, num_labels=len(names), **labels)
    model.save_pretrained(folder)
    BitImageProcessor(**PROCESSOR).save_pretrained(folder)
    return folder


def save_timm(folder, num_classes):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **TIMM)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    pixels = {"input_size": [3, 48, 48], "mean": [0.4] * 3, "std": [0.3] * 3, "interpolation": "bicubic"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": num_classes, "model_args": TIMM}
    config |= {"label_names": DIGITS[:num_classes], "pretrained_cfg": {**pixels, "crop_pct": 0.9}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
