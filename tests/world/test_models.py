import pytest
import torch

from vflora.world.models import (
    WorldSizes,
    build_dino,
    build_pipeline,
    build_transformer,
    build_vae,
)
from vflora.world.scenes import VOCABULARY, motion_prompt
from vflora.world.vae_training import make_fast


@pytest.fixture(scope="module")
def pipeline():
    sizes = WorldSizes()
    return build_pipeline(sizes, build_vae(sizes, 0), build_transformer(sizes, 0), seed=0)


def test_the_whole_world_fits_38_megabytes_in_bf16(pipeline):
    parts = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    parts.append(build_dino(WorldSizes(), 0))
    assert 2 * sum(parameter.numel() for part in parts for parameter in part.parameters()) <= 38e6


def test_every_word_is_one_token(pipeline):
    for word in VOCABULARY:
        prompt = f"a {word} up."
        tokens = pipeline.tokenizer.convert_ids_to_tokens(pipeline.tokenizer(prompt).input_ids)
        assert any(token.strip() == word for token in tokens), word


def test_prompts_that_differ_in_one_word_have_different_embeddings(pipeline):
    pipeline.tokenizer_max_length = 64
    left, right = (motion_prompt("red striped star", "hops", d, "slowly") for d in ("left", "right"))
    with torch.no_grad():
        embeds, mask, _, mask_2 = pipeline.encode_prompt([left, right, left], batch_size=3)
    assert mask[0].sum() == mask[1].sum()
    torch.testing.assert_close(embeds[0], embeds[2])
    assert (embeds[0] - embeds[1]).abs().max() > 0.5
    assert mask_2.sum() == 0


def test_the_fast_vae_computes_the_same_with_the_same_gradients():
    sizes = WorldSizes(vae_channels=(8, 16, 16), latent_channels=4)
    vae = build_vae(sizes, 0)
    torch.manual_seed(0)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    video = torch.randn(1, 3, 5, 16, 16, requires_grad=True)

    def outcome():
        decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample
        return decoded, *torch.autograd.grad(decoded.square().mean(), [video, *vae.parameters()])

    before = outcome()
    make_fast(vae)
    for old, new in zip(before, outcome(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-5)
