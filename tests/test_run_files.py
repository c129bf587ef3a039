"""Files of a run that are damaged, edited by hand, in the wrong place, or impossible to write: one line, no traceback.

The cases are a fixed list. Those that read a finished run call what a command calls, so that each takes milliseconds.
"""

import errno
import itertools
import json
import os
import pathlib
import re
from types import SimpleNamespace

import pytest
import yaml
from test_process_ends import TINY, assert_one_line, call, data, model, starter  # noqa: F401 (fixtures)

from evit_training.arguments import parse_train_arguments
from evit_training.loop.checkpoints import Progress, damage, replace_durably, write_checkpoint, write_evaluation
from evit_training.loop.metrics_log import MetricsLog
from evit_training.loop.run_folder import RUN_FILES, check_kinds
from evit_training.sharing.card import render_run_card


# What may be left of a file: from its bytes to other bytes, None for a folder of that name.
DAMAGES = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a broken line": lambda content: content.replace(b"\n", b"\n: [{\n", 1) if b"\n" in content else content + b"{",
    "not text": lambda content: b"\xff\xfe\x00" + content,
    "zeros": lambda content: bytes(len(content)),
    "a list": lambda content: b"[1, 2]\n",
    "a number": lambda content: b"7\n",
    "null": lambda content: b"null\n",
    "nothing in it": lambda content: b"{}\n",
    "a folder": None,
}


@pytest.fixture(scope="module")
def finished(starter, data, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("finished")
    words = ["train", "--dataset", data / "good", *TINY, "--max-steps", 2, "--num-workers", 0]
    ended = starter.run([*words, "--output-dir", folder / "run"], folder)
    assert ended.status == 0, ended.stderr
    return folder / "run"


@pytest.fixture
def damaged(finished):
    """Damages a file of the finished run, until the end of the test."""
    before = {}

    def damage_file(name, how):
        path = finished / name
        before[path] = path.read_bytes()
        change = DAMAGES[how]
        path.unlink()
        if change is None:
            path.mkdir()
        else:
            path.write_bytes(change(before[path]))
        return finished

    yield damage_file
    for path, content in before.items():
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)


CARD_FILES = ("model/config.json", "results.json", "class_report.json", "run.json", "arguments.yaml")


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", CARD_FILES)
def test_a_card_of_damaged_files_is_refused_with_the_name(name, how, damaged):
    """50 cases, as `evit push` and the end of a run meet them."""
    folder = damaged(name, how)
    with pytest.raises(ValueError, match=re.escape(str(folder))) as error:
        render_run_card(folder, "org/name")
    assert "\n" not in str(error.value)
    # Half of a YAML file may be YAML: then it lacks a value.
    if how not in ("zeros", "nothing in it") and (how, name) != ("half", "arguments.yaml"):
        assert name in str(error.value)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_recipe_is_refused_with_its_name(how, damaged, capsys, tmp_path):
    path = damaged("arguments.yaml", how) / "arguments.yaml"
    if how in ("empty", "null", "nothing in it"):  # a recipe that changes nothing
        parse_train_arguments([str(path)])
        return
    if how == "half":  # which may be YAML
        path.write_bytes(path.read_bytes() + b"\nepochs: [1")
    with pytest.raises(SystemExit, match="2"):
        parse_train_arguments([str(path)])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "arguments.yaml" in said


LINES = ['{"step": 1, "loss": 2.0, "learning_rate": 0.1}', '{"step": 2, "loss": 1.0, "learning_rate": 0.1}']


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 2, "lo',
        b"",
        b"7",
        b"[]",
        b"null",
        b"{}",
        b'{"step": "two"}',
        b'{"step": null}',
        b"\xff\xfe",
        b"\0" * 9,
    ],
    ids=str,
)
def test_a_damaged_line_of_the_log_is_left_out_and_counted(line, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([LINES[0].encode(), line, LINES[1].encode()]) + b"\n")
    log = MetricsLog(path, SimpleNamespace(log_with=[], is_main_process=True), None)
    log.drop_after(2, keeps_evaluation=True)
    assert path.read_text().splitlines() == LINES
    assert ("1 line of metrics.jsonl was not one of this trainer" in capsys.readouterr().err) == bool(line)


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_file_for_a_folder_and_a_folder_for_a_file_are_refused_before_training(name, tmp_path):
    is_folder = name in ("model", "checkpoints", "export")
    path = tmp_path / name
    path.write_text("") if is_folder else path.mkdir()
    with pytest.raises(ValueError, match=rf"{name}` is a {'file' if is_folder else 'folder'}, where a run has a"):
        check_kinds(tmp_path)
    path.unlink() if is_folder else path.rmdir()
    check_kinds(tmp_path)


ERRNOS = ("ENOSPC", "EDQUOT", "EIO", "EACCES", "EROFS", "EMFILE")


@pytest.mark.parametrize(("code", "function"), list(itertools.product(ERRNOS, ("fsync", "rename"))), ids=str)
def test_what_cannot_be_written_leaves_what_was_there(code, function, tmp_path, monkeypatch):
    progress = Progress(step=1)
    old = write_checkpoint(tmp_path, progress, {}, {})
    (tmp_path / "log").write_text("old")

    def fail(*args, **keywords):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), str(args[0]))

    for name in ("rename", "replace") if function == "rename" else (function,):
        monkeypatch.setattr(os, name, fail)
        if hasattr(pathlib, "_normal_accessor"):  # paths of Python 3.10 keep the functions of `os` and `io` there
            monkeypatch.setattr(pathlib._normal_accessor, name, fail, raising=False)
    for write in (
        lambda: replace_durably(tmp_path / "log", b"new"),
        lambda: write_checkpoint(tmp_path, Progress(step=2), {}, {}),
        lambda: write_evaluation(tmp_path, progress),
    ):
        with pytest.raises(OSError, match=os.strerror(getattr(errno, code))):
            write()
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} <= {"log", old.name, ".partial-log"}
    assert (tmp_path / "log").read_text() == "old"
    assert damage(old) is None
    assert write_checkpoint(tmp_path, progress, {}, {}) == old


# Real runs


FAIL_TO_WRITE = """
import builtins, io, pathlib
original = io.open
def fail(file, mode="r", *args, **keywords):
    if {name!r} in str(file) and set(mode) & set("wax+"):
        raise OSError({number}, os.strerror({number}), str(file))
    return original(file, mode, *args, **keywords)
io.open = builtins.open = fail
if hasattr(pathlib, "_normal_accessor"):
    pathlib._normal_accessor.open = fail
"""
# File: the status of a run that cannot write it, and what its last line says.
UNWRITABLE = {
    "arguments.yaml": (2, "No checkpoint was written yet."),
    "metrics.jsonl": (0, None),
    "optimizer.pt": (0, None),
    "evaluation.json": (0, None),
    "config.json": (1, "The model could not be saved"),
    "run.json": (1, "The model is saved in"),
    "results.json": (1, "The model is saved in"),
    "class_report.json": (1, "The model is saved in"),
    "tradeoff.png": (1, "The model is saved in"),
    "README.md": (1, "The model is saved in"),
}


def check_unwritable(starter, data, model, tmp_path, name, code):  # noqa: F811
    before = FAIL_TO_WRITE.format(name=name, number=getattr(errno, code))
    words = [*call("train", data / "good", model, tmp_path, 0), "--max-steps", 3]
    ended = starter.run(words, tmp_path, before=before)
    status, sentence = UNWRITABLE[name]
    if status == 0:
        assert ended.status == 0, ended.stderr
        assert os.strerror(getattr(errno, code)) in ended.stderr
        assert "Traceback" not in ended.stderr
        return
    assert_one_line(ended, status)
    assert sentence in ended.last_line
    if status == 1:
        assert "The run is saved up to step 3 of 3: resume with `--resume auto`" in ended.last_line
        assert starter.run([*words, "--resume", "auto"], tmp_path).status == 0
        assert json.loads((tmp_path / "run" / "results.json").read_text())


@pytest.mark.parametrize(("name", "code"), [("results.json", "ENOSPC"), ("evaluation.json", "EIO")])
def test_a_file_that_cannot_be_written_costs_no_training(starter, data, model, tmp_path, name, code):  # noqa: F811
    check_unwritable(starter, data, model, tmp_path, name, code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code"), list(zip(UNWRITABLE, itertools.cycle(["ENOSPC", "EIO", "EACCES", "EMFILE"])))
)
def test_every_file_that_cannot_be_written_costs_no_training(starter, data, model, tmp_path, name, code):  # noqa: F811
    check_unwritable(starter, data, model, tmp_path, name, code)


def test_all_files_of_a_run_follow_the_umask(starter, data, tmp_path):  # noqa: F811
    words = ["train", "--dataset", data / "good", *TINY, "--max-steps", 1, "--num-workers", 0, "--num-pictures", 1]
    ended = starter.run([*words, "--output-dir", tmp_path / "run"], tmp_path, before="os.umask(0o002)")
    assert ended.status == 0, ended.stderr
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o775 if path.is_dir() else 0o664), path


def test_settings_that_only_start_a_run_are_not_in_its_recipe(finished):
    settings = yaml.safe_load((finished / "arguments.yaml").read_text())
    assert (settings["resume"], settings["overwrite"], settings["resume_override"]) == (None, False, False)
