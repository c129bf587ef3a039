"""How a command ends: what was wrong becomes one line on standard error and an exit status, in one place.

An exception of this project has its exit status in its attribute `status`. Errors of libraries about files, values and
missing packages are the user's to mend, and end with status 2. Everything else is a bug and keeps its traceback.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence


# The extra that installs a module; `pip install evit-hf[all]` has all of them.
EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "torchvision", "PIL", "matplotlib", "jinja2", "evaluate"), "train"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime", "openvino"), "export"),
    "ray": "ray",
    "timm": "all",
    "gradio": "all",
}


def command(word: str) -> Callable[[Callable[[list[str]], None]], Callable[..., None]]:
    """Decorator for the `main` of a command: its words from `sys.argv`, its errors as one line and a status.

    Args:
        word: of the command, for example "evaluate".
    """

    def decorate(main: Callable[[list[str]], None]) -> Callable[..., None]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> None:
            words = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
            try:
                main(words)
            except BrokenPipeError:  # `evit ... | head`: nobody reads on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(141)
            except KeyboardInterrupt:
                sys.stderr.write(f"evit {word}: interrupted\n")
                sys.exit(130)
            except Exception as error:
                status = status_of(error)
                if status is None:
                    raise
                kind = "" if status > 128 else "error: "
                sys.stderr.write(f"evit {word}: {kind}{sentence(error)}\n")
                sys.exit(status)

        return run

    return decorate


def status_of(error: Exception) -> int | None:
    """Exit status for an error; None for a bug."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and status < 256:  # HTTP errors have a status of their own
        return status
    if isinstance(error, (ValueError, OSError, ImportError)) or type(error).__name__ in (
        "StrictDataclassFieldValidationError",
        "StrictDataclassClassValidationError",
        "SafetensorError",
    ):
        return 2
    return None


def sentence(error: Exception) -> str:
    """What an error says, in one line; only tables of our own keep theirs."""
    if isinstance(error, ImportError):
        return _about_missing(error)
    if type(error).__name__ == "StrictDataclassClassValidationError" and error.__cause__ is not None:
        error = error.__cause__  # its own text puts the name of a validator first
    text = str(error) or type(error).__name__
    if getattr(error, "is_table", False):
        return text
    return " ".join(text.split())


def _about_missing(error: ImportError) -> str:
    module = (error.name or "").split(".")[0]
    if module in EXTRAS:
        return f'`{module}` is not installed: pip install "evit-hf[{EXTRAS[module]}]"'
    return " ".join(str(error).split())
