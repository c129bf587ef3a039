"""The scripts for a GPU, docs/benchmarks/gpu, at a tiny size on the CPU."""

import importlib
import json
import re
import sys

import pytest
import torch
import yaml
from conftest import ROOT
from vision_families import HAS_DINOV2, build, inputs

from evit_hf import reorganize
from evit_hf.token_reorganization import rearrange_tokens
from evit_training.measuring import timing
from evit_training.measuring.comparisons import merged_pairs
from evit_training.studies.study import read_study


FOLDER = ROOT / "docs" / "benchmarks" / "gpu"


@pytest.fixture
def script(monkeypatch):
    """Import a script of the kit by name; matrix products need not be timed."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.setattr(timing, "matmul_peak", lambda *args: 1e6)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("shares", 3),
        pytest.param("graphs", 1, marks=pytest.mark.slow),
        pytest.param("counted", 4, marks=pytest.mark.slow),
        pytest.param("train_step", 3, marks=pytest.mark.slow),
    ],
)
def test_a_script_measures_all_its_sections(name, sections, script, monkeypatch, tmp_path):
    module = script(name)
    if name == "counted" and not HAS_DINOV2:
        monkeypatch.setattr(module, "SETTINGS", module.SETTINGS[1:])
        sections -= 1
    assert module.main(["--dry-run", "--output-dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert [section["data"] is not None for section in report["sections"]] == [True] * sections
    assert (tmp_path / f"{name}.md").read_text().count("\n## ") == sections


def test_what_fails_or_has_no_time_left_is_noted_and_the_rest_is_measured(script, tmp_path):
    kit = script("kit").Kit("some", "", ["--dry-run", "--minutes", "1", "--output-dir", str(tmp_path)])
    kit.measure("broken", lambda: 1 / 0)
    kit.measure("long", lambda: pytest.fail("was started"), seconds=100)
    kit.measure("good", lambda: ("a table", [1]))
    assert kit.finish() == 1
    texts = [section["text"] for section in json.loads((tmp_path / "some.json").read_text())["sections"]]
    assert texts[0] == "Failed: ZeroDivisionError: division by zero"
    assert texts[1].startswith("Not measured: it takes up to 100 s")
    assert texts[2] == "a table"


@pytest.mark.parametrize("more", [False, True])
def test_the_longer_study_of_cifar10_is_a_study_with_a_longer_start(more, script, tmp_path):
    packaged, path = read_study("cifar10"), tmp_path / "cifar10.yaml"
    path.write_text(yaml.safe_dump(script("cifar10").longer(30, tmp_path, more, False), sort_keys=False, width=1000))
    study = read_study(str(path))
    assert "30 epochs" in study.about
    assert study.claims == packaged.claims
    changed = {name for name, words in packaged.settings.items() if study.settings[name] != words}
    assert changed == {"start", "0.5 fused, from scratch"}
    added = study.settings.keys() - packaged.settings.keys()
    assert added == (
        {f"{name}, from scratch" for name in ("0.7 fused", "0.7 dropped", "0.5 dropped")} if more else set()
    )
    for name, flags in study.settings.items():
        if name.endswith("from scratch"):
            assert flags[flags.index("--epochs") + 1] == "31"
            assert flags[flags.index("--keep-rate") + 1] == name.split()[0]
            assert ("dropped" in flags) == ("dropped" in name)


@torch.no_grad()
def test_tome_merges_the_most_similar_pairs_into_means(script):
    script("counted")  # which finds families.py
    families = script("families")
    keys = torch.nn.functional.normalize(torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    sizes = torch.tensor([[1.0, 2, 1, 3, 1, 1, 2]] * 2)
    hidden = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1))
    choice = merged_pairs(None, 5, num_prefix_tokens=1, keys=keys, token_sizes=sizes)
    with families.tome():
        merged = rearrange_tokens(hidden, choice)
    assert choice.counted.token_sizes.sum(1).tolist() == [11, 11]
    for i in range(2):
        alike = keys[i, ::2] @ keys[i, 1::2].T
        members = {odd: [odd] for odd in (1, 3, 5)}
        gone = sorted(range(4), key=lambda even: -alike[even].max().item())[:2]
        for even in gone:
            members[1 + 2 * alike[even].argmax().item()].append(2 * even)
        members |= {2 * even: [2 * even] for even in range(4) if even not in gone}
        assert set(members) == set(choice.attentive_index[i].tolist())
        for place, token in enumerate(choice.attentive_index[i].tolist()):
            weights = sizes[i, members[token]]
            mean = (hidden[i, 1:][members[token]] * weights[:, None]).sum(0) / weights.sum()
            torch.testing.assert_close(merged[i, 1 + place], mean)
    model = reorganize(build("clip"), macs=0.66)
    counted = model(**inputs("clip"))
    with families.tome():
        output = model(**inputs("clip"))
    assert output.last_hidden_state.shape == counted.last_hidden_state.shape
    assert not torch.allclose(output.last_hidden_state, counted.last_hidden_state)
    assert torch.equal(model(**inputs("clip")).last_hidden_state, counted.last_hidden_state)


def test_the_readme_lists_all_scripts_in_commands_that_fit_one_call():
    text = (FOLDER / "README.md").read_text()
    calls = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert max(map(len, calls)) <= 2000
    scripts = {path.name for path in FOLDER.glob("*.py")} - {"kit.py"}
    assert {name for name in scripts if any(f"/{name} " in call for call in calls)} == scripts
