import pytest
import torch

from vflora.config import PromptConfig
from vflora.errors import UserError
from vflora.prompts import load_bank, prompt_maker


def draw(bank, character="red fox", seed=0):
    return bank.draw(character, torch.Generator().manual_seed(seed))


def test_the_shipped_bank_names_the_character_and_fills_every_field():
    prompts = {draw(load_bank(None), seed=seed) for seed in range(50)}
    assert len(prompts) > 40
    assert all(prompt.startswith("red fox ") and "{" not in prompt for prompt in prompts)


def test_equal_generators_draw_equal_prompts():
    bank = load_bank(None)
    assert draw(bank, seed=3) == draw(bank, seed=3)


def test_a_name_with_braces_is_only_a_name(tmp_path):
    (tmp_path / "bank.yaml").write_text('template: "{character} {motion}"\nmotion: [hops]\n')
    assert draw(load_bank(tmp_path / "bank.yaml"), "{motion.__class__}") == "{motion.__class__} hops"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("template: a {character} {motion}\n", "no list for {motion}"),
        ("template: a {motion}\nmotion: [hops]\n", "must contain {character}"),
        ("template: a {character} {motion}\nmotion: hops\n", "must be a list"),
        ("motion: [hops]\n", "needs a line `template"),
        ("template: [", "cannot be read"),
    ],
)
def test_a_bank_that_cannot_be_used_is_explained(tmp_path, text, sentence):
    (tmp_path / "bank.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence.replace("{", r"\{").replace("}", r"\}")):
        load_bank(tmp_path / "bank.yaml")


def test_a_builder_of_ones_own_makes_the_prompts(tmp_path):
    (tmp_path / "mine.py").write_text("def build_prompt(character):\n    return f'{character} waves'\n")
    make = prompt_maker(PromptConfig(prompt_builder=tmp_path / "mine.py"))
    assert make("red fox", torch.Generator()) == "red fox waves"


@pytest.mark.parametrize("code", ["x = 1\n", "build_prompt = 3\n"])
def test_a_builder_without_the_function_is_refused(tmp_path, code):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError, match="defines no function build_prompt"):
        prompt_maker(PromptConfig(prompt_builder=tmp_path / "mine.py"))
