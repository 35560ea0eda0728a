"""An embedder to which a creature that has moved is somebody else: the control for what an identity loss rewards.

The embedder that the arms share was trained to know a creature wherever it is. This one starts from it and learns the
opposite: to find every frame among the others of its clip, which show the same creature in front of the same background
(InfoNCE, as in `dino_training`). What is left to tell them apart is place and pose.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import trange

from vflora.models.identity import FrozenBackbone
from vflora.models.projection_head import HEAD_FILE, load_head, new_head, save_head
from vflora.random_streams import keyed_generator, keyed_seed
from vflora.world.dino_training import info_nce, spoil
from vflora.world.models import WorldSizes, save_dino
from vflora.world.renderer import render
from vflora.world.scenes import sample_scenes

STEPS = 200
_CLIPS, _EVERY, _TEMPERATURE, _RATE = 12, 4, 0.1, 5e-4


def train_place_bound(world: Path, output: Path, *, device: torch.device, steps: int = STEPS) -> None:
    """Trains the embedder on true clips of the split "general", whom no arm meets.

    Args:
        world: folder of the world's models, with dino/ and head/.
        output: folder that gets a dino/ and a head/ of its own.
        device: where to train.
        steps: of twelve clips each.
    """
    sizes = WorldSizes()
    backbone = FrozenBackbone.load(world / "dino", device)
    backbone.model.requires_grad_(True)
    head = new_head(load_head(world / "head").spec, keyed_generator(0, "place-bound head")).to(device).eval()
    optimizer = torch.optim.AdamW([*backbone.model.parameters(), *head.parameters()], lr=_RATE)
    generator = torch.Generator(device).manual_seed(keyed_seed(0, "place-bound views"))
    for step in trange(steps, desc="place-bound embedder", unit="step", delay=2):
        scenes = sample_scenes(
            _CLIPS,
            domain="creatures",
            split="general",
            generator=keyed_generator(0, "place-bound clips", step),
            frames=sizes.frames,
        )
        clips = render(scenes, size=sizes.frame_size, device=device).video
        frames = clips[:, :, ::_EVERY].transpose(1, 2).flatten(0, 1)
        views = spoil(torch.stack([frames, frames]), generator)
        first, second = head(backbone(views.flatten(0, 1))).chunk(2)
        info_nce(first, second, _TEMPERATURE).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_dino(backbone.model, output / "dino")
    (output / "head").mkdir()
    save_head(head, output / "head" / HEAD_FILE)
