"""The trainer end to end, on real digits, in as few steps as show the claim."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_config_with
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from evit_hf import (
    EViTConfig,
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTImageClassifierOutput,
    EViTLVConfig,
    EViTLVForImageClassification,
)
from evit_hf.keep_rate_schedule import scheduled_keep_rate
from evit_hf.profiling import num_macs
from evit_training.arguments import parse_train_arguments
from evit_training.learning.objective import Objective
from evit_training.loop import parts
from evit_training.loop.trainer import train
from evit_training.measuring.evaluation import Measurement, comparison_table, evaluate, images_per_second


SHORT = ["digits", "--max_train_samples", "128", "--max_eval_samples", "50", "--batch_size", "32", "--epochs", "2"]
SHORT += ["--compare_keep_rates", "1.0"]


def short_run(output_dir, *flags):
    return train(parse_train_arguments([*SHORT, "--log_steps", "1", "--output_dir", str(output_dir), *flags]))


def read_log(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps device and precision for the whole process; each run here starts afresh."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run")
    results = short_run(output_dir, "--keep_rate_dense_epochs", "0.5", "--keep_rate_shrink_epochs", "1")
    return output_dir, results


def test_run_leaves_model_metrics_settings_and_picture(finished_run):
    output_dir, results = finished_run
    assert {path.name for path in output_dir.iterdir()} == {
        "model",
        "checkpoints",
        "metrics.jsonl",
        "results.json",
        "class_report.json",
        "arguments.yaml",
        "kept_patches.png",
        "tradeoff.png",
        "run.json",
        "README.md",
    }
    model = AutoModelForImageClassification.from_pretrained(output_dir / "model")
    assert model.config.keep_rate == 0.7
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}
    assert AutoImageProcessor.from_pretrained(output_dir / "model").size == {"height": 32, "width": 32}
    assert json.loads((output_dir / "results.json").read_text()) == results
    width, height = Image.open(output_dir / "kept_patches.png").size
    assert width == 4 * 200  # image and three stages
    assert 0 < height - 8 * 200 < 60  # captions above 8 images
    assert parse_train_arguments([str(output_dir / "arguments.yaml")]).optimization.epochs == 2


def test_log_follows_the_schedules(finished_run):
    output_dir, _ = finished_run
    steps = [entry for entry in read_log(output_dir) if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 9))  # 128 images in batches of 32, twice
    assert [entry["keep_rate"] for entry in steps] == [scheduled_keep_rate(step, 0.7, 2, 4) for step in range(8)]
    rates = [entry["learning_rate"] for entry in steps]
    assert rates[0] == 0
    assert max(rates) == rates[-1]
    evaluations = [entry for entry in read_log(output_dir) if "eval_top1" in entry]
    assert [entry["step"] for entry in evaluations] == [4, 8]


def test_results_are_those_of_the_saved_model(finished_run):
    output_dir, results = finished_run
    assert [result["keep_rate"] for result in results] == [1.0, 0.7]
    model = EViTForImageClassification.from_pretrained(output_dir / "model")
    for result in results:
        assert result["gmacs"] == num_macs(model.config, result["keep_rate"]) / 1e9
        assert result["images_per_second"] > 0
        assert result["dtype"] == "float32"
        assert result["device"].startswith("cpu")
    evaluations = [entry for entry in read_log(output_dir) if "eval_top1" in entry]
    assert evaluations[-1]["eval_top1"] == results[1]["top1"]
    sizes = ("keep_rate", "gmacs", "images_per_second", "device", "dtype", "batch_size", "image_size")
    table = comparison_table([Measurement(metrics=x, **{name: x[name] for name in sizes}) for x in results])
    assert "1.0 (dense ViT)" in table
    assert f"{100 * results[1]['top1']:.2f}" in table


def test_same_seed_gives_the_same_weights_whatever_loads_the_images(finished_run, tmp_path):
    schedule = ["--keep_rate_dense_epochs", "0.5", "--keep_rate_shrink_epochs", "1"]
    short_run(tmp_path / "same", *schedule, "--num_workers", "2")
    short_run(tmp_path / "other", *schedule, "--seed", "1")
    first, same, other = (
        load_file(folder / "model" / "model.safetensors")
        for folder in (finished_run[0], tmp_path / "same", tmp_path / "other")
    )
    assert not torch.equal(first["vit.layers.0.mlp.fc1.weight"], other["vit.layers.0.mlp.fc1.weight"])
    for name, tensor in first.items():
        assert torch.equal(same[name], tensor), name


def test_class_report_belongs_to_the_results(finished_run):
    output_dir, results = finished_run
    report = json.loads((output_dir / "class_report.json").read_text())
    assert report["label_names"] == [str(digit) for digit in range(10)]
    confusion = torch.tensor(report["confusion_matrix"])
    assert confusion.sum() == 50
    assert confusion.trace() / 50 == pytest.approx(results[1]["top1"])
    assert [row["support"] for row in report["by_class"]] == confusion.sum(1).tolist()


def test_log_tells_speed_waiting_memory_and_operations(finished_run):
    steps = [entry for entry in read_log(finished_run[0]) if "loss" in entry]
    for entry in steps:
        assert entry["images_per_second"] > 0
        assert 0 <= entry["data_wait"] <= 1
        assert entry["memory_gib"] > 0.01
    assert steps[0]["gmacs"] > steps[-1]["gmacs"] > 0  # the keep rate fell
    assert all(entry["skipped_steps"] == entry["bad_images"] == 0 for entry in steps)


def test_fine_tunes_a_vit_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    vit = ViTForImageClassification(config)
    vit.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.3] * 3).save_pretrained(tmp_path / "vit")
    results = short_run(
        tmp_path / "run",
        "--model",
        str(tmp_path / "vit"),
        "--keep_rate",
        "0.9",
        "0.7",
        "0.5",
        "--learning_rate",
        "1e-9",
        "--weight_decay",
        "0",
    )
    assert results[1]["keep_rate"] == [0.9, 0.7, 0.5]
    model = EViTForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.layer_keep_rates == {1: 0.9, 2: 0.7, 3: 0.5}
    assert model.classifier.weight.shape == (10, 32)
    for name, tensor in model.vit.state_dict().items():  # hardly moved: it did start from the checkpoint
        torch.testing.assert_close(tensor, vit.vit.state_dict()[name], rtol=0, atol=1e-6)
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "run" / "model").image_mean) == [0.3] * 3


@pytest.mark.parametrize("family", ["lvvit", "distilled"])
def test_fine_tunes_the_other_backbones(family, tmp_path):
    small = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2}
    if family == "lvvit":
        model = EViTLVForImageClassification(EViTLVConfig(**small, intermediate_size=64, stem_hidden_size=8))
    else:
        config = EViTConfig(**small, intermediate_size=64, use_distillation_token=True)
        model = EViTForImageClassificationWithTeacher(config)
    model.save_pretrained(tmp_path / "start")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "start")
    short_run(tmp_path / "run", "--model", str(tmp_path / "start"), "--mix_token", "1", "--learning_rate", "1e-2")
    trained = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert type(trained) is type(model)
    for head in ("aux_classifier", "distillation_classifier", "cls_classifier", "classifier"):
        if hasattr(model, head):
            assert getattr(trained, head).weight.shape == (10, 32)
            assert getattr(trained, head).bias.abs().max() > 0  # it started at zero, and was trained


def test_trains_a_preset_from_scratch(tmp_path):
    flags = ["--preset", "evit-deit-ti", "--max_steps", "1", "--batch_size", "4", "--max_eval_samples", "4"]
    results = short_run(tmp_path, *flags)
    assert results[1]["gmacs"] < 0.05  # 64 patches: the recipe's image size overrides the preset's
    config = EViTForImageClassification.from_pretrained(tmp_path / "model").config
    assert (config.hidden_size, config.num_labels, config.image_size) == (192, 10, 32)


def test_training_loss_of_mixed_images_is_that_of_mixed_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4), torch.tensor([1, 3])
    cross_entropy = torch.nn.functional.cross_entropy
    outputs = EViTImageClassifierOutput(logits=logits)
    config = tiny_config_with(image_size=16, num_labels=4)
    plain = Objective(config, label_smoothing=0.1).label_loss(outputs, labels)
    torch.testing.assert_close(plain, cross_entropy(logits, labels, label_smoothing=0.1))
    mixed = Objective(config).label_loss(outputs, labels, (0, 0, 1, 1))
    expected = 0.75 * cross_entropy(logits, labels) + 0.25 * cross_entropy(logits, labels.flip(0))
    torch.testing.assert_close(mixed, expected)


def test_loss_falls(tmp_path):
    flags = ["--epochs", "25", "--warmup_epochs", "2", "--affine_degrees", "0", "--learning_rate", "2e-3"]
    short_run(tmp_path, *flags, "--keep_rate_shrink_epochs", "0", "--keep_rate_dense_epochs", "0")
    losses = [entry["loss"] for entry in read_log(tmp_path) if "loss" in entry]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


@pytest.mark.parametrize(
    "flags", [["--mixed_precision", "bf16"], ["--gradient_checkpointing"], ["--keep_rate", "1.0"]]
)
def test_other_ways_to_train(flags, tmp_path):
    results = short_run(tmp_path, "--max_steps", "2", "--max_grad_norm", "1", "--label_smoothing", "0.1", *flags)
    assert len(results) == (1 if "--keep_rate" in flags else 2)
    assert len([entry for entry in read_log(tmp_path) if "loss" in entry]) == 2


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "metrics.jsonl").write_text("precious")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"holds a run already \(model, metrics.jsonl\): resume it with `--resume auto`"
    ):
        short_run(tmp_path, "--max_steps", "1")
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"
    with pytest.raises(ValueError, match="`--overwrite` would delete what `--resume` continues from"):
        short_run(tmp_path, "--overwrite", "--resume", "auto")
    short_run(tmp_path, "--max_steps", "1", "--overwrite")
    assert "precious" not in (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_another_resolution_resizes_the_positions_and_matches_the_operations(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "evit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "evit")
    flags = ["--model", str(tmp_path / "evit"), "--image_size", "40", "--match_macs_of", "32", "--learning_rate", "0"]
    results = short_run(tmp_path / "run", *flags, "--max_steps", "1")
    model = EViTForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.image_size == 40
    assert model.vit.embeddings.position_embeddings.shape[1] == 26
    dense = num_macs(tiny_model.config, 1.0) / 1e9
    assert 0.8 * dense < results[1]["gmacs"] <= dense * 1.05  # one more class logit than the checkpoint has
    assert AutoImageProcessor.from_pretrained(tmp_path / "run" / "model").size == {"height": 40, "width": 40}


def test_models_for_other_than_square_images_are_refused(tmp_path):
    EViTForImageClassification(tiny_config_with(image_size=[32, 48])).save_pretrained(tmp_path / "evit")
    with pytest.raises(ValueError, match=r"made for images of \[32, 48\] pixels .*: this trainer takes square ones"):
        short_run(tmp_path / "run", "--model", str(tmp_path / "evit"))


# Pieces


def test_evaluation_counts_as_a_loop_does(tiny_model):
    from accelerate import Accelerator

    pixel_values, labels = torch.randn(23, 3, 32, 32), torch.arange(23) % 5
    rows = [
        {"pixel_values": x, "labels": y, "is_counted": True, "is_bad": False}
        for x, y in zip(pixel_values, labels, strict=True)
    ]
    loader = torch.utils.data.DataLoader(rows, batch_size=7)
    metrics = evaluate(Accelerator(cpu=True), tiny_model, loader, keep_rate=0.5)
    logits = torch.cat([tiny_model(x[None], keep_rate=0.5).logits for x in pixel_values])
    hits = sum(int(row.argmax() == label) for row, label in zip(logits, labels, strict=True))
    assert metrics["top1"] == hits / 23
    assert metrics["top5"] == 1.0  # five classes
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)


def test_timing_alternates_the_keep_rates_and_restores_the_mode(tiny_model, images, monkeypatch):
    seen = []
    original = tiny_model.vit.token_plan
    monkeypatch.setattr(tiny_model.vit, "token_plan", lambda *asked: seen.append(asked[0]) or original(*asked))
    speeds = images_per_second(tiny_model.train(), images, [1.0, 0.5], rounds=3)
    assert len(speeds) == 2
    assert min(speeds) > 0
    assert sorted(seen) == [0.5] * 5 + [1.0] * 5
    assert all(set(seen[i : i + 2]) == {1.0, 0.5} for i in range(0, 10, 2))
    assert tiny_model.training


@pytest.mark.slow
def test_digits_recipe_reaches_97_percent(tmp_path):
    results = train(parse_train_arguments(["digits", "--output_dir", str(tmp_path)]))
    assert results[1]["keep_rate"] == 0.7
    assert results[1]["top1"] >= 0.97
    assert results[1]["gmacs"] < 0.7 * results[0]["gmacs"]


def test_a_silent_single_process_launch_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parts, "Accelerator", lambda **settings: SimpleNamespace(num_processes=1))
    with pytest.raises(ValueError, match="2 processes were launched but Accelerate uses 1: launch with `torchrun"):
        parts.build_accelerator(parse_train_arguments([]))
