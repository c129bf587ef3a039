"""Model cards: render one from the template, check that nothing in it is blank."""

import re
from pathlib import Path
from typing import Any

import yaml


TEMPLATE = Path(__file__).with_name("model_card_template.md")
REQUIRED_METADATA = ("license", "library_name", "pipeline_tag", "tags")
# What an unfilled template, or a value that was never there, leaves behind.
BLANKS = (r"\{\{", r"\{%", r"\bNone\b", r"\bnan\b", r"\bTODO\b", "More Information Needed", r"\|\s*\|[^\n]*\|$")


def render_card(**values: Any) -> str:
    """Fill the card template.

    Args:
        **values: one for each name in `model_card_template.md`.

    Returns: the card, front matter included.

    Raises: jinja2.UndefinedError if a value is missing: the Hub's own renderer would leave a blank.
    """
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(TEMPLATE.read_text()).render(**values)


def check_card(text: str) -> dict[str, Any]:
    """Refuse a card with a blank, or without the metadata that the Hub searches by.

    Args:
        text: the whole card.

    Returns: the metadata.

    Raises: ValueError naming the line or the missing metadata.
    """
    match = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    if match is None:
        raise ValueError("The card has no front matter: it must begin with metadata between two lines of `---`.")
    try:
        metadata = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        raise ValueError(f"The card's metadata is no YAML: {error}") from None
    missing = [name for name in REQUIRED_METADATA if not (metadata or {}).get(name)]
    if missing:
        raise ValueError(f"The card's metadata lacks {missing}.")
    for line in match.group(2).splitlines():
        for blank in BLANKS:
            if re.search(blank, line) and line.strip() != "| | |":
                raise ValueError(f"The card has a blank in the line: {line}")
    return metadata


__all__ = ["check_card", "render_card"]
