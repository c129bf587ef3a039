import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from real_processes import evit


EVIT = str(Path(sys.executable).with_name("evit"))


def run(*command, cwd=None):
    process = subprocess.run(command, cwd=cwd, env=os.environ, capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr


def test_help_lists_the_commands():
    status, out, _ = run(EVIT, "--help")
    assert status == 0
    assert "train     train or fine-tune an EViT" in out


def test_help_starts_without_torch():
    code = "import sys; from evit_training import cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    assert run(sys.executable, "-c", code)[0] == 0
    code = (
        "import sys\nfrom evit_training.arguments import parse_train_arguments\n"
        "try:\n    parse_train_arguments(['--help'])\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    assert run(sys.executable, "-c", code)[0] == 0


@pytest.fixture(scope="module")
def helps():
    """What `evit COMMAND --help` prints for each command, and what it cost."""
    code = (
        "import contextlib, importlib, io, json, sys, time\nfrom evit_training.cli import COMMANDS\nhelps = {}\n"
        "for word in COMMANDS:\n"
        "    start, text = time.process_time(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):\n"
        "        importlib.import_module(f'evit_training.commands.{word}').main(['--help'])\n"
        "    helps[word] = text.getvalue(), time.process_time() - start\n"
        "print(json.dumps([helps, sorted(sys.modules)]))"
    )
    return json.loads(run(sys.executable, "-c", code)[1])


def test_help_of_every_command_is_quick(helps):
    texts, modules = helps
    assert not {"torch", "transformers", "datasets", "huggingface_hub", "gradio"} & set(modules)
    assert max(seconds for _, seconds in texts.values()) < 1


# Commands that measure or predict, and for each flag, or its plural, those of them without it.
MEASURING = ("train", "predict", "evaluate", "visualize", "inspect", "benchmark", "tune")
WITHOUT = {
    "device": ["train"],  # launchers choose it
    "batch-size": ["visualize"],  # one picture after the other
    "keep-rate": ["tune"],  # it looks for them
    "macs": ["tune"],  # its target is one
    "json": [],
    "quiet": [],
}


@pytest.mark.parametrize("flag", WITHOUT)
def test_every_command_takes_what_the_others_take(flag, helps):
    texts, _ = helps
    without = [word for word in MEASURING if not re.search(rf"^  --{flag}s?\b", texts[word][0], re.MULTILINE)]
    assert without == WITHOUT[flag]


def test_every_command_that_takes_a_model_takes_a_run_folder_and_a_hub_id(helps):
    texts, _ = helps
    for word in ("predict", "evaluate", "visualize", "inspect", "benchmark", "tune", "export", "space"):
        text = " ".join(texts[word][0].split())
        assert "run folder" in text, word
        assert "Hub id" in text, word


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "a command is missing"),
        (["trian"], "`trian` is not a command: did you mean `train`?"),
        (["train", "--keep_rat", "1"], "did you mean `--keep-rate`?"),
        (["train", "--dataset", "no/such/file.csv", "b.parquet"], "are not files"),
        (["train", "--keep-rate", "1.5"], "`--keep-rate` must be in (0, 1], got 1.5"),
    ],
)
def test_mistakes_end_with_a_sentence_and_status_2(arguments, sentence, tmp_path):
    ended = evit(*arguments, cwd=tmp_path)
    assert ended.status == 2
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr


LAUNCH = [str(Path(sys.executable).with_name("accelerate")), "launch", "-m", "evit_training", "train"]


@pytest.mark.parametrize("command", [[EVIT, "train"], LAUNCH], ids=["evit", "accelerate"])
def test_both_ways_to_start_a_training(command, tmp_path):
    flags = [
        "digits",
        "--max_steps",
        "2",
        "--max_train_samples",
        "64",
        "--max_eval_samples",
        "20",
        "--output-dir",
        "run",
    ]
    flags += ["--hidden_size", "32", "--num_hidden_layers", "4", "--reorganization_layers", "1"]
    status, out, err = run(*command, *flags, cwd=tmp_path)
    assert status == 0, err
    assert "1.0 (dense ViT)" in out
    assert "GMACs" in out
    assert "images/s" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [result["keep_rate"] for result in results] == [1.0, 0.7, 0.9, 0.8, 0.6, 0.5]
