"""The quicker rollout: exact where it is harvested, close elsewhere."""

import pytest
import torch

from vflora.config import RolloutConfig
from vflora.flow import sampling_sigmas
from vflora.models.denoiser import Denoiser
from vflora.models.fast_teacher import FastTeacher, harvested_sigmas
from vflora.models.lora import add_lora
from vflora.models.precision import Fp8Switch, quantize_blocks
from vflora.rollout import deep_index, harvest_indices, rollout

STEPS = 8


def nowhere(rollout):
    return ()


@pytest.fixture
def setting(transformer, make_conditions):
    add_lora(transformer, rank=4, alpha=4, dropout=0.0, targets=None, seed=0)
    switch = quantize_blocks(transformer, fp8_rollouts=True)
    noise = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return Denoiser(transformer), switch, make_conditions(), noise, sampling_sigmas(STEPS, 5.0)


def roll(teacher, setting, points=STEPS, **guidance):
    denoiser, _, conditions, noise, sigmas = setting
    with denoiser.teacher():
        return rollout(teacher, conditions, noise, sigmas, points, **guidance)


def relative(value, expected):
    return float(torch.linalg.norm(value - expected) / torch.linalg.norm(expected))


def test_without_float8_and_skipping_it_is_the_plain_rollout(setting):
    teacher = FastTeacher(setting[0], nowhere, switch=Fp8Switch())
    assert torch.equal(roll(teacher, setting).latents, roll(setting[0], setting).latents)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_harvested_predictions_are_exact_at_the_states_reached(setting, stride):
    denoiser, switch, conditions, _, sigmas = setting
    harvested = [2, 5, 7]
    teacher = FastTeacher(denoiser, lambda n: [sigmas[i].item() for i in harvested], switch=switch, stride=stride)
    roll(teacher, setting, points=3)
    trajectory = roll(teacher, setting)
    with denoiser.teacher():
        for index in range(STEPS):
            exact = denoiser.velocity(trajectory.latents[index], sigmas[index].item(), conditions)
            assert torch.equal(trajectory.velocities[index], exact) == (index in harvested)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_states_stay_close_to_those_of_the_plain_rollout(setting, stride):
    fast = roll(FastTeacher(setting[0], nowhere, switch=setting[1], stride=stride), setting)
    plain = roll(setting[0], setting)
    assert 0 < relative(fast.latents[-1], plain.latents[-1]) < 0.05


def test_skipping_calls_the_model_less_often(setting, monkeypatch):
    denoiser, switch, *_ = setting
    calls, velocity = [], denoiser.velocity
    monkeypatch.setattr(denoiser, "velocity", lambda *a, **k: calls.append(a[1]) or velocity(*a, **k))
    roll(FastTeacher(denoiser, nowhere, switch=switch, stride=2), setting)
    assert len(calls) == 5  # points 0, 1, 3, 5, 7


def test_guidance_skips_the_blank_prompt_where_it_skips_the_prompt(setting, make_conditions, monkeypatch):
    denoiser, switch, *_, sigmas = setting
    guidance = {"guidance_scale": 3.0, "unconditional": make_conditions((5,), seed=9)}
    plain = roll(denoiser, setting, **guidance)
    calls, velocity = [], denoiser.velocity
    monkeypatch.setattr(denoiser, "velocity", lambda *a, **k: calls.append(a[1]) or velocity(*a, **k))
    fast = roll(FastTeacher(denoiser, nowhere, switch=Fp8Switch(), stride=2), setting, **guidance)
    assert calls == [sigmas[i].item() for i in (0, 0, 1, 1, 3, 3, 5, 5, 7)]
    assert 0 < relative(fast.latents[-1], plain.latents[-1]) < 0.05


def test_extrapolation_is_exact_for_a_velocity_that_is_linear_in_sigma(setting):
    class LinearField:
        def velocity(self, latents, sigma, conditions, *, next_sigma=None):
            return (2 + 3 * sigma) * torch.ones_like(latents)

    teacher = FastTeacher(LinearField(), nowhere, switch=Fp8Switch(), stride=3)
    for index, sigma in enumerate(setting[4][:STEPS].tolist()):
        velocity = teacher.velocity(torch.zeros(1, 4, 2, 4, 4), sigma, setting[2])
        assert torch.allclose(velocity, torch.full_like(velocity, 2 + 3 * sigma), atol=1e-5), index


def test_rollouts_are_counted_and_each_is_exact_at_its_own_points(setting):
    denoiser, switch, conditions, _, sigmas = setting
    plans = [{sigmas[3].item()}, {sigmas[6].item()}]
    teacher = FastTeacher(denoiser, plans.__getitem__, switch=switch)
    for plan in plans:
        trajectory = roll(teacher, setting)
        with denoiser.teacher():
            for index, sigma in enumerate(sigmas[:STEPS].tolist()):
                exact = denoiser.velocity(trajectory.latents[index], sigma, conditions)
                assert torch.equal(trajectory.velocities[index], exact) == (sigma in plan)


def test_a_rollout_of_one_point_is_counted_like_any_other(setting):
    denoiser, switch, conditions, _, sigmas = setting
    plans = [{sigmas[0].item()}, {sigmas[5].item()}]
    teacher = FastTeacher(denoiser, plans.__getitem__, switch=switch, stride=2)
    for points, harvested in ((1, 0), (6, 5)):
        with teacher.teacher():
            trajectory = rollout(teacher, conditions, setting[3], sigmas, points)
            exact = denoiser.velocity(trajectory.latents[harvested], sigmas[harvested].item(), conditions)
        assert torch.equal(trajectory.velocities[harvested], exact)


def test_all_steps_that_share_a_rollout_find_their_points_exact():
    config, sigmas = RolloutConfig(trajectory_reuse=3), sampling_sigmas(25, 5.0)
    exact = harvested_sigmas(config, 7, 2, sigmas)
    for step in (6, 7, 8):
        deep = deep_index(config, sigmas, 7, step)
        assert {sigmas[i].item() for i in [deep, *harvest_indices(config, deep, 7, step)]} <= exact
