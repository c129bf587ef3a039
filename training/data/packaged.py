"""Data sets that come with this package, by name."""

from pathlib import Path


_FOLDER = Path(__file__).parent.parent / "datasets"


def packaged_dataset(name: str) -> Path | None:
    """Folder of the packaged data set of this name, or None. Users' own files and folders of that name come first."""
    return _FOLDER / name if name in {path.name for path in _FOLDER.iterdir()} else None
