"""`evit predict`: rows for pictures and data sets, on one machine and on a cluster."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import datasets
import numpy as np
import pyarrow.dataset
import pyarrow.parquet
import pytest
import torch
from conftest import tiny_config_with
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from evit_hf import EViTForImageClassification
from evit_training.commands.predict import main


LABELS = {"id2label": dict(enumerate("abcde")), "label2id": {name: i for i, name in enumerate("abcde")}}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    EViTForImageClassification(tiny_config_with(**LABELS)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def pixels(number):
    return np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i in range(10):
        Image.fromarray(pixels(i)).save(folder / ("below" if i % 2 else "") / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def predict(capsys, *argv):
    """Rows that `--json` prints."""
    main([str(argument) for argument in (*argv, "--json")])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_rows_are_what_the_pipeline_says(model_folder, pictures, capsys):
    rows = predict(capsys, model_folder, pictures, "--batch-size", 4, "--top-k", 3)
    classify = pipeline("image-classification", model=EViTForImageClassification.from_pretrained(model_folder),
                        image_processor=ViTImageProcessor.from_pretrained(model_folder))  # fmt: skip
    assert len(rows) == 10
    for row in rows:
        expected = classify(row["path"], top_k=3)
        assert row["labels"] == [answer["label"] for answer in expected]
        assert row["scores"] == pytest.approx([answer["score"] for answer in expected], abs=1e-5)
        assert row["error"] is None


def test_the_three_formats_hold_the_same_rows_and_features(model_folder, pictures, tmp_path, capsys):
    printed = predict(capsys, model_folder, pictures, "--features", "--output", tmp_path / "rows.jsonl")
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == printed
    predict(capsys, model_folder, pictures, "--features", "--output", tmp_path / "rows.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    predict(capsys, model_folder, pictures, "--features", "--output", tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    model = EViTForImageClassification.from_pretrained(model_folder).eval()
    processor = ViTImageProcessor.from_pretrained(model_folder)
    for row, of_table, line in zip(printed, table, lines, strict=True):
        assert row["path"] == of_table["path"] == line["path"]
        assert row["labels"] == of_table["labels"] == [line[f"label_{k}"] for k in range(1, 6)]
        assert row["scores"] == pytest.approx(of_table["scores"], abs=1e-7)
        assert row["features"] == [float(line[f"feature_{k}"]) for k in range(1, 33)]
        with torch.no_grad():
            hidden = model.vit(**processor(Image.open(row["path"]), return_tensors="pt")).last_hidden_state
        assert row["features"] == pytest.approx(hidden[0, 0].tolist(), abs=1e-4)


def test_a_picture_that_does_not_decode_is_a_row_that_says_so(model_folder, pictures, capsys):
    (pictures / "5.png").write_bytes(b"no picture")
    main([str(x) for x in (model_folder, pictures, "--json")])
    printed = capsys.readouterr()
    rows = {os.path.basename(row["path"]): row for row in map(json.loads, printed.out.splitlines())}
    assert len(rows) == 10  # 5.png of the folder below has the same name
    (bad,) = [row for row in map(json.loads, printed.out.splitlines()) if row["error"]]
    assert bad["path"] == str(pictures / "5.png")
    assert bad["labels"] is bad["scores"] is None
    assert "1 could not be decoded" in printed.err
    with pytest.raises(SystemExit) as end:
        main([str(x) for x in (model_folder, pictures, "--on-bad-image", "error")])
    assert end.value.code == 2
    assert "5.png" in capsys.readouterr().err


def test_what_was_done_is_not_done_again(model_folder, pictures, tmp_path, capsys, monkeypatch):
    output = tmp_path / "rows.jsonl"
    bad = pictures / "below" / "9.png"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    run = [str(x) for x in (model_folder, pictures, "--output", output, "--batch-size", "2")]
    with pytest.raises(SystemExit):
        main([*run, "--on-bad-image", "error"])
    journal = tmp_path / "rows.jsonl.partial"
    assert not output.exists()
    assert len(journal.read_text().splitlines()) == 1 + 8
    with journal.open("a") as file:
        file.write('{"path": "torn')
    bad.write_bytes(good)
    capsys.readouterr()
    main(run)
    assert "Resuming: 8 of 10" in capsys.readouterr().err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({row["path"] for row in rows}) == len(rows) == 10
    assert not journal.exists()


def test_other_settings_and_a_file_that_is_there_are_refused(model_folder, pictures, tmp_path, capsys):
    output = tmp_path / "rows.csv"
    (tmp_path / "rows.csv.partial").write_text('{"model": "another"}\n')
    for path, words in ((output, "begun with other settings"), (pictures / "0.png", "must end in .csv")):
        with pytest.raises(SystemExit) as end:
            main([str(x) for x in (model_folder, pictures, "--output", path)])
        assert end.value.code == 2
        assert words in capsys.readouterr().err
    predict(capsys, model_folder, pictures, "--output", output, "--overwrite")
    with pytest.raises(SystemExit):
        main([str(x) for x in (model_folder, pictures, "--output", output)])
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere.png"], "there is no such file"),
        (["./nowhere"], "there is no such file"),
        (["EMPTY"], "no picture that can be read"),
        (["digits", "--split", "tset"], "`--split` is `tset`"),
        (["digits", "--ray", "local"], "needs `--output`"),
        (["digits", "--ray", "local", "--output", "x", "--split", "test"], "`--split` is not used with `--ray`"),
    ],
)
def test_what_is_not_there_is_named(words, reason, model_folder, tmp_path, capsys):
    words = [str(tmp_path) if word == "EMPTY" else word for word in words]
    with pytest.raises(SystemExit) as end:
        main([str(model_folder), *words])
    assert end.value.code == 2
    assert reason in capsys.readouterr().err


def test_data_sets_and_pictures_go_together_and_twice_is_once(model_folder, pictures, tmp_path, capsys):
    rows = {"image": [Image.fromarray(pixels(20 + i)) for i in range(3)], "label": [0, 1, 0]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "test.parquet")
    rows = predict(capsys, model_folder, tmp_path / "test.parquet", pictures / "0.png", pictures)
    assert [row["path"] for row in rows[:3]] == [f"{tmp_path / 'test.parquet'}:test/{i}" for i in range(3)]
    assert len({row["path"] for row in rows}) == len(rows) == 13


def test_rows_of_two_splits_and_two_tables_with_the_same_file_names_are_all_there(model_folder, tmp_path, capsys):
    for number, name in enumerate(("train", "test")):
        for folder in (tmp_path / "within", tmp_path / name):
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels(number)).save(folder / "0.png")
        image = {"bytes": (tmp_path / "within" / "0.png").read_bytes(), "path": "0.png"}
        rows = datasets.Dataset.from_dict({"image": [image]}, features=datasets.Features({"image": datasets.Image()}))
        rows.to_parquet(tmp_path / "within" / f"{name}.parquet")
        (tmp_path / name / "table.csv").write_text("image\n0.png\n")
    (tmp_path / "within" / "0.png").unlink()
    rows = predict(capsys, model_folder, tmp_path / "within")
    assert sorted(row["path"] for row in rows) == ["test/0.png", "train/0.png"]
    tables = [tmp_path / name / "table.csv" for name in ("train", "test")]
    rows = predict(capsys, model_folder, *tables, "--image-column", "image")
    assert len({row["path"] for row in rows}) == 2
    assert [row["error"] for row in rows] == [None, None]
    assert rows[0]["scores"] != rows[1]["scores"]


def test_a_journal_of_other_inputs_is_refused(model_folder, pictures, tmp_path, capsys, monkeypatch):
    output = tmp_path / "rows.jsonl"
    (pictures / "0.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        main([str(x) for x in (model_folder, pictures, "--output", output, "--on-bad-image", "error")])
    assert (tmp_path / "rows.jsonl.partial").exists()
    monkeypatch.chdir(pictures.parent)  # "pictures" would name the same pictures otherwise
    for words in ([pictures / "below"], ["pictures"], [pictures, "--split", "test"]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(x) for x in (model_folder, *words, "--output", output)])
        assert end.value.code == 2
        assert ("(split)" if "--split" in words else "(inputs)") in capsys.readouterr().err
    main([str(x) for x in (model_folder, pictures, "--output", output)])
    assert output.exists()


def test_a_dense_vit_stays_dense_unless_asked(pictures, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    vit = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=64, **LABELS, initializer_range=0.2)).eval()
    vit.save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "vit")
    rows = predict(capsys, tmp_path / "vit", pictures)
    with torch.no_grad():
        logits = vit(**processor([Image.open(row["path"]) for row in rows], return_tensors="pt")).logits
    dense = logits.softmax(1).sort(descending=True).values
    assert torch.tensor([row["scores"] for row in rows]).allclose(dense, atol=1e-5)
    rows = predict(capsys, tmp_path / "vit", pictures, "--keep-rate", "0.5")
    assert not torch.tensor([row["scores"] for row in rows]).allclose(dense, atol=1e-3)


def run_command(*argv):
    return subprocess.Popen(
        [sys.executable, "-m", "evit_training", "predict", *map(str, argv)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def many_pictures(folder, count):
    folder.mkdir()
    for i in range(count):
        Image.fromarray(pixels(i)).save(folder / f"{i:04}.png")
    (folder / "0007.png").write_bytes(b"no picture")
    return folder


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_with_every_row_once(model_folder, tmp_path):
    folder = many_pictures(tmp_path / "many", 150)
    output, journal = tmp_path / "rows.csv", tmp_path / "rows.csv.partial"
    run = (model_folder, folder, "--output", output, "--batch-size", "4")
    for done in (30, 80):
        process = run_command(*run)
        wait_for(lambda done=done: journal.exists() and journal.read_bytes().count(b"\n") > done, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
    process = run_command(*run)
    assert process.wait(240) == 0, process.stderr.read()
    with output.open(newline="") as file:
        counts = Counter(row["path"] for row in csv.DictReader(file))
    assert len(counts) == 150
    assert set(counts.values()) == {1}


@pytest.mark.cluster
def test_ray_on_this_machine_writes_every_row_once_and_refuses_to_do_it_again(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    folder, output = many_pictures(tmp_path / "many", 41), tmp_path / "rows"
    run = (model_folder, folder, "--ray", "local", "--output", output, "--batch-size", "8", "--quiet")
    process = run_command(*run)
    assert process.wait(500) == 0, process.stderr.read()
    rows = pyarrow.dataset.dataset(output).to_table().to_pylist()
    counts = Counter(row["path"] for row in rows)
    assert len(counts) == 41
    assert set(counts.values()) == {1}
    assert [os.path.basename(row["path"]) for row in rows if row["error"]] == ["0007.png"]
    assert all(len(row["labels"]) == 5 for row in rows if not row["error"])
    process = run_command(*run)
    assert process.wait(100) == 2
    assert "already exists" in process.stderr.read()


@pytest.mark.cluster
def test_ray_loses_no_row_when_a_node_and_then_the_driver_are_killed(model_folder, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    folder, output = many_pictures(tmp_path / "many", 201), tmp_path / "rows"
    node_settings = {"num_cpus": 2, "object_store_memory": 150 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node_settings | {"include_dashboard": False})

    def start():
        run = (model_folder, folder, "--ray", cluster.address, "--output", output, "--batch-size", "4", "--quiet")
        return run_command(*run)

    def num_written():
        return len(list(output.glob("*.parquet")))

    try:
        nodes = [cluster.add_node(**node_settings)]
        process = start()
        wait_for(lambda: num_written() > 2, process)
        cluster.remove_node(nodes[0], allow_graceful=False)
        process.kill()
        process.wait()
        assert (tmp_path / "rows.partial" / "settings.json").exists()  # not finished
        written = num_written()
        cluster.add_node(**node_settings)
        process = start()
        second = cluster.add_node(**node_settings)
        wait_for(lambda: num_written() > written, process)
        cluster.remove_node(second, allow_graceful=False)
        assert process.wait(240) == 0, process.stderr.read()
    finally:
        process.kill()
        cluster.shutdown()
    rows = pyarrow.dataset.dataset(output).to_table().to_pylist()
    counts = Counter(row["path"] for row in rows)
    assert len(counts) == 201
    assert set(counts.values()) == {1}
    assert [os.path.basename(row["path"]) for row in rows if row["error"]] == ["0007.png"]
