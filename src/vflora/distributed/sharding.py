"""The frozen base in pieces: each process keeps one, and gathers a block when its turn comes."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vflora.distributed.processes import World
from vflora.models.streamed_weights import WeightFiles


def shard(transformer: HunyuanVideo15Transformer3DModel, world: World, device: torch.device) -> None:
    """Shards the frozen parameters over all processes (FSDP2), in place; the trained ones stay whole everywhere.

    The LoRA is small, and as plain tensors it goes through Muon, saving and export like that of a single process;
    its gradients are summed by `World.reduce_gradients`. Pieces are cut block by block, so a transformer that was
    loaded on the CPU never is on the accelerator as a whole. One on the meta device gets its weights by `fill_shards`.

    Args:
        transformer: with its LoRA added; on the CPU, on `device`, or the base on the meta device.
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
    blocks = cast(list[FSDPModule], list(transformer.transformer_blocks))
    for block, following in pairwise(blocks):
        # Otherwise asked for when its turn comes, which is too late where Python hardly keeps ahead of the accelerator.
        block.set_modules_to_forward_prefetch([following])


def fill_shards(transformer: HunyuanVideo15Transformer3DModel, files: WeightFiles, device: torch.device) -> None:
    """Reads this process's part of the frozen weights into a transformer that `shard` cut up.

    The other parts stay on the disk, but for the tensor of the original layout whose halves change places: it is read
    whole. Torch's own reader of such files (`HuggingFaceStorageReader`) reads the same slices. But it takes every file
    of a folder, also those of another precision, cannot rename or split the tensors of the original layout, and shows
    no progress.

    Args:
        transformer: whose base is on the meta device; changed in place.
        files: with its weights.
        device: where the parts go.

    Raises:
        UserError: if the files do not fit the transformer, before anything is read.
    """
    frozen = {name: p for name, p in transformer.named_parameters() if isinstance(p, DTensor)}
    inside = {name.replace(".base_layer.", "."): name for name in frozen}  # peft has put the LoRA's layers around them
    files.require_fit({name: frozen[own].shape for name, own in inside.items()})
    parts: dict[str, DTensor] = {}
    for name, whole in files.read():
        parameter = frozen[inside[name]]
        mesh = parameter.device_mesh
        rows = torch.chunk(whole, mesh.size())  # as fully_shard cuts; a short tensor leaves nothing for the last ranks
        mine = rows[mesh.get_local_rank()] if mesh.get_local_rank() < len(rows) else whole[:0]
        parts[inside[name]] = DTensor.from_local(
            # A copy, even where nothing is converted: a view would hold on to the file.
            mine.to(device, parameter.dtype, copy=True),
            mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    transformer.load_state_dict(parts, strict=False, assign=True)
