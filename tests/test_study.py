import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evit_hf import modeling_evit
from evit_training.cli import main
from evit_training.measuring.comparisons import by_lowest_attention, replacements
from evit_training.studies import runner, ways
from evit_training.studies.report import as_json, as_markdown, decide, draw, measure_speed, summarize
from evit_training.studies.runner import check_record, run_all
from evit_training.studies.study import STUDIES, WAYS, read_study


TINY = "digits --max-steps 3 --max-train-samples 64 --max-eval-samples 40 --hidden-size 32 --num-hidden-layers 4"
FILE = f"""
train: {TINY}
seeds: [0, 1]
baseline: dense
settings:
  dense: --keep-rate 1.0
  0.5 fused: --model {{dense}} --keep-rate 0.5
"""


def write(folder, text=FILE):
    path = folder / "tiny.yaml"
    path.write_text(text)
    return str(path)


def finish_run(run, score, keep_rate=0.5):
    """What a run leaves behind that the table needs."""
    run.folder.mkdir(parents=True)
    rows = [{"keep_rate": rate, "top1": x, "gmacs": rate} for rate, x in ((1.0, 0.1), (keep_rate, score))]
    rows = [{**row, "image_size": [32, 32]} for row in rows]
    for name, values in (("results", rows), ("class_report", {"keep_rate": keep_rate}), ("run", {"seconds": 2.0})):
        (run.folder / f"{name}.json").write_text(json.dumps(values))


def test_a_run_is_settings_and_seed_and_starts_from_another(tmp_path):
    study = read_study(write(tmp_path))
    dense, fused = study.runs(tmp_path / "out")[:2]
    assert dense.words[-4:] == ("--seed", "0", "--output-dir", str(tmp_path / "out" / "dense" / "seed-0"))
    assert fused.words[fused.words.index("--model") + 1] == str(dense.folder / "model")
    assert fused.needs == ("dense",)
    assert [(run.setting, run.seed) for run in study.runs(tmp_path)] == [
        ("dense", 0),
        ("0.5 fused", 0),
        ("dense", 1),
        ("0.5 fused", 1),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baseline: dense", "baseline: dence", "`baseline` must be one of dense, 0.5 fused, got 'dence'"),
        ("baseline:", "base_line:", "unknown field `base_line`: did you mean `baseline`?"),
        ("seeds: [0, 1]", "seeds: 3", "`seeds` must be a list of numbers, 0 or more, got 3"),
        ("seeds: [0, 1]", "seeds: [1, 1]", r"`seeds` must be different numbers, got \[1, 1\]"),
        ("{dense}", "{dance}", r"`0.5 fused` starts from `\{dance\}`, which is no setting above it"),
        ("--keep-rate 0.5", "--keep-rate 5", "setting `0.5 fused`: `--keep-rate` must be in"),
        ("--keep-rate 0.5", "--keep-rat 0.5", "setting `0.5 fused`: .*--keep-rat"),
        ("--keep-rate 0.5", "--seed 5", "`--seed` of `0.5 fused` is set by the study"),
        (
            "0.5 fused:",
            "DENSE:",
            "`DENSE` and `dense` need names that differ|`dense` and `DENSE` need names that differ",
        ),
        ("settings:", "settings: [", "is not YAML"),
        (
            "baseline: dense",
            "ways: {dense: worst}",
            "of the settings and of the ways ToMe, .*; got `dense: worst`",
        ),
        ("baseline: dense", "ways: {dense: random}", "starts from `{dense}`, whose models `ways` does not keep"),
        ("baseline: dense", "claims: {better: dense > 0.6}", "two of dense, 0.5 fused; got 'dense > 0.6'"),
    ],
)
def test_a_study_that_cannot_work_is_refused_before_anything_is_trained(old, new, message, tmp_path):
    assert old in FILE
    with pytest.raises(ValueError, match=message):
        read_study(write(tmp_path, FILE.replace(old, new)))


def test_packaged_studies_can_run():
    names = sorted(path.stem for path in STUDIES.glob("*.yaml"))
    assert "digits" in names
    for name in names:
        assert read_study(name).about


def test_means_errors_and_differences_are_over_seeds(tmp_path):
    study = read_study(write(tmp_path))
    for run, score in zip(study.runs(tmp_path), (0.9, 0.8, 0.94, 0.8), strict=True):
        finish_run(run, score)
    dense, fused = summarize(study, study.runs(tmp_path), {"dense": 100.0, "0.5 fused": 150.0})
    assert dense.mean == pytest.approx(92)
    assert dense.standard_error == pytest.approx(2)  # stdev of 90 and 94 is 2 * sqrt(2)
    assert (dense.difference, dense.difference_error) == (None, None)
    assert fused.difference == pytest.approx(-12)
    assert fused.difference_error == pytest.approx(2)
    assert fused.standard_error == pytest.approx(0)
    assert fused.gmacs == 0.5
    assert fused.train_seconds == 2.0
    table = as_markdown(study, [dense, fused], 8, "evit study tiny.yaml")
    assert "| 0.5 fused | 2 | 80.00 ± 0.00 | -12.00 ± 2.00 | 0.5000 | 150 (1.50x) | 2 |" in table
    untimed = summarize(study, study.runs(tmp_path))
    assert "| GMACs | training, s |" in as_markdown(study, untimed, None, "evit study tiny.yaml --no-speed")
    draw(study, [dense, fused], tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_speed_is_that_of_a_run_that_kept_its_model(tmp_path, tiny_model):
    study = read_study(write(tmp_path))
    runs = study.runs(tmp_path)
    for run in runs:
        finish_run(run, 0.9)
    tiny_model.save_pretrained(study.run("dense", 1, tmp_path).folder / "model")
    assert measure_speed(runs, 2, rounds=1).keys() == {"dense"}


def test_flags_after_two_hyphens_reach_every_run(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("evit_training.studies.runner.run_all", lambda runs, *_: read.extend(runs) or {})
    main(
        ["study", write(tmp_path), "--output-dir", str(tmp_path / "out"), "--", "--dataset", "digits", "--seed=1"][:-1]
    )
    assert len(read) == 4
    for run in read:
        at = len(TINY.split())
        assert run.words[at : at + 2] == ("--dataset", "digits")
    with pytest.raises(ValueError, match="`--seed=1` of `dense` is set by the study"):
        read_study(write(tmp_path), ["--seed=1"])


@pytest.mark.parametrize(
    ("scores", "claim", "says"),
    [
        ((0.90, 0.80, 0.94, 0.92), "dense > 0.5 fused", "not decidable at this size"),  # 10 and 2
        ((0.90, 0.80, 0.94, 0.84), "dense > 0.5 fused", "holds here"),  # 10 and 10
        ((0.90, 0.80, 0.94, 0.84), "0.5 fused > dense - 9", "does not hold here"),
        ((0.90, 0.80, 0.94, 0.84), "0.5 fused > dense - 11", "holds here"),
        ((0.90, 0.90, 0.94, 0.94), "0.5 fused > dense", "not decidable at this size"),
    ],
)
def test_a_claim_is_decided_beyond_the_error_over_seeds(scores, claim, says, tmp_path):
    study = read_study(write(tmp_path, f"{FILE}claims: {{A word: {claim}}}\n"))
    for run, score in zip(study.runs(tmp_path), scores, strict=True):
        finish_run(run, score)
    rows = summarize(study, study.runs(tmp_path))
    assert [verdict.says for verdict in decide(study, rows)] == [says]
    assert f"| A word | {claim} | " in as_markdown(study, rows, None, "evit study tiny.yaml")
    assert as_json(study, rows, None)["claims"][0]["says"] == says


def test_ways_of_a_study_are_those_of_the_comparisons():
    assert set(WAYS) == set(replacements())


def test_a_way_that_no_setting_has_is_trained_and_its_model_is_not_kept(tmp_path, monkeypatch):
    """In a process of its own, as its functions take the place of the model's."""
    study = read_study(write(tmp_path, f"{FILE}ways: {{0.5 fused: lowest attention}}\n"))
    commands = []
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, **_: commands.append(command))
    run = study.runs(tmp_path)[1]
    run.folder.mkdir(parents=True)
    runner._start(run, 0, 1, 0)
    assert commands[0][1:4] == ["-m", "evit_training.studies.ways", "lowest attention"]
    called = []

    def train(name, **_):
        called.append((sys.argv, modeling_evit.choose_tokens))
        for made in ("model/config.json", "checkpoints/1", "README.md", "results.json"):
            (run.folder / made).parent.mkdir(exist_ok=True)
            (run.folder / made).write_text("")

    before = modeling_evit.choose_tokens
    monkeypatch.setattr(ways.runpy, "run_module", train)
    monkeypatch.setattr(sys, "argv", [])
    ways.main("lowest attention", list(run.words))
    assert called == [(["evit", "train", *run.words], by_lowest_attention)]
    assert modeling_evit.choose_tokens is before
    assert [path.name for path in run.folder.iterdir()] == ["results.json"]


def test_a_study_in_the_middle_has_a_table_of_what_is_done(tmp_path):
    study = read_study(write(tmp_path))
    for run, score in zip(study.runs(tmp_path)[:3], (0.9, 0.8, 0.94), strict=True):
        finish_run(run, score)
    dense, fused = summarize(study, study.runs(tmp_path))
    assert sorted(dense.scores) == [0, 1]
    assert sorted(fused.scores) == [0]
    assert fused.difference == pytest.approx(-10)
    assert fused.standard_error is None


def test_runs_of_changed_settings_do_not_mix(tmp_path):
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    check_record(study, out)
    finish_run(study.runs(out)[1], 0.8)
    check_record(study, out)
    changed = read_study(write(tmp_path, FILE.replace("--keep-rate 0.5", "--keep-rate 0.6")))
    with pytest.raises(ValueError, match="holds runs of `0.5 fused` with other flags"):
        check_record(changed, out)
    more = read_study(write(tmp_path, FILE.replace("seeds: [0, 1]", "seeds: [0, 1, 2]") + "  0.7: --keep-rate 0.7\n"))
    check_record(more, out)


def stand_in(tmp_path, monkeypatch, script):
    """Runs are short scripts instead of trainings: what is tested is who is started when, and what becomes of it."""
    path = tmp_path / "run.py"
    path.write_text(script)
    start = subprocess.Popen

    def instead(command, **options):
        return start([sys.executable, "-S", str(path), *command[1:]], **options)

    monkeypatch.setattr(runner.subprocess, "Popen", instead)


WRITES = """
import pathlib, sys
words = sys.argv
folder = pathlib.Path(words[words.index("--output-dir") + 1])
with open(folder.parent.parent / "order", "a") as order:
    order.write("/".join(folder.parts[-2:]) + "\\n")
if "fails" in words:
    sys.exit(3)
(folder / "results.json").write_text("[]")
"""


def test_runs_are_trained_once_and_after_what_they_start_from(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, WRITES)
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    assert run_all(study.runs(out), num_jobs=2) == {}
    assert run_all(study.runs(out), num_jobs=2) == {}  # nothing is left to do
    order = (out / "order").read_text().split()
    assert sorted(order) == ["0.5-fused/seed-0", "0.5-fused/seed-1", "dense/seed-0", "dense/seed-1"]
    for seed in (0, 1):
        assert order.index(f"dense/seed-{seed}") < order.index(f"0.5-fused/seed-{seed}")


def test_a_failed_run_is_named_and_ends_those_that_need_it_only(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, WRITES.replace('"fails" in words', '"dense/seed-0" in str(folder)'))
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    failed = run_all(study.runs(out))
    assert {run.name: reason.split(",")[0] for run, reason in failed.items()} == {
        "dense, seed 0": "ended with status 3",
        "0.5 fused, seed 0": "not trained",
    }
    assert [run.is_done for run in study.runs(out)] == [False, False, True, True]


def test_an_unknown_study_names_those_there_are(capsys):
    with pytest.raises(SystemExit) as end:
        main(["study", "cifar1000"])
    assert end.value.code == 2
    assert "one of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_is_killed_and_resumed_without_training_a_run_twice(tmp_path):
    file, out = write(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "evit_training", "study", file, "--output-dir", str(out), "--jobs", "2", "--json"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not (out / "dense" / "seed-0" / "results.json").exists():
        assert time.monotonic() < end
        assert first.poll() is None
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 143, said
    assert "the same command resumes the study" in said
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/results.json")}
    assert 1 <= len(before) < 4
    second = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    report = json.loads(second.stdout)
    assert [row["setting"] for row in report["rows"]] == ["dense", "0.5 fused"]
    assert all(len(row["scores"]) == 2 and row["images_per_second"] > 0 for row in report["rows"])
    assert all(math.isfinite(row["standard_error"]) for row in report["rows"])
    assert {path.name for path in Path(out).iterdir()} >= {"study.md", "study.json", "study.png", "study.yaml"}
