import json

import pytest
from conftest import ROOT


FEW = "--max-train-samples 64 --max-eval-samples 20 --num-pictures 0"
NOTEBOOK = ROOT / "docs" / "vit_to_evit.ipynb"


def code_cells():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_was_executed_and_shows_what_it_says():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert "as in PyTorch: True" in "".join("".join(output.get("text", [])) for output in outputs)
    assert "/tmp" not in json.dumps(outputs)
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow  # trains two networks, a step each
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, cell in enumerate(code_cells()):
        source = "".join(cell["source"]).replace("train digits", f"train digits --max-steps 1 {FEW}")
        source = source.replace("--keep-rate 1.0", "--keep-rate 1.0 --hidden-size 32 --num-hidden-layers 5")
        source = source.replace("evaluate dense", "evaluate dense --max-eval-samples 20")
        exec(compile(source, f"cell {number}", "exec"), namespace)
    assert "as in PyTorch: True" in capsys.readouterr().out
