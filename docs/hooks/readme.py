"""Sections of the README by their headings, so that nothing is written twice; elsewhere than on the site, links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"
PLACE = re.compile(r"^\[README: (.+?)\]\(\.\./README\.md#[\w-]+\)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_options: Any) -> str:
    """Puts the body of a section where a page asks for it."""
    return PLACE.sub(lambda found: section(found[1]), markdown)


def section(heading: str) -> str:
    """Returns what stands below a heading of the second level, its links as seen from the pages.

    Raises:
        LookupError: if the README has no such heading.
    """
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    if found is None:
        raise LookupError(f"the README has no section {heading!r}: correct the page that asks for it")
    return found[1].strip().replace("](docs/", "](")
