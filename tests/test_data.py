import itertools
import struct
import time
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from evit_hf import as_rgb
from evit_training.arguments import AugmentationArguments, DataArguments
from evit_training.data.augmentation import ProcessorTransform, image_processor, training_transform
from evit_training.data.images import (
    BadImageError,
    LabelledImages,
    StreamedEvaluationImages,
    StreamedTrainingImages,
    TrainingImages,
    decoded,
)
from evit_training.data.splits import check_images, load_splits


def reds(splits, split):
    images = LabelledImages(splits, split, as_rgb)
    return [images.image(i).getpixel((0, 0))[0] for i in range(len(images))]


def picture(value, mode="RGB"):
    return Image.new("RGB", (6, 4), (value, 0, 0)).convert(mode)


def write_parquet(path, labels, names=None, image_name="image", label_name="label"):
    label = (
        datasets.ClassLabel(names=names)
        if names
        else datasets.Value({str: "string", float: "float32"}.get(type(labels[0]), "int64"))
    )
    features = datasets.Features({image_name: datasets.Image(), label_name: label})
    rows = {image_name: [picture(10 * i) for i in range(len(labels))], label_name: labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def test_packaged_digits_are_the_uci_set():
    from sklearn.datasets import load_digits

    splits = load_splits(DataArguments(dataset=["digits"]), seed=0)
    assert (len(splits.train), len(splits.evaluation)) == (1437, 360)
    assert (splits.image_column, splits.label_column) == ("image", "label")
    assert splits.label_names == [str(digit) for digit in range(10)]
    images = [LabelledImages(splits, name, as_rgb) for name in ("train", "evaluation")]
    ours = sorted(
        (split.label(i), np.asarray(split.image(i).convert("L")).tobytes())
        for split in images
        for i in range(len(split))
    )
    pixels, labels = load_digits(return_X_y=True)
    source = (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype("uint8")
    assert ours == sorted((int(y), x.tobytes()) for x, y in zip(source, labels, strict=True))


def test_parquet_files_tell_their_split_by_name(tmp_path):
    train = write_parquet(tmp_path / "constraint_train-00000.parquet", [0, 1, 1], ["a", "b"], "img")
    test = write_parquet(tmp_path / "constraint_test.parquet", [1], ["a", "b"], "img")
    splits = load_splits(DataArguments(dataset=[test, train]), seed=0)
    assert (len(splits.train), len(splits.evaluation), splits.image_column) == (3, 1, "img")
    same = load_splits(DataArguments(dataset=[str(tmp_path / "*.parquet")]), seed=0)
    assert len(same.train) == 3


def test_a_folder_of_images(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                picture(i).save(tmp_path / split / name / f"{i}.png")
    splits = load_splits(DataArguments(dataset=[str(tmp_path)]), seed=0)
    assert (len(splits.train), len(splits.evaluation), splits.image_column) == (8, 4, "image")
    assert splits.label_names == ["cat", "dog"]


def test_images_are_held_out_with_the_seed_where_there_is_no_other_split(tmp_path):
    file = write_parquet(tmp_path / "all.parquet", [i % 2 for i in range(20)], ["a", "b"])
    arguments = DataArguments(dataset=[file], eval_fraction=0.25)
    splits = load_splits(arguments, seed=3)
    assert (len(splits.train), len(splits.evaluation)) == (15, 5)
    train, held_out = reds(splits, "train"), reds(splits, "evaluation")
    assert not set(train) & set(held_out)
    assert reds(load_splits(arguments, seed=3), "evaluation") == held_out
    assert reds(load_splits(arguments, seed=4), "evaluation") != held_out


def test_labels_without_names_and_class_order_are_matched_by_name(tmp_path):
    train = write_parquet(tmp_path / "train.parquet", ["dog", "cat", "dog"])
    test = write_parquet(tmp_path / "test.parquet", [0, 1], ["dog", "cat"])
    splits = load_splits(DataArguments(dataset=[train, test]), seed=0)
    assert splits.label_names == ["cat", "dog"]
    assert splits.train["label"][:] == [1, 0, 1]
    assert splits.evaluation["label"][:] == [1, 0]


@pytest.mark.parametrize("names", [["cat", "dog", "fox"], None])
def test_several_labels_for_an_image(names, tmp_path):
    inner = datasets.ClassLabel(names=names) if names else datasets.Value("string")
    rows = {"image": [picture(i) for i in range(4)], "labels": [[0, 2], [], [1], [0]]}
    if not names:
        rows["labels"] = [["cat", "fox"], [], ["dog"], ["cat"]]
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.Sequence(inner)})
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    data.to_parquet(tmp_path / "test.parquet")
    splits = load_splits(DataArguments(dataset=[str(tmp_path / "*.parquet")]), seed=0)
    assert splits.multi_label
    assert splits.label_names == ["cat", "dog", "fox"]
    images = LabelledImages(splits, "train", as_rgb)
    assert images.label(0).tolist() == [1, 0, 1]
    assert images.label(1).tolist() == [0, 0, 0]


def test_folders_written_by_save_to_disk_and_arrow_and_csv_files(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict(
        {"image": [picture(i) for i in range(4)], "label": [0, 1, 0, 1]}, features=features
    )
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "dict")
    data.save_to_disk(tmp_path / "single")
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        picture(i).save(tmp_path / "pictures" / f"{i}.png")
    lines = ["file_name,label,other", *(f"pictures/{i}.png,{'ab'[i % 2]},x" for i in range(4))]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    arrow = next((tmp_path / "single").glob("*.arrow")).rename(tmp_path / "train.arrow")
    for source in ("dict", "train.csv", arrow.name):
        splits = load_splits(DataArguments(dataset=[str(tmp_path / source)], eval_fraction=0.25), seed=0)
        images = LabelledImages(splits, "train", as_rgb)
        assert splits.label_names == ["a", "b"], source
        assert {(images.image(i).getpixel((0, 0))[0] % 2, images.label(i)) for i in range(len(images))} == {
            (0, 0),
            (1, 1),
        }, source
    arrow.rename(tmp_path / "single" / "data-00000-of-00001.arrow")
    splits = load_splits(DataArguments(dataset=[str(tmp_path / "single")], eval_fraction=0.25), seed=0)
    assert (len(splits.train), len(splits.evaluation)) == (3, 1)


# Images


def stored(image, format="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def test_every_mode_of_image_becomes_rgb():
    for mode in ["L", "P", "CMYK", "1", "RGB"]:
        image = as_rgb(picture(255, mode))
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == (picture(255, mode).convert("RGB").getpixel((0, 0)))


def test_sixteen_bits_are_scaled_and_not_cut_off():
    image = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    assert decoded(stored(image), "it").getpixel((1, 0)) == (128, 128, 128)
    integers = Image.fromarray(np.array([[0, 200, 255]], dtype=np.int32))
    assert as_rgb(integers).getpixel((1, 0)) == (200, 200, 200)
    fractions = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert as_rgb(fractions).getpixel((1, 0)) == (128, 128, 128)


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    with pytest.warns(UserWarning, match="Transparent images are laid over white"):
        seen = as_rgb(image)
    assert [seen.getpixel((x, 0)) for x in range(2)] == [(200, 0, 0), (255, 255, 255)]
    palette = image.convert("P")
    palette.info["transparency"] = palette.getpixel((1, 0))
    assert decoded(stored(palette, transparency=palette.getpixel((1, 0))), "it").getpixel((1, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    assert decoded(stored(Image.new("RGB", (30, 20)), "JPEG", exif=exif), "it").size == (20, 30)


@pytest.mark.parametrize("size", [(1, 1), (5000, 2), (2, 5000)])
def test_images_of_extreme_shapes_are_transformed(size):
    processor = image_processor(None, 224)
    transform = training_transform(AugmentationArguments(rand_augment=9, random_erasing=1.0), 224, processor)
    assert transform(Image.new("RGB", size)).shape == (3, 224, 224)
    assert ProcessorTransform(processor)(Image.new("RGB", size)).shape == (3, 224, 224)


def broken_images(kind):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    good = stored(photo, "JPEG")["bytes"]
    return {"truncated": good[: len(good) // 2], "empty": b"", "html": b"<html>404</html>"}[kind]


def splits_with_a_bad_image(tmp_path, kind, bad=3, count=8):
    rows = {
        "image": [
            {"bytes": broken_images(kind), "path": "bad.jpg"} if i == bad else stored(picture(i)) for i in range(count)
        ],
        "label": [i % 2 for i in range(count)],
    }
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(rows, features=features).cast_column("image", datasets.Image()).to_parquet(path)
    write_parquet(tmp_path / "test.parquet", [0, 1])
    return load_splits(DataArguments(dataset=[str(tmp_path / "*.parquet")]), seed=0)


@pytest.mark.parametrize("kind", ["truncated", "empty", "html"])
def test_a_bad_image_is_named_before_training(kind, tmp_path):
    splits = splits_with_a_bad_image(tmp_path, kind)
    sentence = r"^Image 3 of the train split \(column `image`\) \(bad.jpg\) cannot be decoded: .*`--on-bad-image skip`"
    with pytest.raises(BadImageError, match=sentence):
        check_images(splits, 1000)
    check_images(splits, 2)  # looks at 0 and 4


def test_a_bad_image_gives_its_place_to_the_next_one(tmp_path):
    splits = splits_with_a_bad_image(tmp_path, "truncated")
    to_red = lambda image: image.getpixel((0, 0))[0]  # noqa: E731
    images = TrainingImages(splits, to_red, seed=0, on_bad_image="skip")
    assert images[0, 3, 3] == {"pixel_values": 4, "labels": 0, "is_bad": True}
    assert images[0, 2, 2] == {"pixel_values": 2, "labels": 0, "is_bad": False}
    with pytest.raises(BadImageError, match="Image 3 of the train split"):
        TrainingImages(splits, to_red, seed=0)[0, 3, 3]
    loader = DataLoader(TrainingImages(splits, to_red, seed=0), batch_sampler=[[(0, 3, 3)]], num_workers=1)
    with pytest.raises(BadImageError) as error:
        next(iter(loader))
    assert str(error.value).startswith("Image 3 of")
    assert "Traceback" not in str(error.value)


def test_a_missing_image_is_named():
    with pytest.raises(BadImageError, match="Image 7 is missing"):
        decoded(None, "Image 7")


def test_augmentation_depends_on_seed_epoch_and_position_alone():
    splits = load_splits(DataArguments(dataset=["digits"], max_train_samples=8), seed=0)
    transform = training_transform(AugmentationArguments(rand_augment=9), 32, image_processor(None, 32))
    images = TrainingImages(splits, transform, seed=5)
    once = images[2, 6, 3]["pixel_values"]
    torch.manual_seed(9)
    assert torch.equal(images[2, 6, 3]["pixel_values"], once)
    for key in ((3, 6, 3), (2, 7, 3)):
        assert not torch.equal(images[key]["pixel_values"], once)
    assert not torch.equal(TrainingImages(splits, transform, seed=6)[2, 6, 3]["pixel_values"], once)


# Streaming


@pytest.mark.parametrize("error", [RuntimeError, struct.error, TypeError])
def test_whatever_a_decoder_raises_the_image_is_bad_and_named(error, monkeypatch):
    def broken(image):
        raise error("of a decoder")

    monkeypatch.setattr("evit_training.data.images.as_rgb", broken)
    file = BytesIO()
    picture(7).save(file, "PNG")
    with pytest.raises(BadImageError, match=r"Image 3 .* cannot be decoded: .*: of a decoder"):
        decoded({"bytes": file.getvalue(), "path": "x.png"}, "Image 3")


def test_memory_that_runs_out_is_not_the_fault_of_an_image(monkeypatch):
    def broken(image):
        raise MemoryError

    monkeypatch.setattr("evit_training.data.images.as_rgb", broken)
    file = BytesIO()
    picture(7).save(file, "PNG")
    with pytest.raises(MemoryError):
        decoded({"bytes": file.getvalue(), "path": None}, "Image 3")


def streamed_splits(tmp_path, num_files=3, rows_each=10):
    for part in range(num_files):
        numbers = [part * rows_each + i for i in range(rows_each)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        rows = {"image": [picture(x) for x in numbers], "label": [x % 2 for x in numbers]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"train-{part}.parquet")
    write_parquet(tmp_path / "test.parquet", [0, 1] * 5 + [0], ["a", "b"])
    arguments = DataArguments(dataset=[str(tmp_path / "*.parquet")], streaming=True)
    return load_splits(arguments, seed=0)


def streamed_reds(splits, first, count, num_workers, process=0, num_processes=1):
    images = StreamedTrainingImages(
        splits,
        lambda image: image.getpixel((0, 0))[0],
        seed=0,
        micro_batch_size=4,
        first_micro_batch=first,
        shuffle_buffer=8,
        process=process,
        num_processes=num_processes,
    )
    loader = DataLoader(images, batch_size=None, num_workers=num_workers, collate_fn=torch.utils.data.default_collate)
    return [batch["pixel_values"].tolist() for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_goes_on_exactly_where_it_stopped(num_workers, tmp_path):
    splits = streamed_splits(tmp_path)
    all_of_them = streamed_reds(splits, 0, 20, num_workers)
    assert streamed_reds(splits, 7, 13, num_workers) == all_of_them[7:]
    flat = [red for batch in all_of_them for red in batch]
    assert set(flat) == set(range(30))  # 80 images: every one of 30 was seen
    assert flat[:30] != sorted(flat[:30])


def test_bad_images_of_a_stream_are_counted_and_a_stream_of_nothing_else_ends(tmp_path):
    good = BytesIO()
    picture(7).save(good, "PNG")
    for name, is_bad in (("half", lambda i: i % 2), ("all", lambda i: True)):
        (tmp_path / name).mkdir()
        images = [{"bytes": b"no picture" if is_bad(i) else good.getvalue(), "path": None} for i in range(12)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 6}, features=features)
        rows.to_parquet(tmp_path / name / "train.parquet")
        write_parquet(tmp_path / name / "test.parquet", [0, 1], ["a", "b"])
    numbers = {"micro_batch_size": 3, "shuffle_buffer": 8, "on_bad_image": "skip"}
    counts = []
    for first in (0, 1):
        splits = load_splits(DataArguments(dataset=[str(tmp_path / "half")], streaming=True), 0)
        stream = StreamedTrainingImages(splits, lambda image: 0, 0, first_micro_batch=first, **numbers)
        batches = itertools.islice(stream, 4 - first)
        counts.append([sum(item["is_bad"] for item in batch) for batch in batches])
    assert counts[0][1:] == counts[1]
    assert 10 <= sum(counts[0]) <= 12  # of two passes
    splits = load_splits(DataArguments(dataset=[str(tmp_path / "all")], streaming=True), 0)
    with pytest.raises(BadImageError, match="Not one of the streamed images of part 0 can be decoded"):
        next(iter(StreamedTrainingImages(splits, lambda image: 0, 0, first_micro_batch=0, **numbers)))


def test_closing_a_stream_of_several_files_does_not_wait(tmp_path):
    streamed_splits(tmp_path, rows_each=20)
    splits = load_splits(DataArguments(dataset=[str(tmp_path)], streaming=True, shuffle_buffer=10), 0)
    numbers = {"micro_batch_size": 4, "first_micro_batch": 0, "shuffle_buffer": 10}
    batches = iter(StreamedTrainingImages(splits, lambda image: 0, 0, **numbers))
    start = time.perf_counter()
    next(batches)
    batches.close()
    assert time.perf_counter() - start < 4  # `datasets` sleeps for five seconds


def test_a_stream_is_shared_out_among_processes(tmp_path):
    splits = streamed_splits(tmp_path, num_files=2)
    parts = [{red for batch in streamed_reds(splits, 0, 2, 0, process, 2) for red in batch} for process in (0, 1)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] <= set(range(20))


@pytest.mark.parametrize(("num_processes", "batch_size"), [(1, 4), (2, 4), (2, 5), (3, 4)])
def test_streamed_evaluation_counts_each_image_once_with_equal_batches(num_processes, batch_size, tmp_path):
    splits = streamed_splits(tmp_path)
    sizes, counted = [], 0
    for process in range(num_processes):
        images = StreamedEvaluationImages(splits, lambda image: 0, batch_size, process, num_processes)
        batches = list(images)
        sizes.append([len(batch) for batch in batches])
        counted += sum(item["is_counted"] for batch in batches for item in batch)
    assert counted == 11
    assert all(size == sizes[0] for size in sizes)


def test_streams_that_cannot_work_are_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["a", "b"])
    with pytest.raises(ValueError, match="Streamed data needs an evaluation split"):
        load_splits(DataArguments(dataset=[str(tmp_path / "train.parquet")], streaming=True), seed=0)
    write_parquet(tmp_path / "test.parquet", ["a", "b"])
    with pytest.raises(ValueError, match="of streamed data must be a ClassLabel"):
        load_splits(DataArguments(dataset=[str(tmp_path / "*.parquet")], streaming=True), seed=0)


# Refusals


def test_number_of_samples_can_be_limited():
    arguments = DataArguments(dataset=["digits"], max_train_samples=50, max_eval_samples=7)
    splits = load_splits(arguments, seed=0)
    assert (len(splits.train), len(splits.evaluation)) == (50, 7)


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
    refused("`--image-column` is `x`: name one of", dataset=[good], image_column="x")
    refused("`--label-column` is `x`: name one of .* perhaps `label`", dataset=[good], label_column="x")
    unlabelled = write_parquet(tmp_path / "unlabelled.parquet", [0, 1], label_name="number")
    refused("No column of labels was found: name one of", dataset=[unlabelled])
    refused(r"`--train-split` is `training`, but the data has \['train'\]", dataset=[good], train_split="training")
    refused("`--eval-split` is `dev`", dataset=[good], eval_split="dev")
    refused(
        r"the evaluation split has labels \[-1\], but 2 classes; the first is image 0. Hidden test",
        dataset=[good, hidden],
    )
    numbers = write_parquet(tmp_path / "numbers.parquet", [0, -1, 1])
    refused("has 1 labels of -1: hidden test labels cannot be used", dataset=[numbers])
    gaps = write_parquet(tmp_path / "gaps.parquet", [0, None, 1, None], ["a", "b"])
    refused("has 2 images without a label, the first is number 1", dataset=[gaps])
    fractions = write_parquet(tmp_path / "fractions.parquet", [0.5, 1.5])
    refused("holds float, not classes", dataset=[fractions])
    refused(r"classes that the training split has not: \['z'\]", dataset=[good, other])
    refused("does not tell its split", dataset=[good, str(tmp_path / "two.parquet")])
    refused("takes one folder or Hub id, or several data files", dataset=[good, str(tmp_path / "none.parquet")])
    (tmp_path / "labels.csv").write_text("a,b\n1,2")
    (tmp_path / "labels.txt").write_text("a,b")
    nothing = write_parquet(tmp_path / "nothing_test.parquet", [0, 1], ["a", "b"])
    datasets.Dataset.from_parquet(nothing).select([]).to_parquet(nothing)
    refused("could not be read: .* corresponds to no data", dataset=[good, nothing])
    (tmp_path / "empty").mkdir()
    refused("`--dataset .*empty` ", dataset=[str(tmp_path / "empty")])
    refused("`--dataset no/folder` could not be loaded: it is not a file or folder here", dataset=["no/folder"])
    refused("files must be .parquet, .arrow, .csv, .tsv, .*; give a folder", dataset=[str(tmp_path / "labels.txt")])
    refused(r"has the columns \['a', 'b'\]: name that of the images' paths", dataset=[str(tmp_path / "labels.csv")])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1nothing")
    refused("broken.parquet` could not be read", dataset=[str(tmp_path / "broken.parquet")])
