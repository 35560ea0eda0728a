import copy

import pytest
import torch
from torch.nn import Parameter

from vflora.muon import BatchedMuon

SHAPES = [(4, 32), (32, 4), (4, 32), (32, 4), (4, 48), (8, 8), (4, 32)]


def matrices():
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(*shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(1 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "options",
    [
        {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.01},
        {"adjust_lr_fn": "original", "nesterov": False},
        {},
    ],
)
def test_it_is_the_librarys_muon_up_to_bf16_rounding(options):
    ours, theirs = matrices(), matrices()
    start = copy.deepcopy(ours)
    batched = BatchedMuon(ours, lr=0.02, **options)
    library = torch.optim.Muon(theirs, lr=0.02, **options)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        batched.step()
        library.step()
    for mine, its, before in zip(ours, theirs, start, strict=True):
        moved = (its - before).norm()
        assert moved > 0.01
        assert (mine - its).norm() < 0.01 * moved
        torch.testing.assert_close(
            batched.state[mine]["momentum_buffer"], library.state[its]["momentum_buffer"], rtol=1e-6, atol=1e-6
        )


def test_the_librarys_state_loads():
    parameters = matrices()
    library = torch.optim.Muon(parameters, lr=0.02)
    set_gradients(parameters, 0)
    library.step()
    batched = BatchedMuon(parameters, lr=0.02)
    batched.load_state_dict(library.state_dict())
    buffer = batched.state[parameters[0]]["momentum_buffer"]
    torch.testing.assert_close(buffer, library.state[parameters[0]]["momentum_buffer"])


def test_a_matrix_without_a_gradient_stays():
    parameters = matrices()
    before = parameters[2].detach().clone()
    set_gradients(parameters, 0)
    parameters[2].grad = None
    optimizer = BatchedMuon(parameters, lr=0.02)
    optimizer.step()
    assert torch.equal(parameters[2], before)
    assert parameters[2] not in optimizer.state


def test_a_zero_gradient_moves_nothing_but_the_decay():
    parameter = Parameter(torch.ones(4, 8))
    parameter.grad = torch.zeros(4, 8)
    BatchedMuon([parameter], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(parameter, torch.full((4, 8), 0.95))
