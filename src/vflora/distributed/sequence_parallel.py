"""Several processes on one sample: each holds a part of its tokens, and for attention a part of the heads.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509), by diffusers' context parallelism. The model has no plan for it, so
here is one for the dense forward pass. Text and video enter the first block split, and the velocity leaves whole. What
happens in the attention of evenly divided tokens is `vflora.distributed.ulysses`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelConfig, ContextParallelInput, ContextParallelOutput
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.nn.functional import pad

from vflora.distributed.processes import World
from vflora.distributed.ulysses import Ulysses

_ROTARY = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
_TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
_PLAN = {
    "rope": {0: _ROTARY, 1: _ROTARY},
    "transformer_blocks.0": {"hidden_states": _TOKENS, "encoder_hidden_states": _TOKENS},
    "transformer_blocks.*": {"attention_mask": ContextParallelInput(split_dim=1, expected_dims=2)},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


def enable_context_parallel(
    transformer: HunyuanVideo15Transformer3DModel, world: World, *, uneven: bool = False
) -> None:
    """Splits every forward pass over the processes that share a sample, in place.

    The sum of their gradients is the gradient. Call it after `make_dense`, sharding and compiling.

    Args:
        transformer: with the dense forward pass, which pads the text to a length that divides.
        world: the processes; with `sp_size` 1 nothing changes.
        uneven: whether video tokens may not divide by the processes; forward passes only.
    """
    if world.sp_size == 1 or world.mesh is None:
        return
    config = ContextParallelConfig(ulysses_degree=world.sp_size, ulysses_anything=uneven, mesh=world.mesh)
    with _quietly(), _some_accelerator():
        plan = {name: what for name, what in _PLAN.items() if not (uneven and name == "proj_out")}
        transformer.enable_parallelism(config=config, cp_plan=plan)
    group = world.mesh["ulysses"].get_group()
    if uneven:
        transformer.proj_out.register_forward_hook(lambda _module, _args, part: _gathered(part, group))
    else:
        sharing = Ulysses(group.group_name, world.sp_size)
        for block in transformer.transformer_blocks:
            block.attn.processor.ulysses = sharing
    # Said by torch 2.13 to diffusers 0.42 in every forward pass.
    warnings.filterwarnings("ignore", ".*all_gather_tensor` is deprecated", FutureWarning)


def _gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Puts parts [B, n, C] together along n, which differs; gloo cannot gather such parts, so they travel padded."""
    processes = dist.get_world_size(group)
    lengths = part.new_zeros(processes, dtype=torch.int64)
    lengths[dist.get_rank(group)] = part.shape[1]
    dist.all_reduce(lengths, group=group)
    longest = int(lengths.max())
    padded = pad(part, (0, 0, 0, longest - part.shape[1])).contiguous()
    parts = [torch.empty_like(padded) for _ in range(processes)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([p[:, :n] for p, n in zip(parts, lengths.tolist(), strict=True)], dim=1)


@contextmanager
def _quietly() -> Iterator[None]:
    """Spares the user the remark that this part of diffusers is young, which our tests watch for."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


@contextmanager
def _some_accelerator() -> Iterator[None]:
    """Lets diffusers number the devices of a machine that has none: it divides by how many there are."""
    count = torch.accelerator.device_count
    if count() == 0:
        torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count
