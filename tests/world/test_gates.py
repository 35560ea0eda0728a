import pytest
import torch

from vflora.world.gates import gate_clips, locate, motion_gate, psnr_by_frame, save_grid

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["geometric", "creatures"])
def rendered(request):
    return gate_clips(16, domain=request.param, split="dev", frames=17, size=64, device=CPU, posts=0.0)


def test_the_characters_true_place_is_found(rendered):
    scenes, clips = rendered
    error = (locate(clips.video, scenes) - clips.centers).norm(dim=-1)
    assert error.median() < 2.5


def test_true_clips_pass_the_motion_gate(rendered):
    scenes, clips = rendered
    gate = motion_gate(clips.video, scenes, clips, scenes.domain)
    assert gate.direction == 1.0
    assert gate.motion == 1.0
    assert gate.speed == 1.0
    assert gate.passed


def test_frozen_clips_fail_the_motion_gate(rendered):
    scenes, clips = rendered
    frozen = clips.video[:, :, :1].expand_as(clips.video)
    assert not motion_gate(frozen, scenes, clips, scenes.domain).passed


def test_clips_played_backwards_fail_the_motion_gate(rendered):
    scenes, clips = rendered
    gate = motion_gate(clips.video.flip(2), scenes, clips, scenes.domain)
    assert gate.direction < 0.5


def test_psnr_is_that_of_a_known_error_and_looks_only_where_the_mask_says():
    reference = torch.zeros(2, 3, 2, 4, 4)
    video = reference.clone()
    video[:, :, 1, :2] = 0.2
    mask = torch.zeros(2, 2, 4, 4)
    mask[:, :, 2:] = 1
    mask[:, :, 1] = 1
    by_frame = psnr_by_frame(video, reference)
    assert by_frame[0] == torch.inf
    torch.testing.assert_close(by_frame[1], 10 * torch.log10(torch.tensor(4 / 0.02)))
    mask[:, :, :2] = 0
    assert psnr_by_frame(video, reference, mask)[1] == torch.inf


def test_a_grid_has_a_row_per_batch_and_clip(tmp_path, rendered):
    from PIL import Image

    _, clips = rendered
    save_grid(tmp_path / "grid.png", clips.video, clips.video, clips=3, every=4)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (5 * 64, 3 * 2 * 64)
