"""How a command ends: what was wrong becomes one line on standard error and an exit status, in one place.

An exception of this project has its exit status in its attribute `status`. Errors of libraries about files, values and
missing packages are the user's to fix, and end with status 2; if memory runs out, the status is 4. Everything else
is a bug and keeps its traceback.
"""

import atexit
import contextlib
import errno
import functools
import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO


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
            # Python would look through all objects once more before it ends, which takes seconds after `import torch`.
            atexit.unregister(gc.freeze)
            atexit.register(gc.freeze)
            try:
                main(words)
                sys.stdout.flush()
            except BrokenPipeError as error:  # `evit ... | head`: nobody reads on
                _say(" ".join([f"evit {word}: nobody reads the output any more.", *notes(error)]))
                _discard(sys.stdout)
                sys.exit(141)
            except KeyboardInterrupt:
                _say(f"evit {word}: interrupted")
                sys.exit(130)
            except Exception as error:
                status = status_of(error)
                if status is None:
                    if sys.version_info < (3, 11):  # later versions show the notes with the traceback
                        _say("\n".join(notes(error)))
                    raise
                kind = "" if status > 128 else "error: "
                _say(f"evit {word}: {kind}{sentence(error)}")
                sys.exit(status)

        return run

    return decorate


def _say(line: str) -> None:
    """Write a line to standard error, if anybody reads it."""
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Lead an output that cannot be written to nowhere, so that Python does not stumble over it at its exit."""
    with contextlib.suppress(OSError, ValueError):  # not a file, as in a notebook
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def notes(error: Exception) -> list[str]:
    """What was added to an error on its way: what is safe, and how to resume."""
    return list(getattr(error, "__notes__", []))


def status_of(error: Exception) -> int | None:
    """Exit status for an error; None for a bug."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and status < 256:  # HTTP errors have their own kind of status
        return status
    if is_out_of_memory(error):
        return 4
    if isinstance(error, (ValueError, OSError, ImportError)) or type(error).__name__ in (
        "StrictDataclassFieldValidationError",
        "StrictDataclassClassValidationError",
        "SafetensorError",
    ):
        return 2
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, that of the device or that of the machine."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
        or getattr(error, "errno", None) == errno.ENOMEM
    )


def sentence(error: Exception) -> str:
    """What an error and its notes say, in one line; only our own tables keep their lines."""
    return " ".join([_sentence(error), *notes(error)])


def _sentence(error: Exception) -> str:
    if isinstance(error, ImportError):
        return _about_missing(error)
    said: BaseException = error
    if type(error).__name__ == "StrictDataclassClassValidationError" and error.__cause__ is not None:
        said = error.__cause__  # its own text puts the name of a validator first
    text = str(said) or type(said).__name__
    if getattr(error, "is_table", False):
        return text
    text = " ".join(text.split())
    if is_out_of_memory(error) and not hasattr(error, "status"):
        return f"memory ran out: take smaller batches (`--batch-size`, `--eval-batch-size`). {text}"
    return text


def _about_missing(error: ImportError) -> str:
    module = (error.name or "").split(".")[0]
    if module in EXTRAS:
        return f'`{module}` is not installed: pip install "evit-hf[{EXTRAS[module]}]"'
    return " ".join(str(error).split())
