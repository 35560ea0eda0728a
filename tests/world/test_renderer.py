import math
from dataclasses import replace

import pytest
import torch

from vflora.errors import UserError
from vflora.random_streams import keyed_generator
from vflora.world.renderer import render, render_stills
from vflora.world.scenes import (
    DIRECTIONS,
    HOLD_FRAMES,
    MOTIONS,
    TRAVEL,
    VOCABULARY,
    motion_prompt,
    paths,
    prompts,
    reach,
    sample_scenes,
)


def draw(domain, count=24, seed=0, **more):
    return sample_scenes(count, domain=domain, split="train", generator=keyed_generator(seed, domain), **more)


@pytest.fixture(scope="module", params=["geometric", "creatures"])
def rendered(request):
    scenes = draw(request.param, posts=0.5)
    return scenes, render(scenes)


def centroids(mask):
    axis = torch.arange(mask.shape[-1], dtype=torch.float32)
    weight = mask.sum((-2, -1))
    return torch.stack([(mask * axis).sum((-2, -1)) / weight, (mask * axis[:, None]).sum((-2, -1)) / weight], dim=-1)


def test_a_clip_has_the_promised_shapes_and_range(rendered):
    scenes, clips = rendered
    assert clips.video.shape == (len(scenes), 3, 17, 64, 64)
    assert clips.video.dtype == torch.float32
    assert clips.video.abs().max() <= 1
    assert clips.mask.shape == (len(scenes), 17, 64, 64)
    assert clips.mask.min() >= 0
    assert clips.mask.max() <= 1
    assert clips.centers.shape == (len(scenes), 17, 2)
    assert clips.phases.shape == (len(scenes), 17)


def test_centers_are_the_centroids_of_the_visible_bodies(rendered):
    scenes, clips = rendered
    free = ~scenes.post.isfinite()
    assert free.any()
    assert (centroids(clips.mask[free]) - clips.centers[free]).abs().max() < 0.1


def test_the_character_never_touches_the_edge_of_the_frame(rendered):
    _, clips = rendered
    assert clips.mask[..., 0, :].max() == 0
    assert clips.mask[..., -1, :].max() == 0
    assert clips.mask[..., 0].max() == 0
    assert clips.mask[..., -1].max() == 0


def test_a_post_leaves_frame_0_whole_and_hides_part_of_the_character_later(rendered):
    scenes, clips = rendered
    behind = scenes.post.isfinite()
    assert behind.any()
    open_field = render(replace(scenes, post=torch.full_like(scenes.post, torch.inf)))
    assert torch.equal(clips.mask[:, 0], open_field.mask[:, 0])
    assert torch.equal(clips.mask[~behind], open_field.mask[~behind])
    seen = clips.mask[behind].sum((2, 3)) / open_field.mask[behind].sum((2, 3))
    assert (seen.amin(1) < 0.9).all()
    assert (seen.argmin(1) >= 5).all()


def test_how_far_a_path_reaches_is_read_off_the_path_itself():
    scenes = draw("geometric", count=96)
    path = paths(scenes.motion, scenes.direction, scenes.speed, 129)
    low, high = reach(scenes.motion, scenes.direction, scenes.speed)
    assert torch.equal(low, path.amin(1))
    assert torch.equal(high, path.amax(1))


def test_the_path_follows_the_words():
    scenes = draw("geometric", count=96, posts=0.0)
    clips = render(scenes)
    moved = clips.centers[:, -1] - clips.centers[:, 0]
    travel = TRAVEL[scenes.speed] * 64
    for index, direction in enumerate(scenes.direction.tolist()):
        x, y = moved[index].tolist()
        ahead, aside = {"left": (-x, y), "right": (x, y), "up": (-y, x), "down": (y, x)}[DIRECTIONS[direction]]
        # limbs and rotation move the centroid a little
        assert abs(ahead - float(travel[index])) < 2.5
        assert abs(aside) < 2.5


def test_each_motion_leaves_the_straight_line_in_its_own_way():
    motion = torch.arange(4)
    right, slowly = torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    path = paths(motion, right, slowly, 129) * 64
    height = -path[..., 1]
    slides, hops, circles, zigzags = (MOTIONS.index(m) for m in ("slides", "hops", "circles", "zigzags"))
    assert height[slides].abs().max() == 0
    assert height[hops].min() >= -1e-4
    assert height[hops].max() > 4
    assert height[zigzags].min() < -4
    assert height[zigzags].max() > 4
    steps = path[circles].diff(dim=0)
    turned = torch.atan2(steps[:, 1], steps[:, 0])
    assert turned.max() - turned.min() > math.pi  # the heading goes all the way round


def test_the_path_is_as_long_whatever_the_number_of_frames():
    scenes = draw("geometric", count=8)
    few = paths(scenes.motion, scenes.direction, scenes.speed, 5)
    many = paths(scenes.motion, scenes.direction, scenes.speed, 33)
    assert torch.allclose(few[:, -1], many[:, -1], atol=1e-6)
    assert torch.allclose(few[:, 1], many[:, 8], atol=1e-6)


def test_limbs_change_phase_as_often_as_the_speed_says(rendered):
    scenes, clips = rendered
    assert torch.equal(clips.phases[:, 0], scenes.phase)
    changes = (clips.phases.diff(dim=1) != 0).sum(1)
    assert torch.equal(changes, 16 // HOLD_FRAMES[scenes.speed])


def test_limb_phases_can_be_seen():
    scenes = draw("creatures", count=8)
    still = replace(scenes, frames=1)
    other = replace(still, phase=1 - still.phase)
    assert ((render(still).video - render(other).video).abs().amax((1, 2, 3, 4)) > 0.3).all()


def test_rendering_is_deterministic_and_independent_of_the_batch():
    scenes, again = draw("creatures", count=6), draw("creatures", count=6)
    whole = render(scenes)
    assert torch.equal(whole.video, render(again).video)
    alone = render(scenes.select([4]))
    assert torch.allclose(alone.video[0], whole.video[4], atol=1e-6)
    assert not torch.equal(whole.video, render(draw("creatures", count=6, seed=1)).video)


def test_backgrounds_are_calm_and_drift_slowly(rendered):
    scenes, clips = rendered
    away = (clips.mask.amax(1, keepdim=True) == 0) & ~scenes.post.isfinite()[:, None, None, None]
    change = clips.video.diff(dim=2).abs().amax(1) * away
    assert 0 < change.max() < 0.2
    flat = clips.video.masked_fill(~away[:, None], torch.nan)[:, :, 0].flatten(2)
    assert flat.nan_to_num(-9).amax(2).sub(flat.nan_to_num(9).amin(2)).clamp_min(0).max() < 0.6


def test_prompts_use_the_vocabulary_only():
    for domain in ("geometric", "creatures"):
        for sentence in prompts(draw(domain, count=40)):
            assert sentence.endswith(".")
            assert set(sentence[:-1].split()) <= set(VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_a_prompt_names_the_character_and_the_motion():
    expected = "a red striped star hops to the right slowly."
    assert motion_prompt("red striped star", "hops", "right", "slowly") == expected
    with pytest.raises(UserError, match="slides, hops"):
        motion_prompt("red striped star", "sleeps", "right", "slowly")


def test_scenes_render_at_other_sizes():
    scenes = draw("geometric", count=2, frames=3)
    small, large = render(scenes, size=32), render(scenes, size=128)
    assert torch.allclose((small.centers + 0.5) * 4, large.centers + 0.5, atol=1e-3)
    pooled = torch.nn.functional.avg_pool3d(large.video, (1, 4, 4))
    assert (pooled - small.video).abs().mean() < 0.02


def test_stills_show_one_character_in_many_ways():
    stills = render_stills(torch.full((6,), 5), domain="creatures", generator=keyed_generator("stills"), size=48)
    assert stills.shape == (6, 3, 48, 48)
    assert all((stills[i] - stills[j]).abs().mean() > 0.01 for i in range(6) for j in range(i))


def test_bad_requests_say_what_to_do():
    generator = keyed_generator("bad")
    with pytest.raises(UserError, match="train, dev, test or general"):
        sample_scenes(1, domain="creatures", split="val", generator=generator)
    with pytest.raises(UserError, match="geometric or creatures"):
        sample_scenes(1, domain="ghosts", split="train", generator=generator)
    with pytest.raises(UserError, match="one or more"):
        sample_scenes(0, domain="creatures", split="train", generator=generator)
    with pytest.raises(UserError, match="16 or more"):
        render(draw("geometric", count=1), size=8)
    with pytest.raises(UserError, match="0 to 1919"):
        render_stills(torch.tensor([1920]), domain="geometric", generator=generator)
