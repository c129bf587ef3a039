"""A training in which tokens are chosen or merged as no model's setting says, to compare with.

python -m evit_training.studies.ways WAY [words of evit train]
"""

import runpy
import shutil
import sys
from pathlib import Path

from ..measuring.comparisons import in_place, replacements


def main(way: str, words: list[str]) -> None:
    """Train, and keep what was measured but not the model: loaded without the way it would be a different one.

    Args:
        way: name of one of `replacements`.
        words: of `evit train`.
    """
    folder = Path(words[words.index("--output-dir") + 1])
    sys.argv = ["evit", "train", *words]
    try:
        with in_place(replacements()[way]):
            runpy.run_module("evit_training", run_name="__main__")
    finally:
        if (folder / "results.json").exists():
            for name in ("model", "checkpoints"):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
