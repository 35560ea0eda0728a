import json
import math

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15ImageToVideoPipeline
from PIL import Image

from vflora.cli import main
from vflora.errors import UserError
from vflora.models.identity import FrozenBackbone, IdentityEmbedder
from vflora.sampling import generate_video
from vflora.world.base_training import draw_sigmas
from vflora.world.clip_pool import ClipPool
from vflora.world.dino_training import augment, info_nce, repaint
from vflora.world.grader import Grader, load_grader, train_grader
from vflora.world.latent_pool import encode_clips
from vflora.world.models import WorldSizes
from vflora.world.pretrain import PretrainConfig, run
from vflora.world.training_loop import Clock, LoopSettings, StageRun, rate_factor
from vflora.world.vae_training import VaeTraining, make_fast, train_vae

SIZES = WorldSizes(
    frame_size=32,
    frames=5,
    latent_channels=4,
    vae_channels=(8, 16, 16),
    heads=1,
    layers=2,
    dino_width=32,
    dino_layers=2,
)
CPU = torch.device("cpu")


def config(output, **changes):
    usual = {
        "output": output,
        "minutes": 5.0,
        "compile": False,
        "device": "cpu",
        "batch_size": 4,
        "pool": 8,
        "max_steps": 3,
        "gate_clips": 2,
        "sampling_steps": 2,
    }
    return PretrainConfig(**{**usual, **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    run(config(folder, stage="all"), SIZES)
    return folder


def metrics(folder, stage):
    return [json.loads(line) for line in (folder / "training" / f"{stage}-metrics.jsonl").read_text().splitlines()]


def test_the_world_is_an_ordinary_pipeline_that_samples(world):
    pipeline = HunyuanVideo15ImageToVideoPipeline.from_pretrained(world, dtype=torch.float32)
    video = generate_video(
        pipeline, Image.new("RGB", (32, 32), "teal"), "a red plain star hops up slowly.", seed=0, frames=5, steps=2
    )
    assert video.shape == (3, 5, 32, 32)
    assert video.isfinite().all()


def test_the_weights_are_stored_in_bf16(world):
    for part, kind in (("vae", "diffusion_pytorch_model"), ("dino", "model"), ("text_encoder", "model")):
        from safetensors.torch import load_file

        tensors = load_file(world / part / f"{kind}.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_the_dino_loads_as_any_other(world):
    backbone = FrozenBackbone.load(world / "dino")
    assert backbone.preprocessing.size == (32, 32)
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 32)


def test_the_head_is_one_that_training_takes(world):
    embedder = IdentityEmbedder.load(world / "dino", world / "head", device=CPU, dtype=torch.float32)
    vectors = embedder.embed(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32))
    assert vectors.norm(dim=-1).tolist() == pytest.approx([1, 1])
    assert (world / "head" / "identity_head.safetensors").is_file()


def test_a_head_without_the_features_below_it_is_refused(tmp_path):
    with pytest.raises(UserError, match="no DINOv3 in .*train it first with --stage dino"):
        run(config(tmp_path, stage="head"), SIZES)


def test_gates_and_grids_are_written(world):
    records = world / "training"
    assert {gate["domain"] for gate in json.loads((records / "vae-gate.json").read_text())} == {
        "geometric",
        "creatures",
    }
    assert len(json.loads((records / "base-gate.json").read_text())) == 4
    for name in ("vae-geometric", "vae-creatures", "base-geometric", "base-creatures"):
        with Image.open(records / f"{name}.png") as picture:
            assert picture.size == (3 * 32, 2 * 2 * 32)


def test_latents_have_unit_scale_and_the_first_stands_for_the_first_frame_alone(world):
    vae = AutoencoderKLHunyuanVideo15.from_pretrained(world / "vae", dtype=torch.float32)
    make_fast(vae)
    video, _ = ClipPool(8, domains=("geometric",), frames=5, size=32, device=CPU, seed=1).draw(8)
    latents = encode_clips(vae, video)
    assert 0.7 < latents.square().mean().sqrt() < 1.4
    torch.testing.assert_close(encode_clips(vae, video[:, :, :1]), latents[:, :, :1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", ["vae", "dino", "base"])
def test_a_resumed_stage_goes_on_where_it_stopped(world, stage, tmp_path):
    state = torch.load(world / "training" / f"{stage}-state.pt", weights_only=True)
    assert state["step"] == 3
    run(config(world, stage=stage, resume=True, max_steps=5), SIZES)
    later = torch.load(world / "training" / f"{stage}-state.pt", weights_only=True)
    assert later["step"] == 5
    assert later["fraction"] > state["fraction"]


def test_a_base_without_a_vae_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="--stage vae"):
        run(config(tmp_path, stage="base"), SIZES)


def test_the_grader_is_a_stage_of_its_own(tmp_path):
    run(config(tmp_path / "world", stage="grader", batch_size=5, max_steps=1))
    found, wanted = load_grader(tmp_path / "world" / "grader.safetensors"), train_grader(1, characters=5)
    assert found.widths == Grader().widths
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(
            found.state_dict()[name], value.half().to(value.dtype) if value.is_floating_point() else value
        )


def test_a_grader_of_too_few_characters_is_refused(tmp_path):
    with pytest.raises(UserError, match="3 characters a step: --batch_size 4 or more"):
        run(config(tmp_path, stage="grader", batch_size=3))


def test_the_command_line_ends_with_one_sentence(tmp_path, capsys):
    assert main(["world", "pretrain", "--output", str(tmp_path), "--minutes", "0"]) == 2
    assert "--minutes" in capsys.readouterr().err


def test_the_vae_learns(tmp_path):
    settings = VaeTraining(
        batch_size=8,
        crop=16,
        pool=32,
        loop=LoopSettings(peak_lr=1e-3, muon_lr=3e-3, warmup_steps=5, log_every=5),
    )
    # A day, so that the rate, which follows the clock, is the same on every machine.
    clock = Clock(24 * 60)
    train_vae(
        SIZES, settings, folder=tmp_path, clock=clock, device=CPU, seed=0, compiled=False, resume=False, max_steps=45
    )
    psnr = [line["psnr"] for line in metrics(tmp_path, "vae")]
    assert sum(psnr[-4:]) / 4 > sum(psnr[:2]) / 2 + 1.5


def test_the_time_is_kept_and_the_rate_factor_ends_at_zero(tmp_path):
    module = torch.nn.Linear(4, 1)
    kept, seen = [], []

    def loss(step, fraction):
        seen.append(fraction)
        return module(torch.ones(2, 4)).square().mean(), {}

    stage = StageRun("toy", module, loss, LoopSettings(0.1), Clock(1 / 60), tmp_path, kept.append)
    stage.run()
    assert 0.9 < stage.clock.elapsed_s < 2.0
    assert seen[0] == 0
    assert seen[-1] > 0.9
    assert kept[-1].keys() == module.state_dict().keys()
    assert rate_factor(LoopSettings(0.1, warmup_steps=1), 10, 1.0) == pytest.approx(0)
    assert rate_factor(LoopSettings(0.1, warmup_steps=10), 4, 0.0) == pytest.approx(0.5)


def test_a_loss_that_is_not_a_number_stops_the_stage(tmp_path):
    module = torch.nn.Linear(1, 1)
    settings = LoopSettings(0.1, log_every=1)
    stage = StageRun(
        "toy", module, lambda *_: (module.weight.sum() * math.nan, {}), settings, Clock(1), tmp_path, lambda _: None
    )
    with pytest.raises(RuntimeError, match="loss of stage toy"):
        stage.run()


def test_matrices_that_go_to_muon_learn_and_its_state_is_not_taken_for_adamws(tmp_path):
    module = torch.nn.Linear(4, 4)
    before = module.weight.detach().clone()

    def stage(**changes):
        return StageRun(
            "toy",
            module,
            lambda *_: (module(torch.eye(4)).square().mean(), {}),
            LoopSettings(0.1, muon_lr=0.1, warmup_steps=1),
            Clock(1),
            tmp_path,
            lambda _: None,
            max_steps=2,
            **changes,
        )

    stage(hidden=[module.weight]).run()
    assert module.weight.norm() < before.norm()
    with pytest.raises(UserError, match="toy-state.pt is of other optimizers: delete it"):
        stage(resume=True).run()


def test_noise_levels_are_spread_evenly_before_the_shift():
    sigmas = draw_sigmas(64, 3.0, torch.Generator().manual_seed(0))
    uniform = (sigmas / (3 - 2 * sigmas)).sort().values
    torch.testing.assert_close((uniform * 64).floor(), torch.arange(64.0))


def test_windows_show_the_character_in_some_frame():
    pool = ClipPool(16, domains=("geometric", "creatures"), frames=5, size=64, device=CPU, seed=0)
    video, mask = pool.draw(32, crop=32)
    assert video.shape == (32, 3, 5, 32, 32)
    assert (mask.amax((1, 2, 3, 4)) > 0.5).all()


def test_an_instance_is_repainted_alike_in_both_views():
    generator = torch.Generator().manual_seed(0)
    view = torch.rand(8, 3, 16, 16)
    first, second = repaint(torch.stack([view, view]), 4, generator)
    torch.testing.assert_close(first, second)
    assert (first - view).abs().mean() > 0.05
    augmented = augment(torch.stack([view, view]), generator)
    assert (augmented[0] - augmented[1]).abs().mean() > 0.01


def test_info_nce_is_low_only_for_the_right_pairs():
    codes = torch.eye(8)
    assert info_nce(codes, codes, 0.1) < 0.01
    assert info_nce(codes, codes.roll(1, 0), 0.1) > 5
