"""One image or video by several processes, each with a strip of it and the border that the strip depends on.

For work that is local in space, such as convolutions: what every process computes in the middle of its strip is what
it would compute without the others, and it cuts off the rest as it goes. So the strips put together are exact, and so
is the sum of the gradients that the processes carry back to what they had in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from vflora.distributed.processes import World


@dataclass(frozen=True)
class Strip:
    """The part of one process, in pixels along one dimension.

    Attributes:
        dim: the dimension.
        source: what it needs of the input.
        start: where its own part begins in the input.
        end: and where it ends.
        length: of the whole input.
    """

    dim: int
    source: slice
    start: int
    end: int
    length: int

    @property
    def before(self) -> int:
        """Pixels of the border in front of its own part; fewer where the whole begins."""
        return self.start - self.source.start

    @property
    def after(self) -> int:
        """Pixels of the border behind it; fewer where the whole ends."""
        return self.source.stop - self.end


@dataclass(frozen=True)
class Strips:
    """The processes that cut up their work among themselves.

    Attributes:
        rank: this one's place among them.
        size: how many they are.
        group: that they talk in.
    """

    rank: int
    size: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, world: World) -> Strips | None:
        """Returns the processes that share a sample with this one, or None if it is by itself."""
        if world.sp_size == 1 or world.mesh is None:
            return None
        return cls(world.rank % world.sp_size, world.sp_size, world.mesh["ulysses"].get_group())

    def strip(self, x: Tensor, border: int) -> Strip | None:
        """Returns the strip of this process, across the longer side; None if that has fewer pixels than processes.

        Args:
            x: [..., H, W], alike on all processes.
            border: pixels around a strip that it depends on.
        """
        dim = -1 if x.shape[-1] >= x.shape[-2] else -2
        length = x.shape[dim]
        if length < self.size:
            return None
        start, end = (length * rank // self.size for rank in (self.rank, self.rank + 1))
        # Even if this is all of `x`, the layers to come have less to do: they need less and less of the border.
        source = slice(max(0, start - border), min(length, end + border))
        return Strip(dim, source, start, end, length)

    def cut(self, x: Tensor, strip: Strip) -> Tensor:
        """Returns the strip of `x` with its border; backward, `x` gets the gradients of all processes, summed."""
        return cast(Tensor, _Common.apply(x, self.group)).narrow(
            strip.dim, strip.source.start, strip.source.stop - strip.source.start
        )

    def join(self, part: Tensor, strip: Strip, scale: int) -> Tensor:
        """Returns the whole on every process, which all of them must use alike.

        Args:
            part: what became of the strip, without its border.
            strip: the strip.
            scale: how many times larger `part` is than what was cut.
        """
        whole = _Joined.apply(part, strip.dim, strip.start * scale, strip.length * scale, self.group)
        return cast(Tensor, whole)


class _Common(torch.autograd.Function):
    """What all processes have alike and each uses in its own way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].float().contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.to(grads[0].dtype), None


class _Joined(torch.autograd.Function):
    """Parts of all processes, put together; the gradient of the whole is alike on all of them, and each takes its."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, start: int, length: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.start, ctx.length = dim, start, part.shape[dim]
        shape = list(part.shape)
        shape[dim] = length
        whole = part.new_zeros(shape)
        whole.narrow(dim, start, part.shape[dim]).copy_(part)
        # Adding zeros is exact, and unlike gathering it does not ask for parts of one size.
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grads[0].narrow(ctx.dim, ctx.start, ctx.length).contiguous(), None, None, None, None
