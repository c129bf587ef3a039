"""Every command ends what cannot work with one line and status 2, before it computes anything."""

import json

import pytest
import torch
from conftest import tiny_config_with
from hub_server import Fault, Hub
from transformers import BertConfig, ViTImageProcessor

from evit_hf import EViTForImageClassification
from evit_training.cli import main
from evit_training.commands import errors
from evit_training.data.augmentation import load_processor
from evit_training.learning.sources import resolve_model
from evit_training.settings import FlagParser


# Commands as they are called with a model.
CALLS = {
    "train": ["train", "digits", "--dry-run", "--num-workers", "0", "--model", "MODEL"],
    "teacher": ["train", "digits", "--dry-run", "--num-workers", "0", "--teacher", "MODEL"],
    "evaluate": ["evaluate", "MODEL", "--dataset", "digits", "--num-workers", "0", "--max-eval-samples", "4"],
    "benchmark": ["benchmark", "MODEL", "--rounds", "1"],
    "tune": ["tune", "MODEL", "0.7", "--num-workers", "0"],
    "export": ["export", "MODEL", "out"],
    "space": ["space", "MODEL", "out"],
    "convert": ["convert", "MODEL", "out"],
}


def one_line(capsys, argv, status=2):
    """What a command says when it ends: one line."""
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in argv])
    assert exit_.value.code == status
    text = capsys.readouterr().err
    own = [line for line in text.splitlines() if line.startswith("evit")]
    assert len(own) == 1
    assert "Traceback" not in text
    assert text.endswith(f"{own[0]}\n")
    return own[0]


def call(name, model):
    return [model if word == "MODEL" else word for word in CALLS[name]]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with wrong models of each kind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat.jpg").write_bytes(b"not a picture")
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    BertConfig().save_pretrained("bert")
    tiny_config_with().save_pretrained("weightless")
    for name, file, data in (
        ("broken", "model.safetensors", b"\0" * 100),
        ("garbled", "config.json", b'{"model_type": "evit", '),
        ("listed", "config.json", b"[1, 2]"),
    ):
        tiny_config_with().save_pretrained(name)
        (tmp_path / name / file).write_bytes(data)
    tiny_config_with().save_pretrained("impossible")
    config = json.loads((tmp_path / "impossible" / "config.json").read_text())
    (tmp_path / "impossible" / "config.json").write_text(json.dumps({**config, "keep_rate": 7.0}))
    return tmp_path


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_is_not_there_is_refused_in_one_line(name, workplace, capsys):
    for model, sentence in (
        ("./nowhere", "there is no folder `./nowhere`"),
        ("nowhere", "must be a model folder, a run folder or a Hub id (ORG/NAME), and there is no folder `nowhere`"),
        ("emtpy", "there is no folder `emtpy`: did you mean `empty`?"),
        ("empty", "`empty` is empty"),
        ("unfinished", "a run that has not ended"),
        ("evit-deit-xl", "neither a folder nor a preset of that name"),
        *([] if name == "convert" else [("cat.jpg", "is a file, `cat.jpg`: give the folder of a model")]),
        *([] if name == "space" else [("org/name", "HF_HUB_OFFLINE is set")]),
        *(
            []
            if name == "benchmark"
            else [("evit-deit-s", "is the preset `evit-deit-s`, which has no trained weights")]
        ),
    ):
        assert sentence in one_line(capsys, call(name, model))
    assert not (workplace / "out").exists()


@pytest.mark.parametrize("name", ["train", "evaluate", "benchmark", "tune", "export", "convert"])
@pytest.mark.parametrize("model", ["bert", "weightless", "broken", "garbled", "listed", "impossible"])
def test_a_model_that_cannot_be_loaded_is_refused_in_one_line(name, model, workplace, capsys):
    text = one_line(capsys, call(name, model))
    assert "Class validation error" not in text
    assert len(text) < 700
    assert not (workplace / "out").exists()


@pytest.mark.parametrize("name", ["evaluate", "benchmark", "tune"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(name, workplace, capsys):
    tiny_config_with().save_pretrained("weightless")
    text = one_line(capsys, [*call(name, "weightless"), "--output-dir", "cat.jpg"])
    assert "`--output-dir cat.jpg` cannot be written: " in text


def test_an_export_onto_a_full_disk_leaves_nothing_behind(workplace, capsys, monkeypatch):
    from evit_hf import export

    def write(program, inputs, path, output):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    EViTForImageClassification(tiny_config_with()).save_pretrained("whole")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("whole")
    before = sorted(workplace.iterdir())
    monkeypatch.setitem(export._WRITERS, "torch-export", write)
    assert "No space left on device" in one_line(capsys, ["export", "whole", "out/put", "--format", "torch-export"])
    assert sorted(workplace.iterdir()) == before


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ({"status": 401}, "the Hub did not give `org/model`"),
        ({"status": 500}, "the Hub did not give `org/model`: status 500"),
        (None, "neither a folder nor a model that the Hub shows you: `org/model`"),
        ("gone", "could not be asked for `org/model`"),
    ],
)
def test_what_the_hub_does_not_give_is_said_quickly(fault, sentence, monkeypatch, tmp_path):
    from huggingface_hub import constants

    with Hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        url = "http://127.0.0.1:9" if fault == "gone" else hub.url
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        if isinstance(fault, dict):
            hub.faults.append(Fault("org/model", fault["status"]))
        with pytest.raises(ValueError, match=sentence):
            resolve_model("org/model")


def test_a_gated_model_is_asked_for_where_access_is_given(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args, **kwargs):
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(
        ValueError, match="is gated on the Hub: ask for access at http.*org/model, then `hf auth login`"
    ):
        resolve_model("org/model")


def test_a_run_folder_is_its_model(tmp_path):
    torch.manual_seed(0)
    EViTForImageClassification(tiny_config_with()).save_pretrained(tmp_path / "run" / "model")
    assert resolve_model(str(tmp_path / "run")) == str(tmp_path / "run" / "model")
    assert resolve_model(str(tmp_path / "run" / "model")) == str(tmp_path / "run" / "model")


def test_a_model_without_processor_is_refused_by_what_needs_one(tmp_path, capsys):
    EViTForImageClassification(tiny_config_with()).save_pretrained(tmp_path / "model")
    assert "no readable preprocessor_config.json" in one_line(capsys, ["export", tmp_path / "model", tmp_path / "out"])
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "content",
    [b"[1]", b"7", b"\xff\xfe\x00", b'{"image_processor_type": [], "size": "x"}'],
    ids=["list", "7", "bytes", "kinds"],
)
def test_a_damaged_processor_is_refused_with_its_name(content, tmp_path):
    (tmp_path / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(ValueError, match="no readable preprocessor_config.json"):
        load_processor(str(tmp_path))


@pytest.mark.parametrize(
    ("module", "argv"),
    [("accelerate", call("train", "")[:-2]), ("onnx", ["export", "MODEL", "out"])],
    ids=["train", "export"],
)
def test_a_missing_extra_is_named(module, argv, monkeypatch, capsys):
    def missing(words):
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    with pytest.raises(SystemExit, match="2"):
        errors.command(argv[0])(missing)(argv[1:])
    assert f'`{module}` is not installed: pip install "evit-hf[' in capsys.readouterr().err


@pytest.mark.parametrize("word", ["train", "evaluate", "benchmark", "tune", "export", "push", "space", "convert"])
def test_a_mistyped_flag_is_answered_in_one_line(word, capsys):
    argv = {"train": [], "tune": ["m", "0.5"], "benchmark": []}.get(word, ["a", "b"][: 1 + (word != "evaluate")])
    assert f"see `evit {word} --help`" in one_line(capsys, [word, *argv, "--quantum-leap", "1"])


def test_a_bug_keeps_its_traceback():
    def main(words):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        errors.command("train")(main)([])


def test_interruptions_and_closed_pipes_end_quietly(capsys, monkeypatch):
    def interrupted(words):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        errors.command("train")(interrupted)([])
    assert capsys.readouterr().err == "evit train: interrupted\n"


def test_a_flag_may_be_spelled_with_underscores_and_values_are_left_alone():
    from evit_training.commands.convert import parser

    assert isinstance(parser(), FlagParser)
    (arguments,), rest, given = parser().parse(["a_b", "c", "--keep_rate=0.5", "--labels", "my_labels.txt"])
    assert (arguments.keep_rate, arguments.labels, rest.source) == ([0.5], "my_labels.txt", "a_b")
    assert given == {"keep_rate", "labels"}


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("push --private ./nowhere org/name", "`nowhere` is not a folder"),
        ("push --private yes ./nowhere org/name", "`nowhere` is not a folder"),
        ("push ./nowhere --check org/name", "`nowhere` is not a folder"),
        ("push --attempts 2 --private ./nowhere org/name more", "`more` is one word too many"),
        ("export --keep-rate-input ./nowhere out", "there is no folder `./nowhere`"),
        ("convert --keep-rate 0.7 0.5 ./nowhere out", "there is no folder `./nowhere`"),
        ("train --dry-run --epochs 2 nowhere", "There is no recipe `nowhere`"),
        ("train --dry-run digits nowhere", "`nowhere` is one word too many after the recipe"),
    ],
)
def test_flags_may_come_before_what_they_belong_to(argv, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in one_line(capsys, argv.split())


def test_the_version_is_printed_without_heavy_imports(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("evit-hf ")


def test_presets_are_listed_with_parameters_and_operations(capsys):
    main(["presets"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "preset"
    assert len(lines) > 18
    (row,) = [line.split() for line in lines if line.startswith("evit-deit-s ")]
    assert row[:3] == ["evit-deit-s", "224", "22.05"]
    assert float(row[5]) < float(row[3])
