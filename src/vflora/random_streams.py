"""Random generators keyed by what they are for, so that a resumed or resharded run draws the same numbers."""

from __future__ import annotations

import hashlib

import torch


def keyed_seed(*key: int | str) -> int:
    """Returns a 63-bit seed that depends on every part of `key` and on nothing else."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """Returns a CPU generator for `key`, for example `(seed, "noise", step, slot)`.

    It lives on the CPU on purpose: the numbers are then the same on every kind of device.
    """
    return torch.Generator().manual_seed(keyed_seed(*key))


def keyed_noise(shape: tuple[int, ...], *key: int | str) -> torch.Tensor:
    """Returns standard normal noise of `shape`, fp32 on the CPU, for `key`."""
    return torch.randn(shape, generator=keyed_generator(*key))
