"""To a Hub and back over HTTP, with unmodified clients in processes of their own, and what happens when it fails."""

import datetime
import email.utils
import functools
import html
import json
import os
import re
import shlex
import shutil
import time

import pytest
import real_processes
import torch
import yaml
from conftest import run_new_python, run_python, tiny_config_with
from hub_server import READ_TOKEN, TOKEN, Commit, Fault, Hub, Repo
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from training_runs import SMALL, read_log
from transformers import ViTImageProcessor

import evit_hf
from evit_hf import EViTForImageClassification, EViTModel
from evit_training.sharing.card import (
    card_to_push,
    keep_what_was_added,
    render_folder_card,
    render_run_card,
    wilson_interval,
)
from evit_training.sharing.command import command_of_run, public_command, without_paths
from evit_training.sharing.hub import HubRepo, PushError, check_card, export_folder, plain_text, seconds_to_wait


REPO = "org/evit-digits"


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(autouse=True)
def no_faults(request):
    yield
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").faults.clear()


def evit(*argv, env, status=0):
    ended = real_processes.evit(*argv, imports=real_processes.FRESH, environment=env)
    assert ended.status == status, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """A run that was pushed after each epoch and at the end."""
    folder = tmp_path_factory.mktemp("pushed")
    flags = ["train", *SMALL, "--num_pictures", "2", "--push_to_hub", REPO, "--push_when", "epoch"]
    text = evit(*flags, "--output_dir", folder / "run", env=hub.environment(folder / "home"))
    assert f"Pushed to {REPO}." in text
    return folder / "run"


@pytest.fixture
def model_folder(tmp_path):
    torch.manual_seed(0)
    EViTForImageClassification(tiny_config_with()).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# There


def test_what_was_pushed_is_the_model_and_nothing_else(hub, pushed):
    files = hub.files(REPO)
    code = {path.name for path in (pushed / "model").glob("*.py")}
    assert {"configuration_evit.py", "modeling_evit.py", "token_reorganization.py", "pictures.py"} <= code
    assert set(files) == code | {
        ".gitattributes",
        "README.md",
        "arguments.yaml",
        "class_report.json",
        "config.json",
        "kept_patches.png",
        "model.safetensors",
        "preprocessor_config.json",
        "results.json",
        "tradeoff.png",
    }
    assert files["model.safetensors"] == (pushed / "model" / "model.safetensors").read_bytes()
    assert f'__version__ = "{evit_hf.__version__}"' in files["configuration_evit.py"].decode()
    messages = [commit.message for commit in hub.repos[f"models/{REPO}"].branches["main"]]
    assert messages[0] == "initial commit"
    assert messages[-1] == "EViT after 18 optimizer steps"
    assert any(re.fullmatch(r"EViT after \d+ of 18 optimizer steps", message) for message in messages)


def test_the_card_tells_the_results_of_the_run(hub, pushed):
    card = hub.files(REPO)["README.md"].decode()
    metadata = check_card(card)
    results = json.loads((pushed / "results.json").read_text())
    for result in results:
        assert f"| {100 * result['top1']:.2f} | {100 * result['top5']:.2f} | {result['gmacs']:.4f} |" in card
    (metric,) = metadata["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == round(100 * results[1]["top1"], 2)
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in card
    assert "evit train digits" in card
    assert "(kept_patches.png)" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    compile(code, "card", "exec")


def test_the_code_of_the_card_runs_as_pasted(hub, pushed, tmp_path):
    card = hub.files(REPO)["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    Image.effect_noise((40, 30), 90).save(tmp_path / "image.jpg")
    output = run_python(code, tmp_path, without_package=True, **hub.environment(tmp_path / "home", token=""))
    assert output.strip() in json.loads((pushed / "class_report.json").read_text())["label_names"]
    (result,) = model_index_to_eval_results(check_card(card)["model-index"])[1]
    assert result.task_type == "image-classification"
    assert 0 <= result.metric_value <= 100


def test_nothing_secret_is_pushed(tmp_path, model_folder):
    for name in (".env", "optimizer.pt", "training_args.bin", "pytorch_model.bin", ".tmpXYZ", "notes.txt"):
        (model_folder / name).write_text("HF_TOKEN=hf_secret")
    (tmp_path / "outside.json").write_text("secret")
    (model_folder / "results.json").symlink_to(tmp_path / "outside.json")
    code = {path.name for path in model_folder.glob("*.py")}
    (model_folder / "export.py").write_text("HF_TOKEN = 'hf_secret'")  # not the package's: nothing imports it
    names = export_folder(model_folder, tmp_path / "export")
    assert set(names) == code | {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    with pytest.raises(ValueError, match="holds no model: it needs config.json and model.safetensors"):
        export_folder(tmp_path / "home", tmp_path / "other")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize(
    "change", [lambda x: x[: len(x) // 2], lambda x: b"", lambda x: b"[1]"], ids=["half", "empty", "list"]
)
def test_a_damaged_model_is_not_pushed(name, change, tmp_path, model_folder):
    path = model_folder / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"is damaged: {name} .*train it again"):
        export_folder(model_folder, tmp_path / "export")


def test_local_paths_stay_local(model_folder, tmp_path):
    settings = {
        "dataset": ["/home/alice/ward-7", "*.csv"],
        "model": str(model_folder),
        "teacher": "google/vit",
        "epochs": 3,
    }
    (model_folder / "arguments.yaml").write_text(yaml.safe_dump(settings))
    report = {"model": "../alice/vit", "dataset": ["~/alice/beans"], "results": []}
    (model_folder / "evaluation.json").write_text(json.dumps(report))
    export_folder(model_folder, tmp_path / "export")
    pushed = yaml.safe_load((tmp_path / "export" / "arguments.yaml").read_text())
    assert pushed == {"dataset": ["ward-7", "*.csv"], "model": "model", "teacher": "google/vit", "epochs": 3}
    assert json.loads((tmp_path / "export" / "evaluation.json").read_text()) == {
        "model": "vit",
        "dataset": ["beans"],
        "results": [],
    }
    (model_folder / "arguments.yaml").write_text("dataset: [/home/alice")
    assert "arguments.yaml" not in export_folder(model_folder, tmp_path / "export")
    assert without_paths("https://example.org/a/b") == "https://example.org/a/b"
    assert public_command("evit train --dataset /home/alice/d --teacher=/x/y --epochs 3") == (
        "evit train --dataset d --teacher=y --epochs 3"
    )


@pytest.mark.parametrize(
    ("argv", "environment", "command"),
    [
        (["/usr/bin/evit", "train", "digits", "--epochs", "5"], {}, "evit train digits --epochs 5"),
        (
            ["/x/training/__main__.py", "train", "digits"],
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
            "torchrun --nnodes 2 --nproc-per-node 4 -m evit_training train digits",
        ),
        (["/x/ipykernel_launcher.py", "-f", "/home/alice/kernel.json"], {}, "evit train arguments.yaml"),
    ],
    ids=["evit", "torchrun", "notebook"],
)
def test_the_command_of_a_card_can_be_pasted(argv, environment, command):
    assert command_of_run(argv, environment) == command


# And back


LOAD = f"""
import json, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
IMPORT
processor = AutoImageProcessor.from_pretrained("{REPO}")
model = AutoModelForImageClassification.from_pretrained("{REPO}", **OPTIONS)
image = Image.new("RGB", (20, 20), (200, 30, 90))
pixels = processor(image, return_tensors="pt").pixel_values
classify = pipeline("image-classification", model="{REPO}", **OPTIONS)
answer = classify(image, top_k=1)[0]["label"]
print(json.dumps([type(model).__module__, model(pixels).logits.tolist(), answer]))
"""


@functools.cache
def expected_logits(pushed):
    """Of the folder on the disk, read by a process of its own too: the same numbers to the last bit."""
    code = LOAD.replace("IMPORT", "import evit_hf").replace("OPTIONS", "{}").replace(REPO, str(pushed / "model"))
    return json.loads(run_python(code, pushed.parent).splitlines()[-1])


@pytest.mark.parametrize("how", ["package", "remote code"])
def test_models_load_in_a_fresh_process_with_and_without_the_package(how, hub, pushed, tmp_path):
    if how == "package":
        code = LOAD.replace("IMPORT", "import evit_hf").replace("OPTIONS", "{}")
    else:
        code = LOAD.replace("IMPORT", "").replace("OPTIONS", "{'trust_remote_code': True}")
    environment = hub.environment(tmp_path / "home", token="")
    output = run_python(code, tmp_path, without_package=how != "package", **environment)
    module, logits, answer = json.loads(output.splitlines()[-1])
    assert module.startswith("evit_hf" if how == "package" else "transformers_modules")
    assert [logits, answer] == expected_logits(pushed)[1:]
    hub.requests.clear()
    again = (tmp_path / "again").mkdir() or tmp_path / "again"
    environment["HF_HUB_OFFLINE"] = "1"
    output = run_python(code, again, without_package=how != "package", **environment)
    assert json.loads(output.splitlines()[-1])[1:] == [logits, answer]
    assert hub.requests == []  # from the cache only


def test_plain_vit_reads_the_same_repository_as_the_dense_model(hub, pushed, tmp_path):
    code = f"""
import torch
from transformers import ViTForImageClassification
from evit_hf import EViTForImageClassification
dense = ViTForImageClassification.from_pretrained("{REPO}").eval()
evit = EViTForImageClassification.from_pretrained("{REPO}").eval()
pixels = torch.randn(2, 3, 32, 32)
torch.testing.assert_close(dense(pixels).logits, evit(pixels, keep_rate=1.0).logits, rtol=1e-5, atol=1e-5)
assert not torch.allclose(dense(pixels).logits, evit(pixels, keep_rate=0.3).logits)
print("equal")
"""
    assert "equal" in run_python(code, tmp_path, **hub.environment(tmp_path / "home", token=""))


def test_a_pushed_card_names_its_repository_and_keeps_what_people_wrote_here_and_there(hub, pushed, tmp_path):
    run, env = tmp_path / "run", hub.environment(tmp_path / "home")
    shutil.copytree(pushed, run)
    evit("push", run, "org/renamed", env=env)
    card = hub.files("org/renamed")["README.md"].decode()
    assert 'from_pretrained("org/renamed", trust_remote_code=True)' in card
    assert f'from_pretrained("{REPO}"' not in card
    assert "# evit-digits" not in card
    # Somebody edits the card on the Hub; the next push keeps that, and one more changes nothing.
    repo = hub.repos["models/org/renamed"]
    repo.commit("main").files["README.md"] = (card.rstrip() + "\n\n## Thanks\n\nTo the digits.\n").encode()
    evit("push", run, "org/renamed", "--message", "again", env=env)
    assert "## Thanks" in hub.files("org/renamed")["README.md"].decode()
    # Somebody edits it here: that goes up, and is said to replace what was there.
    (run / "README.md").write_text((run / "README.md").read_text() + "\n## My notes\n")
    text = evit("push", run, "org/renamed", env=env)
    assert "## My notes" in hub.files("org/renamed")["README.md"].decode()
    assert "it stays in the repository's history" in text
    commits = len(repo.branches["main"])
    evit("push", run, "org/renamed", env=env)
    assert len(repo.branches["main"]) == commits


def test_a_folder_without_card_gets_one_that_claims_nothing(hub, model_folder, tmp_path):
    env = hub.environment(tmp_path / "home")
    evit("push", model_folder, "org/bare", env=env)
    card = hub.files("org/bare")["README.md"].decode()
    metadata = check_card(card)
    assert "model-index" not in metadata
    assert "Its accuracy was not measured" in card
    assert "| 0.7 | 0.00" in card
    assert 'from_pretrained("org/bare", trust_remote_code=True)' in card
    row = {"keep_rate": 0.6, "top1": 0.5, "top5": 1.0, "gmacs": 0.1, "images_per_second": 7.0, "num_images": 9}
    report = {"dataset": ["/secret/place/beans"], "results": [{**row, "device": "cpu", "dtype": "float32"}]}
    report["results"][0]["batch_size"] = 4
    (model_folder / "evaluation.json").write_text(json.dumps(report))
    evit("push", model_folder, "org/measured", env=env)
    card = hub.files("org/measured")["README.md"].decode()
    assert "| 0.6 | 50.00 | 100.00 | 0.1000 | 7 |" in card
    assert "secret" not in card


def test_models_push_themselves_with_their_code(hub, model_folder, tmp_path):
    code = f"""
from transformers import AutoImageProcessor
from evit_hf import EViTForImageClassification
model = EViTForImageClassification.from_pretrained(r"{model_folder}")
model.push_to_hub("org/itself", private=True, commit_message="by hand", revision="dev")
AutoImageProcessor.from_pretrained(r"{model_folder}").push_to_hub("org/itself", revision="dev")
"""
    env = hub.environment(tmp_path / "home")
    run_python(code, tmp_path, **env)
    repo = hub.repos["models/org/itself"]
    assert repo.private
    assert {"modeling_evit.py", "preprocessor_config.json"} <= set(hub.files("org/itself", "dev"))
    load = """
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("org/itself", revision="dev", trust_remote_code=True)
print(type(model).__module__, model.config.keep_rate)
"""
    (tmp_path / "other").mkdir()
    module, keep_rate = run_python(load, tmp_path / "other", without_package=True, **env).split()
    assert module.startswith("transformers_modules")
    assert keep_rate == "0.6"


def test_private_repositories_branches_and_pinned_revisions(hub, model_folder, tmp_path):
    env = hub.environment(tmp_path / "home")
    evit("push", model_folder, "org/secret", "--private", "--revision", "v1", "--message", "first", env=env)
    repo = hub.repos["models/org/secret"]
    assert repo.private
    assert repo.branches["v1"][-1].message == "first"
    assert "model.safetensors" not in repo.commit("main").files
    sha = repo.commit("v1").sha
    code = """
from evit_hf import EViTForImageClassification
for revision in ("v1", "SHA"):
    print(EViTForImageClassification.from_pretrained("org/secret", revision=revision).config.keep_rate)
"""
    assert run_python(code.replace("SHA", sha), tmp_path, **env).split() == ["0.6", "0.6"]


# When the Hub fails


@pytest.mark.parametrize(
    ("token", "words"), [("hf_wrong", "no valid token"), (READ_TOKEN, "this token may not write")]
)
def test_missing_rights_are_found_before_training(token, words, hub, tmp_path):
    flags = ["train", *SMALL, "--push_to_hub", "org/never", "--output_dir", tmp_path / "run"]
    text = evit(*flags, env=hub.environment(tmp_path / "home", token=token), status=2)
    assert "`--push-to-hub` cannot work" in text
    assert words in text
    assert not (tmp_path / "run").exists()
    assert "models/org/never" not in hub.repos


@pytest.mark.parametrize(
    "fault",
    [
        Fault(r"POST .*/commit/", 503, 2),
        Fault(r"POST .*/commit/", "drop", 1),
        Fault(r"PUT /lfs/", "drop", 1),
        pytest.param(Fault(r"POST /api/repos/create", 502, 1), marks=pytest.mark.slow),
        pytest.param(Fault(r"POST .*/preupload/", 429, 1), marks=pytest.mark.slow),
        pytest.param(Fault(r"POST .*/commit/", "hang", 1), marks=pytest.mark.slow),
    ],
    ids=["503 twice", "drop commit", "drop upload", "502", "429", "hang"],
)
def test_passing_failures_are_waited_out(fault, hub, model_folder, tmp_path):
    with torch.no_grad():
        model = EViTForImageClassification.from_pretrained(model_folder)
        model.classifier.bias.fill_(float(len(hub.requests)))  # other weights each time
    model.save_pretrained(model_folder)
    hub.faults.append(fault)
    text = evit("push", model_folder, "org/patient", "--timeout", "3", env=hub.environment(tmp_path / "home"))
    assert "Pushed to" in text
    assert hub.files("org/patient")["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()


def test_a_hub_that_stays_away_ends_with_the_command_that_finishes_the_job(hub, tmp_path):
    hub.faults.append(Fault(r"POST .*/commit/", 503))
    env = hub.environment(tmp_path / "home")
    flags = ["train", *SMALL, "--push_to_hub", "org/later", "--push_when", "epoch", "--output_dir", tmp_path / "run"]
    text = evit(*flags, env=env, status=5)
    assert "The run is saved, but the Hub did not take it" in text
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert [e["step"] for e in read_log(tmp_path / "run") if "eval_top1" in e] == [6, 12, 18]  # and was not held up
    command = shlex.split(text.rsplit("To finish the job: ", 1)[1].splitlines()[0])
    assert command[:2] == ["evit", "push"]
    assert "hf_testtoken" not in text + (tmp_path / "run" / "push.log").read_text()
    hub.faults.clear()
    evit(*command[1:], env=env)
    commits = len(hub.repos["models/org/later"].branches["main"])
    evit(*command[1:], env=env)
    assert len(hub.repos["models/org/later"].branches["main"]) == commits  # again is nothing new


@pytest.mark.slow
def test_a_hub_that_hangs_holds_up_nothing_and_is_given_up(hub, tmp_path):
    env = hub.environment(tmp_path / "home")
    evit("push", make_model(tmp_path), "org/hung", env=env)
    hub.faults.append(Fault(r"POST .*/commit/", "hang"))
    flags = ["train", *SMALL, "--push_to_hub", "org/hung", "--push_when", "epoch", "--push_minutes", "0.15"]
    text = evit(*flags, "--output_dir", tmp_path / "run", env=env, status=5)
    assert "The run is saved" in text


def make_model(folder):
    EViTForImageClassification(tiny_config_with()).save_pretrained(folder / "some")
    return folder / "some"


def test_a_push_that_cannot_work_is_refused_with_status_2_or_5(hub, model_folder, tmp_path):
    env = hub.environment(tmp_path / "home", token="hf_wrong")
    assert "no valid token" in evit("push", model_folder, "org/x", env=env, status=5)
    (tmp_path / "empty").mkdir()
    assert "holds no model" in evit("push", tmp_path / "empty", "org/x", env=env, status=2)
    assert "a/b/c" in evit("push", model_folder, "a/b/c", env=env, status=2)
    assert "must be named ORG/NAME" in evit("push", model_folder, "digits", env=env, status=2)


@pytest.fixture
def here(hub, monkeypatch):
    """Lets this process talk to the Hub of the tests."""
    from huggingface_hub import close_session, constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", _http._GLOBAL_CLIENT_FACTORY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    close_session()


def put_card(hub, name, content):
    put(hub, name, {"README.md": content})
    return hub.repos[f"models/{name}"]


CARD_OF_SOMEBODY = b"---\nlicense: mit\n---\n\n# Mine\n"


@pytest.mark.parametrize("path", ["GET .*/README.md", "POST .*/paths-info/"])
@pytest.mark.parametrize(
    "what",
    [
        401,
        403,
        404,
        409,
        412,
        429,
        500,
        503,
        b"<html>Log in</html>",
        b"\x00\xff",
        b"",
        b"[]",
        b"{}",
        "truncate",
        "drop",
    ],
)
def test_a_card_that_could_not_be_read_is_never_overwritten(what, path, here, model_folder, tmp_path):
    repo = put_card(here, "org/unreadable", CARD_OF_SOMEBODY)
    export_folder(model_folder, tmp_path / "export")
    here.faults.append(Fault(path, what))
    reasons = "status|no valid token|may not write|not found|could not be read|makes no sense|disconnected|reset|body"
    with pytest.raises(PushError, match=reasons):
        HubRepo("org/unreadable", attempts=1).push(tmp_path / "export", card=lambda there: "---\n---\nnew")
    assert len(repo.branches["main"]) == 1


def test_a_card_that_is_edited_during_a_push_is_read_again(here, model_folder, tmp_path):
    repo = put_card(here, "org/busy", CARD_OF_SOMEBODY)
    export_folder(model_folder, tmp_path / "export")
    seen = []

    def card(there):
        seen.append(there)
        if len(seen) == 1:
            files = {"README.md": CARD_OF_SOMEBODY + b"\nEdited.\n"}
            repo.branches["main"].append(Commit("b" * 40, files, set(), "edit", "2026-01-02T00:00:00.000Z"))
        return there.decode() + "\nPushed.\n"

    HubRepo("org/busy").push(tmp_path / "export", card=card)
    assert len(seen) == 2
    assert here.files("org/busy")["README.md"].decode().endswith("Edited.\n\nPushed.\n")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"---\nlicense: [mit\n---\n# Mine\n", "not valid YAML"),
        (b"---\n- license\n---\n# Mine\n", "got a list"),
        ("---\nlicense: mit\n---\n# Käse\n".encode("latin-1"), "not UTF-8"),
        ("# Mine\n".encode("utf-16"), "not UTF-8"),
    ],
    ids=["broken YAML", "a list", "latin-1", "utf-16"],
)
def test_a_card_that_cannot_be_merged_is_left_alone_in_words(content, reason, here, model_folder, tmp_path):
    repo = put_card(here, "org/foreign", content)
    export_folder(model_folder, tmp_path / "export")
    said = []

    def card(there):
        text, words = card_to_push(model_folder, tmp_path / "export", "org/foreign", there)
        said.append(words)
        return text

    HubRepo("org/foreign").push(tmp_path / "export", card=card)
    assert "on the Hub was left as it is" in said[0]
    assert reason in said[0]
    assert repo.commit("main").files["README.md"] == content
    assert "model.safetensors" in repo.commit("main").files


def test_a_card_that_this_machine_cannot_read_is_no_fault_of_the_hub(model_folder, tmp_path):
    export_folder(model_folder, tmp_path / "export")
    (model_folder / "README.md").mkdir()
    text, words = card_to_push(model_folder, tmp_path / "export", "org/x", None)
    assert text is None
    assert words == f"The card in {model_folder} was left as it is: Is a directory ({model_folder / 'README.md'})."


def test_a_fault_in_writing_the_card_is_not_taken_for_the_hubs(here, model_folder, tmp_path):
    export_folder(model_folder, tmp_path / "export")
    asked = []

    def card(there):
        asked.append(there)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="^a bug$") as failed:
        HubRepo("org/bug").push(tmp_path / "export", card=card)
    assert not isinstance(failed.value, PushError)
    assert len(asked) == 1


def test_a_folder_of_another_library_is_pushed_without_a_card(model_folder, tmp_path):
    for config in ('{"model_type": "vit"}', '{"architecture": "vit_tiny_patch16_224"}', "not json"):
        (model_folder / "config.json").write_text(config)
        export_folder(model_folder, tmp_path / "export")
        text, words = card_to_push(model_folder, tmp_path / "export", "org/x", None)
        assert text is None
        assert "config.json is" in words
        assert len(words.splitlines()) == 1


@pytest.mark.parametrize("path", ["GET .*/README.md", "POST .*/commit/", "POST .*/objects/batch"])
@pytest.mark.parametrize("headers", [{"Retry-After": "3600"}, {"RateLimit": '"api";r=0;t=300'}])
def test_all_waiting_counts_against_the_limit(path, headers, here, model_folder, tmp_path):
    here.faults.append(Fault(path, 429, headers=headers))
    export_folder(model_folder, tmp_path / "export")
    repo = HubRepo("org/limited", attempts=2)
    repo.limit_waiting(5)
    start = time.monotonic()
    with pytest.raises(PushError, match="asks to wait 3.*00 s; the limit is 10 s"):
        repo.push(tmp_path / "export", card=lambda there: None)
    assert time.monotonic() - start < 30


def test_how_long_the_hub_asks_to_wait():
    assert seconds_to_wait({}) == 0
    assert seconds_to_wait({"retry-after": "7"}) == 7
    date = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=100)
    assert 90 < seconds_to_wait({"retry-after": email.utils.format_datetime(date, usegmt=True)}) <= 100
    assert seconds_to_wait({"retry-after": "soon", "ratelimit": '"api";r=3;t=55'}) == 0


def test_a_push_leaves_the_client_of_the_process_as_it_is(here, model_folder, tmp_path):
    from huggingface_hub import get_session

    client = get_session()
    export_folder(model_folder, tmp_path / "export")
    HubRepo("org/polite").push(tmp_path / "export")
    assert get_session() is client
    assert client.timeout.read is None


def test_what_the_library_repeats_is_not_repeated_again(here, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    here.requests.clear()
    here.faults.append(Fault("POST .*/objects/batch", 503))
    with torch.no_grad():
        model = EViTForImageClassification.from_pretrained(model_folder)
        model.classifier.bias.fill_(7.0)
    model.save_pretrained(model_folder)
    export_folder(model_folder, tmp_path / "export")
    repo = HubRepo("org/once")
    repo.limit_waiting(30)
    with pytest.raises(PushError, match="status 503"):
        repo.push(tmp_path / "export")
    assert here.count("POST .*/objects/batch") == 6  # huggingface_hub's own


@pytest.mark.parametrize("word", ["push", "space"])
def test_help_comes_without_the_libraries(word, tmp_path):
    code = f"""
import sys
from evit_training.cli import main
try:
    main(["{word}", "--help"])
except SystemExit:
    print([name for name in ("torch", "transformers", "huggingface_hub", "yaml") if name in sys.modules])
"""
    assert run_new_python(code, tmp_path).splitlines()[-1] == "[]"


# The card


def test_the_interval_is_wilsons():
    assert wilson_interval(1.0, 8) == pytest.approx((67.56, 100.0), abs=0.01)
    assert wilson_interval(0.5, 100) == pytest.approx((40.38, 59.62), abs=0.01)


def test_a_card_tells_what_was_done(pushed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pushed, run)
    settings = yaml.safe_load((run / "arguments.yaml").read_text())
    record = json.loads((run / "run.json").read_text())
    assert record["num_epochs"] == 3
    assert record["dataset_licence"] == "cc-by-4.0"
    assert record["dataset_id"] is None
    card = render_run_card(run, REPO)
    assert "3 epochs in batches of 16" in card
    assert "licence: cc-by-4.0" in card
    assert "the 95 % interval of top-1 (Wilson) is" in card
    assert "datasets" not in check_card(card)
    settings.update(epochs=30.0, dataset=["/home/alice/ward-7"], model="/home/alice/vit")
    record.update(command="evit train --dataset /home/alice/ward-7", dataset_id="org/wards")
    (run / "arguments.yaml").write_text(yaml.safe_dump(settings))
    (run / "run.json").write_text(json.dumps(record))
    card = render_run_card(run, REPO)
    assert "3 epochs (of 30 planned)" in card
    assert "It started from vit." in card
    assert "alice" not in card
    assert "evit train --dataset ward-7\n" in card
    assert check_card(card)["datasets"] == ["org/wards"]
    assert "base_model" not in check_card(card)
    assert 'from_pretrained("run/model"' in render_run_card(run, None)


def test_a_card_tells_what_the_keep_rate_was_in_training(pushed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pushed, run)
    settings = yaml.safe_load((run / "arguments.yaml").read_text())

    def card(**changes):
        (run / "arguments.yaml").write_text(yaml.safe_dump(settings | changes))
        return " ".join(render_run_card(run, REPO).split())

    rate = json.loads((run / "class_report.json").read_text())["keep_rate"]
    assert f"keep rate 1.0 for 0.5 epochs, a cosine over 1.5 epochs, then keep rate {rate}. All" in card()
    assert "then keep rate" in card(keep_rate_shrink_epochs=2.5)
    assert f"then keep rate {rate}; the training ended after 3 epochs, before that." in card(keep_rate_shrink_epochs=9)
    phases = {"keep_rate_dense_epochs": 0, "keep_rate_shrink_epochs": 0}
    assert f"; keep rate {rate} from the first step on. All" in card(**phases)
    ranged = card(**phases, keep_rate_range=[0.5, 0.9])
    assert "; a rate drawn between 0.5 and 0.9 in each step. All" in ranged
    # A share of operations, which is a keep rate for each layer.
    rates = [0.8671875, 0.8482142857142857]
    for file in ("results.json", "class_report.json"):
        text = (run / file).read_text().replace(f'"keep_rate": {rate}', f'"keep_rate": {rates}')
        (run / file).write_text(text)
    shared = card(macs=0.8)
    assert "it keeps the shares 0.8672, 0.8482 (macs=0.8) of the image patches" in shared
    assert "| macs=0.8 |" in shared
    assert check_card(render_run_card(run, REPO))["model-index"][0]["results"][0]["metrics"][0]["name"] == (
        "top-1 at macs=0.8"
    )


def test_a_card_names_a_model_of_the_hub_as_its_base_and_none_of_this_machine(pushed, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(pushed, run)
    settings = yaml.safe_load((run / "arguments.yaml").read_text())
    record = json.loads((run / "run.json").read_text())
    assert record["base_model"] is None
    monkeypatch.chdir(tmp_path)  # where the folder is not
    for model, base, words in (("models/keep", None, "keep"), ("org/vit", "org/vit", "org/vit")):
        (run / "arguments.yaml").write_text(yaml.safe_dump(settings | {"model": model}))
        (run / "run.json").write_text(json.dumps(record | {"base_model": base, "started_from": words}))
        card = render_run_card(run, REPO)
        assert f"It started from {words}." in card
        assert check_card(card).get("base_model") == base


def test_the_card_of_a_model_with_several_labels_does_not_choose_one(pushed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pushed, run)
    results = json.loads((run / "results.json").read_text())
    rows = [{"micro_f1": row.pop("top1"), "exact_match": row.pop("top5"), **row} for row in results]
    (run / "results.json").write_text(json.dumps(rows))
    card = render_run_card(run, REPO)
    assert "argmax" not in card
    assert "(scores > 0.5)" in card
    assert "scores each of them whatever it sees" in card


def test_a_folder_card_tells_shares_of_operations_and_what_has_no_classifier_gets_none(model_folder, tmp_path):
    results = {"top1": 0.5, "top5": 1.0, "gmacs": 0.1, "images_per_second": 7.0, "num_images": 9, "batch_size": 3}
    results |= {"device": "a processor", "dtype": "float32"}
    report = {"dataset": ["digits"], "results": [{"keep_rate": 1.0, **results}, {"macs": 0.8, **results}]}
    (model_folder / "evaluation.json").write_text(json.dumps(report))
    card = render_folder_card(model_folder, REPO)
    assert "| 1.0 | 50.00 |" in card
    assert "| macs=0.8 | 50.00 |" in card
    counted = tmp_path / "counted"
    EViTForImageClassification(tiny_config_with(keep_rate=None, macs=0.8, image_size=64)).save_pretrained(counted)
    card = render_folder_card(counted, REPO)
    assert "(zero-based), macs=0.8, inattentive tokens counted" in card
    assert "| macs=0.8 | 0.0" in card
    bare = tmp_path / "bare"
    EViTModel(tiny_config_with()).save_pretrained(bare)
    text, words = card_to_push(bare, bare, REPO, None)
    assert text is None
    assert "config.json is of an EViTModel, which has no classifier" in words


@pytest.mark.parametrize("file", ["run.json", "results.json", "class_report.json", "arguments.yaml"])
def test_half_written_files_of_a_run_cost_its_card_and_no_traceback(file, pushed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pushed, run)
    for content in ("{", "[]", "{}", ""):
        (run / file).write_text(content)
        text, words = card_to_push(run, run / "model", REPO, None)
        assert text is None
        assert "was left as it is" in words
        assert len(words.splitlines()) == 1


@pytest.mark.parametrize("name", ["None", "nan", "TODO", "null", "no", "1e3", "007", "", "{{ x }}", "a: b", "- a"])
def test_classes_and_data_may_have_any_name(name, pushed, model_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pushed, run)
    (run / "README.md").unlink()
    report = json.loads((run / "class_report.json").read_text())
    report["label_names"][0] = name
    (run / "class_report.json").write_text(json.dumps(report))
    settings = yaml.safe_load((run / "arguments.yaml").read_text())
    settings.update(dataset=[name], eval_split=name or None)
    (run / "arguments.yaml").write_text(yaml.safe_dump(settings))
    card = render_run_card(run, "org/None")
    assert check_card(card)["model-index"][0]["name"] == "None"
    assert html.unescape(card).count(f"| {name or chr(34) * 2} |") >= 1
    config = json.loads((model_folder / "config.json").read_text())
    config["id2label"] = {"0": name, **{str(i): str(i) for i in range(1, 5)}}
    config["label2id"] = {label: int(i) for i, label in config["id2label"].items()}
    (model_folder / "config.json").write_text(json.dumps(config))
    assert "Classes (5): " in card_to_push(model_folder, model_folder, "org/x", None)[0]


def test_text_of_people_is_kept_whatever_they_write(pushed, tmp_path):
    card = (pushed / "README.md").read_text()
    theirs = card.replace("\n", "\r\n") + "\r\nTODO: None of {{ this }} is done.\r\n"
    text, words = card_to_push(pushed, pushed / "model", REPO, theirs.encode())
    assert words is None
    assert "TODO: None of {{ this }} is done." in text
    assert text.count("evit:begin") == 1


def test_names_from_outside_mean_nothing_to_markdown_html_or_tables():
    evil = "<script>alert(1)</script> | [x](javascript:y) `code` **b**\n# title\n---\nevit: 1"
    plain = plain_text(evil)
    assert not set("<>|[]`*\n#") & set(re.sub(r"&#?\w+;", "", plain))
    assert len(plain_text("x" * 1000)) == 200
    assert plain_text("tabby, cat-like (1.5)") == "tabby, cat-like &#40;1.5&#41;"


def test_evil_labels_stay_in_their_cells(pushed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pushed, run)
    (run / "README.md").unlink()
    report = json.loads((run / "class_report.json").read_text())
    evil = "<!-- evit:end -->\n---\nlicense: evil\n---\n| a | b |"
    report["label_names"][0] = evil
    (run / "class_report.json").write_text(json.dumps(report))
    card = render_run_card(run, REPO)
    assert check_card(card)["license"] == "apache-2.0"
    assert card.count("<!-- evit:end -->") == 1
    rows = [line for line in card.splitlines() if "license: evil" in line]
    assert len(rows) == 1
    assert rows[0].count("|") == 6


def test_rendering_again_keeps_what_a_person_added(pushed, tmp_path):
    card = (pushed / "README.md").read_text()
    mine = (
        card.replace("<!-- evit:begin -->", "My introduction.\n\n<!-- evit:begin -->").rstrip() + "\n\n## My notes\n"
    )
    mine = mine.replace("license: apache-2.0", "license: mit\nthumbnail: mine.png").replace("| 0.7 | ", "| 0.7 | old ")
    merged = keep_what_was_added(mine, card)
    assert "My introduction." in merged
    assert "## My notes" in merged
    assert "old " not in merged.split("evit:begin")[1].split("## Training")[0]
    metadata = check_card(merged)
    assert metadata["thumbnail"] == "mine.png"
    assert metadata["license"] == "apache-2.0"
    assert keep_what_was_added(merged, card) == merged
    unmarked = keep_what_was_added("# My own card\n", card)
    assert "# My own card" in unmarked
    assert "evit:begin" in unmarked


# Other ways there and back


@pytest.fixture
def xet_hub(tmp_path):
    (tmp_path / "storage").mkdir()
    with Hub(tmp_path / "storage") as server:
        yield server


def test_weights_go_through_xet_and_back(xet_hub, model_folder, tmp_path):
    """hf_xet as it is installed, with chunks, shards and deduplication; only its storage is a folder."""
    env = xet_hub.environment(tmp_path / "home")
    evit("push", model_folder, "org/xet", env=env)
    assert xet_hub.count("xet-write-token")
    assert not xet_hub.count("/lfs/")
    weights = xet_hub.files("org/xet")["model.safetensors"]
    assert weights == b""
    assert weights.size == (model_folder / "model.safetensors").stat().st_size
    commits = len(xet_hub.repos["models/org/xet"].branches["main"])
    evit("push", model_folder, "org/xet", env=env)
    assert len(xet_hub.repos["models/org/xet"].branches["main"]) == commits
    code = f"""
import torch
from evit_hf import EViTForImageClassification
there = EViTForImageClassification.from_pretrained("org/xet").state_dict()
here = EViTForImageClassification.from_pretrained(r"{model_folder}").state_dict()
assert all(torch.equal(there[name], here[name]) for name in here)
print("equal")
"""
    assert "equal" in run_python(code, tmp_path, **xet_hub.environment(tmp_path / "other"))
    assert xet_hub.count("xet-read-token")


@pytest.mark.parametrize(
    "strategy",
    ["every_save", *(pytest.param(x, marks=pytest.mark.slow) for x in ("end", "checkpoint", "all_checkpoints"))],
)
def test_the_trainer_of_transformers_pushes_as_it_always_does(strategy, hub, tmp_path):
    repo = f"org/from-trainer-{strategy}"
    code = """
import torch
from transformers import Trainer, TrainingArguments
from evit_hf import EViTConfig, EViTForImageClassification
config = EViTConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
                    intermediate_size=64, num_labels=2)
rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
arguments = TrainingArguments(
    "out", num_train_epochs=2, per_device_train_batch_size=4, save_strategy="epoch", report_to=[], push_to_hub=True,
    hub_model_id="org/from-trainer", hub_strategy="STRATEGY", remove_unused_columns=False, use_cpu=True)
trainer = Trainer(EViTForImageClassification(config), arguments, train_dataset=rows)
trainer.train()
trainer.push_to_hub()
model = EViTForImageClassification.from_pretrained("org/from-trainer")
for name, tensor in trainer.model.state_dict().items():
    assert torch.equal(model.state_dict()[name], tensor), name
print("equal")
"""
    code = code.replace("STRATEGY", strategy).replace("org/from-trainer", repo)
    assert "equal" in run_python(code, tmp_path, **hub.environment(tmp_path / "home"))
    files = set(hub.files(repo))
    assert {"config.json", "model.safetensors", "modeling_evit.py"} <= files
    checkpoints = {path.split("/")[0] for path in files if "checkpoint" in path}
    if strategy == "all_checkpoints":  # the Trainer leaves one out while the push before it is under way
        assert checkpoints
        assert checkpoints <= {"checkpoint-2", "checkpoint-4"}
    else:
        assert checkpoints == ({"last-checkpoint"} if strategy == "checkpoint" else set())


def test_pushed_code_does_not_lean_on_an_installed_package_of_another_version(hub, pushed, tmp_path):
    (tmp_path / "evit_hf").mkdir()
    (tmp_path / "evit_hf" / "__init__.py").write_text("raise ImportError('another version')")
    code = LOAD.replace("IMPORT", "").replace("OPTIONS", "{'trust_remote_code': True}")
    environment = hub.environment(tmp_path / "home", token="", PYTHONPATH=str(tmp_path))
    module, logits, answer = json.loads(run_python(code, tmp_path, **environment).splitlines()[-1])
    assert module.startswith("transformers_modules")
    assert [logits, answer] == expected_logits(pushed)[1:]


# Repositories that mean harm


TRY_TO_LOAD = """
from evit_hf import EViTForImageClassification
try:
    EViTForImageClassification.from_pretrained("{repo}")
    print("loaded")
except Exception as error:
    print("refused", type(error).__name__)
"""


def put(hub, name, files):
    """A repository with any files under any names, as no honest client would make it."""
    repo = hub.repos[f"models/{name}"] = Repo(name)
    repo.branches["main"] = [Commit("a" * 40, files, set(), "evil", "2026-01-01T00:00:00.000Z")]


def test_a_pickle_of_the_hub_is_not_run(hub, model_folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"classifier.bias": Evil()}, tmp_path / "evil.bin")
    files = {path.name: path.read_bytes() for path in model_folder.iterdir() if path.suffix == ".json"}
    put(hub, "org/pickle", {**files, "pytorch_model.bin": (tmp_path / "evil.bin").read_bytes()})
    code = TRY_TO_LOAD.format(repo="org/pickle")
    assert "refused" in run_python(code, tmp_path, **hub.environment(tmp_path / "home"))
    assert not (tmp_path / "owned").exists()


def test_names_that_climb_out_of_the_cache_write_nothing_there(hub, model_folder, tmp_path):
    files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    climbing = {f"{'../' * depth}evil.txt": b"evil" for depth in range(1, 9)}
    put(hub, "org/climber", {**files, **climbing, "/tmp/evil_absolute.txt": b"evil"})
    code = """
from huggingface_hub import snapshot_download
from evit_hf import EViTForImageClassification
EViTForImageClassification.from_pretrained("org/climber")
for options in ({}, {"local_dir": "deep/er/local"}):
    try:
        snapshot_download("org/climber", **options)
    except Exception as error:
        print(type(error).__name__)
"""
    home = tmp_path / "a" / "b" / "c" / "home"
    run_python(code, tmp_path, **hub.environment(home))
    written = [path for path in tmp_path.rglob("*evil*") if "blobs" not in path.parts]
    assert written == []
    assert not os.path.exists("/tmp/evil_absolute.txt")


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_size_that_is_a_lie_fills_no_disk_and_is_not_taken_for_weights(method, hub, model_folder, tmp_path):
    put(hub, "org/boaster", {path.name: path.read_bytes() for path in model_folder.iterdir()})
    hub.faults.append(Fault(rf"{method} .*/resolve/.*/model.safetensors", "huge"))
    code = TRY_TO_LOAD.format(repo="org/boaster")
    output = run_python(code, tmp_path, **hub.environment(tmp_path / "home"))
    assert output.split()[0] == ("refused" if method == "HEAD" else "loaded")
    size = sum(path.stat().st_size for path in (tmp_path / "home").rglob("*") if path.is_file())
    assert size < 10_000_000


def test_a_body_that_is_shorter_than_promised_is_not_taken_for_weights(hub, model_folder, tmp_path):
    files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    put(hub, "org/liar", files)
    hub.faults.append(Fault(r"GET .*/resolve/.*/model.safetensors", "truncate"))
    code = TRY_TO_LOAD.format(repo="org/liar")
    assert "refused" in run_python(code, tmp_path, **hub.environment(tmp_path / "home"))
