"""The lines of JavaScript in docs/deployment.md, under node, on what `evit export` wrote."""

import json
import re
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config_with
from PIL import Image
from transformers import ViTImageProcessor

from evit_hf import EViTForImageClassification
from evit_training.commands.export import main as export


NODE = ROOT / ".venv" / "node"
INSTALL = "npm install --ignore-scripts --prefix .venv/node @huggingface/transformers@4"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of the packaged digits, and its export with float and 8-bit weights."""
    folder = tmp_path_factory.mktemp("served")
    names = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
    torch.manual_seed(0)
    model = EViTForImageClassification(tiny_config_with(num_labels=10, keep_rate=0.6, **names)).eval()
    model.save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    flags = ["--format", "onnx", "--int8", "dynamic", "--dataset", "digits", "--max-accuracy-drop", "100"]
    export([str(folder / "model"), str(folder / "exported"), *flags, "--max-eval-samples", "40"])
    return model, folder


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("q8", 0.1)])
def test_exports_classify_in_transformers_js(dtype, tolerance, exported, tmp_path):
    assert (NODE / "node_modules" / "@huggingface").is_dir(), f"first run: {INSTALL}"
    model, folder = exported
    # Of the model's own size: Pillow and the library under transformers.js resize differently.
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (code,) = re.findall(r"```js\n(.*?)```", (ROOT / "docs" / "deployment.md").read_text(), re.DOTALL)
    for old, new in (
        ("https://cdn.jsdelivr.net/npm/@huggingface/transformers@4", "@huggingface/transformers"),
        ("/models/", f"{folder}/"),
        ('"DEST"', '"exported"'),
        ('"fp32"', f'"{dtype}"'),
        ("photo.jpg", str(tmp_path / "photo.png")),
    ):
        assert old in code
        code = code.replace(old, new)
    script = tmp_path / "classify.mjs"
    script.write_text(code)
    (tmp_path / "node_modules").symlink_to(NODE / "node_modules")
    process = subprocess.run(["node", script], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    answers = json.loads(process.stdout.splitlines()[-1])
    pixel_values = ViTImageProcessor.from_pretrained(folder / "model")(Image.fromarray(pixels), return_tensors="pt")
    with torch.no_grad():
        scores = model(**pixel_values).logits.softmax(1)[0]
    assert [answer["score"] for answer in answers] == sorted((answer["score"] for answer in answers), reverse=True)
    assert len(answers) == 5
    for answer in answers:
        assert answer["score"] == pytest.approx(scores[int(answer["label"])].item(), abs=tolerance)
