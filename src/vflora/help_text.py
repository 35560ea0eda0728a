"""How `--help` shows a flag: what it takes and its default, and not how Python writes the type."""

from __future__ import annotations

import re
from argparse import Action

from jsonargparse import DefaultHelpFormatter

_LISTS = {"[ITEM,...]": "ITEM ...", "'[\"PATH1\",...]' | LIST_OF_PATHS_FILE | -": "PATH ..."}
"""How jsonargparse writes the value of a list's flag -> what people type."""


class HelpText(DefaultHelpFormatter):
    """The help of jsonargparse, with types that are read as words; choices are in braces beside the flag already."""

    def _get_type_str(self, action: Action) -> str | None:
        text = super()._get_type_str(action)
        return None if text is None else plain_type(text)

    def _format_args(self, action: Action, default_metavar: str) -> str:
        text = super()._format_args(action, default_metavar)
        return _LISTS.get(text, text)


def plain_type(text: str) -> str | None:
    """Returns a type as people say it, such as Path or list of str; None for choices, true and false among them."""
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace(" | null", "")
    text = re.sub(r"^Optional\[(.*)\]$", r"\1", text)
    if text == "bool" or text.startswith("Literal["):
        return None
    text = re.sub(r"^list\[(.*)\]$", r"list of \1", text)
    return re.sub(r"Literal\[(.*?)\]", lambda choices: choices[1].replace("'", ""), text)
