"""Every code block of the README runs as written, on local substitutes for what it would download."""

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys

import datasets
import pytest
import torch
import transformers
from conftest import ROOT, tiny_config_with
from PIL import Image
from real_processes import evit
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from vision_families import HAS_DINOV2

from evit_hf import EViTForImageClassification
from evit_training.arguments import parse_train_arguments
from evit_training.cli import COMMANDS, main


README = (ROOT / "README.md").read_text()
SETUP_COMMANDS = [line for line in README.splitlines() if line.startswith("python3 -m venv")]


DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("training/*.md")])


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with small local files under the names that the README uses."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 64}
    vit = ViTForImageClassification(ViTConfig(**small, image_size=224, patch_size=16, num_labels=10))
    vit.save_pretrained("google/vit-base-patch16-224")
    processor = ViTImageProcessor(size={"height": 224, "width": 224}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained("google/vit-base-patch16-224")
    # Before Transformers 5.18 DINOv2 cannot be reorganized: there a BEiT with as many patches takes its place.
    small |= {"image_size": 224, "patch_size": 14, "num_labels": 10}
    name = "Dinov2" if HAS_DINOV2 else "Beit"
    config = getattr(transformers, f"{name}Config")(**small)
    dinov2 = getattr(transformers, f"{name}ForImageClassification")(config)
    dinov2.save_pretrained("facebook/dinov2-base-imagenet1k-1-layer")
    processor.save_pretrained("facebook/dinov2-base-imagenet1k-1-layer")
    EViTForImageClassification(tiny_config_with()).save_pretrained("runs/digits/model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("runs/digits/model")
    Image.effect_noise((300, 200), 60).convert("RGB").save("cat.jpg")
    Image.effect_noise((8, 8), 60).save("digit.png")
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.ClassLabel(names=["a", "b", "c"])})
    for split in ("train", "validation"):
        rows = {"image": [Image.new("RGB", (50, 50), (80 * i, 9, 9)) for i in range(3)], "labels": [0, 1, 2]}
        (tmp_path / "AI-Lab-Makerere" / "beans").mkdir(parents=True, exist_ok=True)
        rows = datasets.Dataset.from_dict(rows, features=features)
        rows.to_parquet(tmp_path / "AI-Lab-Makerere" / "beans" / f"{split}.parquet")
    return tmp_path


def test_python_blocks_run_one_after_another(workplace, capsys):
    blocks, namespace = code_blocks("python"), {}
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "[180, 127, 90]" in printed
    assert "eval_loss" in printed
    assert Image.open("kept.png").height > 224
    assert EViTForImageClassification.from_pretrained("runs/beans/checkpoint-5").config.keep_rate == 0.7


def test_the_quick_start_runs(workplace, capsys):
    text = (ROOT / "docs" / "quickstart.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, "quickstart.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[1] == re.search(r"are left: (.*)", block)[1]
    for command in commands_in(text):
        if command.startswith(("predict", "visualize")):
            main(shlex.split(command))
    assert "cat.jpg: LABEL_" in capsys.readouterr().out
    assert Image.open("kept.png").width > 224


def test_training_command_runs(workplace):
    (command,) = [block for block in code_blocks("bash") if block.startswith("evit train")]
    words = shlex.split(command.replace("\\\n", " "))
    assert parse_train_arguments(words[2:]).optimization.epochs == 5
    # The dataset of the stand-in is as small as three images.
    ended = evit(*words[1:], "--num_workers", "0", cwd=workplace)
    assert ended.status == 0, ended.stderr
    assert (workplace / "runs" / "beans" / "model" / "model.safetensors").is_file()
    (command,) = [block for block in code_blocks("bash") if block.startswith("evit evaluate")]
    ended = evit(*shlex.split(command)[1:], "--num_workers", "0", cwd=workplace)
    assert ended.status == 0, ended.stderr
    assert "1.0 (dense ViT)" in ended.stdout
    assert (workplace / "runs" / "beans" / "model" / "evaluation.png").is_file()


def test_sharing_and_deployment_commands_run(workplace):
    blocks = [block for block in code_blocks("bash") if "runs/digits" in block]
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert [words[:2] for words in commands] == [
        ["evit", "push"],
        ["evit", "space"],
        ["evit", "export"],
        ["python", "exported/example.py"],
    ]
    for words in commands[1:3]:
        ended = evit(*words[1:], cwd=workplace)
        assert ended.status == 0, ended.stderr
    command = [sys.executable, *commands[3][1:]]
    process = subprocess.run(command, cwd=workplace, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("digit.png LABEL_")
    assert (workplace / "demo" / "app.py").is_file()


def test_flags_of_the_deployment_guide_exist(flags_by_command):
    from evit_hf.export import FORMATS

    text = (ROOT / "docs" / "deployment.md").read_text()
    known = {flag for word in ("benchmark", "tune", "export") for flag in flags_by_command[word]}
    flags = set(re.findall(r"--[a-z][\w-]*", text))
    assert flags <= known, flags - known
    assert set(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)) == set(FORMATS)


def test_ci_runs_the_commands_of_the_readme():
    assert len(SETUP_COMMANDS) == 2
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert set(SETUP_COMMANDS) <= set(ci)


def test_readme_names_files_that_exist():
    for name in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / name).exists(), name
    for line in re.findall(r"^\| (`.*?`) \|", README, re.MULTILINE):
        folder = ""
        for name in re.findall(r"`(.*?)`", line):
            path = name if "/" in name else f"{folder}/{name}"
            folder = path.rsplit("/", 1)[0]
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_a_document_lead_somewhere(path):
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", path.read_text()):
        target = path.parent / name if name else path
        assert target.exists(), name
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def flags_by_command():
    """What `evit COMMAND --help` lists, for each command."""
    flags = {}
    for word in COMMANDS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            importlib.import_module(f"evit_training.commands.{word}").main(["--help"])
        flags[word] = {flag.replace("_", "-") for flag in re.findall(r"--[a-z][\w-]*", text.getvalue())}
    return flags


def commands_in(text):
    """The `evit ...` commands of a document, in blocks and in running text, each as one line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    lines = [re.sub(r"#.*", "", line).replace("\n", " ").strip() for line in lines]
    return [line.split(" -m evit_training ")[-1].removeprefix("evit ") for line in lines if is_command(line)]


def is_command(line):
    return line.startswith("evit ") or " -m evit_training " in line


# The changelog also names what is gone.
@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if path.name != "CHANGELOG.md"],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_commands_of_a_document_exist_with_their_flags(path, flags_by_command):
    for command in commands_in(path.read_text()):
        word, words_of_train = command.split()[0], ""
        if word == "study":
            command, _, words_of_train = command.partition(" -- ")
        if word == "WORD" or word == "COMMAND":
            continue
        assert word in COMMANDS, command
        for name, words in ((word, command), ("train", words_of_train)):
            flags = {flag.replace("_", "-") for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", words)}
            unknown = flags - flags_by_command[name] - {"--help", "--flag"}
            assert not unknown, words


def test_an_unknown_command_or_flag_is_found():
    assert commands_in("a\n```bash\nevit tune M \\\n  --x 1  # comment\n```\n`evit\npush` `other`") == [
        "tune M    --x 1",
        "push",
    ]


def test_readme_table_holds_the_computed_costs():
    from evit_hf import EViTConfig
    from evit_hf.profiling import num_macs, num_tokens_by_layer

    rows = re.findall(r"^\| (0\.\d) \| ([\d /]+) \| ([\d.]+) / ([\d.]+) \|", README, re.MULTILINE)
    assert [row[0] for row in rows] == ["0.9", "0.8", "0.7", "0.6", "0.5"]
    for keep_rate, tokens, fused, dropped in rows:
        size = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}
        config = EViTConfig(**size, keep_rate=float(keep_rate))
        counts = num_tokens_by_layer(config)
        assert tokens == " / ".join(str(counts[layer][1] - 1) for layer in (3, 6, 9))
        assert f"{num_macs(config) / 1e9:.2f}" == fused
        config.inattentive_tokens = "dropped"
        assert f"{num_macs(config) / 1e9:.2f}" == dropped


def test_flags_and_recipes_of_the_training_guide_exist():
    from evit_training.arguments import RECIPES, SETTINGS

    text = (ROOT / "docs" / "training.md").read_text()
    elsewhere = {"help", "flag", "keep_rates", "dataset"} | {"nproc_per_node", "nnodes", "node_rank", "rdzv_endpoint"}
    elsewhere |= {"num_machines", "machine_rank", "main_process_ip", "num_processes", "multi_gpu", "use_fsdp"}
    elsewhere |= {"fsdp_version", "fsdp_auto_wrap_policy", "fsdp_transformer_layer_cls_to_wrap"}
    elsewhere |= {"cpus_per_task", "gres", "open_mode", "requeue", "signal", "time"}  # Slurm's
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*)", text)}
    assert flags <= set(SETTINGS) | elsewhere, flags - set(SETTINGS) - elsewhere
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == {path.stem for path in RECIPES.glob("*.yaml")}


def test_conversion_command_parses():
    from evit_training.commands.convert import parser

    (command,) = [block for block in code_blocks("bash") if block.startswith("evit convert")]
    assert parser().parse_args(shlex.split(command)[2:]).keep_rate == [0.7]
