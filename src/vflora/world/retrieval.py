"""Retrieval of a character among hundreds by the grader's vectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from vflora.random_streams import keyed_generator
from vflora.world.characters import PLAIN_GEOMETRIC, Domain, split_ids
from vflora.world.grader import Grader, render_anywhere


@dataclass(frozen=True)
class Lineup:
    """Everybody who could be in a picture.

    Attributes:
        domain: geometric characters or creatures.
        characters: their numbers [N].
        vectors: a unit vector for each, the mean over several clean pictures [N, D].
    """

    domain: Domain
    characters: Tensor
    vectors: Tensor

    def row_of(self, characters: Tensor) -> Tensor:
        """Returns the row of each of the given characters [B].

        Raises:
            ValueError: if one of them is not in the line-up.
        """
        match = characters.to(self.characters)[:, None] == self.characters
        if not bool(match.any(1).all()):
            raise ValueError("a character to be graded is not in the line-up: make the line-up of all splits")
        return match.int().argmax(1)

    def save(self, path: Path) -> None:
        """Writes the line-up as safetensors."""
        save_file({"characters": self.characters, "vectors": self.vectors.contiguous()}, path, {"domain": self.domain})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Lineup:
        """Reads what `save` wrote."""
        with safe_open(path, framework="pt", device=str(device)) as file:
            domain = cast(Domain, file.metadata()["domain"])
            return cls(domain, file.get_tensor("characters"), file.get_tensor("vectors"))


@torch.no_grad()
def make_lineup(grader: Grader, *, domain: Domain, pictures: int = 8, seed: int = 0, size: int = 64) -> Lineup:
    """Embeds the first 480 geometric characters, or the 576 creatures of train, dev and test."""
    device = next(grader.parameters()).device
    characters = torch.arange(10 * PLAIN_GEOMETRIC if domain == "geometric" else split_ids(domain, "test").stop)
    vectors = []
    for number in range(pictures):
        generator = keyed_generator(seed, "lineup", domain, number)
        images = render_anywhere(characters, domain=domain, generator=generator, size=size, device=device)
        vectors.append(torch.cat([grader.embed(part) for part in images.split(256)]))
    middle = torch.stack(vectors).mean(0)
    return Lineup(domain, characters.to(device), functional.normalize(middle, dim=-1))


def ranks(vectors: Tensor, truth: Tensor, lineup: Lineup) -> Tensor:
    """Returns how many others in the line-up are nearer than the right one.

    Args:
        vectors: unit vectors [..., D].
        truth: the right characters, of the same leading shape.
        lineup: everybody.

    Returns:
        int64, 0 where the right one is the nearest, of the leading shape.
    """
    cosines = vectors @ lineup.vectors.T
    row = lineup.row_of(truth.flatten()).view(*truth.shape, 1)
    return (cosines > cosines.gather(-1, row)).sum(-1)
