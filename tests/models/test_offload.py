"""Weights that come and go give the same numbers as weights that stay."""

import pytest
import torch

from vflora.models.denoiser import Denoiser
from vflora.models.lora import add_lora
from vflora.models.offload import BlockOffload
from vflora.models.precision import quantize_blocks
from vflora.models.random_weights import randomise_lora, small_transformer

CPU = torch.device("cpu")


def run(make_conditions, *, offload, storage="full"):
    transformer = small_transformer(layers=4)
    add_lora(transformer, rank=4, alpha=4, dropout=0.0, targets=None, seed=0)
    generator = torch.Generator().manual_seed(1)
    randomise_lora(transformer.named_parameters(), std=0.02)
    quantize_blocks(transformer, storage=storage)
    transformer.enable_gradient_checkpointing()
    if offload:
        BlockOffload(transformer, CPU)
    denoiser = Denoiser(transformer)
    latents, conditions = torch.randn(1, 4, 2, 4, 4, generator=generator), make_conditions()
    out = []
    for sigma in (0.9, 0.6):
        with denoiser.teacher():
            out.append(denoiser.velocity(latents, sigma, conditions))
        velocity = denoiser.velocity(latents, sigma, conditions)
        velocity.square().sum().backward()
        out.append(velocity.detach())
    return out + [p.grad for p in denoiser.lora_parameters().values() if p.grad is not None], transformer


@pytest.mark.parametrize("storage", ["full", "int8"])
def test_offloaded_blocks_give_the_same_velocities_and_gradients(make_conditions, storage):
    expected, _ = run(make_conditions, offload=False, storage=storage)
    got, _ = run(make_conditions, offload=True, storage=storage)
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_only_two_blocks_have_their_weights_in_place(make_conditions):
    _, transformer = run(make_conditions, offload=True)
    places = {block.ff.net[2].weight.untyped_storage().data_ptr() for block in transformer.transformer_blocks}
    assert len(places) == 2
    assert all(block.attn.to_q.lora_A["student"].weight.grad is not None for block in transformer.transformer_blocks)
