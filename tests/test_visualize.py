"""The command `evit visualize`: its files, its JSON, and its report in a real browser."""

import json
import os
import shutil
import time

import pytest
import torch
from browser import chromium
from conftest import run_new_python, tiny_config_with
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from evit_hf import EViTForImageClassification
from evit_hf.profiling import num_macs
from evit_training.cli import main


EVIL = '<img src=x onerror="window.owned=1">'
EVIL_SCRIPT = "</script><script>window.owned=1</script>"


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    labels = {i: f"{EVIL} {i}" if i % 2 else f"{EVIL_SCRIPT} {i}" for i in range(5)}
    EViTForImageClassification(tiny_config_with(id2label=labels)).save_pretrained(tmp_path / "run" / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate((f"{EVIL}.png", "below/wide.jpg", "zz.png")):
        size = (90, 40) if i == 1 else (200 + i, 300)
        Image.effect_noise(size, 50 + 40 * i).convert("RGB").save(folder / name)
    (folder / "broken.jpg").write_text("no picture")
    return folder


def visualize(*words):
    main(["visualize", *map(str, words)])


def test_a_folder_becomes_pictures_and_json(model, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    visualize(model, pictures, "-o", out, "--keep-rates", 0.7, 0.5, "--json", "--top-k", 2)
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["bad_images"] == ["broken.jpg"]
    assert "`broken.jpg`" in captured.err
    assert "3 pictures, 1 could not be decoded" in captured.err
    assert [image["image"] for image in report["images"]] == [f"{EVIL}.png", "zz.png", "below/wide.jpg"]
    assert {path.name for path in out.iterdir()} == {f"{EVIL}.png.png", "zz.png.png", "below__wide.jpg.png"}
    for image in report["images"]:
        assert [view["keep_rate"] for view in (image["dense"], *image["views"])] == [1.0, 0.7, 0.5]
        assert image["views"][1]["gmacs"] == num_macs(tiny_config_with(), 0.5) / 1e9
        assert image["views"][1]["layers"] == [1, 2, 3]
        assert image["views"][1]["patches_kept"][0] == 8
        assert len(image["dense"]["answers"]) == 2
        assert Image.open(image["files"][0]).width == 4 * 272 + 12


def test_one_picture_becomes_a_file_of_the_kind_that_is_named(model, pictures, tmp_path, capsys):
    for name in ("a.png", "a.gif", "new/a.html"):
        visualize(model, pictures / "zz.png", "-o", tmp_path / name, "--quiet")
        assert (tmp_path / name).stat().st_size > 5000
    visualize(model, pictures / "zz.png", "-o", tmp_path / "f", "--quiet", "--animation", "webp")
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"zz.png.png", "zz.png.webp"}
    assert Image.open(tmp_path / "f" / "zz.png.webp").n_frames == 4
    visualize(model, pictures / "zz.png", "-o", tmp_path / "g", "--quiet", "--html")
    assert {path.name for path in (tmp_path / "g").iterdir()} == {"index.html"}
    assert capsys.readouterr().out == ""
    assert Image.open(tmp_path / "a.gif").n_frames == 4
    assert not list((tmp_path / "new").glob("*.part"))


def test_a_dense_vit_is_visualized_as_the_evit_it_can_be(pictures, tmp_path, capsys):
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    visualize(tmp_path / "vit", pictures / "zz.png", "-o", tmp_path / "a.png", "--json")
    (image,) = json.loads(capsys.readouterr().out)["images"]
    assert [view["keep_rate"] for view in image["views"]] == [0.7]


def test_a_folder_may_have_a_point_in_its_name_and_a_report_is_called_as_its_run(model, pictures, tmp_path):
    (tmp_path / "out.v2").mkdir()
    visualize(model, pictures / "zz.png", "-o", tmp_path / "out.v2")
    assert list((tmp_path / "out.v2").iterdir())
    shutil.copytree(model, tmp_path / "my run")
    visualize(tmp_path / "my run", pictures / "zz.png", "-o", tmp_path / "a.html")
    assert "<title>my run" in (tmp_path / "a.html").read_text()


def test_what_cannot_be_drawn_is_refused(model, pictures, tmp_path, capsys):
    broken = pictures / "broken.jpg"
    for words, sentence in (
        ((model, pictures, "-o", tmp_path / "a.png"), "is a file for one picture, but there are 4: name a folder"),
        ((model, pictures, "-o", tmp_path / "a.jpg"), "must be a folder, or a file that ends in .png, .webp"),
        ((model, pictures, "-o", tmp_path / "a.html", "--html"), "are for a folder, but `-o` is the file"),
        ((model, tmp_path / "none", "-o", tmp_path / "a"), "is neither a picture nor a folder of pictures"),
        ((model, broken, "-o", tmp_path / "a"), "None of the 1 pictures can be decoded"),
        ((model, pictures, "-o", tmp_path / "a", "--on-bad-image", "error"), "`broken.jpg`"),
        ((model, pictures, "-o", tmp_path / "a", "--keep-rates", 0), "`--keep-rates` must be in (0, 1], got 0"),
        ((model, pictures), "the following arguments are required: -o/--output"),
        ((tmp_path / "gone", pictures, "-o", tmp_path / "a"), "gone"),
    ):
        with pytest.raises(SystemExit, match="2"):
            visualize(*words)
        assert sentence in capsys.readouterr().err


def test_help_and_usage_errors_import_nothing_heavy(tmp_path):
    code = """
import sys
from evit_training.cli import main
for command in ("visualize", "inspect"):
    for words in (["--help"], ["m", "--no-such-flag"], ["m", "p", "-o", "a.jpg"]):
        try:
            main([command, *words])
        except SystemExit:
            pass
print("torch" in sys.modules, "PIL" in sys.modules)
"""
    assert run_new_python(code, tmp_path).splitlines()[-1] == "False False"


@pytest.mark.slow  # needs Chromium and its driver, which .ci/run installs
def test_in_a_browser_the_report_is_read_by_keyboard_and_text_stays_text(model, pictures, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    visualize(model, pictures, "-o", tmp_path / "report.html", "--keep-rates", 0.7, 0.3, "--quiet")
    text = (tmp_path / "report.html").read_text()
    assert "http:" not in text
    assert "https:" not in text
    with chromium(tmp_path / "profile") as browser:
        browser.get(f"file://{tmp_path / 'report.html'}")

        def press(*keys):
            ActionChains(browser).send_keys(*keys).perform()

        def style(selector, name):
            element = browser.find_element(By.CSS_SELECTOR, selector)
            return browser.execute_script("return getComputedStyle(arguments[0])[arguments[1]]", element, name)

        def heading():
            return browser.execute_script("return document.activeElement.querySelector('h2')?.textContent")

        articles = browser.find_elements(By.TAG_NAME, "article")
        assert [article.find_element(By.TAG_NAME, "h2").text for article in articles] == [
            f"{EVIL}.png",
            "zz.png",
            "below/wide.jpg",
        ]
        for label in (EVIL, EVIL_SCRIPT):
            assert label in articles[0].text
        press("j")
        assert heading() == f"{EVIL}.png"
        press("j")
        assert heading() == "zz.png"
        press("k", "k", "k")
        assert heading() == f"{EVIL}.png"

        shown = {"1": "kept", "2": "attention", "3": "weights"}
        for key, kind in shown.items():
            press(key)
            for other in shown.values():
                assert (style(f"section:nth-of-type(2) .map.{other}", "display") != "none") == (kind == other)
        light = style("body", "backgroundColor")
        press("t", "t")
        dark = style("body", "backgroundColor")
        assert light != dark
        press("t")
        assert style("body", "backgroundColor") == light
        # The map lies where the patches are: it has the size of the picture, which the processor squashes.
        press("1")
        box, picture = (browser.find_element(By.CSS_SELECTOR, name).rect for name in (".seen", ".base"))
        assert box == picture
        screenshot = os.environ.get("EVIT_SCREENSHOT", str(tmp_path / "report.png"))
        browser.save_screenshot(screenshot)
        assert len(set(Image.open(screenshot).convert("RGB").resize((64, 64)).getdata())) > 20
        press("x")
        time.sleep(0.1)
        differing = browser.find_elements(By.CSS_SELECTOR, "article.has-difference")
        assert [article for article in articles if article.is_displayed()] == differing
        assert browser.get_log("browser") == []  # no policy was broken, no error
        assert browser.execute_script("return window.owned === undefined && !document.querySelector('img[src=x]')")
