"""The short way through the LoRA layers computes what peft's long one does."""

import pytest
import torch
from peft.tuners.lora.layer import Linear

from vflora.models.denoiser import Denoiser
from vflora.models.lean_lora import LeanLora, lean_lora
from vflora.models.lora import add_lora
from vflora.models.precision import quantize_blocks
from vflora.models.random_weights import randomise_lora, small_transformer


def make(*, dtype=torch.float32, dropout=0.0, storage="full"):
    transformer = small_transformer().to(dtype)
    add_lora(transformer, rank=4, alpha=8, dropout=dropout, targets=None, seed=0)
    randomise_lora(transformer.named_parameters(), std=0.05)
    if storage != "full":
        quantize_blocks(transformer, storage=storage)
    return Denoiser(transformer)


def velocity_and_gradient(denoiser, conditions):
    for parameter in denoiser.lora_parameters().values():
        parameter.grad = None
    latents = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(5)  # of dropout
    velocity = denoiser.velocity(latents, 0.7, conditions)
    velocity.square().sum().backward()
    return [velocity.detach(), *(p.grad for p in denoiser.lora_parameters().values() if p.grad is not None)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "dropout": 0.3},
        {"dtype": torch.bfloat16, "storage": "int8"},
    ],
)
def test_velocity_and_gradient_are_pefts_to_the_last_bit(settings, make_conditions):
    denoiser = make(**settings)
    if settings.get("dropout"):
        denoiser.transformer.train()
    expected = velocity_and_gradient(denoiser, make_conditions())
    assert lean_lora(denoiser.transformer) == sum(isinstance(m, Linear) for m in denoiser.transformer.modules()) > 0
    got = velocity_and_gradient(denoiser, make_conditions())
    assert len(got) == len(expected) > 10
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("narrow", [False, True])
def test_the_teacher_is_the_base_model_to_the_last_bit(narrow, make_conditions):
    denoiser = make(dtype=torch.bfloat16)
    latents = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    with denoiser.teacher():
        expected = denoiser.velocity(latents, 0.7, make_conditions())
    lean_lora(denoiser.transformer, narrow=narrow)
    with denoiser.teacher():
        assert torch.equal(denoiser.velocity(latents, 0.7, make_conditions()), expected)


def test_multiplying_in_bf16_only_rounds(make_conditions):
    denoiser = make(dtype=torch.bfloat16)
    exact = velocity_and_gradient(denoiser, make_conditions())
    lean_lora(denoiser.transformer, narrow=True)
    close = velocity_and_gradient(denoiser, make_conditions())
    assert all(a.dtype == b.dtype for a, b in zip(close, exact, strict=True)), "gradients stay fp32"
    flat = [torch.cat([v.float().flatten() for v in values[1:]]) for values in (close, exact)]
    assert 0.999 < torch.cosine_similarity(*flat, dim=0) < 1
    assert (close[0] - exact[0]).norm() < 0.01 * exact[0].norm()


def test_layers_with_dropout_stay_in_fp32():
    denoiser = make(dtype=torch.bfloat16, dropout=0.1)
    lean_lora(denoiser.transformer, narrow=True)
    assert not any(m.narrow for m in denoiser.transformer.modules() if isinstance(m, LeanLora))
