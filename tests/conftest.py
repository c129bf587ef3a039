import os
import shutil
import subprocess
import sys
from pathlib import Path


# Set before any library is imported, here and in child processes: nothing may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HOME"] = str(Path(__file__).parent.parent / ".pytest_cache" / "huggingface")
os.environ["OMP_NUM_THREADS"] = "1"  # pytest-xdist runs one process for each core

import pytest
import torch
from real_processes import run_code

from evit_hf import EViTConfig, EViTForImageClassification, tokens_left


DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests that fork trainings come first: a process in which others have run may not compute gradients forked."""
    items.sort(key=lambda item: not {"ForkedRun", "fork_ranks"} & vars(item.module).keys())


def tiny_config_with(**changes):
    settings = {
        "image_size": 32,
        "patch_size": 8,
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_labels": 5,
        # Larger than the default, so that class token attention is far from uniform.
        "initializer_range": 0.2,
        "keep_rate": 0.6,
        **changes,
    }
    return EViTConfig(**settings)


@pytest.fixture
def tiny_config():
    """16 patches, reorganized at layers 1, 2 and 3 of 4: 10, 7 and 5 attentive tokens at keep rate 0.6 with fusion."""
    return tiny_config_with()


@pytest.fixture
def tiny_model(tiny_config):
    torch.manual_seed(0)
    return EViTForImageClassification(tiny_config).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def leave_at_least(monkeypatch):
    """A function that sets how few tokens a share of operations may leave; what was found with others is forgotten."""

    def leave_at_least(num_tokens):
        monkeypatch.setattr("evit_hf.token_reorganization.MIN_TOKENS", num_tokens)
        tokens_left._remembered.cache_clear()

    yield leave_at_least
    tokens_left._remembered.cache_clear()


@pytest.fixture(scope="module")
def traced_once(tmp_path_factory):
    """Each model is traced and written as ONNX once, whatever tests and formats ask for it.

    Yields: the programs; clear them where one is needed that no other format was made of.
    """
    from evit_hf import export

    trace, write_onnx, programs, files = export.exported_program, export._write_onnx, {}, {}

    def exported_program(model, keep_rate_is_input=False, image_size=None):
        tensors = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in model.state_dict().values()]
        weights = torch.cat(tensors).numpy().tobytes()
        key = weights, model.config.to_json_string(), keep_rate_is_input, str(image_size)
        if key not in programs:
            programs[key] = trace(model, keep_rate_is_input, image_size)
        return programs[key]

    def write_once(program, inputs, path, output):
        key = id(program), output
        if key not in files:  # which hold the program as well, so that no other gets its id
            files[key] = program, tmp_path_factory.mktemp("onnx") / "model.onnx"
            write_onnx(program, inputs, files[key][1], output)
        shutil.copy(files[key][1], path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "exported_program", exported_program)
        patch.setattr(export, "_write_onnx", write_once)
        patch.setitem(export._WRITERS, "onnx", write_once)
        yield programs


def run_python(code, cwd, *, without_package=False, **environment):
    """Run code in a process of its own and return what it printed; `without_package` hides evit_hf and evit_training.

    Of other packages only PyTorch and torchvision are imported when the code begins.
    """
    environment = {"HF_HOME": str(Path(cwd) / "hf_home"), **environment}
    ended = run_code(code, cwd=cwd, environment=environment, hides_package=without_package)
    assert ended.status == 0, ended.stderr[-5000:]
    return ended.stdout


def run_new_python(code, cwd):
    """Run code in a new interpreter, which has imported nothing, and return what it printed."""
    process = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-5000:]
    return process.stdout
