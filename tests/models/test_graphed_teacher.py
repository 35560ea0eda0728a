import pytest
import torch

from vflora.models.denoiser import Denoiser
from vflora.models.graphed_teacher import GraphedTeacher
from vflora.models.lora import add_lora
from vflora.models.precision import Fp8Switch


@pytest.fixture
def denoiser(transformer):
    add_lora(transformer, rank=2, alpha=2, dropout=0.0, targets=None, seed=0)
    return Denoiser(transformer)


def latents(seed):
    return torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_without_cuda_it_is_the_denoiser(denoiser, make_conditions):
    teacher = GraphedTeacher(denoiser, Fp8Switch())
    with teacher.teacher():
        for seed in range(3):
            value = teacher.velocity(latents(seed), 0.6, make_conditions())
            assert torch.equal(value, denoiser.velocity(latents(seed), 0.6, make_conditions()))


@pytest.mark.gpu
def test_replayed_velocities_are_the_denoisers_to_the_last_bit(denoiser, make_conditions):
    denoiser.transformer.to("cuda")
    teacher = GraphedTeacher(denoiser, Fp8Switch())
    with teacher.teacher():
        for seed in range(4):
            for lengths in ((7,), (9,), (7, 9), (9, 8)):
                x = latents(seed).expand(len(lengths), -1, -1, -1, -1).cuda()
                conditions = make_conditions(lengths, seed=seed).to("cuda")
                expected = denoiser.velocity(x, 0.1 * seed + 0.3, conditions)
                assert torch.equal(teacher.velocity(x, 0.1 * seed + 0.3, conditions), expected)
    assert len(teacher.recordings) == 3, "one serves all batches whose longest text is of one length"
