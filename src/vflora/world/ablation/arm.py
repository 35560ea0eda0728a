"""`vflora world arm`: trains one arm of the ablation with one seed, and lets it sit the exam."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from vflora import train
from vflora.atomic import replace_file
from vflora.cli import parse
from vflora.config import require
from vflora.run_folder import finished
from vflora.world.ablation.arms import Arm, arm_named
from vflora.world.ablation.exam import examine
from vflora.world.ablation.finetune import finetune
from vflora.world.ablation.lab import LabConfig, prepare

logger = logging.getLogger(__name__)

RESULT = "result.json"
FRAMES = "frames.png"


@dataclass(frozen=True)
class ArmConfig:
    """One arm."""

    arm: str
    """Which: base, frozen, oracle, identity, distillation, recipe, or the recipe with something taken away or added."""
    seed: int = 0
    """Of everything random; arms of one seed are paired."""

    def __post_init__(self) -> None:
        arm_named(self.arm)
        require(self.seed >= 0, "--seed must not be negative.")


@dataclass(frozen=True)
class ArmSettings:
    """What all arms share, and which arm."""

    lab: LabConfig
    arm: ArmConfig


def run(settings: ArmSettings) -> Path:
    """Trains and examines; a part that is finished is not done again.

    Returns:
        The file of the result.
    """
    lab, arm, seed = settings.lab, arm_named(settings.arm.arm), settings.arm.seed
    folder = arm_folder(lab, settings.arm.arm, seed)
    result = folder / RESULT
    if result.exists():
        return result
    prepare(lab, place_bound=arm.place_bound)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    adapter = _train(lab, arm, folder, seed)
    trained = time.monotonic()
    marks = examine(lab, adapter, folder / FRAMES, seed=seed, own_domain=arm.kind == "none")
    found: dict[str, Any] = {
        "arm": settings.arm.arm,
        "seed": seed,
        "split": lab.split,
        "steps": lab.steps,
        "batch_size": lab.batch_size,
        "learning_rate": lab.learning_rate,
        "training_seconds": trained - began,
        "exam_seconds": time.monotonic() - trained,
        **_shares(folder),
        **asdict(marks),
    }
    replace_file(result, lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))
    logger.info("%s, seed %d: %s", arm.title, seed, {k: round(v, 3) for k, v in marks.numbers.items()})
    return result


def arm_folder(lab: LabConfig, arm: str, seed: int) -> Path:
    """Returns the folder of one arm with one seed."""
    return lab.output / "arms" / f"{arm}-{seed}"


def _train(lab: LabConfig, arm: Arm, folder: Path, seed: int) -> Path | None:
    if arm.kind == "none":
        return None
    if arm.kind == "flow_matching":
        adapter = folder / "adapter.safetensors"
        return adapter if adapter.exists() else finetune(lab, adapter, still=arm.still, seed=seed)
    last = folder / "lora" / f"checkpoint-{lab.steps}"
    if not last.exists():
        train.run(parse("train", train_flags(lab, arm, folder, seed)))
    return finished(folder / "lora", lab.steps) / "lora"


def train_flags(lab: LabConfig, arm: Arm, folder: Path, seed: int) -> list[str]:
    """Returns the flags of `vflora train`: the defaults but for size, length, batch, warm-up and learning rate."""
    world = str(lab.world_folder)
    flags = ["--config", str(lab.recipe)] if lab.recipe else []
    embedder = lab.embedder_folder(place_bound=arm.place_bound)
    flags += ["--pipeline_dir", world, "--dino_model_dir", f"{embedder}/dino", "--dino_head_path", f"{embedder}/head"]
    flags += ["--wds_root", str(lab.data_root(mixed=arm.mixed)), "--metadata_key", "character"]
    flags += ["--prompt_bank", str(resources.files("vflora.world") / "prompts.yaml"), "--condition_lookahead", "32"]
    # Arms of one seed see the same pictures with the same prompts.
    flags += ["--condition_cache", str(lab.output / "shared" / "conditions")]
    flags += ["--train_target_resolution", "64x64", "--dtype", lab.dtype, "--device", lab.device]
    flags += ["--max_train_steps", str(lab.steps), "--warmup_steps", str(lab.steps // 20), "--seed", str(seed)]
    flags += ["--learning_rate", str(lab.learning_rate), "--batch_size", str(lab.batch_size)]
    flags += ["--id_decode_recompute", "false"]
    # One process less to start: a picture of 64 x 64 is read in no time.
    flags += ["--num_workers", "0", "--secondary_cache_max_size", "512"]
    if lab.torch_device().type == "cuda":
        # The same kernels, but for the order of sums; models this small wait for Python most of the time.
        flags += ["--rollout_graphs", "true", "--student_graphs", "true"]
    flags += ["--output_dir", str(folder / "lora"), "--save_every_steps", str(lab.steps), "--log_every_steps", "1"]
    flags += ["--logger", "none", "--resume_from_checkpoint", "auto"]
    return [*flags, *arm.flags]


def _shares(folder: Path) -> dict[str, float]:
    """Where the time of a step went, as shares: reading and encoding must never keep the model waiting."""
    metrics = folder / "lora" / "metrics.jsonl"
    if not metrics.exists():
        return {}
    rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if "seconds/step" in row]
    whole = fmean(row["seconds/step"] for row in rows)
    parts = sorted({key for row in rows for key in row if key.startswith("seconds/")} - {"seconds/step"})
    shares = {f"share/{p.split('/')[1]}": fmean(row.get(p, 0.0) for row in rows) / whole for p in parts}
    return {"seconds_per_step": whole, **shares}
