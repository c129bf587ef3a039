"""The Gradio demo: its files, its functions, and the page in a real browser."""

import ast
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
import yaml
from browser import chromium
from conftest import run_python, tiny_config_with
from PIL import Image
from transformers import ViTImageProcessor

from evit_hf import EViTForImageClassification
from evit_hf.profiling import num_macs
from evit_training.cli import main


EVIL = '<img src=x onerror="window.owned=1"> **b**'


@pytest.fixture
def space(tmp_path):
    torch.manual_seed(0)
    model = EViTForImageClassification(tiny_config_with(id2label={i: f"{EVIL} {i}" for i in range(5)})).eval()
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / ".env").write_text("HF_TOKEN=hf_secret")
    main(["space", str(tmp_path / "model"), str(tmp_path / "space"), "--title", f"{EVIL}: demo\n---"])
    return tmp_path / "space"


def test_a_space_has_app_requirements_readme_model_and_code(space):
    assert {path.name for path in space.iterdir()} == {
        "README.md",
        "app.py",
        "evit_hf",
        "model",
        "requirements.txt",
        "space.json",
    }
    front_matter, body = (space / "README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    metadata = yaml.safe_load(front_matter)
    assert metadata["sdk"] == "gradio"
    assert metadata["app_file"] == "app.py"
    assert metadata["license"] == "apache-2.0"
    assert metadata["title"] == f"{EVIL}: demo\n---"
    assert "onerror" not in body
    assert not (space / "model" / ".env").exists()
    # What the app imports is what the requirements, the Space's kind and its own folder bring.
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse((space / "app.py").read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    brought = {"torch", "transformers", "PIL", "gradio", "evit_hf"}
    assert imported - set(sys.stdlib_module_names) == brought
    assert "EVIL" not in (space / "app.py").read_text()


def test_a_space_can_name_a_model_of_the_hub_instead(tmp_path, capsys):
    main(["space", "org/name", str(tmp_path / "space")])
    assert json.loads((tmp_path / "space" / "space.json").read_text())["model"] == "org/name"
    assert yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])["models"] == ["org/name"]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.PNG")
    main(["space", "org/name", str(tmp_path / "clicked"), "--examples", str(tmp_path / "a.PNG")])
    assert [path.name for path in (tmp_path / "clicked" / "examples").iterdir()] == ["00.png"]
    with pytest.raises(SystemExit, match="2"):
        main(["space", "org/name", str(tmp_path / "more"), "--examples", str(tmp_path / "gone.png")])
    assert "`--examples`: " in capsys.readouterr().err
    for model, dest, sentence in (
        ("org/name", tmp_path / "space", "exists already"),
        ("not/a/name", tmp_path / "new", "must be a model folder, a run folder or a Hub id"),
        (str(tmp_path / "space"), tmp_path / "other", "has no config.json"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["space", model, str(dest)])
        assert sentence in capsys.readouterr().err


def test_the_app_answers_as_the_model_does(space):
    """In a process of its own, in which the package is the Space's copy."""
    code = f"""
import json, sys
sys.path.insert(0, r"{space}")
import app
from PIL import Image
image = Image.effect_noise((60, 40), 90)
answer, gallery, cost = app.classify(image, 0.5)
see_through = Image.fromarray(__import__("numpy").full((40, 40, 4), 90, "uint8"))
assert app.classify(see_through, 0.5)[0] == app.classify(app.as_rgb(see_through), 0.5)[0]
assert app.classify(see_through, 0.5)[0] != app.classify(see_through.convert("RGB"), 0.5)[0]
print(json.dumps([sys.modules['evit_hf'].__file__, answer, [text for _, text in gallery], gallery[0][0].size, cost]))
view = app.show(image, 0.5)
assert view[0] == answer and view[2][1][1] == gallery[1][1]
assert list(view[1]) == [name for name, _ in sorted(app.classify(image, 1.0)[0].items(), key=lambda x: -x[1])]
assert [text for _, text in view[3]] == ["layer 1", "layer 2", "layer 3"]
assert len(app.show(image, 1.0)[3]) == 3
try:
    app.classify(None, 0.5)
except app.gr.Error as error:
    print(error)
"""
    *_, line, error = run_python(code, space).strip().splitlines()
    file, answer, captions, size, cost = json.loads(line)
    assert file.startswith(str(space))
    assert "Upload a picture first" in error
    assert sum(answer.values()) == pytest.approx(1, abs=1e-4)
    assert len(answer) == 5
    expected = ["all 16 patches", "after layer 1: 8 of 16"]
    assert captions[:2] == expected
    assert len(captions) == 4
    assert size == [224, 224]
    gmacs = num_macs(tiny_config_with(), 0.5) / 1e9
    assert f"{gmacs:.3f} GMACs, " in cost
    assert " ms on this machine" in cost


@pytest.mark.slow  # needs Chromium and its driver, which .ci/run installs
def test_in_a_browser_a_picture_is_classified_and_labels_stay_text(space, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    server = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=env, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(url, timeout=2)
                break
            except OSError:
                assert server.poll() is None, "the app has ended"
                time.sleep(0.5)
        with chromium(tmp_path / "profile") as browser:
            browser.get(url)
            wait = WebDriverWait(browser, 60)

            def text_of(name):
                return browser.find_element(By.ID, name).text

            Image.effect_noise((64, 48), 90).convert("RGB").save(tmp_path / "noise.png")
            upload = wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "#picture input[type=file]"))
            upload.send_keys(str(tmp_path / "noise.png"))  # answers at once
            wait.until(
                lambda b: "onerror" in text_of("answer") and len(b.find_elements(By.CSS_SELECTOR, "#patches img"))
            )
            assert EVIL in text_of("answer")  # as text
            patches = browser.find_element(By.ID, "patches")
            wait.until(lambda b: "after layer 1: 12 of 16" in patches.text)  # at the keep rate 0.7

            number = browser.find_element(By.CSS_SELECTOR, "#rate input[type=number]")
            number.send_keys(Keys.CONTROL, "a")
            number.send_keys("0.5", Keys.TAB)
            browser.find_element(By.ID, "classify").click()
            wait.until(lambda b: "after layer 1: 8 of 16" in b.find_element(By.ID, "patches").text)
            cost = browser.find_element(By.CSS_SELECTOR, "#cost textarea").get_attribute("value")
            assert "GMACs" in cost
            assert "ms on this machine" in cost
            title = browser.find_element(By.CSS_SELECTOR, "#title textarea, #title input").get_attribute("value")
            assert title.startswith(EVIL)
            assert browser.execute_script("return window.owned === undefined && !document.querySelector('img[src=x]')")
            screenshot = os.environ.get("EVIT_SCREENSHOT", str(tmp_path / "space.png"))
            browser.save_screenshot(screenshot)
            assert len(set(Image.open(screenshot).convert("RGB").resize((64, 64)).getdata())) > 20
    finally:
        server.kill()
        server.wait()
