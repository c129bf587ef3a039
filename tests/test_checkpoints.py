"""Weights in and out: Transformers 4.x and 5.x ViTs, round trips, Trainer, Auto classes, remote code."""

import json
import logging

import pytest
import torch
from conftest import DATA, run_python, tiny_config_with
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

from evit_hf import (
    EViTConfig,
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVConfig,
    EViTLVForImageClassification,
    EViTModel,
    preset_config,
)
from evit_hf.keep_rate_schedule import KeepRateCallback


VIT_4 = DATA / "transformers_4" / "vit"
VIT_4_BACKBONE = DATA / "transformers_4" / "vit_backbone"


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# Checkpoints of Transformers


def test_classifier_of_transformers_4_gives_its_dense_output():
    expected = load_file(VIT_4 / "expected_dense_output.safetensors")
    model = EViTForImageClassification.from_pretrained(VIT_4, keep_rate=1.0)
    logits = model(expected["pixel_values"]).logits
    torch.testing.assert_close(logits, expected["output"], rtol=1e-5, atol=1e-5)
    model.set_keep_rate(0.7)
    assert model(expected["pixel_values"]).attentive_index[-1].shape == (expected["output"].shape[0], 24)


def test_backbone_of_transformers_4_gives_its_dense_output():
    expected = load_file(VIT_4_BACKBONE / "expected_dense_output.safetensors")
    outputs = EViTModel.from_pretrained(VIT_4_BACKBONE, keep_rate=1.0)(expected["pixel_values"])
    torch.testing.assert_close(outputs.last_hidden_state, expected["output"], rtol=1e-5, atol=1e-5)
    pooler = load_file(VIT_4_BACKBONE / "model.safetensors")
    pooled = expected["output"][:, 0] @ pooler["pooler.dense.weight"].T + pooler["pooler.dense.bias"]
    torch.testing.assert_close(outputs.pooler_output, pooled.tanh(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save_original_format", [True, False])
def test_vit_of_transformers_5_gives_its_dense_output(save_original_format, tmp_path, images):
    fields = {k: v for k, v in tiny_config_with().to_dict().items() if k in ViTConfig().to_dict()}
    vit = ViTForImageClassification(ViTConfig(**{**fields, "model_type": "vit"})).eval()
    vit.save_pretrained(tmp_path, save_original_format=save_original_format)
    model = EViTForImageClassification.from_pretrained(tmp_path, keep_rate=1.0)
    assert torch.equal(model(images, output_hidden_states=True).logits, vit(images).logits)
    assert_same_weights(model, vit)


def test_another_number_of_classes_renews_the_head_alone_and_says_so(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("evit_hf"), "propagate", True)
    original = EViTForImageClassification.from_pretrained(VIT_4)
    with caplog.at_level(logging.WARNING):
        model = EViTForImageClassification.from_pretrained(VIT_4, num_labels=4)
    assert "classifier for 4 classes is newly initialized" in caplog.text
    assert "has 10: train it" in caplog.text
    assert model.classifier.weight.shape == (4, 48)
    assert_same_weights(model.vit, original.vit)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        EViTForImageClassification.from_pretrained(VIT_4, num_labels=4, ignore_mismatched_sizes=False)


def test_a_backbone_gets_a_new_head_and_says_so(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("evit_hf"), "propagate", True)
    backbone = EViTModel.from_pretrained(VIT_4_BACKBONE)
    with caplog.at_level(logging.WARNING):
        model = EViTForImageClassification.from_pretrained(VIT_4_BACKBONE)
    assert "newly initialized" in caplog.text
    backbone.pooler = None
    assert_same_weights(model.vit, backbone)


def test_a_classifier_loads_into_the_model_without_pooler_and_says_so(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("evit_hf"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        model = EViTModel.from_pretrained(VIT_4)
    assert "has no pooling layer" in caplog.text
    expected = load_file(VIT_4 / "expected_dense_output.safetensors")
    outputs = model(expected["pixel_values"], keep_rate=1.0)
    assert outputs.pooler_output is None
    classifier = EViTForImageClassification.from_pretrained(VIT_4)
    assert_same_weights(model, classifier.vit)


def test_a_parameter_left_to_chance_is_an_error(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["vit.layers.2.mlp.fc1.weight"]
    weights["vit.layers.2.mlp.linear1.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError) as error:
        EViTForImageClassification.from_pretrained(tmp_path)
    for part in (
        "does not fill 1 of 72 parameters",
        "Missing: ['vit.layers.2.mlp.fc1.weight']",
        "Unexpected in the checkpoint: ['vit.layers.2.mlp.linear1.weight']",
    ):
        assert part in str(error.value)


def test_a_parameter_of_another_shape_is_an_error(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"position_embeddings \(\(1, 17, 32\) in the checkpoint, \(1, 65, 32\) here"
    ):
        EViTForImageClassification.from_pretrained(tmp_path, image_size=64)
    with pytest.raises(RuntimeError, match="does not fill"):
        EViTForImageClassification.from_pretrained(tmp_path, image_size=64, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("folder", ["deit", "deit_distilled"])
def test_deit_of_transformers_4_gives_its_dense_output(folder):
    expected = load_file(DATA / "transformers_4" / folder / "expected_dense_output.safetensors")
    model_class = EViTForImageClassification if folder == "deit" else EViTForImageClassificationWithTeacher
    model = model_class.from_pretrained(DATA / "transformers_4" / folder, keep_rate=1.0)
    outputs = model(expected["pixel_values"])
    torch.testing.assert_close(outputs.logits, expected["output"], rtol=1e-5, atol=1e-5)
    for name in {"cls_logits", "distillation_logits"} & set(expected):
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-5)
    assert (folder == "deit_distilled") == ("cls_logits" in expected)


def test_backbone_of_deit_loads_into_the_model_without_head():
    expected = load_file(DATA / "transformers_4" / "deit" / "expected_dense_output.safetensors")
    model = EViTModel.from_pretrained(DATA / "transformers_4" / "deit", keep_rate=1.0)
    classifier = EViTForImageClassification.from_pretrained(DATA / "transformers_4" / "deit", keep_rate=1.0)
    hidden_states = model(expected["pixel_values"]).last_hidden_state
    torch.testing.assert_close(classifier.classifier(hidden_states[:, 0]), expected["output"], rtol=1e-5, atol=1e-5)


def test_loading_info_is_returned_on_request():
    model, info = EViTForImageClassification.from_pretrained(VIT_4, output_loading_info=True)
    assert isinstance(model, EViTForImageClassification)
    assert not info["missing_keys"]


# Round trips


def test_save_and_load_is_bit_identical(tmp_path, tiny_model, images):
    tiny_model.save_pretrained(tmp_path)
    model = EViTForImageClassification.from_pretrained(tmp_path)
    assert_same_weights(model, tiny_model)
    assert model.config.layer_keep_rates == tiny_model.config.layer_keep_rates
    assert torch.equal(model(images).logits, tiny_model(images).logits)
    assert set(load_file(tmp_path / "model.safetensors")) == set(tiny_model.state_dict())


def test_saved_evit_is_a_plain_vit_to_transformers(tmp_path, tiny_model, images):
    tiny_model.save_pretrained(tmp_path)
    vit, info = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    evit = tiny_model(images, keep_rate=1.0, output_hidden_states=True)
    assert torch.equal(vit(images).logits, evit.logits)
    headless = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert_same_weights(headless, tiny_model.vit)


class RandomImages(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 5}


def make_trainer(folder, config, callbacks=(), **settings):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "num_train_epochs": 4,
            "per_device_train_batch_size": 4,
            "save_strategy": "epoch",
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **settings,
        }
    )
    model = EViTForImageClassification(config)
    return Trainer(
        model, arguments, train_dataset=RandomImages(), eval_dataset=RandomImages(), callbacks=list(callbacks)
    )


def test_trainer_resumes_bit_identically(tmp_path, tiny_config):
    straight = make_trainer(tmp_path / "straight", tiny_config, [KeepRateCallback(1, 2)])
    straight.train()
    resumed = make_trainer(tmp_path / "resumed", tiny_config, [KeepRateCallback(1, 2)])
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-12"))
    assert_same_weights(resumed.model, straight.model)
    rates = {entry["step"]: entry["keep_rate"] for entry in straight.state.log_history if "keep_rate" in entry}
    rates_resumed = {entry["step"]: entry["keep_rate"] for entry in resumed.state.log_history if "keep_rate" in entry}
    assert rates_resumed == rates
    assert len(rates) == 24


def test_trainer_loads_its_best_model_bit_identically(tmp_path, tiny_config):
    trainer = make_trainer(
        tmp_path, tiny_config, eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="loss"
    )
    trainer.train()
    best = EViTForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same_weights(trainer.model, best)


def test_names_of_transformers_4_on_disk_would_lose_the_encoder(tmp_path, tiny_config, monkeypatch):
    """What `save_pretrained` protects from: with Transformers' default, a resumed run differs."""
    original = EViTForImageClassification.save_pretrained
    monkeypatch.setattr(
        EViTForImageClassification,
        "save_pretrained",
        lambda self, *args, **kwargs: original(self, *args, **{**kwargs, "save_original_format": True}),
    )
    straight = make_trainer(tmp_path / "straight", tiny_config)
    straight.train()
    resumed = make_trainer(tmp_path / "resumed", tiny_config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-12"))
    with pytest.raises(AssertionError, match="0.attention"):
        assert_same_weights(resumed.model.vit.layers, straight.model.vit.layers)


# Auto classes


@pytest.fixture
def model_folder(tmp_path, tiny_config):
    folder = tmp_path / "evit"
    torch.manual_seed(0)
    tiny_config.id2label = dict(enumerate(["ant", "bee", "cat", "dog", "elk"]))
    EViTForImageClassification(tiny_config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_auto_classes_load_a_saved_folder(model_folder, images):
    expected = EViTForImageClassification.from_pretrained(model_folder)
    config = AutoConfig.from_pretrained(model_folder)
    assert isinstance(config, EViTConfig)
    model = AutoModelForImageClassification.from_pretrained(model_folder)
    assert isinstance(model, EViTForImageClassification)
    assert torch.equal(model(images).logits, expected(images).logits)
    backbone = AutoModel.from_pretrained(model_folder, keep_rate=0.5)
    assert isinstance(backbone, EViTModel)
    assert backbone.config.keep_rate == 0.5
    assert_same_weights(backbone, expected.vit)
    assert AutoImageProcessor.from_pretrained(model_folder).size == {"height": 32, "width": 32}


def other_families():
    small = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2}
    distilled = EViTConfig(**small, intermediate_size=64, use_distillation_token=True, num_labels=4)
    lvvit = EViTLVConfig(**small, intermediate_size=96, stem_hidden_size=8, num_labels=4)
    return [EViTForImageClassificationWithTeacher(distilled), EViTLVForImageClassification(lvvit)]


@pytest.mark.parametrize("model", other_families(), ids=lambda model: type(model).__name__)
def test_auto_class_and_remote_code_pick_the_right_class(model, tmp_path, images):
    model = model.eval()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert type(again) is type(model)
    assert torch.equal(again(images).logits, model(images).logits)
    torch.save(images, tmp_path / "images.pt")
    code = """
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("saved", trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.load("images.pt")).logits, "logits.pt")
print(type(model).__name__)
"""
    assert type(model).__name__ in run_python(code, tmp_path, without_package=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(images).logits)


def test_auto_class_builds_a_new_model_from_a_configuration(tiny_config):
    assert type(AutoModelForImageClassification.from_config(tiny_config)) is EViTForImageClassification
    lvvit = preset_config("evit-lvvit-t", num_labels=3)
    assert type(AutoModelForImageClassification.from_config(lvvit)) is EViTLVForImageClassification


def test_pipeline_classifies_an_image(model_folder):
    classify = pipeline("image-classification", model=str(model_folder))
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    answers = classify(picture, top_k=2)
    assert {answer["label"] for answer in answers} < {"ant", "bee", "cat", "dog", "elk"}
    processor = AutoImageProcessor.from_pretrained(model_folder)
    model = EViTForImageClassification.from_pretrained(model_folder)
    probabilities = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0]
    assert answers[0]["score"] == pytest.approx(probabilities.max().item(), abs=1e-5)


REMOTE = """
import json, sys, torch
try:
    import evit_hf
    sys.exit("evit_hf is installed")
except ImportError:
    pass
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
from PIL import Image
folder, images = sys.argv[1] if len(sys.argv) > 1 else "evit", torch.load("images.pt")
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
classify = pipeline("image-classification", model=folder, trust_remote_code=True)
answer = classify(Image.new("RGB", (40, 40), (200, 30, 90)))[0]["label"]
old = type(model).from_pretrained(VIT, keep_rate=1.0)
model.save_pretrained("again")
again = AutoModelForImageClassification.from_pretrained("again", trust_remote_code=True)
with torch.no_grad():
    torch.save({"logits": model(images).logits, "again": again(images).logits, "old": old(torch.load("old.pt")).logits,
                "half": model(images, keep_rate=0.5).logits, "backbone": backbone(images).last_hidden_state}, "out.pt")
processor = AutoImageProcessor.from_pretrained(folder)
print(json.dumps([type(config).__name__, type(model).__module__.split(".")[0], answer, dict(processor.size)]))
"""


def test_remote_code_needs_no_package(model_folder, tmp_path, images):
    torch.save(images, tmp_path / "images.pt")
    expected_old = load_file(VIT_4 / "expected_dense_output.safetensors")
    torch.save(expected_old["pixel_values"], tmp_path / "old.pt")
    printed = run_python(REMOTE.replace("VIT", repr(str(VIT_4)), 1), tmp_path, without_package=True)
    config, module, answer, size = json.loads(printed.splitlines()[-1])
    assert (config, module, size) == ("EViTConfig", "transformers_modules", {"height": 32, "width": 32})
    assert answer in ("ant", "bee", "cat", "dog", "elk")

    outputs = torch.load(tmp_path / "out.pt")
    model = EViTForImageClassification.from_pretrained(model_folder)
    with torch.no_grad():
        assert torch.equal(outputs["logits"], model(images).logits)
        assert torch.equal(outputs["again"], model(images).logits)
        assert torch.equal(outputs["half"], model(images, keep_rate=0.5).logits)
        assert torch.equal(outputs["backbone"], model.vit(images).last_hidden_state)
    torch.testing.assert_close(outputs["old"], expected_old["output"], rtol=1e-5, atol=1e-5)


# A configuration that is handed over


def test_a_vits_configuration_loads_as_ours_and_takes_keywords(tmp_path):
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    vit = ViTForImageClassification(ViTConfig(**size, image_size=32, patch_size=8, num_labels=3))
    vit.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    for given in (AutoConfig.from_pretrained(tmp_path), EViTConfig.from_pretrained(tmp_path), str(tmp_path)):
        before = given if isinstance(given, str) else given.to_dict()
        model = EViTForImageClassification.from_pretrained(tmp_path, config=given, keep_rate=0.5).eval()
        assert (model.config.model_type, model.config.keep_rate) == ("evit", 0.5)
        assert model(images).attentive_index[0].shape == (2, 8)
        torch.testing.assert_close(model(images, keep_rate=1.0).logits, vit.eval()(images).logits)
        assert before == (given if isinstance(given, str) else given.to_dict())
    with pytest.raises(TypeError, match="`keep_rat` is not a keyword of EViT: did you mean `keep_rate`"):
        EViTForImageClassification.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path), keep_rat=0.5)
    with pytest.raises(RuntimeError, match="load without `image_size` and call `set_image_size`"):
        EViTForImageClassification.from_pretrained(tmp_path, image_size=64)
    swin = AutoConfig.for_model("swin")
    with pytest.raises(ValueError, match="`SwinConfig` holds a model of type 'swin', but EViTConfig loads 'evit'"):
        EViTForImageClassification.from_pretrained(tmp_path, config=swin)
