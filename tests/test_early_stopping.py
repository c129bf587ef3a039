"""Evaluation every N steps, stopping early, and what is left of an evaluation in a checkpoint."""

import json

import pytest
from training_runs import SMALL, ForkedRun, read_log, run, state_hash

from evit_training.arguments import parse_train_arguments
from evit_training.loop.checkpoints import Progress, read_checkpoint, write_checkpoint, write_evaluation


FLAGS = [*SMALL, "--eval_steps", "2", "--early_stopping_patience", "3", "--ema_decay", "0.9"]


def evaluated_steps(output_dir):
    return [entry["step"] for entry in read_log(output_dir) if "eval_top1" in entry]


def scores(values):
    """Let the evaluations of a run find these accuracies, one after the other, of weights and averages in turn."""

    def before():
        from evit_training.loop import trainer

        original = trainer.main_score

        def found(metrics):
            step = found.evaluation // 2
            found.evaluation += 1
            return original(metrics)[0], values[min(step, len(values) - 1)]

        found.evaluation = 0
        trainer.main_score = found

    return before


def test_a_run_stops_after_as_many_evaluations_without_a_better_one(tmp_path):
    text = run([*FLAGS, "--final_weights", "best"], tmp_path / "run", before=scores([0.5, 0.6, 0.6, 0.1, 0.6, 0.9]))
    assert "Stopped early after step 10 of 18: no evaluation was better than that of step 4." in text
    assert evaluated_steps(tmp_path / "run") == [2, 4, 6, 8, 10]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["num_steps"] == 10
    assert "weights of step 4, the best" in text
    text = run([*FLAGS, "--resume", "auto"], tmp_path / "run")  # a run that has stopped stays so
    assert "Stopped early after step 10" in text
    assert evaluated_steps(tmp_path / "run") == [2, 4, 6, 8, 10]
    text = run([*FLAGS, "--resume", "auto", "--early_stopping_patience", "99"], tmp_path / "run")
    assert evaluated_steps(tmp_path / "run") == list(range(2, 19, 2))


def test_a_killed_run_counts_on_and_stops_at_the_same_step(tmp_path):
    def kill_in_evaluation_of(step):
        def before():
            import os

            from evit_training.loop import trainer

            original = trainer.evaluate

            def evaluate(accelerator, model, *args, **keywords):
                if len(evaluated_steps(tmp_path / "run")) == step // 2 - 1:
                    os.kill(os.getpid(), 9)
                return original(accelerator, model, *args, **keywords)

            trainer.evaluate = evaluate
            scores([0.6, 0.1])()

        return before

    forked = ForkedRun(FLAGS, tmp_path / "run", before=kill_in_evaluation_of(6))
    assert forked.wait() == -9, forked.text()
    progress, _ = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-000000004")
    assert (progress.evaluated_step, progress.best["step"], progress.evaluations_since_best) == (4, 2, 1)
    progress, _ = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-000000006")
    assert (progress.evaluated_step, progress.evaluations_since_best) == (4, 1)
    text = run([*FLAGS, "--resume", "auto"], tmp_path / "run", before=scores([0.1]))
    assert "Stopped early after step 8 of 18: no evaluation was better than that of step 2." in text
    assert evaluated_steps(tmp_path / "run") == [2, 4, 6, 8]
    run(FLAGS, tmp_path / "straight", before=scores([0.6, 0.1]))
    assert state_hash(tmp_path / "run") == state_hash(tmp_path / "straight")


def test_evaluations_need_not_divide_epochs(tmp_path):
    run([*SMALL, "--eval_steps", "4"], tmp_path / "run")
    assert evaluated_steps(tmp_path / "run") == [4, 8, 12, 16, 18]


def test_streamed_data_stops_early_only_with_evaluations(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_train_arguments(["digits", "--streaming", "--max-steps", "9", "--early-stopping-patience", "2"])
    assert "needs evaluations before the end" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"progress": "{}", "sha256": "0"}', None], ids=str)
def test_a_damaged_evaluation_is_left_out_and_its_checkpoint_is_not(damage, tmp_path, capsys):
    progress = Progress(step=3, evaluated_step=0)
    path = write_checkpoint(tmp_path, progress, {}, {})
    progress.evaluated_step, progress.best, progress.evaluations_since_best = 3, {"step": 3, "score": 0.5}, 2
    write_evaluation(tmp_path, progress)
    assert read_checkpoint(path)[0] == progress
    assert not list(path.glob(".partial*"))
    file = path / "evaluation.json"
    file.unlink()
    if damage is None:
        file.mkdir()
    else:
        file.write_bytes(damage)
    assert read_checkpoint(path)[0] == Progress(step=3)
    assert "evaluation.json is damaged" in capsys.readouterr().err
