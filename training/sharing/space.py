"""A Gradio demo of a model, written as a Space of the Hugging Face Hub."""

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from ..settings import check_new_folder
from .hub import export_folder


FILES = Path(__file__).parent / "space_files"
OLDEST_GRADIO = "6.0.0"
BUNDLED = ("README.md", "arguments.yaml", "results.json", "class_report.json", "evaluation.json")


def write_space(
    model: str, dest: Path, title: str | None = None, licence: str = "apache-2.0", examples: Sequence[str] = ()
) -> None:
    """Write app, requirements, README and all that the app needs.

    Args:
        model: folder with a model, which is copied, or a Hub id.
        dest: new folder.
        title: by default the model's name.
        licence: of the Space.
        examples: picture files to offer for a click; copied.

    Raises: ValueError if the folder is in use or holds no model, an example is not a file, or the Hub id is not valid.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    check_new_folder(dest)
    for path in examples:
        if not Path(path).is_file():
            raise ValueError(f"`--examples`: `{path}` is not a file.")
    source = Path(model)
    is_local = source.is_dir()
    if not is_local:
        try:
            validate_repo_id(model)
        except HFValidationError as error:
            raise ValueError(f"`{model}` is neither a folder nor a Hub id: {error}") from None
    dest.mkdir(parents=True, exist_ok=True)
    if is_local:
        export_folder(source, dest / "model")
        for name in BUNDLED:
            (dest / "model" / name).unlink(missing_ok=True)
    title = title or f"EViT: {source.resolve().name if is_local else model}"
    shutil.copyfile(FILES / "app.py", dest / "app.py")
    shutil.copytree(_package(), dest / "evit_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for i, path in enumerate(examples):
        (dest / "examples").mkdir(exist_ok=True)
        shutil.copyfile(path, dest / "examples" / f"{i:02}{Path(path).suffix.lower()}")
    (dest / "space.json").write_text(json.dumps({"title": title, "model": None if is_local else model}) + "\n")
    config = dest / "model" / "config.json"
    needs_timm = is_local and "architecture" in json.loads(config.read_text("utf-8"))
    (dest / "requirements.txt").write_text(
        f"torch>=2.7\ntransformers>={_installed('transformers', '5.9')},<6\nsafetensors\npillow\n"
        + "timm\ntorchvision\n" * needs_timm
    )
    metadata = {
        "title": title,
        "emoji": "✂️",
        "colorFrom": "blue",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": _installed("gradio", OLDEST_GRADIO),
        "app_file": "app.py",
        "license": licence,
        "tags": ["evit", "token-reduction", "image-classification"],
        **({} if is_local else {"models": [model]}),
    }
    text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    (dest / "README.md").write_text(
        f"---\n{text}---\n\nUpload a picture, move the slider, and see the answer, the patches that\n"
        "[EViT](https://arxiv.org/abs/2202.07800) keeps at each layer, its operations and its time.\n"
        "Written by `evit space`.\n"
    )


def _package() -> Path:
    """Folder of the package `evit_hf`, whose files travel with the Space."""
    import evit_hf

    return Path(evit_hf.__file__).parent


def _installed(package: str, otherwise: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise
