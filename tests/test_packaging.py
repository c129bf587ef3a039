"""What is installed, what it needs, how it looks."""

import ast
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, run_python

import evit_hf


MODELING_FILES = ("configuration_evit.py", "linear.py", "modeling_evit.py", "token_reorganization.py")
MODELING_FILES += ("configuration_evit_lv.py", "modeling_evit_lv.py", "token_labelling.py")


def test_code_passes_ruff():
    for command in (["check"], ["format", "--check"]):
        process = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stdout


def test_the_package_needs_no_training_library(tmp_path):
    """`pip install evit-hf` without extras: only torch and transformers are there to import."""
    code = """
import sys
for name in ("accelerate", "datasets", "evaluate", "torchvision", "PIL", "timm", "evit_training"):
    sys.modules[name] = None
import evit_hf
from evit_hf import keep_rate_schedule, profiling, visualization
import torch
model = evit_hf.EViTForImageClassification(evit_hf.EViTConfig(image_size=32, hidden_size=48, num_attention_heads=3))
print(model(torch.randn(1, 3, 32, 32)).logits.shape)
"""
    assert "torch.Size([1, 2])" in run_python(code, tmp_path)


@pytest.mark.parametrize("file", MODELING_FILES)
def test_files_that_travel_import_torch_transformers_and_each_other_alone(file):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "evit_hf" / file).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(f".{node.module}" if node.level else node.module.split(".")[0])
    local = {f".{name.removesuffix('.py')}" for name in MODELING_FILES}
    assert imported - set(sys.stdlib_module_names) <= {"torch", "transformers", "huggingface_hub"} | local


@pytest.mark.parametrize("file", MODELING_FILES)
def test_files_that_travel_name_all_files_that_they_need(file):
    """Transformers 5.9 copies what a file imports itself, and stumbles over what only its imports import."""

    def relative_imports(name):
        tree = ast.parse((ROOT / "evit_hf" / name).read_text())
        return {f"{node.module}.py" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}

    direct = relative_imports(file)
    assert {needed for name in direct for needed in relative_imports(name)} <= direct


def test_evit_hf_never_imports_the_trainer():
    for path in (ROOT / "evit_hf").glob("*.py"):
        assert "evit_training" not in path.read_text(), path


def test_saved_folder_holds_the_code_that_remote_loading_needs(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.glob("*.py")}
    assert (
        {"configuration_evit.py", "linear.py", "modeling_evit.py", "token_reorganization.py"}
        <= names
        <= set(MODELING_FILES)
    )


def test_wheel_holds_recipes_and_data(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "tests"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    process = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"evit_hf-{evit_hf.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("evit_hf", "evit_hf"), ("training", "evit_training")):
        tracked = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()}
        wanted = {f"{package}/{path}" for path in tracked if "__pycache__" not in path.parts}
        needless = {f"{package}/{path}" for path in tracked if path.name in ("make_digits.py", "RESULTS.md")}
        assert wanted - needless <= names


def test_no_test_is_skipped():
    """A skipped test hides a hole; what takes long is marked slow, and .ci/run runs it."""
    for path in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(path.read_text())
        words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not words & {"skip", "skipif", "xfail", "importorskip"}, path
