"""Every process ends by itself, whatever happens, with a status, with what is safe, and with all that was done."""

import itertools
import os
import shlex
import signal
import time
from types import SimpleNamespace

import pytest
from PIL import Image
from real_processes import starter as the_starter

from evit_training.data.loaders import LoaderError, said_in_one_line


TINY = ["--hidden-size", "32", "--num-hidden-layers", "4", "--num-attention-heads", "2", "--image-size", "32"]
TINY += ["--patch-size", "8", "--batch-size", "8", "--eval-batch-size", "4", "--num-pictures", "0", "--log-steps", "1"]
SAFE = "The run is saved up to step {} of {}: resume with `--resume auto`, as in: evit train "


@pytest.fixture(scope="module")
def starter():
    return the_starter()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders with 24 training and 24 evaluation images: all good, or one broken in a split."""
    folder = tmp_path_factory.mktemp("data")
    for name, broken in (("good", None), ("bad_train", "train"), ("bad_test", "test")):
        for split in ("train", "test"):
            for colour in ("red", "blue"):
                (folder / name / split / colour).mkdir(parents=True)
                for i in range(12):
                    file = folder / name / split / colour / f"{i}.jpg"
                    Image.new("RGB", (32, 32), colour).save(file)
                    if (split, colour, i) == (broken, "red", 7):
                        file.write_bytes(file.read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def model(starter, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    run = ["train", "--dataset", data / "good", *TINY, "--max-steps", "1", "--num-workers", "0"]
    ended = starter.run([*run, "--output-dir", folder / "run"], folder)
    assert ended.status == 0, ended.stderr
    return folder / "run" / "model"


def call(command, dataset, model, tmp_path, workers=2):
    """A command line that loads images of a data set."""
    words = {
        "train": ["train", *TINY, "--epochs", "3", "--check-images", "0", "--output-dir", tmp_path / "run"],
        "evaluate": ["evaluate", model, "--batch-size", "4", "--output-dir", tmp_path / "out"],
        "tune": ["tune", model, "0.8"],
        "export": ["export", model, tmp_path / "out"],
    }[command]
    return [*words, "--dataset", dataset, "--num-workers", workers]


def checkpoints(tmp_path):
    return sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))


def assert_one_line(ended, status):
    assert ended.status == status, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.last_line.startswith("evit ")


# An error in the data


def check_broken_picture(starter, data, model, tmp_path, command, split, workers):
    ended = starter.run(call(command, data / f"bad_{split}", model, tmp_path, workers), tmp_path)
    assert_one_line(ended, 2)
    assert "7.jpg) cannot be decoded" in ended.last_line
    if command == "train":
        (newest,) = checkpoints(tmp_path)
        assert SAFE.format(int(newest.removeprefix("step-")), 9) in ended.last_line
        assert split == "train" or newest == "step-000000003"


@pytest.mark.parametrize(("command", "split", "workers"), [("train", "test", 2), ("evaluate", "test", 4)])
def test_a_broken_picture_ends_the_process_and_loses_nothing(starter, data, model, tmp_path, command, split, workers):
    check_broken_picture(starter, data, model, tmp_path, command, split, workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize(("command", "split"), [("train", "train"), ("train", "test"), ("evaluate", "test")])
def test_a_broken_picture_ends_every_process(starter, data, model, tmp_path, command, split, workers):
    check_broken_picture(starter, data, model, tmp_path, command, split, workers)


@pytest.mark.slow
def test_a_broken_picture_ends_commands_without_loading_processes(starter, data, model, tmp_path):
    check_broken_picture(starter, data, model, tmp_path, "tune", "test", 0)


def test_a_run_resumes_with_the_pictures_that_are_left(starter, data, model, tmp_path):
    """The evaluation that failed comes first, and is the only one of its step in the log."""
    words = call("train", data / "bad_test", model, tmp_path, 0)
    assert starter.run(words, tmp_path).status == 2
    ended = starter.run([*words, "--resume", "auto", "--on-bad-image", "skip"], tmp_path)
    assert ended.status == 0, ended.stderr
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert log.count("eval_top1") == 3
    assert log.count('"eval_num_bad_images": 1') == 3
    straight = tmp_path / "straight"
    words = [*call("train", data / "bad_test", model, straight, 1), "--on-bad-image", "skip"]
    assert starter.run(words, straight).status == 0
    files = [
        folder / "run" / "checkpoints" / "step-000000009" / "model.safetensors" for folder in (tmp_path, straight)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


# Nobody listens


def check_closed_pipe(starter, data, model, tmp_path, command, workers):
    ended = starter.run(
        call(command, data / "good", model, tmp_path, workers),
        tmp_path,
        before="r, w = os.pipe(); os.close(r); os.dup2(w, 1)",
    )
    assert_one_line(ended, 141)


@pytest.mark.parametrize("workers", [2])
def test_a_closed_pipe_ends_a_training(starter, data, model, tmp_path, workers):
    check_closed_pipe(starter, data, model, tmp_path, "train", workers)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "workers"), [("train", 0), ("train", 4), ("evaluate", 1), ("evaluate", 4)])
def test_a_closed_pipe_ends_every_process(starter, data, model, tmp_path, command, workers):
    check_closed_pipe(starter, data, model, tmp_path, command, workers)


def test_a_pipe_that_closes_in_an_evaluation_loses_nothing(starter, data, model, tmp_path):
    """As in `evit train | grep -m 1`."""
    before = """
from evit_training.loop import trainer
original = trainer.evaluate
def evaluate(*args, **keywords):
    r, w = os.pipe(); os.close(r); os.dup2(w, 1)
    return original(*args, **keywords)
trainer.evaluate = evaluate
"""
    ended = starter.run(call("train", data / "good", model, tmp_path, 1), tmp_path, before=before)
    assert_one_line(ended, 141)
    assert SAFE.format(3, 9) in ended.last_line
    assert (tmp_path / "run" / "checkpoints" / "step-000000003" / "evaluation.json").exists()


# A loading process dies


KILL_LOADERS_IN_EVALUATION = """
import multiprocessing, signal
from evit_training.measuring.metrics import Counts
original, calls = Counts.add, []
def add(*args):
    calls.append(1)
    if len(calls) == 2:
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
    return original(*args)
Counts.add = add
"""


def check_killed_loader(starter, data, model, tmp_path, command, workers):
    words = call(command, data / "good", model, tmp_path, workers)
    words += ["--eval-batch-size" if command == "train" else "--batch-size", 1]
    ended = starter.run(words, tmp_path, before=KILL_LOADERS_IN_EVALUATION)
    assert_one_line(ended, 1)
    assert "A process that loads images died" in ended.last_line
    if command == "train":
        assert SAFE.format(3, 9) in ended.last_line
        assert checkpoints(tmp_path) == ["step-000000003"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("received 0 items of ancdata"),
        FileNotFoundError(2, "No such file or directory", "/torch_7_8_9"),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_killed_loading_process_breaks_the_sentence_is_the_same(error):
    with pytest.raises(LoaderError, match="^A process that loads images died.*exited unexpectedly"):
        with said_in_one_line(1, [SimpleNamespace(exitcode=-signal.SIGKILL)]):
            raise error


@pytest.mark.parametrize(("command", "workers"), [("train", 1)])
def test_a_killed_loading_process_ends_an_evaluation(starter, data, model, tmp_path, command, workers):
    check_killed_loader(starter, data, model, tmp_path, command, workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_killed_loading_process_ends_every_evaluation(starter, data, model, tmp_path, command, workers):
    check_killed_loader(starter, data, model, tmp_path, command, workers)


# What loading processes say when shared memory or file handles run out, as PyTorch and Python word it.
SHORTAGES = {
    "shared memory": (
        "RuntimeError('unable to write to file </torch_7_8_9>: No space left on device (28)')",
        "Shared memory (/dev/shm), through which loading processes hand over images, is full",
    ),
    "file handles": (
        "OSError(24, 'Too many open files')",
        "There are too many open files: raise the limit (`ulimit -n",
    ),
    "memory": ("MemoryError()", "Memory ran out while images were loaded"),
}


def check_shortage(starter, data, model, tmp_path, command, workers, shortage):
    error, sentence = SHORTAGES[shortage]
    before = f"""
from evit_training.data import images
def fail(*args):
    raise {error}
images.as_rgb = fail
"""
    ended = starter.run(call(command, data / "good", model, tmp_path, workers), tmp_path, before=before)
    assert_one_line(ended, 1)
    assert sentence in ended.last_line
    assert len(ended.last_line) < 600


@pytest.mark.parametrize(
    ("command", "workers", "shortage"), [("train", 1, "shared memory"), ("evaluate", 0, "file handles")]
)
def test_a_shortage_is_named(starter, data, model, tmp_path, command, workers, shortage):
    check_shortage(starter, data, model, tmp_path, command, workers, shortage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "shortage", "workers"),
    [
        (*pair, (0, 4, 1)[(i + i // 3) % 3])
        for i, pair in enumerate(itertools.product(["train", "evaluate"], SHORTAGES))
    ],
)
def test_every_shortage_is_named(starter, data, model, tmp_path, command, workers, shortage):
    check_shortage(starter, data, model, tmp_path, command, workers, shortage)


# Signals


@pytest.mark.parametrize("workers", [0, 4])
def test_a_signal_in_training_ends_the_process_without_waiting(starter, data, model, tmp_path, workers):
    words = [*call("train", data / "good", model, tmp_path, workers), "--epochs", 900]
    command = starter.start(words, tmp_path)
    log = tmp_path / "run" / "metrics.jsonl"
    command.wait_for(lambda: log.exists() and log.read_text().count("\n") > 5)
    start = time.monotonic()
    os.killpg(command.pid, signal.SIGTERM)
    ended = command.wait()
    assert_one_line(ended, 143)
    assert "Interrupted by signal 15 after step" in ended.last_line
    assert f"--resume auto, as in: evit train {tmp_path / 'run'}/arguments.yaml" in ended.last_line.replace("`", "")
    assert ended.time - start < 20  # about one second on a machine that has nothing else to do


def test_a_signal_to_all_processes_in_an_evaluation_saves_the_run(starter, data, model, tmp_path):
    before = KILL_LOADERS_IN_EVALUATION.replace("signal.SIGKILL", "signal.SIGTERM").replace(
        "    return original", "    if len(calls) == 2: os.kill(os.getpid(), signal.SIGTERM)\n    return original"
    )
    ended = starter.run(call("train", data / "good", model, tmp_path, 1), tmp_path, before=before)
    assert_one_line(ended, 143)
    assert SAFE.format(3, 9) in ended.last_line
    assert not (tmp_path / "run" / "checkpoints" / "step-000000003" / "evaluation.json").exists()


# Errors of all kinds at all places


PLACES = {
    "step": ("trainer.update_weights", 5),
    "evaluation": ("trainer.evaluate", 2),
    "end": ("trainer.compare_keep_rates", 1),
}
FAILURES = {
    "bug": ("ZeroDivisionError('a bug')", 1),
    "device": ("RuntimeError('CUDA error: device-side assert triggered')", 1),
    "memory": ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')", 4),
    "disk": ("OSError(28, 'No space left on device', 'x')", 2),
}


def check_failure(starter, data, model, tmp_path, place, failure, workers):
    (name, number), (error, status) = PLACES[place], FAILURES[failure]
    before = f"""
from evit_training.loop import trainer
original, calls = {name}, []
def fail(*args, **keywords):
    calls.append(1)
    if len(calls) == {number}:
        raise {error}
    return original(*args, **keywords)
{name} = fail
"""
    ended = starter.run(call("train", data / "good", model, tmp_path, workers), tmp_path, before=before)
    assert ended.status == status, ended.stderr
    step = {"step": 3, "evaluation": 6, "end": 9}[place]
    assert SAFE.format(step, 9) in ended.last_line
    assert ("Traceback" in ended.stderr) == (status == 1)
    return ended


@pytest.mark.parametrize(("place", "failure", "workers"), [("step", "bug", 2), ("evaluation", "memory", 0)])
def test_an_error_says_what_is_safe_and_how_to_resume(starter, data, model, tmp_path, place, failure, workers):
    ended = check_failure(starter, data, model, tmp_path, place, failure, workers)
    words = shlex.split(ended.last_line.split("as in: evit ")[1])
    ended = starter.run(words, tmp_path)
    assert ended.status == 0, ended.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("place", "failure"), list(itertools.product(PLACES, FAILURES)))
def test_every_error_says_what_is_safe(starter, data, model, tmp_path, place, failure):
    check_failure(starter, data, model, tmp_path, place, failure, workers=1)
