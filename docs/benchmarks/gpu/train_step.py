"""Training: DeiT-S steps at batch 256 in bfloat16, dense and at two keep rates, and how long `evit train` waits.

The first part is `evit benchmark --training`. The second runs `evit train` on pictures of ImageNet's size (noise, so
that nothing has to travel) with the paper's augmentation, and reads speed and the share of waiting from its log.
"""

import io
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inference import benchmarked, sized
from kit import Kit, markdown
from PIL import Image

from evit_training.cli import main as evit


PAPER = ["--crop", "random_resized", "--rand-augment", "9", "--rand-augment-std", "0.5", "--random-erasing", "0.25"]
PAPER += ["--mixup", "0.8", "--cutmix", "1.0", "--label-smoothing", "0.1", "--drop-path-rate", "0.1"]
TINY = ["--hidden-size", "32", "--num-hidden-layers", "4", "--num-attention-heads", "2", "--image-size", "32"]


def photographs(folder: Path, number: int) -> None:
    """Write JPEG pictures of 500 x 375 pixels in two classes; a few dozen different ones, under many names."""
    different = []
    for i in range(min(number, 32)):
        encoded = io.BytesIO()
        Image.effect_noise((125, 94), 60 + i).convert("RGB").resize((500, 375)).save(encoded, "JPEG", quality=90)
        different.append(encoded.getvalue())
    for split, share in (("train", 1.0), ("validation", 0.05)):
        for i in range(int(number * share) or 2):
            path = folder / split / f"class{i % 2}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(different[i % len(different)])


def trainer(kit: Kit, keep_rate: float, precision: str, compiles: bool = False) -> tuple[str, Any]:
    """Speed and waiting of `evit train`, medians over the log without its first lines."""
    workers = max(1, (os.cpu_count() or 2) - 1)
    batch_size, number, steps = (4, 16, 4) if kit.is_dry else (256, 8192, 60)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        photographs(folder / "images", number)
        flags = ["train", "--dataset", str(folder / "images"), "--output-dir", str(folder / "run"), *PAPER]
        flags += TINY if kit.is_dry else ["--preset", "evit-deit-s"]
        flags += ["--keep-rate", str(keep_rate), "--batch-size", str(batch_size), "--max-steps", str(steps)]
        flags += ["--num-workers", "0" if kit.is_dry else str(workers), "--mixed-precision", precision]
        flags += ["--log-steps", str(steps // 4), "--num-pictures", "0", "--compare-keep-rates", str(keep_rate)]
        evit([*flags, *(["--compile"] if compiles else [])])
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steady = [line for line in lines if "data_wait" in line][1:]
    found = {name: statistics.median(line[name] for line in steady) for name in ("images_per_second", "data_wait")}
    found["memory_gib"] = steady[-1]["memory_gib"]
    row = [keep_rate, precision, compiles, workers, found["images_per_second"], 100 * found["data_wait"]]
    header = ["keep rate", "precision", "compiled", "workers", "images/s", "waiting for images, %", "GiB"]
    return markdown(header, [[*row, found["memory_gib"]]]), found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what a command line asks for."""
    kit = Kit("train_step", __doc__, argv)
    with tempfile.TemporaryDirectory() as temporary:
        for name, backend in (("evit-deit-s", "sdpa"), ("evit-deit-s", "compile")):
            if backend == "compile" and kit.is_dry:  # compiling for the CPU is tested elsewhere
                continue
            settings = {"training": True, "backends": [backend], "keep_rates": [1.0, 0.7, 0.5], "rounds": 11}
            if kit.is_dry:
                settings["rounds"] = 1
            kit.measure(
                f"{name}, training step, batch 256, {backend}",
                lambda name=name, settings=settings: benchmarked(
                    kit, sized(name, Path(temporary), kit.is_dry), 256, **settings
                ),
                seconds=200 if backend == "compile" else 40,
            )
    precision = "no" if kit.is_dry else "bf16"
    for keep_rate in (1.0, 0.7):
        kit.measure(f"evit train, keep rate {keep_rate}", lambda rate=keep_rate: trainer(kit, rate, precision), 60)
    return kit.finish()


if __name__ == "__main__":
    sys.exit(main())
