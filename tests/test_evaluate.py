import json

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_config_with
from PIL import Image
from test_data import picture, write_parquet
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from evit_hf import EViTForImageClassification
from evit_hf.profiling import num_macs
from evit_training.commands.evaluate import main
from evit_training.measuring.evaluation import Measurement, draw_tradeoff
from evit_training.measuring.metrics import binomial_standard_error


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def model_folder(tmp_path):
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate("cdab")), "label2id": {name: i for i, name in enumerate("cdab")}}
    EViTForImageClassification(tiny_config_with(num_labels=4, **labels)).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def evaluate(*argv):
    main([str(argument) for argument in (*argv, "--num_workers", "0")])


def test_a_model_is_measured_at_each_keep_rate_with_its_own_classes(model_folder, tmp_path, capsys):
    """The data numbers its classes in a different order, and lacks one."""
    data = write_parquet(tmp_path / "test.parquet", list("abcabcabca"))
    evaluate(model_folder, "--dataset", data, "--keep-rates", "1.0", "0.5", "--batch-size", "4")
    report = json.loads((model_folder / "evaluation.json").read_text())
    results = report["results"]
    assert [result["keep_rate"] for result in results] == [1.0, 0.5]
    model = EViTForImageClassification.from_pretrained(model_folder).eval()
    processor = ViTImageProcessor.from_pretrained(model_folder)
    pixel_values = processor([picture(10 * i) for i in range(10)], return_tensors="pt")["pixel_values"]
    wanted = torch.tensor([model.config.label2id[name] for name in "abcabcabca"])
    for result in results:
        guesses = model(pixel_values, keep_rate=result["keep_rate"]).logits.argmax(1)
        assert result["top1"] == pytest.approx((guesses == wanted).float().mean().item())
        assert result["gmacs"] == num_macs(model.config, result["keep_rate"]) / 1e9
        assert torch.tensor(result["confusion_matrix"]).sum() == 10
    assert report["label_names"] == list("cdab")
    assert "1.0 (dense ViT)" in capsys.readouterr().out
    assert Image.open(model_folder / "evaluation.png").size == (900, 600)


def test_a_vit_of_transformers_can_be_measured_into_another_folder(tmp_path, capsys):
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        id2label={0: "a", 1: "b"},
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    data = write_parquet(tmp_path / "train.parquet", [0, 1, 1], ["a", "b"])
    evaluate(tmp_path / "vit", "--dataset", data, "--keep_rates", "0.5", "--output_dir", tmp_path / "out", "--json")
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "Saved " in captured.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json", "evaluation.png"}
    assert not (tmp_path / "vit" / "evaluation.json").exists()
    assert json.loads(captured.out)["results"][0]["dtype"] == "float32"
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = ["--keep_rates", "0.5", "--output_dir", tmp_path / "out", "--mixed-precision", "bf16", "--json"]
    evaluate(tmp_path / "vit", "--dataset", data, *flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert json.loads(capsys.readouterr().out)["results"][0]["dtype"] == "float32 with bf16 autocast"


def test_streamed_data_is_measured_as_stored_data_is(model_folder, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abc"))})
    rows = {"image": [picture(10 * i) for i in range(11)], "label": [i % 3 for i in range(11)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    results = []
    for flags in ([], ["--streaming"]):
        evaluate(model_folder, "--dataset", tmp_path / "test.parquet", "--keep_rates", "0.7", *flags)
        results.append(json.loads((model_folder / "evaluation.json").read_text())["results"][0])
    assert results[0]["confusion_matrix"] == results[1]["confusion_matrix"]


def test_what_cannot_be_measured_is_refused(model_folder, tmp_path, capsys):
    data = write_parquet(tmp_path / "test.parquet", ["a", "z"])
    for argv, sentence in (
        ((model_folder, "--dataset", data), "classes that the model does not know: ['z'] of 2; the model has 4"),
        ((model_folder, "--dataset", data, "--keep_rates", "1.5"), "1.5"),
        ((tmp_path / "nothing", "--dataset", data), "nothing"),
        ((model_folder, "--dataset", data, "--eval_split", "x"), "`--eval-split` is `x`, but the data has ['test']"),
    ):
        with pytest.raises(SystemExit) as exit_:
            evaluate(*argv)
        assert exit_.value.code == 2
        assert sentence in capsys.readouterr().err


def test_the_tradeoff_has_error_bars_and_an_axis_on_which_one_image_is_a_small_step(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    results = [
        Measurement(rate, {"top1": top1, "num_images": 360}, gmacs, 1.0, "cpu", "float32", 1, (32, 32))
        for rate, top1, gmacs in ((1.0, 357 / 360, 4.6), (0.7, 356 / 360, 3.0))
    ]
    draw_tradeoff(results, tmp_path / "tradeoff.png")
    draw_tradeoff(results[:1], tmp_path / "tradeoff.png")
    for figure in figures:
        (axes,) = figure.axes
        low, high = axes.get_ylim()
        assert high - low > 7.99 * 100 * binomial_standard_error(357 / 360, 360)
        assert 100 < high < 101
        assert "360 images" in axes.get_title()
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["0.7", "dense"]
    (bars,) = figures[0].axes[0].containers
    (segments,) = [lines.get_segments() for lines in bars[2]]
    for (_, low), (_, high) in segments:
        assert high - low == pytest.approx(200 * binomial_standard_error((low + high) / 200, 360))
    assert [binomial_standard_error(share, 100) for share in (0.0, 1.0)] == pytest.approx([0.00705] * 2, abs=1e-4)
    assert binomial_standard_error(0.5, 100) == pytest.approx(0.05)
