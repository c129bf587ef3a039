"""`evit train` on families of `reorganize`: schedule, checkpoints, resuming, teachers, and what a run leaves."""

import json
import os
import signal

import pytest
import torch
from family_folders import DIGITS, save_family
from training_runs import RANDOM, ForkedRun, read_log, run, state_hash
from transformers import AutoModelForImageClassification
from vision_families import build

from evit_hf import reorganize
from evit_training.arguments import OptimizationArguments, parse_train_arguments
from evit_training.commands.train import main
from evit_training.learning.models import (
    heads_of,
    leave_out_unused,
    load_classifier,
    load_processor,
    match_head,
    saved_classes,
)
from evit_training.learning.optimization import build_optimizer, freeze, layer_number
from evit_training.learning.teachers import build_oracle, build_teacher
from evit_training.loop.trainer import train


RUN = ["--dataset", "digits", "--max-train-samples", "40", "--max-eval-samples", "16", "--batch-size", "8"]
RUN += ["--epochs", "2", "--num-workers", "0", "--num-pictures", "0", "--log-steps", "1", "--eval-batch-size", "8"]
RUN += ["--keep-rate", "0.6", "--reorganization-layers", "1", "2", "--learning-rate", "1e-3"]
SCHEDULE = ["--keep-rate-shrink-epochs", "1"]


@pytest.mark.parametrize("case", ["dinov2-registers", pytest.param("timm", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit_and_its_model_loads_everywhere(case, tmp_path):
    random = [flag for flag in RANDOM if flag not in ("--drop_path_rate", "0.2")] + ["--drop_path_rate", "0.1"]
    folder = save_family(case, tmp_path / "dense")
    flags = [*RUN, *SCHEDULE, *random, "--model", str(folder), "--checkpoint-steps", "1"]
    straight, output_dir = tmp_path / "straight", tmp_path / "run"
    run([*flags, "--num-pictures", "2"], straight)
    killed = ForkedRun(flags, output_dir)
    killed.wait_for_step(output_dir, 3)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    run([*flags, "--resume", "auto"], output_dir)
    assert state_hash(output_dir) == state_hash(straight)
    rates = [entry["keep_rate"] for entry in read_log(straight) if "loss" in entry]
    assert (rates[0], rates[-1]) == (1.0, 0.6)
    gmacs = [entry["gmacs"] for entry in read_log(straight) if "loss" in entry]
    dense, own = (row["gmacs"] for row in json.loads((straight / "results.json").read_text()))
    assert (gmacs[0], gmacs[-1]) == (dense, own)
    assert (straight / "kept_patches.png").exists()
    card = (straight / "README.md").read_text()
    family = json.loads((folder / "config.json").read_text()).get("model_type", "timm_wrapper")
    assert f"of the family `{family}`," in card
    assert "At layers 1, 2 (zero-based) of\n4 it keeps the share 0.6" in card

    model = load_classifier(str(straight / "model")).eval()
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    expected = model(pixels)
    assert [index.shape[1] for index in expected.attentive_index] == [22, 14]
    assert model.config.id2label == dict(enumerate(DIGITS))
    dense = AutoModelForImageClassification.from_pretrained(straight / "model").eval()
    assert torch.equal(dense(pixels).logits, model(pixels, keep_rate=1.0).logits)
    assert torch.equal(reorganize(dense)(pixels).logits, expected.logits)
    trusted = AutoModelForImageClassification.from_pretrained(straight / "model", trust_remote_code=True).eval()
    assert torch.equal(trusted(pixels).logits, expected.logits)


def test_stochastic_depth_is_the_checkpoints_unless_a_rate_is_given(tmp_path):
    folder = str(save_family("beit", tmp_path))
    own = load_classifier(folder).config.drop_path_rate
    assert own > 0
    assert parse_train_arguments(["digits", "--model", folder]).model.drop_path_rate is None
    for rate in (0.0, 0.3):
        assert load_classifier(folder, drop_path_rate=rate).config.drop_path_rate == rate


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dinov2", "clip-classifier", "beit", "vit-msn"])
def test_other_families_train(case, tmp_path):
    main([*RUN, "--model", str(save_family(case, tmp_path / "dense")), "--output-dir", str(tmp_path / "run")])
    losses = [entry["loss"] for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert len(losses) == 10
    assert load_classifier(str(tmp_path / "run" / "model")).config.num_labels == 10


def test_heads_are_found_by_name_or_start_from_random_weights(tmp_path):
    for case in ("dinov2", "timm"):
        folder = save_family(case, tmp_path / case)
        before = next(iter(heads_of(load_classifier(str(folder))).values())).weight
        names = DIGITS[::-1]
        model = load_classifier(str(folder), id2label=dict(enumerate(names)))
        match_head(model, saved_classes(str(folder)), names)
        (head,) = heads_of(model).values()
        assert torch.equal(head.weight, before.flip(0))
        fewer = load_classifier(str(folder), id2label={0: "a", 1: "b"}, keep_rate=0.5, reorganization_layers=[1])
        assert fewer(torch.zeros(1, 3, 48, 48)).logits.shape == (1, 2)
    classifier = build("dinov2")
    classifier.base_model.save_pretrained(tmp_path / "backbone")
    assert load_classifier(str(tmp_path / "backbone"), id2label=dict(enumerate(DIGITS))).config.num_labels == 10
    with pytest.raises(ValueError, match=f"does not fill 2 parameters of a {type(classifier).__name__}"):
        load_classifier(str(tmp_path / "backbone"))


def test_models_that_cannot_be_trained_are_refused_with_the_reason(tmp_path):
    build("dinov3").save_pretrained(tmp_path / "dinov3")
    with pytest.raises(ValueError, match="Transformers has none for models of type 'dinov3_vit'"):
        load_classifier(str(tmp_path / "dinov3"))
    clip = str(save_family("clip-classifier", tmp_path / "clip"))
    for flags, reason in (
        (["--drop-path-rate", "0.1"], "models of type 'clip' have no stochastic depth"),
        (["--mix-token", "0.5"], "`--mix-token` is for EViT, ViT and DeiT"),
        (["--match-macs-of", "48"], "`--match-macs-of` is for EViT, ViT and DeiT"),
        (["--image-size", "64"], "`CLIPForImageClassification` does not take images of 64 pixels"),
    ):
        words = [word for word in RUN if word not in ("--keep-rate", "0.6")] if "--match-macs-of" in flags else RUN
        arguments = parse_train_arguments([*words, *flags, "--model", clip, "--output-dir", str(tmp_path / "run")])
        with pytest.raises(ValueError, match=reason):
            train(arguments)
    assert not (tmp_path / "run").exists()


def test_timm_processors_become_vits(tmp_path):
    processor = load_processor(str(save_family("timm", tmp_path / "timm")))
    assert processor.size == {"shortest_edge": 53}
    assert processor.crop_size == {"height": 48, "width": 48}
    assert list(processor.image_mean) == [0.4] * 3


@pytest.mark.parametrize("case", ["dinov2", "clip-classifier", "timm"])
def test_depth_decay_and_freezing_know_the_names_of_families(case, tmp_path):
    model = load_classifier(str(save_family(case, tmp_path / "model")))
    depths = {name: layer_number(name, 4) for name, _ in model.named_parameters()}
    assert {depths[name] for name in depths if "cls_token" in name or "class_embedding" in name} == {0}
    assert {depths[name] for name in depths if "patch_embed" in name} == {0}
    assert {depths[f"{head}.weight"] for head in heads_of(model)} == {5}
    assert sorted(set(depths.values())) == [0, 1, 2, 3, 4, 5]
    optimizer = build_optimizer(model, OptimizationArguments(), 1.0)
    spared = {id(p) for group in optimizer.param_groups for p in group["params"] if not group["weight_decay"]}
    for name, parameter in model.named_parameters():
        is_token = any(word in name for word in ("token", "pos_embed", "position_embedding"))
        assert (id(parameter) in spared) == (parameter.ndim < 2 or is_token), name
    freeze(model, "head", 0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"{head}.{kind}" for head in heads_of(model) for kind in ("weight", "bias")]


@torch.no_grad()
def test_oracles_and_teachers_of_any_family_help_any_student(tmp_path):
    flags = ["--model", "x", "--oracle", str(save_family("dinov2", tmp_path / "oracle")), "--teacher", "initial"]
    arguments = parse_train_arguments(flags).teacher
    student = reorganize(build("clip-classifier", id2label=dict(enumerate(DIGITS))), 0.5)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    oracle = build_oracle(arguments, student, load_classifier, 48)
    scores = oracle(images)
    assert [tuple(score.shape) for score in scores] == [(2, 36)] * 3
    kept = student(images, patch_scores=scores).attentive_index[0]
    assert torch.equal(kept, scores[0].topk(18).indices)
    processor = load_processor(str(tmp_path / "oracle"))
    teacher = build_teacher(arguments, student, processor, DIGITS)
    assert torch.equal(teacher(images)[0], student(images, keep_rate=1.0).logits)
    arguments.teacher = str(save_family("timm", tmp_path / "timm"))
    assert build_teacher(arguments, student, processor, DIGITS)(images)[0].shape == (2, 10)
    arguments.oracle = str(tmp_path / "timm")
    with pytest.raises(ValueError, match="does not take images of 40 pixels"):
        build_oracle(arguments, student, load_classifier, 40)


def test_what_no_answer_depends_on_is_not_trained(tmp_path):
    model = load_classifier(str(save_family("clip-classifier", tmp_path / "model")))
    freeze(model, "all", 0)
    leave_out_unused(model, 48)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "vision_model.post_layernorm.weight",
        "vision_model.post_layernorm.bias",
    ]
