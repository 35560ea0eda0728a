"""The processes of a run: who they are, and the few things that they must agree on."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers.utils import logging as transformers_logging

from vflora.distributed.divisible import require_processes
from vflora.distributed.launch import is_first, process_count
from vflora.distributed.watchdog import LostProcessError, Watchdog, attempt
from vflora.errors import UserError

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)
"""Of a collective: longer than any part of a step that others may wait for. The watchdog notices a death sooner."""


@dataclass(frozen=True)
class World:
    """The processes of a run, laid out as data parallel x sequence parallel; a single one by default.

    Neighbouring ranks share a sample: with `sp_size` 2, ranks 0 and 1 see the same batch, and so do 2 and 3.

    Attributes:
        rank: this process, among all.
        size: number of processes.
        sp_size: processes that share one sample's tokens.
        mesh: with dimensions dp, ring and ulysses, as diffusers wants it; None for a single process.
        group: that carries the small messages, on the CPU; None is the default one.
        watchdog: over the other processes.
    """

    rank: int = 0
    size: int = 1
    sp_size: int = 1
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = field(default=None, compare=False)
    watchdog: Watchdog | None = field(default=None, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs, checkpoints and previews."""
        return self.rank == 0

    @property
    def leads_sample(self) -> bool:
        """Whether this process is the first of those that share a sample."""
        return self.rank % self.sp_size == 0

    @property
    def dp_size(self) -> int:
        """Number of data-parallel processes; each sees samples of its own."""
        return self.size // self.sp_size

    @property
    def dp_rank(self) -> int:
        """Which of them this process belongs to."""
        return self.rank // self.sp_size

    def agree(self, flag: bool) -> bool:
        """Returns on every process whether any of them said yes."""
        if self.size == 1:
            return flag
        said = torch.tensor(int(flag))
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self.group)
        return bool(said)

    def all_finite(self, value: float) -> bool:
        """Returns whether `value` is finite on every process."""
        return not self.agree(not math.isfinite(value))

    def least(self, value: int) -> int:
        """Returns the smallest of everybody's values, on every process."""
        if self.size == 1:
            return value
        smallest = torch.tensor(value)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self.group)
        return int(smallest)

    def gather_over_data(self, value: T) -> list[T]:
        """Returns the value of every data-parallel process, in the order of the global batch, on every process."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return [values[rank] for rank in range(0, self.size, self.sp_size)]  # pyright: ignore[reportReturnType]

    def from_main(self, make: Callable[[], T]) -> T:
        """Calls `make` on the main process and returns its result on all of them.

        Raises:
            UserError: on every process, if it was raised on the main one.
        """
        if self.size == 1:
            return make()
        answer: list[T | str | None] = [None, None]
        if self.is_main:
            try:
                answer[0] = make()
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0, group=self.group)
        if answer[1] is not None:
            raise UserError(str(answer[1]))
        return answer[0]  # pyright: ignore[reportReturnType]

    def everywhere(self, make: Callable[[], T]) -> T:
        """Calls `make` on every process and returns what each made; `make` itself must not wait for the others.

        Raises:
            UserError: on every process, if it was raised on any.
        """
        made: list[T] = []
        refusal: str | None = None
        try:
            made.append(make())
        except UserError as error:
            refusal = str(error)
        refusals: list[str | None] = [refusal]
        if self.size > 1:
            refusals *= self.size
            dist.all_gather_object(refusals, refusal, group=self.group)
        for sentence in refusals:
            if sentence is not None:
                raise UserError(sentence)
        return made[0]

    def reduce_gradients(self, gradients: Iterable[Tensor]) -> None:
        """Makes the gradients those of the global batch, in place.

        Every process holds the gradient of the mean loss of its own samples, through its own tokens: over the
        processes that share a sample they add up, over samples they are averaged.

        Args:
            gradients: replicated ones, in the same order everywhere.
        """
        gradients = list(gradients)
        if self.size == 1 or not gradients:
            return
        # One message for all of them: a LoRA has a thousand small matrices.
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        together /= self.dp_size
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def regrouped(self, sp_size: int, device: torch.device) -> Self:
        """Returns the same processes, so many of them to a sample; all of them call it together."""
        shape = (self.size // sp_size, 1, sp_size)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "ring", "ulysses"))
        # Who is refused next leaves, and with it the store; whoever still met the others there would wait for ever.
        self.agree(False)
        return replace(self, sp_size=sp_size, mesh=mesh)

    def aside(self) -> Self:
        """Returns the same processes with a channel of their own, for a thread that works beside the training."""
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=_TIMEOUT))

    def close(self) -> None:
        """Parts in peace: waits for the others, and ends the process group."""
        if self.size == 1:
            return
        self.agree(True)
        if self.watchdog is not None:
            self.watchdog.stop()
        dist.destroy_process_group()


ALONE = World()
"""A single process."""


@contextmanager
def joined(sp_size: int, device: torch.device) -> Iterator[World]:
    """`start`, and parting in peace at the end; a failure that another process caused is told with its name.

    Raises:
        LostProcessError: if a collective failed because a process is gone.
    """
    world = start(sp_size, device)
    try:
        yield world
    except UserError:
        if world.watchdog is not None:
            world.watchdog.stop()  # the others end for the same reason, and nobody should miss them
        raise
    except RuntimeError as error:
        gone = world.watchdog.gone() if world.watchdog else []
        if gone:
            raise LostProcessError(gone) from error
        raise
    world.close()


def start(sp_size: int, device: torch.device) -> World:
    """Joins the processes that torchrun started; a process that runs by itself is a world of one.

    Args:
        sp_size: processes that share one sample's tokens.
        device: what everybody computes on; on CUDA, this process's own device becomes the current one.

    Raises:
        UserError: if there are not the processes or the devices for it.
    """
    size = process_count()
    require_processes(size, sp_size)
    claim_device(device, size)
    if size == 1:
        return ALONE
    if not is_first():
        logging.getLogger("vflora").setLevel(logging.WARNING)
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"vflora/{attempt()}", store),  # pyright: ignore[reportPrivateImportUsage]
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
    )
    watchdog = Watchdog(dist.get_rank(), size)
    watchdog.start()
    return World(dist.get_rank(), size, watchdog=watchdog).regrouped(sp_size, device)


def claim_device(device: torch.device, size: int) -> None:
    """Makes this process's own GPU the current one: the one of its number among `size` processes, or the one named.

    Raises:
        UserError: if there are not the devices for it.
    """
    if device.type != "cuda":
        return
    if size == 1:
        if device.index is not None:
            torch.cuda.set_device(device)
        return
    if device.index is not None:
        raise UserError(f"--device {device} names one GPU for {size} processes: leave --device out.")
    here, devices = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if here > devices:
        raise UserError(
            f"torchrun starts {here} processes on this machine, which has {devices} GPUs: "
            f"use --nproc_per_node {devices}."
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
