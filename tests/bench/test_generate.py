import json

import pytest

from vflora.bench.generate import BenchGenerateConfig, run
from vflora.cli import main
from vflora.errors import UserError


@pytest.mark.parametrize("mode", ["resident", "offload", "least_memory"])
def test_a_video_is_timed_step_by_step(mode, tmp_path):
    output = tmp_path / "new" / "generate.json"
    config = BenchGenerateConfig(mode, size="small", frames=5, steps=3, device="cpu", dtype="fp32", output=output)
    result = run(config)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert (result["frames"], result["height"] % 16, len(result["steps_s"])) == (5, 0, 2)
    assert result["video_of_50_steps_s"] == 50 * result["step_s"] + result["decode_s"] > 0


def test_without_guidance_every_pass_is_a_step_and_caches_go_with_it():
    result = run(
        BenchGenerateConfig(
            size="small", frames=5, steps=4, guidance_scale=1, enable_cache=True, device="cpu", dtype="fp32"
        )
    )
    assert len(result["steps_s"]) == 3
    # cheap steps and dear ones take turns
    assert result["step_s"] == pytest.approx(sum(result["steps_s"]) / 3)


def test_the_command_prints_one_line(capsys):
    flags = ["--size", "small", "--frames", "5", "--steps", "2", "--device", "cpu", "--dtype", "fp32"]
    assert main(["bench", "generate", *flags, "--mode", "least_memory"]) == 0
    assert "least_memory: 5 frames of" in capsys.readouterr().out


def test_one_step_alone_is_refused():
    with pytest.raises(UserError, match="--steps must be at least 2"):
        BenchGenerateConfig(steps=1)


def test_guidance_away_from_the_prompt_is_refused():
    with pytest.raises(UserError, match="--guidance_scale -1 must not be negative"):
        BenchGenerateConfig(guidance_scale=-1)


def test_a_smaller_card_that_is_none_is_refused_before_anything_is_built(caplog):
    caplog.set_level("INFO")
    with pytest.raises(UserError, match="--card_gib 16 limits a CUDA GPU's memory"):
        run(BenchGenerateConfig(size="small", frames=5, device="cpu", card_gib=16))
    assert caplog.messages == []
