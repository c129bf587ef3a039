"""What a command finds on its machine: the launcher's wishes, memory, modules that only some systems have."""

import sys

import pytest
import torch
from conftest import run_new_python

from evit_training.measuring.machine import check_launcher, memory_gib


@pytest.mark.parametrize(
    ("environment", "flag"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--mixed-precision"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "--mixed-precision"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--compile"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--gradient-accumulation-steps"),
    ],
    ids=["bf16", "fp16", "compile", "accumulation"],
)
def test_what_accelerate_launch_asks_for_is_refused_with_the_flag_that_does_it(environment, flag):
    """Accelerate itself would train in float32, compile, or divide all gradients by four, without a word."""
    with pytest.raises(ValueError, match=f"`{flag}`"):
        check_launcher("no", environment)


def test_what_accelerate_launch_does_not_ask_for_is_left_to_the_settings():
    check_launcher("bf16", {})
    check_launcher("bf16", {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"})
    check_launcher("bf16", {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"})
    with pytest.raises(ValueError, match="asks for mixed_precision fp16"):
        check_launcher("bf16", {"ACCELERATE_MIXED_PRECISION": "fp16"})


def test_memory_is_known_without_the_module_resource(monkeypatch):
    peak = memory_gib(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "resource", None)
    assert 0 < memory_gib(torch.device("cpu")) <= 1.1 * peak


@pytest.mark.slow
def test_everything_imports_and_folders_are_locked_where_unix_modules_are_missing(tmp_path):
    code = """
import sys
import psutil  # has modules of its own for each system
sys.modules.update(resource=None, fcntl=None)
from pathlib import Path
import evit_hf, evit_training.loop.trainer, evit_training.measuring.benchmark, evit_training.measuring.tuning
from evit_training.loop.interruption import lock, unlock
held = lock(Path("run"))
try:
    lock(Path("run"))
except ValueError as error:
    print(error)
unlock(held)
print(list(Path("run").iterdir()))
"""
    said = run_new_python(code, tmp_path)
    assert "Another run is writing to" in said
    assert said.endswith("[]\n")
