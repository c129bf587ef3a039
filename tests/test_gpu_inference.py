"""What is made for GPUs, as far as it can be tested without one; see test_gpu.py for the rest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evit_hf import gpu_inference
from evit_hf.gpu_inference import embed_patches


INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")


def test_interpreted_kernels_give_what_the_plain_code_gives():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, INTERPRETED], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_kernels_compile_for_gpus(dtype):
    tokens = {"hidden_states": f"*{dtype}", "index": "*i64", "weights": "*fp32", "output": f"*{dtype}"}
    tokens |= dict.fromkeys(("sequence_length", "hidden_size", "num_prefix_tokens"), "i32")
    tokens |= dict.fromkeys(("num_copied", "length", "num_copies"), "i32")
    tokens |= {"rows": "constexpr", "columns": "constexpr"}
    scores = {"attention": "*fp32", "index": "*i64", "weights": "*fp32", "num_image_tokens": "i32"}
    scores |= {"num_attentive": "i32", "fuses": "constexpr", "size": "constexpr"}
    for kernel, signature, constants in (
        (gpu_inference._rearrange, tokens, {"rows": 32, "columns": 128}),
        (gpu_inference._choose, scores, {"fuses": True, "size": 256}),
    ):
        source = ASTSource(kernel, signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]


def test_a_gpu_on_which_no_kernel_can_be_built_gets_the_plain_code(monkeypatch, caplog):
    def fails(*args):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(gpu_inference, "choose_by_kernel", fails)
    monkeypatch.setattr(gpu_inference.logger, "propagate", True)
    gpu_inference._has_compiler.cache_clear()
    try:
        assert not gpu_inference._has_compiler()
    finally:
        gpu_inference._has_compiler.cache_clear()
    assert "could not build" in caplog.text


@pytest.mark.parametrize("patch_size", [8, (8, 4)], ids=str)
def test_a_product_embeds_patches_as_the_convolution_does(patch_size):
    projection = nn.Conv2d(3, 24, kernel_size=patch_size, stride=patch_size)
    images = torch.randn(2, 3, 35, 40)  # rows of pixels below the last patch are left out
    expected = projection(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed_patches(projection, images), expected)
