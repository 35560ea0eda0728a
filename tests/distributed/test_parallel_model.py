"""The sharded, sequence-parallel transformer against the plain one: same velocity, same gradients."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from vflora.distributed.sequence_parallel import enable_context_parallel
from vflora.distributed.sharding import shard
from vflora.models.denoiser import Denoiser
from vflora.models.lora import add_lora
from vflora.models.random_weights import randomise_lora, small_transformer

CPU = torch.device("cpu")


def student(dtype=torch.float32):
    transformer = small_transformer(heads=4).to(dtype)
    add_lora(transformer, rank=2, alpha=2, dropout=0.0, targets=None, seed=0)
    randomise_lora(transformer.named_parameters(), std=0.1)
    transformer.enable_gradient_checkpointing()
    return Denoiser(transformer)


def learn(denoiser, latents, conditions):
    """The teacher's velocity, the student's, and the gradients of a loss between them, as in a step."""
    with denoiser.teacher():
        target = denoiser.velocity(latents, 0.7, conditions)
    velocity = denoiser.velocity(latents, 0.7, conditions)
    torch.nn.functional.mse_loss(velocity, target).backward()
    parameters = denoiser.lora_parameters()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
    return velocity.detach(), target, gradients


def parallel(world, *, sharded, dtype=torch.float32):
    denoiser = student(dtype)
    if sharded:
        shard(denoiser.transformer, world, CPU)
    enable_context_parallel(denoiser.transformer, world)
    return denoiser


def largest_error(ours, wanted):
    scale = max(g.abs().max() for g in wanted.values())
    return max(((ours[name] - wanted[name]).abs().max() / scale).item() for name in wanted)


@pytest.mark.parametrize(
    ("processes", "sp_size", "sharded", "text"),
    [
        (2, 1, True, 7),
        (2, 2, False, 6),
        (2, 2, True, 7),
        (4, 2, True, 7),
        (4, 4, True, 6),
    ],
)
def test_same_velocity_and_gradients_as_one_process(in_processes, make_conditions, processes, sp_size, sharded, text):
    samples = processes // sp_size
    latents = torch.randn(samples, 4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    lengths = tuple(text + i for i in range(samples))
    conditions = make_conditions(lengths, tuple(i for i in range(samples)))

    def work(world):
        mine = world.dp_rank
        denoiser = parallel(world, sharded=sharded)
        velocity, target, gradients = learn(denoiser, latents[mine : mine + 1], conditions.select(mine))
        world.reduce_gradients(gradients.values())
        return velocity, target, gradients

    plain = student()
    parts = [learn(plain, latents[i : i + 1], conditions.select(i)) for i in range(samples)]
    wanted = {name: gradient / samples for name, gradient in parts[-1][2].items()}  # .grad adds up over the samples
    for rank, (velocity, target, gradients) in enumerate(in_processes(processes, work, sp_size=sp_size)):
        sample = rank // sp_size
        torch.testing.assert_close(velocity, parts[sample][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(target, parts[sample][1], rtol=1e-5, atol=1e-6)
        assert largest_error(gradients, wanted) < 1e-5


def test_texts_of_unequal_length_in_one_batch(in_processes, make_conditions):
    latents = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    conditions = make_conditions((7, 4), (0, 3))

    def work(world):
        return parallel(world, sharded=True).velocity(latents, 0.7, conditions).detach()

    wanted = student().velocity(latents, 0.7, conditions).detach()
    for velocity in in_processes(2, work, sp_size=2):
        torch.testing.assert_close(velocity, wanted, rtol=1e-5, atol=1e-6)


def test_no_process_holds_more_than_its_part_of_the_base(in_processes, make_conditions):
    latents = torch.randn(1, 4, 2, 4, 4)

    def work(world):
        denoiser = parallel(world, sharded=True, dtype=torch.bfloat16)
        learn(denoiser, latents, make_conditions())
        frozen = [p for p in denoiser.transformer.parameters() if not p.requires_grad]
        return {
            "all sharded": all(isinstance(p, DTensor) for p in frozen),
            "held": sum(p.to_local().numel() for p in frozen),
            "whole": sum(p.numel() for p in frozen),
            "LoRA": {(type(p), p.dtype) for p in denoiser.lora_parameters().values()},
        }

    for answer in in_processes(2, work):
        assert answer["all sharded"]
        assert answer["held"] < 0.52 * answer["whole"]
        assert answer["LoRA"] == {(torch.nn.Parameter, torch.float32)}


@pytest.mark.parametrize("processes", [2, 4])
def test_tokens_that_do_not_divide_give_the_same_velocity(in_processes, make_conditions, processes):
    latents = torch.randn(1, 4, 3, 3, 5, generator=torch.Generator().manual_seed(2))  # 45 tokens
    conditions = make_conditions((7,), (2,), size=(3, 5))

    @torch.no_grad()
    def work(world):
        denoiser = student()
        enable_context_parallel(denoiser.transformer, world, uneven=True)
        return denoiser.velocity(latents, 0.7, conditions)

    wanted = student().velocity(latents, 0.7, conditions).detach()
    for velocity in in_processes(processes, work, sp_size=processes):
        torch.testing.assert_close(velocity, wanted, rtol=1e-5, atol=1e-6)
