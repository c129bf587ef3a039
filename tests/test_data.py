import datasets
import numpy as np
import pytest
from PIL import Image

from evit_training.arguments import DataArguments
from evit_training.data import LabelledImages, load_splits


def picture(value, mode="RGB"):
    return Image.new("RGB", (6, 4), (value, 0, 0)).convert(mode)


def write_parquet(path, labels, names=None, image_name="image", label_name="label"):
    label = (
        datasets.ClassLabel(names=names)
        if names
        else datasets.Value("string" if isinstance(labels[0], str) else "int64")
    )
    features = datasets.Features({image_name: datasets.Image(), label_name: label})
    rows = {image_name: [picture(10 * i) for i in range(len(labels))], label_name: labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def test_packaged_digits_are_the_uci_set():
    from sklearn.datasets import load_digits

    train, test, image, label = load_splits(DataArguments(dataset=["digits"]), seed=0)
    assert (len(train), len(test), image, label) == (1437, 360, "image", "label")
    assert train.features["label"].names == [str(digit) for digit in range(10)]
    ours = sorted((row["label"], np.asarray(row["image"]).tobytes()) for split in (train, test) for row in split)
    pixels, labels = load_digits(return_X_y=True)
    source = (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype("uint8")
    assert ours == sorted((int(y), x.tobytes()) for x, y in zip(source, labels, strict=True))


def test_parquet_files_tell_their_split_by_name(tmp_path):
    train = write_parquet(tmp_path / "constraint_train-00000.parquet", [0, 1, 1], ["a", "b"], "img")
    test = write_parquet(tmp_path / "constraint_test.parquet", [1], ["a", "b"], "img")
    one, other, image, label = load_splits(DataArguments(dataset=[test, train]), seed=0)
    assert (len(one), len(other), image, label) == (3, 1, "img", "label")
    same, *_ = load_splits(DataArguments(dataset=[str(tmp_path / "*.parquet")]), seed=0)
    assert len(same) == 3


def test_a_folder_of_images(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                picture(i).save(tmp_path / split / name / f"{i}.png")
    train, test, image, label = load_splits(DataArguments(dataset=[str(tmp_path)]), seed=0)
    assert (len(train), len(test), image, label) == (8, 4, "image", "label")
    assert train.features["label"].names == ["cat", "dog"]


def test_images_are_held_out_with_the_seed_where_there_is_no_other_split(tmp_path):
    file = write_parquet(tmp_path / "all.parquet", [i % 2 for i in range(20)], ["a", "b"])
    arguments = DataArguments(dataset=[file], eval_fraction=0.25)
    train, held_out, *_ = load_splits(arguments, seed=3)
    assert (len(train), len(held_out)) == (15, 5)
    reds = {
        split: [image.getpixel((0, 0))[0] for image in data["image"]]
        for split, data in (("t", train), ("h", held_out))
    }
    assert not set(reds["t"]) & set(reds["h"])
    _, again, *_ = load_splits(arguments, seed=3)
    assert [image.getpixel((0, 0))[0] for image in again["image"]] == reds["h"]


def test_labels_without_names_and_class_order_are_matched_by_name(tmp_path):
    train = write_parquet(tmp_path / "train.parquet", ["dog", "cat", "dog"])
    test = write_parquet(tmp_path / "test.parquet", [0, 1], ["dog", "cat"])
    one, other, *_ = load_splits(DataArguments(dataset=[train, test]), seed=0)
    assert one.features["label"].names == ["cat", "dog"]
    assert one["label"][:] == [1, 0, 1]
    assert other["label"][:] == [1, 0]


def test_every_image_becomes_rgb():
    modes = ["L", "P", "RGBA", "CMYK", "1", "RGB"]
    rows = datasets.Dataset.from_dict({"image": [picture(200, mode) for mode in modes], "label": [0] * 6})
    seen = LabelledImages(rows.cast_column("image", datasets.Image()), "image", "label", lambda image: image.mode)
    assert {seen[i]["pixel_values"] for i in range(6)} == {"RGB"}
    assert {seen.image(i).mode for i in range(6)} == {"RGB"}


def test_number_of_samples_can_be_limited():
    arguments = DataArguments(dataset=["digits"], max_train_samples=50, max_eval_samples=7)
    train, test, *_ = load_splits(arguments, seed=0)
    assert (len(train), len(test)) == (50, 7)


def test_bad_data_is_refused_with_the_way_out(tmp_path):
    two_images = datasets.Dataset.from_dict({"a": [picture(1)], "b": [picture(2)], "label": [0]})
    two_images = two_images.cast_column("a", datasets.Image()).cast_column("b", datasets.Image())
    two_images.to_parquet(tmp_path / "two.parquet")
    good = write_parquet(tmp_path / "train.parquet", [0, 1], ["a", "b"])
    hidden = write_parquet(tmp_path / "test.parquet", [-1, -1], ["a", "b"])
    other = write_parquet(tmp_path / "validation.parquet", ["a", "z"])

    def refused(sentence, **settings):
        with pytest.raises(ValueError, match=sentence):
            load_splits(DataArguments(**settings), seed=0)

    refused(r"2 columns of images: name one of \['a', 'b'\]", dataset=[str(tmp_path / "two.parquet")])
    refused("`--image_column` is `x`: name one of", dataset=[good], image_column="x")
    refused("No column of labels: name one of", dataset=[good], label_column="x")
    refused(r"`--train_split` is `training`, but the data has \['train'\]", dataset=[good], train_split="training")
    refused("`--eval_split` is `dev`", dataset=[good], eval_split="dev")
    refused("has labels from -1 to -1, but 2 classes: hidden test labels", dataset=[good, hidden])
    refused(r"classes that the training split has not: \['z'\]", dataset=[good, other])
    refused("does not tell its split", dataset=[good, str(tmp_path / "two.parquet")])
    refused("takes one folder or Hub id, or several parquet files", dataset=[good, str(tmp_path / "none.parquet")])
    (tmp_path / "labels.csv").write_text("a,b")
    refused("`--dataset no/folder` is no folder and could not be loaded", dataset=["no/folder"])
    refused("files must be parquet", dataset=[str(tmp_path / "labels.csv")])
