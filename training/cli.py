"""The command `evit`.

evit train digits                            # a packaged recipe
evit train --model google/vit-base-patch16-224 --dataset beans --keep-rate 0.7
evit train --help
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

from .settings import closest


# Word: what it does. `main` of the module of that name in commands/ runs it; imported when called, to start fast.
COMMANDS = {
    "train": "train or fine-tune an EViT on a data set",
    "predict": "classify pictures, folders of them and data sets",
    "evaluate": "measure a model at a list of keep rates",
    "visualize": "draw what a model keeps of pictures, looks at and answers",
    "inspect": "measure what a model keeps over a data set, and what that does to its answers",
    "benchmark": "time a model against dense ViTs",
    "study": "train several settings with several seeds and compare them",
    "tune": "find layers and keep rates for a budget",
    "export": "make an ONNX, OpenVINO, torch.export or AOTInductor model",
    "push": "push a model or a run to the Hugging Face Hub",
    "space": "write a Gradio demo of a model, ready to be a Space",
    "convert": "make an EViT from a public checkpoint",
    "presets": "list the models of the paper with their parameters and operations",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in COMMANDS:
        importlib.import_module(f"evit_training.commands.{argv[0]}").main(argv[1:])
        return
    if argv and argv[0] in ("-h", "--help"):
        print("usage: evit COMMAND ...\n")
        print("\n".join(f"  {word:<10}{text}" for word, text in COMMANDS.items()))
        print("\n`evit COMMAND --help` lists the flags of a command, `evit --version` prints the version.")
        return
    if argv and argv[0] == "--version":
        print(f"evit-hf {version('evit-hf')}")
        return
    if argv:
        problem = f"`{argv[0]}` is not a command: {closest(argv[0], COMMANDS, 'see `evit --help`.')}"
    else:
        problem = f"a command is missing: {', '.join(COMMANDS)}."
    print(f"evit: error: {problem}", file=sys.stderr)
    sys.exit(2)
