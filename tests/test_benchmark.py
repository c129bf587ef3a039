import ast
import copy
import json
import re
import time
from pathlib import Path

import datasets
import pytest
import torch
from conftest import tiny_config_with
from PIL import Image
from training_runs import SMALL
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor
from vision_families import EXAMPLE, build

from evit_hf import EViTConfig, EViTForImageClassification, reorganize
from evit_hf.profiling import MacsFormula, num_macs
from evit_training.cli import main
from evit_training.learning.models import compile_layers
from evit_training.measuring import schedule, timing
from evit_training.measuring.arguments import BenchmarkArguments, Target, parse_target
from evit_training.measuring.benchmark import Comparison, Row, benchmark, draw, summarize
from evit_training.measuring.timing import MeasurementError, Variant
from evit_training.measuring.tuning import (
    candidate_layers,
    greedy,
    loss_and_accuracy,
    next_step,
    set_rates,
)
from evit_training.measuring.variants import BASELINES, dense_baseline, reference_logits


CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


# Timing


def test_variants_take_turns_in_random_order():
    order = []
    variants = [Variant(name, lambda name=name: order.append(name), 1, 1) for name in "abc"]
    seconds = timing.alternate(variants, CPU, rounds=20, warmup_rounds=2)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 66, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 3
    assert [len(times) for times in seconds] == [20, 20, 20]


def test_a_slow_variant_is_seen_as_slow():
    variants = [Variant("fast", lambda: time.sleep(0.002), 1, 1), Variant("slow", lambda: time.sleep(0.02), 1, 1)]
    fast, slow = timing.alternate(variants, CPU, rounds=5)
    assert min(slow) > max(0.02, min(fast))


def test_a_variant_that_computes_something_else_is_refused():
    right = torch.tensor([[1.0, 2.0]])
    good = Variant("good", lambda: right + 1e-6, 1, 1, keep_rate=0.7)
    timing.check_answers([good], lambda keep_rate: right, 1e-3)
    assert 0 < good.relative_error < 1e-5
    for answer in (right * 1.1, right[:, :1], right * float("nan")):
        with pytest.raises(MeasurementError, match="`bad` differs from the reference by"):
            timing.check_answers([Variant("bad", lambda answer=answer: answer, 1, 1)], lambda keep_rate: right, 1e-3)


def test_a_rate_beyond_the_peak_of_the_machine_is_refused():
    variant = Variant("stale", lambda: None, 10**9, 10**9)
    assert timing.check_rate(variant, 8, seconds=1.0, peak=20.0) == 16.0
    with pytest.raises(
        MeasurementError, match="`stale` seems to run at 160 GFLOP/s, but this machine .* at 20 at most"
    ):
        timing.check_rate(variant, 8, seconds=0.1, peak=20.0)
    variant.is_exact = False  # 8-bit products have a different peak
    assert timing.check_rate(variant, 8, seconds=0.1, peak=20.0) == 160.0


def test_memory_is_what_a_run_needs_beyond_what_is_there():
    held = torch.ones(20 * 2**18)
    needed = timing.peak_memory_mib(lambda: (held + 1).sum(), CPU)
    assert needed is None or 15 < needed < 60


def test_saved_activations_are_counted_once_and_without_weights():
    layer = torch.nn.Linear(1024, 1024)
    images = torch.ones(256, 1024, requires_grad=True)  # 1 MiB, kept for the weight's gradient
    assert timing.saved_activations_mib(layer, lambda: (layer(images), layer(images))) == pytest.approx(1.0)


def test_ratios_are_taken_within_a_round_and_efficiency_weighs_them_by_operations():
    variants = [
        Variant("dense timm", lambda: None, 400, 400, 1.0),
        Variant("dense transformers", lambda: None, 400, 400, 1.0),
        Variant("EViT 1.0 sdpa", lambda: None, 400, 380, 1.0),
        Variant("EViT 0.5 sdpa", lambda: None, 200, 190, 0.5),
    ]
    # The machine is half as fast in the second round.
    seconds = [[4.0, 8.0, 4.0], [5.0, 10.0, 5.0], [4.0, 8.0, 4.0], [2.0, 4.0, 2.0]]
    rows = summarize(variants, seconds, 8, ["timm", "transformers"])
    assert [row.is_baseline for row in rows] == [True, False, False, False]
    assert [row.speed_up for row in rows] == [1.0, 0.8, 1.0, 2.0]
    assert rows[3].efficiency == 1.0
    assert rows[3].images_per_second == 4.0
    assert rows[3].like_for_like == 2.0
    assert rows[3].like_for_like_efficiency == 1.0
    assert "like_for_like" not in rows[0].as_json()
    assert rows[3].as_json()["like_for_like"] == 2.0


# Variants


@pytest.mark.parametrize("name", BASELINES)
def test_dense_baselines_have_the_same_weights(name, tiny_model, images):
    expected = reference_logits(tiny_model, images)(1.0)
    answer = dense_baseline(tiny_model, name)(images)
    torch.testing.assert_close(getattr(answer, "logits", answer), expected, rtol=1e-4, atol=1e-4)
    if name.startswith("timm"):
        assert dense_baseline(tiny_model, name).blocks[0].attn.fused_attn == (name == "timm")


def test_models_without_a_dense_twin_elsewhere_say_so(saved, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "evit-deit-ti-distilled", "--batch_sizes", "1", "--rounds", "1"])
    assert "take `--baselines none`" in capsys.readouterr().err


# The command


def test_benchmark_prints_json_of_shares_of_operations(tmp_path, capsys):
    EViTForImageClassification(tiny_config_with(num_hidden_layers=2, image_size=64)).save_pretrained(tmp_path)
    flags = ["--macs", "0.8", "--batch-sizes", "1", "--rounds", "1", "--baselines", "none", "--json"]
    main(["benchmark", str(tmp_path), *flags])
    captured = capsys.readouterr()
    (setting,) = json.loads(captured.out)["settings"]
    dense, counted = setting["rows"]
    assert (dense["name"], counted["name"]) == ("EViT 1.0 sdpa", "EViT macs=0.8 sdpa")
    assert counted["gmacs"] < 0.85 * dense["gmacs"]
    assert "batch 1" in captured.err


@pytest.mark.usefixtures("traced_once")
def test_benchmark_writes_table_json_and_plot(tmp_path, capsys):
    saved = str(tmp_path / "model")
    torch.manual_seed(0)
    config = tiny_config_with(num_hidden_layers=2, reorganization_layers=[0])
    EViTForImageClassification(config).save_pretrained(saved)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(saved)
    backends = ["--backends", "sdpa", "eager", "torch-export", "onnx", "openvino", "onnx-int8"]
    flags = ["--batch_sizes", "2", "--rounds", "3", "--keep_rates", "1.0", "0.5", "--clock", "cpu"]
    main(["benchmark", saved, *flags, *backends, "--output_dir", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "batch 2, float32, cpu, 1 threads, cpu clock, 3 rounds" in text
    report = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    (setting,) = report["settings"]
    rows = {row["name"]: row for row in setting["rows"]}
    assert len(rows) == 4 + 2 * 6
    assert sum(row["is_baseline"] for row in rows.values()) == 1
    config = EViTConfig.from_pretrained(saved)
    row = rows["EViT 0.5 onnx"]
    assert row["gmacs"] == num_macs(config, 0.5) / 1e9
    assert row["executed_gmacs"] == num_macs(config, 0.5, executed=True) / 1e9
    assert row["relative_error"] < 1e-4 < rows["EViT 0.5 onnx-int8"]["relative_error"]
    assert row["like_for_like"] > 0
    assert torch.__version__.startswith(report["versions"]["torch"])
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 10_000


def test_the_figure_has_keep_rates_on_points_and_the_names_of_the_table(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    rows = [
        Row(name, rate, name == "dense timm", 1.0, 1.0, speed_up, (speed_up - 0.1, speed_up + 0.2), gmacs, gmacs, 1.0)
        for name, rate, speed_up, gmacs in (
            ("dense timm", 1.0, 1.0, 4.6),
            ("EViT 1.0 sdpa", 1.0, 1.0, 4.6),
            ("EViT 0.5 sdpa", 0.5, 2.0, 2.3),
            ("EViT 0.5 onnx-int8", 0.5, 2.4, 2.3),
        )
    ]
    settings = ("evit-deit-s", "inference", 8, 224, "float32", 1, "wall", 11, True, "cpu", 90.0, rows)
    draw([Comparison(*settings)], "a processor", tmp_path / "benchmark.png")
    (axes,) = figures[0].axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["as fast as operations fall", "dense timm", "EViT sdpa", "EViT onnx-int8"]
    assert [text.get_text() for text in axes.texts] == ["1", "0.5", "0.5"]
    assert axes.get_ylabel() == "times as fast as dense timm"
    assert axes.get_title() == "batch 8, 224 px, float32, 1 thread"
    assert "a processor" in figures[0].get_suptitle()


def test_training_steps_are_compared_by_time_and_saved_activations(saved, capsys):
    arguments = BenchmarkArguments(
        keep_rates=[1.0, 0.5], batch_sizes=[4], rounds=2, training=True, baselines=["timm", "transformers-eager"]
    )
    rows = {row["name"]: row for row in benchmark(saved, arguments)["settings"][0]["rows"]}
    saved_mib = {name: row["saved_activations_mib"] for name, row in rows.items()}
    assert saved_mib["EViT 0.5 sdpa"] < saved_mib["EViT 1.0 sdpa"] < saved_mib["dense transformers-eager"]
    assert rows["EViT 1.0 sdpa"]["relative_error"] < 1e-4  # the same loss as timm's


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--backends", "tensorrt"], "`--backends` knows sdpa, sdpa-mkl, eager"),
        (["--baselines", "mlx"], "`--baselines` knows timm"),
        (["--dtypes", "int4"], "`--dtypes` knows float32"),
        (["--keep_rates", "0"], "`--keep-rates` must be in (0, 1], got 0.0"),
        (["--clock", "sun"], "`--clock` must be one of wall, cpu"),
        (["--training", "--backends", "onnx"], "`--training` runs on sdpa, eager, compile and"),
        (["--tune", "fast"], "`--tune` is the command `evit tune MODEL TARGET` now"),
        (["--no-fuse"], "`--no-fuse` is `--inattentive-tokens dropped` now"),
        (["--dataset", "digits"], "unknown flag `--dataset`"),
        (["--schedule"], "`--rounds` is not used with `--schedule`: leave it out"),
        (["--schedule", "--training"], "`--schedule` trains already: leave out `--training`"),
    ],
)
def test_settings_that_cannot_work_end_with_one_line_and_status_2(flags, sentence, saved, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", saved, "--batch_sizes", "1", "--rounds", "1", *flags])
    assert sentence in capsys.readouterr().err


def test_what_becomes_of_the_tokens_is_named(tmp_path):
    EViTForImageClassification(tiny_config_with(image_size=64)).save_pretrained(tmp_path)
    arguments = BenchmarkArguments(macs=[0.8], batch_sizes=[1], rounds=1, baselines=["none"])
    report = benchmark(str(tmp_path), arguments, ["my model", "--macs", "0.8"])
    assert report["settings"][0]["inattentive_tokens"] == "counted"
    assert report["command"] == "evit benchmark 'my model' --macs 0.8"


@pytest.mark.parametrize("way", ["--training", "--schedule"])
def test_a_model_without_classifier_is_not_trained(way, tmp_path, capsys):
    dinov2 = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56))
    dinov2.save_pretrained(tmp_path / "bare")
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", str(tmp_path / "bare"), "--batch-sizes", "1", way])
    assert f"`{way}` needs a classifier, and `Dinov2Model` has none" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--keep-rates", "0.7", "0.5"], ["--batch-sizes", "1", "8"]])
def test_a_schedule_has_one_target_and_one_batch_size(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "evit-deit-ti", "--schedule", *flags])
    assert f"`{flags[0]}` takes one value with `--schedule`, got 2" in capsys.readouterr().err


def test_modes_name_the_flags_that_they_would_ignore():
    for mode, name in (("schedule", "backends"), ("schedule", "image_sizes"), ("schedule", "clock")):
        with pytest.raises(ValueError, match="is not used with `--schedule`"):
            BenchmarkArguments(**{mode: True}).check_mode({name})
    BenchmarkArguments(training=True).check_mode({"training", "rounds", "keep_rates", "inattentive_tokens"})


# Tuning


def test_targets_are_shares_operations_or_times(capsys):
    assert parse_target("0.6") == Target("share", 0.6)
    assert parse_target("2.5gmacs") == Target("gmacs", 2.5)
    assert parse_target("40 ms") == Target("ms", 40.0)
    for text in ("fast", "1.5", "0"):
        with pytest.raises(SystemExit, match="2"):
            main(["tune", "anything", text])
        assert "`TARGET` must be a share of the dense operations below 1" in capsys.readouterr().err


def test_tuning_replaces_a_share_of_operations_by_keep_rates():
    model, images = reorganize(build(EXAMPLE), macs=0.6), torch.randn(2, 3, 48, 48)
    for rates, lengths in (({1: 0.5}, [18]), ({0: 0.5, 2: 0.5}, [18, 10]), ({}, [36, 36])):
        set_rates(model, rates)
        assert [index.shape[1] for index in model(images).attentive_index] == lengths


def test_greedy_search_meets_the_budget_and_lowers_the_layer_that_costs_least():
    torch.manual_seed(0)
    model = EViTForImageClassification(tiny_config_with(num_hidden_layers=5)).eval()
    images = torch.randn(8, 3, 32, 32)
    labels = model(images, keep_rate=1.0).logits.argmax(-1)

    cost = MacsFormula.of(copy.deepcopy(model))
    lines = []
    budget = 0.8 * cost({})
    rates = greedy(model, [(images, labels)], cost, budget, lines.append)
    assert cost(rates) <= budget < cost({layer: min(1.0, rate + 0.3) for layer, rate in rates.items()})
    assert set(rates) <= set(candidate_layers(model)) == {1, 2, 3}
    # Each step was the cheapest one: no other first step costs less for what it saves.
    first = ast.literal_eval(re.search(r"\{.*?\}", lines[0]).group())
    losses = {}
    for layer in candidate_layers(model):
        candidate, saved = next_step({}, layer, cost, cost({}))
        loss, _ = loss_and_accuracy(model, [(images, labels)], candidate)
        dense, _ = loss_and_accuracy(model, [(images, labels)], {})
        losses[layer] = (loss - dense) / min(saved, cost({}) - budget)
    assert min(losses, key=losses.get) in first


def test_tuned_models_are_saved_with_their_layers_and_rates(tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", *SMALL, "--output_dir", str(run)])
    flags = ["--dataset", "digits", "--images", "40", "--num_workers", "0", "--rounds", "2"]
    flags += ["--save", str(tmp_path / "tuned"), "--output_dir", str(tmp_path)]
    main(["tune", str(run), "0.7", *flags])
    report = json.loads((tmp_path / "tune.json").read_text())
    chosen = report[report["chosen"]]
    assert chosen["gmacs"] <= 0.7 * report["dense"]["gmacs"]
    assert chosen["loss"] == min(report[key]["loss"] for key in ("tuned", "paper_layers") if key in report)
    config = EViTConfig.from_pretrained(tmp_path / "tuned")
    assert config.reorganization_layers == chosen["reorganization_layers"]
    assert config.keep_rate == chosen["keep_rate"]
    assert (Path(tmp_path) / "tuned" / "preprocessor_config.json").exists()
    for target, sentence in (("0.01", "No setting gets there"), ("100gmacs", "meets this target already")):
        with pytest.raises(SystemExit, match="2"):
            main(["tune", str(run / "model"), target, *flags, "--save", str(tmp_path / "new")])
        assert sentence in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):  # before the search
        main(["tune", str(run / "model"), "0.7", *flags])
    assert "exists already: name a new folder" in capsys.readouterr().err


def test_models_that_were_not_trained_for_it_are_tuned_from_the_recipe_without_labels(tmp_path, capsys):
    torch.manual_seed(0)
    model = EViTForImageClassification(tiny_config_with(image_size=64, keep_rate=1.0, initializer_range=0.1)).eval()
    model.save_pretrained(tmp_path / "dense")
    processor = ViTImageProcessor(size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path / "dense")
    (tmp_path / "pictures").mkdir()
    pictures = [Image.effect_noise((64, 64), 40 + 30 * i).convert("RGB") for i in range(4)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "pictures" / f"{i}.png")
    flags = ["--dataset", str(tmp_path / "pictures"), "--save", str(tmp_path / "tuned"), "--rounds", "1", "--json"]
    main(["tune", str(tmp_path / "dense"), "0.7", *flags])
    report = json.loads(capsys.readouterr().out)
    others = {key: row for key, row in report.items() if isinstance(row, dict) and key != "dense"}
    assert set(others) >= {"recipe", "from_layer_1", "paper_layers"}
    assert report["chosen"] == min(others, key=lambda key: others[key]["loss"])
    assert all(row["gmacs"] <= 0.7 * report["dense"]["gmacs"] for row in others.values())
    assert (report["judge"], report["dense"]["accuracy"], report["num_images"]) == ("dense", 1.0, 4)

    bytes_of = [{"bytes": (tmp_path / "pictures" / f"{i}.png").read_bytes(), "path": None} for i in range(4)]
    (tmp_path / "rows").mkdir()
    rows = datasets.Dataset.from_dict({"image": bytes_of, "label": [0, 1, 0, 1]})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows" / "test.parquet")
    main(["tune", str(tmp_path / "dense"), "0.7", "--dataset", str(tmp_path / "rows"), "--rounds", "1", "--json"])
    of_rows = json.loads(capsys.readouterr().out)
    assert (of_rows["num_images"], of_rows["dense"]["loss"]) == (4, pytest.approx(report["dense"]["loss"]))

    tuned = EViTForImageClassification.from_pretrained(tmp_path / "tuned").eval()
    chosen = report[report["chosen"]]
    assert (tuned.config.keep_rate, tuned.config.inattentive_tokens) == (chosen["keep_rate"], "counted")
    pixel_values = processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        dense, logits = model(pixel_values, keep_rate=1.0).logits, tuned(pixel_values).logits
    assert chosen["accuracy"] == (logits.argmax(1) == dense.argmax(1)).float().mean().item()
    assert chosen["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, dense.softmax(1)).item(), abs=1e-5
    )
    reorganize(model, macs=0.69)
    left = [index.shape[1] for index in model(pixel_values).attentive_index]
    rates = zip(report["recipe"]["reorganization_layers"], report["recipe"]["keep_rate"], strict=True)
    set_rates(tuned, dict(rates))
    recipe = [index.shape[1] for index in tuned(pixel_values).attentive_index]
    assert all(abs(a - b) <= 2 for a, b in zip(left, recipe, strict=True))


# Compiled training


def test_compiled_layers_take_every_keep_rate_without_being_compiled_again(images):
    """Counted with only the compiler's front end; the slow test runs the real backend."""
    frames = []

    def backend(graph, inputs):
        frames.append(len(inputs))
        return graph.forward

    torch.manual_seed(0)
    model = EViTForImageClassification(tiny_config_with(num_hidden_layers=6)).train()
    expected = {rate: model(images, keep_rate=rate).logits for rate in (1.0, 0.9, 0.75, 0.6, 0.45, 0.3)}
    torch._dynamo.reset()
    for layer in model.base_model.layers:
        layer.compile(dynamic=True, backend=backend)
    counts = []
    for _ in range(2):
        for rate, logits in expected.items():
            torch.testing.assert_close(model(images, keep_rate=rate).logits, logits)
            counts.append(len(frames))
    # Two kinds of layers, and a graph of its own where one token is left; not one for each of six rates.
    assert counts[-1] == counts[len(expected) - 1] <= 4
    torch._dynamo.reset()


def test_nobody_waits_for_what_is_not_compiled():
    """Where the second pass happened to take longer than the first, a waiting time of -1 s was once reported."""
    eager = schedule.summarize("eager", [[1.0, 1.0], [1.5, 1.5], [1.0, 1.0]], [0, 0, 0])
    assert eager == schedule.ScheduleRow("eager", 2, 0, 0, 0.0, 1250.0)
    compiled = schedule.summarize("layers", [[9.0, 1.0], [1.0, 1.0], [1.0, 1.0]], [3, 3, 4])
    assert compiled == schedule.ScheduleRow("layers", 2, 3, 1, 8.0, 1000.0)


@pytest.mark.slow
def test_schedules_are_compared_by_graphs_and_speed(monkeypatch, saved, tmp_path, capsys):
    monkeypatch.setattr(
        "evit_training.measuring.schedule.STRATEGIES",
        {"eager": (lambda model: None, 2), "layers": (compile_layers, 3)},
    )
    flags = ["--schedule", "--keep_rates", "0.5", "--batch_sizes", "2", "--output_dir", str(tmp_path)]
    main(["benchmark", saved, *flags])
    eager, layers = json.loads((tmp_path / "schedule.json").read_text())["rows"]
    assert (eager["graphs"], eager["num_keep_rates"]) == (0, 3)
    assert 0 < layers["graphs"] <= 6
    assert layers["graphs_in_steady_state"] == 0
    assert "| layers | 4 |" in capsys.readouterr().out
