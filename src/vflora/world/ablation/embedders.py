"""What identity embedders see of motion: whether the identity loss alone would reward a frozen video.

An embedder for which a moved character is no longer quite itself pays for standing still. The one that the world's
arms train with is compared with what it is made of, and with plain pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vflora.models.identity import IdentityEmbedder
from vflora.random_streams import keyed_generator
from vflora.world.ablation.lab import LabConfig
from vflora.world.models import WorldSizes
from vflora.world.renderer import render
from vflora.world.scenes import sample_scenes

_CLIPS = 64


@dataclass(frozen=True)
class Sight:
    """Mean cosine of the first frame of true clips to two other frames.

    Attributes:
        moved: the last frame: the same creature, elsewhere and in another pose.
        other: the first frame with another creature in the same place.
    """

    moved: float
    other: float


@torch.no_grad()
def embedder_sights(lab: LabConfig) -> dict[str, Sight]:
    """Shows true clips of the dev split to each embedder."""
    sizes, device = WorldSizes(), lab.torch_device()
    scenes = sample_scenes(
        _CLIPS,
        domain="creatures",
        split="dev",
        generator=keyed_generator(0, "what embedders see"),
        frames=sizes.frames,
        posts=0.0,
    )
    clips = render(scenes, size=sizes.frame_size, device=device).video
    others = render(replace(scenes, character=scenes.character.roll(1)), size=sizes.frame_size, device=device).video
    embedder = _embedder(lab.embedder_folder(), device)
    embedders: dict[str, Callable[[Tensor], Tensor]] = {
        "DINOv3 with the identity head": embedder.embed,
        "DINOv3 alone": embedder.backbone,
        "pixels": lambda frames: frames.flatten(1),
    }
    place_bound = lab.embedder_folder(place_bound=True)
    if place_bound.exists():
        embedders["DINOv3, place-bound"] = _embedder(place_bound, device).embed
    found = {}
    for name, embed in embedders.items():
        first, last, other = (normalize(embed(f), dim=-1) for f in (clips[:, :, 0], clips[:, :, -1], others[:, :, 0]))
        found[name] = Sight(moved=float((first * last).sum(1).mean()), other=float((first * other).sum(1).mean()))
    return found


def _embedder(folder: Path, device: torch.device) -> IdentityEmbedder:
    return IdentityEmbedder.load(folder / "dino", folder / "head", device)


def sight_table(sights: Mapping[str, Sight]) -> str:
    """Returns Markdown; where moving costs more than being somebody else, freezing pays."""
    lines = ["| embedder | the same creature, moved | another creature in its place |", "|---|---|---|"]
    lines += [f"| {name} | {sight.moved:.3f} | {sight.other:.3f} |" for name, sight in sights.items()]
    return "\n".join(lines) + "\n"
