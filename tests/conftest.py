import os
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

from evit_hf import EViTConfig, EViTForImageClassification


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


def run_python(code, cwd, *, without_package=False, **environment):
    """Run code in a fresh interpreter and return what it printed; `without_package` hides evit_hf and evit_training.

    The interpreter then sees a folder of links to everything that is installed except this project.
    """
    env = {**os.environ, "HF_HOME": str(Path(cwd) / "hf_home"), **environment}
    command = [sys.executable, "-c", code]
    if without_package:
        site_packages = Path(torch.__file__).parent.parent
        links = Path(cwd) / "site_packages"
        links.mkdir()
        for path in site_packages.iterdir():
            if not path.name.startswith(("evit", "__editable__")):
                (links / path.name).symlink_to(path)
        env["PYTHONPATH"] = str(links)
        command.insert(1, "-S")
    process = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-5000:]
    return process.stdout
