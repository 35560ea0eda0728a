import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vflora.evaluate import (
    FRAMES_AT_ONCE,
    deviation_by_sigma,
    embed_frames,
    identity_scores,
    motion_scores,
    score_video,
    teacher_deviation,
    top_flow,
)
from vflora.models.random_weights import small_dinov3_vit


class Dino(nn.Module):
    """A real backbone of small size, used as embedder."""

    def __init__(self):
        super().__init__()
        self.backbone = small_dinov3_vit()

    def embed(self, images):
        return F.normalize(self.backbone(F.interpolate(images, (64, 64))).pooler_output, dim=-1)


def turning(angles):
    """Unit vectors in a plane at the given angles to the reference (1, 0)."""
    angles = torch.tensor(angles, dtype=torch.double)
    return torch.stack([angles.cos(), angles.sin()], dim=-1), torch.tensor([1.0, 0.0])


def travelling_square(step, frames=9, size=64):
    torch.manual_seed(0)
    video = torch.full((3, frames, size, size), -0.6)
    texture = torch.rand(3, 20, 20) * 2 - 1
    for i in range(frames):
        video[:, i, 20:40, 4 + step * i : 24 + step * i] = texture
    return video


def test_cosines_follow_the_angles_and_scale_does_not_matter():
    angles = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4]
    frames, reference = turning(angles)
    scores = identity_scores(frames * 7, reference * 3)
    expected = [math.cos(a) for a in angles]
    assert scores.cosines == pytest.approx(expected)
    assert scores.mean == pytest.approx(sum(expected) / 8)
    assert scores.last_quarter == pytest.approx((expected[6] + expected[7]) / 2)
    assert scores.last_quarter < scores.mean
    assert scores.i2v_subject == pytest.approx(0.4 + 0.6 * math.cos(0.2))


def test_the_slope_is_that_of_a_straight_line_and_drift_spans_the_clip():
    falling = [1.0 - 0.05 * i for i in range(9)]
    frames, reference = turning([math.acos(c) for c in falling])
    scores = identity_scores(frames, reference)
    assert scores.slope == pytest.approx(-0.05)
    assert scores.drift == pytest.approx(-0.4)
    assert scores.std == pytest.approx(0.05 * math.sqrt(60 / 9))


def test_one_frame_has_no_slope_no_spread_and_no_motion():
    scores = identity_scores(torch.tensor([[0.0, 1.0]]), torch.tensor([1.0, 1.0]))
    assert (scores.slope, scores.std) == (0, 0)
    assert scores.last_quarter == pytest.approx(math.sqrt(0.5))
    motion = motion_scores(torch.zeros(3, 1, 32, 32))
    assert motion.frame_difference == 0


def test_i2v_subject_rewards_stillness_and_hardly_sees_late_drift():
    still = identity_scores(*turning([0.3] * 16))
    drifting = identity_scores(*turning([0.0] * 12 + [0.1, 0.2, 0.3, 0.4]))
    assert drifting.last_quarter < still.last_quarter + 0.02
    assert drifting.i2v_subject > still.i2v_subject


def test_frame_difference_is_a_share_of_full_brightness():
    video = torch.full((3, 3, 8, 8), -1.0)
    video[:, 1] = 1.0
    motion = motion_scores(video)
    assert motion.differences == (1.0, 1.0)
    assert motion.frame_difference == 1.0


@pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="needs the flow extra")
def test_flow_measures_the_distance_travelled_per_frame():
    two, four = top_flow(travelling_square(2)), top_flow(travelling_square(4))
    assert two == pytest.approx(100 * 2 / 64, rel=0.25)
    assert four == pytest.approx(100 * 4 / 64, rel=0.25)
    assert top_flow(travelling_square(0)) == pytest.approx(0, abs=0.05)


def test_motion_is_compared_with_the_base_of_the_same_seed():
    slow, fast = motion_scores(travelling_square(2)), motion_scores(travelling_square(4))
    still = motion_scores(torch.zeros(3, 5, 64, 64))
    assert slow.ratio_to(slow) == 1
    assert slow.ratio_to(fast) < 0.7
    assert still.ratio_to(still) == 1
    assert still.ratio_to(fast) == pytest.approx(0, abs=0.01)
    assert fast.ratio_to(still) > 100


def test_a_video_of_its_own_reference_scores_one_and_another_picture_less():
    torch.manual_seed(0)
    reference, other = torch.rand(3, 64, 64) * 2 - 1, -torch.ones(3, 64, 64)
    still = reference[:, None].expand(-1, 5, -1, -1)
    scores = score_video(still, reference, Dino())
    assert scores.identity.mean == pytest.approx(1, abs=1e-5)
    assert scores.identity.last_quarter == pytest.approx(1, abs=1e-5)
    assert scores.motion.frame_difference == 0
    assert score_video(still, other, Dino()).identity.mean < 0.999


def test_frames_are_embedded_in_order_over_several_parts():
    torch.manual_seed(0)
    video = torch.rand(3, FRAMES_AT_ONCE + 3, 32, 32) * 2 - 1
    dino = Dino()
    together = embed_frames(video, dino)
    assert together.shape == (FRAMES_AT_ONCE + 3, 16)
    last = embed_frames(video[:, -1:], dino)
    assert torch.allclose(together[-1:], last, atol=1e-5)
    assert not together.requires_grad


def test_a_video_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[3, F, H, W\]"):
        score_video(torch.zeros(5, 3, 8, 8), torch.zeros(3, 8, 8), Dino())


def test_teacher_deviation_is_exactly_zero_for_equal_velocities_even_in_bf16():
    velocity = torch.randn(1, 4, 2, 3, 3, dtype=torch.bfloat16)
    assert teacher_deviation(velocity, velocity.clone()) == 0.0
    assert teacher_deviation(velocity, velocity.float() + 0.5) == pytest.approx(0.25)


def test_deviations_are_averaged_by_noise_level_and_empty_bins_are_left_out():
    by_sigma = deviation_by_sigma([1.0, 0.9, 0.25, 0.0], [1.0, 3.0, 5.0, 7.0])
    assert by_sigma == {"0.00-0.25": 6.0, "0.75-1.00": 2.0}
