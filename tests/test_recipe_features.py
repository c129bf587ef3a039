"""Parts of the recipe that need a whole run to be seen: oracle, teacher, sampled rates, averages, probes, dry runs."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import run_python, tiny_config_with
from safetensors.torch import load_file
from test_faults import patch
from training_runs import SMALL, ForkedRun, read_log, run, state_hash
from transformers import ViTImageProcessor

from evit_hf import EViTForImageClassification, EViTForImageClassificationWithTeacher, preset_config
from evit_hf.profiling import num_macs
from evit_training.arguments import DataArguments, parse_train_arguments
from evit_training.data.splits import load_splits
from evit_training.learning.models import build_model
from evit_training.learning.objective import Objective
from evit_training.learning.optimization import warmup_steps
from evit_training.loop.metrics_log import start_trackers


FINE_TUNE = [*SMALL, "--max_steps", "4", "--reorganization_layers", "1", "2", "3"]
FINE_TUNE += ["--keep_rate_dense_epochs", "0", "--keep_rate_shrink_epochs", "0"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint to fine-tune."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    EViTForImageClassification(tiny_config_with(num_labels=10)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def run_fresh(flags, cwd):
    """Run in a fresh interpreter: no fork, which would not survive what compiling leaves in this process."""
    return run_python(f"from evit_training.commands.train import main; main({flags})", cwd)


def logged(output_dir):
    return [entry for entry in read_log(output_dir) if "learning_rate" in entry]


def spy_on_scores(path):
    """Write down for each training forward whether the student got scores from outside."""

    def wrapper(original):
        def build(*args):
            parts, state = original(*args)

            def note(module, arguments, keywords):
                with path.open("a") as file:
                    file.write(f"{int(module.training)}{int(keywords.get('patch_scores') is not None)} ")

            state.network.register_forward_pre_hook(note, with_kwargs=True)
            return parts, state

        return build

    return patch("build_parts", wrapper)


@pytest.mark.parametrize(("flags", "expected"), [
    ([], {"11", "00"}),
    (["--oracle_epochs", "0.4"], {"11", "10", "00"}),
    (["--oracle_in_evaluation"], {"11", "01", "00"}),
])  # fmt: skip
def test_an_oracle_names_the_tokens_as_long_as_it_is_asked_to(flags, expected, start, tmp_path):
    flags = [*FINE_TUNE, "--model", start, "--oracle", "initial", *flags]
    run(flags, tmp_path / "run", before=spy_on_scores(tmp_path / "seen"))
    seen = (tmp_path / "seen").read_text().split()
    assert set(seen) == expected
    if "0.4" in flags:  # of an epoch of six steps
        assert [x for x in seen if x[0] == "1"] == ["11", "11", "10", "10"]


def test_training_under_an_oracle_differs_and_resumes_exactly(start, tmp_path):
    flags = [*FINE_TUNE, "--model", start, "--drop_path_rate", "0.1", "--checkpoint_steps", "2"]
    oracle = ["--oracle", start, "--oracle_layer", "last"]
    run(flags, tmp_path / "own")
    run([*flags, *oracle], tmp_path / "oracle")
    assert state_hash(tmp_path / "own") != state_hash(tmp_path / "oracle")
    killed = ForkedRun([*flags, *oracle], tmp_path / "killed")
    killed.wait_for_step(tmp_path / "killed", 2)
    killed.process.kill()
    killed.wait()
    run([*flags, *oracle, "--resume", "auto"], tmp_path / "killed")
    assert state_hash(tmp_path / "killed") == state_hash(tmp_path / "oracle")


@pytest.mark.parametrize("how", ["soft", "hard"])
def test_a_student_learns_from_a_teacher_alone(how, start, tmp_path):
    """With all weight on the teacher labels do not matter: a random student approaches what the teacher says."""
    flags = [*SMALL, "--teacher", start, "--distillation", how, "--distillation_weight", "1"]
    flags += ["--learning_rate", "3e-3", "--epochs", "6"]
    run(flags, tmp_path / "run")
    losses = [entry["loss"] for entry in logged(tmp_path / "run")]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_a_distilled_model_is_trained_from_scratch_with_its_two_classifiers(start, tmp_path):
    run([*SMALL, "--use_distillation_token", "--teacher", start, "--max_steps", "2"], tmp_path / "run")
    model = EViTForImageClassificationWithTeacher.from_pretrained(tmp_path / "run" / "model")
    assert model.config.use_distillation_token


def test_keep_rates_are_drawn_from_a_range_and_reported_for_it(tmp_path):
    flags = [
        *SMALL,
        "--keep_rate_range",
        "0.5",
        "0.9",
        "--keep_rate_dense_epochs",
        "0",
        "--keep_rate_shrink_epochs",
        "0",
    ]
    run(flags, tmp_path / "run")
    rates = [entry["keep_rate"] for entry in logged(tmp_path / "run")]
    assert len(set(rates)) == 18
    assert 0.5 <= min(rates) < 0.6
    assert 0.8 < max(rates) <= 0.9
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [result["keep_rate"] for result in results] == [1.0, 0.9, 0.5, 0.7]
    run([*flags, "--keep_rate_levels", "4"], tmp_path / "levels")
    assert {round(entry["keep_rate"], 3) for entry in logged(tmp_path / "levels")} == {0.5, 0.6, 0.7, 0.8, 0.9}


def test_a_schedule_in_levels_has_few_keep_rates(tmp_path):
    run([*SMALL, "--keep_rate_levels", "3"], tmp_path / "run")
    rates = [round(entry["keep_rate"], 6) for entry in logged(tmp_path / "run")]
    assert set(rates) == {1.0, 0.9, 0.8, 0.7}
    assert rates == sorted(rates, reverse=True)


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one(tmp_path):
    flags = [*SMALL, "--max_steps", "3", "--num_hidden_layers", "2", "--reorganization_layers", "0"]
    flags += ["--keep_rate_dense_epochs", "0", "--keep_rate_shrink_epochs", "0"]
    run_fresh([*flags, "--output_dir", str(tmp_path / "plain")], tmp_path)
    run_fresh([*flags, "--compile", "--output_dir", str(tmp_path / "compiled")], tmp_path)
    losses = [[entry["loss"] for entry in logged(tmp_path / name)] for name in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_saved_model_is_the_average_or_the_best_if_that_is_wanted(tmp_path):
    flags = [*SMALL, "--ema_decay", "0.5", "--learning_rate", "5e-3"]
    text = run(flags, tmp_path / "average")
    assert "The model has the averages of the last weights (EMA)" in text
    newest = max((tmp_path / "average" / "checkpoints").glob("step-*"))
    saved = load_file(tmp_path / "average" / "model" / "model.safetensors")
    for name, tensor in load_file(newest / "ema.safetensors").items():
        assert torch.equal(saved[name], tensor), name
    text = run([*flags, "--final_weights", "best"], tmp_path / "best")
    evaluations = [entry for entry in read_log(tmp_path / "best") if "eval_top1" in entry]
    scores = {
        (e["step"], kind): e[key]
        for e in evaluations
        for kind, key in (("raw", "eval_top1"), ("ema", "ema_eval_top1"))
    }
    step, kind = max(scores, key=lambda key: (scores[key], -key[0], key[1] == "raw"))
    assert f"weights of step {step}, the best" in text
    file = {"raw": "model.safetensors", "ema": "ema.safetensors"}[kind]
    best = load_file(tmp_path / "best" / "checkpoints" / f"step-{step:09d}" / file)
    saved = load_file(tmp_path / "best" / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in best.items())
    results = json.loads((tmp_path / "best" / "results.json").read_text())
    assert results[1]["top1"] == scores[step, kind]


def test_a_linear_probe_changes_the_classifier_alone(start, tmp_path):
    text = run([*FINE_TUNE, "--model", start, "--trainable", "head"], tmp_path / "run")
    assert "M trained)" in text
    before, after = (
        load_file(f"{start}/model.safetensors"),
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("saved", [{"keep_rate": 0.5, "inattentive_tokens": "dropped"}, {"macs": 0.8}, {}])
def test_a_model_is_fine_tuned_for_what_it_was_trained_for_unless_the_run_says_otherwise(saved, tmp_path):
    layers = {"keep_rate": None} if "macs" in saved else {"reorganization_layers": [2, 3]}
    model = EViTForImageClassification(tiny_config_with(num_labels=10, image_size=64, **(layers | saved)))
    if not saved:
        model.set_keep_rate(1.0)  # dense: nothing to go on with
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    splits = load_splits(DataArguments(dataset=["digits"]), 0)

    def built(*flags):
        return build_model(
            parse_train_arguments(["--model", str(tmp_path), "--dataset", "digits", *flags]), splits
        ).config

    config, other = built(), built("--keep-rate", "0.9", "--inattentive-tokens", "fused")
    if "macs" in saved:
        assert (config.reorganization_layers, config.inattentive_tokens) == ([0, 1, 2, 3], "counted")
        assert 0.8 < min(config.keep_rate) < max(config.keep_rate) < 1.0
        assert num_macs(config) <= 0.8 * num_macs(config, 1.0)
    else:
        kept = (saved["keep_rate"], "dropped") if saved else (0.7, "fused")
        assert (config.keep_rate, config.inattentive_tokens) == kept
        assert config.reorganization_layers == [2, 3]
    assert (other.keep_rate, other.inattentive_tokens) == (0.9, "fused")


def test_schedules_end_with_the_run_or_it_says_that_they_do_not(tmp_path):
    for flags, steps in ((["--max-steps", "20"], 2), (["--max-steps", "20", "--warmup-epochs", "1"], 7)):
        optimization = parse_train_arguments(["--dataset", "digits", *flags]).optimization
        assert warmup_steps(optimization, steps_per_epoch=7, num_steps=20) == steps
    text = run([*SMALL, "--dry_run"], tmp_path / "a")
    assert "never reaches" not in text
    text = run([*SMALL, "--max_steps", "4"], tmp_path / "b")  # of 6 in an epoch
    assert "The learning rate never reaches its peak: `--warmup-epochs 1` is no less than the whole training" in text
    assert "The keep rate never reaches 0.700, at which the model is evaluated and saved" in text
    text = run([*SMALL, "--learning_rate", "1e-6", "--min_learning_rate", "1e-5", "--dry_run"], tmp_path / "c")
    assert "The learning rate rises after its peak of 1e-06: `--min-learning-rate` 1e-05 is above it." in text


def test_a_random_classifier_is_no_teacher(tmp_path, start):
    flags = [*FINE_TUNE, "--teacher", "initial"]
    run([*flags, "--model", start], tmp_path / "a")  # ten classes without names
    EViTForImageClassification(tiny_config_with(num_labels=5)).save_pretrained(tmp_path / "five")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "five")
    text = run([*flags, "--model", str(tmp_path / "five")], tmp_path / "b", status=2)
    assert "`--teacher initial` would teach what a random classifier says" in text


def test_mixing_pairs_other_images_and_needs_two(tmp_path):
    pairs = []

    def mixing(images, labels):
        pairs.extend(zip(images[:, 0, 0, 0].tolist(), images.roll(1, 0)[:, 0, 0, 0].tolist(), strict=True))
        return images, labels

    torch.manual_seed(0)
    model = EViTForImageClassification(tiny_config_with(num_labels=10))
    images = torch.arange(16.0).repeat_interleave(3)[:, None, None, None].expand(-1, 3, 32, 32)  # three copies of each
    batch = {"pixel_values": images, "labels": torch.zeros(48, dtype=torch.long)}
    Objective(model.config, mixing=mixing)(model, batch, 1.0, 0)
    assert sum(one == other for one, other in pairs) < 8  # of 48; 32 of neighbours
    text = run([*SMALL, "--mixup", "0.8", "--gradient_accumulation_steps", "16"], tmp_path / "run", status=2)
    assert "Mixing pairs the images of a forward pass, which has one here" in text


def test_the_learning_rate_is_scaled_with_the_batch(tmp_path):
    flags = [*SMALL, "--scale_learning_rate", "--learning_rate", "0.032", "--warmup_epochs", "0", "--max_steps", "1"]
    run(flags, tmp_path / "run")
    assert logged(tmp_path / "run")[0]["learning_rate"] == pytest.approx(0.032 * 16 / 512)


def test_a_dry_run_reports_and_leaves_nothing(tmp_path):
    text = run([*SMALL, "--dry_run"], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for words in ("Dry run: loss", "GiB at the peak", "GMACs dense", "18 steps and 3 evaluations would take 0:00:"):
        assert words in text


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    run([*SMALL, "--max_steps", "3", "--trackers", "tensorboard"], tmp_path / "run")
    events = next(path for path in (tmp_path / "run").rglob("events.out*"))
    accumulator = event_accumulator.EventAccumulator(str(events)).Reload()
    losses = [scalar.value for scalar in accumulator.Scalars("loss")]
    assert losses == pytest.approx([entry["loss"] for entry in logged(tmp_path / "run")])
    assert b"weight_decay: " in events.read_bytes()
    run([*SMALL, "--max_steps", "3", "--trackers", "tensorboard", "--overwrite"], tmp_path / "run")
    assert len(list((tmp_path / "run").rglob("events.out*"))) == 1


def test_trackers_get_the_names_of_project_and_run_and_the_settings(tmp_path):
    class Recorder:
        name = "wandb"

        def store_init_configuration(self, settings):
            self.settings = settings

    recorder, started = Recorder(), []
    accelerator = SimpleNamespace(
        init_trackers=lambda project, init_kwargs: started.append((project, init_kwargs)), trackers=[recorder]
    )
    words = ["--trackers", "wandb", "--tracker-project", "cats", "--output-dir", str(tmp_path / "run7")]
    start_trackers(accelerator, parse_train_arguments(words))
    start_trackers(accelerator, parse_train_arguments([*words, "--tracker-run", "first"]))
    assert started == [("cats", {"wandb": {"name": "run7"}}), ("cats", {"wandb": {"name": "first"}})]
    assert recorder.settings["weight_decay"] == 0.05
    assert recorder.settings["compare_keep_rates"] == "None"


def test_another_resolution_keeps_what_the_model_sees(images):
    """Twice the pixels, resized back: positions are where they were."""
    torch.manual_seed(0)
    model = EViTForImageClassification(tiny_config_with()).eval()
    expected = model(torch.nn.functional.interpolate(images, scale_factor=2), interpolate_pos_encoding=True).logits
    model.set_image_size(64)
    larger = torch.nn.functional.interpolate(images, scale_factor=2)
    torch.testing.assert_close(model(larger).logits, expected)
    assert (model.config.image_size, model.vit.embeddings.position_embeddings.shape[1]) == (64, 65)
    assert num_macs(model.config) > num_macs(tiny_config_with())
    with pytest.raises(ValueError, match="`image_size` is 4x4, which is smaller than a patch of 8x8"):
        model.set_image_size(4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scratch", "finetune", "oracle", "high_resolution", "lvvit"])
def test_recipes_of_the_paper_train(name, tmp_path):
    """Two steps at full size, on digits, and with random weights where the recipe has trained ones."""
    flags = [f"paper_{name}", "--dataset", "digits", "--eval_split", "test", "--num_workers", "0", "--dry_run"]
    flags += ["--max_train_samples", "16", "--max_eval_samples", "4", "--batch_size", "8", "--eval_batch_size", "4"]
    deit = EViTForImageClassification(preset_config("evit-deit-s", keep_rate=1.0))
    deit.save_pretrained(tmp_path / "deit")
    ViTImageProcessor().save_pretrained(tmp_path / "deit")
    if name in ("finetune", "high_resolution"):
        flags += ["--model", str(tmp_path / "deit")]
    if name == "oracle":
        flags += ["--oracle", str(tmp_path / "deit")]
    text = run_fresh(flags, tmp_path)
    assert "Dry run: loss" in text
    gmacs = {"scratch": "3.0", "finetune": "3.0", "oracle": "2.3", "high_resolution": "4.4", "lvvit": "4.6"}[name]
    assert re.search(rf"GMACs dense and {re.escape(gmacs)}\d+ at keep rate", text), text
