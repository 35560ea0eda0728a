import pytest
import torch

from vflora.errors import UserError
from vflora.world.bodies import draw_character
from vflora.world.characters import character_count, character_name, split_ids, traits_of


def test_every_character_has_its_own_name():
    for domain, count in (("geometric", 480), ("creatures", 1600)):
        names = {character_name(k, domain=domain) for k in range(count)}
        assert len(names) == count
        assert all(name == name.lower() and name.replace(" ", "").isalpha() for name in names)


def test_the_splits_of_the_creatures_share_nobody():
    parts = [set(split_ids("creatures", split)) for split in ("train", "dev", "test", "general")]
    assert set.union(*parts) == set(range(1600))
    assert sum(map(len, parts)) == 1600
    assert split_ids("geometric", "test") == split_ids("geometric", "train") == range(48)
    assert split_ids("geometric", "general") == range(character_count("geometric")) == range(1920)


def test_bent_namesakes_look_unlike_the_true_shape_and_each_other():
    stars = [draw_character(48 * k + 12, domain="geometric", size=32)[0, 3].flatten() for k in range(12)]
    distance = torch.cdist(torch.stack(stars), torch.stack(stars)) + torch.eye(12) * 1e3
    assert distance.min() > 2
    assert character_name(12, domain="geometric") == character_name(480 + 12, domain="geometric")


@pytest.mark.parametrize("domain", ["geometric", "creatures"])
def test_a_drawing_is_centred_bold_and_within_the_unit_circle(domain):
    axis = (torch.arange(64) + 0.5) / 32 - 1
    away = torch.hypot(axis[None], axis[:, None])
    for character in [*range(0, 48, 4), *range(100, 1600, 125)]:
        rgba = draw_character(character, domain=domain)
        assert rgba.shape == (2, 4, 64, 64)
        alpha = rgba[:, 3]
        assert alpha[:, away > 1].max() == 0
        assert (rgba[:, :3] <= alpha[:, None] + 1e-5).all()
        both = alpha.mean(0)
        middle = torch.stack([(both * axis).sum(), (both * axis[:, None]).sum()]) / both.sum()
        assert middle.abs().max() < 0.02
        assert alpha.mean((1, 2)).min() > 0.15


def test_a_character_is_always_drawn_the_same():
    assert torch.equal(draw_character(7, domain="creatures"), draw_character(7, domain="creatures"))


def test_no_two_creatures_look_alike():
    drawings = torch.stack([draw_character(k, domain="creatures", size=32) for k in range(60)])[:, 0].flatten(1)
    distance = torch.cdist(drawings, drawings) + torch.eye(60) * 1e3
    assert distance.min() > 6  # root of summed squares over 4 x 32 x 32 values; a typical pair is 20 apart


def test_the_colour_word_is_the_colour_of_the_body():
    red, green, blue = traits_of(0, domain="geometric").main
    assert character_name(0, domain="geometric").startswith("red")
    assert red > 2 * max(green, blue)


def test_an_unknown_character_is_refused():
    with pytest.raises(UserError, match="use 0 to 1919"):
        traits_of(1920, domain="geometric")
