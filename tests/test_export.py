import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_config_with
from PIL import Image
from transformers import DeiTImageProcessor, ViTImageProcessor, pipeline

from evit_hf import (
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVConfig,
    EViTLVForImageClassification,
    EViTModel,
)
from evit_hf.export import ExportError, check_parity, example_code, export_model, load_exported
from evit_hf.pixels import processed_pixels, robust_keep_rates
from evit_training.cli import main
from evit_training.data.images import decoded
from evit_training.measuring.variants import quantized_copy


pytestmark = pytest.mark.usefixtures("traced_once")
ENGINES = ["torch-export", "onnx", "openvino"]
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])


def tiny(name, **changes):
    torch.manual_seed(0)
    if name == "lv":
        size = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.2}
        config = EViTLVConfig(
            **size, num_attention_heads=4, intermediate_size=64, num_labels=5, keep_rate=0.6, **changes
        )
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
    model = tiny("evit", inattentive_tokens="dropped") if name == "dropping" else tiny(name)
    record = export_model(model, tmp_path, engine, keep_rate_is_input=True)
    assert record["keep_rate"] == "input"
    assert record["largest_difference"] < 1e-5
    exported, images = load_exported(tmp_path), torch.randn(2, 3, 32, 32)
    for keep_rate in (1.0, 0.55, [0.9, 1.0, 0.2], [0.1, 0.1, 0.1]):
        expected = model(images, keep_rate=keep_rate).logits.detach()
        torch.testing.assert_close(exported(images, keep_rate), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(exported(images, 1.0), exported(images, 0.2), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_counted_models_are_exported_at_their_share_of_operations(engine, tmp_path):
    model = tiny("evit", image_size=64)
    model.set_macs(0.66)
    record = export_model(model, tmp_path, engine)
    assert (record["macs"], record["inattentive_tokens"]) == (0.66, "counted")
    assert record["largest_difference"] < 1e-5
    images = torch.randn(5, 3, 64, 64)
    expected = model(images).logits.detach()
    torch.testing.assert_close(load_exported(tmp_path)(images), expected, rtol=1e-4, atol=1e-4)
    if engine == "onnx":
        in_8_bits = load_exported(quantized_copy(tmp_path))(images)
        assert not torch.allclose(in_8_bits, expected, atol=1e-4)
        assert torch.nn.functional.cosine_similarity(in_8_bits, expected).min() > 0.9


@pytest.mark.slow  # compiles C++
@pytest.mark.parametrize("keep_rate_is_input", [False, True], ids=["counted", "keep_rate_is_input"])
def test_ahead_of_time_compiled_models_answer_as_the_model_whatever_the_memory_layout(
    keep_rate_is_input, traced_once, tmp_path
):
    traced_once.clear()
    model = tiny("evit", image_size=32 if keep_rate_is_input else 64)
    if not keep_rate_is_input:
        model.set_macs(0.66)
    export_model(model, tmp_path, "aoti", keep_rate_is_input)
    images = torch.randn(3, 3, model.config.image_size, model.config.image_size).to(memory_format=torch.channels_last)
    answer = load_exported(tmp_path)(images, 0.5 if keep_rate_is_input else None)
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
    with pytest.raises(ExportError, match="whose inattentive tokens are fused or dropped can be an input"):
        export_model(tiny("evit", inattentive_tokens="counted"), tmp_path, "onnx", keep_rate_is_input=True)
    with pytest.raises(ExportError, match="There is no format `tflite`: take one of onnx, openvino"):
        export_model(tiny("evit"), tmp_path, "tflite")


@pytest.mark.parametrize("engine", ENGINES)
def test_exports_keep_as_many_tokens_as_the_model(engine, tmp_path):
    """At 0.28, 0.56 and 0.6 of 25 patches a product in float32 keeps one more."""
    torch.manual_seed(0)
    config = tiny_config_with(image_size=40, num_hidden_layers=2, reorganization_layers=[0])
    model = EViTModel(config).eval()
    export_model(model, tmp_path, engine, keep_rate_is_input=True)
    exported, images = load_exported(tmp_path, num_threads=1), torch.randn(1, 3, 40, 40)
    for rate in [i / 50 for i in range(1, 51)]:
        with torch.no_grad():
            expected = model(images, keep_rate=rate).last_hidden_state
        torch.testing.assert_close(exported(images, rate), expected, rtol=1e-4, atol=1e-4)


class LogitsAndKeptPatches(torch.nn.Module):
    """Answers as a tuple of tensors, which is what tracers know."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        outputs = self.model(pixel_values)
        return outputs.logits, *outputs.attentive_index


def traced_to_onnx(module, images, folder):
    import onnxruntime

    names, path = ["pixel_values"], folder / "model.onnx"
    torch.onnx.export(
        module, (images,), path, dynamo=False, input_names=names, dynamic_axes={"pixel_values": {0: "n"}}
    )
    session = onnxruntime.InferenceSession(path)
    return lambda images: session.run(None, {"pixel_values": images.numpy()})


def traced_to_openvino(module, images, folder):
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.convert_model(module, example_input=images), "CPU", settings)
    return lambda images: list(compiled([images.numpy()]).values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["evit", "distilled", "lv"])
@pytest.mark.parametrize("traced", [traced_to_onnx, pytest.param(traced_to_openvino, marks=pytest.mark.slow)])
def test_older_converters_keep_the_tokens_of_the_model_in_batches_of_any_size(traced, name, implementation, tmp_path):
    """At 0.6 of 5 x 5 patches a product in float32 would keep 16 instead of 15."""
    model = tiny(name, reorganization_layers=[0, 2])
    model.set_attn_implementation(implementation)
    model.set_image_size(40)
    module, images = LogitsAndKeptPatches(model).eval(), torch.randn(5, 3, 40, 40)
    run = traced(module, images[:2], tmp_path)
    for batch in (images, images[:2], images[:1]):
        with torch.no_grad():
            logits, *kept = module(batch)
        answer, *indices = map(torch.from_numpy, run(batch))
        torch.testing.assert_close(answer, logits, rtol=1e-4, atol=1e-4)
        assert [index.shape[1] for index in kept] == [15, 10]
        for one, other in zip(indices, kept, strict=True):
            assert torch.equal(one, other)


def test_robust_keep_rates_keep_the_same_tokens_in_float32():
    for num_tokens in (25, 49, 64, 100, 196, 576):
        for rate in [i / 200 for i in range(1, 201)]:
            expected, left = [], num_tokens
            for _ in range(3):
                expected.append(math.ceil(rate * left))
                left = expected[-1] + int(expected[-1] < left)
            left = num_tokens
            for robust, count in zip(robust_keep_rates([rate] * 3, num_tokens, True), expected, strict=True):
                assert (torch.tensor(robust, dtype=torch.float32) * left).ceil().item() == count
                left = count + int(count < left)


def test_keep_rates_are_answered_as_the_model_answers_them(tmp_path):
    model, images = tiny("evit"), torch.randn(2, 3, 32, 32)
    export_model(model, tmp_path / "input", "torch-export", keep_rate_is_input=True)
    export_model(model, tmp_path / "fixed", "torch-export")
    exported, fixed = (load_exported(str(tmp_path / name)) for name in ("input", "fixed"))
    for rate in (None, 1, (0.5, 0.6, 1)):
        expected = model(images, keep_rate=rate).logits.detach()
        torch.testing.assert_close(exported(images, rate), expected, rtol=1e-4, atol=1e-4)
    for rate in (0.0, 1.5, float("nan"), [0.5], "0.5"):
        with pytest.raises(Exception, match="`keep_rate`") as error:
            model(images, keep_rate=rate)
        with pytest.raises(error.type, match="`keep_rate`"):
            exported(images, rate)
    with pytest.raises(ValueError, match="`keep_rate` is 0.6 in this export, got 0.5"):
        fixed(images, 0.5)
    torch.testing.assert_close(fixed(images, 0.6), fixed(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ENGINES)
def test_low_precision_is_exported_or_made_float32(engine, dtype, tmp_path, caplog):
    model = tiny("evit").to(dtype)
    record = export_model(model, tmp_path, engine)
    has_dtype = engine == "torch-export" or dtype == torch.float16
    assert record["dtype"] == (str(dtype) if has_dtype else "torch.float32").removeprefix("torch.")
    images = torch.randn(2, 3, 32, 32)
    answer = load_exported(tmp_path)(images)
    reference = (model if has_dtype else copy.deepcopy(model).float())(images).logits.detach().float()
    assert answer.dtype == torch.float32
    assert (answer - reference).abs().max() < (0.1 if has_dtype else 1e-3) * reference.abs().max()


def test_a_bare_model_exports_features(tmp_path):
    torch.manual_seed(0)
    model = EViTModel(tiny_config_with()).eval()
    model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "torch-export"])
    images = torch.randn(3, 3, 32, 32)
    expected = model(images).last_hidden_state.detach()
    torch.testing.assert_close(load_exported(tmp_path / "out")(images), expected, rtol=1e-4, atol=1e-4)
    picture().save(tmp_path / "it.png")
    command = [sys.executable, tmp_path / "out" / "example.py", tmp_path / "it.png"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert f"features {tuple(expected.shape[1:])}" in process.stdout, process.stderr


def test_what_cannot_work_is_said_before_the_work_starts(tmp_path, monkeypatch):
    model = EViTForImageClassification(tiny_config_with(id2label={i: f"class {i}" for i in range(1, 6)}))
    monkeypatch.setattr("evit_hf.export.exported_program", lambda *_: pytest.fail("the work has started"))
    with pytest.raises(ExportError, match="`id2label` must number the 5 classes from 0"):
        export_model(model, tmp_path / "out", "torch-export")
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="is a file: name a folder"):
        export_model(tiny("evit"), tmp_path / "file", "torch-export")
    with pytest.raises(ExportError, match="holds no export.json"):
        load_exported(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_export_leaves_nothing_and_no_half_over_an_old_one(tmp_path, monkeypatch):
    export_model(tiny("evit"), tmp_path / "old", "torch-export", processor=PROCESSOR)
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    monkeypatch.setattr("evit_hf.export.check_parity", lambda *_, **__: (_ for _ in ()).throw(ExportError("differs")))
    for name in ("old", "new/deep"):
        with pytest.raises(ExportError, match="differs"):
            export_model(tiny("evit", keep_rate=0.3), tmp_path / name, "torch-export", processor=PROCESSOR)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_onnx_has_the_layout_that_optimum_and_transformers_js_load(tmp_path):
    import onnx

    export_model(tiny("evit"), tmp_path, "onnx", processor=PROCESSOR)
    assert {path.name for path in tmp_path.iterdir()} >= {"onnx", "config.json", "preprocessor_config.json"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "vit"
    assert len(config["id2label"]) == 5
    assert "auto_map" not in config
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    assert [entry.name for entry in (*graph.input, *graph.output)] == ["pixel_values", "logits"]
    axes = [entry.type.tensor_type.shape.dim[0].dim_param for entry in (*graph.input, *graph.output)]
    assert axes == ["batch_size", "batch_size"]


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
    path, *answers = process.stdout.splitlines()
    expected = classify(image, top_k=5)
    assert path == f"{tmp_path / 'noise.png'} {expected[0]['label']}"
    assert [line.split(maxsplit=1)[1] for line in answers] == [answer["label"] for answer in expected]
    probabilities = [float(line.split()[0]) for line in answers]
    assert probabilities == pytest.approx([answer["score"] for answer in expected], abs=0.02)
    process = subprocess.run(
        [sys.executable, command[3], tmp_path / "nowhere.png", tmp_path / "noise.png"], capture_output=True, text=True
    )
    assert process.returncode == 1
    assert "noise.png" in process.stdout
    assert process.stderr.startswith(f"{tmp_path / 'nowhere.png'} is not a picture that can be read")


def picture(mode="RGB", size=(180, 100)):
    channels = [Image.effect_noise((9, 5), 90).resize(size, 3) for _ in range(4)]
    return Image.merge("RGBA", channels).convert(mode)


SQUARE = {"height": 32, "width": 32}


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"shortest_edge": 40}, do_center_crop=True, crop_size=SQUARE, resample=3),
        ViTImageProcessor(size={"shortest_edge": 20}, do_center_crop=True, crop_size=SQUARE),
        ViTImageProcessor(size=SQUARE, do_normalize=False),
        ViTImageProcessor(size=SQUARE, do_normalize=False, do_rescale=False),
        ViTImageProcessor(size=SQUARE, rescale_factor=1 / 127.5),
        ViTImageProcessor(size=SQUARE, resample=0),
        DeiTImageProcessor(),
    ],
)
def test_the_example_sees_the_pixels_of_the_processor(processor):
    settings = json.loads(processor.to_json_string())
    scale = (settings["rescale_factor"] if settings["do_rescale"] else 1) / (0.5 if settings["do_normalize"] else 1)
    for size in ((180, 100), (33, 57)):
        image = picture(size=size)
        expected = processor(image, return_tensors="np").pixel_values
        # torchvision and Pillow round differently, by a level or two of 255.
        assert abs(processed_pixels(image, settings) - expected).max() < 3 * scale


@pytest.mark.parametrize(("num_channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_the_example_sees_the_pixels_of_models_with_one_or_four_channels(num_channels, mode):
    processor = ViTImageProcessor(size=SQUARE, image_mean=[0.5] * num_channels, image_std=[0.5] * num_channels)
    image = picture(mode)
    # Transformers 5.9 cannot tell by itself where the four channels are.
    array = np.asarray(image).reshape(*image.size[::-1], num_channels)
    expected = processor(array, input_data_format="channels_last", return_tensors="np").pixel_values
    pixels = processed_pixels(image, json.loads(processor.to_json_string()), num_channels)
    assert pixels.shape == expected.shape == (1, num_channels, 32, 32)
    assert abs(pixels - expected).max() < 3 / 255 / 0.5


@pytest.mark.filterwarnings("ignore")
def test_the_example_decodes_pictures_as_training_does(tmp_path):
    record = {"format": "torch-export", "image_size": [32, 32], "keep_rate": 0.6, "num_keep_rates": 0}
    namespace = {"__file__": str(tmp_path / "example.py"), "__name__": "example"}
    exec(example_code(record, PROCESSOR).removesuffix("main()\n"), namespace)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "exif.jpg", exif=exif)
    for mode in ("L", "RGBA", "LA", "P"):
        picture(mode).save(tmp_path / f"{mode}.png")
    sixteen = np.random.default_rng(0).integers(0, 65535, (40, 50)).astype(np.uint16)
    Image.fromarray(sixteen).save(tmp_path / "sixteen.png")
    plain = {"do_resize": False}
    for path in sorted(tmp_path.iterdir()):
        value = {"bytes": None, "path": str(path)}
        expected = np.asarray(decoded(value, path.name)).transpose(2, 0, 1)[None]
        assert np.array_equal(namespace["processed_pixels"](Image.open(path), plain), expected), path.name


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
    flags = ["--int8", kind, "--dataset", *color_files, "--max_accuracy_drop", "100"]
    flags += ["--calibration_images", "8"] * (kind == "static")
    main(["export", str(saved), str(tmp_path / "out"), *flags])
    main(["export", str(saved), str(tmp_path / "float")])
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["int8"] == kind
    assert record["num_images"] == 30
    change = 100 * (record["int8_accuracy"] - record["accuracy"])
    assert record["accuracy_change"] == pytest.approx(change)
    sizes = [(tmp_path / name).stat().st_size for name in ("out/onnx/model_quantized.onnx", "float/onnx/model.onnx")]
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
        (["--dataset", "nosuch"], "`--dataset` is only used with `--int8 dynamic` or `--int8 static`: leave it out"),
        (["--max_accuracy_drop", "2"], "`--max-accuracy-drop` is only used with `--int8 dynamic` or"),
        (
            ["--int8", "dynamic", "--dataset", "digits", "--calibration_images", "3"],
            "`--calibration-images` is only used with `--int8 static`",
        ),
        (["--format", "tflite"], "There is no format `tflite`"),
        (["--keep_rate", "1.5"], "`--keep-rate` must be in (0, 1]"),
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
