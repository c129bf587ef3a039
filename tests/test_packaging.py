"""What is installed, what it needs, how it looks."""

import ast
import configparser
import graphlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, run_new_python
from packaging.version import Version

import evit_hf


MODELING_FILES = (
    "configuration_evit.py",
    "cpu_inference.py",
    "modeling_evit.py",
    "token_reorganization.py",
    "tokens_left.py",
)
MODELING_FILES += (
    "pictures.py",
    "short_cuts.py",
    "gpu_inference.py",
    "configuration_evit_lv.py",
    "modeling_evit_lv.py",
    "token_labelling.py",
)


@pytest.mark.slow
def test_api_reference_is_built_without_a_warning(tmp_path):
    process = subprocess.run([sys.executable, ROOT / "docs" / "api.py", tmp_path], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    page = (tmp_path / "evit_hf.html").read_text()
    assert all(f'id="{name}"' in page for name in evit_hf.__all__)


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
for name in ("accelerate", "datasets", "evaluate", "torchvision", "PIL", "timm", "peft", "evit_training"):
    sys.modules[name] = None
import evit_hf
from evit_hf import keep_rate_schedule, profiling, visualization
import torch
model = evit_hf.EViTForImageClassification(evit_hf.EViTConfig(image_size=32, hidden_size=48, num_attention_heads=3))
print(model(torch.randn(1, 3, 32, 32)).logits.shape)
"""
    assert "torch.Size([1, 2])" in run_new_python(code, tmp_path)


@pytest.mark.parametrize("file", MODELING_FILES)
def test_files_that_travel_import_torch_transformers_and_each_other_alone(file):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "evit_hf" / file).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(f".{node.module}" if node.level else node.module.split(".")[0])
    local = {f".{name.removesuffix('.py')}" for name in MODELING_FILES}
    # Transformers needs numpy itself; Pillow and Triton are imported where they are installed.
    others = {"pictures.py": {"numpy", "PIL"}, "gpu_inference.py": {"triton"}}.get(file, set())
    assert imported - set(sys.stdlib_module_names) <= {"torch", "transformers", "huggingface_hub"} | local | others


@pytest.mark.parametrize("file", MODELING_FILES)
def test_files_that_travel_name_all_files_that_they_need(file):
    """Transformers 5.9 copies what a file imports itself, and stumbles over what only its imports import."""

    def relative_imports(name):
        tree = ast.parse((ROOT / "evit_hf" / name).read_text())
        return {f"{node.module}.py" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}

    direct = relative_imports(file)
    assert {needed for name in direct for needed in relative_imports(name)} <= direct


# What each room of the trainer may import besides `evit_hf`: the rooms to the right of it.
ROOMS = (
    *(
        "commands",
        "studies",
        "loop",
        "sharing",
        "prediction",
        "measuring",
        "learning",
        "data",
        "screen",
        "arguments",
        "settings",
    ),
)


def imported_modules(path, folder, package):
    """Absolute names of what a file imports, and whether it is imported when the code runs.

    Imports inside functions count; those under `if TYPE_CHECKING` are told apart. `from . import timing` counts as
    `timing`, whether that is a module or a name in `__init__.py`.
    """
    tree = ast.parse(path.read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    parents = [package, *path.relative_to(folder).with_suffix("").parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in for_types
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}", node not in for_types


def modules_of(folder, package):
    """The package's modules: dotted name -> file."""
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        files[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return files


def run_time_imports(folder, package):
    """Each module's imports of other modules of the same package, without those for types only."""
    files = modules_of(folder, package)

    def module_named(name):
        return name if name in files else name.rpartition(".")[0]

    graph = {}
    for module, path in files.items():
        needed = {module_named(name) for name, runs in imported_modules(path, folder, package) if runs}
        graph[module] = (needed & set(files)) - {module, package}
    return graph


def imports_that_climb(folder):
    """Imports of the trainer that go up or sideways, those for types included."""
    wrong = []
    for module, path in modules_of(folder, "evit_training").items():
        room = module.split(".")[1] if "." in module else ""
        if room not in ROOMS:  # `cli.py` and `__main__.py` open the door to all rooms
            continue
        allowed = {room if room != "commands" else "commands.errors", *ROOMS[ROOMS.index(room) + 1 :]}
        for name, _ in imported_modules(path, folder, "evit_training"):
            if not name.startswith("evit_training."):
                continue
            target = name.removeprefix("evit_training.")
            if not any(target == wall or target.startswith(f"{wall}.") for wall in allowed):
                wrong.append(f"{module} imports {name}")
    return wrong


def test_rooms_import_downward_only():
    """A room imports only those that follow it in `ROOMS`; nothing imports a command."""
    assert imports_that_climb(ROOT / "training") == []


@pytest.mark.parametrize(("folder", "package"), [("training", "evit_training"), ("evit_hf", "evit_hf")])
def test_no_module_imports_itself_through_others(folder, package):
    graph = run_time_imports(ROOT / folder, package)
    assert any(graph.values())
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_evit_hf_never_imports_the_trainer():
    for path in (ROOT / "evit_hf").glob("*.py"):
        assert "evit_training" not in path.read_text(), path


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("data/splits.py", "from ..learning import models"),
        ("measuring/timing.py", "def later():\n    from evit_training.loop.trainer import run_training"),
        ("sharing/hub.py", "if TYPE_CHECKING:\n    from ..loop.parts import Parts"),
        ("loop/steps.py", "from ..commands.train import main"),
        ("commands/push.py", "from .train import main"),
    ],
)
def test_an_import_upward_is_found(tmp_path, file, line):
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(line)
    assert len(imports_that_climb(tmp_path)) == 1


def test_a_circle_is_found(tmp_path):
    (tmp_path / "one.py").write_text("from .two import b")
    (tmp_path / "two.py").write_text("def later():\n    from . import one")
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(run_time_imports(tmp_path, "evit_hf")).static_order())
    (tmp_path / "two.py").write_text("if TYPE_CHECKING:\n    from . import one")
    assert run_time_imports(tmp_path, "evit_hf") == {"evit_hf.one": {"evit_hf.two"}, "evit_hf.two": set()}


def test_saved_folder_holds_the_code_that_remote_loading_needs(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.glob("*.py")}
    assert (
        {"configuration_evit.py", "cpu_inference.py", "modeling_evit.py", "pictures.py", "token_reorganization.py"}
        | {"gpu_inference.py", "tokens_left.py"}
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


def test_the_oldest_versions_that_are_tested_are_the_bounds():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = settings["options.extras_require"]
    text = settings["options"]["install_requires"] + "".join(
        extras.get(name, raw=True) for name in ("train", "export", "works-with")
    )
    bounds = dict(re.findall(r"^([\w-]+)(?:\[.*\])? *>= *([\d.]+)", text, re.MULTILINE))
    bounds["gradio"] = re.search(r"gradio >= ([\d.]+)", extras.get("all", raw=True))[1]
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci" / "oldest.txt").read_text(), re.MULTILINE))
    assert {name: Version(bound) for name, bound in bounds.items()} == {
        name: Version(version) for name, version in tested.items()
    }
    assert "PIP_CONSTRAINT=$PWD/.ci/oldest.txt .ci/run" in (ROOT / "CONTRIBUTING.md").read_text()


def test_no_test_is_skipped():
    """A skipped test hides a hole; what takes long is marked slow, and .ci/run runs it."""
    for path in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(path.read_text())
        words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not words & {"skip", "skipif", "xfail", "importorskip"}, path
