"""One video by several processes, from a checkpoint: the same as by one, written once, and never a hang."""

import itertools
import json
import os
from functools import partial, wraps
from pathlib import Path

import pytest
import torch
from PIL import Image

import vflora.generate
from vflora.generate import run
from vflora.generate_config import GenerateConfig
from vflora.models.dense_attention import DenseAttention
from vflora.models.lora import ADAPTER, add_lora
from vflora.models.lora_formats import from_transformer, write_lora
from vflora.models.random_weights import randomise_lora, small_pipeline
from vflora.sampling import generate_video
from vflora.shared_sampling import video_tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small pipeline of four heads, a checkpoint for it, and a picture."""
    root = tmp_path_factory.mktemp("generate")
    pipeline = small_pipeline(heads=4)
    pipeline.save_pretrained(root / "model")
    add_lora(pipeline.transformer, rank=2, alpha=2, dropout=0.0, targets=None, seed=1)
    randomise_lora(pipeline.transformer.named_parameters(), std=0.3)
    write_lora(from_transformer(pipeline.transformer, ADAPTER), root / "checkpoint-7" / "lora", "diffusers")
    Image.linear_gradient("L").resize((80, 60)).convert("RGB").save(root / "picture.png")
    return root


@pytest.fixture
def config(models, tmp_path):
    def make(**options):
        defaults = {
            "prompt": 'a cat waves, its shirt says "hello"',
            "model_path": str(models / "model"),
            "checkpoint_path": models / "checkpoint-7",
            "image_path": models / "picture.png",
            "output_path": tmp_path / "video.mp4",
            "video_length": 5,
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "lora_scale": [1.0],
            "dtype": "fp32",
            "device": "cpu",
        }
        return GenerateConfig(**defaults | options)

    return make


def seen(config):
    """Generates, and returns the frames [3, F, H, W] as they were before the mp4 and what was returned."""

    def work():
        frames = []
        inner = vflora.generate.write_mp4

        def write(path, video, fps):
            frames.append(video)
            return inner(path, video, fps)

        vflora.generate.write_mp4 = write
        return frames, run(config)

    return work


@pytest.mark.parametrize(
    ("processes", "picture", "options"),
    [
        (2, (80, 60), {}),
        (4, (80, 60), {}),
        (4, (60, 60), {"video_length": 9, "guidance_scale": 1.0}),
        (2, (80, 60), {"group_offloading": True}),
    ],
)
def test_the_video_is_that_of_one_process_and_written_once(
    launch, models, config, tmp_path, processes, picture, options
):
    Image.linear_gradient("L").resize(picture).convert("RGB").save(tmp_path / "picture.png")
    options |= {"image_path": tmp_path / "picture.png"}
    (((wanted,), _),) = launch(1, seen(config(**options)))
    (tmp_path / "video.mp4").unlink()
    answers = launch(processes, seen(config(**options)))
    ((video,), path), others = answers[0], answers[1:]
    torch.testing.assert_close(video, wanted, rtol=0, atol=1e-4)
    assert others == [([], None)] * (processes - 1)
    assert path == tmp_path / "video.mp4"
    assert path.is_file()
    assert json.loads(path.with_suffix(".json").read_text())["adapters"][0]["rank"] == 2


def test_without_a_name_the_first_process_names_the_video(launch, config, tmp_path):
    def work():
        os.chdir(tmp_path)
        return run(config(output_path=None, prompt="кошка", num_inference_steps=1))

    names = [launch(2, work) for _ in range(2)]
    assert names == [[Path("outputs/video-seed123.mp4"), None], [Path("outputs/video-seed123-2.mp4"), None]]


def test_the_adapter_matters_and_so_does_every_process(launch, config, tmp_path):
    """The comparisons above would hold for a video that nobody changed, so here is one without the adapter."""
    (((with_it,), _), _), (((without,), _), _) = (
        launch(2, seen(config(**options))) for options in ({}, {"lora_scale": [0.0]})
    )
    assert (with_it - without).abs().mean() > 1e-3


def test_heads_that_do_not_divide_are_refused_by_all_with_the_numbers_that_work(launch_to_fail, config):
    errors = launch_to_fail(3, partial(run, config()))
    assert len(errors) == 3
    assert all("4 attention heads do not divide by --nproc_per_node 3: use 1 or 2 or 4." in e for e in errors.values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_path": Path("nowhere.png")}, "There is no picture at nowhere.png"),
        ({"checkpoint_path": Path("nowhere")}, "There is no adapter at nowhere"),
        ({"lora_r": 8}, "has rank 2, not --lora_r 8"),
        ({"image_path": None, "transformer_version": "480p_i2v"}, "give the first frame with --image_path"),
        ({"enable_cache": True, "cache_type": "taylorcache"}, "--enable_cache does not go with 2 processes"),
    ],
)
def test_what_one_process_refuses_all_refuse(launch_to_fail, config, tmp_path, options, sentence):
    errors = launch_to_fail(2, partial(run, config(**options)))
    assert len(errors) == 2
    assert all(sentence in error for error in errors.values())
    assert not (tmp_path / "video.mp4").exists()


@pytest.mark.parametrize("unlucky", [0, 1])
def test_nobody_waits_for_a_process_that_breaks_in_the_middle(launch_to_fail, config, tmp_path, unlucky):
    settings = config()

    def work():
        inner, calls = DenseAttention.__call__, itertools.count()

        @wraps(inner)  # diffusers reads the signature
        def breaks(self, *args, **options):
            if next(calls) == 5 and os.environ["RANK"] == str(unlucky):
                raise MemoryError("no room for the attention")
            return inner(self, *args, **options)

        DenseAttention.__call__ = breaks
        return run(settings)

    # Rank 0 of these processes holds the store; without it the other one ends itself and can tell nobody.
    errors = launch_to_fail(2, work, killed=1 - unlucky, timeout=60)
    assert "no room for the attention" in errors[unlucky]
    if unlucky == 1:
        assert "process 1 (pid" in errors[0]
    assert not (tmp_path / "video.mp4").exists()


def test_tokens_are_counted_as_the_transformer_sees_them(models):
    pipeline = small_pipeline(heads=4)
    picture = Image.new("RGB", (80, 60))
    seen = []
    pipeline.transformer.transformer_blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
    generate_video(pipeline, picture, "a cat", seed=0, frames=9, steps=1, guidance_scale=1.0)
    assert seen == [video_tokens(pipeline, picture, 1.0, 9)]
