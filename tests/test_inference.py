import gc

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLTextModel, T5EncoderModel

from vflora.errors import UserError
from vflora.inference import load_for_sampling, load_with_adapters
from vflora.models.random_weights import small_pipeline, small_text_to_video
from vflora.models.streamed_weights import fill
from vflora.sampling import generate_video, is_text_to_video


@pytest.fixture(scope="module", params=[small_pipeline, small_text_to_video])
def folder(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    request.param().save_pretrained(root)
    return root


def text_encoders_alive():
    gc.collect()
    return [id(thing) for thing in gc.get_objects() if type(thing) in (Qwen2_5_VLTextModel, T5EncoderModel)]


def test_the_text_encoders_are_gone_when_the_transformer_comes(folder, monkeypatch):
    there, seen = set(text_encoders_alive()), []

    def look_and_fill(*arguments):
        seen.append(set(text_encoders_alive()) - there)
        fill(*arguments)

    monkeypatch.setattr("vflora.inference.fill", look_and_fill)
    for prompts, alive in ((["it runs"], 0), (None, 2)):
        load_for_sampling(str(folder), "480p_i2v", "fp32", "cpu", prompts=prompts)
        assert len(seen.pop()) == alive


def test_prompts_encoded_ahead_make_the_same_video_without_text_encoders(folder):
    whole = load_for_sampling(str(folder), "480p_i2v", "fp32", "cpu")
    light = load_for_sampling(str(folder), "480p_i2v", "fp32", "cpu", prompts=["it runs", "blurred"])
    gone = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    assert all(getattr(light, part) is None for part in gone)
    assert all(getattr(whole, part) is not None for part in gone)
    picture = None if is_text_to_video(whole) else Image.linear_gradient("L").resize((64, 48))
    for negative in ("", "blurred"):
        videos = [
            generate_video(
                pipe, picture, "it runs", seed=1, frames=5, steps=2, guidance_scale=3.0, negative_prompt=negative
            )
            for pipe in (whole, light)
        ]
        assert torch.equal(*videos)
    with pytest.raises(UserError, match="'it flies' was not encoded"):
        generate_video(light, picture, "it flies", seed=1, frames=5, steps=1)


@pytest.mark.parametrize("group_offloading", [False, True])
def test_offloading_changes_no_video(folder, device, group_offloading):
    videos = []
    for offloading in (False, True):
        pipeline, _ = load_with_adapters(
            str(folder),
            [],
            [1.0],
            transformer_version="480p_i2v",
            dtype="fp32",
            device=torch.device(device),
            offloading=offloading,
            group_offloading=offloading and group_offloading,
            vae_tiling=False,
        )
        picture = None if is_text_to_video(pipeline) else Image.linear_gradient("L").resize((64, 48))
        videos.append(generate_video(pipeline, picture, "it runs", seed=1, frames=5, steps=2))
    assert torch.equal(*videos)
