"""The frozen base in pieces: each process keeps one, and gathers a block when its turn comes."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from vflora.distributed.processes import World


def shard(transformer: HunyuanVideo15Transformer3DModel, world: World, device: torch.device) -> None:
    """Shards the frozen parameters over all processes (FSDP2), in place; the trained ones stay whole everywhere.

    The LoRA is small, and as plain tensors it goes through Muon, saving and export like that of a single process;
    its gradients are summed by `World.reduce_gradients`. Pieces are cut block by block, so a transformer that was
    loaded on the CPU never is on the accelerator as a whole.

    Args:
        transformer: with its LoRA added; on the CPU or on `device`.
        world: the processes.
        device: where to compute.
    """
    trained = {parameter for parameter in transformer.parameters() if parameter.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    # Casting what goes in would round the rotary tables to bf16.
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, mp_policy=exact, ignored_params=trained & set(block.parameters()))
    fully_shard(transformer, mesh=mesh, mp_policy=exact, ignored_params=trained)
