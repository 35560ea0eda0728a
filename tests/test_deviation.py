import pytest
import torch
from PIL import Image

from vflora.deviation import deviations_on, record_path
from vflora.flow import sampling_sigmas
from vflora.models.lora import add_lora
from vflora.models.random_weights import randomise_lora, small_pipeline
from vflora.sampling import generate_video


@pytest.fixture
def pipeline():
    pipe = small_pipeline()
    pipe.prompt_template_encode_start_idx, pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 4, 32, 16
    pipe.set_progress_bar_config(disable=True)
    add_lora(pipe.transformer, rank=2, alpha=2, dropout=0.0, targets=None, seed=0)
    randomise_lora(pipe.transformer.named_parameters(), std=0.3)
    return pipe


def record(pipe, points, *, steps=6, guidance=1.0):
    picture = Image.new("RGB", (64, 64), "teal")
    with record_path(pipe, points, steps) as path:
        generate_video(
            pipe, picture, 'a cat says "hi"', seed=1, frames=5, steps=steps, guidance_scale=guidance, lora_scale=0.0
        )
    return path


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_points_are_spread_evenly_over_the_schedule_with_and_without_guidance(pipeline, guidance):
    path = record(pipeline, 3, guidance=guidance)
    assert [point.sigma for point in path] == pytest.approx(sampling_sigmas(6, 5.0)[[0, 2, 5]].tolist(), abs=1e-4)


def test_a_short_schedule_gives_all_its_points_and_nothing_is_kept_afterwards(pipeline):
    assert len(record(pipeline, 9, steps=2)) == 2
    path = record(pipeline, 2)
    generate_video(pipeline, Image.new("RGB", (64, 64)), "a cat", seed=1, frames=5, steps=2, guidance_scale=1.0)
    assert len(path) == 2


def test_the_base_deviates_by_exactly_nothing_and_the_lora_more_the_stronger_it_is(pipeline):
    path = record(pipeline, 3, guidance=4.0)
    assert deviations_on(pipeline, path, 0.0) == [0.0, 0.0, 0.0]
    half, full = deviations_on(pipeline, path, 0.5), deviations_on(pipeline, path, 1.0)
    assert all(0 < h < f for h, f in zip(half, full, strict=True))


def test_guidance_changes_the_path_but_only_the_prompted_prediction_is_compared(pipeline):
    plain, guided = record(pipeline, 3, guidance=1.0), record(pipeline, 3, guidance=4.0)
    assert torch.equal(plain[0].velocity, guided[0].velocity)
    assert not torch.equal(plain[1].velocity, guided[1].velocity)
