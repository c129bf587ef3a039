"""Compare the Triton kernels with the plain code without a GPU: `TRITON_INTERPRET=1 python interpreted_kernels.py`."""

import torch

from evit_hf import gpu_inference, token_reorganization
from evit_hf.gpu_inference import choose_by_kernel
from evit_hf.token_reorganization import TokenChoice


# batch_size, sequence_length, hidden_size, num_prefix_tokens, num_attentive
SHAPES = [(1, 197, 100, 1, 138), (2, 50, 200, 2, 20), (2, 6, 9, 1, 1)]


# Of the fused token, relative to its length.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.002}


@torch.no_grad()
def compare(
    shape: tuple[int, ...], inattentive_tokens: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> TokenChoice:
    """Assert that all tokens that are kept are the same, and the fused one but for rounding; return the choice."""
    batch_size, length, size, num_prefix_tokens, num_attentive = shape
    tokens = torch.randn(batch_size, length, size).to(device, dtype)
    numbers = [torch.randperm(length - num_prefix_tokens) for _ in range(batch_size)]  # no two are equal
    attention = (torch.stack(numbers) / length).to(device)
    settings = {"num_prefix_tokens": num_prefix_tokens, "inattentive_tokens": inattentive_tokens}
    choice, plain_choice = (
        module.choose_tokens(attention, num_attentive, **settings) for module in (gpu_inference, token_reorganization)
    )
    assert torch.equal(choice.attentive_index, plain_choice.attentive_index)
    rearranged = gpu_inference.rearrange_tokens(tokens, choice, num_prefix_tokens)
    plain = token_reorganization.rearrange_tokens(tokens, plain_choice, num_prefix_tokens)
    assert rearranged.shape == plain.shape
    copied = num_prefix_tokens + num_attentive
    assert torch.equal(rearranged[:, :copied], plain[:, :copied])
    if inattentive_tokens == "fused":
        assert torch.equal(choice.weights, plain_choice.weights)
        fused, plain_fused = rearranged[:, copied:].float(), plain[:, copied:].float()
        assert (fused - plain_fused).norm() < ROUNDING[dtype] * plain_fused.norm()
        rtol = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(fused, plain_fused, rtol=rtol, atol=rtol)
    return choice


def main() -> None:
    """Compare all shapes, then values that are ordered in an unusual way."""
    torch.manual_seed(0)
    gpu_inference.runs_in_kernels = lambda tensor: True
    for shape in SHAPES:
        for inattentive_tokens in ("fused", "dropped"):
            for dtype in (torch.float32, torch.bfloat16):
                assert compare(shape, inattentive_tokens, dtype).rows is None
    below_zero = torch.randn(5, 33)
    assert torch.equal(choose_by_kernel(below_zero, 7, False)[0], below_zero.topk(7).indices)
    nan = float("nan")
    ties, weights = choose_by_kernel(torch.tensor([[0.1, nan, 0.3, 0.3, 0.0, -nan]]), 3, True)
    assert ties.tolist() == [[1, 5, 2]]
    assert torch.equal(weights, torch.tensor([[0.1, 0.0, 0.0, 0.3, 0.0, 0.0]]))


if __name__ == "__main__":
    main()
