import pytest
import torch
from golden import lvvit_state_dict, lvvit_tensors
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from evit_hf import EViTLVConfig, EViTLVForImageClassification
from evit_hf.modeling_evit_lv import EViTLVLayer
from evit_hf.profiling import num_tokens_by_layer
from evit_training.learning.objective import Objective


def golden_model(**changes):
    """The geometry of the golden file: 64 patches, 16 layers, reorganized at 4, 8 and 12."""
    settings = {"image_size": 128, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 144}
    model = EViTLVForImageClassification(EViTLVConfig(**settings, num_labels=10, **changes)).eval()
    model.load_state_dict(lvvit_state_dict())
    return model


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dense_outputs_are_the_official_ones(implementation):
    golden = lvvit_tensors()
    model = golden_model(keep_rate=1.0, attn_implementation=implementation)
    outputs = model(golden["pixel_values"])
    for name in ("logits", "cls_logits", "aux_logits"):
        torch.testing.assert_close(outputs[name], golden[name], rtol=1e-4, atol=1e-4)
    hidden_states = model.vit(golden["pixel_values"]).last_hidden_state
    torch.testing.assert_close(hidden_states, golden["last_hidden_state"], rtol=1e-4, atol=1e-4)
    assert outputs.patch_index.tolist() == [list(range(64))] * 2


@pytest.mark.parametrize("fuse", [True, False])
def test_auxiliary_head_sees_the_patches_that_are_left(fuse):
    model = golden_model(keep_rate=0.5, inattentive_tokens="fused" if fuse else "dropped")
    outputs = model(lvvit_tensors()["pixel_values"])
    assert outputs.aux_logits.shape == (2, 10 if fuse else 8, 10)  # 64, 33, 18, 10 or 64, 32, 16, 8
    assert (outputs.patch_index[:, -1] == -1).all() == fuse
    for logits, cls_logits, aux_logits, patches in zip(
        outputs.logits, outputs.cls_logits, outputs.aux_logits, outputs.patch_index, strict=True
    ):
        best = torch.stack([aux_logits[i] for i in range(len(patches)) if patches[i] >= 0]).max(dim=0).values
        torch.testing.assert_close(logits, cls_logits + 0.5 * best)


def test_counted_tokens_learn_the_labels_of_all_patches_that_they_count():
    torch.manual_seed(0)
    model, pixel_values = golden_model(macs=0.96).train(), lvvit_tensors()["pixel_values"]
    labels, token_targets = torch.tensor([1, 3]), torch.rand(2, 64, 10).softmax(-1)
    outputs = model(pixel_values, labels=labels, token_targets=token_targets)
    sizes, losses = outputs.token_sizes, []
    assert sizes.sum(1).tolist() == [64, 64]
    for image in range(2):
        for token, size in enumerate(sizes[image]):
            counted = outputs.counted_by[image] == token
            assert counted.sum() == size
            mean_label = token_targets[image, counted].mean(0)
            losses.append(size * cross_entropy(outputs.aux_logits[image, token], mean_label))
    expected = cross_entropy(outputs.cls_logits, labels) + sum(losses) / 128
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(Objective(model.config).label_loss(outputs, labels, None, token_targets), expected)


def test_a_fused_token_with_high_logits_does_not_answer():
    model = golden_model(keep_rate=0.5)
    with torch.no_grad():
        hidden_states = model.vit(lvvit_tensors()["pixel_values"]).last_hidden_state
        fused = hidden_states[0, -1]
        model.aux_classifier.weight[3] = 100 * fused / fused.norm()
    outputs = model(lvvit_tensors()["pixel_values"])
    assert outputs.aux_logits[0, :, 3].argmax() == outputs.aux_logits.shape[1] - 1
    patches = outputs.patch_index[0] >= 0
    expected = outputs.cls_logits[0, 3] + 0.5 * outputs.aux_logits[0, patches, 3].max()
    torch.testing.assert_close(outputs.logits[0, 3], expected)


def test_positions_follow_a_mixed_image_through_the_reorganization():
    """A box over the whole grid swaps the two images; positions and choices swap with them."""
    model, pixel_values = golden_model(keep_rate=0.5), lvvit_tensors()["pixel_values"]
    plain = model(pixel_values)
    mixed = model(pixel_values, mix_box=(0, 0, 8, 8))
    torch.testing.assert_close(mixed.logits, plain.logits.flip(0))
    assert torch.equal(mixed.patch_index, plain.patch_index.flip(0))


def test_training_gives_the_class_logits_and_a_finite_loss():
    model, pixel_values = golden_model(keep_rate=0.7, drop_path_rate=0.1).train(), lvvit_tensors()["pixel_values"]
    token_targets = torch.rand(2, 64, 10).softmax(-1)
    outputs = model(pixel_values, labels=torch.tensor([1, 2]), mix_box=(1, 2, 3, 4), token_targets=token_targets)
    assert torch.equal(outputs.logits, outputs.cls_logits)
    outputs.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    evaluated = model.eval()(pixel_values, labels=torch.tensor([1, 2]))
    expected = torch.nn.functional.cross_entropy(evaluated.logits, torch.tensor([1, 2]))
    torch.testing.assert_close(evaluated.loss, expected)


def test_multi_label_problems_train_both_classifiers():
    model = golden_model(keep_rate=0.7, problem_type="multi_label_classification").train()
    outputs = model(lvvit_tensors()["pixel_values"], labels=torch.tensor([[1.0, 0, 1] + [0] * 7, [0] * 9 + [1.0]]))
    outputs.loss.backward()
    assert model.aux_classifier.weight.grad.abs().sum() > 0
    assert not torch.equal(outputs.logits, outputs.cls_logits)


@pytest.mark.parametrize("size", [15, 16, 17, 31, 32, 33, 47, (31, 48), (46, 31)])
def test_every_image_size_has_the_patches_that_the_stem_makes(size):
    """The stem halves the image, rounding up: one pixel less than three patches are three patches."""
    geometry = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = EViTLVConfig(**geometry, image_size=size, stem_hidden_size=4, keep_rate=0.5)
    model = EViTLVForImageClassification(config).eval()
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, 3, height, width)
    patches = model.vit.embeddings.patch_embeddings(images)
    rows, columns = config.patch_grid()
    assert patches.shape[1] == rows * columns == (height + 1) // 16 * ((width + 1) // 16)
    assert num_tokens_by_layer(config)[0][0] == 1 + rows * columns
    expected = model(images).logits
    assert expected.isfinite().all()
    model.set_image_size(64)
    model.set_image_size(size)
    assert model(images).logits.shape == expected.shape
    larger = torch.randn(1, 3, height + 15, width + 31)
    assert model(larger, interpolate_pos_encoding=True, mix_box=(0, 0, 1, 1)).logits.isfinite().all()


def test_residual_branches_are_scaled_in_evaluation_too():
    layer = EViTLVLayer(golden_model(residual_scale=2.0).config, drop_path_rate=0.5)
    assert torch.equal(layer.eval().residual_branch(torch.ones(3, 2)), torch.full((3, 2), 0.5))
    torch.manual_seed(0)
    assert layer.train().residual_branch(torch.ones(100, 1)).unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"residual_scale": 0}, "`residual_scale` must be a positive number, got 0"),
        ({"stem_hidden_size": "64"}, "`stem_hidden_size` must be a positive number"),
        ({"patch_size": 7}, "`patch_size` must be one even number, got 7"),
    ],
)
def test_impossible_lvvits_are_refused(bad, sentence):
    with pytest.raises(Exception, match=sentence):
        EViTLVConfig(**bad)


class Rows(torch.utils.data.Dataset):
    """16 noisy images with labels."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(16, 3, 32, 32, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": i % 5}


def tiny(**changes):
    torch.manual_seed(0)
    settings = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 4, "hidden_size": 32, "num_labels": 5}
    settings |= {"num_attention_heads": 2, "intermediate_size": 64, "stem_hidden_size": 8, "initializer_range": 0.2}
    return EViTLVForImageClassification(EViTLVConfig(**(settings | changes)))


def test_the_trainer_of_transformers_evaluates_rows_that_have_only_labels(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(
        tiny(),
        arguments,
        eval_dataset=Rows(),
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
    )
    assert trainer.label_names == ["labels"]
    assert {"eval_loss", "eval_accuracy"} <= trainer.evaluate().keys()
    assert trainer.predict(Rows()).predictions.shape == (16, 5)


def test_accumulated_steps_of_the_trainer_have_the_gradients_of_whole_ones(tmp_path):
    norms = []
    for batch_size, steps in ((16, 1), (4, 4)):
        arguments = TrainingArguments(
            str(tmp_path),
            report_to=[],
            use_cpu=True,
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
        )
        trainer = Trainer(tiny(), arguments, train_dataset=Rows())
        trainer.train()
        norms.append(next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize("budget", [{"keep_rate": 1.0}, {"keep_rate": 0.6}, {"macs": 0.9, "image_size": 64}])
def test_hidden_patches_have_no_say(budget):
    model = tiny(**budget)
    images = Rows().images if "macs" not in budget else torch.rand(16, 3, 64, 64)
    num_patches, size = model.config.patch_grid()[0] * model.config.patch_grid()[1], images.shape[-1]
    mask = torch.ones(16, 1 + num_patches)
    mask[:, 1 + num_patches // 2 :] = 0  # the lower half, and the row above it, which the stem mixes with it
    mask[:, 1 + num_patches // 2 - model.config.patch_grid()[1] : 1 + num_patches // 2] = 0
    others = images.clone()
    others[:, :, size // 2 :] = torch.randn_like(others[:, :, size // 2 :]) * 3
    labels = torch.arange(16) % 5
    for is_training in (False, True):
        model.train(is_training)
        for module in model.modules():  # of the stem
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        one, other = (model(x, attention_mask=mask, labels=labels) for x in (images, others))
        torch.testing.assert_close(one.logits, other.logits)
        torch.testing.assert_close(one.loss, other.loss)


def test_evaluating_soft_labels_changes_nothing_of_the_training():
    model = tiny()
    soft = torch.rand(16, 5).softmax(-1)
    evaluated = model.eval()(Rows().images, labels=soft)
    torch.testing.assert_close(evaluated.loss, cross_entropy(evaluated.logits, soft))
    assert model.config.problem_type is None
    assert model.train()(Rows().images, labels=soft).loss.item() > 2  # two cross-entropies of five classes
