"""What people read after --help."""

import re

import pytest

from vflora.cli import COMMANDS, main
from vflora.help_text import plain_type


@pytest.fixture
def shown(monkeypatch, capsys):
    """The help of a command in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def read(command):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        return capsys.readouterr().out

    return read


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<class 'Path'>", "Path"),
        ("Path | null", "Path"),
        ("Optional[list[str]]", "list of str"),
        ("list[float]", "list of float"),
        ("list[Literal['fast', 'exact']]", "list of fast, exact"),
        ("int", "int"),
        ("bool", None),
        ("bool | null", None),
        ("Literal['bf16', 'fp32']", None),
        ("Optional[Literal['480p', '720p']]", None),
    ],
)
def test_types_are_read_as_words_and_choices_are_not_repeated(text, plain):
    assert plain_type(text) == plain


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_no_python_and_fits_the_terminal(command, shown):
    text = shown(command)
    assert not re.search(r"<class|Literal\[|Optional\[|\| null", text)
    # jsonargparse puts both spellings of a list's flag into one line
    long = [line for line in text.splitlines() if len(line) > 80 and "+ " not in line]
    assert long == []


def test_lists_are_shown_as_they_are_typed(shown):
    text = shown("compare")
    assert "--images PATH ..." in text
    assert "--lora_scales ITEM ..." in text
    assert not re.search(r"\[ITEM|PATH1", text)


def test_flags_that_help_speaks_of_exist(shown):
    text = "".join(map(shown, COMMANDS))
    there = set(re.findall(r"^  (?:-h, )?(--\w+)", text, re.MULTILINE))
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", text)) <= there


def test_a_flag_whose_name_may_be_left_out_is_in_the_usage(shown):
    assert shown("data pack").startswith("usage: vflora data pack [IMAGES] [flags]\n")
    assert shown("train").startswith("usage: vflora train [flags]\n")


def test_the_overview_fits_the_terminal(capsys):
    assert main(["--help"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []
