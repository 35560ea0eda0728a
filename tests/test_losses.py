import math

import pytest
import torch
from torch.nn.functional import normalize

from vflora.losses import distillation_loss, frame_buckets, identity_loss, identity_weight


def test_distillation_is_the_unweighted_mean_squared_error():
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert distillation_loss(student, teacher).item() == 2.5


def test_identity_loss_is_the_mean_cosine_distance():
    anchor = torch.tensor([[1.0, 0.0]])
    frames = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    loss, cosines = identity_loss(frames, anchor)
    assert loss.item() == 1.0
    assert cosines.tolist() == [[1.0, 0.0, -1.0]]


def test_each_sample_is_compared_with_its_own_anchor():
    anchors = normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    loss, _ = identity_loss(anchors[:, None].expand(-1, 2, -1), anchors)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_frames_within_the_margin_press_no_further():
    frames = normalize(torch.tensor([[[1.0, 0.1], [1.0, 3.0]]]), dim=-1).requires_grad_()
    loss, _ = identity_loss(frames, torch.tensor([[1.0, 0.0]]), margin=0.1)
    loss.backward()
    assert frames.grad[0, 0].abs().sum() == 0
    assert frames.grad[0, 1].abs().sum() > 0


@pytest.mark.parametrize(("schedule", "halfway"), [("constant", 0.6), ("linear", 0.3), ("cosine", 0.3)])
def test_identity_weight_rises_to_its_peak(schedule, halfway):
    settings = {"peak": 0.6, "schedule": schedule, "warmup_steps": 100, "every_steps": 1}
    assert identity_weight(50, **settings) == pytest.approx(halfway)
    assert identity_weight(100, **settings) == 0.6
    quarter = (1 - math.cos(math.pi / 4)) / 2 if schedule == "cosine" else 0.25
    assert identity_weight(25, **settings) == pytest.approx(0.6 if schedule == "constant" else 0.6 * quarter)


def test_identity_is_skipped_between_its_steps():
    weights = [identity_weight(s, peak=1, schedule="constant", warmup_steps=0, every_steps=3) for s in range(6)]
    assert weights == [1, 0, 0, 1, 0, 0]


def test_every_bucket_gets_a_frame_and_the_last_quarter_is_always_seen():
    # Defect 9 of the reference: with 17 frames, three of its five buckets lay in frames 1 to 4.
    seen = set()
    for seed in range(200):
        frames = frame_buckets(17, 5, torch.Generator().manual_seed(seed))
        assert frames == sorted(set(frames))
        assert frames[-1] >= 13
        seen |= set(frames)
    assert seen == set(range(1, 17))


def test_short_clips_give_every_frame():
    assert frame_buckets(5, 9, torch.Generator()) == [1, 2, 3, 4]
    assert frame_buckets(1, 3, torch.Generator()) == [0]
