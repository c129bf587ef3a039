"""What a data set says of itself: its licence and its name on the Hub."""

from pathlib import Path
from typing import Any

from ..data.packaged import packaged_dataset
from .hub import CARD, split_card


def licence_of(sources: list[str]) -> str | None:
    """Licence that the README.md of a data set states, as the Hub writes licences; None if it states none.

    Args:
        sources: `--dataset`: a packaged name, a folder, files, or a Hub id, whose README.md is read from the cache.
    """
    licence = _metadata(sources[0]).get("license")
    return ", ".join(map(str, licence)) if isinstance(licence, list) else licence and str(licence)


def hub_id_of(sources: list[str]) -> str | None:
    """Name of a data set on the Hub; None for packaged and local ones."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    source = sources[0]
    if len(sources) > 1 or Path(source).exists() or packaged_dataset(source):
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source


def _metadata(source: str) -> dict[str, Any]:
    """Metadata of the README.md of a data set; empty if there is none that can be read."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(source) if Path(source).exists() else packaged_dataset(source) or Path(source)
    path: Any = (folder if folder.is_dir() else folder.parent) / CARD
    if hub_id_of([source]):
        path = try_to_load_from_cache(source, CARD, repo_type="dataset")
    try:
        return split_card(Path(path).read_text("utf-8"))[0] or {}
    except (OSError, TypeError, ValueError):
        return {}


__all__ = ["hub_id_of", "licence_of"]
