"""Libraries that people put around a model, with an EViT and with a family's model that `reorganize` was called on.

They come with `pip install -e '.[test,works-with]'`.
"""

import pytest
import torch
import transformers
from conftest import tiny_config_with
from transformers import AutoModelForImageClassification, BitsAndBytesConfig
from vision_families import HAS_DINOV2

from evit_hf import EViTForImageClassification, reorganize


pytestmark = pytest.mark.slow

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "initializer_range": 0.2}


def evit():
    return EViTForImageClassification(tiny_config_with(**SMALL, intermediate_size=128, keep_rate=0.5))


def family():
    """A DINOv2, or a ViT-MSN where the installed version of Transformers has no DINOv2 that can be reorganized."""
    name, sizes = ("Dinov2", {"mlp_ratio": 2}) if HAS_DINOV2 else ("ViTMSN", {"intermediate_size": 128})
    config = getattr(transformers, f"{name}Config")(**SMALL, **sizes, image_size=32, patch_size=8, num_labels=5)
    return reorganize(AutoModelForImageClassification.from_config(config), keep_rate=0.5)


@pytest.fixture(params=[evit, family])
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture
def layer_name(model):
    return "dinov2.encoder.layer.1" if model.config.model_type == "dinov2" else "vit.layers.1"


@torch.no_grad()
def answer(model, images):
    outputs = model(images)
    assert [index.shape[1] for index in outputs.attentive_index] == [8, 5, 3]
    return outputs.logits


def test_peft_trains_saves_and_merges(model, images, tmp_path):
    from peft import LoraConfig, get_peft_model

    before = answer(model, images)
    targets = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "v_proj", "query", "value"))]
    assert len(targets) == 8
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, r=4))
    assert torch.allclose(answer(adapted, images), before, atol=1e-5)  # an adapter starts at zero
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(images, labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    trained = answer(adapted, images)
    assert not torch.allclose(trained, before, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload()
    assert torch.allclose(answer(merged, images), trained, atol=1e-4)
    adapted.unload()


def test_peft_adapters_load_onto_a_model_that_was_saved(model, images, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model.save_pretrained(tmp_path / "model")
    targets = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "v_proj", "query", "value"))]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, r=4, init_lora_weights=False)).eval()
    trained = answer(adapted, images)
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    if base.config.model_type != "evit":
        base = reorganize(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.allclose(answer(loaded, images), trained, atol=1e-5)


def test_torchao_quantizes_the_weights(model, images):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    before = answer(model, images)
    quantize_(model, Int8WeightOnlyConfig())
    after = answer(model, images)
    assert not torch.equal(after, before)
    assert torch.nn.functional.cosine_similarity(after, before).median() > 0.99


def test_bitsandbytes_loads_in_4_bits(model, tmp_path):
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))  # of some, other patches are kept
    before = answer(model, images)
    model.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["classifier"])
    quantized = AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=settings)
    if quantized.config.model_type != "evit":
        quantized = reorganize(quantized)
    after = answer(quantized.eval(), images).float()
    assert any(type(module).__name__ == "Linear4bit" for module in quantized.modules())
    assert not torch.equal(after, before)
    assert torch.nn.functional.cosine_similarity(after, before).median() > 0.8


def test_lightning_trains(model, images):
    import pytorch_lightning as lightning

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, number):
            pixel_values, labels = batch
            return self.model(pixel_values, labels=labels).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    before = answer(model, images)
    data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 2]))
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Classifier().train(), torch.utils.data.DataLoader(data, batch_size=3))
    assert trainer.global_step == 2
    assert not torch.allclose(answer(model.eval(), images), before)


def test_captum_attributes_to_pixels_and_to_a_layer(model, images, layer_name):
    from captum.attr import IntegratedGradients, LayerActivation

    def logits(pixel_values):
        return model(pixel_values).logits

    gradients = IntegratedGradients(logits)
    attributions, error = gradients.attribute(
        images, torch.zeros_like(images), target=0, n_steps=4, internal_batch_size=3, return_convergence_delta=True
    )
    assert attributions.shape == images.shape
    assert attributions.abs().sum() > 0
    assert torch.isfinite(error).all()
    activation = LayerActivation(logits, model.get_submodule(layer_name)).attribute(images)
    activation = activation[0] if isinstance(activation, tuple) else activation
    assert activation.shape == (3, 10, 64)  # class token, 8 kept, fused


def test_accelerate_offloads(model, images, tmp_path):
    from accelerate import cpu_offload, disk_offload

    before = answer(model, images)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert torch.allclose(answer(model, images), before, atol=1e-5)
    torch.manual_seed(0)
    again = type(model)(model.config) if model.config.model_type == "evit" else family()
    cpu_offload(again.eval(), execution_device=torch.device("cpu"))
    assert torch.allclose(answer(again, images), before, atol=1e-5)
