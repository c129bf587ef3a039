"""What goes wrong in real runs, and what the trainer does about it: notes for each in the docstrings."""

import json
import os
import resource
import signal
import subprocess
import threading
import time

import pytest
import torch
from real_processes import evit
from safetensors.torch import load_file
from test_data import picture, splits_with_a_bad_image
from training_runs import SMALL, ForkedRun, fork_ranks, read_log, run, state_hash


def patch(name, wrapper):
    """Replace a function of the trainer in the process that will run: `wrapper(original)` is the new one."""

    def before():
        from evit_hf.keep_rate_schedule import KeepRateSchedule
        from evit_training.loop import parts, steps, trainer

        for place in (parts, steps, trainer, steps.StepGradients, KeepRateSchedule):
            if hasattr(place, name):
                setattr(place, name, wrapper(getattr(place, name)))

    return before


def loss_with(change):
    """Change the loss of some micro-batches: `change(loss, progress, batch)`."""
    return patch(
        "micro_batch_loss",
        lambda original: lambda self, batch, rate: change(original(self, batch, rate), self.state.progress, batch),
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "straight"
    run(SMALL, output_dir)
    return output_dir


# Disk


def limit_files_between(first, last, num_bytes=40_000):
    def wrapper(original):
        def at(schedule, step):
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            limit = num_bytes if first <= step < last else hard
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            return original(schedule, step)

        return at

    return patch("at", wrapper)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(straight, tmp_path):
    output_dir = tmp_path / "run"
    text = run(SMALL, output_dir, before=limit_files_between(8, 14))
    assert text.count("step-000000012 could not be written: [Errno 27]") == 2  # when it happens, and at the end
    assert sorted(path.name for path in (output_dir / "checkpoints").iterdir()) == ["step-000000006", "step-000000018"]
    assert state_hash(output_dir) == state_hash(straight)


def test_a_model_that_cannot_be_saved_ends_with_status_1_and_its_place(tmp_path):
    output_dir = tmp_path / "run"
    text = run(SMALL, output_dir, status=1, before=limit_files_between(8, 99))
    assert f"The model could not be saved in {output_dir / 'model'}" in text
    assert [path.name for path in (output_dir / "checkpoints").iterdir()] == ["step-000000006"]
    assert {path.name for path in output_dir.iterdir()} == {"checkpoints", "metrics.jsonl", "arguments.yaml"}


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file" / "run"), "/proc/run"):
        assert "cannot be written" in run([*SMALL, "--output_dir", place], tmp_path / "unused", status=2)


def test_folders_may_have_spaces_and_other_letters_and_clocks_may_jump(tmp_path):
    def jump():
        jumps = iter([2e9, 0.0] * 10_000)
        time.time = lambda: next(jumps)

    run([*SMALL, "--max_steps", "7"], tmp_path / "мой run é", before=jump)
    assert (tmp_path / "мой run é" / "model" / "config.json").exists()


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(straight, tmp_path):
    output_dir = tmp_path / "run"
    first = ForkedRun(SMALL, output_dir)
    first.wait_for_step(output_dir, 1)
    text = run([*SMALL, "--resume", "auto"], output_dir, status=2)
    assert "Another run is writing to" in text
    assert first.wait() == 0
    assert state_hash(output_dir) == state_hash(straight)


# Numbers


def test_a_step_that_is_not_finite_is_skipped_on_all_processes(tmp_path):
    def nan_on_rank_1(loss, progress, batch):
        return loss * float("nan") if progress.step == 3 and os.environ["RANK"] == "1" else loss

    def run_ranks(name, before):
        ranks = fork_ranks(SMALL, tmp_path / name, before=before)
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text()
        return ranks[0].text()

    text = run_ranks("nan", loss_with(nan_on_rank_1))
    assert text.count("Skipped step 4: its loss or gradients were not finite on some process.") == 1
    log = [entry for entry in read_log(tmp_path / "nan") if "learning_rate" in entry]
    assert [entry["skipped_steps"] for entry in log[:5]] == [0, 0, 0, 1, 1]
    assert log[4]["learning_rate"] == log[3]["learning_rate"]  # the schedules did not advance
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "nan" / "model" / "model.safetensors").values())


def test_a_skipped_step_changes_no_weight(tmp_path):
    def inf_after_step_2(loss, progress, batch):
        return loss * float("inf") if progress.step >= 2 else loss

    flags = [*SMALL, "--checkpoint_steps", "1", "--ema_decay", "0.9"]
    run([*flags, "--max_steps", "2"], tmp_path / "two")
    text = run([*flags, "--max_steps", "4"], tmp_path / "four", before=loss_with(inf_after_step_2))
    assert text.count("Skipped step") == 2
    for name in ("model.safetensors", "ema.safetensors"):
        paths = [tmp_path / folder / "checkpoints" for folder in ("two", "four")]
        two, four = (load_file(max(path.glob("step-*")) / name) for path in paths)
        assert all(torch.equal(two[key], four[key]) for key in two if "running" not in key)


def test_a_diverged_run_stops_with_its_images_and_its_last_good_checkpoint(tmp_path):
    def nan_in_second_epoch(loss, progress, batch):
        return loss * float("nan") if progress.step >= 7 else loss

    output_dir = tmp_path / "run"
    text = run(SMALL, output_dir, status=3, before=loss_with(nan_in_second_epoch))
    assert "5 steps in a row had a loss or gradient that is not finite, the last is step 12" in text
    assert "step-000000006, is intact" in text
    assert "Lower `--learning-rate`" in text
    report = json.loads((output_dir / "non_finite.json").read_text())
    assert report["step"] == 12
    assert len(set(report["images"])) == 16
    assert max(report["images"]) < 104
    log = [json.dumps(entry) for entry in read_log(output_dir) if entry["step"] > 7]
    assert any("NaN" in line for line in log)  # nothing is hidden
    run([*SMALL, "--resume", "auto"], output_dir)


def test_a_gradient_scaler_that_overflows_is_counted_and_holds_the_schedules(tmp_path):
    """Accelerate has no scaler on a CPU, so PyTorch's is put in place by hand."""

    def wrapper(original):
        def build(arguments):
            accelerator = original(arguments)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2000)
            accelerator.scaler = scaler
            accelerator.unscale_gradients = lambda: [scaler.unscale_(x.optimizer) for x in accelerator._optimizers]
            return accelerator

        return build

    def before():
        patch("build_accelerator", wrapper)()
        loss_with(lambda loss, progress, batch: 64 * loss)()

    run([*SMALL, "--max_steps", "12"], tmp_path / "run", before=before)
    log = [entry for entry in read_log(tmp_path / "run") if "learning_rate" in entry]
    skipped = [entry["skipped_steps"] for entry in log]
    assert 0 < skipped[-1] < 10
    assert skipped == sorted(skipped)
    run([*SMALL, "--max_steps", "12"], tmp_path / "plain")
    plain = [entry["learning_rate"] for entry in read_log(tmp_path / "plain") if "learning_rate" in entry]
    good_before = [i - skips for i, skips in enumerate([0, *skipped[:-1]])]
    assert [entry["learning_rate"] for entry in log] == [plain[i] for i in good_before]
    flags = [*SMALL, "--max_steps", "12", "--keep_checkpoints", "9"]
    checkpoint = min((tmp_path / "run" / "checkpoints").glob("step-*"))
    run([*flags, "--resume", str(checkpoint)], tmp_path / "resumed", before=before)
    assert state_hash(tmp_path / "resumed") == state_hash(tmp_path / "run")  # the scale is part of it
    text = run([*SMALL, "--max_steps", "1", "--mixed_precision", "fp16"], tmp_path / "fp16", status=2)
    assert "`--mixed-precision fp16` needs a GPU" in text


# Memory


def out_of_memory_above(size, only_rank=None):
    def change(loss, progress, batch):
        if len(batch["labels"]) > size and os.environ.get("RANK") in (None, only_rank or os.environ.get("RANK")):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    return loss_with(change)


def test_micro_batches_are_halved_until_they_fit_and_the_training_is_the_same(straight, tmp_path):
    text = run(SMALL, tmp_path / "run", before=out_of_memory_above(5))
    assert "micro-batches of 8 instead of 16 images from step 1 on; a step still has 16 images" in text
    assert "micro-batches of 4 instead of 8" in text
    losses = [[e["loss"] for e in read_log(path) if "learning_rate" in e] for path in (straight, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_processes_agree_on_the_micro_batch(tmp_path):
    ranks = fork_ranks([*SMALL, "--max_steps", "3"], tmp_path / "run", before=out_of_memory_above(4, only_rank="1"))
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[1].text()
    assert ranks[0].text().count("micro-batches of 4 instead of 8 images") == 1
    progress = max((tmp_path / "run" / "checkpoints").glob("step-*")) / "progress.json"
    assert json.loads(progress.read_text())["accumulation_factor"] == 2


def test_memory_that_is_too_small_for_one_image_ends_with_status_4(tmp_path):
    text = run(SMALL, tmp_path / "run", status=4, before=out_of_memory_above(0))
    assert "Memory does not suffice for one image" in text
    assert "`--gradient-checkpointing`" in text


def test_a_real_allocation_that_fails_is_understood(tmp_path):
    def wrapper(original):
        def loss(gradients, batch, rate):
            if len(batch["labels"]) > 8:
                torch.empty(2**50)  # a petabyte or four
            return original(gradients, batch, rate)

        return loss

    text = run([*SMALL, "--max_steps", "2"], tmp_path / "run", before=patch("micro_batch_loss", wrapper))
    assert "micro-batches of 8 instead of 16" in text


# Data


def bad_data(tmp_path, *flags):
    splits_with_a_bad_image(tmp_path, "truncated", bad=3, count=48)
    return [*SMALL, "--dataset", str(tmp_path / "*.parquet"), *flags]


def test_a_bad_image_ends_the_run_before_training(tmp_path):
    text = run(bad_data(tmp_path), tmp_path / "run", status=2)
    assert "Image 3 of the train split (column `image`) (bad.jpg) cannot be decoded" in text
    assert not (tmp_path / "run").exists()


def test_a_bad_image_in_the_middle_of_an_epoch_ends_the_run_with_its_name(tmp_path):
    text = run(bad_data(tmp_path, "--check_images", "0", "--num_workers", "1"), tmp_path / "run", status=2)
    assert "error: Image 3 of the train split (column `image`) (bad.jpg) cannot be decoded" in text
    assert "Traceback" not in text


def test_a_process_ends_after_an_error_though_loading_processes_live(tmp_path):
    """A real process with a real exit: Python waits for its children there, and loaders ignore SIGTERM."""
    flags = bad_data(tmp_path, "--check_images", "0", "--num_workers", "2", "--output_dir", str(tmp_path / "run"))
    ended = evit("train", *flags)
    assert ended.status == 2
    assert "(bad.jpg) cannot be decoded" in ended.last_line


def test_training_runs_in_a_thread(tmp_path):
    def train_in_a_thread(original):
        def started(*args):
            results = []
            thread = threading.Thread(target=lambda: results.append(original(*args)))
            thread.start()
            thread.join()
            return results[0]

        return started

    run([*SMALL, "--max_steps", "2"], tmp_path / "run", before=patch("train", train_in_a_thread))
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_bad_images_are_skipped_deterministically_and_counted(tmp_path):
    flags = bad_data(tmp_path, "--on_bad_image", "skip", "--max_bad_images", "0.05")
    hashes = set()
    for name, workers in (("a", "0"), ("b", "2")):
        run([*flags, "--num_workers", workers], tmp_path / name)
        hashes.add(state_hash(tmp_path / name))
        assert [e["bad_images"] for e in read_log(tmp_path / name) if "learning_rate" in e][-1] == 3  # one an epoch
    assert len(hashes) == 1
    text = run([*flags, "--max_bad_images", "0.01"], tmp_path / "c", status=2)
    assert "1 images could not be decoded, more than `--max-bad-images` 0.01 of 48" in text


def test_columns_that_do_not_exist_and_data_that_is_not_there_end_with_status_2(tmp_path):
    text = run([*SMALL, "--image_column", "picture"], tmp_path / "run", status=2)
    assert "`--image-column` is `picture`: name one of ['image']" in text
    text = run([*SMALL, "--dataset", str(tmp_path / "nothing")], tmp_path / "run", status=2)
    assert "could not be loaded: it is not a file or folder here" in text
    text = run([*SMALL, "--batch_size", "15", "--gradient_accumulation_steps", "2"], tmp_path / "run", status=2)
    assert "`--batch-size` 15 cannot be cut evenly" in text
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_is_one_step(tmp_path):
    flags = [*SMALL, "--batch_size", "512", "--epochs", "2"]
    run(flags, tmp_path / "run")
    assert [e["step"] for e in read_log(tmp_path / "run") if "learning_rate" in e] == [1, 2]


def test_a_broken_recipe_leaves_nothing_on_the_disk(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for text, sentence in (
        ("epochs: [", "is not YAML"),
        ("epoch: 3", "recipe.yaml:1` has an unknown setting `epoch`"),
    ):
        recipe.write_text(text)
        assert sentence in run([str(recipe)], tmp_path / "run", status=2)
    assert not (tmp_path / "run").exists()


def test_several_labels_are_trained_and_evaluated(tmp_path):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "labels": datasets.Sequence(datasets.ClassLabel(names=["a", "b", "c"]))}
    )
    rows = {"image": [picture(5 * i) for i in range(48)], "labels": [[i % 2, 2] if i % 3 else [] for i in range(48)]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    run(
        [*SMALL, "--dataset", str(tmp_path / "*.parquet"), "--mixup", "0.8", "--label_smoothing", "0.1"],
        tmp_path / "run",
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"micro_f1", "macro_f1", "exact_match"} <= results[0].keys()
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"


# Processes


def test_a_killed_loading_process_is_named_and_the_run_can_go_on(straight, tmp_path):
    output_dir = tmp_path / "run"

    def sleep_at_step_8(original):
        def slow(schedule, step):
            if step == 8:
                (tmp_path / "asleep").touch()
                time.sleep(2)
            return original(schedule, step)

        return slow

    forked = ForkedRun([*SMALL, "--num_workers", "1"], output_dir, before=patch("at", sleep_at_step_8))
    while not (tmp_path / "asleep").exists() and forked.process.is_alive():
        time.sleep(0.01)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(forked.pid)], capture_output=True, text=True)
    for child in children.stdout.split():
        os.kill(int(child), signal.SIGKILL)
    assert forked.wait() == 1, forked.text()
    assert "A process that loads images died" in forked.text()
    assert "resume with `--resume auto`" in forked.text()
    run([*SMALL, "--resume", "auto"], output_dir)
    assert state_hash(output_dir) == state_hash(straight)


def test_a_missing_tracker_is_refused_and_a_failing_one_is_named_once(tmp_path):
    text = run([*SMALL, "--trackers", "no_such_tracker"], tmp_path / "run", status=2)
    assert "`--trackers` names ['no_such_tracker'], which is not installed or not known" in text

    def wrapper(original):
        def build(arguments):
            accelerator = original(arguments)
            accelerator.log_with = ["fake"]
            accelerator.init_trackers = lambda name: None

            def fail(*args, **kwargs):
                raise ConnectionError("no network")

            accelerator.log = fail
            return accelerator

        return build

    text = run(SMALL, tmp_path / "run", before=patch("build_accelerator", wrapper))
    assert text.count("Logging failed, and will be tried again in silence: ConnectionError('no network')") == 1
    assert len(read_log(tmp_path / "run")) == 21


def test_secrets_of_the_environment_are_written_nowhere(tmp_path):
    text = run(
        [*SMALL, "--max_steps", "2"], tmp_path / "run", HF_TOKEN="hf_topsecretvalue", WANDB_API_KEY="wandbsecret"
    )
    assert "topsecret" not in text
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"topsecret" not in path.read_bytes(), path
            assert b"wandbsecret" not in path.read_bytes(), path
