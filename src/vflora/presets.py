"""What flags that were given say about others: `--mode NAME`, and flags that set others aside. Pure."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

MODE = "mode"


def expand_mode(arguments: Sequence[str], groups: Sequence[type]) -> list[str]:
    """Adds the flags that the chosen mode stands for, but for those that were given.

    A group of flags with modes is a dataclass with a field `mode` and a static method `presets()`, which returns an
    instance of it for each mode. Where a `--config` file names a mode, as the settings that a run saves do, what the
    file has from that mode is not taken as given: the saved settings of an exact run go with `--mode fast`.

    Args:
        arguments: as `vflora.arguments.normalise` returns them.
        groups: the dataclasses of flags.
    """
    flags = list(flag_values(arguments))
    names = {name for name, _ in flags}
    saved = saved_settings(flags)
    added: list[str] = []
    for group in groups:
        presets = group.presets() if hasattr(group, "presets") else {}
        before = saved.get(MODE)
        chosen = dict(flags).get(MODE, before)
        if chosen not in presets:  # none, or one that the parser is going to refuse
            continue
        old = asdict(presets[before]) if before in presets else {}
        for name, value in asdict(presets[chosen]).items():
            given = name in names or (name in saved and not (name in old and saved[name] == old[name]))
            if name != MODE and not given:
                added.append(f"--{name}={typed(value)}")
    return [*arguments, *added]


def set_aside(arguments: Sequence[str], groups: Sequence[type]) -> list[str]:
    """Adds `--NAME=null` for flags that another one, which was given, puts out of force.

    A group of flags has a static method `sets_aside()` for that, which returns pairs: flags, and those that any of them
    puts out of force. These stay in force where they were given as well: on the command line, or in the `--config`
    file that gives the flag itself.

    Args:
        arguments: as `vflora.arguments.normalise` returns them.
        groups: the dataclasses of flags.
    """
    flags = list(flag_values(arguments))
    names = {name for name, _ in flags}
    added: list[str] = []
    for chosen, others in (pair for group in groups if hasattr(group, "sets_aside") for pair in group.sets_aside()):
        given = names if names.intersection(chosen) else names | saved_settings(flags).keys()
        if given.intersection(chosen) and given.isdisjoint(others):
            added += [f"--{other}=null" for other in others]
    return [*arguments, *added]


def typed(value: Any) -> str:
    """Returns a value as it is typed after its flag: a path or a word as it is, the rest as JSON."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, Sequence):
        return json.dumps([os.fspath(item) if isinstance(item, os.PathLike) else item for item in value])
    return json.dumps(value)


def flag_values(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields the name and the value of each flag of a normalised command line."""
    words = list(arguments)
    while words:
        name, joined, value = words.pop(0).partition("=")
        if name.startswith("--"):
            yield name[2:], value if joined or not words else words.pop(0)


def saved_settings(flags: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Returns the settings of `--config`, of files or YAML itself; the parser complains of what cannot be read."""
    values: dict[str, Any] = {}
    for name, config in flags:
        if name != "config":
            continue
        try:
            content = yaml.safe_load(Path(config).read_text(encoding="utf-8") if os.path.isfile(config) else config)
        except (yaml.YAMLError, UnicodeDecodeError):
            continue
        values |= content if isinstance(content, dict) else {}
    return values
