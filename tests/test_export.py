import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_config_with
from PIL import Image
from transformers import ViTImageProcessor, pipeline

from evit_hf import (
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVConfig,
    EViTLVForImageClassification,
)
from evit_hf.export import ExportError, check_parity, example_code, export_model, load_exported
from evit_training.cli import main


ENGINES = ["torch-export", "onnx", "openvino"]
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])


def tiny(name, **changes):
    torch.manual_seed(0)
    if name == "lv":
        size = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.2}
        config = EViTLVConfig(**size, num_attention_heads=4, intermediate_size=64, num_labels=5, keep_rate=0.6)
        return EViTLVForImageClassification(config).eval()
    if name == "distilled":
        config = tiny_config_with(use_distillation_token=True, scoring_tokens="class_and_distillation", **changes)
        return EViTForImageClassificationWithTeacher(config).eval()
    return EViTForImageClassification(tiny_config_with(**changes)).eval()


@pytest.mark.parametrize("name", ["evit", "distilled", "lv"])
@pytest.mark.parametrize("engine", ENGINES)
def test_exports_answer_as_the_model_for_batches_of_any_size(engine, name, tmp_path):
    model = tiny(name)
    record = export_model(model, tmp_path, engine)
    assert record["largest_difference"] < 1e-5
    exported = load_exported(tmp_path, num_threads=1)
    images = torch.randn(7, 3, 32, 32)  # a size that the check has not seen
    torch.testing.assert_close(exported(images), model(images).logits.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["evit", "distilled", "dropping"])
@pytest.mark.parametrize("engine", ENGINES)
def test_each_request_can_have_its_own_keep_rates(engine, name, tmp_path):
    model = tiny("evit", fuse_inattentive_tokens=False) if name == "dropping" else tiny(name)
    record = export_model(model, tmp_path, engine, keep_rate_is_input=True)
    assert record["keep_rate"] == "input" and record["largest_difference"] < 1e-5
    exported, images = load_exported(tmp_path), torch.randn(2, 3, 32, 32)
    for keep_rate in (1.0, 0.55, [0.9, 1.0, 0.2], [0.1, 0.1, 0.1]):
        expected = model(images, keep_rate=keep_rate).logits.detach()
        torch.testing.assert_close(exported(images, keep_rate), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(exported(images, 1.0), exported(images, 0.2), atol=1e-2)


@pytest.mark.slow  # compiles C++
@pytest.mark.parametrize("keep_rate_is_input", [False, True])
def test_ahead_of_time_compiled_models_answer_as_the_model_whatever_the_memory_layout(keep_rate_is_input, tmp_path):
    model = tiny("evit")
    export_model(model, tmp_path, "aoti", keep_rate_is_input)
    images = torch.randn(3, 3, 32, 32).to(memory_format=torch.channels_last)
    answer = load_exported(tmp_path)(images, 0.5)
    expected = model(images, keep_rate=0.5 if keep_rate_is_input else None).logits.detach()
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_another_models_answers_are_noticed(tmp_path):
    export_model(tiny("evit"), tmp_path, "torch-export")
    other = tiny("evit", keep_rate=0.5)
    with pytest.raises(ExportError, match="relative difference of .* rounding explains 0.001. Do not use it"):
        check_parity(other, load_exported(tmp_path))
    with pytest.raises(ExportError, match="inf"):
        check_parity(other, lambda images, keep_rate: torch.zeros(len(images), 4))


def test_what_cannot_be_exported_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ExportError, match="LV-ViT classifies every token"):
        export_model(tiny("lv"), tmp_path, "onnx", keep_rate_is_input=True)
    with pytest.raises(ExportError, match="`reorganization_layers` is empty"):
        export_model(tiny("evit", reorganization_layers=[]), tmp_path, "onnx", keep_rate_is_input=True)
    with pytest.raises(ExportError, match="There is no format `tflite`: take one of onnx, openvino"):
        export_model(tiny("evit"), tmp_path, "tflite")


# The command


@pytest.fixture
def saved(tmp_path):
    model = tiny("evit")
    model.config.id2label = {i: f"class {i}" for i in range(5)}
    model.config.label2id = {f"class {i}": i for i in range(5)}
    model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("flags", [[], ["--keep_rate_input"]])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_example_beside_the_model_needs_no_part_of_this_package(engine, flags, saved, tmp_path):
    main(["export", str(saved), str(tmp_path / "out"), "--format", engine, *flags])
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    image.save(tmp_path / "noise.png")
    lacking = ["evit_hf", "evit_training", "transformers", *([] if engine == "torch-export" else ["torch"])]
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({lacking})); runpy.run_path(sys.argv[0])"
    code = code.replace("sys.argv[0]", "sys.argv.pop(1)")
    command = [sys.executable, "-c", code, tmp_path / "out" / "example.py", tmp_path / "noise.png"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    classify = pipeline("image-classification", model=str(saved))
    classify.model.set_keep_rate(0.7 if flags else 0.6)
    assert process.stdout.strip().endswith(classify(image, top_k=1)[0]["label"])
    lines = (tmp_path / "out" / "example.py").read_text().splitlines()
    assert len([line for line in lines if line and not line.startswith(('"""', "import", "from"))]) <= 15


def test_the_example_crops_as_the_processor_does(tmp_path):
    processor = ViTImageProcessor(
        size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 32}, resample=3
    )
    image = Image.effect_noise((90, 50), 90).convert("RGB").resize((180, 100))
    image.save(tmp_path / "noise.png")
    record = {"format": "onnx", "image_size": [32, 32], "keep_rate": 0.6, "num_keep_rates": 0}
    code = example_code(record, processor)
    code = code.replace("import onnxruntime\n", "").replace(
        'onnxruntime.InferenceSession(HERE / "model.onnx")', "None"
    )
    code = code[: code.index("    logits =")].replace("Path(__file__)", "Path('.')")
    namespace = {}
    sys.argv, before = ["example.py", str(tmp_path / "noise.png")], sys.argv
    try:
        exec(code, namespace)
    finally:
        sys.argv = before
    expected = processor(image, return_tensors="np").pixel_values
    # torchvision and Pillow round differently, by a level or two of 255.
    assert abs(namespace["pixels"] - expected).max() < 3 / 255 / 0.5


@pytest.fixture
def color_files(tmp_path):
    """Images of five flat colours, and a model that tells them apart better than chance."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {i}" for i in range(5)])}
    )
    for split, number in (("train", 20), ("test", 30)):
        images = [Image.effect_noise((32, 32), 20 + 40 * (i % 5)).convert("RGB") for i in range(number)]
        rows = {"image": images, "label": [i % 5 for i in range(number)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    return [str(tmp_path / f"{split}.parquet") for split in ("train", "test")]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_int8_is_smaller_and_its_accuracy_is_measured(kind, saved, color_files, tmp_path):
    flags = ["--int8", kind, "--dataset", *color_files, "--max_accuracy_drop", "100", "--calibration_images", "8"]
    main(["export", str(saved), str(tmp_path / "out"), *flags])
    main(["export", str(saved), str(tmp_path / "float")])
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["int8"] == kind and record["num_images"] == 30
    change = 100 * (record["int8_accuracy"] - record["accuracy"])
    assert record["accuracy_change"] == pytest.approx(change)
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("out", "float")]
    assert sizes[0] < sizes[1]
    images = torch.randn(4, 3, 32, 32)
    quantized, exact = (load_exported(tmp_path / name)(images) for name in ("out", "float"))
    assert not torch.equal(quantized, exact)
    assert torch.nn.functional.cosine_similarity(quantized, exact).min() > 0.8


def test_accuracy_that_int8_loses_ends_with_a_status_of_its_own(saved, color_files, tmp_path, capsys, monkeypatch):
    shares = iter([0.9, 0.8])
    monkeypatch.setattr("evit_training.commands.export.accuracy", lambda *_: next(shares))
    with pytest.raises(SystemExit, match="3"):
        main(["export", str(saved), str(tmp_path / "out"), "--int8", "dynamic", "--dataset", *color_files])
    assert "int8 costs 10.00 points of accuracy, more than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--int8", "dynamic"], "`--int8` needs `--format onnx`, and `--dataset`"),
        (["--format", "tflite"], "There is no format `tflite`"),
        (["--keep_rate", "1.5"], "`keep_rate` must be in (0, 1]"),
        (["--image_size", "4"], "smaller than a patch"),
    ],
)
def test_settings_that_cannot_work_end_with_one_line_and_status_2(flags, sentence, saved, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(saved), str(tmp_path / "out"), *flags])
    assert sentence in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(saved), str(tmp_path / "full")])
    assert "exists already" in capsys.readouterr().err
