"""EViT on a GPU gives what it gives on a CPU; `pytest -n 0 -m gpu`. Without a GPU all of it runs on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, tiny_config_with
from interpreted_kernels import compare
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import SMALL, free_port, read_log
from vision_families import EXAMPLE, build, inputs

from evit_hf import EViTForImageClassification, reorganize
from evit_hf.export import export_model, load_exported
from evit_training.cli import main
from evit_training.loop import trainer
from evit_training.measuring.machine import best_device


pytestmark = pytest.mark.gpu

DEVICE = best_device()
# Heads of 32 numbers, since flash and flex kernels do not take fewer than 16.
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "image_size": 64}
PRECISIONS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def model_on(device=DEVICE, dtype=torch.float32, implementation="sdpa", **changes):
    torch.manual_seed(0)
    model = EViTForImageClassification(tiny_config_with(**{**WIDE, **changes}))
    model.set_attn_implementation(implementation)
    return model.eval().to(device, dtype)


def some_images(device=DEVICE, dtype=torch.float32, batch_size=4):
    images = torch.randn(batch_size, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return images.to(device, dtype)


def relative_error(answer, expected):
    answer, expected = answer.detach().float().cpu(), expected.detach().float().cpu()
    return ((answer - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def expected():
    """Eager attention in float32 on the CPU."""
    with torch.no_grad():
        return model_on("cpu", implementation="eager")(some_images("cpu"))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """PyTorch rounds the inputs of convolutions to ten bits on GPUs, unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inattentive_tokens", ["fused", "dropped"])
@pytest.mark.parametrize(
    "shape", [(3, 197, 384, 1, 138), (2, 50, 200, 2, 20), (1, 577, 1024, 1, 404), (2, 6, 24, 1, 1)]
)
def test_kernels_choose_and_rearrange_as_the_plain_code_does(shape, inattentive_tokens, dtype):
    choice = compare(shape, inattentive_tokens, dtype, DEVICE)
    assert (choice.rows is None) == (DEVICE.type == "cuda")


@torch.no_grad()
def test_who_counts_operations_sees_the_plain_ones():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    names = set()
    model = model_on()
    with Names():
        model(some_images())
    assert {"topk", "index_select", "convolution"} <= names


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_answers_and_kept_patches_are_those_of_the_cpu(implementation, expected):
    output = model_on(implementation=implementation)(some_images())
    assert relative_error(output.logits, expected.logits) < PRECISIONS[torch.float32]
    for kept, reference in zip(output.attentive_index, expected.attentive_index, strict=True):
        assert torch.equal(kept.cpu(), reference)


@pytest.mark.parametrize("fuse", ["fused", "dropped", "counted"])
def test_gradients_are_those_of_the_cpu(fuse):
    gradients = []
    for device in ("cpu", DEVICE):
        model = model_on(device, inattentive_tokens=fuse).train()
        model(some_images(device), labels=torch.arange(4, device=device)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if "k_proj.bias" not in name:  # zero but for rounding
            assert relative_error(gradients[1][name], gradient) < 1e-3, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_half_precision_answers_within_its_rounding(dtype, expected):
    images = some_images(dtype=dtype)
    dense = model_on("cpu", implementation="eager")(some_images("cpu"), keep_rate=1.0).logits
    assert relative_error(model_on(dtype=dtype)(images, keep_rate=1.0).logits, dense) < PRECISIONS[dtype]
    # Where scores are close rounding chooses another token.
    output = model_on(dtype=dtype)(images)
    assert relative_error(output.logits, expected.logits) < 0.3
    same = (output.attentive_index[0].cpu().sort().values == expected.attentive_index[0].sort().values).float().mean()
    assert same > 0.8


@torch.no_grad()
def test_flash_kernels_run():
    dtype = torch.bfloat16
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        logits = model_on(dtype=dtype)(some_images(dtype=dtype)).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
@torch.no_grad()
def test_compiled_code_and_cuda_graphs_give_the_same(mode, expected):
    model = torch.compile(model_on(), fullgraph=True, mode=mode)
    for _ in range(3):  # CUDA graphs are recorded, then replayed
        logits = model(some_images()).logits
    assert relative_error(logits, expected.logits) < PRECISIONS[torch.float32]


@torch.no_grad()
def test_a_graph_of_eager_code_answers_for_new_images(expected):
    """No part of a forward pass waits for the GPU or copies from the CPU, or recording it would fail."""
    if DEVICE.type != "cuda":
        return
    model, images = model_on(), torch.zeros_like(some_images())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(images)
    images.copy_(some_images())
    graph.replay()
    assert relative_error(output.logits, expected.logits) < PRECISIONS[torch.float32]


@pytest.mark.parametrize("settings", [{"keep_rate": 0.6}, {"macs": 0.66}], ids=["keep_rate", "macs"])
@torch.no_grad()
def test_families_give_the_same(settings):
    model = reorganize(build(EXAMPLE), **settings)
    images = inputs(EXAMPLE)
    reference = model(**images)
    output = model.to(DEVICE)(**{name: tensor.to(DEVICE) for name, tensor in images.items()})
    assert relative_error(output.logits, reference.logits) < PRECISIONS[torch.float32]
    assert torch.equal(output.patch_index.cpu(), reference.patch_index)


def run_ahead(path):
    """The model's answers from AOTInductor; before them those of one linear layer, without this package."""
    linear = torch.nn.Linear(4, 4).to(DEVICE)
    program = torch.export.export(linear, (torch.ones(2, 4, device=DEVICE),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=f"{path}/linear.pt2")
    sys.stdout.write("loading a linear layer\n")
    torch._inductor.aoti_load_package(package)(torch.ones(2, 4, device=DEVICE))
    sys.stdout.write("loading EViT\n")
    with torch.no_grad():
        export_model(model_on(), path, "aoti")
        torch.save(load_exported(path)(some_images()), f"{path}/logits.pt")


def test_ahead_of_time_compiled_code_gives_the_same(tmp_path, expected):
    """In a process of its own: PyTorch 2.11 crashed on a GPU."""
    code = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import test_gpu; test_gpu.run_ahead('.')"
    process = subprocess.run([sys.executable, "-uc", code], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert process.returncode == 0, process.stdout + process.stderr[-3000:]
    logits = torch.load(tmp_path / "logits.pt")
    assert relative_error(logits, expected.logits) < PRECISIONS[torch.float32]


def train(tmp_path, *flags):
    main(["train", *SMALL, *flags, "--output_dir", str(tmp_path / "run")])
    return [entry["loss"] for entry in read_log(tmp_path / "run") if "loss" in entry]


@pytest.mark.parametrize("flags", [["bf16"], ["bf16", "--compile"], ["fp16"]], ids=" ".join)
def test_training_in_half_precision_learns_as_float32_does(flags, tmp_path):
    if DEVICE.type == "cpu" and flags == ["fp16"]:  # refused there, see test_faults
        flags = ["bf16"]
    losses = train(tmp_path / "half", "--mixed_precision", *flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses == pytest.approx(train(tmp_path / "whole"), rel=0.1)


def test_a_gradient_scaler_skips_steps_that_overflow_and_training_continues(tmp_path, monkeypatch):
    if DEVICE.type != "cuda":  # there is no scaler on a CPU, see test_faults
        return
    original = trainer.build_accelerator

    def build_accelerator(arguments):
        accelerator = original(arguments)
        accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
        return accelerator

    monkeypatch.setattr(trainer, "build_accelerator", build_accelerator)
    losses = train(tmp_path, "--mixed_precision", "fp16", "--max_steps", "40", "--epochs", "10")
    assert len(losses) > 1
    assert all(torch.tensor(losses).isfinite())


def started(flags, output_dir, *launcher):
    command = [sys.executable, "-m", *launcher, "evit_training", "train", *SMALL, *flags]
    with output_dir.with_suffix(".txt").open("w") as out:
        return subprocess.Popen([*command, "--output_dir", str(output_dir)], stdout=out, stderr=out, env=os.environ)


def test_a_sharded_run_on_one_gpu_trains_as_a_plain_one(tmp_path):
    launcher = ["accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    if DEVICE.type == "cuda":  # Accelerate does not shard on a CPU
        launcher += ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
        launcher += ["--fsdp_transformer_layer_cls_to_wrap", "EViTLayer"]
    process = started([], tmp_path / "sharded", *launcher, "-m")
    assert process.wait(300) == 0, (tmp_path / "sharded.txt").read_text()[-3000:]
    losses = [entry["loss"] for entry in read_log(tmp_path / "sharded") if "loss" in entry]
    assert losses == pytest.approx(train(tmp_path / "plain"), rel=1e-3)


def test_a_killed_run_resumes_as_exactly_as_the_device_repeats_itself(tmp_path):
    flags = ["--checkpoint_steps", "2"]
    train(tmp_path / "first", *flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(tmp_path / "second", *flags)
    killed = started(flags, tmp_path / "killed")
    deadline = time.monotonic() + 200
    while not any(entry["step"] >= 9 for entry in read_log(tmp_path / "killed")) and time.monotonic() < deadline:
        assert killed.poll() is None, (tmp_path / "killed.txt").read_text()[-3000:]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    AcceleratorState._reset_state(reset_partial_state=True)
    main(["train", *SMALL, *flags, "--resume", "auto", "--output_dir", str(tmp_path / "killed")])
    folders = [tmp_path / "first" / "run", tmp_path / "second" / "run", tmp_path / "killed"]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in folders]
    repeats = all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    (tmp_path / "repeats.json").write_text(json.dumps(repeats))
    for name, tensor in weights[0].items():
        if repeats:
            assert torch.equal(weights[2][name], tensor), name
        else:
            torch.testing.assert_close(weights[2][name], tensor, rtol=1e-3, atol=1e-3)
