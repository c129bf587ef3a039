"""People's data as it lies on their disks: no picture is dropped, pooled or renamed without a word."""

import io
import json
import os
import shutil
import socket
import unicodedata
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_config_with
from PIL import Image
from test_data import write_parquet

from evit_hf import as_rgb
from evit_training.arguments import DataArguments, parse_train_arguments
from evit_training.data.images import BadImageError, LabelledImages, OutsideFileError, is_inside
from evit_training.data.names import class_numbers, split_of
from evit_training.data.splits import check_images, describe_splits, fingerprint, load_evaluation_split, load_splits
from evit_training.learning.models import build_model, random_classifier


def put(folder, count, name="{i}.png", start=0):
    """Pictures whose red tells their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        Image.new("RGB", (4, 3), (i, 0, 0)).save(folder / name.format(i=i))


def load(*sources, **settings):
    return load_splits(DataArguments(dataset=[str(source) for source in sources], **settings), seed=0)


def used(splits):
    """Number of images of each class over both splits."""
    counts = Counter()
    for name in ("train", "evaluation"):
        labels = getattr(splits, name)[splits.label_column][:]
        counts.update(splits.label_names[x] for label in labels for x in (label if splits.multi_label else [label]))
    return dict(counts)


def sizes(splits):
    return len(splits.train), len(splits.evaluation)


# Folders


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[("Training", "train"), ("TRAIN", "train"), ("train2017", "train"), ("val_images", "validation")],
        *[("Dev", "validation"), ("test set", "test"), ("Testing", "test")],
        *[("holdout", None), ("fold1", None), ("test drive", None), ("train_test", None), ("trainers", None)],
    ],
)
def test_usual_words_are_splits(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("folders", "numbers"),
    [
        (("Training", "Testing"), (40, 20)),
        (("Train", "Val", "Test"), (40, 20)),
        (("train2017", "val2017"), (40, 20)),
    ],
)
def test_split_folders_are_not_pooled(folders, numbers, tmp_path):
    for k, split in enumerate(folders):
        for label in ("cat", "dog"):
            put(tmp_path / split / label, 20 if k == 0 else 10)
    assert sizes(load(tmp_path)) == numbers


@pytest.mark.parametrize("folders", [("train", "holdout"), ("fold1", "fold2"), ("train", "train_extra", "test")])
def test_folders_that_may_be_splits_are_refused_until_they_are_named(folders, tmp_path):
    for split in folders:
        for label in ("cat", "dog"):
            put(tmp_path / split / label, 3)
    with pytest.raises(ValueError, match=f"{folders[1]}.*`--eval-split`"):
        load(tmp_path)
    splits = load(tmp_path, train_split=folders[0], eval_split=folders[1])
    assert sizes(splits) == (6, 6)


def test_words_in_file_names_mean_nothing(tmp_path):
    for label in ("cat", "dog"):
        put(tmp_path / label, 10)
        put(tmp_path / label, 3, "train {i}.png")
        put(tmp_path / label, 2, "dog on a test drive {i}.png")
    assert used(load(tmp_path)) == {"cat": 15, "dog": 15}


def test_classes_may_be_called_train_test_and_val(tmp_path):
    for label in ("bus", "car", "train"):
        put(tmp_path / "flat" / label, 4)
    assert used(load(tmp_path / "flat")) == {"bus": 4, "car": 4, "train": 4}
    for split in ("train", "test"):
        for label in ("train", "test", "val"):
            put(tmp_path / "both" / split / label, 4)
    splits = load(tmp_path / "both")
    assert sizes(splits) == (12, 12)
    assert splits.label_names == ["test", "train", "val"]
    for label in ("train", "test"):
        put(tmp_path / "neither" / label, 4)
    with pytest.raises(ValueError, match="`test`, `train` with pictures but without class folders. If"):
        load(tmp_path / "neither")


def test_names_of_classes_are_kept_as_people_write_them(tmp_path):
    names = ["A", "a", "None", "NA", "nan", "TODO", "007", "10", "2"]
    for name in names:
        put(tmp_path / name, 4)
    assert used(load(tmp_path)) == dict.fromkeys(names, 4)


def test_two_spellings_of_unicode_are_one_class(tmp_path):
    for form, label in (("NFC", "Kätzchen"), ("NFD", "Kätzchen"), ("NFC", "Hund")):
        put(tmp_path / ("train" if form == "NFC" else "test") / unicodedata.normalize(form, label), 4)
    put(tmp_path / "test" / "Hund", 4)
    splits = load(tmp_path)
    assert splits.label_names == ["Hund", "Kätzchen"]
    assert used(splits) == {"Hund": 8, "Kätzchen": 8}


def test_linked_class_folders_count_and_circles_end(tmp_path):
    put(tmp_path / "store" / "cat", 6)
    put(tmp_path / "data" / "dog", 6)
    os.symlink(tmp_path / "store" / "cat", tmp_path / "data" / "cat")
    os.symlink(tmp_path / "data", tmp_path / "data" / "dog" / "again")
    assert used(load(tmp_path / "data")) == {"cat": 6, "dog": 6}


def test_the_class_is_the_first_folder_below_the_split(tmp_path):
    for label in ("cat", "dog"):
        for year in ("2020", "2021"):
            put(tmp_path / "plain" / label / year, 3)
            put(tmp_path / "split" / "train" / label / year, 3)
            put(tmp_path / "split" / "val" / label / year, 3)
            put(tmp_path / "inside" / label / {"2020": "train", "2021": "test"}[year], 3)
    assert used(load(tmp_path / "plain")) == {"cat": 6, "dog": 6}
    assert sizes(load(tmp_path / "split")) == (12, 12)
    assert sizes(load(tmp_path / "inside")) == (6, 6)
    shutil.move(tmp_path / "plain" / "cat" / "2020", tmp_path / "plain" / "cat" / "test")
    with pytest.raises(ValueError, match="`test` inside some class folders"):
        load(tmp_path / "plain")


def test_a_class_that_one_split_lacks_is_named(tmp_path):
    for split, labels in (("train", ("cat", "dog", "fox")), ("test", ("cat", "dog"))):
        for label in labels:
            put(tmp_path / split / label, 3)
    with pytest.raises(ValueError, match=r"no picture of 1 classes .*\['fox'\].*`--allow-missing-classes`"):
        load(tmp_path)
    splits = load(tmp_path, allow_missing_classes=True)
    assert splits.label_names == ["cat", "dog", "fox"]
    assert "no images of 1 classes: fox" in describe_splits(splits)
    put(tmp_path / "test" / "fox", 3)
    put(tmp_path / "test" / "emu", 3)
    with pytest.raises(ValueError, match=r"classes that the training split has not: \['emu'\]"):
        load(tmp_path)
    assert load(tmp_path, allow_missing_classes=True).label_names == ["cat", "dog", "fox", "emu"]


def test_an_own_folder_is_taken_before_a_packaged_name(tmp_path, monkeypatch):
    for label in ("one", "two"):
        put(tmp_path / "digits" / label, 4)
    monkeypatch.chdir(tmp_path)
    splits = load("digits")
    assert splits.label_names == ["one", "two"]
    assert "`digits` is the folder of that name here, not the packaged data set." in splits.notes
    monkeypatch.chdir(tmp_path / "digits")
    assert load(".").label_names == ["one", "two"]


@pytest.mark.parametrize("name", ["data [2023]", "x::y", "a*b"])
def test_folders_with_odd_names_are_read(name, tmp_path):
    for label in ("cat", "dog"):
        put(tmp_path / name / label, 4)
    splits = load(tmp_path / name)
    images = LabelledImages(splits, "train", as_rgb)
    assert used(splits) == {"cat": 4, "dog": 4}
    assert images.image(0).size == (4, 3)


def test_what_is_not_a_picture_is_counted(tmp_path):
    for label in ("cat", "dog"):
        put(tmp_path / label, 8)
        put(tmp_path / label, 2, "{i}.avif", 20)
        put(tmp_path / label, 1, "{i}.PNG", 30)
        put(tmp_path / label, 1, "picture.png", 40)
        (tmp_path / label / "picture.png").rename(tmp_path / label / "picture")  # Pillow knows it by its content
        (tmp_path / label / "x.heic").write_bytes(b"no picture")
        (tmp_path / label / "0.txt").write_text("0 0.5 0.5 1 1")
        (tmp_path / label / "0.json").write_text("{}")
        (tmp_path / label / ".DS_Store").write_bytes(b"")
    put(tmp_path, 1, "overview.png")
    (tmp_path / "metadata.csv").write_text("file_name,photographer\ncat/0.png,me")
    splits = load(tmp_path)
    assert used(splits) == {"cat": 12, "dog": 12}
    table = describe_splits(splits)
    for text in ("2 .heic", "2 .txt", "2 .json", "2 hidden", "1 loose pictures", "1 .csv"):
        assert text in table
    put(tmp_path / "fox", 1)
    (tmp_path / "fox" / "0.png").rename(tmp_path / "fox" / "0.xyz")
    (tmp_path / "fox" / "0.xyz").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="classes without a picture that can be read, fox: .*1 .xyz"):
        load(tmp_path)


def test_the_split_that_is_trained_on_is_not_the_one_to_evaluate_on(tmp_path):
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", [0, 1] * 10, ["a", "b"])
    splits = load_splits(DataArguments(dataset=[str(tmp_path)], train_split="test"), 0)
    assert len(splits.train) + len(splits.evaluation) == 20  # a part was held out
    assert len(splits.evaluation) < 10
    splits = load_splits(DataArguments(dataset=[str(tmp_path)], eval_split="train"), 0)
    assert "The split `train` is trained on AND evaluated on." in splits.notes


def test_a_test_split_without_classes_is_left_out_and_said(tmp_path):
    for label in ("cat", "dog"):
        put(tmp_path / "train" / label, 8)
    put(tmp_path / "test", 4)
    splits = load(tmp_path)
    assert used(splits) == {"cat": 8, "dog": 8}
    assert "4 pictures in `test` without a class folder" in describe_splits(splits)


def test_pictures_without_classes_are_refused(tmp_path):
    put(tmp_path / "flat", 4)
    with pytest.raises(ValueError, match="no class folders with pictures and no table"):
        load(tmp_path / "flat")
    put(tmp_path / "one" / "cat", 4)
    with pytest.raises(ValueError, match=r"one class folder with pictures, \['cat'\]"):
        load(tmp_path / "one")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "labels.csv"])
def test_labels_may_be_in_a_table_next_to_the_pictures(name, tmp_path):
    put(tmp_path / "pictures", 8)
    rows = [{"file_name": f"pictures/{i}.png", "label": "ab"[i % 2]} for i in range(8)]
    if name.endswith("csv"):
        pd.DataFrame(rows).to_csv(tmp_path / name, index=False)
    else:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    assert used(load(tmp_path)) == {"a": 4, "b": 4}


def test_archives_are_read(tmp_path):
    for label in ("cat", "dog"):
        put(tmp_path / "z" / label, 4)
    (tmp_path / "zips").mkdir()
    for split in ("train", "test"):
        shutil.make_archive(tmp_path / "zips" / split, "zip", tmp_path / "z")
    assert sizes(load(tmp_path / "zips")) == (8, 8)


# Tables


@pytest.fixture
def pictures(tmp_path):
    put(tmp_path, 16)
    return [(f"{i}.png", ("cat", "dog")[i % 2]) for i in range(16)]


def write(path, rows, head="file_name,label", separator=",", encoding="utf-8"):
    lines = [head.replace(",", separator), *(separator.join(map(str, row)) for row in rows)]
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return path


@pytest.mark.parametrize(
    ("name", "labels", "options", "names"),
    [
        ("train.csv", ("None", "scratch"), {}, ["None", "scratch"]),
        ("train.csv", ("NA", "nan"), {}, ["NA", "nan"]),
        ("train.csv", ("007", "010"), {}, ["007", "010"]),
        ("train.csv", ("10", "9"), {}, ["9", "10"]),
        ("train.csv", (" cat", "dog "), {}, ["cat", "dog"]),
        ("train.csv", ("cat", "dog"), {"separator": ";"}, ["cat", "dog"]),
        ("train.tsv", ("cat", "dog"), {"separator": "\t"}, ["cat", "dog"]),
        ("train.CSV", ("cat", "dog"), {}, ["cat", "dog"]),
        ("train.csv", ("Kätzchen", "Hund"), {"encoding": "latin-1"}, ["Hund", "Kätzchen"]),
        ("train.csv", ("Kätzchen", "Hund"), {"encoding": "utf-16"}, ["Hund", "Kätzchen"]),
    ],
)
def test_csv_files_as_people_have_them(name, labels, options, names, tmp_path, pictures):
    rows = [(file, labels[i % 2]) for i, (file, _) in enumerate(pictures)]
    splits = load(write(tmp_path / name, rows, **options))
    assert splits.label_names == names
    assert sum(used(splits).values()) == 16
    assert ("was read as cp1252" in describe_splits(splits)) == (options.get("encoding") == "latin-1")


def test_file_names_that_are_numbers_or_lack_the_suffix(tmp_path, pictures):
    for i in range(16):
        shutil.copy(tmp_path / f"{i}.png", tmp_path / f"{i:04d}")
    assert sum(used(load(write(tmp_path / "a.csv", [(f"{i:04d}", "ab"[i % 2]) for i in range(16)]))).values()) == 16
    assert sum(used(load(write(tmp_path / "b.csv", [(i, "ab"[i % 2]) for i in range(16)]))).values()) == 16
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"image": i, "label": "ab"[i % 2]}) for i in range(16)))
    assert sum(used(load(tmp_path / "c.jsonl")).values()) == 16


def test_tables_that_name_no_file_or_none_that_is_there(tmp_path, pictures):
    with pytest.raises(ValueError, match="is empty in row 1"):
        load(write(tmp_path / "a.csv", [("", "cat"), *pictures[1:]]))
    with pytest.raises(ValueError, match="1 of 16, the first is `gone.png` in row 1"):
        load(write(tmp_path / "a.csv", [("gone.png", "cat"), *pictures[1:]]))
    with pytest.raises(ValueError, match="has 1 images without a label, the first is number 0"):
        load(write(tmp_path / "a.csv", [("0.png", ""), *pictures[1:]]))
    with pytest.raises(ValueError, match="2 columns, but 3 values in row 2"):
        load(write(tmp_path / "a.csv", [("0.png", "cat,dog"), *pictures[1:]]))


def test_a_column_tells_the_split(tmp_path, pictures):
    rows = [(*row, ("train", "Test")[i // 2 % 2]) for i, row in enumerate(pictures)]
    assert sizes(load(write(tmp_path / "all.csv", rows, "file_name,label,split"))) == (8, 8)
    rows = [(*row, ("train", "holdout")[i // 2 % 2]) for i, row in enumerate(pictures)]
    table = write(tmp_path / "all.csv", rows, "file_name,label,split")
    with pytest.raises(ValueError, match=r"has \['holdout'\], which are not splits"):
        load(table)
    assert sizes(load(table, eval_split="holdout")) == (8, 8)


def test_several_labels_in_text(tmp_path, pictures):
    rows = [(file, ("cat", "cat|dog", "fox | dog")[i % 3]) for i, (file, _) in enumerate(pictures)]
    splits = load(write(tmp_path / "a.csv", rows))
    assert splits.multi_label
    assert splits.label_names == ["cat", "dog", "fox"]
    assert used(splits) == {"cat": 11, "dog": 10, "fox": 5}


@pytest.mark.parametrize("form", ["lists", "floats", "text", "columns"])
def test_zeros_and_ones_for_each_class(form, tmp_path, pictures):
    hot = [[int(i % 3 == 0), int(i % 3 == 1), int(i % 3 != 2)] for i in range(16)]
    wanted = [sum(column) for column in zip(*hot, strict=True)]
    if form == "columns":
        rows = [(file, *hot[i]) for i, (file, _) in enumerate(pictures)]
        splits = load(write(tmp_path / "a.csv", rows, "file_name,cat,dog,fox"))
    elif form == "text":
        rows = [(file, f'"{hot[i]}"') for i, (file, _) in enumerate(pictures)]
        splits = load(write(tmp_path / "a.csv", rows))
    else:
        number = float if form == "floats" else int
        rows = [{"image": file, "label": list(map(number, hot[i]))} for i, (file, _) in enumerate(pictures)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        splits = load(tmp_path / "a.jsonl")
    names = ["cat", "dog", "fox"] if form == "columns" else ["0", "1", "2"]
    assert splits.multi_label
    assert splits.label_names == names
    assert used(splits) == dict(zip(names, wanted, strict=True))


def test_one_of_several_zeros_is_a_single_label(tmp_path, pictures):
    rows = [(file, i % 2, (i + 1) % 2) for i, (file, _) in enumerate(pictures)]
    splits = load(write(tmp_path / "a.csv", rows, "file_name,cat,dog"))
    assert not splits.multi_label
    assert used(splits) == {"cat": 8, "dog": 8}


@pytest.mark.parametrize("form", ["struct", "bytes", "paths", "path in struct"])
def test_parquet_files_of_other_programs(form, tmp_path, pictures):
    def png(i):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 3), (i, 0, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    image = {
        "struct": lambda i: {"bytes": png(i), "path": f"{i}.png"},
        "path in struct": lambda i: {"bytes": png(i), "path": f"{i}.png", "width": 4},
        "bytes": png,
        "paths": lambda i: f"{i}.png",
    }[form]
    rows = {"image": [image(i) for i in range(16)], "label": [label for _, label in pictures]}
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    splits = load(tmp_path / "train.parquet")
    assert sizes(splits) == (14, 2)
    images = LabelledImages(splits, "train", as_rgb)
    assert images.image(0).getpixel((0, 0))[0] % 2 == images.label(0)


# Files that data names


@pytest.mark.parametrize(
    "value", ["http://127.0.0.1:9/a.png", "zip://a.png::b.zip", "file:///etc/hostname", "../a.png"]
)
def test_tables_may_not_name_files_elsewhere(value, tmp_path):
    put(tmp_path / "in", 4)
    put(tmp_path, 1, "a.png")
    rows = [(value, "cat"), *((f"{i}.png", "dog") for i in range(4))]
    for table in (write(tmp_path / "in" / "a.csv", rows), tmp_path / "in" / "a.parquet"):
        if table.suffix == ".parquet":
            pd.DataFrame(rows, columns=["image", "label"]).to_parquet(table)
        with pytest.raises(ValueError, match="in row 1.*Pass `--allow-outside-files`"):
            load(table)
    if value == "../a.png":
        assert sum(used(load(tmp_path / "in" / "a.csv", allow_outside_files=True)).values()) == 5


def test_pictures_in_parquet_may_not_be_files_elsewhere(tmp_path):
    put(tmp_path, 1, "a.png")
    (tmp_path / "in").mkdir()
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "a.png")}] * 4, "label": [0, 1, 0, 1]}
    pd.DataFrame(rows).to_parquet(tmp_path / "in" / "train.parquet")
    table = tmp_path / "in" / "train.parquet"
    with pytest.raises(BadImageError, match="which is outside the data set"):
        LabelledImages(load(table), "train", as_rgb).image(0)
    assert LabelledImages(load(table, allow_outside_files=True), "train", as_rgb).image(0).size == (4, 3)


# What training and evaluation see


def test_the_held_out_part_has_classes_as_often_as_the_whole(tmp_path):
    put(tmp_path / "cat", 95)
    put(tmp_path / "dog", 5)
    put(tmp_path / "fox", 1)
    splits = load(tmp_path)
    assert sizes(splits) == (90, 11)
    held = Counter(splits.label_names[x] for x in splits.evaluation["label"])
    assert held == {"cat": 10, "dog": 1}  # the only fox is for training


def test_the_table_tells_numbers_of_images(tmp_path):
    put(tmp_path / "train" / "cat", 9)
    put(tmp_path / "train" / "dog", 5)
    put(tmp_path / "test" / "cat", 2)
    put(tmp_path / "test" / "dog", 3)
    lines = describe_splits(load(tmp_path)).splitlines()
    assert lines[1].split() == ["train", "14", "2", "5", "(dog),", "9", "(cat)"]
    assert lines[2].split() == ["evaluation", "5", "2", "2", "(cat),", "3", "(dog)"]


def test_the_fingerprint_changes_with_the_data_and_not_with_its_place(tmp_path):
    for label in ("cat", "dog", "fox"):
        put(tmp_path / "a" / "train" / label, 4)
        put(tmp_path / "a" / "test" / label, 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = fingerprint(load(tmp_path / "a"))
    assert fingerprint(load(tmp_path / "b")) == first
    assert (first["label_names"], first["num_train"], first["num_eval"]) == (["cat", "dog", "fox"], 12, 6)
    Image.effect_noise((30, 30), 60).save(tmp_path / "b" / "train" / "cat" / "0.png")
    assert fingerprint(load(tmp_path / "b"))["hash"] != first["hash"]
    put(tmp_path / "a" / "train" / "cat", 1, start=9)
    assert fingerprint(load(tmp_path / "a"))["num_train"] == 13
    for split in ("train", "test"):
        (tmp_path / "b" / split / "cat").rename(tmp_path / "b" / split / "zebra")
    assert fingerprint(load(tmp_path / "b"))["label_names"] == ["dog", "fox", "zebra"]


def test_classes_are_matched_by_name_and_case_where_it_matters():
    assert class_numbers(["a", "A"], {0: "A", 1: "a"}) == ([1, 0], [])
    assert class_numbers(["Cat", "DOG"], {0: "dog", 1: "cat"}) == ([1, 0], [])
    assert class_numbers(["a", "b"], {0: "A", 1: "B", 2: "b"}) == ([0, 2], [])
    assert class_numbers(["a", "A"], {0: "a"}) == ([0], ["A"])
    assert class_numbers([unicodedata.normalize("NFD", "Kätzchen")], {0: "Kätzchen"}) == ([0], [])


def test_a_streamed_folder_is_mixed_before_it_is_read(tmp_path):
    for split, count in (("train", 60), ("test", 2)):
        for label in ("cat", "dog", "fox"):
            put(tmp_path / split / label, count)
    splits = load(tmp_path, streaming=True, shuffle_buffer=10)
    assert splits.is_streamed
    labels = [row["label"] for row in splits.train]
    assert len(labels) == 180
    assert all(len(set(labels[i : i + 20])) == 3 for i in range(0, 180, 20))
    assert load_evaluation_split(DataArguments(dataset=[str(tmp_path)], streaming=True)).is_streamed


@pytest.mark.parametrize("counts", [(40, 40), (20, 60)])
def test_a_stream_that_is_sorted_by_class_is_refused(counts, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split, labels in (("train", [0] * counts[0] + [1] * counts[1]), ("test", [0, 1])):
        rows = {"image": [Image.new("RGB", (4, 3))] * len(labels), "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match="sorted by class: the 30 images .* are of 1 of 2 classes"):
        load(tmp_path, streaming=True, shuffle_buffer=30)
    assert load(tmp_path, streaming=True, shuffle_buffer=80).is_streamed


def test_labels_of_other_splits_may_be_single_where_several_are_allowed(tmp_path, pictures):
    train = write(tmp_path / "train.csv", [(file, ("a", "a|b")[i % 2]) for i, (file, _) in enumerate(pictures)])
    test = write(tmp_path / "test.csv", [(file, "ab"[i % 2]) for i, (file, _) in enumerate(pictures)])
    splits = load(train, test)
    assert splits.multi_label
    assert splits.evaluation["label"][:2] == [[0], [1]]
    assert np.asarray(LabelledImages(splits, "evaluation", as_rgb).label(1)).tolist() == [0, 1]


@pytest.mark.parametrize("distilled", [False, True])
def test_the_head_of_a_checkpoint_follows_the_names_of_its_classes(distilled, tmp_path):
    names = ["fox", "cat", "dog"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {x: i for i, x in enumerate(names)}}
    config = tiny_config_with(num_labels=3, use_distillation_token=distilled, **labels)
    model = random_classifier(config).eval()
    model.save_pretrained(tmp_path)
    arguments = parse_train_arguments(["--model", str(tmp_path), "--keep_rate", "0.6"])
    images = torch.randn(2, 3, 32, 32)
    wanted = model(images).logits

    def built(classes):
        return build_model(arguments, SimpleNamespace(label_names=classes, multi_label=False)).eval()

    assert torch.equal(built(["cat", "dog", "fox"])(images).logits, wanted[:, [1, 2, 0]])
    other = built(["cat", "dog", "emu"])  # other classes start from what it was
    assert torch.equal(other(images).logits, wanted)


# Kinds of the above that public reports tell of


@pytest.mark.parametrize(
    "folders",
    [
        ("seg_train/cat", "seg_train/dog", "seg_test/cat", "seg_test/dog"),
        ("cat_train", "cat_test", "dog_train", "dog_test"),
        ("trainA", "trainB", "testA", "testB"),
    ],
    ids=["nested", "flat", "capitals"],
)
def test_folders_that_differ_in_the_word_of_a_split_are_refused(folders, tmp_path):
    for folder in folders:
        put(tmp_path / folder, 2)
    with pytest.raises(ValueError, match="these names may mean parts of the data.*`--eval-split`"):
        load(tmp_path)


@pytest.mark.parametrize("names", [("TrainData", "TestData"), ("traindata", "testdata"), ("Training Set", "test-set")])
def test_words_of_splits_may_be_written_together(names, tmp_path):
    for name in names:
        put(tmp_path / name / "cat", 2)
        put(tmp_path / name / "dog", 2)
    assert sizes(load(tmp_path)) == (4, 4)


def test_split_folders_may_lie_in_folders_of_their_own_name(tmp_path):
    for split in ("training_set", "test_set"):
        for label in ("cat", "dog"):
            put(tmp_path / split / split / label, 2)
    splits = load(tmp_path)
    assert splits.label_names == ["cat", "dog"]
    assert sizes(splits) == (4, 4)


def test_hidden_and_empty_folders_are_counted(tmp_path):
    for folder in ("cat", "dog", ".hidden"):
        put(tmp_path / folder, 3)
    (tmp_path / "fox").mkdir()
    table = describe_splits(load(tmp_path))
    assert "3 files in hidden folders" in table
    assert "1 folders without pictures (fox)" in table


def test_zip_files_are_read_by_name_and_again_when_they_change(tmp_path):
    for count in (3, 5):
        put(tmp_path / "z" / "cat", count)
        put(tmp_path / "z" / "dog", count)
        shutil.make_archive(tmp_path / "animals", "zip", tmp_path / "z")
        assert used(load(tmp_path / "animals.zip")) == {"cat": count, "dog": count}
    (tmp_path / "animals.zip").write_text("no archive")
    with pytest.raises(ValueError, match="could not be extracted: File is not a zip file"):
        load(tmp_path / "animals.zip")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, pictures):
    labels = [label for _, label in pictures]
    content = {"image": [(tmp_path / name).read_bytes() for name, _ in pictures], "label": labels}
    pd.DataFrame(content).to_parquet(tmp_path / "all.parquet")
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    with pytest.raises(ValueError, match=r"all.parquet` could not be read: .*\(set HF_HOME, now "):
        load(tmp_path / "all.parquet")


def test_a_home_folder_in_a_recipe_is_found(tmp_path, monkeypatch):
    put(tmp_path / "animals" / "cat", 3)
    put(tmp_path / "animals" / "dog", 3)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert used(load("~/animals")) == {"cat": 3, "dog": 3}


def test_pictures_that_no_table_names_are_counted(tmp_path, pictures):
    write(tmp_path / "metadata.csv", pictures[:10])
    assert "Left out: 6 pictures that no table names." in describe_splits(load(tmp_path))


def test_a_table_with_other_labels_than_the_class_folders_is_refused(tmp_path):
    for folder in ("patient1", "patient2"):
        put(tmp_path / folder, 4)
    rows = [(f"patient{k}/{i}.png", ("ill", "well")[i % 2]) for k in (1, 2) for i in range(4)]
    table = write(tmp_path / "labels.csv", rows)
    with pytest.raises(
        ValueError, match=r"class folders, \['patient1', 'patient2'\], and `labels.csv` with other lab"
    ):
        load(tmp_path)
    assert used(load(table)) == {"ill": 4, "well": 4}


def test_two_tables_of_the_same_pictures_are_refused(tmp_path, pictures):
    write(tmp_path / "metadata.csv", pictures)
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": x, "label": y}) for x, y in pictures))
    with pytest.raises(ValueError, match="Several tables of the train split name the same pictures, 16 in all"):
        load(tmp_path)


def test_pictures_in_several_rows_are_counted(tmp_path, pictures):
    splits = load(write(tmp_path / "all.csv", [*pictures, *pictures[:3]]))
    assert "3 pictures are in several rows of the training split; each row counts." in describe_splits(splits)


@pytest.mark.parametrize("head", ["Filename,Label", "Image,CLASS", "file_name,label"])
def test_columns_may_be_written_in_capitals_and_paths_as_windows_does(head, tmp_path, pictures):
    (tmp_path / "in").mkdir()
    for name, _ in pictures:
        shutil.move(tmp_path / name, tmp_path / "in" / name)
    table = write(tmp_path / "all.csv", [(f"in\\{name}", label) for name, label in pictures], head)
    assert used(load(table)) == used(load(tmp_path)) == {"cat": 8, "dog": 8}


@pytest.mark.parametrize("head", ["file_name,label,Split", "file_name,label,dataset", "file_name,label,Usage"])
def test_a_column_of_split_words_tells_the_split_whatever_its_name(head, tmp_path, pictures):
    rows = [(*row, ("Train", "val")[i // 2 % 4 == 0]) for i, row in enumerate(pictures)]
    assert sizes(load(write(tmp_path / "all.csv", rows, head))) == (12, 4)
    labels = [(name, ("train", "test")[i % 2]) for i, (name, _) in enumerate(pictures)]
    assert used(load(write(tmp_path / "labels.csv", labels))) == {"train": 8, "test": 8}


def test_columns_that_are_not_used_are_named(tmp_path, pictures):
    rows = [(*row, i % 4, "me") for i, row in enumerate(pictures)]
    table = describe_splits(load(write(tmp_path / "all.csv", rows, "file_name,label,fold,photographer")))
    assert "Columns that are not used: fold, photographer." in table


@pytest.mark.parametrize("form", ["{}|{}|{}", "{} {} {}", "[{} {} {}]", "{};{};{}", "{}.0|{}.0|{}.0"])
def test_zeros_and_ones_in_text_are_not_two_classes(form, tmp_path, pictures):
    rows = [(name, form.format(i % 2, (i + 1) % 2, 1)) for i, (name, _) in enumerate(pictures)]
    splits = load(write(tmp_path / "all.csv", rows))
    assert splits.multi_label
    assert used(splits) == {"0": 8, "1": 8, "2": 16}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": {"0": "0.png"}, "label": {"0": "cat"}}', "holds dict in row 1, not a path"),
        ('{"file_name": "0.png", "label": 1}\n{"file_name": "1.png", "label": "a"}', "Column `label`.*several kinds"),
        ('{"file_name": "0.png", "label": NaN}', "1 images without a label"),
        ('{"file_name": "0.png", "label": 1}', "one class"),
        ("[]", "must hold one JSON object for each image"),
        (f'{{"file_name": "/9j/{"A" * 5000}", "label": 1}}', "names `/9j/A{96}` in row 1"),
    ],
    ids=["columns", "kinds", "nan", "one class", "empty", "base64"],
)
def test_json_that_cannot_be_used_is_refused_with_the_cause(text, message, tmp_path, pictures):
    (tmp_path / "all.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "all.json")


def test_json_lines_may_hold_any_character(tmp_path, pictures):
    rows = [json.dumps({"file_name": x, "label": f"{y}\u2028!"}, ensure_ascii=False) for x, y in pictures]
    (tmp_path / "all.jsonl").write_text("\n".join(rows), "utf-8")
    assert used(load(tmp_path / "all.jsonl")) == {"cat\u2028!": 8, "dog\u2028!": 8}


def test_parquet_with_paths_in_structs_or_pictures_in_a_column_of_any_name(tmp_path, pictures):
    labels = [label for _, label in pictures]
    paths = {"image": [{"bytes": None, "path": name} for name, _ in pictures], "label": labels}
    pd.DataFrame(paths).to_parquet(tmp_path / "paths.parquet")
    assert used(load(tmp_path / "paths.parquet")) == {"cat": 8, "dog": 8}
    content = {"img_data": [(tmp_path / name).read_bytes() for name, _ in pictures], "label": labels}
    pd.DataFrame(content).to_parquet(tmp_path / "bytes.parquet")
    assert used(load(tmp_path / "bytes.parquet")) == {"cat": 8, "dog": 8}


@pytest.mark.parametrize(
    ("path", "is_allowed"),
    [
        ("/data/a/b.png", True),
        ("zip://b.png::/data/a/c.zip", True),
        ("/data/a/../../etc/passwd", False),
        ("/database/a.png", False),
        ("http://127.0.0.1/a.png", False),
        ("file:///data/a/b.png", False),
        ("zip://b.png::http://127.0.0.1/c.zip", False),
        ("simplecache::http://127.0.0.1/c.png", False),
        ("http://127.0.0.1/a.png::/data/a/c.zip", False),
        ("hf://datasets/org/name@abc/b.png", True),
        ("zip://b.png::hf://datasets/org/name@abc/c.zip", True),
        ("hf://datasets/org/name2/b.png", False),
    ],
)
def test_which_files_lie_inside_the_data_set(path, is_allowed, monkeypatch):
    monkeypatch.chdir("/")  # where a URL would look like a folder
    assert is_inside(path, ("/data", "hf://datasets/org/name")) == is_allowed
    assert not is_inside("http://127.0.0.1/a.png", ("/",))


def test_a_file_outside_the_data_set_is_not_skipped(tmp_path, pictures):
    splits = load(write(tmp_path / "all.csv", pictures))
    outside = replace(splits, roots=("/elsewhere",))
    with pytest.raises(OutsideFileError, match="which is outside the data set"):
        LabelledImages(outside, "train", as_rgb, on_bad_image="skip").image(0)
    with pytest.raises(OutsideFileError, match="if you trust it.$"):
        check_images(outside, 10)


def test_a_data_set_may_not_read_data_files_elsewhere(tmp_path):
    put(tmp_path / "secret" / "cat", 2)
    put(tmp_path / "secret" / "dog", 2)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: ../secret/**\n---\n")
    with pytest.raises(ValueError, match="secret/cat/0.png`, which is outside the data set.*--allow-outside-files"):
        load(tmp_path / "in")


@pytest.mark.parametrize(
    "files",
    ["{url}", "\n  - split: train\n    path: {url}", "\n  - split: train\n    path:\n    - a.csv\n    - {url}"],
)
def test_a_url_of_a_data_file_is_refused_before_it_is_asked_for(files, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.csv"
        readme = f"---\nhomepage: {url}\nconfigs:\n- config_name: a\n  data_files: {files.format(url=url)}\n---\n"
        (tmp_path / "README.md").write_text(readme)
        with pytest.raises(OutsideFileError, match=f"reads `{url}`, which is outside the data set"):
            load(tmp_path)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody has connected
            server.accept()


# What else people have on their disks


@pytest.mark.parametrize("names", [("a|b", "a"), ("[a]", "[b]"), ("0 1", "1 0"), ("[1, 0]", "[0, 1]")])
def test_names_of_class_folders_are_names_whatever_they_look_like(names, tmp_path):
    for split in ("train", "test"):
        for label in names:
            put(tmp_path / split / label, 2)
    assert used(load(tmp_path)) == dict.fromkeys(names, 4)
    assert set(load_evaluation_split(DataArguments(dataset=[str(tmp_path)])).label_names) == set(names)
    shutil.make_archive(tmp_path.with_suffix(""), "zip", tmp_path)
    assert used(load(tmp_path.with_suffix(".zip"))) == dict.fromkeys(names, 4)


@pytest.mark.parametrize(
    "names", [("cat", "cat "), tuple(unicodedata.normalize(x, "Kätzchen") for x in ("NFC", "NFD"))]
)
def test_folders_that_are_one_class_are_named(names, tmp_path):
    for label in (*names, "dog"):
        put(tmp_path / label, 4)
    splits = load(tmp_path)
    assert used(splits) == {names[0]: 8, "dog": 4}
    assert f"are one class: {sorted(names)}." in describe_splits(splits)


@pytest.mark.parametrize(
    "folders",
    [("trainA", "testA"), ("Trainingsdaten", "Testdaten"), ("1_training", "2_testing"), ("gallery", "query")],
)
def test_folders_that_begin_with_words_of_splits_are_not_pooled(folders, tmp_path):
    for split in folders:
        for label in ("cat", "dog"):
            put(tmp_path / split / label, 2)
    with pytest.raises(ValueError, match="`--eval-split`") if folders[0] != "1_training" else nullcontext():
        assert sizes(load(tmp_path)) == (4, 4)
    assert sizes(load(tmp_path, train_split=folders[0], eval_split=folders[1])) == (4, 4)


@pytest.mark.parametrize("where", ["data/cat/caf\udce9.png", "data/caf\udce9/1.png", "caf\udce9/cat/1.png"])
def test_names_that_are_not_utf8_are_named(where, tmp_path):
    for label in ("cat", "dog"):
        put(tmp_path / "data" / label, 2)
    put((tmp_path / where).parent, 1)
    (tmp_path / where).parent.joinpath("0.png").rename(tmp_path / where)
    with pytest.raises(ValueError, match=r"caf\\xe9.*` is not UTF-8: rename it"):
        load(tmp_path / where.split("/")[0])


def test_links_pipes_and_folders_of_systems_are_left_out_and_said(tmp_path):
    for label in ("cat", "dog", "@eaDir", "$RECYCLE.BIN"):
        put(tmp_path / label, 4)
    (tmp_path / "fox").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "cat" / "pipe")
    splits = load(tmp_path)
    assert used(splits) == {"cat": 4, "dog": 4}
    for text in ("8 files in hidden folders", "links that lead nowhere (fox)", "(loop)", "1 without suffix"):
        assert text in describe_splits(splits)
    os.mkfifo(tmp_path / "cat" / "9.png")
    with pytest.raises(BadImageError, match=r"9.png\) is not a file"):
        check_images(load(tmp_path), -1)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    for label in ("cat", "dog", "fox"):
        put(tmp_path / label, 2)
    original = os.scandir

    def scandir(path):
        if str(path).endswith("fox"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match="fox` cannot be listed: Permission denied"):
        load(tmp_path)


def test_what_a_folder_without_classes_holds_is_said(tmp_path):
    put(tmp_path / "pictures", 4)
    (tmp_path / "pictures" / "labels.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"but 4 pictures; 1 \.xlsx: put"):
        load(tmp_path / "pictures")
    put(tmp_path / "kaggle" / "train", 4)
    write(tmp_path / "kaggle" / "train.csv", [(i, "ab"[i % 2]) for i in range(4)], "id,breed")
    with pytest.raises(ValueError, match=r"`train.csv` is not used, .*`--label-column`"):
        load(tmp_path / "kaggle")
    put(tmp_path / "one" / "cat", 4)
    shutil.make_archive(tmp_path / "one", "zip", tmp_path / "one")
    with pytest.raises(ValueError, match=rf"`--dataset {tmp_path}/one.zip` has one class folder"):
        load(tmp_path / "one.zip")


def test_csv_files_of_excel(tmp_path, pictures):
    rows = "\r\n".join(";".join(row) + ";;" for row in pictures)
    (tmp_path / "a.csv").write_text(f"sep=;\r\nfile_name;label;;\r\n{rows}\r\n;;;\r\n", encoding="utf-8-sig")
    assert used(load(tmp_path / "a.csv")) == {"cat": 8, "dog": 8}
    write(tmp_path / "a.csv", [(row[0], "") for row in pictures])
    with pytest.raises(ValueError, match="has 16 images without a label"):
        load(tmp_path / "a.csv")


def test_a_column_that_nobody_needs_may_hold_anything(tmp_path, pictures):
    rows = [{"file_name": x, "label": y, "note": i if i % 2 else "x"} for i, (x, y) in enumerate(pictures)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = load(tmp_path)
    assert used(splits) == {"cat": 8, "dog": 8}
    assert "Column `note`" in describe_splits(splits)


def test_labels_that_may_be_meant_otherwise_are_told(tmp_path, pictures):
    rows = [(name, '"cat, dog"' if i == 3 else label) for i, (name, label) in enumerate(pictures)]
    assert "`cat, dog` is read as a class of its own: write `cat|dog`" in describe_splits(
        load(write(tmp_path / "a.csv", rows))
    )
    rows = [(name, int(label == "cat"), int(label == "dog"), i % 2) for i, (name, label) in enumerate(pictures)]
    splits = load(write(tmp_path / "a.csv", rows, "file_name,cat,dog,is_crowd"))
    assert "zeros and ones, which are read as labels: cat, dog, is_crowd." in describe_splits(splits)


def test_tables_that_cannot_be_read_are_refused_with_the_cause(tmp_path, pictures):
    lines = ["file_name,label", *(f"{i}.png,{'ab'[i % 2]}" for i in range(16))]
    for change, message in (
        (lambda i, line: line.replace(",", ',"') if i == 3 else line, "read as CSV up to line 17: unexpected end"),
        (lambda i, line: line + "y" * 140_000 if i == 3 else line, "read as CSV up to line 4: field larger"),
    ):
        (tmp_path / "a.csv").write_text("\n".join(change(i, line) for i, line in enumerate(lines)))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="could not be read as JSON lines: maximum recursion"):
        load(tmp_path / "a.jsonl")
    rows = [{"file_name": x, "label": {"name": y}} for x, y in pictures]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="Column `label` holds dict, not classes"):
        load(tmp_path / "a.jsonl")


def test_tables_that_may_tell_splits_are_not_passed_over(tmp_path):
    for label in ("cat", "dog"):
        put(tmp_path / label, 4)
    rows = [(f"{label}/{i}.png", label) for label in ("cat", "dog") for i in range(4)]
    write(tmp_path / "test.csv", rows[1::2])
    with pytest.raises(ValueError, match="class folders, and `test.csv`, which may say what is for training"):
        load(tmp_path)
    (tmp_path / "test.csv").rename(tmp_path / "test.txt")
    write(tmp_path / "all.csv", [(*row, "train") for row in rows], "file_name,label,split")
    with pytest.raises(ValueError, match="class folders, and `all.csv`, which may say what is for training"):
        load(tmp_path)
    (tmp_path / "test.txt").rename(tmp_path / "test.csv")
    write(tmp_path / "train.csv", rows)
    splits = load(tmp_path / "train.csv", tmp_path / "test.csv")
    assert "4 pictures are in both splits" in describe_splits(splits)


def test_folders_around_the_data_and_copies_next_to_it_are_no_classes(tmp_path):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            put(tmp_path / "around" / "data" / "data" / split / label, 2)
    assert sizes(load(tmp_path / "around")) == (4, 4)
    for label in ("cat", "dog", "pets/cat", "pets/dog"):
        put(tmp_path / "twice" / label, 4)
    with pytest.raises(ValueError, match="pets` has folders for all classes that lie next to it"):
        load(tmp_path / "twice")
    assert used(load(tmp_path / "twice" / "pets")) == {"cat": 4, "dog": 4}


def test_copies_of_a_data_set_are_not_its_classes(tmp_path):
    for copy in ("raw", "processed"):
        for split in ("train", "test"):
            for label in ("cat", "dog"):
                put(tmp_path / copy / split / label, 2)
    with pytest.raises(ValueError, match="`processed`, `raw` hold split folders with folders `cat`, `dog` inside"):
        load(tmp_path)
    assert sizes(load(tmp_path / "raw")) == (4, 4)


def test_archives_that_say_less_than_is_needed(tmp_path):
    for label in ("XYZW", "dog"):
        put(tmp_path / "data" / label, 4)
    (tmp_path / "tar").mkdir()
    shutil.make_archive(tmp_path / "tar" / "x", "gztar", tmp_path / "data")
    with pytest.raises(ValueError, match="x.tar.gz` has pictures but no labels next to them"):
        load(tmp_path / "tar")
    shutil.make_archive(tmp_path / "x", "zip", tmp_path / "data")
    (tmp_path / "x.zip").write_bytes((tmp_path / "x.zip").read_bytes().replace(b"XYZW", "猫犬".encode("cp932")))
    assert "does not say how its names are written" in describe_splits(load(tmp_path / "x.zip"))
