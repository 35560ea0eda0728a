"""Every sentence with which the program refuses something, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLACE = "<!-- every message -->"
SOURCE = Path(__file__).parents[2] / "src" / "vflora"
REFUSALS = {"UserError": 0, "require": 1, "BadSampleError": 0, "BadShardError": 0, "BadImageError": 0, "__init__": 0}
"""Calls that hold a sentence, and which of their arguments it is."""
BLANK = "…"


def on_page_markdown(markdown: str, **_options: Any) -> str:
    """Puts the list where a page asks for it."""
    return markdown.replace(PLACE, "\n".join(listing())) if PLACE in markdown else markdown


def listing() -> Iterator[str]:
    """Yields a list of all messages, by the module that they come from."""
    for module in sorted(SOURCE.rglob("*.py")):
        found = sorted(set(messages_of(module)))
        if found:
            yield from (f"### {module.relative_to(SOURCE).as_posix()}", "", "```text", *found, "```", "")


def all_messages() -> set[str]:
    """Returns the messages of the whole source; what they fill in is written as an ellipsis."""
    return {message for module in SOURCE.rglob("*.py") for message in messages_of(module)}


def messages_of(module: Path) -> Iterator[str]:
    """Yields the messages of one file."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        place = REFUSALS.get(name)
        if place is not None and len(node.args) > place:
            sentence = _template(node.args[place])
            if sentence:
                yield sentence


def _template(node: ast.expr) -> str:
    """Returns a string with an ellipsis for each value that is filled in; nothing for what is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if not isinstance(node, ast.JoinedStr):
        return ""
    return "".join(part.value if isinstance(part, ast.Constant) else BLANK for part in node.values)
