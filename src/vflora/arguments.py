"""Command lines as people type them -> command lines as jsonargparse reads them. Pure."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any, get_args, get_origin

_ELSEWHERE = {
    "lr": "learning_rate",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "network_dim": "lora_r",
    "network_alpha": "lora_alpha",
    "steps": "max_train_steps",
    "lora_strength": "lora_scale",
}
"""What other trainers call these flags."""
_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


def normalise(arguments: Sequence[str], groups: Sequence[type], positionals: Sequence[str] = ()) -> list[str]:
    """Rewrites flags so that every usual spelling works.

    `-` and `_` in a flag's name are the same; a boolean takes true/false/1/0/yes/no/on/off, or nothing for true, and
    `--no-x` is `--x false`; a list takes its values one after the other, or words with commas between them;
    positionals get their flag; `--config` comes first, so that whatever is given besides wins over it.

    Args:
        arguments: what was typed.
        groups: the dataclasses of flags.
        positionals: flags whose name may be left out, in order.
    """
    kinds: dict[str, Any] = {"config": str}
    kinds |= {name: hint for group in groups for name, hint in typing.get_type_hints(group).items()}
    words = list(arguments)
    configs: list[str] = []
    result: list[str] = []
    open_positionals = list(positionals)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            result += ["--" + open_positionals.pop(0), word] if open_positionals and word[:1] != "-" else [word]
            continue
        name, joined, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in kinds and name.startswith("no_") and _is_switch(kinds.get(name[3:])):
            result += [f"--{name[3:]}", "false"]
            continue
        kind = kinds.get(name)
        if name in open_positionals:
            open_positionals.remove(name)
        if kind is None:
            result.append(f"--{name}" + (f"={value}" if joined else ""))
        elif _is_switch(kind):
            # A word that is no boolean can only be a positional, or a mistake that must not pass for another flag's.
            if not joined and words and _follows_switch(words[0], kind, bool(open_positionals)):
                value, joined = words.pop(0), "="
            result += [f"--{name}", _boolean(value) if joined else "true"]
        elif _is(kind, list):
            values = [value] if joined else []
            while words and not _is_flag(words[0]):
                values.append(words.pop(0))
            result += [f"--{name}", _list(values, kind)]
        else:
            place = configs if name == "config" else result
            place += [f"--{name}={value}"] if joined else [f"--{name}"]
            if not joined and words:
                place.append(words.pop(0))
    return [*configs, *result]


_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}


def explain(problem: str, groups: Sequence[type]) -> str:
    """Says in one line what jsonargparse says about a value in several, or about a key without the right one.

    Args:
        problem: its message.
        groups: the dataclasses of flags.
    """
    kinds = {name: hint for group in groups for name, hint in typing.get_type_hints(group).items()}
    if match := re.fullmatch(r"Option '([^']*)' is not accepted", problem.strip()):
        return f"{match[1]} in the --config file is no setting: {_instead(match[1], kinds)}"
    if (match := re.match(r"unrecognized arguments: --(\w+)", problem)) and (meant := _meant(match[1], kinds)):
        return f"there is no --{match[1]}: write --{meant}"
    if match := re.match(r"the following arguments are required: (.+)", problem):
        return f"required and not given: {', '.join(f'--{name}' for name in match[1].split(', '))}"
    match = re.match(r'Parser key "(\w+)":.*(?:Got|Given) value: ([^\n]*)', problem, re.DOTALL)
    if match is None or match[1] not in kinds:
        return " ".join(problem.split())
    return f"--{match[1]} {match[2]} does not fit: it takes {_takes(kinds[match[1]])}"


def _instead(key: str, kinds: Collection[str]) -> str:
    meant = _meant(key.rpartition(".")[2].replace("-", "_"), kinds)
    place = " at the left margin" if "." in key else ""
    return f"write {meant}{place}" if meant else "remove it"


def _meant(name: str, kinds: Collection[str]) -> str | None:
    """Returns the flag that is most like `name`, or is called so elsewhere."""
    if _ELSEWHERE.get(name) in kinds:
        return _ELSEWHERE[name]
    return next(iter(difflib.get_close_matches(name, kinds, n=1)), None)


def _takes(kind: Any) -> str:
    if get_origin(kind) is typing.Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join("null" if part is types.NoneType else _takes(part) for part in get_args(kind))
    if get_origin(kind) is list:
        return f"a list ({_takes(get_args(kind)[0])} each)"
    return _WORDS.get(kind, "text")


def _is(kind: Any, wanted: type) -> bool:
    if get_origin(kind) in (typing.Union, types.UnionType):
        return any(_is(part, wanted) for part in get_args(kind)) and not any(_is(part, str) for part in get_args(kind))
    return kind is wanted or get_origin(kind) is wanted


def _is_switch(kind: Any) -> bool:
    """Whether a flag may stand alone: a bool, or a choice among words that has true in it."""
    return _is(kind, bool) or (get_origin(kind) is typing.Literal and "true" in get_args(kind))


def _follows_switch(word: str, kind: Any, positional_open: bool) -> bool:
    if word.lower() in {*_TRUE, *_FALSE, *get_args(kind)}:
        return True
    return not positional_open and not _is_flag(word)


def _is_flag(word: str) -> bool:
    return word.startswith("--") or (word.startswith("-") and not word[1:2].isdigit() and word != "-")


def _boolean(value: str) -> str:
    if value.lower() in _TRUE:
        return "true"
    return "false" if value.lower() in _FALSE else value


def _list(values: list[str], kind: Any) -> str:
    """JSON for jsonargparse; one value that is a list already stays as it is."""
    if len(values) == 1 and values[0].startswith("["):
        return values[0]
    # A sentence, such as a prompt, may have commas of its own.
    if len(values) == 1 and "," in values[0] and not any(character.isspace() for character in values[0]):
        values = values[0].split(",")
    text = "str" in str(kind)
    return "[" + ", ".join(json.dumps(v) if text else v for v in values) + "]"
