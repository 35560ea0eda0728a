"""Every command that the README and the site show is run, or read by the parser that it is meant for."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from click.testing import CliRunner
from huggingface_hub.cli.hf import app as hf_app
from torch.distributed.run import get_args_parser as torchrun_parser

from vflora.cli import COMMANDS, build_parser, config_class_of, config_groups, main, parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
RUNS = "on the small models"
FENCE = re.compile(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)")


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    title: str
    text: str

    def commands(self):
        """The words of each command."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page):
    return [Block(page, *found.groups(default="")) for found in FENCE.finditer(page.read_text())]


def prose(page):
    return FENCE.sub("", page.read_text())


def in_order():
    """The blocks that run, in the order in which a reader of the site meets them."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = [ROOT / "docs" / place for entry in nav for place in entry.values()]
    return [block for page in pages for block in blocks(page) if block.title == RUNS]


def split_name(words):
    """The name of a command of ours, and the rest."""
    length = 2 if " ".join(words[:2]) in COMMANDS else 1
    return " ".join(words[:length]), words[length:]


@cache
def flags_of(command):
    groups = config_groups(config_class_of(command))
    return {action.dest for action in build_parser(command, groups)._actions}


def read_ours(words):
    name, rest = split_name(words)
    parse(name, rest)


def read_torchrun(words):
    options = torchrun_parser().parse_args(words)
    if options.module:
        assert options.training_script == "vflora.cli"
        read_ours(options.training_script_args)
        return
    assert (ROOT / options.training_script).is_file()
    command = {"train.py": "train", "generate.py": "generate", "export_lora_from_dcp.py": "export"}
    parse(command[options.training_script], options.training_script_args)


def read_accelerate(words):
    assert words[0] == "launch"
    options = launch_command_parser().parse_args(words[1:])
    assert options.training_script == "identity_loss/train_projection_head.py"
    assert (ROOT / options.training_script).is_file()
    parse("train-head", options.training_script_args)


def read_script_for_training(words):
    assert (ROOT / words[0]).is_file()
    parse("train", words[1:])


def read_hf(words):
    shown = CliRunner().invoke(hf_app, [words[0], "--help"])
    assert shown.exit_code == 0
    assert set(FLAG.findall(" ".join(words))) <= set(FLAG.findall(shown.output))


def read_pip(words):
    assert words == ["install", "."]


def read_make(words):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets)


READERS = {
    "vflora": read_ours,
    "torchrun": read_torchrun,
    "accelerate": read_accelerate,
    "bash": read_script_for_training,
    "sbatch": read_script_for_training,
    "hf": read_hf,
    "pip": read_pip,
    "make": read_make,
}


def shown_commands():
    for page in PAGES:
        for block in blocks(page):
            for words in block.commands() if block.language in ("bash", "") else []:
                while re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                yield pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", list(shown_commands()))
def test_every_command_that_is_shown_is_understood_by_the_program_it_calls(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "--config" in words:  # of a run that another command has made
        place = tmp_path / words[words.index("--config") + 1]
        place.parent.mkdir(parents=True)
        place.write_text("pipeline_dir: x\nwds_root: x\nmetadata_key: x\ndino_model_dir: x\ndino_head_path: x\n")
    READERS[words[0]](words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_within_sentences_exist_with_the_flags_they_show(page):
    for code in re.findall(r"`(vflora [^`]+)`", prose(page)):
        words = shlex.split(code)[1:]
        if words[0] in ("COMMAND", "--help"):
            continue
        name, rest = split_name(words)
        assert name in COMMANDS, code
        assert set(FLAG.findall(" ".join(rest))) <= flags_of(name), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flag_that_a_sentence_names_exists(page):
    ours = {flag for command in COMMANDS for flag in flags_of(command)}
    theirs = {name.lstrip("-") for action in torchrun_parser()._actions for name in action.option_strings}
    shown = {flag.replace("-", "_") for flag in FLAG.findall(prose(page))}
    assert shown - ours - {flag.replace("-", "_") for flag in theirs} - {"x", "no_x"} == set()


@pytest.mark.slow
def test_every_block_for_the_small_models_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")  # readers are in the folder of the project
    notebook: dict = {}
    for block in in_order():
        if block.language == "python":
            exec(compile(block.text, str(block.page), "exec"), notebook)
            continue
        for words in block.commands():
            assert words[0] == "vflora"
            assert main(words[1:]) == 0, words
    made = ["runs/lora/checkpoint-4", "my-lora", "hop.mp4", "comparison/index.html", "two.mp4", "base.mp4"]
    made += ["runs/notebook/checkpoint-2", "notebook-comparison/index.html"]
    assert [name for name in made if not (tmp_path / name).exists()] == []


def test_there_are_blocks_of_both_kinds():
    assert {block.language for block in in_order()} == {"bash", "python"}
    assert len(list(shown_commands())) > 30
