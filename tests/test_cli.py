import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


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
    status, _, err = run(EVIT, *arguments, cwd=tmp_path)
    assert status == 2
    assert sentence in err
    assert "Traceback" not in err


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
    status, out, err = run(*command, *flags, cwd=tmp_path)
    assert status == 0, err
    assert "1.0 (dense ViT)" in out
    assert "GMACs" in out
    assert "images/s" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [result["keep_rate"] for result in results] == [1.0, 0.7, 0.9, 0.8, 0.6, 0.5]
