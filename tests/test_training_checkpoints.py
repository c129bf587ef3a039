"""Checkpoints of the trainer; those of models are in test_checkpoints.py."""

import hashlib
import json
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from evit_training.arguments import FIELDS, parse_train_arguments
from evit_training.loop.checkpoints import (
    NoCheckpointError,
    Progress,
    damage,
    data_that_differ,
    newest_checkpoint,
    read_checkpoint,
    replace_durably,
    rotate_checkpoints,
    settings_that_differ,
    write_checkpoint,
)
from evit_training.loop.run_folder import take_over_best
from evit_training.loop.trainer import train


def write(folder, step, with_ema=True):
    weights = {"a": torch.full((3,), float(step)), "b": torch.ones(2, 2)}
    optimizer = {"optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}}
    ema = {"a": torch.zeros(3), "b": torch.zeros(2, 2)} if with_ema else None
    return write_checkpoint(folder, Progress(step=step, settings={"seed": 1}), weights, optimizer, ema)


def test_what_is_read_is_what_was_written(tmp_path):
    path = write(tmp_path, 7)
    assert path.name == "step-000000007"
    progress, tensors = read_checkpoint(path)
    assert progress == Progress(step=7, settings={"seed": 1})
    assert tensors["model"]["a"].tolist() == [7, 7, 7]
    assert tensors["ema"]["a"].tolist() == [0, 0, 0]
    assert tensors["optimizer"]["optimizer"]["param_groups"] == [{"lr": 0.1}]
    assert read_checkpoint(write(tmp_path, 8, with_ema=False))[1]["ema"] is None


FILES = ["model.safetensors", "ema.safetensors", "optimizer.pt", "progress.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(name, damage, tmp_path, capsys):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    file = newest / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    assert newest_checkpoint(tmp_path).name == "step-000000001"
    said = capsys.readouterr().err
    assert "Skipped a damaged checkpoint" in said
    assert "step-000000002" in said
    if name != "manifest.json":
        assert name in said
    with pytest.raises(NoCheckpointError, match="is not an intact checkpoint"):
        read_checkpoint(newest)


def test_a_manifest_that_leaves_files_out_is_not_trusted(tmp_path):
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["optimizer.pt"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert damage(path) == "manifest.json does not name ['optimizer.pt']"


def test_a_half_written_checkpoint_is_named_and_one_of_another_version_refused(tmp_path, capsys):
    path = write(tmp_path, 1)
    (tmp_path / ".partial-step-000000002").mkdir()
    assert newest_checkpoint(tmp_path) == path
    assert "Skipped a half-written checkpoint" in capsys.readouterr().err
    data = json.dumps({"step": 1, "future": True}).encode()
    (path / "progress.json").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["progress.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(NoCheckpointError, match="was written by a different version of this trainer: .*future"):
        read_checkpoint(path)


def test_without_any_intact_checkpoint_nothing_is_restarted_in_silence(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    (write(tmp_path, 1) / "model.safetensors").unlink()
    with pytest.raises(NoCheckpointError, match=r"None of the 1 checkpoints .* model.safetensors is missing"):
        newest_checkpoint(tmp_path)


def test_rotation_keeps_the_newest_intact_ones_and_the_best(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step)
    (tmp_path / "step-000000005" / "model.safetensors").write_bytes(b"")
    (tmp_path / ".partial-step-000000009").mkdir()
    rotate_checkpoints(tmp_path, keep=2, spared=[2])
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "4", "6"]


def test_an_intact_checkpoint_is_not_written_again_and_a_damaged_one_is(tmp_path):
    path = write(tmp_path, 1)
    before = (path / "progress.json").stat().st_mtime_ns
    assert (write(tmp_path, 1) / "progress.json").stat().st_mtime_ns == before
    (path / "model.safetensors").write_bytes(b"")
    assert damage(write(tmp_path, 1)) is None


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    write(tmp_path, 1)
    from evit_training.loop import checkpoints

    def full(path, data):
        if path.name == "optimizer.pt":
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(checkpoints, "write_durably", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "log").write_text("old")
    replace_durably(tmp_path / "log", b"new")
    assert (tmp_path / "log").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_only_settings_that_change_the_training_differ():
    old = {"learning_rate": 0.1, "num_workers": 4, "epochs": 3, "seed": 0}
    new = {**old, "learning_rate": 0.2, "num_workers": 0, "log_steps": 9}
    lines = settings_that_differ(old, new)
    assert len(lines) == 1
    assert re.fullmatch(r"  learning_rate  checkpoint: 0.1 +now: 0.2", lines[0])
    assert len(settings_that_differ(old, new, also_harmful=["num_workers"])) == 2


def test_settings_say_whether_they_change_the_training():
    for name in ("learning_rate", "batch_size", "seed", "keep_rate", "epochs", "dataset", "mixed_precision"):
        assert FIELDS[name].metadata["changes_training"]
    for name in ("num_workers", "output_dir", "on_bad_image", "push_to_hub"):
        assert not FIELDS[name].metadata["changes_training"]


def test_a_checkpoint_of_an_earlier_version_is_compared_in_todays_words():
    assert settings_that_differ({"fuse_inattentive_tokens": True}, {"inattentive_tokens": "fused"}) == []
    (line,) = settings_that_differ({"fuse_inattentive_tokens": False}, {"inattentive_tokens": "fused"})
    assert "inattentive_tokens  checkpoint: dropped" in line


def test_schedules_stand_still_in_skipped_steps():
    assert Progress(step=10, skipped_steps=3).schedule_step == 7


def test_data_that_changed_is_told_in_words():
    old = {"label_names": ["cat", "dog"], "num_train": 8, "num_eval": 4, "hash": "a"}
    assert data_that_differ({}, old) == []
    assert data_that_differ(old, dict(old)) == []
    assert data_that_differ(old, {**old, "label_names": ["dog", "zebra"], "num_train": 9}) == [
        "  classes: ['cat'] in the checkpoint only, ['zebra'] now only",
        "  training images: 8 in the checkpoint, 9 now",
    ]
    assert data_that_differ(old, {**old, "label_names": ["dog", "cat"]}) == [
        "  classes: the same, in a different order"
    ]
    assert data_that_differ(old, {**old, "hash": "b"}) == ["  images: as many, but other files or other labels"]


def test_a_renamed_class_is_noticed_on_resuming(tmp_path):
    for split, count in (("train", 8), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.effect_noise((32, 32), 30 + i).convert("RGB").save(tmp_path / "data" / split / name / f"{i}.png")
    flags = ["--dataset", str(tmp_path / "data"), "--hidden-size", "16", "--num-hidden-layers", "4"]
    flags += ["--num-attention-heads", "2", "--image-size", "32", "--patch-size", "8", "--batch-size", "8"]
    flags += ["--max-steps", "4", "--num-workers", "0", "--num-pictures", "0", "--output-dir", str(tmp_path / "run")]
    train(parse_train_arguments(flags))
    for split in ("train", "test"):
        (tmp_path / "data" / split / "cat").rename(tmp_path / "data" / split / "zebra")
    with pytest.raises(ValueError, match=r"other data would be a different training:\n  classes: .'cat'. in the"):
        train(parse_train_arguments([*flags, "--resume", "auto"]))


def state_of_a_run(folder, best):
    one_process = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    return SimpleNamespace(folder=folder, progress=Progress(step=4, best=best), accelerator=one_process)


def test_the_best_checkpoint_comes_along_into_a_different_folder(tmp_path):
    state = state_of_a_run(tmp_path / "new" / "checkpoints", {"step": 2, "weights": "raw", "score": 0.5})
    write(tmp_path / "old", 2)
    take_over_best(state, tmp_path / "old", is_needed=True)
    assert read_checkpoint(state.folder / "step-000000002")[1]["model"]["a"].tolist() == [2, 2, 2]
    take_over_best(state, state.folder, is_needed=True)  # its own folder
    assert [path.name for path in state.folder.iterdir()] == ["step-000000002"]


def test_a_best_checkpoint_that_is_gone_is_refused_before_training(tmp_path):
    state = state_of_a_run(tmp_path / "new", {"step": 2, "weights": "raw", "score": 0.5})
    with pytest.raises(NoCheckpointError, match="--final-weights best.*step-000000002.*manifest.json is missing"):
        take_over_best(state, tmp_path / "old", is_needed=True)
    take_over_best(state, tmp_path / "old", is_needed=False)
    take_over_best(state_of_a_run(tmp_path / "new", {}), tmp_path / "old", is_needed=True)
