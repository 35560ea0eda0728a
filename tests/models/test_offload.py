"""Weights that come and go give the same numbers as weights that stay."""

import pytest
import torch
from torch import nn

from vflora.models import offload
from vflora.models.denoiser import Denoiser
from vflora.models.lora import add_lora
from vflora.models.offload import BlockOffload
from vflora.models.precision import quantize_blocks
from vflora.models.random_weights import randomise_lora, small_transformer

CPU = torch.device("cpu")


def run(make_conditions, *, offloaded, storage="full", device=CPU, **sizes):
    transformer = small_transformer(layers=4, **sizes)
    add_lora(transformer, rank=4, alpha=4, dropout=0.0, targets=None, seed=0)
    generator = torch.Generator().manual_seed(1)
    randomise_lora(transformer.named_parameters(), std=0.02)
    quantize_blocks(transformer, storage=storage)
    transformer.enable_gradient_checkpointing()
    if offloaded:
        BlockOffload(transformer, transformer.transformer_blocks, device).begin()
    else:
        transformer.to(device)
    denoiser = Denoiser(transformer)
    latents = torch.randn(1, 4, 2, 4, 4, generator=generator).to(device)
    conditions = make_conditions().to(device)
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
    expected, _ = run(make_conditions, offloaded=False, storage=storage)
    got, _ = run(make_conditions, offloaded=True, storage=storage)
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["full", "int8"])
def test_blocks_whose_weights_take_longer_to_arrive_than_to_use_are_waited_for(make_conditions, storage):
    sizes = {"heads": 16, "head_dim": 128}  # a block of 470 MB in fp32, and next to no tokens
    expected, _ = run(make_conditions, offloaded=False, storage=storage, device=torch.device("cuda"), **sizes)
    got, _ = run(make_conditions, offloaded=True, storage=storage, device=torch.device("cuda"), **sizes)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_only_two_blocks_have_their_weights_in_place(make_conditions):
    _, transformer = run(make_conditions, offloaded=True)
    places = {block.ff.net[2].weight.untyped_storage().data_ptr() for block in transformer.transformer_blocks}
    assert len(places) == 2
    assert all(block.attn.to_q.lora_A["student"].weight.grad is not None for block in transformer.transformer_blocks)


def test_a_model_that_has_left_is_whole_in_main_memory_and_may_come_again(make_conditions):
    transformer = small_transformer(layers=4).requires_grad_(False)
    denoiser, latents, conditions = Denoiser(transformer), torch.randn(1, 4, 2, 4, 4), make_conditions()
    weights = {name: value.clone() for name, value in transformer.state_dict().items()}
    expected = denoiser.velocity(latents, 0.7, conditions)
    blocks = BlockOffload(transformer, transformer.transformer_blocks, CPU)
    for _ in range(2):
        blocks.begin()
        assert torch.equal(denoiser.velocity(latents, 0.7, conditions), expected)
        blocks.end()
        assert all(torch.equal(value, weights[name]) for name, value in transformer.state_dict().items())
        assert torch.equal(denoiser.velocity(latents, 0.7, conditions), expected)


def test_blocks_share_pieces_of_main_memory_and_a_large_one_has_its_own(monkeypatch):
    monkeypatch.setattr(offload, "_PIECE", 3 * 256)
    blocks = nn.ModuleList(nn.Linear(8, size, bias=False) for size in (8, 8, 8, 8, 40)).requires_grad_(False)
    expected = [block.weight.clone() for block in blocks]
    BlockOffload(blocks, blocks, CPU)
    pieces = [block.weight.untyped_storage().data_ptr() for block in blocks]
    assert pieces[0] == pieces[1] == pieces[2]
    assert len({*pieces}) == 3
    assert all(torch.equal(block.weight, weight) for block, weight in zip(blocks, expected, strict=True))
