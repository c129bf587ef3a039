from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config_with
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from evit_hf import (
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVConfig,
    EViTLVForImageClassification,
)
from evit_training.arguments import TeacherArguments
from evit_training.learning.models import load_classifier
from evit_training.learning.objective import distillation_loss
from evit_training.learning.teachers import Oracle, build_oracle, build_teacher


@pytest.fixture
def processor():
    return ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3)


def tiny(**changes):
    torch.manual_seed(changes.pop("seed", 0))
    return EViTForImageClassification(tiny_config_with(**changes)).eval()


# The oracle


@pytest.mark.parametrize("from_layer", ["same", "last"])
def test_oracle_scores_are_the_dense_attention_of_its_class_token(from_layer, images):
    oracle = tiny(seed=1, attn_implementation="eager")
    oracle.set_attn_implementation("eager")
    scores = Oracle(oracle, [1, 2, 3], from_layer)(images)
    maps = oracle(images, keep_rate=1.0, output_attentions=True).attentions
    assert len(scores) == 3
    for layer, score in zip([1, 2, 3] if from_layer == "same" else [3, 3, 3], scores, strict=True):
        torch.testing.assert_close(score, maps[layer][:, :, 0, 1:].mean(dim=1))


@pytest.mark.parametrize("fuse", [True, False])
def test_a_student_under_an_oracle_keeps_the_patches_that_the_oracle_names(fuse, images):
    student, oracle = tiny(inattentive_tokens="fused" if fuse else "dropped"), tiny(seed=1)
    scores = Oracle(oracle, [1, 2, 3])(images)
    kept = student(images, patch_scores=scores).attentive_index
    for image in range(len(images)):
        left = set(range(16))
        for layer in range(3):
            order = sorted(left, key=lambda patch: -scores[layer][image, patch].item())
            expected = set(order[: kept[layer].shape[1]])
            assert set(kept[layer][image].tolist()) - {-1} == expected
            left = expected
    own = student(images).attentive_index
    assert any(set(a.tolist()) != set(b.tolist()) for a, b in zip(own[0], kept[0], strict=True))


def test_the_oracle_is_frozen_and_stays_in_evaluation(images):
    student = tiny(drop_path_rate=0.5)
    oracle = build_oracle(TeacherArguments(oracle="initial"), student, load_classifier)
    assert not any(parameter.requires_grad for parameter in oracle.parameters())
    before = oracle.train()(images)
    assert not oracle.model.training
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, oracle(images), strict=True))  # a copy, not the student


def test_any_vit_of_the_same_grid_can_be_the_oracle(tmp_path, images):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="`--oracle` has 2 layers, but layer 3 of the student reorganizes"):
        build_oracle(TeacherArguments(oracle=str(tmp_path / "vit")), tiny(), load_classifier)
    arguments = TeacherArguments(oracle=str(tmp_path / "vit"), oracle_layer="last")
    scores = build_oracle(arguments, tiny(), load_classifier)(images)
    assert [tuple(score.shape) for score in scores] == [(3, 16)] * 3
    config.image_size = 64
    ViTForImageClassification(config).save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="has 8x8 patches and the student 4x4: scores are by patch"):
        build_oracle(TeacherArguments(oracle=str(tmp_path / "large")), tiny(), load_classifier)


def test_the_oracle_sees_images_in_its_own_normalization(tmp_path, processor, images):
    oracle = tiny(seed=1)
    oracle.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.2] * 3, image_std=[0.4] * 3).save_pretrained(
        tmp_path
    )
    student = tiny()
    scores = build_oracle(TeacherArguments(oracle=str(tmp_path)), student, load_classifier, 32, processor)(images)
    pixels = images * 0.25 + 0.5  # back to [0, 1]
    torch.testing.assert_close(scores, Oracle(oracle, [1, 2, 3])((pixels - 0.2) / 0.4))
    own = build_oracle(TeacherArguments(oracle="initial"), student, load_classifier, 32, processor)(images)
    torch.testing.assert_close(own, Oracle(student, [1, 2, 3])(images), rtol=0, atol=0)


# The teacher


def save_teacher(folder, names, image_size=32, mean=0.2, std=0.4):
    torch.manual_seed(3)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=image_size,
        patch_size=8,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        initializer_range=0.3,
    )
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    ViTImageProcessor(size=size, image_mean=[mean] * 3, image_std=[std] * 3).save_pretrained(folder)
    return model


def test_the_teacher_sees_its_own_normalization_and_size_and_answers_in_the_students_classes(
    tmp_path, processor, images
):
    model = save_teacher(tmp_path / "teacher", ["extra", "B", "a", "c", "d", "e"], image_size=64)
    teacher = build_teacher(
        TeacherArguments(teacher=str(tmp_path / "teacher")), tiny(), processor, ["a", "b", "c", "d", "e"]
    )
    logits, patches = teacher(images)
    pixels = images * 0.25 + 0.5  # back to [0, 1]
    wanted = torch.nn.functional.interpolate((pixels - 0.2) / 0.4, (64, 64), mode="bicubic", antialias=True)
    torch.testing.assert_close(logits, model(wanted).logits[:, [2, 1, 3, 4, 5]], rtol=1e-4, atol=1e-4)
    assert patches is None


def test_the_teacher_sees_the_pixels_of_mixed_tokens(tmp_path, processor, images):
    save_teacher(tmp_path / "teacher", list("abcde"), mean=0.5, std=0.25)
    teacher = build_teacher(TeacherArguments(teacher=str(tmp_path / "teacher")), tiny(), processor, list("abcde"))
    mixed = images.clone()
    mixed[:, :, 8:24, 16:32] = images.flip(0)[:, :, 8:24, 16:32]
    torch.testing.assert_close(teacher(images, (1, 2, 2, 2))[0], teacher(mixed)[0])


def test_a_teacher_that_is_the_student_leaves_its_images_alone(processor, images):
    teacher = build_teacher(TeacherArguments(teacher="initial"), tiny(), processor, list("abcde"))
    before = images.clone()
    teacher(images, (1, 2, 2, 2))
    assert torch.equal(images, before)


def test_a_teacher_without_a_trained_classifier_is_refused(processor, tmp_path):
    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks weights of a classifier, .*classifier.weight"):
        build_teacher(TeacherArguments(teacher=str(tmp_path)), tiny(), processor, ["LABEL_0", "LABEL_1"])


def test_the_dense_student_itself_can_be_the_teacher(processor, images):
    student = tiny()
    teacher = build_teacher(TeacherArguments(teacher="initial"), student, processor, list("abcde"))
    torch.testing.assert_close(teacher(images)[0], student(images, keep_rate=1.0).logits)
    assert not torch.allclose(teacher(images)[0], student(images).logits)


def test_an_lv_vit_teacher_labels_every_patch(processor, images, tmp_path):
    config = EViTLVConfig(
        image_size=32,
        patch_size=8,
        num_hidden_layers=3,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        stem_hidden_size=8,
        id2label=dict(enumerate("ab")),
    )
    model = EViTLVForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    teacher = build_teacher(TeacherArguments(teacher=str(tmp_path)), tiny(), processor, ["b", "a"])
    _, patches = teacher(images)
    assert patches.shape == (3, 16, 2)
    expected = model(images, keep_rate=1.0).aux_logits.softmax(-1).flip(-1)
    torch.testing.assert_close(patches, expected)


def test_a_teacher_of_patches_has_the_grid_of_the_student(processor, tmp_path):
    small = {"patch_size": 8, "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2}
    small |= {"intermediate_size": 64, "stem_hidden_size": 8, "id2label": dict(enumerate("ab"))}
    EViTLVForImageClassification(EViTLVConfig(image_size=64, **small)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    student = EViTLVForImageClassification(EViTLVConfig(image_size=32, **small))
    with pytest.raises(ValueError, match="has 8x8 patches and the student 4x4: it teaches each patch"):
        build_teacher(TeacherArguments(teacher=str(tmp_path)), student, processor, ["a", "b"])


def test_a_teacher_of_other_classes_is_refused(tmp_path, processor):
    save_teacher(tmp_path / "teacher", ["a", "b", "z"])
    arguments = TeacherArguments(teacher=str(tmp_path / "teacher"))
    with pytest.raises(ValueError, match=r"knows 3 classes but not \['c'\] of the 3 of the data"):
        build_teacher(arguments, tiny(), processor, ["a", "b", "c"])
    with pytest.raises(ValueError, match="`--teacher` teaches one class for each image"):
        build_teacher(arguments, tiny(problem_type="multi_label_classification"), processor, ["a", "b"])


def test_a_teacher_without_names_is_matched_by_number(tmp_path, processor, images):
    model = save_teacher(tmp_path / "teacher", ["LABEL_0", "LABEL_1"], mean=0.5, std=0.25)
    arguments = TeacherArguments(teacher=str(tmp_path / "teacher"))
    teacher = build_teacher(arguments, tiny(), processor, ["x", "y"])
    torch.testing.assert_close(teacher(images)[0], model(images).logits)


def test_distillation_losses_follow_deit():
    torch.manual_seed(0)
    student, teacher, base = torch.randn(4, 3), torch.randn(4, 3), torch.tensor(2.0)
    outputs = {"logits": student}
    outputs = SimpleNamespace(logits=student, get=outputs.get)
    hard = distillation_loss(outputs, teacher, base, TeacherArguments(distillation_weight=0.3))
    picked = torch.stack([-student.log_softmax(1)[i, teacher[i].argmax()] for i in range(4)]).mean()
    torch.testing.assert_close(hard, 0.7 * base + 0.3 * picked)
    soft = TeacherArguments(distillation="soft", distillation_weight=0.3, distillation_temperature=3.0)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(outputs, teacher, base, soft), 0.7 * base + 0.3 * 9 * divergence)


def test_the_distillation_token_learns_from_the_teacher_and_the_class_token_from_labels(images):
    model = EViTForImageClassificationWithTeacher(tiny_config_with(use_distillation_token=True)).train()
    outputs = model(images)
    loss = distillation_loss(outputs, torch.randn(3, 5), torch.zeros(()), TeacherArguments())
    loss.backward()
    assert model.cls_classifier.weight.grad is None or model.cls_classifier.weight.grad.abs().max() == 0
    assert model.distillation_classifier.weight.grad.abs().max() > 0
