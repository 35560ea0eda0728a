"""Low-rank updates of fused projections: several stacked into one, one cut back into several. Pure functions.

Stacking r-rank updates of q, k and v gives one of rank 3r: down = cat(downs), up = block diagonal. Cutting finds
the blocks again and returns to rank r; an update that was trained fused has no blocks, so its parts share `down`
and keep its whole rank. Both ways the weight delta stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vflora.models.lora_formats.weights import LoraModule


def swap_halves(rows: Tensor) -> Tensor:
    """Exchanges the upper and the lower half of the rows (shift, scale <-> scale, shift)."""
    upper, lower = rows.chunk(2, dim=0)
    return torch.cat([lower, upper])


def fuse(parts: Sequence[LoraModule | None]) -> LoraModule:
    """Stacks updates by rows; None is a part without an update, of the same height as the others.

    Raises:
        ValueError: if every part is None.
    """
    present = [part for part in parts if part is not None]
    if not present:
        raise ValueError("nothing to fuse")
    if len({part.scale for part in present}) > 1:
        return fuse([None if part is None else part.with_scale_one() for part in parts])
    scale = present[0].scale
    if len(present) == len(parts) and all(torch.equal(p.down, present[0].down) for p in present):
        return LoraModule(present[0].down, torch.cat([p.up for p in present]), present[0].alpha)
    down = torch.cat([part.down for part in present])
    height = present[0].up.shape[0]
    up = torch.block_diag(*[part.up if part else present[0].up.new_zeros(height, 0) for part in parts])
    return LoraModule(down, up, scale * down.shape[0])


def split(fused: LoraModule, count: int) -> tuple[LoraModule | None, ...]:
    """Cuts an update by rows into `count` parts; None for a part that the update leaves as it is.

    Raises:
        ValueError: if the rows do not divide by `count`.
    """
    if fused.up.shape[0] % count:
        raise ValueError(f"{fused.up.shape[0]} rows do not divide by {count}")
    rows = fused.up.chunk(count, dim=0)
    if fused.rank % count == 0 and _is_block_diagonal(rows, fused.rank // count):
        rank = fused.rank // count
        columns = [torch.arange(i * rank, (i + 1) * rank) for i in range(count)]
    else:
        columns = [part.ne(0).any(dim=0).nonzero().flatten().cpu() for part in rows]
    return tuple(
        LoraModule(fused.down[index].contiguous(), part[:, index].contiguous(), fused.scale * len(index))
        if len(index)
        else None
        for part, index in zip(rows, columns, strict=True)
    )


def _is_block_diagonal(rows: Sequence[Tensor], rank: int) -> bool:
    return all(not part[:, : i * rank].any() and not part[:, (i + 1) * rank :].any() for i, part in enumerate(rows))
