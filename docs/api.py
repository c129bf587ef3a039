"""API reference of evit_hf from its docstrings, as HTML pages: `python docs/api.py [FOLDER]`, by default site/.

Needs `pip install -e '.[docs]'`. Anything that pdoc warns about is an error.
"""

import sys
import typing
import warnings
from pathlib import Path

import pdoc

from evit_hf import configuration_evit, configuration_evit_lv


def build(folder: Path) -> None:
    """Write the pages.

    Args:
        folder: made if there is none; `index.html` is the entry.
    """
    for module in (configuration_evit, configuration_evit_lv):  # fields that they inherit are annotated with it
        module.Literal = typing.Literal
    pdoc.render.configure(docformat="google", footer_text="evit-hf")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        pdoc.pdoc("evit_hf", "evit_hf.export", "evit_hf.profiling", "evit_hf.visualization", output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
