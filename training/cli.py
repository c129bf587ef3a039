"""The command `evit`.

evit train digits                            # a packaged recipe
evit train --model google/vit-base-patch16-224 --dataset beans --keep-rate 0.7
evit train --help
"""

import importlib
import sys
from collections.abc import Sequence


# Word: (module whose `main` gets the arguments behind it, what it does). Imported when called, to start fast.
COMMANDS = {
    "train": ("evit_training.commands.train", "train or fine-tune an EViT on a data set"),
    "evaluate": ("evit_training.commands.evaluate", "measure a model at a list of keep rates"),
    "benchmark": ("evit_training.commands.benchmark", "time a model against dense ViTs, or tune its keep rates"),
    "export": ("evit_training.commands.export", "make an ONNX, OpenVINO, torch.export or AOTInductor model"),
    "push": ("evit_training.commands.push", "push a model or a run to the Hugging Face Hub"),
    "space": ("evit_training.commands.space", "write a Gradio demo of a model, ready to be a Space"),
    "convert": ("evit_training.commands.convert", "make an EViT from a public checkpoint"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in COMMANDS:
        importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])
        return
    usage = "usage: evit COMMAND ...\n\n" + "\n".join(f"  {word:<10}{text}" for word, (_, text) in COMMANDS.items())
    if argv and argv[0] in ("-h", "--help"):
        print(f"{usage}\n\n`evit COMMAND --help` lists the flags of a command.")
        return
    problem = f"`{argv[0]}` is no command of evit" if argv else "a command is missing"
    print(f"{usage}\n\nevit: error: {problem}", file=sys.stderr)
    sys.exit(2)
