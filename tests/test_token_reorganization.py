import pytest
import torch
from reference import average_slowly, class_token_attention_slowly, count_slowly, reorganize_slowly

from evit_hf.token_reorganization import (
    TowerCosts,
    all_patches,
    append_fused_patch,
    averaged_tokens,
    choose_tokens,
    class_token_attention,
    class_token_probabilities,
    follow_patches,
    follow_tokens,
    fused_token,
    inattentive_weights,
    log_sizes,
    mean_keys,
    num_attentive_tokens,
    rearrange_tokens,
    reorganize_token_mask,
    reorganize_tokens,
    scores_by_patch,
    tokens_left_at_macs,
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
        inattentive_tokens="fused" if fuse else "dropped",
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
    assert reorganize_token_mask(mask, index, inattentive_tokens="dropped").tolist() == [[1, 1, 1], [1, 1, 0]]


def test_masked_tokens_have_no_attention():
    query = torch.randn(1, 2, 4, 8)
    row = class_token_probabilities(query, query, 0.3, torch.tensor([[1, 1, 0, 1]]))
    assert torch.equal(row[..., 2], torch.zeros(1, 2, 1))
    torch.testing.assert_close(row.sum(-1), torch.ones(1, 2, 1))


# Counting


def counted(attention, keys, num_attentive, sizes=None, hidden_states=None):
    """The choice for one image, and what it makes of the tokens."""
    keys = mean_keys(torch.as_tensor(keys)[None, None], num_prefix_tokens=0)
    sizes = None if sizes is None else torch.tensor([sizes])
    choice = choose_tokens(
        torch.tensor([attention]), num_attentive, inattentive_tokens="counted", keys=keys, token_sizes=sizes
    )
    return choice if hidden_states is None else (choice, rearrange_tokens(hidden_states, choice))


def test_counting_by_hand():
    # The second token looks like the first, which is attended to more: it is counted, though it comes second.
    hidden_states = torch.tensor([[[9.0, 9.0], [4.0, 0.0], [0.0, 4.0], [1.0, 1.0]]])
    choice, tokens = counted([0.4, 0.3, 0.2], [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]], 2, hidden_states=hidden_states)
    assert choice.attentive_index.tolist() == [[0, 2]]
    assert choice.counted.counted_by.tolist() == [[0, 0, 1]]
    assert choice.counted.token_sizes.tolist() == [[2.0, 1.0]]
    # Half of (4, 0), half of the mean (2, 2), is (3, 1), which gets the length 4.
    mixed = torch.tensor([3.0, 1.0]) * 4 / 10**0.5
    torch.testing.assert_close(tokens, torch.stack([hidden_states[0, 0], mixed, hidden_states[0, 3]])[None])


@pytest.mark.parametrize("num_attentive", [1, 5, 10])
@pytest.mark.parametrize("num_prefix_tokens", [1, 3])
def test_counting_equals_the_loop_over_tokens(num_attentive, num_prefix_tokens):
    hidden_states, attention = random_tokens(num_prefix_tokens=num_prefix_tokens)
    generator = torch.Generator().manual_seed(5)
    key = torch.randn(3, 4, num_prefix_tokens + 11, 8, generator=generator)
    sizes = torch.randint(1, 6, (3, 11), generator=generator).float()
    settings = {"num_prefix_tokens": num_prefix_tokens, "inattentive_tokens": "counted"}
    keys = mean_keys(key, num_prefix_tokens)
    choice = choose_tokens(attention, num_attentive, keys=keys, token_sizes=sizes, **settings)
    tokens = rearrange_tokens(hidden_states, choice, num_prefix_tokens)
    for image in range(3):
        own_keys = key[image, :, num_prefix_tokens:].double().mean(dim=0)
        kept, counted_by, new_sizes = count_slowly(
            attention[image].double().tolist(), own_keys, sizes[image].tolist(), num_attentive
        )
        assert choice.attentive_index[image].tolist() == kept
        assert choice.counted.counted_by[image].tolist() == counted_by
        assert choice.counted.token_sizes[image].tolist() == new_sizes
        own = hidden_states[image].double()
        rows = average_slowly(own[num_prefix_tokens:], kept, counted_by, sizes[image].tolist())
        expected = torch.cat((own[:num_prefix_tokens], rows))
        torch.testing.assert_close(tokens[image].double(), expected, rtol=1e-5, atol=1e-5)


def test_sizes_sum_to_the_patches_and_patches_are_followed_through_layers():
    hidden_states, attention = random_tokens(num_image_tokens=20)
    tokens, followed = all_patches(3, 20, torch.device("cpu")), torch.arange(20).expand(3, -1)
    for seed, num_attentive in enumerate((15, 9, 4)):
        keys = torch.randn(3, 1, attention.shape[1], 8, generator=torch.Generator().manual_seed(seed))
        choice = choose_tokens(
            attention,
            num_attentive,
            inattentive_tokens="counted",
            keys=mean_keys(keys, 0),
            token_sizes=tokens.token_sizes,
        )
        followed = choice.counted.counted_by.gather(1, followed)
        attention = attention.gather(1, choice.attentive_index)
        tokens = follow_tokens(tokens, "counted", *choice.tensors())
        assert torch.equal(tokens.counted_by, followed)
        assert tokens.token_sizes.sum(dim=1).tolist() == [20.0] * 3
        for image in range(3):
            assert torch.equal(tokens.counted_by[image].bincount(minlength=num_attentive), tokens.token_sizes[image])
            # A kept token is a patch, which it counts itself.
            itself = tokens.counted_by[image][tokens.patch_index[image]]
            assert itself.tolist() == list(range(num_attentive))


def test_a_size_is_as_many_equal_keys():
    query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    sizes = torch.tensor([[3.0, 1.0, 2.0]])
    bias = log_sizes(sizes, num_prefix_tokens=2)
    assert bias.shape == (1, 1, 1, 5)
    assert bias[..., :2].tolist() == [[[[0.0, 0.0]]]]
    attention = torch.nn.functional.scaled_dot_product_attention
    repeated = torch.tensor([0, 1, 2, 2, 2, 3, 4, 4])
    expected = attention(query, key[:, :, repeated], value[:, :, repeated])
    torch.testing.assert_close(attention(query, key, value, bias), expected)


def test_ties_are_broken_by_position_and_score():
    alike = [[1.0, 0.0]] * 4
    choice = counted([0.2] * 4, alike, 2)  # the first is new, the others are not
    assert choice.attentive_index.tolist() == [[0, 1]]
    assert choice.counted.counted_by.tolist() == [[0, 1, 0, 0]]
    choice = counted([0.1, 0.2, 0.2, 0.1], alike, 3)
    assert choice.attentive_index.tolist() == [[1, 2, 0]]
    assert choice.counted.counted_by.tolist() == [[2, 0, 1, 0]]


def test_nan_and_keys_of_zeros_have_a_defined_answer():
    nan = float("nan")
    choice = counted([0.3, nan, 0.2], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 2)
    assert choice.attentive_index.tolist()[0][0] == 1
    assert choice.counted.token_sizes.sum() == 3
    choice = counted([0.3, 0.2, 0.1], [[nan, nan]] * 3, 1)
    assert choice.counted.token_sizes.tolist() == [[3.0]]
    choice = counted([0.3, 0.2, 0.1], [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], 2)
    assert choice.attentive_index.tolist() == [[0, 1]]
    assert choice.counted.counted_by.tolist() == [[0, 1, 0]]


def test_cosines_are_float32_under_autocast():
    generator = torch.Generator().manual_seed(0)
    key, attention = torch.randn(2, 2, 30, 16, generator=generator), torch.rand(2, 30, generator=generator)
    expected = choose_tokens(attention, 9, inattentive_tokens="counted", keys=mean_keys(key, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys = mean_keys(key, 0)
        choice = choose_tokens(attention, 9, inattentive_tokens="counted", keys=keys)
        tokens = rearrange_tokens(torch.randn(2, 31, 6), choice)
    assert keys.dtype == tokens.dtype == torch.float32
    assert torch.equal(choice.counted.counted_by, expected.counted.counted_by)


def test_averaged_tokens_keep_their_length_and_have_gradients():
    generator = torch.Generator().manual_seed(0)
    attentive = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    inattentive = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    shares = torch.tensor([[[0.5, 0.0], [0.0, 0.25], [0.0, 0.0]]] * 2, dtype=torch.float64)
    averaged = averaged_tokens(attentive, inattentive, shares)
    torch.testing.assert_close(averaged.norm(dim=2), attentive.norm(dim=2))
    torch.testing.assert_close(averaged[:, 2], attentive[:, 2])
    assert torch.autograd.gradcheck(lambda *tokens: averaged_tokens(*tokens, shares), (attentive, inattentive))


def test_no_gradient_flows_through_sizes_or_scores():
    hidden_states, attention = random_tokens()
    key = torch.randn(3, 2, 12, 8, requires_grad=True)
    attention.requires_grad_()
    choice = choose_tokens(attention, 4, inattentive_tokens="counted", keys=mean_keys(key))
    assert not choice.counted.token_sizes.requires_grad
    assert not rearrange_tokens(hidden_states, choice).requires_grad


def test_scores_from_outside_choose_who_counts():
    attention, keys = torch.tensor([[0.3, 0.2, 0.1]]), mean_keys(torch.randn(1, 1, 3, 4), 0)
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    choice = choose_tokens(attention, 2, inattentive_tokens="counted", keys=keys, token_scores=scores)
    assert choice.attentive_index.tolist() == [[2, 1]]


# A share of the operations


VIT_B = TowerCosts(768 * 3 * 256, 4 * 768**2, 2 * 768, 2 * 768 * 3072, 64, 12, 1)


def test_every_layer_gives_up_the_same_number_and_no_fewer_tokens_than_needed():
    left = tokens_left_at_macs(0.66, 196, range(12), VIT_B)
    assert list(left.values()) == [186, 175, 164, 153, 142, 131, 121, 110, 99, 88, 77, 66]
    dense = VIT_B.macs(196, {})
    assert round(dense / 1e9, 2) == 17.56
    for macs in (0.97, 0.8, 0.66, 0.5, 0.3, 0.2):
        left = tokens_left_at_macs(macs, 196, range(12), VIT_B)
        share = VIT_B.macs(196, left) / dense
        assert macs - 0.003 < share <= macs
        assert min(left.values()) >= 16
    assert tokens_left_at_macs(1.0, 196, [3, 6], VIT_B) == {3: 196, 6: 196}
    assert tokens_left_at_macs(0.5, 196, range(12), VIT_B)[11] == 16


def test_operations_out_of_reach_are_refused():
    with pytest.raises(
        ValueError, match=r"`macs` 0.1 is out of reach: with 16 of 196 image tokens .* still needs 0.1"
    ):
        tokens_left_at_macs(0.1, 196, range(12), VIT_B)
    with pytest.raises(ValueError, match=r"with 9 of 9 image tokens .* still needs 1.0 of its operations"):
        tokens_left_at_macs(0.9, 9, range(12), VIT_B)
    with pytest.raises(ValueError, match=r"after layers \[\] the model still needs 1.0"):
        tokens_left_at_macs(0.9, 196, [], VIT_B)


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
    with pytest.raises(ValueError, match="must be 'fused' or 'dropped', got 'counted': to count them, use"):
        reorganize_tokens(hidden_states, attention, 4, inattentive_tokens="counted")
    with pytest.raises(ValueError, match="`keys` is missing"):
        choose_tokens(attention, 4, inattentive_tokens="counted")
    with pytest.raises(ValueError, match="pass one of them"):
        reorganize_tokens(
            hidden_states, attention, 4, token_scores=attention, attentive_index=torch.zeros(3, 4, dtype=torch.long)
        )
