"""Who is in this picture? An embedder for grading only, which shares nothing with DINOv3 or any loss.

It learns from geometric characters and from the creatures of the split "general", so that the creatures on
which a LoRA is trained, tuned and graded are as new to it as to everybody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pytorch_metric_learning.losses import SupConLoss
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from vflora.config import require
from vflora.errors import UserError
from vflora.random_streams import keyed_generator, keyed_seed
from vflora.world.characters import Domain, split_ids
from vflora.world.renderer import render, still_scenes

_FORMAT = "vflora world grader 2"
_WIDTHS = (24, 48, 72, 96, 128)
_OUTPUT = 128
GRADER_STEPS = 2500
GRADER_CHARACTERS = 64
_PICTURES_PER_CHARACTER = 4
_SETTLING_BATCHES = 8


class Grader(nn.Module):
    """A small residual network from frames to unit vectors; `widths` are those of its levels."""

    def __init__(self, widths: Sequence[int] = _WIDTHS) -> None:
        super().__init__()
        self.widths = tuple(widths)
        layers: list[nn.Module] = []
        for wide, wider in zip((3, *widths[:-1]), widths, strict=True):
            layers += [nn.Conv2d(wide, wider, 3, padding=1, bias=False), nn.AvgPool2d(2), _Residual(wider)]
        self.body = nn.Sequential(*layers)
        # centring each coordinate keeps the vectors of a fresh network from all being the same
        self.head = nn.Sequential(nn.Linear(2 * widths[-1], _OUTPUT), nn.BatchNorm1d(_OUTPUT))

    def embed(self, images: Tensor) -> Tensor:
        """Maps [B, 3, H, W] in [-1, 1], H and W 32 or more, to unit vectors [B, 128]."""
        features = self.body(images)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)
        return functional.normalize(self.head(pooled).float(), dim=-1)

    forward = embed


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.entry = nn.BatchNorm2d(width)
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, features: Tensor) -> Tensor:
        features = self.entry(features).relu()
        return (features + self.block(features)).relu()


def train_grader(
    steps: int = GRADER_STEPS,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    characters: int = GRADER_CHARACTERS,
    learning_rate: float = 1e-3,
) -> Grader:
    """Trains the grader with the supervised contrastive loss (arXiv:2004.11362) on pictures rendered on the fly.

    Half of each batch is degraded as generated videos are: blurred, noisy, tinted.

    Args:
        steps: of so many characters with 4 pictures each.
        device: where to train.
        seed: of weights and pictures.
        characters: in a step, one in four of them geometric.
        learning_rate: peak of the one-cycle schedule.

    Returns:
        The grader, frozen, on `device`.

    Raises:
        UserError: for fewer than 4 characters, of whom none would be geometric.
    """
    require(characters >= 4, f"the grader cannot learn from {characters} characters a step: --batch_size 4 or more.")
    place = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grader = Grader()
    grader.to(place)
    optimizer = torch.optim.AdamW(grader.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=max(2, steps))
    loss_of = SupConLoss(temperature=0.1)
    progress = tqdm(range(steps), desc="grader", unit="step")
    for step in progress:
        images, labels = _draw_batch(step, seed, characters, place)
        with torch.autocast(place.type, torch.bfloat16, enabled=place.type == "cuda"):
            vectors = grader(images)
        loss = loss_of(vectors, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(grader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    # the running means lag behind the last steps; take them anew from batches that no step has seen
    fresh = (_draw_batch(steps + extra, seed, characters, place)[0] for extra in range(_SETTLING_BATCHES))
    update_bn(fresh, grader)
    return grader.eval().requires_grad_(False)


def _draw_batch(step: int, seed: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = keyed_generator(seed, "grader", step)
    pictures, labels = [], []
    shares: tuple[tuple[Domain, int], ...] = (("geometric", count // 4), ("creatures", count - count // 4))
    for domain, share in shares:
        ids = split_ids(domain, "general")
        chosen = torch.randperm(len(ids), generator=generator)[:share] + ids.start
        chosen = chosen.repeat_interleave(_PICTURES_PER_CHARACTER)
        pictures.append(render_anywhere(chosen, domain=domain, generator=generator, device=device))
        labels.append(chosen + (10_000 if domain == "geometric" else 0))
    return _degrade(torch.cat(pictures), keyed_seed(seed, "grader decay", step)), torch.cat(labels).to(device)


def render_anywhere(
    characters: Tensor,
    *,
    domain: Domain,
    generator: torch.Generator,
    size: int = 64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Renders stills [B, 3, size, size] whose characters stand anywhere in the frame, as they do late in a clip."""
    scenes = still_scenes(characters, domain=domain, generator=generator)
    radius = scenes.radius[:, None]
    start = radius + (1 - 2 * radius) * torch.rand(len(scenes), 2, generator=generator)
    return render(replace(scenes, start=start), size=size, device=device).video[:, :, 0]


def _degrade(images: Tensor, seed: int) -> Tensor:
    count, device = len(images), images.device
    # drawn on the device: three million normal numbers a step would keep an accelerator waiting
    generator = torch.Generator(device).manual_seed(seed)

    def dice(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, device=device)

    soft = functional.interpolate(functional.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    smeared = functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    blurred = torch.where(dice(1, 1, 1) < 0.5, soft, smeared)
    images = images + dice(1, 1, 1) * (blurred - images) * (dice(1, 1, 1) < 0.6)
    noise = torch.randn(images.shape, generator=generator, device=device)
    tint = (dice(3, 1, 1) - 0.5) * 0.16
    contrast = 1 + (dice(1, 1, 1) - 0.5) * 0.3
    changed = images * contrast + tint + 0.1 * dice(1, 1, 1) * noise
    return torch.where(dice(1, 1, 1) < 0.5, changed, images).clamp(-1, 1)


def save_grader(grader: Grader, path: str | Path) -> None:
    """Writes the weights as safetensors, fp16."""
    weights = {
        name: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in grader.state_dict().items()
    }
    save_file(weights, path, metadata={"format": _FORMAT, "widths": " ".join(map(str, grader.widths))})


def load_grader(path: str | Path, *, device: torch.device | str = "cpu") -> Grader:
    """Reads what `save_grader` wrote.

    Raises:
        UserError: if the file is missing or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise UserError(f"{path} holds no grader of this version: train one with `train_grader`.")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the grader {path} cannot be read ({error}): train one with `train_grader`.") from error
    grader = Grader([int(width) for width in header["widths"].split()])
    grader.load_state_dict(weights)
    return grader.to(device).eval().requires_grad_(False)
