"""Render the cards of this folder: one for each checkpoint of the official zoo, one for each preset of the paper.

    python model_cards/render.py

Costs, token counts and parameters are computed; accuracies come from published.yaml, as reported there.
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCardData

from evit_hf import (
    EViTConfig,
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVForImageClassification,
    preset_config,
)
from evit_hf.presets import PRESETS
from evit_hf.profiling import num_macs, num_tokens_by_layer
from evit_training.sharing.hub import check_card, render_card


FOLDER = Path(__file__).parent
NAMES = {"ti": "Ti", "s": "S", "b": "B", "t": "T", "m": "M", "l": "L"}
# The official zoo: DeiT-S at five keep rates, fused and not.
ZOO = [(keep_rate, fuse) for fuse in (True, False) for keep_rate in (0.9, 0.8, 0.7, 0.6, 0.5)]
# Dense checkpoints of DeiT on the Hub; other sizes have none at their resolution and are resized.
DEIT_ON_HUB = {
    "evit-deit-ti": "facebook/deit-tiny-patch16-224",
    "evit-deit-s": "facebook/deit-small-patch16-224",
    "evit-deit-b": "facebook/deit-base-patch16-224",
    "evit-deit-ti-distilled": "facebook/deit-tiny-distilled-patch16-224",
    "evit-deit-s-distilled": "facebook/deit-small-distilled-patch16-224",
    "evit-deit-b-distilled": "facebook/deit-base-distilled-patch16-224",
    "evit-deit-b-384": "facebook/deit-base-patch16-384",
    "evit-deit-b-distilled-384": "facebook/deit-base-distilled-patch16-384",
}
FROM_SCRATCH = (
    "From scratch the paper trains 300 epochs on ImageNet-1k: AdamW, batch 2048, learning rate 5e-4 for each 512 "
    "images (2e-3) after 5 epochs of warm-up, cosine to 1e-5, weight decay 0.05, stochastic depth 0.1, label "
    "smoothing 0.1, mixup 0.8, cutmix 1.0, RandAugment 9, random erasing 0.25, repeated augmentation; keep rate 1.0 "
    "for 10 epochs, then a cosine down over 100 epochs."
)
FINE_TUNING = (
    "Fine-tuning takes 30 epochs from the dense model at the target keep rate: learning rate 2e-5 for each 512 "
    "images, cosine to 2e-6, no warm-up, weight decay 1e-6, the same augmentation. Both recipes are those of the "
    "official scripts (`run_code.sh`, `finetune.sh`); neither was run with this code."
)


def preset_title(preset: str) -> str:
    """Name of the backbone as its authors write it: DeiT-S, DeiT-B distilled 384, LV-ViT-M."""
    family, size, *rest = preset.removeprefix("evit-").split("-")
    return " ".join([f"{'LV-ViT' if family == 'lvvit' else 'DeiT'}-{NAMES[size]}", *rest])


def result_rows(preset: str, config: EViTConfig, published: dict[str, Any]) -> list[dict[str, Any]]:
    """Reported accuracies of a preset, with computed costs; the card's own setting too, if nobody reported it."""
    rows = []
    for keep_rate, fused, top1, top5, source in published["results"].get(preset, []):
        setting = type(config).from_dict({**config.to_dict(), "inattentive_tokens": "fused" if fused else "dropped"})
        rows.append(
            {
                "keep_rate": keep_rate,
                "inattentive": "-" if keep_rate == 1.0 else "fused" if fused else "dropped",
                "gmacs": num_macs(setting, keep_rate) / 1e9,
                "top1": top1,
                "top5": "not reported" if top5 is None else top5,
                "source": published["sources"][source],
            }
        )
    own = (config.keep_rate, config.inattentive_tokens)
    if own not in [(row["keep_rate"], row["inattentive"]) for row in rows]:
        unknown = {"top1": "not measured", "top5": "not measured", "source": "-"}
        rows.append({"keep_rate": own[0], "inattentive": own[1], "gmacs": num_macs(config) / 1e9, **unknown})
    return rows


def obtain(preset: str, folder: str, config: EViTConfig, in_zoo: bool) -> tuple[str, str]:
    """Where the weights come from, and the command that makes an EViT from them."""
    if in_zoo:
        text = (
            "The weights are those of the official repository, https://github.com/youweiliang/evit: download the "
            f"checkpoint of keep rate {config.keep_rate}, "
            f"{'with' if config.inattentive_tokens == 'fused' else 'without'} inattentive token fusion, from the "
            "model zoo of its README. What it was trained with is read from the file."
        )
        return text, f"evit convert CHECKPOINT.pth {folder}"
    flags = f" --keep-rate {config.keep_rate}"
    if "lvvit" in preset:
        text = (
            f"The paper's weights were never published. Start from the dense {preset_title(preset)} of "
            "https://github.com/zihangJiang/TokenLabeling, and fine-tune."
        )
        return text, f"evit convert CHECKPOINT.pth.tar {folder}{flags}"
    source = DEIT_ON_HUB.get(preset)
    if source is None:
        source = DEIT_ON_HUB[preset.removesuffix(f"-{config.image_size}")]
        flags += f" --image-size {config.image_size}"
        text = "There are no public weights at this resolution: position embeddings are resized from 224 pixels. "
    else:
        text = "The paper's weights for this model were never published. "
    return (
        text + f"Start from the dense `{source}` on the Hub, and fine-tune.",
        f"evit convert {source} {folder}{flags}",
    )


def card(preset: str, folder: str, published: dict[str, Any], in_zoo: bool = False, **overrides: Any) -> str:
    """Render one card and check it."""
    config = preset_config(preset, **overrides)
    model_class = EViTForImageClassification
    if config.model_type == "evit_lv":
        model_class = EViTLVForImageClassification
    elif config.use_distillation_token:
        model_class = EViTForImageClassificationWithTeacher
    with torch.device("meta"):
        model = model_class(config)
    backbone = preset_title(preset)
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["evit", "token-reduction", "vision-transformer", "arxiv:2202.07800"],
        datasets=["imagenet-1k"],
        metrics=["accuracy"],
    )
    text, command = obtain(preset, folder, config, in_zoo)
    state = (
        "trained by the authors of EViT"
        if in_zoo
        else "to be fine-tuned: converted weights were trained without reorganization"
    )
    tokens = num_tokens_by_layer(config)
    values = {
        "metadata": metadata.to_yaml().strip(),
        "title": f"EViT-{backbone}, keep rate {config.keep_rate}"
        + ("" if config.inattentive_tokens == "fused" else ", without fusion"),
        "summary": (
            f"An EViT (Liang et al., ICLR 2022) on {backbone}, {state}. It classifies images like the dense model, "
            "and on the way drops the patches that its class token pays little attention to."
        ),
        "architecture": f"{backbone}, `{model_class.__name__}`",
        "millions_of_parameters": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "image_size": config.image_size,
        "num_patches": (config.image_size // config.patch_size) ** 2,
        "reorganization_layers": config.reorganization_layers,
        "num_hidden_layers": config.num_hidden_layers,
        "keep_rate": config.keep_rate,
        "inattentive_tokens": config.inattentive_tokens,
        "tokens": [tokens[layer][1] - config.num_prefix_tokens for layer in config.reorganization_layers],
        "gmacs": num_macs(config) / 1e9,
        "dense_gmacs": num_macs(config, 1.0) / 1e9,
        "obtain": text,
        "convert_command": command,
        "location": folder,
        "results_note": (
            "ImageNet-1k validation. Accuracies are **reported by others**, see the last column; none was measured "
            "with this code."
        ),
        "results": result_rows(preset, config, published),
        "training": f"{FROM_SCRATCH} {FINE_TUNING}"
        + (
            " LV-ViT adds token labelling with mix-token; only the patches that are left at the end are labelled, and "
            "never the fused token (the author in issue 13 of the official repository)."
            if config.model_type == "evit_lv"
            else ""
        ),
        "licence": (
            "This code is Apache-2.0, as are the official repositories of EViT and DeiT; converted weights keep the "
            "licence that they came with. ImageNet has terms of its own, for non-commercial research and education."
        ),
    }
    rendered = render_card(**values)
    check_card(rendered)
    return rendered


def render_all() -> dict[str, str]:
    """All cards by file name."""
    published = yaml.safe_load((FOLDER / "published.yaml").read_text())
    cards = {}
    for keep_rate, fuse in ZOO:
        folder = f"evit-deit-s-keep-{keep_rate}{'' if fuse else '-nofuse'}"
        settings = {"keep_rate": keep_rate, "inattentive_tokens": "fused" if fuse else "dropped"}
        cards[f"{folder}.md"] = card("evit-deit-s", folder, published, in_zoo=True, **settings)
    for preset in PRESETS:
        cards[f"{preset}.md"] = card(preset, preset, published)
    return cards


if __name__ == "__main__":
    for name, text in render_all().items():
        (FOLDER / name).write_text(text)
