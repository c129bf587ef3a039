"""Several processes, connected by gloo: the same training as one, sharded or not, and what happens when one dies."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from test_faults import loss_with
from training_runs import RANDOM, SMALL, fork_ranks, read_log, run, state_hash


# Nothing random that depends on the process, and a last batch of 10 images, which no micro-batch size divides.
DETERMINISTIC = [*SMALL, "--rand_augment", "9", "--drop_last", "false", "--max_eval_samples", "41"]
DETERMINISTIC += ["--max_train_samples", "106"]


def torchrun(flags, output_dir, num_processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command += ["-m", "evit_training", "train", *flags, "--output_dir", str(output_dir)]
    return subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process, output_dir, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(entry["step"] >= step for entry in read_log(output_dir)):
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0][-3000:])


def losses(output_dir):
    return [entry["loss"] for entry in read_log(output_dir) if "learning_rate" in entry]


def evaluations(output_dir):
    return [entry["eval_loss"] for entry in read_log(output_dir) if "eval_loss" in entry]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "one"
    run(DETERMINISTIC, output_dir)
    return output_dir


def test_two_processes_under_torchrun_train_as_one_does(one_process, tmp_path):
    """The same images in each step, cut in other ways: gradients differ only by the order of sums."""
    process = torchrun([*DETERMINISTIC, "--gradient_accumulation_steps", "2"], tmp_path / "run")
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert losses(tmp_path / "run") == pytest.approx(losses(one_process), rel=1e-4)
    assert evaluations(tmp_path / "run") == pytest.approx(evaluations(one_process), rel=1e-4)
    weights = [load_file(path / "model" / "model.safetensors") for path in (one_process, tmp_path / "run")]
    for name, tensor in weights[0].items():
        # Adam divides by the gradient's size: where that is zero but for rounding, as for all biases of keys, its sign
        # is chance.
        if "k_proj.bias" not in name:
            assert (tensor - weights[1][name]).abs().median() < 1e-4, name
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results[0]["num_images"] == 41


def test_two_processes_share_the_work_and_count_each_image_once(tmp_path):
    """51 evaluation images on two processes: one is repeated to fill up, and must not be counted."""
    flags = ["digits", "--max_train_samples", "128", "--max_eval_samples", "51", "--batch_size", "64", "--epochs", "2"]
    flags += ["--compare_keep_rates", "1.0", "--log_steps", "1", "--hidden_size", "32", "--num_hidden_layers", "4"]
    ranks = fork_ranks([*flags, "--reorganization_layers", "1", "2"], tmp_path / "run")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text()
    output = ranks[0].text() + ranks[1].text()
    assert "steps of 64 images on 2 x cpu" in output
    assert output.count("1.0 (dense ViT)") == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results[1]["top1"] * 51 == pytest.approx(round(results[1]["top1"] * 51))
    entries = [entry for entry in read_log(tmp_path / "run") if "learning_rate" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]  # 128 images in batches of 2 x 32, twice
    rates = [entry["learning_rate"] for entry in entries]
    assert rates == pytest.approx([0, 0.00025, 0.0005, 0.00075])  # warm-up counts optimizer steps, not processes'


@pytest.mark.parametrize("accumulation", ["2", "4"])
def test_accumulation_changes_nothing_not_even_in_the_last_batch(accumulation, one_process, tmp_path):
    run([*DETERMINISTIC, "--gradient_accumulation_steps", accumulation], tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(one_process), rel=1e-4)
    assert [entry["step"] for entry in read_log(one_process) if "eval_loss" in entry] == [7, 14, 21]  # 6.6 batches


def test_every_step_process_and_forward_pass_draws_its_own_random_numbers(tmp_path):
    def note_seed(loss, progress, batch):
        with (tmp_path / "seeds").open("a") as file:
            file.write(f"{torch.initial_seed()} ")
        return loss

    flags = [*SMALL, "--max_steps", "4", "--gradient_accumulation_steps", "2"]
    ranks = fork_ranks(flags, tmp_path / "run", before=loss_with(note_seed))
    assert [rank.wait() for rank in ranks] == [0, 0]
    seeds = (tmp_path / "seeds").read_text().split()
    # Of each process four steps of two passes, and the first pass once more, to see whether it fits into memory.
    assert len(seeds) == 2 * (4 * 2 + 1)
    assert len(set(seeds)) == 2 * 4 * 2


def sharded():
    """Accelerate leaves FSDP out on a CPU without a word; PyTorch's FSDP2 itself works there, so it is told to."""
    from evit_training.loop import trainer

    original = trainer.build_accelerator

    def build(arguments):
        accelerator = original(arguments)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["EViTLayer"]
        )
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        assert accelerator.is_fsdp2
        return accelerator

    trainer.build_accelerator = build
    original_describe = trainer.describe

    def describe(parts, state):
        assert type(next(state.model.parameters())).__name__ == "DTensor"
        return original_describe(parts, state)

    trainer.describe = describe


@pytest.mark.slow
def test_sharded_training_equals_replicated_training_and_resumes_exactly(tmp_path):
    flags = [
        *SMALL,
        *RANDOM,
        "--epochs",
        "2",
        "--num_hidden_layers",
        "2",
        "--reorganization_layers",
        "1",
        "--max_eval_samples",
        "41",
        "--checkpoint_steps",
        "2",
        "--gradient_accumulation_steps",
        "2",
    ]
    plain, shards, stopped = tmp_path / "plain", tmp_path / "shards", tmp_path / "stopped"
    ranks = fork_ranks(flags, plain)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text()
    ranks = fork_ranks(flags, shards, before=sharded)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text() + ranks[1].text()
    assert losses(shards) == pytest.approx(losses(plain), rel=1e-5)
    assert evaluations(shards) == pytest.approx(evaluations(plain), rel=1e-5)
    ranks = fork_ranks(flags, stopped, before=sharded)
    ranks[0].wait_for_step(stopped, 5)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [143, 143]
    ranks = fork_ranks([*flags, "--resume", "auto"], stopped, before=sharded)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text() + ranks[1].text()
    assert state_hash(stopped) == state_hash(shards)
    assert (
        load_file(stopped / "model" / "model.safetensors").keys()
        == load_file(plain / "model" / "model.safetensors").keys()
    )


def test_sharding_that_accelerate_would_leave_out_in_silence_is_refused(tmp_path):
    ranks = fork_ranks(SMALL, tmp_path / "run", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    statuses = [rank.wait() for rank in ranks]
    assert 2 in statuses
    assert 0 not in statuses
    assert "Accelerate shards only on GPUs" in ranks[0].text() + ranks[1].text()


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_the_run(tmp_path):
    flags = [*SMALL, "--epochs", "500"]
    process = torchrun(flags, tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "Interrupted by signal 15 after step" in output
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert int(newest.name.removeprefix("step-")) == read_log(tmp_path / "run")[-1]["step"]


def test_a_rank_that_dies_takes_the_others_along_and_leaves_an_intact_checkpoint(tmp_path):
    from evit_training.loop.checkpoints import newest_checkpoint

    flags = [*SMALL, "--epochs", "500"]
    ranks = fork_ranks(flags, tmp_path / "run")
    ranks[0].wait_for_step(tmp_path / "run", 8)
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert ranks[0].wait(60) not in (0, None)
    assert ranks[1].wait() == -signal.SIGKILL
    assert int(newest_checkpoint(tmp_path / "run" / "checkpoints").name.removeprefix("step-")) >= 6


@pytest.mark.slow
def test_a_run_ends_when_its_launcher_is_gone(tmp_path):
    """`accelerate launch` dies of SIGTERM and leaves the training process running."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "evit_training", "train", *SMALL]
    command += ["--epochs", "5000", "--output_dir", str(tmp_path / "run")]
    with (tmp_path / "out").open("w") as out:
        launcher = subprocess.Popen(command, env=os.environ, stdout=out, stderr=out)
    wait_for_step(launcher, tmp_path / "run", 2)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 60
    while "Interrupted by signal 15" not in (tmp_path / "out").read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert "Interrupted by signal 15" in (tmp_path / "out").read_text()
