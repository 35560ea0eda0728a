"""The troubleshooting page quotes the program as it speaks."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"


def load_hook(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def messages():
    return load_hook("messages")


def quoted():
    return [
        line
        for block in re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
        for line in block.split("\n")
        if line
    ]


def test_every_message_that_the_page_explains_still_exists_in_the_source(messages):
    assert len(quoted()) > 30
    assert sorted(set(quoted()) - messages.all_messages()) == []


def test_values_that_are_filled_in_become_an_ellipsis(messages, tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "require(a > 0, f'--a {a} is ' 'too small.')\n"
        "raise UserError(f'There is no {thing!r}: make one.')\n"
        "raise ValueError('not for users')\n"
        "raise UserError(sentence)\n"
    )
    assert set(messages.messages_of(source)) == {"--a … is too small.", "There is no …: make one."}


def test_the_list_of_all_messages_leaves_none_out(messages):
    listed = set(messages.listing())
    assert messages.all_messages() <= listed
    assert len(listed) > 200
