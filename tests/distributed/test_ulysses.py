"""Attention shared by processes against that of one: values, and the gradients of each process's own tokens."""

import pytest
import torch

from vflora.distributed.ulysses import Ulysses
from vflora.models.attention_choice import attend

TOKENS, HEADS, WIDTH = 12, 4, 8


def inputs(batch):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, TOKENS, HEADS, WIDTH, generator=generator) for _ in range(4)]


def attended(query, key, value, wanted, how):
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out = how(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, wanted)]


@pytest.mark.parametrize(("processes", "batch"), [(2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_every_process_gets_the_attention_to_all_tokens(in_processes, processes, batch, padding, masked):
    query, key, value, wanted = inputs(batch)
    mask = torch.ones(batch, TOKENS, dtype=torch.bool)
    mask[:, [1, 7]] = not masked
    wanted[:, TOKENS - padding :] = 0  # nobody looks at what padding attends to
    known = mask.clone()
    known[:, TOKENS - padding :] = False
    expected = attended(query, key, value, wanted, lambda *leaves: attend(*leaves, known))

    def work(world):
        mine = slice(world.rank * TOKENS // processes, (world.rank + 1) * TOKENS // processes)
        group = Ulysses(world.mesh["ulysses"].get_group().group_name, processes)

        def shared(q, k, v):
            return group.attend(lambda: q, lambda: k, lambda: v, mask[:, mine] if masked else None, None, padding)

        return attended(query[:, mine], key[:, mine], value[:, mine], wanted[:, mine], shared)

    found = [torch.cat(parts, dim=1) for parts in zip(*in_processes(processes, work, sp_size=processes), strict=True)]
    found[0][:, TOKENS - padding :] = expected[0][:, TOKENS - padding :]
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-6)
