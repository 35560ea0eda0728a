import json
import shutil

import pytest

from vflora.cli import parse
from vflora.clips import as_sampled, noise_levels
from vflora.errors import UserError


def settled(flags, *extra):
    """Guidance and stride of rollouts, once they are settled."""
    settings = as_sampled(parse("train", [*flags, "--rollout_guidance_scale", "null", *extra]))
    scale = settings.rollout.guidance_scale
    return scale, settings.speed.stride(scale)


@pytest.fixture
def pipeline(small_models, tmp_path):
    return shutil.copytree(small_models / "pipeline", tmp_path / "pipeline")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (6.0, 2)),  # the pipeline's own, and every second point, since each is asked twice
        (["--rollout_stride", "1"], (6.0, 1)),
        (["--rollout_guidance_scale", "3"], (3.0, 2)),
        (["--rollout_guidance_scale", "1"], (1.0, 1)),
        (["--rollout_guidance_scale", "1", "--mode", "fast"], (1.0, 2)),
    ],
)
def test_rollouts_are_guided_as_the_pipeline_samples_unless_a_flag_says_otherwise(train_flags, flags, expected):
    assert settled(train_flags, *flags) == expected


@pytest.mark.parametrize("guider", [{"guidance_scale": 1.0}, {"guidance_scale": 6.0, "enabled": False}])
def test_a_pipeline_that_samples_without_guidance_rolls_out_without(train_flags, pipeline, guider):
    (pipeline / "guider" / "guider_config.json").write_text(json.dumps(guider))
    assert settled(train_flags, "--pipeline_dir", str(pipeline)) == (1.0, 1)


def test_a_guider_of_another_kind_is_told_with_the_flag_that_does_without_it(train_flags, pipeline):
    (pipeline / "guider" / "guider_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no guidance_scale: give --rollout_guidance_scale"):
        settled(train_flags, "--pipeline_dir", str(pipeline))
    assert settled(train_flags, "--pipeline_dir", str(pipeline), "--rollout_guidance_scale", "2") == (2.0, 2)


@pytest.mark.parametrize(("high", "warned"), [("0.5", False), ("0.45", True)])
def test_a_schedule_without_a_proper_deep_point_is_said_with_the_one_that_is_taken(train_flags, caplog, high, warned):
    noise_levels(parse("train", [*train_flags, "--id_sigma_low", "0.15", "--id_sigma_high", high]))
    assert ("identity is judged at the nearest, 0.50" in caplog.text) == warned


def test_what_nobody_has_settled_is_no_number(train_flags):
    with pytest.raises(ValueError, match="not settled"):
        print(parse("train", [*train_flags, "--rollout_guidance_scale", "null"]).rollout.guidance_scale)
