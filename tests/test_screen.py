import io
import json
import sys

import pytest
from conftest import run_python
from training_runs import SMALL

from evit_training.arguments import parse_train_arguments
from evit_training.data.sampling import StepPlan
from evit_training.loop.training_bar import TrainingBar
from evit_training.screen import bar, say, screen, show_result


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


class Window:
    """Loss of the last steps."""

    def mean_loss(self):
        return 1.25


@pytest.mark.parametrize(
    ("quiet", "as_json", "out", "err"),
    [
        (False, False, "a note\nthe result\n", ""),
        (True, False, "the result\n", ""),
        (False, True, '{"x": 1}\n', "a note\n"),
        (True, True, '{"x": 1}\n', ""),
    ],
)
def test_notes_and_result_go_where_they_are_wanted(quiet, as_json, out, err, capsys):
    with screen(quiet, as_json):
        say("a note")
        show_result("the result", {"x": 1})
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (out, err)


def test_notes_stay_out_of_results_that_come_one_by_one(capsys):
    with screen(quiet=False, as_json=False, notes_to_stderr=True):
        say("a note")
        show_result("a row", {})
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("a row\n", "a note\n")


def test_a_second_process_of_a_machine_writes_nothing(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    say("a note")
    show_result("the result", {})
    assert capsys.readouterr().out == ""


def test_bars_are_for_terminals_and_not_for_quiet_commands(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(bar("ab", desc="work")) == ["a", "b"]
    assert "work: 100%" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    with screen(quiet=True, as_json=False):
        assert list(bar("ab")) == ["a", "b"]
    assert sys.stderr.getvalue() == ""


def test_the_training_bar_has_epoch_time_left_speed_loss_keep_rate_and_score(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    training_bar = TrainingBar(StepPlan(100, 32, drop_last=False), num_steps=8, first_step=2)
    training_bar.pause("top-1 91.20 %")
    for step in range(3, 9):
        training_bar.update(step, Window(), 0.7)
    training_bar.log({"step": 8})  # the bar says it
    training_bar.close()
    shown = sys.stderr.getvalue()
    assert "epoch 2 of 2: 100%" in shown
    for words in ("00:00 left", " images/s", "loss 1.250, keep rate 0.700, top-1 91.20 %"):
        assert words in shown


def test_where_there_is_no_terminal_each_entry_of_the_log_is_a_line(capsys):
    training_bar = TrainingBar(StepPlan(100, 10), num_steps=20, first_step=0)
    training_bar.update(5, Window(), 0.7)
    entry = {"step": 5, "epoch": 0.5, "loss": 1.5, "keep_rate": [0.9, 0.8], "images_per_second": 10.0}
    training_bar.log(entry)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out == ("epoch 0.5, step 5 of 20: loss 1.500, keep rate 0.900 0.800, 10 images/s, 0:00:15 left\n")


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_images_until_a_step_are_those_of_all_steps_before(drop_last, num_processes):
    plan = StepPlan(101, 16, num_processes, drop_last=drop_last)
    for step in (0, 1, 6, 7, 20):
        assert plan.num_images_until(step) == sum(map(plan.num_images_in_step, range(step)))


def test_settings_that_differ_from_the_defaults_are_the_command_that_gives_them():
    arguments = parse_train_arguments(SMALL)
    flags = arguments.as_flags()
    assert len(flags) < 60
    assert "--seed" not in flags
    assert parse_train_arguments(flags) == arguments
    assert parse_train_arguments([]).as_flags() == []


def test_fine_tuning_and_training_from_scratch_have_defaults_of_their_own():
    tuned = parse_train_arguments(["--model", "some/vit"]).optimization
    scratch = parse_train_arguments(["--epochs", "20"]).optimization
    assert (tuned.learning_rate, tuned.warmup_epochs) == (2e-5, 0.0)
    assert (scratch.learning_rate, scratch.warmup_epochs) == (5e-4, 2.0)
    assert parse_train_arguments(["--learning-rate", "1e-3"]).learning_rate == 1e-3


def test_a_run_that_fails_before_its_first_step_leaves_its_folder_free(tmp_path, capsys, monkeypatch):
    from evit_training.cli import main

    def fail(*_):
        raise ValueError("no luck")

    monkeypatch.setattr("evit_training.loop.trainer.train_steps", fail)
    with pytest.raises(SystemExit, match="2"):
        main(["train", *SMALL, "--output-dir", str(tmp_path / "run"), "--quiet"])
    assert "no luck No checkpoint was written yet." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_says_what_it_does_and_json_prints_its_results(tmp_path, capsys):
    from evit_training.cli import main

    flags = [*SMALL, "--max-steps", "1", "--max-eval-samples", "16", "--output-dir", str(tmp_path / "run"), "--json"]
    main(["train", *flags])
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    assert rows == json.loads((tmp_path / "run" / "results.json").read_text())
    assert "Settings: --" in printed.err
    assert "--hidden-size 32" in printed.err
    assert "RANDOM WEIGHTS" in printed.err
    assert "step 1 of 1: loss" in printed.err


def test_a_killed_process_that_holds_tqdms_lock_stops_nobody(tmp_path):
    """As loaders may be killed: the lock of tqdm is shared by all processes that were forked."""
    code = """
import os, signal
from tqdm import tqdm
from evit_training.screen import bar, say

tqdm.get_lock()
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    tqdm.get_lock().acquire()
    os.write(write, b"x")
    signal.pause()
os.read(read, 1)
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
signal.alarm(20)
say("alive")
print(sum(bar([1, 2, 3], unit="numbers")))
"""
    assert run_python(code, tmp_path).split() == ["alive", "6"]
