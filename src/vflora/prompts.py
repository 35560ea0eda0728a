"""Prompts: drawn from a bank, or made by the user's own build_prompt(character)."""

from __future__ import annotations

import random
import re
import runpy
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import yaml

from vflora.config import PromptConfig
from vflora.errors import UserError

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class PromptBank:
    """A template such as `{character} {motion}. {camera}` and the choices for each of its fields."""

    template: str
    choices: dict[str, list[str]]

    def draw(self, character: str, generator: torch.Generator) -> str:
        """Returns the template with the character's name and one drawn entry for every other field."""
        values = {"character": character}
        for name, entries in self.choices.items():
            values[name] = entries[int(torch.randint(len(entries), (), generator=generator))]
        return _FIELD.sub(lambda match: values[match[1]], self.template)


def load_bank(path: Path | None) -> PromptBank:
    """Reads a bank; None reads the one that ships with the package.

    Raises:
        UserError: if the file is missing, no YAML, or its fields and its template do not agree.
    """
    try:
        text = path.read_text() if path else resources.files("vflora").joinpath("prompts.yaml").read_text()
        content = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"the prompt bank {path} cannot be read ({why}): give a YAML file.") from error
    if not isinstance(content, dict) or not isinstance(content.get("template"), str):
        raise UserError(f"the prompt bank {path} needs a line `template: ...` with {{character}} in it.")
    template = content.pop("template")
    fields = set(_FIELD.findall(template))
    if "character" not in fields:
        raise UserError(f"the template of the prompt bank {path} must contain {{character}}.")
    if missing := fields - {"character"} - set(content):
        raise UserError(f"the prompt bank {path} has no list for {{{sorted(missing)[0]}}}: add one.")
    choices = {}
    for name in sorted(fields - {"character"}):
        entries = content[name]
        if not isinstance(entries, list) or not entries or not all(isinstance(e, str) for e in entries):
            raise UserError(f"`{name}` in the prompt bank {path} must be a list of texts with at least one entry.")
        choices[name] = entries
    return PromptBank(template, choices)


@contextmanager
def _named_faults(path: Path | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the user's own code raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else "?"
        raise UserError(f"{path} fails in line {line} ({type(error).__name__}: {error}): correct it.") from error


@contextmanager
def _seeded(generator: torch.Generator) -> Iterator[None]:
    """Gives `random` and numpy a seed of our own inside, so that a resumed run draws the prompts it would have."""
    seed = int(torch.randint(2**32, (), generator=generator))
    mine, numpys = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(mine)
        np.random.set_state(numpys)


def prompt_maker(config: PromptConfig) -> Callable[[str, torch.Generator], str]:
    """Returns what turns a character's name into a prompt: the bank's draw, or the user's own function.

    Raises:
        UserError: if the bank or the builder cannot be used.
    """
    if config.prompt_builder is None:
        return load_bank(config.prompt_bank).draw
    if not config.prompt_builder.is_file():
        raise UserError(f"--prompt_builder {config.prompt_builder} does not exist.")
    with _named_faults(config.prompt_builder):
        build = runpy.run_path(str(config.prompt_builder)).get("build_prompt")
    if not callable(build):
        raise UserError(f"{config.prompt_builder} defines no function build_prompt(character).")

    def make(character: str, generator: torch.Generator) -> str:
        with _named_faults(config.prompt_builder), _seeded(generator):
            prompt = build(character)
        if not isinstance(prompt, str):
            raise UserError(f"build_prompt({character!r}) in {config.prompt_builder} returned no text.")
        return prompt

    return make
