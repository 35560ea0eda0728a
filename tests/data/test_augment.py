from dataclasses import replace

import pytest
import torch

from vflora.data.augment import VaeRoundTrip, augment, for_validation, gaussian_blur, to_input
from vflora.data.config import AugmentConfig
from vflora.errors import UserError
from vflora.models.random_original import write_small_original
from vflora.models.random_weights import small_vae
from vflora.random_streams import keyed_generator, keyed_noise

NOTHING = AugmentConfig(
    crop_ratio=1.0, crop_jitter=0.0, augment_vae=0, augment_downscale=0, augment_blur=0, augment_noise=0
)
SIZE = (32, 32)


def _images(count=4, height=48, width=80):
    return torch.randint(0, 256, (count, 3, height, width), generator=keyed_generator("images"), dtype=torch.uint8)


def _generators(step, count=4):
    return [keyed_generator(7, "augment", step, slot) for slot in range(count)]


def test_nothing_switched_on_changes_nothing():
    assert torch.equal(augment(_images(), _generators(0), NOTHING, SIZE), to_input(_images(), SIZE))


@pytest.mark.parametrize("name", ["flip", "downscale", "blur", "noise"])
def test_each_change_happens_as_often_as_its_probability_says(name):
    images = _images(1).expand(200, -1, -1, -1)
    for chance in (0.0, 0.3, 1.0):
        config = replace(NOTHING, **{f"augment_{name}": chance})
        out = augment(images, _generators(0, 200), config, (160, 160))
        changed = (out - to_input(images, (160, 160))).flatten(1).abs().amax(1) > 1e-4
        assert changed.float().mean().item() == pytest.approx(chance, abs=0.08 if 0 < chance < 1 else 0)


def test_what_happens_to_an_image_depends_on_its_generator_not_on_its_neighbours():
    config = AugmentConfig(augment_flip=0.5)
    trip = VaeRoundTrip(small_vae(), 32)
    together = augment(_images(), _generators(3), config, SIZE, trip)
    alone = torch.cat([augment(_images()[i : i + 1], _generators(3)[i : i + 1], config, SIZE, trip) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_defect_14_crops_differ_between_samples_and_between_steps():
    config = replace(NOTHING, crop_ratio=0.8, crop_jitter=0.1)
    images = _images(1).expand(4, -1, -1, -1)
    first, second = (augment(images, _generators(step), config, SIZE) for step in (0, 1))
    for a, b in [(first[0], first[1]), (first[0], second[0])]:
        assert not torch.allclose(a, b, atol=1e-2)


@pytest.mark.parametrize(("height", "width"), [(48, 80), (80, 48)])
def test_crop_cuts_the_long_side_only_and_evenly_without_jitter(height, width):
    along = torch.arange(80, dtype=torch.uint8)
    across = torch.arange(48, dtype=torch.uint8)
    image = (along.expand(48, 80) if width == 80 else along.unsqueeze(1).expand(80, 48)).expand(1, 3, height, width)
    other = (across.unsqueeze(1).expand(48, 80) if width == 80 else across.expand(80, 48)).expand(1, 3, height, width)
    config = replace(NOTHING, crop_ratio=0.5)
    size = (48, 40) if width == 80 else (40, 48)
    values = ((augment(image, _generators(0, 1), config, size) + 1) * 127.5).round()
    assert sorted(values.unique().tolist()) == list(range(20, 60))
    values = ((augment(other, _generators(0, 1), config, size) + 1) * 127.5).round()
    assert sorted(values.unique().tolist()) == list(range(48))


def test_blur_keeps_the_mean_and_lowers_contrast():
    image = keyed_noise((1, 3, 32, 32), "blur")
    blurred = gaussian_blur(image, 2.0)
    assert blurred.std() < 0.3 * image.std()
    flat = gaussian_blur(torch.full((1, 3, 32, 32), 0.25), 2.0)
    assert torch.allclose(flat, torch.full_like(flat, 0.25), atol=1e-6)


def test_vae_trip_disturbs_the_latents_of_the_real_class_and_keeps_the_shape():
    trip = VaeRoundTrip(small_vae(), 32)
    images = to_input(_images(3), (48, 80))
    calm, stirred = (trip(images, torch.full((3, 2), level), _generators(0, 3)) for level in (0.0, 1.0))
    assert calm.shape == (3, 3, 32, 48)
    assert calm.abs().max() <= 1
    assert not torch.allclose(calm, stirred, atol=1e-3)


def test_vae_is_used_only_where_there_is_one():
    config = replace(NOTHING, augment_vae=1.0)
    assert torch.equal(augment(_images(), _generators(0), config, SIZE), to_input(_images(), SIZE))
    changed = augment(_images(), _generators(0), config, SIZE, VaeRoundTrip(small_vae(), 32))
    assert not torch.allclose(changed, to_input(_images(), SIZE), atol=1e-2)


def test_vae_is_found_in_a_pipeline_folder_and_missed_with_the_line_to_run(tmp_path):
    small_vae().save_pretrained(tmp_path / "pipeline" / "vae")
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        trip = VaeRoundTrip.load(folder, 32, torch.device("cpu"), torch.float32)
        assert trip(torch.zeros(1, 3, 32, 32), torch.zeros(1, 2), _generators(0, 1)).shape == (1, 3, 32, 32)
    with pytest.raises(UserError, match="hf download"):
        VaeRoundTrip.load(tmp_path, 32, torch.device("cpu"), torch.float32)
    next((tmp_path / "pipeline" / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"no \.safetensors files in .*vae: go on with `hf download"):
        VaeRoundTrip.load(tmp_path / "pipeline", 32, torch.device("cpu"), torch.float32)


def test_vae_of_the_layout_first_published_is_read_too(tmp_path):
    write_small_original(tmp_path)
    trip = VaeRoundTrip.load(tmp_path, 32, torch.device("cpu"), torch.float32)
    assert trip(torch.zeros(1, 3, 32, 32), torch.zeros(1, 2), _generators(0, 1)).shape == (1, 3, 32, 32)


def test_validation_degrades_every_image_or_none_and_never_crops_at_random():
    plain = to_input(_images(8), SIZE)
    config = for_validation(AugmentConfig(), crop=False, degrade=True)
    assert ((augment(_images(8), _generators(0, 8), config, SIZE) - plain).flatten(1).abs().mean(1) > 0.005).all()
    config = for_validation(AugmentConfig(), crop=False, degrade=False)
    assert torch.equal(augment(_images(8), _generators(0, 8), config, SIZE), plain)
    config = for_validation(AugmentConfig(), crop=True, degrade=False)
    assert (config.crop_ratio, config.crop_jitter) == (0.9, 0.0)


@pytest.mark.parametrize(
    "bad",
    [{"crop_ratio": 0}, {"crop_ratio": 1.1}, {"crop_jitter": 0.95}, {"augment_blur": 1.5}, {"augment_vae_side": 8}],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        AugmentConfig(**bad)
