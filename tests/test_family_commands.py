"""The commands that measure, export, convert and share, on families of `reorganize`."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import run_python
from family_folders import TIMM, save_family
from hub_server import Hub
from test_hub_push import evit
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from vision_families import HAS_DINOV2, build

from evit_hf import reorganize
from evit_hf.export import ExportError, exported_program
from evit_hf.visualization import attentive_patch_mask, attentive_patch_picture
from evit_training.cli import main
from evit_training.learning.models import load_classifier, load_model
from evit_training.measuring.arguments import BenchmarkArguments
from evit_training.measuring.benchmark import benchmark
from evit_training.measuring.variants import dense_baseline
from evit_training.sharing.card import card_to_push, render_folder_card


PIXELS = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


def reorganized_folder(case, folder):
    """A folder of a family with its settings, as `evit train` and `evit convert` leave it."""
    model = load_classifier(str(save_family(case, folder.with_name(f"{folder.name}-dense"))), keep_rate=0.6)
    model.save_pretrained(folder)
    source = folder.with_name(f"{folder.name}-dense") / "preprocessor_config.json"
    if source.exists():
        (folder / source.name).write_text(source.read_text())
    return folder


def test_a_family_is_evaluated(tmp_path):
    folder = save_family("dinov2", tmp_path / "model")
    flags = ["--keep-rates", "1.0", "0.5", "--max-eval-samples", "16", "--num-workers", "0", "--batch-size", "8"]
    main(["evaluate", str(folder), "--dataset", "digits", *flags])
    dense, own = json.loads((folder / "evaluation.json").read_text())["results"]
    assert dense["gmacs"] > own["gmacs"]
    assert own["num_images"] == 16


@pytest.mark.parametrize("case", ["dinov2-registers", "beit", "timm"])
@torch.no_grad()
def test_dense_baselines_of_families_have_their_weights_and_give_up_nothing(case, tmp_path):
    model = load_model(str(save_family(case, tmp_path / "model"))).eval()
    dense = dense_baseline(model, "transformers")
    assert torch.equal(dense(PIXELS).logits, model(PIXELS, keep_rate=1.0).logits)
    assert not hasattr(dense(PIXELS), "attentive_index")
    with pytest.raises(ValueError, match="`--baselines timm-unfused` has no .*: take transformers"):
        dense_baseline(model, "timm-unfused")


@pytest.mark.slow
def test_a_model_without_classifier_is_timed_but_not_trained(tmp_path):
    build("dinov3").save_pretrained(tmp_path)
    arguments = BenchmarkArguments(keep_rates=[1.0, 0.5], batch_sizes=[1], rounds=1, device="cpu")
    (setting,) = benchmark(str(tmp_path), arguments)["settings"]
    rows = {row["name"]: row for row in setting["rows"]}
    assert list(rows) == [
        "dense transformers",
        "dense transformers-eager",
        "reorganized 1.0 sdpa",
        "reorganized 0.5 sdpa",
    ]
    assert rows["reorganized 0.5 sdpa"]["executed_gmacs"] < rows["reorganized 1.0 sdpa"]["executed_gmacs"]
    assert rows["reorganized 0.5 sdpa"]["like_for_like"] > 0
    arguments.training = True
    with pytest.raises(ValueError, match="`--training` needs a classifier, and `DINOv3ViTModel` has none"):
        benchmark(str(tmp_path), arguments)


@pytest.mark.slow
def test_a_family_is_tuned_and_saved_with_its_settings(tmp_path):
    folder = save_family("clip-classifier", tmp_path / "model")
    flags = ["--dataset", "digits", "--images", "16", "--num-workers", "0", "--rounds", "1"]
    main(["tune", str(folder), "0.8", *flags, "--save", str(tmp_path / "tuned"), "--output-dir", str(tmp_path)])
    report = json.loads((tmp_path / "tune.json").read_text())
    chosen = report[report["chosen"]]
    assert chosen["gmacs"] <= 0.8 * report["dense"]["gmacs"]
    config = load_classifier(str(tmp_path / "tuned")).config.vision_config
    assert (config.keep_rate, config.reorganization_layers) == (chosen["keep_rate"], chosen["reorganization_layers"])


@pytest.mark.slow
def test_a_family_exports_what_it_answers_and_its_keep_rate_is_fixed():
    model = reorganize(build("dinov2-registers"), 0.6, reorganization_layers=[1, 2])
    program, _ = exported_program(model)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(PIXELS[:1]), model(PIXELS[:1]).logits)
    with pytest.raises(ExportError, match="count their tokens in Python, so its keep rate has to be fixed"):
        exported_program(model, keep_rate_is_input=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["clip-classifier", "dinov3", "beit", "timm"])
@pytest.mark.parametrize("engine", ["onnx", "openvino", "aoti"])
def test_families_export_into_all_formats(engine, case, traced_once, tmp_path):
    if engine == "aoti":
        traced_once.clear()
    folder = tmp_path / "model"
    if case == "dinov3":
        build(case).save_pretrained(folder)
        save_family("vit-msn", tmp_path / "other")
        (folder / "preprocessor_config.json").write_text((tmp_path / "other/preprocessor_config.json").read_text())
    else:
        save_family(case, folder)
    main(["export", str(folder), str(tmp_path / "out"), "--format", engine, "--keep-rate", "0.5"])
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["largest_difference"] < 1e-4
    assert record["output"] == ("last_hidden_state" if case == "dinov3" else "logits")


def test_convert_gives_a_family_its_settings(tmp_path, capsys):
    folder = save_family("beit", tmp_path / "beit")
    flags = ["--keep-rate", "0.9", "0.5", "--reorganization-layers", "1", "3", "--inattentive-tokens", "dropped"]
    main(["convert", str(folder), str(tmp_path / "out"), *flags])
    assert "BeitForImageClassification" in capsys.readouterr().out
    config = load_classifier(str(tmp_path / "out")).config
    assert (config.keep_rate, config.reorganization_layers, config.inattentive_tokens) == (
        [0.9, 0.5],
        [1, 3],
        "dropped",
    )
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(folder), str(tmp_path / "other"), "--image-size", "64"])
    assert "`--image-size` is for EViT" in capsys.readouterr().err


@torch.no_grad()
def test_pictures_show_the_patches_that_families_keep_whatever_the_grid():
    images = torch.rand(2, 3, 32, 64)
    wrapper = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args={**TIMM, "img_size": (32, 64)})
    models = [build("dinov3"), TimmWrapperForImageClassification(wrapper).eval()]
    models += [build("dinov2-registers")] * HAS_DINOV2
    for model in models:
        outputs = reorganize(model, 0.5, reorganization_layers=[1, 2])(images)
        assert attentive_patch_mask(outputs.attentive_index[0], 32).sum(1).tolist() == [16, 16]
        picture = attentive_patch_picture(images, outputs.attentive_index, 8, min_pixels=32)
        assert picture.size == (3 * 72, 2 * 40)


def test_cards_of_folders_name_the_family_and_settings(tmp_path):
    for case in ("dinov2-registers", "clip-classifier"):
        folder = reorganized_folder(case, tmp_path / case)
        family = json.loads((folder / "config.json").read_text())["model_type"]
        text = render_folder_card(folder, "org/name")
        assert f"of 4 layers, 32 wide, of the family `{family}`" in text
        assert "keep rate 0.6, inattentive tokens fused" in text
        assert "`evit_hf.reorganize(model)` makes it this one" in text
        assert "as_rgb" not in text
    dense = tmp_path / "clip-classifier-dense"
    assert card_to_push(dense, dense, "org/name", None) == (
        None,
        f"The card in {dense} was left as it is: config.json has no keep rate: the model is dense",
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dinov2-registers", "timm"])
def test_pushed_families_reorganize_in_a_fresh_process(case, tmp_path):
    folder = reorganized_folder(case, tmp_path / "model")
    torch.save(PIXELS, tmp_path / "pixels.pt")
    with torch.no_grad():
        torch.save(load_classifier(str(folder)).eval()(PIXELS).logits, tmp_path / "logits.pt")
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home")
        evit("push", folder, "org/family", env=environment)
        code = """
import torch
from transformers import AutoModelForImageClassification
pixels, expected = torch.load("pixels.pt"), torch.load("logits.pt")
model = AutoModelForImageClassification.from_pretrained("org/family", trust_remote_code=True).eval()
torch.testing.assert_close(model(pixels).logits, expected)
print([index.shape[1] for index in model(pixels, keep_rate=0.5).attentive_index])
"""
        assert run_python(code, tmp_path, without_package=True, **environment).strip() == "[18, 10, 6]"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dinov2", "timm"])
def test_spaces_of_families_answer_as_the_model_does(case, tmp_path):
    folder, space = save_family(case, tmp_path / "model"), tmp_path / "space"
    main(["space", str(folder), str(space)])
    assert ("timm" in (space / "requirements.txt").read_text()) == (case == "timm")
    code = """
import json, app
from PIL import Image
answer, dense, gallery, attention, cost = app.show(Image.effect_noise((60, 40), 90), 0.6)
print(json.dumps([len(answer), [text for _, text in gallery], cost, len(dense), [text for _, text in attention]]))
"""
    num_classes, captions, cost, num_dense, layers = json.loads(run_python(code, space).strip().splitlines()[-1])
    assert num_classes == 10
    model = reorganize(load_classifier(str(folder)))
    left = [(index >= 0).sum().item() for index in model(PIXELS[:1], macs=0.6).attentive_index]
    assert captions == ["all 36 patches", *(f"after layer {i}: {n} of 36" for i, n in enumerate(left))]
    assert left[-1] < 36
    assert num_dense == 5
    assert layers == [f"layer {i}" for i in range(4)]
    assert "GMACs" in cost


def test_the_saved_settings_do_not_change_what_others_load(tmp_path):
    folder = reorganized_folder("dinov2", tmp_path / "model")
    dense = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert not hasattr(dense(PIXELS), "attentive_index")
        backbone = AutoModel.from_pretrained(folder).eval()
        assert backbone(PIXELS).last_hidden_state.shape[1] == 37
