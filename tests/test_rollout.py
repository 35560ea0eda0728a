import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vflora.config import RolloutConfig
from vflora.errors import UserError
from vflora.flow import clean_estimate, euler_step, sampling_sigmas
from vflora.models.denoiser import Denoiser
from vflora.models.lora import add_lora
from vflora.rollout import (
    deep_index,
    harvest,
    harvest_indices,
    is_on_policy,
    on_policy_point,
    points_for_block,
    rollout,
)

SIGMAS = sampling_sigmas(25, 5.0)


@pytest.mark.parametrize(("steps", "shift"), [(25, 5.0), (50, 7.0), (6, 1.0)])
def test_schedule_equals_the_schedulers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
    torch.testing.assert_close(sampling_sigmas(steps, shift), scheduler.sigmas.float(), rtol=0, atol=2e-7)


def test_rollout_equals_the_schedulers_steps(transformer, make_conditions):
    sigmas, conditions = sampling_sigmas(6, 5.0), make_conditions()
    denoiser = Denoiser(transformer)
    noise = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with denoiser.teacher():
        trajectory = rollout(denoiser, conditions, noise, sigmas, 6)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 7)[:-1].tolist())
        latents = noise
        for index, timestep in enumerate(scheduler.timesteps):
            torch.testing.assert_close(trajectory.latents[index], latents, rtol=1e-5, atol=1e-5)
            velocity = denoiser.velocity(latents, timestep.item() / 1000, conditions)
            latents = scheduler.step(velocity, timestep, latents).prev_sample
    last = trajectory.point(5)
    torch.testing.assert_close(
        clean_estimate(last.latents, last.sigma, last.teacher_velocity), latents, rtol=1e-4, atol=1e-5
    )


def test_guidance_moves_the_states_along_the_guided_velocity_and_keeps_the_conditional_one(
    transformer, make_conditions
):
    sigmas, conditions, blank = sampling_sigmas(4, 5.0), make_conditions(), make_conditions((3,), seed=1)
    denoiser = Denoiser(transformer)
    noise = torch.randn(1, 4, 2, 4, 4)
    with denoiser.teacher():
        trajectory = rollout(denoiser, conditions, noise, sigmas, 2, guidance_scale=3.0, unconditional=blank)
        conditional = denoiser.velocity(noise, 1.0, conditions)
        unconditional = denoiser.velocity(noise, 1.0, blank)
    assert torch.equal(trajectory.velocities[0], conditional)
    guided = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(trajectory.latents[1], euler_step(noise, guided, 1.0, sigmas[1].item()))


def test_a_point_beyond_the_rollout_is_refused(transformer, make_conditions):
    denoiser = Denoiser(transformer)
    with denoiser.teacher():
        trajectory = rollout(denoiser, make_conditions(), torch.randn(1, 4, 2, 4, 4), sampling_sigmas(6, 5.0), 2)
    with pytest.raises(IndexError, match="points 0 to 1, not 2"):
        trajectory.point(2)


def test_the_deepest_point_can_be_chosen_by_its_place():
    config = RolloutConfig(id_sigma_low=None, id_sigma_high=None)
    drawn = {deep_index(config, SIGMAS, 42, step) for step in range(300)}
    assert drawn == set(range(15, 22))


@pytest.mark.parametrize("band", [(0.15, 0.45), (0.3, 0.6)])
def test_the_deepest_point_is_chosen_by_its_noise_level_and_reaches_both_ends(band):
    config = RolloutConfig(id_sigma_low=band[0], id_sigma_high=band[1])
    drawn = {deep_index(config, SIGMAS, 42, step) for step in range(300)}
    assert drawn == {i for i, sigma in enumerate(SIGMAS[:-1].tolist()) if band[0] <= sigma <= band[1]}


@pytest.mark.parametrize(
    ("steps", "low", "high", "nearest"), [(4, 0.15, 0.45, 3), (25, 0.01, 0.02, 24), (6, 0.86, 0.9, 2)]
)
def test_where_no_point_has_such_a_noise_level_the_nearest_one_is_the_deepest(steps, low, high, nearest):
    config = RolloutConfig(num_inference_steps=steps, id_sigma_low=low, id_sigma_high=high)
    sigmas = sampling_sigmas(steps, 5.0)
    assert {deep_index(config, sigmas, 42, step) for step in range(20)} == {nearest}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"id_sigma_low": None}, "set both to null or neither"),
        ({"id_sigma_low": 0.6, "id_sigma_high": 0.3}, "must not exceed"),
        ({"id_on_policy": 1.5}, "is a share"),
        ({"id_on_policy": 0.5, "harvest_count": 0}, "--harvest_count 1 or more"),
    ],
)
def test_settings_of_the_deepest_point_that_make_no_sense_are_refused(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        RolloutConfig(**flags)


def test_the_share_of_on_policy_steps_is_as_asked():
    drawn = [is_on_policy(RolloutConfig(id_on_policy=0.25), 42, step) for step in range(1000)]
    assert 200 < sum(drawn) < 300
    assert not any(is_on_policy(RolloutConfig(), 42, step) for step in range(100))


def test_on_policy_the_student_walks_and_the_teacher_answers_where_it_arrives(transformer, make_conditions):
    sigmas, conditions = sampling_sigmas(6, 5.0), make_conditions()
    add_lora(transformer, rank=4, alpha=4, dropout=0.0, targets=None, seed=0)
    denoiser = Denoiser(transformer)
    noise = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with denoiser.teacher():
        trajectory = rollout(denoiser, conditions, noise, sigmas, 5)
    start, there = trajectory.point(2), trajectory.point(4)
    fresh = on_policy_point(denoiser, conditions, sigmas, start, 4)
    assert (fresh.index, fresh.sigma) == (4, there.sigma)
    # A student that has learned nothing walks where the teacher walked, bit for bit.
    assert torch.equal(fresh.latents, there.latents)
    assert torch.equal(fresh.teacher_velocity, there.teacher_velocity)
    with torch.no_grad():
        for name, parameter in denoiser.lora_parameters().items():
            if "lora_B" in name:
                parameter.fill_(0.05)
    learned = on_policy_point(denoiser, conditions, sigmas, start, 4)
    assert not torch.equal(learned.latents, there.latents)
    with denoiser.teacher():
        answer = denoiser.velocity(learned.latents, learned.sigma, conditions)
    assert torch.equal(learned.teacher_velocity, answer)
    assert not learned.latents.requires_grad


@pytest.mark.parametrize("scheme", ["bracket", "random"])
def test_harvested_points_are_distinct_and_noisier_than_the_deepest(scheme):
    # Defect 6 of the reference: the deepest point was harvested too, and the student ran twice on it.
    config = RolloutConfig(harvest_scheme=scheme, harvest_count=4)
    for step in range(100):
        deep = deep_index(config, SIGMAS, 42, step)
        indices = harvest_indices(config, deep, 42, step)
        assert len(set(indices)) == 4
        assert indices == sorted(indices)
        assert max(indices) < deep


def test_points_below_are_distinct_and_less_noisy_than_the_deep_one_as_long_as_there_are_any():
    config = RolloutConfig(harvest_below=3, id_timestep_frac_high=0.95, id_sigma_low=None, id_sigma_high=None)
    met = set()
    for step in range(200):
        drawn = harvest(config, SIGMAS, 42, step)
        left = config.num_inference_steps - 1 - drawn.deep
        assert len(set(drawn.below)) == min(3, left)
        assert drawn.indices == sorted(drawn.indices)
        assert drawn.below == sorted(index for index in drawn.below if index > drawn.deep)
        assert points_for_block(config, SIGMAS, 42, step) == drawn.indices[-1] + 1
        met |= set(drawn.below)
    assert max(met) == config.num_inference_steps - 1
    assert harvest(RolloutConfig(harvest_below=0), SIGMAS, 42, 0).below == []


def test_bracketed_points_lie_near_a_half_and_a_quarter():
    config = RolloutConfig()
    for step in range(100):
        quarter, half = harvest_indices(config, 21, 42, step)
        assert abs(quarter - 6.25) <= 2
        assert abs(half - 12.5) <= 2


def test_harvests_differ_from_step_to_step():
    config = RolloutConfig()
    assert len({tuple(harvest_indices(config, 20, 42, step)) for step in range(50)}) > 3


def test_one_rollout_reaches_far_enough_for_every_step_it_serves():
    config = RolloutConfig(trajectory_reuse=4, harvest_below=0)
    for first in range(0, 40, 4):
        deepest = max(deep_index(config, SIGMAS, 1, step) for step in range(first, first + 4))
        assert {points_for_block(config, SIGMAS, 1, step) for step in range(first, first + 4)} == {deepest + 1}
