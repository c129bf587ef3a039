"""No work is lost: runs that are killed, stopped and damaged end bit for bit as if nothing had happened."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_runs import RANDOM, SMALL, ForkedRun, fork_ranks, read_log, run, state_hash

from evit_training.loop.checkpoints import Progress
from evit_training.loop.interruption import Interruption, lock, unlock


WORKERS = ["--num_workers", "1"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "straight"
    run([*SMALL, *RANDOM], output_dir)
    return output_dir


def logged_steps(output_dir):
    entries = read_log(output_dir)
    return [e["step"] for e in entries if "loss" in e], [e["step"] for e in entries if "eval_top1" in e]


@pytest.mark.parametrize("step", [2, 6, 9], ids=["first epoch", "epoch end", "second epoch"])
def test_resumed_run_equals_uninterrupted_run_after_kill(step, uninterrupted, tmp_path):
    """Kill -9 mid-epoch, at the end of one, and with loading processes where the other run had none."""
    output_dir = tmp_path / "run"
    flags = [*SMALL, *RANDOM, *WORKERS, "--checkpoint_steps", "2"]
    killed = ForkedRun(flags, output_dir)
    killed.wait_for_step(output_dir, step)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    text = run([*flags, "--resume", "auto"], output_dir)
    assert "Resuming from" in text or step == 2
    assert state_hash(output_dir) == state_hash(uninterrupted)
    assert logged_steps(output_dir) == (list(range(1, 19)), [6, 12, 18])
    results = [json.loads((path / "results.json").read_text())[1]["loss"] for path in (output_dir, uninterrupted)]
    assert results[0] == results[1]


def test_kills_at_random_moments_lose_nothing(uninterrupted, tmp_path):
    """A checkpoint after each step, so that most kills fall into the writing of one."""
    output_dir = tmp_path / "run"
    flags = [*SMALL, *RANDOM, "--checkpoint_steps", "1"]
    delays = random.Random(0)
    num_kills = 0
    while num_kills < 6:
        before = newest_step(output_dir)
        killed = ForkedRun([*flags, "--resume", "auto"], output_dir)
        killed.wait_for_step(output_dir, before + 1)
        time.sleep(delays.uniform(0, 0.15))
        os.killpg(killed.pid, signal.SIGKILL)
        if killed.wait() == 0:
            break
        num_kills += 1
        assert newest_step(output_dir) >= before
    assert num_kills >= 3
    run([*flags, "--resume", "auto"], output_dir)
    assert state_hash(output_dir) == state_hash(uninterrupted)
    assert logged_steps(output_dir) == (list(range(1, 19)), [6, 12, 18])
    assert not list((output_dir / "checkpoints").glob(".partial*"))


def newest_step(output_dir):
    paths = (Path(output_dir) / "checkpoints").glob("step-*")
    return max((int(path.name.removeprefix("step-")) for path in paths), default=0)


def test_a_kill_during_evaluation_repeats_no_line_of_the_log(uninterrupted, tmp_path):
    def die_in_second_evaluation():
        from evit_training.loop import trainer

        original, calls = trainer.until_interrupted, []

        def batches(*args):
            calls.append(1)
            for batch in original(*args):
                if len(calls) == 3:  # raw, averaged, raw
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        trainer.until_interrupted = batches

    output_dir = tmp_path / "run"
    run([*SMALL, *RANDOM], output_dir, status=-signal.SIGKILL, before=die_in_second_evaluation)
    assert logged_steps(output_dir) == (list(range(1, 13)), [6])
    run([*SMALL, *RANDOM, "--resume", "auto"], output_dir)
    assert state_hash(output_dir) == state_hash(uninterrupted)
    assert logged_steps(output_dir) == (list(range(1, 19)), [6, 12, 18])


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)],
)
def test_a_signal_ends_the_step_saves_and_tells_how_to_go_on(number, status, uninterrupted, tmp_path):
    output_dir = tmp_path / "run"
    stopped = ForkedRun([*SMALL, *RANDOM, *WORKERS], output_dir, before=lambda: signal.signal(number, signal.SIG_DFL))
    stopped.wait_for_step(output_dir, 8)
    os.killpg(stopped.pid, number)  # to the loading process as well, as a terminal or a scheduler does
    assert stopped.wait() == status, stopped.text()
    assert f"Interrupted by signal {int(number)} after step" in stopped.text()
    assert "Traceback" not in stopped.text()
    assert newest_step(output_dir) == max(logged_steps(output_dir)[0])
    run([*SMALL, *RANDOM, "--resume", "auto"], output_dir)
    assert state_hash(output_dir) == state_hash(uninterrupted)


def test_a_run_of_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption(SimpleNamespace(num_processes=1), Progress(), num_steps=1) as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interruption.agreed()
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.agreed()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("code", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_is_the_lock_where_a_file_system_has_none(code, tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", flock)
    held = lock(tmp_path / "run")
    with pytest.raises(ValueError, match="Another run is writing to"):
        lock(tmp_path / "run")
    unlock(held)
    unlock(lock(tmp_path / "run"))
    assert not list((tmp_path / "run").iterdir())


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    def sleep_in_steps():
        from evit_hf.keep_rate_schedule import KeepRateSchedule

        original = KeepRateSchedule.at

        def slow(schedule, step):
            if step == 3:
                Path(tmp_path / "asleep").touch()
                for _ in range(600):
                    time.sleep(0.1)
            return original(schedule, step)

        KeepRateSchedule.at = slow

    stopped = ForkedRun(SMALL, tmp_path / "run", before=sleep_in_steps)
    deadline = time.monotonic() + 60
    while not (tmp_path / "asleep").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(stopped.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert stopped.process.is_alive()  # in the middle of a step
    os.kill(stopped.pid, signal.SIGTERM)
    assert stopped.wait(10) == 143


def test_a_bit_flip_in_the_newest_checkpoint_costs_one_epoch_and_no_bit(uninterrupted, tmp_path):
    output_dir = tmp_path / "run"
    stopped = ForkedRun([*SMALL, *RANDOM], output_dir)
    stopped.wait_for_step(output_dir, 13)
    os.kill(stopped.pid, signal.SIGTERM)
    assert stopped.wait() == 143
    file = max((output_dir / "checkpoints").glob("step-*")) / "optimizer.pt"
    data = bytearray(file.read_bytes())
    data[1000] ^= 4
    file.write_bytes(data)
    text = run([*SMALL, *RANDOM, "--resume", "auto"], output_dir)
    assert "Skipped a damaged checkpoint" in text
    assert "optimizer.pt was changed" in text
    assert "step-000000012, after step 12" in text
    assert state_hash(output_dir) == state_hash(uninterrupted)


def test_without_an_intact_checkpoint_the_run_refuses_to_start(tmp_path):
    output_dir = tmp_path / "run"
    run([*SMALL, "--max_steps", "2"], output_dir)
    for path in (output_dir / "checkpoints").glob("*/model.safetensors"):
        path.unlink()
    text = run([*SMALL, "--max_steps", "2", "--resume", "auto"], output_dir, status=2)
    assert "None of the 1 checkpoints" in text
    assert "model.safetensors is missing" in text
    assert (output_dir / "model").exists()


def test_two_processes_resume_exactly_and_agree_on_a_signal_to_one(tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    flags = [*SMALL, *RANDOM, "--max_eval_samples", "41"]
    assert [rank.wait() for rank in fork_ranks(flags, straight)] == [0, 0]
    ranks = fork_ranks(flags, stopped)
    ranks[0].wait_for_step(stopped, 8)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [143, 143], ranks[0].text() + ranks[1].text()
    killed = fork_ranks([*flags, "--resume", "auto", "--checkpoint_steps", "2"], stopped)
    killed[0].wait_for_step(stopped, 13)
    for rank in killed:
        os.killpg(rank.pid, signal.SIGKILL)
    assert [rank.wait() for rank in killed] == [-9, -9]
    assert [rank.wait() for rank in fork_ranks([*flags, "--resume", "auto"], stopped)] == [0, 0]
    assert state_hash(stopped) == state_hash(straight)
    assert logged_steps(stopped) == logged_steps(straight)


def test_another_number_of_processes_goes_on_with_the_same_images(tmp_path):
    """Without dropout and mixing the gradients are the same, but for the order of the sums."""
    one, moved = tmp_path / "one", tmp_path / "moved"
    flags = [*SMALL, "--rand_augment", "9", "--drop_last", "false"]
    run(flags, one)
    stopped = ForkedRun(flags, moved)
    stopped.wait_for_step(moved, 7)
    os.kill(stopped.pid, signal.SIGTERM)
    assert stopped.wait() == 143
    ranks = fork_ranks([*flags, "--resume", "auto"], moved)
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert "The checkpoint is of 1 processes, this run has 2" in ranks[0].text()
    losses = [[e["loss"] for e in read_log(path) if "loss" in e] for path in (one, moved)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_changed_settings_are_refused_with_a_table_and_harmless_ones_are_not(tmp_path):
    output_dir = tmp_path / "run"
    flags = [*SMALL, "--max_steps", "3"]
    run(flags, output_dir)
    changed = [*SMALL, "--max_steps", "5", "--learning_rate", "1e-4", "--resume", "auto"]
    text = run(changed, output_dir, status=2)
    assert "max_steps" in text
    assert "checkpoint: 3 " in text
    assert "now: 5" in text
    assert "learning_rate" in text
    assert "`--resume-override`" in text
    run([*flags, "--resume", "auto", "--num_workers", "1", "--log_steps", "2"], output_dir)
    text = run([*flags, "--max_steps", "2", "--resume", "auto", "--resume_override"], output_dir, status=2)
    assert "is of step 3, beyond the 2 steps of this run" in text
    run([*changed, "--resume_override"], output_dir)
    assert logged_steps(output_dir)[0][-1] == 5
    assert [e["learning_rate"] for e in read_log(output_dir) if e["step"] == 5 and "loss" in e][0] <= 1e-4


def test_a_finished_model_is_not_deleted_unless_asked_to(tmp_path):
    output_dir = tmp_path / "run"
    flags = [*SMALL, "--max_steps", "2"]
    run(flags, output_dir)
    shutil.rmtree(output_dir / "checkpoints")
    weights = output_dir / "model" / "model.safetensors"
    before = weights.read_bytes()
    text = run([*flags, "--resume", "auto"], output_dir, status=2)
    assert "has no checkpoint to resume from, but holds model, " in text
    for flag in ("--model", "--oracle", "--teacher"):
        more = [] if flag == "--model" else ["--model", str(output_dir)]
        text = run([*flags, *more, flag, str(output_dir), "--overwrite"], output_dir, status=2)
        assert "`--overwrite` would delete `--" in text
    assert weights.read_bytes() == before


def test_a_run_with_other_settings_is_not_mixed_with_later_checkpoints(tmp_path):
    output_dir = tmp_path / "run"
    run([*SMALL, "--max_steps", "4", "--checkpoint_steps", "1", "--keep_checkpoints", "9"], output_dir)
    changed = [*SMALL, "--max_steps", "4", "--learning_rate", "1e-4", "--resume_override"]
    second = output_dir / "checkpoints" / "step-000000002"
    text = run([*changed, "--resume", str(second)], output_dir, status=2)
    assert "has checkpoints of later steps" in text
    assert "(step-000000003, step-000000004)" in text
    run([*changed, "--resume", str(second)], tmp_path / "other")


def test_a_finished_run_can_be_resumed_without_harm_and_from_a_named_checkpoint(uninterrupted, tmp_path):
    before = state_hash(uninterrupted), logged_steps(uninterrupted)
    text = run([*SMALL, *RANDOM, "--resume", "auto"], uninterrupted)
    assert "averaged weights: top-1" not in text  # the last evaluation is not repeated
    assert (state_hash(uninterrupted), logged_steps(uninterrupted)) == before
    checkpoint = min((uninterrupted / "checkpoints").glob("step-*"))
    run([*SMALL, *RANDOM, "--resume", str(checkpoint)], tmp_path / "other")
    assert state_hash(tmp_path / "other") == before[0]
    assert (tmp_path / "other" / "arguments.yaml").exists()
    text = run([*SMALL, *RANDOM, "--resume", str(checkpoint)], tmp_path / "other", status=2)
    assert "holds a run already" in text  # not that of the checkpoint
    text = run([*SMALL, "--resume", str(tmp_path / "nothing")], tmp_path / "third", status=2)
    assert "is not an intact checkpoint: manifest.json is missing" in text


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_streamed_runs_resume_exactly_too(num_workers, tmp_path):
    flags = [*SMALL, *RANDOM, "--streaming", "--max_steps", "14", "--checkpoint_steps", "5", "--shuffle_buffer", "40"]
    flags += ["--num_workers", num_workers, "--gradient_accumulation_steps", "2"]
    flags.remove("--max_train_samples"), flags.remove("104")
    run(flags, tmp_path / "straight")
    killed = ForkedRun(flags, tmp_path / "killed")
    killed.wait_for_step(tmp_path / "killed", 8)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    text = run([*flags, "--resume", "auto"], tmp_path / "killed")
    assert "Resuming from" in text
    assert state_hash(tmp_path / "killed") == state_hash(tmp_path / "straight")
