"""Compare the Triton kernels with the plain code without a GPU: `TRITON_INTERPRET=1 python interpreted_kernels.py`."""

import torch

from evit_hf.gpu_inference import choose_by_kernel, rearrange_by_kernel
from evit_hf.token_reorganization import choose_tokens, rearrange_tokens


# batch_size, sequence_length, hidden_size, num_prefix_tokens, num_attentive
SHAPES = [(1, 197, 100, 1, 138), (2, 50, 200, 2, 20), (2, 6, 9, 1, 1)]


def compare(shape: tuple[int, ...], inattentive_tokens: str, dtype: torch.dtype) -> None:
    """Assert that all tokens that are kept are the same, and the fused one but for rounding."""
    batch_size, length, size, num_prefix_tokens, num_attentive = shape
    tokens = torch.randn(batch_size, length, size).to(dtype)
    attention = torch.stack([torch.randperm(length - num_prefix_tokens) for _ in range(batch_size)]) / length
    choice = choose_tokens(
        attention, num_attentive, num_prefix_tokens=num_prefix_tokens, inattentive_tokens=inattentive_tokens
    )
    index, weights = choose_by_kernel(attention, num_attentive, inattentive_tokens == "fused")
    assert torch.equal(index, choice.attentive_index)
    plain = rearrange_tokens(tokens, choice, num_prefix_tokens)
    rearranged = rearrange_by_kernel(tokens, index, weights, num_prefix_tokens)
    assert rearranged.shape == plain.shape
    copied = num_prefix_tokens + num_attentive
    assert torch.equal(rearranged[:, :copied], plain[:, :copied])
    if inattentive_tokens == "fused":
        assert torch.equal(weights, choice.weights)
        rtol = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(rearranged[:, copied:], plain[:, copied:], rtol=rtol, atol=rtol)


def main() -> None:
    """Compare all shapes, then values that are ordered in an unusual way."""
    torch.manual_seed(0)
    for shape in SHAPES:
        for inattentive_tokens in ("fused", "dropped"):
            for dtype in (torch.float32, torch.bfloat16):
                compare(shape, inattentive_tokens, dtype)
    below_zero = torch.randn(5, 33)
    assert torch.equal(choose_by_kernel(below_zero, 7, False)[0], below_zero.topk(7).indices)
    nan = float("nan")
    ties, weights = choose_by_kernel(torch.tensor([[0.1, nan, 0.3, 0.3, 0.0, -nan]]), 3, True)
    assert ties.tolist() == [[1, 5, 2]]
    assert torch.equal(weights, torch.tensor([[0.1, 0.0, 0.0, 0.3, 0.0, 0.0]]))


if __name__ == "__main__":
    main()
