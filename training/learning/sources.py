"""Where a model is: one function for all commands, quick, before anything heavy is imported or loaded."""

import difflib
import json
import os
from pathlib import Path


# Seconds that the Hub has to answer.
TIMEOUT = 10.0


def resolve_model(name: str, flag: str = "MODEL", takes_presets: bool = False, asks_the_hub: bool = True) -> str:
    """A model as `from_pretrained` takes it.

    Args:
        name: a model folder, a run folder with `model/` in it, a Hub id, or a preset such as evit-deit-s.
        flag: what the command calls it, for the error.
        takes_presets: whether the command can do with a preset, which has random weights.
        asks_the_hub: whether to find out if the Hub has it, which takes a request unless it is cached.

    Returns: the folder, the Hub id, or the preset.

    Raises: ValueError saying what is wrong with it and what to give instead.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(_model_folder(path, flag))
    if path.exists():
        raise ValueError(
            f"`{flag}` is a file, `{name}`: give the folder of a model; `evit convert` makes one of a checkpoint file."
        )
    kind = "a model folder, a run folder or a Hub id (ORG/NAME)"
    if name.startswith("evit-") and "/" not in name:
        return _preset(name, flag, takes_presets)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or os.sep not in name:
        raise ValueError(f"`{flag}` must be {kind}, and there is no folder `{name}`{_like(path)}.")
    if asks_the_hub:
        _ask_the_hub(name, flag)
    return name


def name_of(model: str) -> str:
    """What people call a model: its Hub id or preset, or the name of its folder, or of its run's.

    Args:
        model: see `resolve_model`.
    """
    path = Path(model).expanduser()
    if not path.exists():
        return model
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def _model_folder(path: Path, flag: str) -> Path:
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            _check_config(folder / "config.json", flag)
            return folder
    if (path / "checkpoints").is_dir():
        raise ValueError(
            f"`{flag}` is the folder of a run that has not ended, `{path}`: finish it with `evit train --resume auto`."
        )
    inside = "is empty" if not any(path.iterdir()) else "has no config.json, neither in itself nor in `model/`"
    raise ValueError(f"`{flag}` must be the folder of a model, but `{path}` {inside}.")


def _check_config(path: Path, flag: str) -> None:
    try:
        is_config = isinstance(json.loads(path.read_bytes()), dict)
    except OSError as error:
        raise ValueError(f"`{flag}`: `{path}` cannot be read: {error.strerror}.") from None
    except ValueError:
        is_config = False
    if not is_config:
        raise ValueError(f"`{flag}`: `{path}` is damaged: it is not an object in JSON.")


def _preset(name: str, flag: str, takes_presets: bool) -> str:
    from evit_hf.presets import PRESETS

    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=3)
        raise ValueError(
            f"`{flag}` is `{name}`, and there is neither a folder nor a preset of that name: "
            f"{'did you mean ' + ', '.join(close) if close else '`evit presets` lists them'}?"
        )
    if not takes_presets:
        raise ValueError(
            f"`{flag}` is the preset `{name}`, which has no trained weights: give a model folder, a run folder or a "
            "Hub id."
        )
    return name


def _like(path: Path) -> str:
    """A hint at folders next to it with a similar name."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f": did you mean `{path.parent / close[0]}`?" if close else ""


def _ask_the_hub(name: str, flag: str) -> None:
    """Find out with one request whether the Hub has a model; one that is cached is taken as it is."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        if constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"`{flag}` is neither a folder nor in the local cache, and HF_HUB_OFFLINE is set: `{name}` cannot be "
                "asked for on the Hub."
            )
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=TIMEOUT)
    except HFValidationError:
        raise ValueError(f"`{flag}` is neither a folder nor a Hub id (ORG/NAME): `{name}`.") from None
    except GatedRepoError:
        raise ValueError(
            f"`{flag}` is gated on the Hub: ask for access at {constants.ENDPOINT}/{name}, then `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"`{flag}` is neither a folder nor a model that the Hub shows you: `{name}`. If it is private, "
            "`hf auth login` or set HF_TOKEN."
        ) from None
    except EntryNotFoundError:
        raise ValueError(
            f"`{flag}`: `{name}` on the Hub has no config.json, so it is not a Transformers model."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = "this token may not read it: `hf auth login`" if status in (401, 403) else f"status {status}"
        raise ValueError(f"`{flag}`: the Hub did not give `{name}`: {reason}.") from None
    except ValueError:
        raise
    except Exception as error:  # connections fail with the exceptions of an HTTP library that may change
        raise ValueError(
            f"`{flag}` is not a folder, and the Hub at {constants.ENDPOINT} could not be asked for `{name}`: "
            f"{type(error).__name__}: {' '.join(str(error).split())}."
        ) from None
