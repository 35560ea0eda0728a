"""The reference of all flags, from the configuration dataclasses: the page says where with an HTML comment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from vflora.cli import COMMANDS, build_parser, config_class_of, config_groups

PLACE = "<!-- every command and its flags -->"
_NOT_OURS = {"help", "config", "print_config"}


def on_page_markdown(markdown: str, **_options: Any) -> str:
    """Puts the reference where a page asks for it."""
    return markdown.replace(PLACE, "\n".join(reference())) if PLACE in markdown else markdown


def reference() -> Iterator[str]:
    """Yields the lines of the reference: a section for each command, a table for each group of flags."""
    for name, command in COMMANDS.items():
        groups = config_groups(config_class_of(name))
        yield from (f"## vflora {name}", "", _sentence(command.summary), "")
        if command.positionals:
            first = ", ".join(f"`--{flag}`" for flag in command.positionals)
            yield from (f"May be given without their names, in this order: {first}.", "")
        for title, rows in _tables(build_parser(name, groups)):
            yield from (f"### {title.rstrip(':')}", "") if len(groups) > 1 else ("",)
            yield from ("| flag | default | what it does |", "|---|---|---|")
            yield from rows
            yield ""


def _tables(parser: ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    for group in parser._action_groups:
        rows = [_row(action) for action in group._group_actions if action.dest not in _NOT_OURS]
        if rows:
            yield str(group.title), rows


def _row(action: Any) -> str:
    text = " ".join(action.help.split())
    default = "**required**" if action.required else f"`{_shown(action.default)}`"
    return f"| `--{action.dest}` | {default} | {_cell(text)}{_choices(action)} |"


def _choices(action: Any) -> str:
    kind = action._typehint
    words = get_args(kind) if get_origin(kind) is Literal else ()
    return f" One of {', '.join(f'`{word}`' for word in words)}." if words else ""


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


def _cell(text: str) -> str:
    """Escapes what Markdown would take for something else, but for what stands between backquotes."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([|*_<\[])", r"\\\1", p) for p in parts)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
