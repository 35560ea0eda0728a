"""What all arms of an ablation share: settings, pictures, data sets and line-ups."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import torch

from vflora.atomic import write_folder
from vflora.config import require
from vflora.devices import torch_device
from vflora.models.projection_head import HEAD_FILE
from vflora.world.ablation.place_bound import train_place_bound
from vflora.world.characters import Domain
from vflora.world.grader import load_grader
from vflora.world.head_training import pack_stills
from vflora.world.retrieval import make_lineup
from vflora.world.stills import write_still_folder

DOMAINS: tuple[Domain, ...] = ("geometric", "creatures")


@dataclass(frozen=True)
class LabConfig:
    """What every arm has in common."""

    output: Path = Path("ablation")
    """Folder of the ablation; what is finished in it is not done again."""
    world: Path | None = None
    """Folder of the world's models; by default those that ship with the package."""
    recipe: Path | None = None
    """YAML file of training flags for the arms that train with the recipe; by default the package's defaults."""
    split: Literal["dev", "test"] = "dev"
    """Who sits the exam: dev for tuning; test is opened once, when all is decided."""
    steps: int = 200
    """Optimizer steps of every arm."""
    batch_size: int = 8
    """Samples per step of every arm."""
    learning_rate: float = 2e-3
    """Peak of every arm; so few steps need more than a long training would."""
    characters: int = 384
    """Creatures that are taught, of the split train."""
    pictures: int = 12
    """Stills of each."""
    exam_clips: int = 128
    """Held-out creatures' clips that each arm is graded on."""
    sampling_steps: int = 25
    """Steps of sampling in the exam."""
    device: str = "auto"
    """Where to compute: auto takes the accelerator if there is one, else the CPU."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "exam_clips", "sampling_steps"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1.")
        require(self.pictures >= 2, f"--pictures {self.pictures} leaves none to hold back: use 2 or more.")
        require(4 <= self.characters <= 384, f"--characters {self.characters} is out of range: use 4 to 384.")

    def torch_device(self) -> torch.device:
        """Returns the device that `device` stands for."""
        return torch_device(self.device)

    @property
    def dtype(self) -> str:
        """Precision of the frozen weights: bf16 where it is quick."""
        return "fp32" if self.torch_device().type == "cpu" else "bf16"

    @property
    def world_folder(self) -> Path:
        """Where the world's models are."""
        return self.world or Path(str(resources.files("vflora.world") / "assets"))

    def data_root(self, *, mixed: bool) -> Path:
        """Returns the data set that an arm trains on."""
        return self.output / "shared" / ("mixed" if mixed else "data")

    @property
    def grader_file(self) -> Path:
        """Where the grader is."""
        return self.world_folder / "grader.safetensors"

    def lineup_file(self, domain: Domain) -> Path:
        """Returns where the line-up of a domain is."""
        return self.output / "shared" / "lineups" / f"{domain}.safetensors"

    def embedder_folder(self, *, place_bound: bool = False) -> Path:
        """Returns the folder with the dino/ and the head/ that an arm's identity loss sees through."""
        return self.output / "shared" / "place-bound" if place_bound else self.world_folder


def prepare(lab: LabConfig, *, place_bound: bool = False) -> None:
    """Draws the pictures, packs them, and lines everybody up for the grader: once.

    Args:
        lab: what all arms share.
        place_bound: train the place-bound embedder too.

    Raises:
        UserError: for settings that the parts refuse, or a world without a head.
    """
    head = lab.embedder_folder() / "head"
    require(
        (head / HEAD_FILE).is_file(),
        f"There is no identity head in {head}: train it with `vflora world pretrain --stage head`.",
    )
    shared = lab.output / "shared"
    plain, mixed = shared / "pictures" / "plain", shared / "pictures" / "mixed"
    _once(plain.parent, lambda to: _draw(lab, to / plain.name, to / mixed.name))
    _once(lab.data_root(mixed=False), lambda to: pack_stills(plain, to))
    _once(lab.data_root(mixed=True), lambda to: pack_stills(mixed, to))
    _once(lab.lineup_file("creatures").parent, lambda to: _line_up(lab, to))
    if place_bound:
        own = lab.embedder_folder(place_bound=True)
        _once(own, lambda to: train_place_bound(lab.world_folder, to, device=lab.torch_device()))


def _once(target: Path, fill: Callable[[Path], object]) -> None:
    if not target.exists():
        write_folder(target, lambda folder: fill(folder) and None)


def _draw(lab: LabConfig, plain: Path, mixed: Path) -> None:
    """Draws the stills, and again with all characters of one nickname together: a namesake is a stranger."""
    write_still_folder(
        plain, domain="creatures", split="train", per_character=lab.pictures, seed=0, limit=lab.characters
    )
    for character in sorted(plain.iterdir()):
        crowd = mixed / character.name.split()[-1]
        crowd.mkdir(parents=True, exist_ok=True)
        for picture in character.iterdir():
            shutil.copyfile(picture, crowd / f"{character.name.replace(' ', '-')}-{picture.name}")


def _line_up(lab: LabConfig, output: Path) -> None:
    grader = load_grader(lab.grader_file, device=lab.torch_device())
    for domain in DOMAINS:
        make_lineup(grader, domain=domain).save(output / lab.lineup_file(domain).name)
