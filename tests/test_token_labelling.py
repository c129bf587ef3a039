import pytest
import torch
from torch.nn.functional import cross_entropy

from evit_hf.token_labelling import mix_targets, mix_tokens, random_mix_box, token_labelling_loss


def test_a_box_takes_the_tokens_of_the_mirrored_image():
    tokens = torch.arange(3 * 6).view(3, 6, 1)  # 2 rows, 3 columns
    mixed = mix_tokens(tokens, (0, 1, 1, 2), (2, 3))
    assert mixed[0, :, 0].tolist() == [0, 13, 14, 3, 4, 5]
    assert mixed[1, :, 0].tolist() == [6, 7, 8, 9, 10, 11]  # its own mirror
    assert mixed[2, :, 0].tolist() == [12, 1, 2, 15, 16, 17]
    assert torch.equal(mix_tokens(tokens, (0, 0, 0, 0), (2, 3)), tokens)


def test_class_targets_mix_in_proportion_to_the_area():
    class_targets, token_targets = torch.eye(2), torch.eye(2).unsqueeze(1).expand(-1, 6, -1)
    mixed_class, mixed_tokens = mix_targets(class_targets, token_targets, (0, 0, 1, 2), (2, 3))
    torch.testing.assert_close(mixed_class, torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]))
    torch.testing.assert_close(mixed_tokens.mean(1), mixed_class)


def test_loss_equals_a_loop_over_tokens_without_the_fused_one():
    torch.manual_seed(0)
    cls_logits, aux_logits = torch.randn(2, 4), torch.randn(2, 3, 4)
    patch_index = torch.tensor([[5, 0, -1], [2, -1, 1]])
    class_targets, token_targets = torch.rand(2, 4).softmax(-1), torch.rand(2, 6, 4).softmax(-1)
    losses = [
        cross_entropy(aux_logits[b, i], token_targets[b, patch_index[b, i]])
        for b in range(2)
        for i in range(3)
        if patch_index[b, i] >= 0
    ]
    expected = 2.0 * cross_entropy(cls_logits, class_targets) + 0.5 * sum(losses) / 4
    loss = token_labelling_loss(
        cls_logits, aux_logits, patch_index, class_targets, token_targets, class_weight=2.0, dense_weight=0.5
    )
    torch.testing.assert_close(loss, expected)


def test_without_token_targets_every_patch_has_the_label_of_its_image():
    torch.manual_seed(0)
    cls_logits, aux_logits, labels = torch.randn(2, 4), torch.randn(2, 3, 4), torch.tensor([1, 3])
    loss = token_labelling_loss(cls_logits, aux_logits, torch.arange(3).expand(2, -1), labels)
    expected = cross_entropy(cls_logits, labels) + cross_entropy(aux_logits.flatten(0, 1), labels.repeat_interleave(3))
    torch.testing.assert_close(loss, expected)


def test_random_boxes_lie_in_the_grid_and_cover_about_half_of_it_at_most():
    torch.manual_seed(0)
    areas = []
    for _ in range(2000):
        top, left, height, width = random_mix_box((8, 12))
        assert min(top, left, height, width) >= 0
        assert top + height <= 8
        assert left + width <= 12
        areas.append(height * width / 96)
    # Uniform shares have mean 1/2; boxes are cut at the border and rounded down, so less is left.
    assert 0.2 < sum(areas) / len(areas) < 0.5
    assert max(areas) > 0.8


def test_boxes_outside_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"= \(0, 0, 16, 16\), which is not inside the grid of 8x8 patches: count in"):
        mix_tokens(torch.zeros(2, 64, 1), (0, 0, 16, 16), (8, 8))
