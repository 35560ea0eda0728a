"""Training of the world's DINOv3, which stands for features learned from general pictures.

It sees stills of the geometric characters only, never a creature: what it can say about creatures is what colours
and shapes in general teach. So that this is not just 48 names, every training instance is a character repainted and
reshaped at random, the same way in both of its views, and it is told apart from all others of its batch (InfoNCE,
van den Oord et al. 2018, arXiv 1807.03748, eq. 4, in the symmetric form).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from transformers import DINOv3ViTModel

from vflora.random_streams import keyed_generator, keyed_seed
from vflora.world.characters import split_ids
from vflora.world.models import IMAGENET_MEAN, IMAGENET_STD, WorldSizes, build_dino, save_dino
from vflora.world.renderer import render_stills
from vflora.world.training_loop import Clock, LoopSettings, StageRun


@dataclass(frozen=True)
class DinoTraining:
    """How DINOv3 is trained.

    Attributes:
        batch_size: instances per step, two views of each.
        stills_per_character: pictures that are held rendered.
        paints: different repaintings in a batch; instances that share one differ in shape only.
        temperature: of the softmax over the batch.
        projection: width of the space of comparison, which is thrown away afterwards.
        loop: optimisation.
    """

    batch_size: int = 256
    stills_per_character: int = 256
    paints: int = 32
    temperature: float = 0.1
    projection: int = 64
    loop: LoopSettings = LoopSettings(peak_lr=1e-3, warmup_steps=300, weight_decay=0.02)


class Stills:
    """Stills of every geometric character on the accelerator: uint8 [characters, pictures, 3, H, W]."""

    def __init__(self, count: int, *, size: int, device: torch.device, seed: int) -> None:
        """Renders `count` pictures of each character."""
        names = torch.tensor(split_ids("geometric", "train"))
        pictures = []
        for index in range(count):
            generator = keyed_generator(seed, "stills", index)
            still = render_stills(names, domain="geometric", generator=generator, size=size, device=device)
            pictures.append(((still.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        self.images = torch.stack(pictures, dim=1)

    def pairs(self, count: int, generator: Generator) -> Tensor:
        """Draws two pictures of each of `count` random characters: fp32 [2, B, 3, H, W] in [-1, 1]."""
        characters, pictures, device = *self.images.shape[:2], self.images.device
        who = torch.randint(characters, (count,), generator=generator, device=device)
        which = torch.randint(pictures, (2, count), generator=generator, device=device)
        return self.images[who, which].float() / 127.5 - 1


def repaint(views: Tensor, paints: int, generator: Generator) -> Tensor:
    """Recolours and reshapes every instance, the same way in all of its views.

    The colours go through a random rotation about grey and a random gain per channel, one of `paints`; the shape
    through a random stretch, shear and mirroring.

    Args:
        views: [V, B, 3, H, W] in [-1, 1].
        paints: number of different recolourings.
        generator: on the device of the views.
    """
    count, device = views.shape[1], views.device
    rotation, _ = torch.linalg.qr(torch.randn(paints, 3, 3, generator=generator, device=device))
    blend = torch.rand(paints, 1, 1, generator=generator, device=device)
    colour = blend * rotation + (1 - blend) * torch.eye(3, device=device)
    which = torch.randint(paints, (count,), generator=generator, device=device)
    painted = torch.einsum("bij,vbjhw->vbihw", colour[which], views)
    stretch = 0.8 + 0.5 * torch.rand(count, 2, generator=generator, device=device)
    shear = 0.5 * (torch.rand(count, 2, generator=generator, device=device) - 0.5)
    mirror = torch.where(torch.rand(count, generator=generator, device=device) < 0.5, -1.0, 1.0)
    affine = torch.zeros(count, 2, 3, device=device)
    affine[:, 0, 0], affine[:, 1, 1] = stretch[:, 0] * mirror, stretch[:, 1]
    affine[:, 0, 1], affine[:, 1, 0] = shear[:, 0], shear[:, 1]
    return _warp(painted, affine.expand(len(views), -1, -1, -1))


def augment(views: Tensor, generator: Generator) -> Tensor:
    """Changes every view on its own: place, size and tilt, and whatever `spoil` does.

    Args:
        views: [V, B, 3, H, W] in [-1, 1].
        generator: on the device of the views.

    Returns:
        Same shape, in [-1, 1].
    """
    angle, zoom = _uniform(views, -0.35, 0.35, generator), _uniform(views, 0.75, 1.15, generator)
    affine = torch.zeros(*views.shape[:2], 2, 3, device=views.device)
    affine[..., 0, 0] = affine[..., 1, 1] = zoom * angle.cos()
    affine[..., 0, 1], affine[..., 1, 0] = -zoom * angle.sin(), zoom * angle.sin()
    affine[..., 2] = _uniform(views, -0.2, 0.2, generator, 2)
    return spoil(_warp(views, affine), generator)


def spoil(views: Tensor, generator: Generator) -> Tensor:
    """Changes light, sharpness and grain of every view on its own, and leaves everything where it is.

    Blur and noise are in it because the embedder judges frames that a VAE decoded from unfinished latents.

    Args:
        views: [V, B, 3, H, W] in [-1, 1].
        generator: on the device of the views.

    Returns:
        Same shape, in [-1, 1].
    """

    def uniform(low: float, high: float) -> Tensor:
        return _uniform(views, low, high, generator)[..., None, None, None]

    light = uniform(0.8, 1.2) * views + uniform(-0.15, 0.15)
    blurred = F.avg_pool2d(light.flatten(0, 1), 3, stride=1, padding=1).view_as(light)
    soft = torch.lerp(light, blurred, uniform(-0.5, 1.0).clamp(min=0))
    grain = torch.randn(soft.shape, generator=generator, device=soft.device) * uniform(0, 0.12)
    return (soft + grain).clamp(-1, 1)


def _uniform(views: Tensor, low: float, high: float, generator: Generator, *more: int) -> Tensor:
    """Draws a number for every view, [V, B, *more]."""
    return low + (high - low) * torch.rand(*views.shape[:2], *more, generator=generator, device=views.device)


def _warp(views: Tensor, affine: Tensor) -> Tensor:
    flat = views.flatten(0, 1)
    grid = F.affine_grid(affine.flatten(0, 1), list(flat.shape), align_corners=False)
    return F.grid_sample(flat, grid, padding_mode="reflection", align_corners=False).view_as(views)


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Cross entropy of finding each instance's other view in the batch, both ways; [B, D] in, scalar out."""
    logits = F.normalize(first.float(), dim=-1) @ F.normalize(second.float(), dim=-1).T / temperature
    target = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


class _Student(nn.Module):
    """DINOv3 and the projection that only training uses."""

    mean: Tensor
    std: Tensor

    def __init__(self, dino: DINOv3ViTModel, width: int) -> None:
        super().__init__()
        # In train mode DINOv3 shifts its position code at random; in eval mode gradients flow all the same.
        self.dino = dino.eval()
        hidden = dino.config.hidden_size
        self.projection = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, width))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = (0.5 * images + 0.5 - self.mean) / self.std
        return self.projection(self.dino(pixel_values=pixels).pooler_output)


def train_dino(
    sizes: WorldSizes,
    settings: DinoTraining,
    *,
    folder: Path,
    clock: Clock,
    device: torch.device,
    seed: int,
    compiled: bool,
    resume: bool,
    max_steps: int | None = None,
) -> None:
    """Trains DINOv3 and keeps it in `folder`/dino, with metrics and the resumable state in `folder`/training."""
    torch.manual_seed(keyed_seed(seed, "projection"))
    student = _Student(build_dino(sizes, seed), settings.projection)
    kept = folder / "dino"
    if resume and (kept / "config.json").is_file():
        student.dino.load_state_dict(DINOv3ViTModel.from_pretrained(kept, dtype=torch.float32).state_dict())
    student = student.to(device)
    stills = Stills(settings.stills_per_character, size=sizes.frame_size, device=device, seed=seed)
    generator = torch.Generator(device).manual_seed(keyed_seed(seed, "dino"))
    network = torch.compile(student, dynamic=False) if compiled else student

    def loss(step: int, fraction: float) -> tuple[Tensor, dict[str, Tensor | float]]:
        del step, fraction
        views = stills.pairs(settings.batch_size, generator)
        views = augment(repaint(views, settings.paints, generator), generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            first, second = network(views.flatten(0, 1)).float().chunk(2)
        found = (F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T).argmax(1)
        right = (found == torch.arange(len(found), device=device)).float().mean()
        return info_nce(first, second, settings.temperature), {"top1": right}

    StageRun(
        name="dino",
        module=student,
        loss=loss,
        settings=settings.loop,
        clock=clock,
        folder=folder / "training",
        keep=partial(_keep, sizes, kept),
        resume=resume,
        max_steps=max_steps,
    ).run()


def _keep(sizes: WorldSizes, folder: Path, weights: dict[str, Tensor]) -> None:
    dino = build_dino(sizes, seed=0)
    prefix = "dino."
    dino.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    save_dino(dino, folder)
