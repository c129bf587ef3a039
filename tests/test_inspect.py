"""The command `evit inspect`: its numbers against a loop over images, and its figures."""

import json

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_config_with
from PIL import Image
from transformers import ViTImageProcessor

from evit_hf import EViTForImageClassification
from evit_training.cli import main


FIGURES = {"survival.png", "survival_by_class.png", "overlap.png", "agreement.png", "most_different.png"}


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((40, 40), Image.Resampling.NEAREST)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    labels = {0: "c", 1: "b", 2: "a $x_1$"}
    network = EViTForImageClassification(
        tiny_config_with(num_labels=3, id2label=labels, label2id={"c": 0, "b": 1, "a $x_1$": 2})
    )
    network.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_data(path, labels, names, broken=()):
    rows = []
    for i in range(len(labels)):
        picture(i).save(path.with_suffix(f".{i}.png"))
        data = b"no picture" if i in broken else path.with_suffix(f".{i}.png").read_bytes()
        rows.append({"bytes": data, "path": None})
    kind = datasets.ClassLabel(names=names)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Sequence(kind) if isinstance(labels[0], list) else kind}
    )
    datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features).to_parquet(path)
    return path


def inspect(*words):
    main(["inspect", *map(str, words), "--num-workers", "0", "--batch-size", "4"])


def test_numbers_equal_a_loop_over_images(model, tmp_path, capsys):
    labels = [i % 2 for i in range(10)]
    data = write_data(tmp_path / "test.parquet", labels, ["a $x_1$", "b"], broken=(3,))
    rates = ("--keep-rates", 0.7, 0.5)
    inspect(
        model,
        "--dataset",
        data,
        "-o",
        tmp_path / "out",
        *rates,
        "--on-bad-image",
        "skip",
        "--json",
        "--num-pictures",
        2,
    )
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FIGURES, "inspection.json"}
    assert (report["num_images"], report["num_bad_images"], report["grid"]) == (9, 1, [4, 4])

    network = EViTForImageClassification.from_pretrained(model).eval()
    processor = ViTImageProcessor.from_pretrained(model)
    seen = [i for i in range(10) if i != 3]
    wanted = [network.config.label2id["a $x_1$" if labels[i] == 0 else "b"] for i in seen]
    pixel_values = processor([picture(i) for i in seen], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = {rate: network(pixel_values, keep_rate=rate) for rate in (1.0, 0.7, 0.5)}
        attention = network(pixel_values, keep_rate=1.0, output_class_attention=True).class_attention
    answers = {rate: output.logits.argmax(1).tolist() for rate, output in outputs.items()}
    scores = {rate: output.logits.softmax(1) for rate, output in outputs.items()}
    assert report["dense"]["accuracy"] == pytest.approx(np.mean(np.equal(answers[1.0], wanted)))
    kept = {
        rate: [[{p for p in row if p >= 0} for row in index.tolist()] for index in outputs[rate].attentive_index]
        for rate in (0.7, 0.5)
    }
    distances = {rate: ((scores[rate] - scores[1.0]).abs().sum(1) / 2).tolist() for rate in (0.7, 0.5)}
    for found, rate in zip(report["keep_rates"], (0.7, 0.5), strict=True):
        assert found["keep_rate"] == rate
        assert found["agreement"] == pytest.approx(np.mean(np.equal(answers[rate], answers[1.0])))
        assert found["accuracy"] == pytest.approx(np.mean(np.equal(answers[rate], wanted)))
        gained = found["right_only_here"] - found["right_only_dense"]
        assert gained == round(9 * (found["accuracy"] - report["dense"]["accuracy"]))
        assert found["mean_distance"] == pytest.approx(np.mean(distances[rate]), abs=1e-4)
        for stage, layer in enumerate((1, 2, 3)):
            row = found["stages"][stage]
            sets = kept[rate][stage]
            assert row["layer"] == layer
            assert row["mean_patches_kept"] == pytest.approx(np.mean([len(one) for one in sets]), abs=1e-4)
            shared = []
            for image, one in enumerate(sets):
                order = attention[image, stage].argsort(descending=True).tolist()
                shared.append(len(one & set(order[: len(one)])) / len(one))
            assert row["shared_with_dense_attention"] == pytest.approx(np.mean(shared), abs=1e-4)
            for patch in range(16):
                place = divmod(patch, 4)
                share = np.mean([patch in one for one in sets])
                assert row["survival"][place[0]][place[1]] == pytest.approx(share, abs=1e-4)
                share = np.mean([patch in one for one, label in zip(sets, wanted, strict=True) if label == 1])
                assert row["survival_by_class"]["b"][place[0]][place[1]] == pytest.approx(share, abs=1e-4)
    last = next(row for row in report["overlap_between_keep_rates"] if row["layer"] == 3)
    pairs = list(zip(kept[0.7][2], kept[0.5][2], strict=True))
    expected = np.mean([len(a & b) / max(len(a | b), 1) for a, b in pairs])
    assert last["intersection_over_union"] == pytest.approx(expected, abs=1e-4)
    assert last["share_of_the_lower_rate"] == pytest.approx(np.mean([len(a & b) / len(b) for a, b in pairs]), abs=1e-4)
    farthest = max((distance, i) for rows in distances.values() for i, distance in enumerate(rows))
    assert report["most_different"][0]["image"] == seen[farthest[1]]
    assert report["most_different"][0]["distance"] == pytest.approx(farthest[0], abs=1e-4)
    assert len({row["image"] for row in report["most_different"]}) == 2


def test_shares_of_operations_are_inspected_in_every_layer(model, tmp_path, capsys, leave_at_least):
    leave_at_least(4)
    data = write_data(tmp_path / "test.parquet", [0, 1, 0], ["c", "b"])
    inspect(model, "--dataset", data, "-o", tmp_path / "out", "--macs", 0.8, 0.7, "--num-pictures", 1)
    assert "macs=0.8: " in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert [row["macs"] for row in report["keep_rates"]] == [0.8, 0.7]
    assert all(row["gmacs"] <= row["macs"] * 1.1 * report["dense"]["gmacs"] for row in report["keep_rates"])
    network = EViTForImageClassification.from_pretrained(model).eval()
    pixel_values = ViTImageProcessor.from_pretrained(model)([picture(i) for i in range(3)], return_tensors="pt")
    left = [index.shape[1] for index in network(**pixel_values, macs=0.7).attentive_index]
    assert [stage["mean_patches_kept"] for stage in report["keep_rates"][1]["stages"]] == left
    assert len(left) == 4
    assert report["most_different"][0]["macs"] in (0.8, 0.7)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FIGURES, "inspection.json"}


@pytest.mark.slow
def test_several_labels_and_classes_that_the_model_does_not_know(model, tmp_path, capsys):
    data = write_data(tmp_path / "test.parquet", [[0, 1], [2], [0]], ["c", "b", "a $x_1$"])
    inspect(model, "--dataset", data, "-o", tmp_path / "out", "--quiet", "--num-pictures", 0)
    assert capsys.readouterr().out == ""
    report = json.loads((tmp_path / "out" / "inspection.json").read_text())
    counts = {name: np.sum(rows) for name, rows in report["keep_rates"][0]["stages"][0]["survival_by_class"].items()}
    assert counts == pytest.approx(dict.fromkeys(("c", "b", "a $x_1$"), 12), abs=0.01)
    assert not (tmp_path / "out" / "most_different.png").exists()
    data = write_data(tmp_path / "other.parquet", [0, 1, 1], ["x", "y"])
    inspect(model, "--dataset", data, "-o", tmp_path / "out")
    captured = capsys.readouterr()
    assert "No accuracy: The data has classes that the model does not know: ['x', 'y']" in captured.out
    report = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert report["dense"]["accuracy"] is None
    assert set(report["keep_rates"][0]["stages"][0]["survival_by_class"]) == {"x", "y"}


def test_what_cannot_be_inspected_is_refused(model, tmp_path, capsys):
    (tmp_path / "file").touch()
    for words, sentence in (
        ((model,), "the following arguments are required: -o/--output"),
        ((model, "-o", tmp_path / "out", "--keep-rates", 1.0), "must name a keep rate below 1"),
        ((model, "-o", tmp_path / "file"), "`-o` is a file"),
        ((model, "-o", tmp_path / "out", "--streaming"), "unknown flag `--streaming`"),
        ((tmp_path / "gone", "-o", tmp_path / "out"), "gone"),
    ):
        with pytest.raises(SystemExit, match="2"):
            inspect(*words)
        assert sentence in capsys.readouterr().err
