"""A folder of trajectories: what it was made from, and how far it goes.

DIR/
    manifest.json   the recipe, its fingerprint, and how the rollouts are counted
    config.yaml     the settings, for going on with `vflora rollouts --config DIR/config.yaml`
    conditions/     encoded prompts and pictures, unless --condition_cache says otherwise
    shards/         the trajectories
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vflora.atomic import MANIFEST, replace_file
from vflora.data.schema import DataSet
from vflora.errors import UserError
from vflora.settings import TrainSettings
from vflora.trajectories.plan import Plan, gaps
from vflora.trajectories.provenance import fingerprint, recipe_of, require_same
from vflora.trajectories.shards import find_shards, require_whole

FORMAT = 1
SETTINGS = "config.yaml"


@dataclass(frozen=True)
class Manifest:
    """What the rollouts of a folder have in common.

    Attributes:
        recipe: as `recipe_of` returns it.
        fingerprint: of the recipe.
        processes: data-parallel processes that the rollouts are counted for.
        accumulation: micro-batches of an optimizer step.
        reuse: optimizer steps that share a rollout.
        per_shard: rollouts in a full shard.
        dtype: of latents and velocities on disk: fp32 is exact.
        format: of the folder.
    """

    recipe: dict[str, Any]
    fingerprint: str
    processes: int
    accumulation: int
    reuse: int
    per_shard: int
    dtype: str
    format: int = FORMAT

    @classmethod
    def of(cls, recipe: dict[str, Any], plan: Plan, *, per_shard: int, dtype: str) -> Manifest:
        """Returns the manifest of a folder that is about to begin."""
        return cls(recipe, fingerprint(recipe), plan.processes, plan.accumulation, plan.reuse, per_shard, dtype)

    @property
    def plan(self) -> Plan:
        """How the rollouts are counted."""
        return Plan(self.processes, self.accumulation, self.reuse)


def read_manifest(folder: Path) -> Manifest | None:
    """Returns the manifest of a folder, or None where there is none yet.

    Raises:
        UserError: if it cannot be used.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): choose another --trajectory_dir.") from error
    if manifest.format != FORMAT or manifest.fingerprint != fingerprint(manifest.recipe):
        raise UserError(f"{path} is damaged or of another version of vflora: choose another --trajectory_dir.")
    return manifest


def begin(folder: Path, manifest: Manifest, settings_yaml: str, rank: int) -> None:
    """Makes the folder; processes that begin together write the same."""
    shard_folder(folder).mkdir(parents=True, exist_ok=True)
    texts = {SETTINGS: settings_yaml, MANIFEST: json.dumps(asdict(manifest), indent=1)}
    for name, text in texts.items():
        replace_file(folder / name, _writes(text), writer=f"-{rank}")


def _writes(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def shard_folder(folder: Path) -> Path:
    """Returns where the shards are."""
    return folder / "shards"


def condition_folder(settings: TrainSettings) -> Path | None:
    """Returns where encoded prompts and pictures are kept: beside the trajectories, unless a flag says otherwise."""
    if settings.prompts.condition_cache or settings.run.trajectory_dir is None:
        return settings.prompts.condition_cache
    return settings.run.trajectory_dir / "conditions"


@dataclass(frozen=True)
class Trajectories:
    """A folder that a training run may read.

    Attributes:
        shards: the rollouts that each finished shard holds.
        plan: how they are counted.
        slots: samples of a micro-batch over all processes.
    """

    shards: dict[Path, range]
    plan: Plan
    slots: int


def open_trajectories(
    settings: TrainSettings, dataset: DataSet, processes: int, start_step: int
) -> Trajectories | None:
    """Returns the trajectories that `--trajectory_dir` names, for a run from `start_step` on; None without the flag.

    Args:
        settings: of the run.
        dataset: that it trains on.
        processes: data-parallel ones.
        start_step: optimizer steps done.

    Raises:
        UserError: if there are none, they are of another recipe, damaged, or end before the run does.
    """
    folder = settings.run.trajectory_dir
    if folder is None:
        return None
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"--trajectory_dir {folder} holds no trajectories: make them with the same line and `vflora rollouts` for "
            "`vflora train`, or drop the flag."
        )
    slots = processes * settings.data.batch_size
    require_same(manifest.recipe, recipe_of(settings, dataset, slots), folder, verb="train")
    shards = find_shards(shard_folder(folder))
    _require_enough(folder, shards, manifest.plan, start_step=start_step, steps=settings.optimizer.max_train_steps)
    return Trajectories(shards, manifest.plan, slots)


def _require_enough(folder: Path, shards: dict[Path, range], plan: Plan, *, start_step: int, steps: int) -> None:
    # A resumed run needs the whole block that its first step is in.
    wanted = range(plan.rollouts(start_step // plan.reuse * plan.reuse), plan.rollouts(steps))
    missing = gaps(shards.values(), wanted)
    if missing:
        raise UserError(
            f"{folder} holds the first {plan.steps(missing[0].start)} of the {steps} steps that --max_train_steps asks "
            f"for: extend it with `vflora rollouts --config {folder / SETTINGS} --trajectory_dir {folder} "
            f"--max_train_steps {steps}`."
        )
    for shard, rollouts in shards.items():
        if rollouts.stop > wanted.start and rollouts.start < wanted.stop:
            require_whole(shard)


def without_rollouts(settings: TrainSettings) -> TrainSettings:
    """Returns settings that set up no faster rollouts where there are none: a run from disk trains on any device."""
    if settings.run.trajectory_dir is None:
        return settings
    return replace(
        settings, speed=replace(settings.speed, rollout_precision="full", rollout_stride=1, rollout_graphs=False)
    )
