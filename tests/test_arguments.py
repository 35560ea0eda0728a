from dataclasses import dataclass, field

import pytest

from vflora.arguments import normalise


@dataclass
class Flags:
    name: str = ""
    deep: bool = False
    scales: list[float] = field(default_factory=list)
    words: list[str] | None = None
    auto: bool | None = None
    rank: int | None = None


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("--deep", ["--deep", "true"]),
        ("--deep no", ["--deep", "false"]),
        ("--deep=1", ["--deep", "true"]),
        ("--no-deep", ["--deep", "false"]),
        ("--deep --name x", ["--deep", "true", "--name", "x"]),
        ("--deep maybe", ["--deep", "maybe"]),
        ("--scales 0.3 0.5 --name x", ["--scales", "[0.3, 0.5]", "--name", "x"]),
        ("--scales -1 2", ["--scales", "[-1, 2]"]),
        ("--words a,b", ["--words", '["a", "b"]']),
        ("--words img_attn_q attn.to_q", ["--words", '["img_attn_q", "attn.to_q"]']),
        ("--rank 4", ["--rank", "4"]),
        ("--auto off", ["--auto", "false"]),
        ("--unknown-flag 3", ["--unknown_flag", "3"]),
    ],
)
def test_usual_spellings_are_understood(typed, read):
    assert normalise(typed.split(), [Flags]) == read


def test_positionals_get_their_flag():
    assert normalise(["here", "--rank", "2"], [Flags], ("name",)) == ["--name", "here", "--rank", "2"]
    assert normalise(["--name", "here", "there"], [Flags], ("name", "words")) == ["--name", "here", "--words", "there"]


def test_a_prompt_may_have_commas():
    assert normalise(["--words", "a fox runs, and jumps"], [Flags]) == ["--words", '["a fox runs, and jumps"]']


@pytest.mark.parametrize("config", [["--config", "f.yaml"], ["--config=f.yaml"]])
def test_a_config_file_is_no_positional_and_comes_first(config):
    read = [*config, "--name", "here", "--rank", "2"]
    assert normalise(["here", "--rank", "2", *config], [Flags], ("name",)) == read
    assert normalise([*config, "here", "--rank", "2"], [Flags], ("name",)) == read


def test_a_switch_before_a_positional_leaves_it_alone():
    assert normalise(["--deep", "here"], [Flags], ("name",)) == ["--deep", "true", "--name", "here"]
