from dataclasses import replace

import pytest
import torch

from vflora.demo import world_folder
from vflora.errors import UserError
from vflora.random_streams import keyed_generator
from vflora.world.grader import load_grader, render_anywhere, save_grader, train_grader
from vflora.world.grading import grade
from vflora.world.poses import best_poses
from vflora.world.renderer import render
from vflora.world.retrieval import make_lineup, ranks
from vflora.world.scenes import sample_scenes
from vflora.world.tracking import fill_holes, path_direction, path_length, track


@pytest.fixture(scope="module")
def grader():
    return load_grader(world_folder() / "grader.safetensors")


@pytest.fixture(scope="module")
def lineup(grader):
    return make_lineup(grader, domain="geometric", pictures=1)


@pytest.fixture(scope="module", params=["geometric", "creatures"])
def clips(request):
    generator = keyed_generator("grading", request.param)
    scenes = sample_scenes(8, domain=request.param, split="test", generator=generator, frames=9, posts=0.0)
    return scenes, render(scenes)


def test_tracking_finds_the_character_without_being_told_where_it_is(clips):
    scenes, truth = clips
    found = track(truth.video)
    assert (found.centers - truth.centers).norm(dim=-1).max() < 1.0
    assert torch.equal(path_direction(found.centers), scenes.direction)
    ratio = path_length(found.centers) / path_length(truth.centers)
    assert ((ratio - 1).abs() < 0.1).all()
    shared = torch.minimum(found.mask, truth.mask).sum((2, 3))
    assert (shared / torch.maximum(found.mask, truth.mask).sum((2, 3))).min() > 0.8


def test_tracking_survives_noise_and_blur(clips):
    scenes, truth = clips
    noise = torch.randn(truth.video.shape, generator=keyed_generator("noise"))
    blurred = torch.nn.functional.avg_pool3d(truth.video, (1, 3, 3), stride=1, padding=(0, 1, 1))
    found = track((blurred + 0.05 * noise).clamp(-1, 1))
    inner = (truth.centers - found.centers).norm(dim=-1)
    assert inner.median() < 1.5
    assert torch.equal(path_direction(found.centers), scenes.direction)


def test_an_empty_video_is_tracked_to_the_middle():
    found = track(torch.full((1, 3, 2, 32, 32), 0.4))
    assert torch.equal(found.area, torch.zeros(1, 2))
    assert torch.equal(found.centers, torch.full((1, 2, 2), 15.5))


def test_a_video_that_stands_still_has_no_path(clips):
    scenes, truth = clips
    frozen = truth.video[:, :, :1].expand(-1, -1, scenes.frames, -1, -1)
    assert path_length(track(frozen).centers).max() < 0.01


def test_holes_are_filled_and_gaps_are_not():
    ring = torch.ones(5, 5)
    ring[2, 2] = 0
    assert torch.equal(fill_holes(ring), torch.ones(5, 5))
    ring[3:, 2] = 0
    assert fill_holes(ring)[2, 2] == 0


def test_the_best_pose_shows_limbs_rotation_and_who_it_is(clips):
    scenes, truth = clips
    found = track(truth.video)
    right = best_poses(truth.video, found.mask, found.centers, scenes.character, scenes.radius, domain=scenes.domain)
    assert torch.equal(right.phase, truth.phases)
    assert right.iou.min() > 0.8
    assert right.palette_error.max() < 0.12
    time = torch.linspace(0, 1, scenes.frames)
    assert (right.angle - (scenes.tilt[:, None] + scenes.spin[:, None] * time)).abs().max() < 0.2
    others = scenes.character.roll(1)
    wrong = best_poses(truth.video, found.mask, found.centers, others, scenes.radius, domain=scenes.domain)
    assert wrong.iou.mean() < right.iou.mean() - 0.04
    assert wrong.palette_error.mean() > 1.5 * right.palette_error.mean()


def test_a_grader_learns_to_tell_characters_apart():
    learner = train_grader(8, characters=16, seed=1)
    characters = torch.arange(48)
    pictures = render_anywhere(characters, domain="geometric", generator=keyed_generator("new"))
    own = make_lineup(learner, domain="geometric", pictures=2)
    # eight steps are enough to leave chance, a mean rank of 239.5, far behind
    assert ranks(learner.embed(pictures), characters, own).float().mean() < 140


def test_the_grader_that_ships_knows_nearly_everybody(grader, lineup):
    characters = torch.arange(48)
    pictures = render_anywhere(characters, domain="geometric", generator=keyed_generator("new"))
    assert ranks(grader.embed(pictures), characters, lineup).float().mean() < 20


def test_training_is_reproducible_and_leaves_global_randomness_alone():
    before = torch.get_rng_state()
    one, two = (train_grader(1, characters=8, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_grader_survives_saving(grader, tmp_path):
    save_grader(grader, tmp_path / "grader.safetensors")
    again = load_grader(tmp_path / "grader.safetensors")
    pictures = render_anywhere(torch.arange(4), domain="creatures", generator=keyed_generator("saving"))
    assert (grader.embed(pictures) * again.embed(pictures)).sum(-1).min() > 0.999


def test_a_foreign_file_is_no_grader(tmp_path):
    (tmp_path / "wrong.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="train one"):
        load_grader(tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match="train one"):
        load_grader(tmp_path / "missing.safetensors")


def test_true_clips_get_full_marks_and_frozen_ones_lose_their_motion(grader, lineup):
    scenes = sample_scenes(6, domain="geometric", split="test", generator=keyed_generator("marks"), frames=9, posts=0.0)
    truth = render(scenes).video
    marks = grade(truth, scenes, grader=grader, lineup=lineup).summary()
    assert marks["direction_accuracy"] == 1
    assert marks["path_ratio"] == pytest.approx(1)
    assert marks["limb_ratio"] == pytest.approx(1)
    assert marks["iou_last_quarter"] > 0.8
    still = truth[:, :, :1].expand_as(truth)
    frozen = grade(still, scenes, grader=grader, lineup=lineup).summary()
    assert frozen["path_ratio"] < 0.01
    assert frozen["limb_ratio"] == 0
    assert frozen["retrieval_first_quarter"] == frozen["retrieval_last_quarter"]


def test_a_character_that_turns_into_another_loses_identity_late(grader, lineup):
    scenes = sample_scenes(6, domain="geometric", split="test", generator=keyed_generator("morph"), frames=9, posts=0.0)
    other = render(replace(scenes, character=(scenes.character + 21) % 48)).video
    video = torch.cat([render(scenes).video[:, :, :5], other[:, :, 5:]], dim=2)
    grades = grade(video, scenes, grader=grader, lineup=lineup)
    marks = grades.summary()
    assert marks["cosine_last_quarter"] < marks["cosine_first_quarter"] - 0.1
    assert marks["palette_error_last_quarter"] > 1.5 * marks["palette_error_first_quarter"]
    assert marks["iou_last_quarter"] < marks["iou_first_quarter"]
    assert grades.rank[:, -2:].float().mean() > grades.rank[:, 1:3].float().mean()


def test_grading_refuses_what_it_cannot_judge(grader, lineup):
    scenes = sample_scenes(2, domain="geometric", split="test", generator=keyed_generator("no"), frames=2, posts=0.0)
    video = render(scenes).video
    with pytest.raises(ValueError, match="posts=0"):
        grade(video, replace(scenes, post=torch.full((2,), 0.2)), grader=grader, lineup=lineup)
    with pytest.raises(ValueError, match="belong together"):
        grade(video[:1], scenes, grader=grader, lineup=lineup)
