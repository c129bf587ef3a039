"""The cards of model_cards/: rendered from the template, without blanks, with code that runs."""

import importlib.util
import re

import pytest
import torch
import yaml
from conftest import ROOT, tiny_config_with
from huggingface_hub import ModelCard
from jinja2 import UndefinedError
from PIL import Image
from transformers import ViTImageProcessor

from evit_hf import EViTForImageClassification, EViTLVConfig, EViTLVForImageClassification, preset_config
from evit_hf.presets import PRESETS
from evit_hf.profiling import num_macs
from evit_training.commands.convert import parser
from evit_training.data.images import decoded
from evit_training.sharing.hub import check_card, render_card


CARDS = sorted((ROOT / "model_cards").glob("*.md"))


def load_render_script():
    spec = importlib.util.spec_from_file_location("render", ROOT / "model_cards" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(card, language):
    (block,) = re.findall(rf"```{language}\n(.*?)```", card.read_text(), re.DOTALL)
    return block


def test_committed_cards_are_what_the_script_renders():
    rendered = load_render_script().render_all()
    assert set(rendered) == {card.name for card in CARDS}
    for card in CARDS:
        assert card.read_text() == rendered[card.name], f"run `python model_cards/render.py` ({card.name})"


def test_there_is_a_card_for_every_official_checkpoint_and_every_preset():
    names = {card.stem for card in CARDS}
    zoo = {f"evit-deit-s-keep-{rate}{end}" for rate in (0.5, 0.6, 0.7, 0.8, 0.9) for end in ("", "-nofuse")}
    assert names == zoo | set(PRESETS)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_card_has_no_blank_and_valid_metadata(card):
    metadata = check_card(card.read_text())
    assert metadata["license"] == "apache-2.0"
    assert metadata["pipeline_tag"] == "image-classification"
    assert ModelCard(card.read_text()).data.library_name == "transformers"
    assert parser().parse_args(code(card, "bash").split()[2:]).dest == card.stem


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_accuracies_are_the_published_ones_and_costs_the_computed_ones(card):
    published = yaml.safe_load((ROOT / "model_cards" / "published.yaml").read_text())["results"]
    preset = re.sub(r"-keep-.*", "", card.stem)
    rows = re.findall(r"^\| ([\d.]+) \| (-|fused|dropped) \| ([\d.]+) \| (.*?) \| (.*?) \|", card.read_text(), re.M)
    assert rows
    for keep_rate, inattentive, gmacs, top1, _ in rows:
        config = preset_config(preset, inattentive_tokens="dropped" if inattentive == "dropped" else "fused")
        assert gmacs == f"{num_macs(config, float(keep_rate)) / 1e9:.2f}"
        if top1 != "not measured":
            known = {(row[0], row[2]) for row in published[preset] if row[1] == (inattentive != "dropped")}
            assert (float(keep_rate), float(top1)) in known


@pytest.mark.parametrize("family", ["deit", "lvvit"])
def test_code_of_the_cards_runs(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if family == "deit":
        model = EViTForImageClassification(tiny_config_with())
    else:
        small = {"image_size": 32, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        model = EViTLVForImageClassification(EViTLVConfig(**small, patch_size=8, num_hidden_layers=4, num_labels=5))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    Image.effect_noise((40, 24), 60).convert("RGB").save("cat.jpg", exif=exif)
    with open("cat.jpg", "rb") as file:
        picture = decoded({"bytes": file.read(), "path": None}, "cat")
    cards = [card for card in CARDS if family in card.stem]
    assert len(cards) > 3
    for card in cards:
        model.save_pretrained(card.stem)
        processor = ViTImageProcessor(size={"height": 32, "width": 32})
        processor.save_pretrained(card.stem)
        names = {}
        exec(compile(code(card, "python"), str(card), "exec"), names)
        in_training = processor(picture, return_tensors="pt").pixel_values
        assert torch.equal(names["inputs"].pixel_values, in_training)
    assert capsys.readouterr().out.count("LABEL_") == len(cards)


# The template and its guard


def test_a_missing_value_is_an_error_not_a_blank():
    with pytest.raises(UndefinedError, match="'metadata' is undefined"):
        render_card(title="EViT")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("# EViT", "# {{ title }}"), "has a blank in the line: # {{ title }}"),
        (("22.1 M", "None M"), "has a blank in the line: .*None M"),
        (("79.5 | 94.8", " | 94.8"), "has a blank in the line"),
        (("license: apache-2.0\n", ""), r"metadata lacks \['license'\]"),
        (("license: apache-2.0", "license: [apache"), "metadata is not valid YAML"),
        (("---\n", "--\n"), "has no front matter"),
    ],
)
def test_a_card_with_a_blank_is_refused(change, sentence):
    text = (ROOT / "model_cards" / "evit-deit-s-keep-0.7.md").read_text()
    assert change[0] in text
    check_card(text)
    with pytest.raises(ValueError, match=sentence):
        check_card(text.replace(*change))
