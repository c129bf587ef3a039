"""Pipelines of Transformers in batches, and `torch.jit.trace`: what cuts or flattens the outputs of a model."""

import copy
import pickle

import pytest
import torch
from conftest import run_python, tiny_config_with
from datasets import Dataset
from PIL import Image
from transformers import ViTImageProcessor, pipeline

from evit_hf import (
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVConfig,
    EViTLVForImageClassification,
    EViTModel,
)


@pytest.fixture
def processor():
    return ViTImageProcessor(size={"height": 32, "width": 32})


@pytest.fixture
def photos():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, 40, 36, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


def model_of(kind, **changes):
    torch.manual_seed(0)
    if kind == "lv":
        size = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
        return EViTLVForImageClassification(EViTLVConfig(**size, intermediate_size=64, num_labels=5, **changes)).eval()
    if kind == "distilled":
        return EViTForImageClassificationWithTeacher(tiny_config_with(use_distillation_token=True, **changes)).eval()
    return (EViTModel if kind == "model" else EViTForImageClassification)(tiny_config_with(**changes)).eval()


def flat(answers):
    """Numbers of an answer, by label where there are labels."""
    if isinstance(answers, dict):
        return [answers["score"]]
    if isinstance(answers, (int, float)):
        return [answers]
    answers = list(answers)
    if answers and isinstance(answers[0], dict):
        answers = sorted(answers, key=lambda entry: entry["label"])
    return [number for entry in answers for number in flat(entry)]


@pytest.mark.parametrize(
    ("task", "kind", "changes"),
    [
        ("image-classification", "evit", {}),
        ("image-classification", "evit", {"reorganization_layers": [1]}),
        ("image-classification", "evit", {"reorganization_layers": []}),
        ("image-classification", "evit", {"inattentive_tokens": "dropped", "keep_rate": [0.9, 0.5, 1.0]}),
        ("image-classification", "distilled", {}),
        ("image-classification", "lv", {}),
        ("image-feature-extraction", "model", {}),
        ("image-feature-extraction", "evit", {}),
    ],
)
def test_batched_pipelines_answer_as_one_by_one(task, kind, changes, processor, photos):
    pipe = pipeline(task, model=model_of(kind, **changes), image_processor=processor)
    expected = torch.tensor([flat(pipe(photo)) for photo in photos])
    for batch_size in (1, 2, 3, 4, 7, 16):
        for given in (photos, (photo for photo in photos)):
            answers = torch.tensor([flat(answer) for answer in pipe(given, batch_size=batch_size)])
            torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-5)
    rows = Dataset.from_list([{"number": number} for number in range(len(photos))])
    rows.set_transform(lambda batch: {"image": [photos[number] for number in batch["number"]]})

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, number):
            return rows[number]["image"]

    answers = torch.tensor([flat(answer) for answer in pipe(Images(), batch_size=3)])
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-5)


def test_batched_pipelines_with_remote_code(tmp_path, processor, photos):
    model_of("evit").save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    photos[0].save(tmp_path / "photo.png")
    code = """
from transformers import pipeline
pipe = pipeline("image-classification", model="model", trust_remote_code=True)
print(type(pipe.model).__module__.split(".")[0], len(pipe(["photo.png"] * 5, batch_size=4)), len(pipe("photo.png")))
pipe = pipeline("image-feature-extraction", model="model", trust_remote_code=True)
print(len(pipe(["photo.png"] * 5, batch_size=4)))
"""
    assert run_python(code, tmp_path, without_package=True).split() == ["transformers_modules", "5", "5", "5"]


def test_attentive_index_is_by_layer_and_can_be_cut_by_image(tiny_model, images):
    with torch.no_grad():
        outputs = tiny_model(images[:2])
    assert [tuple(index.shape) for index in outputs.attentive_index] == [(2, 10), (2, 7), (2, 5)]
    assert outputs["attentive_index"] is outputs.attentive_index
    assert outputs.to_tuple()[1] is outputs.attentive_index
    items = dict(outputs.items())
    assert items["attentive_index"].shape == (2, 3, 10)
    assert (items["attentive_index"][:, 1, 7:] == -2).all()
    for again in (
        type(outputs)(items),
        type(outputs)(**items),
        copy.deepcopy(outputs),
        pickle.loads(pickle.dumps(outputs)),
        torch.utils._pytree.tree_map(lambda tensor: tensor, outputs),
    ):
        for one, other in zip(again.attentive_index, outputs.attentive_index, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["evit", "distilled", "lv", "model"])
def test_a_traced_model_answers_as_the_model_for_other_batches(kind, images):
    model = model_of(kind)
    traced = torch.jit.trace(model, images, strict=False, check_trace=False)
    for batch in (images, images[:1], torch.cat([images, images])):
        with torch.no_grad():
            outputs, expected = traced(batch), dict(model(batch).items())
        assert set(outputs) == set(expected)
        for name, tensor in outputs.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("keep_rate", "side"), [(0.6, 40), (0.55, 80), (0.7, 80), (0.9, 80)])
def test_a_traced_model_keeps_the_tokens_that_the_model_keeps(keep_rate, side):
    """0.6 * 25 is 15 in float64, as in Python, and more than that in float32."""
    size = {"image_size": side, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    model = EViTForImageClassification(tiny_config_with(**size, keep_rate=keep_rate)).eval().requires_grad_(False)
    images = torch.randn(2, 3, side, side)
    for interpolates in (False, True):

        def kept(images, interpolates=interpolates):
            return model(images, interpolate_pos_encoding=interpolates).attentive_index

        with torch.no_grad():
            for one, other in zip(torch.jit.trace(kept, images)(images), kept(images), strict=True):
                assert torch.equal(one, other)
