"""8-bit storage and 8-bit products of the frozen weights."""

import pytest
import torch
from torch import nn

from vflora.errors import UserError
from vflora.models.denoiser import Denoiser
from vflora.models.lora import add_lora
from vflora.models.precision import Fp8Switch, FrozenLinear, quantize_blocks, quantize_rows, restored
from vflora.models.random_weights import randomise_lora, small_transformer


def relative(value, expected):
    return float(torch.linalg.norm(value - expected) / torch.linalg.norm(expected))


def make_student(b_scale=0.02):
    transformer = small_transformer()
    add_lora(transformer, rank=4, alpha=4, dropout=0.0, targets=None, seed=0)
    randomise_lora(transformer.named_parameters(), std=b_scale)
    return transformer


@pytest.mark.parametrize(("dtype", "error"), [(torch.int8, 0.01), (torch.float8_e4m3fn, 0.04)])
def test_rows_come_back_within_the_rounding_of_their_type(dtype, error):
    values = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 8)[:, None]
    codes, scale = quantize_rows(values, dtype)
    assert codes.dtype == dtype
    for row, expected in zip(codes.float() * scale, values, strict=True):
        assert relative(row, expected) < error


def test_a_row_of_zeros_stays_zero():
    codes, scale = quantize_rows(torch.zeros(2, 16), torch.int8)
    assert torch.equal(codes.float() * scale, torch.zeros(2, 16))


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_a_stored_layer_equals_the_layer_of_its_rounded_weight_with_gradient(codes):
    linear = nn.Linear(32, 48)
    stored = FrozenLinear(linear, codes, keep_weight=False, switch=None)
    rounded = stored.codes.float() * stored.scale
    x = torch.randn(2, 5, 32)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = stored(a), nn.functional.linear(b, rounded, linear.bias)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_a_stored_layer_keeps_one_byte_a_weight():
    stored = FrozenLinear(nn.Linear(512, 512, bias=False), torch.int8, keep_weight=False, switch=None)
    assert sum(b.nbytes for b in stored.buffers()) == 512 * 512 + 512 * 4
    assert not list(stored.parameters())


def test_float8_products_happen_only_while_switched_on():
    switch = Fp8Switch()
    linear = nn.Linear(64, 64)
    layer = FrozenLinear(linear, torch.float8_e4m3fn, keep_weight=True, switch=switch)
    x = torch.randn(3, 7, 64)
    linear.requires_grad_(False)
    assert torch.equal(layer(x), linear(x))
    with switch.turned_on():
        error = relative(layer(x), linear(x))
    assert 0.005 < error < 0.06
    assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize(("storage", "error"), [("int8", 0.02), ("fp8", 0.06)])
def test_a_model_stored_in_8_bits_stays_close_and_its_lora_trains(make_conditions, storage, error):
    exact, stored = make_student(), make_student()
    quantize_blocks(stored, storage=storage)
    latents, conditions = torch.randn(1, 4, 2, 4, 4), make_conditions()
    directions = []
    for transformer in (exact, stored):
        denoiser = Denoiser(transformer)
        velocity = denoiser.velocity(latents, 0.7, conditions)
        velocity.square().sum().backward()
        directions.append((velocity.detach(), [p.grad for p in denoiser.lora_parameters().values()]))
    (expected, expected_grads), (velocity, grads) = directions
    assert 0 < relative(velocity, expected) < error
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(grads, expected_grads, strict=True) if b is not None]
    got, wanted = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert torch.cosine_similarity(got, wanted, dim=0) > 0.99


def test_a_lora_at_zero_still_equals_its_teacher_exactly(make_conditions):
    transformer = make_student(b_scale=0.0)
    quantize_blocks(transformer, storage="int8")
    denoiser = Denoiser(transformer)
    latents, conditions = torch.randn(1, 4, 2, 4, 4), make_conditions()
    with denoiser.teacher():
        teacher = denoiser.velocity(latents, 0.5, conditions)
    assert torch.equal(denoiser.velocity(latents, 0.5, conditions), teacher)


def test_gradient_checkpointing_changes_nothing_with_stored_weights(make_conditions):
    grads = []
    for recompute in (False, True):
        transformer = make_student()
        quantize_blocks(transformer, storage="int8")
        denoiser = Denoiser(transformer)
        if recompute:
            transformer.enable_gradient_checkpointing()
        generator = torch.Generator().manual_seed(3)
        velocity = denoiser.velocity(torch.randn(1, 4, 2, 4, 4, generator=generator), 0.7, make_conditions())
        velocity.square().sum().backward()
        grads.append([p.grad for p in denoiser.lora_parameters().values() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_only_the_widest_layers_of_the_video_tokens_multiply_in_float8():
    transformer = make_student()
    quantize_blocks(transformer, fp8_rollouts=True)
    block = transformer.transformer_blocks[0]
    replaced = {name for name, layer in block.named_modules() if isinstance(layer, FrozenLinear)}
    assert replaced == {"ff.net.0.proj", "ff.net.2"}


def test_float8_products_of_int8_weights_are_refused():
    with pytest.raises(UserError, match="--weight_storage fp8 or full"):
        quantize_blocks(make_student(), storage="int8", fp8_rollouts=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_restored_in_one_pass_to_the_same_bits(dtype):
    codes, scale = quantize_rows(torch.randn(33, 47, generator=torch.Generator().manual_seed(3)), torch.int8)
    weight = restored(codes, scale, dtype)
    assert weight.dtype == dtype
    assert torch.equal(weight, (codes.float() * scale).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_weights_rounded_on_a_gpu_are_those_rounded_at_home(storage):
    there, here = make_student(), make_student()
    quantize_blocks(there, storage=storage, device=torch.device("cuda"), home=torch.device("cpu"))
    quantize_blocks(here, storage=storage)
    found, expected = there.state_dict(), here.state_dict()
    assert found.keys() == expected.keys()
    assert any(name.endswith(".codes") for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in found)
