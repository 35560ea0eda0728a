"""One process samples, and the others lend it their transformer.

The first process has the whole pipeline. Whenever it calls its transformer, it tells the others the inputs, and all
compute together, each with a part of the tokens. The others need no text encoder, no VAE and no scheduler, and
cannot come to other decisions than the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vflora.distributed.processes import World
from vflora.errors import UserError

_Message = tuple[Literal["call", "done", "refused"], Any]


@contextmanager
def borrowed(transformer: nn.Module, world: World) -> Iterator[None]:
    """On the first process: inside, every call of `transformer` is one of all processes.

    Register other hooks on the inputs of `transformer` before, so that the others get what comes out of them.

    Args:
        transformer: set up by `enable_context_parallel`, here and on the others.
        world: the processes; alone, nothing changes.
    """
    if world.size == 1:
        yield
        return

    def tell(_module: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        if args:
            raise TypeError("a transformer that other processes share is called with keywords only")
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        shapes = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
        _tell(world, ("call", (shapes, {name: v for name, v in inputs.items() if name not in tensors})))
        for value in tensors.values():
            dist.broadcast(value.contiguous(), src=0)

    handle = transformer.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    except UserError as error:
        _tell(world, ("refused", str(error)))
        raise
    finally:
        handle.remove()
    _tell(world, ("done", None))


@torch.no_grad()
def lend(transformer: nn.Module, world: World, device: torch.device) -> None:
    """On the other processes: computes whenever the first one does, until it is done.

    Raises:
        UserError: if the first process refuses something, with its words.
    """
    while True:
        kind, content = _hear(world)
        if kind == "done":
            return
        if kind == "refused":
            raise UserError(content)
        shapes, inputs = content
        for name, (shape, dtype) in shapes.items():
            inputs[name] = torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(inputs[name], src=0)
        transformer(**inputs)


def _tell(world: World, message: _Message) -> None:
    dist.broadcast_object_list([message], src=0, group=world.group)


def _hear(world: World) -> _Message:
    heard: list[Any] = [None]
    dist.broadcast_object_list(heard, src=0, group=world.group)
    return heard[0]
