"""Evidence: the packaged study `cifar10` with a longer start, 30 epochs in place of ten, many runs at once on one GPU.

Batches are larger where training is from scratch, in bfloat16; all else is as in the packaged study. With
`--more-from-scratch` tokens fused and dropped are also compared in training from scratch. Like each `evit study`, it
resumes when it is started again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from evit_training.cli import main as evit
from evit_training.studies.study import STUDIES


MORE = {"0.7 fused": "", "0.7 dropped": "--inattentive-tokens dropped", "0.5 dropped": "--inattentive-tokens dropped"}
TINY = "--max-train-samples 64 --max-eval-samples 32 --hidden-size 24 --num-attention-heads 2 --num-workers 0"


def longer(epochs: int, data: Path, more: bool, is_dry: bool) -> dict:
    """The packaged study with its start and training from scratch made as long as wanted."""
    study = yaml.safe_load((STUDIES / "cifar10.yaml").read_text("utf-8"))
    settings = study["settings"]
    name = "0.5 fused, from scratch"
    scratch = f"--batch-size 256 --eval-steps 1960 --warmup-epochs {epochs / 10:g}"
    shrinking = f"--keep-rate-dense-epochs {epochs / 10:g} --keep-rate-shrink-epochs {epochs * 0.4:g}"
    settings["start"] = f"{scratch} --epochs {epochs} --keep-rate 1.0"
    settings[name] = f"{scratch} {shrinking} --epochs {epochs + 1} --keep-rate 0.5"
    for kept, flags in MORE.items() if more else ():
        rate = kept.split()[0]
        settings[f"{kept}, from scratch"] = f"{settings[name].replace('0.5', rate)} {flags}".strip()
    study["train"] += f" --dataset {data / 'train.parquet'} {data / 'test.parquet'}"
    if is_dry:
        study["train"] += f" {TINY}"
        study["seeds"] = [0]
    else:
        study["train"] += " --num-workers 2 --mixed-precision bf16"
    study["about"] = study["about"].replace("ten epochs", f"{epochs} epochs")
    return study


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out the study."""
    parser = argparse.ArgumentParser("cifar10", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default=".gpu/cifar10", help="folder with train.parquet and test.parquet")
    parser.add_argument("--output-dir", default="runs/gpu/cifar10", help="folder of the study")
    parser.add_argument("--epochs", type=int, default=30, help="of the start, over 50,000 images")
    parser.add_argument("--jobs", type=int, default=10, help="runs at a time")
    parser.add_argument("--more-from-scratch", action="store_true", help="three more settings from scratch")
    parser.add_argument("--dry-run", action="store_true", help="tiny models, 64 images: does it work at all?")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    study = longer(arguments.epochs, Path(arguments.data), arguments.more_from_scratch, arguments.dry_run)
    (folder / "cifar10.yaml").write_text(yaml.safe_dump(study, sort_keys=False, width=1000), "utf-8")
    jobs = ["--jobs", str(arguments.jobs)]
    return evit(["study", str(folder / "cifar10.yaml"), "--output-dir", str(folder), "--no-speed", *jobs])


if __name__ == "__main__":
    sys.exit(main())
