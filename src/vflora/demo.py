"""`vflora demo`: the whole story in minutes, on pictures that the project draws and small models of the real classes.

The models are those of the miniature world: trained on videos of geometric characters, they have never seen the
creatures that the demo teaches them, so those change their looks as soon as they move. That drift, and how much of
it the LoRA takes away, is what the report shows.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from vflora import compare, export, train
from vflora.atomic import require_writable
from vflora.cli import parse
from vflora.errors import UserError
from vflora.run_folder import finished
from vflora.world.grader import load_grader
from vflora.world.head_training import fit_head, pack_stills
from vflora.world.stills import write_still_folder

logger = logging.getLogger(__name__)

_PICTURES = 12
_NOTICE = (
    "A demonstration on small models: the classes of HunyuanVideo-1.5 and DINOv3 with 14, 4 and 1 million parameters, "
    "trained in a miniature world of 64 x 64 pixels. Drift and its cure are real here; their size says nothing about "
    "the full model. The identity head has met {known}. Identity is graded by a network that took no part in the "
    "training of base, head or LoRA. Shown are the characters that the LoRA was taught, on pictures that it was not."
)


@dataclass(frozen=True)
class DemoConfig:
    """The demo."""

    output: Path = Path("demo-run")
    """Folder for everything the demo makes; it must not exist yet."""
    characters: int = 8
    """Creatures to teach."""
    head_steps: int = 0
    """Steps of an identity head of the demo's own; 0 takes the one that ships, which has met 384 creatures."""
    train_steps: int = 100
    """Steps of the LoRA."""
    rows: int = 6
    """Creatures in the report."""
    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        if not 4 <= self.characters <= 64:
            raise UserError(f"--characters {self.characters} is out of range: use 4 to 64.")
        if self.head_steps < 0:
            raise UserError("--head_steps must not be negative.")
        for name in ("train_steps", "rows"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1.")


class WorldJudge:
    """The miniature world's own grader, which shares nothing with DINOv3."""

    name = "the world's own grader, a small network trained apart from everything else"

    def __init__(self, path: Path):
        """Loads it."""
        self.embed = load_grader(path).embed


def world_folder() -> Path:
    """Returns the folder of the small models that ship with the package: a diffusers pipeline with DINOv3 in dino/."""
    return Path(str(resources.files("vflora.world") / "assets"))


def run(config: DemoConfig) -> Path:
    """Pictures, shards, head, LoRA, export, report.

    Returns:
        The report.

    Raises:
        UserError: if the output folder holds something, or cannot be made.
    """
    require_writable(config.output, "--output")
    if config.output.exists() and any(config.output.iterdir()):
        raise UserError(f"{config.output} exists: remove it, or name another folder with --output.")
    began = time.monotonic()
    here, world = config.output, str(world_folder())
    bank = str(resources.files("vflora.world") / "prompts.yaml")
    creatures = {"domain": "creatures", "split": "train", "limit": config.characters}

    _announce("1/6", f"drawing {_PICTURES} pictures of each of {config.characters} creatures")
    write_still_folder(here / "pictures", per_character=_PICTURES, seed=config.seed, **creatures)
    write_still_folder(here / "references", per_character=1, seed=config.seed + 1, **creatures)

    _announce("2/6", "packing them into a data set")
    pack_stills(here / "pictures", here / "data")

    head = _head(config, world)

    _announce("4/6", "training the LoRA: no video anywhere")
    flags = ["--pipeline_dir", world, "--wds_root", str(here / "data"), "--metadata_key", "character"]
    flags += ["--dino_model_dir", f"{world}/dino", "--dino_head_path", head, "--prompt_bank", bank]
    flags += ["--output_dir", str(here / "lora"), "--train_target_resolution", "64x64", "--dtype", "fp32"]
    flags += ["--num_inference_steps", "12", "--max_train_steps", str(config.train_steps), "--warmup_steps", "5"]
    # So few steps need a rate that a long training would not survive.
    flags += ["--learning_rate", "2.5e-3", "--lambda_id", "2.0", "--p_secondary", "0.5", "--num_workers", "0"]
    # By place and with nothing below, rollouts end sooner: a third of a step's time.
    flags += ["--id_sigma_low", "null", "--id_sigma_high", "null", "--harvest_below", "0"]
    # Exact, and half of the decoder's time; memory is no matter at 64 x 64.
    flags += ["--id_decode_recompute", "false"]
    flags += ["--seed", str(config.seed)]
    train.run(parse("train", flags))
    checkpoint = finished(here / "lora", config.train_steps)

    _announce("5/6", "exporting the adapter")
    adapter = here / "adapter"
    export.run(parse("export", ["--checkpoint_path", str(checkpoint), "--output_dir", str(adapter)]))

    _announce("6/6", "base and LoRA side by side")
    flags = ["--pipeline_dir", world, "--lora_path", str(adapter), "--images", str(here / "references")]
    flags += ["--output_dir", str(here / "comparison"), "--prompt_bank", bank, "--max_rows", str(config.rows)]
    flags += ["--lora_scales", "0.5", "1.0", "--video_length", "17", "--num_inference_steps", "20", "--fps", "8"]
    flags += ["--dtype", "fp32", "--title", "Video-Free LoRA: the demo"]
    known = "these creatures alone" if config.head_steps else "384 creatures in stills, these among them"
    flags += ["--notice", _NOTICE.format(known=known)]
    flags += ["--dino_model_dir", f"{world}/dino", "--dino_head_path", head]
    compare.run(parse("compare", flags), judge=WorldJudge(world_folder() / "grader.safetensors"))
    report = here / "report.html"
    shutil.copyfile(here / "comparison" / "index.html", report)
    logger.info(
        "\ndone in %.0f s\n  report   %s\n  adapter  %s\n  videos   %s",
        time.monotonic() - began,
        report,
        adapter,
        here / "comparison" / "videos",
    )
    return report


def _head(config: DemoConfig, world: str) -> str:
    """Returns the folder of the identity head."""
    if config.head_steps == 0:
        _announce("3/6", "taking the identity head that ships: it has met 384 creatures, and none of them moved")
        return f"{world}/head"
    _announce("3/6", "training the identity head")
    data, head = config.output / "data", config.output / "head"
    fit_head(Path(world) / "dino", data, head, steps=config.head_steps, identities=4, seed=config.seed)
    return str(head)


def _announce(part: str, what: str) -> None:
    logger.info("\n[%s] %s", part, what)
