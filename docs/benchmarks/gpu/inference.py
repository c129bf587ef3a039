"""Inference in eager PyTorch: DeiT-S, DeiT-B, LV-ViT-S and ViT-L/384, dense and at four keep rates, in bfloat16.

Each table is one of `evit benchmark`: the dense models of timm and Transformers in the same run, all taking turns,
answers checked first. The paper's rows (A100, DeiT-S): 2923 images/s dense, 4385 at keep rate 0.7, 5408 at 0.5.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit import Kit

from evit_hf import EViTConfig, EViTForImageClassification, EViTLVConfig, EViTLVForImageClassification
from evit_training.measuring.arguments import BenchmarkArguments
from evit_training.measuring.benchmark import measure, table


VIT_L = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 384,
    "num_labels": 1000,
}
TINY = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
TINY |= {"intermediate_size": 64, "num_labels": 5}
# Most important first: model, batch sizes.
SETTINGS = [
    ("evit-deit-s", (256, 1, 1024, 8, 64)),
    ("evit-deit-b", (256, 1, 1024, 64)),
    ("evit-lvvit-s", (256, 1, 1024)),
    ("vit-l-384", (64, 1, 256)),
]


def sized(name: str, folder: Path, is_dry: bool) -> str:
    """What `evit benchmark` is given for a name: a preset, or a folder with random weights."""
    if not is_dry and name != "vit-l-384":
        return name
    if not (folder / name).exists():
        if is_dry and "lvvit" in name:
            model = EViTLVForImageClassification(EViTLVConfig(**TINY, stem_hidden_size=4, initializer_range=0.05))
        else:
            sizes = TINY if is_dry else VIT_L
            model = EViTForImageClassification(EViTConfig(**sizes, initializer_range=0.05))
        model.save_pretrained(folder / name)
    return str(folder / name)


def benchmarked(kit: Kit, name: str, batch_size: int, **settings: Any) -> tuple[str, Any]:
    """Table and rows of `evit benchmark` for one setting."""
    defaults = {
        "keep_rates": [1.0, 0.7, 0.5] if kit.is_dry else [1.0, 0.9, 0.7, 0.5],
        "baselines": ["none"] if "lvvit" in name else ["timm", "transformers"],
        "rounds": 2 if kit.is_dry else 31 if batch_size <= 64 else 11,
    }
    dtype = "float32" if kit.is_dry else "bfloat16"
    arguments = BenchmarkArguments(**{**defaults, **settings})
    comparison = measure(name, arguments, kit.device, dtype, None, 2 if kit.is_dry else batch_size)
    return table(comparison), comparison.as_json()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what a command line asks for."""
    kit = Kit("inference", __doc__, argv)
    with tempfile.TemporaryDirectory() as temporary:
        for name, batch_sizes in SETTINGS:
            for batch_size in batch_sizes[:1] if kit.is_dry else batch_sizes:
                kit.measure(
                    f"{name}, batch {batch_size}",
                    lambda name=name, size=batch_size: benchmarked(
                        kit, sized(name, Path(temporary), kit.is_dry), size
                    ),
                    seconds=60 if name == "vit-l-384" else 30,
                )
    return kit.finish()


if __name__ == "__main__":
    sys.exit(main())
