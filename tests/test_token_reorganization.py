import pytest
import torch
from reference import class_token_attention_slowly, reorganize_slowly

from evit_hf.token_reorganization import (
    append_fused_patch,
    class_token_attention,
    class_token_probabilities,
    follow_patches,
    fused_token,
    inattentive_weights,
    num_attentive_tokens,
    reorganize_token_mask,
    reorganize_tokens,
    scores_by_patch,
)


def random_tokens(num_image_tokens=11, num_prefix_tokens=1, batch_size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(batch_size, num_prefix_tokens + num_image_tokens, 6, generator=generator)
    attention = torch.rand(batch_size, num_image_tokens + 1, generator=generator).softmax(dim=1)[:, 1:]
    return hidden_states, attention


# Worked examples


def test_three_of_five_tokens_by_hand():
    class_token, tokens = [[9.0]], [[1.0], [2.0], [3.0], [4.0], [5.0]]
    hidden_states = torch.tensor([class_token + tokens])
    attention = torch.tensor([[0.30, 0.10, 0.25, 0.05, 0.20]])
    reorganized, attentive_index = reorganize_tokens(hidden_states, attention, num_attentive_tokens(0.6, 5))
    assert attentive_index.tolist() == [[0, 2, 4]]
    torch.testing.assert_close(reorganized, torch.tensor([[[9.0], [1.0], [3.0], [5.0], [0.10 * 2 + 0.05 * 4]]]))


@pytest.mark.parametrize(
    ("keep_rate", "fuse", "counts"),
    [
        (0.9, True, [178, 162, 147]),
        (0.8, True, [158, 128, 104]),
        (0.7, True, [139, 99, 71]),
        (0.6, True, [119, 73, 45]),
        (0.5, True, [99, 51, 27]),
        (0.7, False, [138, 97, 68]),
    ],
)
def test_token_counts_follow_the_paper(keep_rate, fuse, counts):
    num_image_tokens, seen = 196, []
    for _ in range(3):
        num_image_tokens = num_attentive_tokens(keep_rate, num_image_tokens) + fuse
        seen.append(num_image_tokens)
    assert seen == counts


def test_number_of_tokens_is_rounded_up_as_the_official_float_product():
    assert num_attentive_tokens(0.5, 7) == 4
    assert num_attentive_tokens(0.55, 100) == 56  # 0.55 * 100 is 55.000000000000007
    assert num_attentive_tokens(1e-9, 100) == 1
    assert num_attentive_tokens(1.0, 100) == 100


# Against slow, independent references


@pytest.mark.parametrize("keep_rate", [0.05, 0.3, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("num_prefix_tokens", [1, 2, 5])
def test_reorganization_equals_the_loop_over_tokens(keep_rate, fuse, num_prefix_tokens):
    hidden_states, attention = random_tokens(num_prefix_tokens=num_prefix_tokens)
    expected, expected_index = reorganize_slowly(hidden_states, attention, keep_rate, fuse, num_prefix_tokens)
    reorganized, attentive_index = reorganize_tokens(
        hidden_states,
        attention,
        num_attentive_tokens(keep_rate, 11),
        num_prefix_tokens=num_prefix_tokens,
        fuse_inattentive_tokens=fuse,
    )
    assert torch.equal(attentive_index, expected_index)
    torch.testing.assert_close(reorganized, expected)


@pytest.mark.parametrize("num_prefix_tokens", [1, 2])
def test_class_token_attention_equals_the_loop_over_heads(num_prefix_tokens):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 3, 7, 8, generator=generator).unbind(0)
    expected = class_token_attention_slowly(query, key, 0.3, num_prefix_tokens)
    row = class_token_probabilities(query, key, 0.3)
    assert row.shape == (2, 3, 1, 7)
    torch.testing.assert_close(class_token_attention(row, num_prefix_tokens), expected)
    whole_map = (query @ key.transpose(-2, -1) * 0.3).softmax(-1)
    torch.testing.assert_close(class_token_attention(whole_map, num_prefix_tokens), expected)


# Invariants


def test_prefix_tokens_are_never_moved_or_changed():
    hidden_states, attention = random_tokens(num_prefix_tokens=2)
    for num_attentive in range(1, 12):
        reorganized, _ = reorganize_tokens(hidden_states, attention, num_attentive, num_prefix_tokens=2)
        assert torch.equal(reorganized[:, :2], hidden_states[:, :2])


def test_fused_token_is_attention_weighted_sum_without_renormalization():
    tokens = torch.ones(1, 4, 3)
    attention = torch.tensor([[0.4, 0.1, 0.2, 0.1]])
    weights = inattentive_weights(attention, torch.tensor([[0, 2]]))
    assert weights.tolist() == [[0.0, attention[0, 1], 0.0, attention[0, 3]]]
    fused = fused_token(tokens, weights)
    torch.testing.assert_close(fused, torch.full((1, 1, 3), 0.2))


def test_gradient_of_the_fused_token_flows_through_the_scores():
    hidden_states, attention = random_tokens()
    attention.requires_grad_()
    reorganized, attentive_index = reorganize_tokens(hidden_states, attention, 4)
    reorganized[:, -1].sum().backward()
    expected = hidden_states[:, 1:].sum(-1).scatter(1, attentive_index, 0.0)
    torch.testing.assert_close(attention.grad, expected)


def test_permuting_the_image_tokens_permutes_the_choice_alone():
    hidden_states, attention = random_tokens()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    permuted = torch.cat((hidden_states[:, :1], hidden_states[:, 1:][:, order]), dim=1)
    one, one_index = reorganize_tokens(hidden_states, attention, 5)
    other, other_index = reorganize_tokens(permuted, attention[:, order], 5)
    torch.testing.assert_close(one, other)
    assert torch.equal(one_index, order[other_index])


def test_keeping_all_tokens_changes_nothing():
    hidden_states, attention = random_tokens()
    reorganized, _ = reorganize_tokens(hidden_states, attention, 11)
    assert reorganized is hidden_states


def test_scores_are_float32_whatever_the_input():
    query = torch.randn(1, 2, 5, 4).to(torch.bfloat16)
    row = class_token_probabilities(query, query, 0.5)
    assert row.dtype == torch.float32
    assert class_token_attention(row.to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tokens_keep_their_dtype(dtype):
    hidden_states, attention = random_tokens()
    reorganized, _ = reorganize_tokens(hidden_states.to(dtype), attention, 4)
    assert reorganized.dtype == dtype


# The choice from outside


def test_scores_from_outside_choose_and_attention_still_weighs():
    hidden_states, attention = random_tokens()
    scores = -attention
    reorganized, attentive_index = reorganize_tokens(hidden_states, attention, 4, token_scores=scores)
    assert torch.equal(attentive_index, attention.argsort(dim=1)[:, :4])
    weights = inattentive_weights(attention, attentive_index)
    torch.testing.assert_close(reorganized[:, -1:], fused_token(hidden_states[:, 1:], weights))


def test_index_from_outside_is_the_choice():
    hidden_states, attention = random_tokens(batch_size=1)
    reorganized, attentive_index = reorganize_tokens(
        hidden_states, attention, 2, attentive_index=torch.tensor([[7, 3]])
    )
    assert attentive_index.tolist() == [[7, 3]]
    assert torch.equal(reorganized[:, 1:3], hidden_states[:, [8, 4]])


def test_patches_are_followed_through_two_layers():
    patch_index = torch.arange(4).expand(1, -1)
    kept = follow_patches(patch_index, torch.tensor([[2, 0]]))
    assert kept.tolist() == [[2, 0]]
    tokens_left = append_fused_patch(kept)
    assert tokens_left.tolist() == [[2, 0, -1]]
    assert follow_patches(tokens_left, torch.tensor([[2, 0]])).tolist() == [[-1, 2]]


def test_a_fused_token_ranks_last_under_scores_by_patch():
    scores = scores_by_patch(torch.tensor([[0.1, -5.0, 0.3]]), torch.tensor([[2, -1, 1]]))
    assert scores.tolist() == [[pytest.approx(0.3), float("-inf"), -5.0]]


def test_token_mask_follows_the_tokens():
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 1, 0, 0]])
    index = torch.tensor([[0, 2], [1, 0]])
    assert reorganize_token_mask(mask, index).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert reorganize_token_mask(mask, index[:, :1]).tolist() == [[1, 1, 1], [1, 1, 0]]
    assert reorganize_token_mask(mask, index, fuse_inattentive_tokens=False).tolist() == [[1, 1, 1], [1, 1, 0]]


def test_masked_tokens_have_no_attention():
    query = torch.randn(1, 2, 4, 8)
    row = class_token_probabilities(query, query, 0.3, torch.tensor([[1, 1, 0, 1]]))
    assert torch.equal(row[..., 2], torch.zeros(1, 2, 1))
    torch.testing.assert_close(row.sum(-1), torch.ones(1, 2, 1))


# Errors


def test_impossible_requests_are_refused():
    hidden_states, attention = random_tokens()
    for num_attentive in (0, 12):
        with pytest.raises(ValueError, match=f"between 1 and the 11 image tokens, got {num_attentive}"):
            reorganize_tokens(hidden_states, attention, num_attentive)
    with pytest.raises(ValueError, match=r"`attention` must be .* = \(3, 11\), got \(3, 12\): leave out the prefix"):
        reorganize_tokens(hidden_states, torch.rand(3, 12), 4)
    with pytest.raises(ValueError, match=r"`token_scores` must be"):
        reorganize_tokens(hidden_states, attention, 4, token_scores=torch.rand(3, 10))
    with pytest.raises(ValueError, match=r"`attentive_index` must be .* = \(3, 4\), got \(3, 5\)"):
        reorganize_tokens(hidden_states, attention, 4, attentive_index=torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="pass one of them"):
        reorganize_tokens(
            hidden_states, attention, 4, token_scores=attention, attentive_index=torch.zeros(3, 4, dtype=torch.long)
        )
