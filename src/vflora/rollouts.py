"""`vflora rollouts`: the teacher's part of a training run, made ahead by any number of processes, kept on disk.

The processes do not talk to each other. Which rollouts are whose follows from their numbers, a shard that is there is
whole, and whoever starts makes what is missing of its share: so they may stop, fail and go on one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vflora.atomic import require_space, require_writable, write_or_refuse
from vflora.clips import as_sampled, noise_levels
from vflora.config import TORCH_DTYPES, require
from vflora.data.schema import DataSet
from vflora.determinism import deterministic
from vflora.distributed.launch import process_count, process_number
from vflora.distributed.processes import claim_device
from vflora.errors import UserError
from vflora.folder_lock import held
from vflora.settings import RolloutsSettings, TrainSettings
from vflora.stopping import stop_requests
from vflora.trajectories.folder import Manifest, begin, read_manifest, shard_folder
from vflora.trajectories.plan import Plan, gaps, shares
from vflora.trajectories.provenance import SLOTS, recipe_of, require_same
from vflora.trajectories.shards import ShardFile, clear_unfinished, find_shards
from vflora.trajectories.teacher import Guide

logger = logging.getLogger(__name__)

_SPARE_BYTES = 64 << 20


def run(settings: RolloutsSettings) -> Path:
    """Makes this process's share of what is missing, and returns the folder.

    Raises:
        UserError: for bad input, or if the folder was begun otherwise, or another launch is at work in it.
    """
    folder = settings.run.trajectory_dir
    if folder is None:
        raise UserError("vflora rollouts needs --trajectory_dir: the folder that it shall fill.")
    rank, size = process_number(), process_count()
    device = settings.model.torch_device()
    claim_device(device, size)
    dataset = DataSet.open(settings.data.wds_root, settings.data.metadata_key, "train")
    noise_levels(settings)  # a pipeline that is not there must not begin a folder
    settings = as_sampled(settings)
    require_writable(folder, "--trajectory_dir")
    with (
        held(folder, "--trajectory_dir", rank=rank, size=size),
        deterministic(settings.speed.is_deterministic, device),  # the kernels of a training that rolls out itself
    ):
        _fill(settings, dataset, folder, rank, size)
    return folder


def _fill(settings: RolloutsSettings, dataset: DataSet, folder: Path, rank: int, size: int) -> None:
    manifest, is_new = _manifest(settings, dataset, folder, size)
    if rank == 0:
        clear_unfinished(shard_folder(folder), size)

    wanted = range(manifest.plan.rollouts(settings.optimizer.max_train_steps))
    missing = gaps(find_shards(shard_folder(folder)).values(), wanted)
    mine = shares(missing, per_shard=manifest.per_shard, rank=rank, size=size)
    if not mine:
        logger.info("%s holds all of this process's rollouts already", folder)
        return
    everything = sum(map(len, shares([wanted], per_shard=manifest.per_shard, rank=rank, size=size)))
    guide = Guide.load(_split_as(settings, manifest), dataset, manifest.plan, mine)
    per_rollout = guide.bytes_per_rollout(TORCH_DTYPES[manifest.dtype])
    require_space(
        folder,
        per_rollout * sum(map(len, missing)) + _SPARE_BYTES,
        "make room, lower --max_train_steps, or use --trajectory_dtype bf16 in another --trajectory_dir.",
    )
    if is_new:  # not before it is clear that nothing stands in the way: what is refused leaves no folder
        _begin(folder, manifest, settings.yaml(), rank)
    done = everything - sum(map(len, mine))
    done = _write(guide, mine, folder, manifest, rank, progress={"total": everything, "initial": done})
    if done < everything:
        logger.warning("stopped after %d of %d rollouts; the same line goes on from there", done, everything)


def _manifest(settings: RolloutsSettings, dataset: DataSet, folder: Path, size: int) -> tuple[Manifest, bool]:
    """Reads the manifest and compares it with the settings, or makes one; returns also whether it is new."""
    found, storage, batch_size = read_manifest(folder), settings.storage, settings.data.batch_size
    processes = settings.ahead.train_processes or (found.processes if found else size)
    recipe = recipe_of(settings, dataset, processes * batch_size)
    if found is None:
        plan = Plan.of(settings, processes)
        per_process = -(-plan.rollouts(settings.optimizer.max_train_steps) // size)
        per_shard = min(storage.rollouts_per_shard, per_process)
        return Manifest.of(recipe, plan, per_shard=per_shard, dtype=storage.trajectory_dtype), True
    require_same(found.recipe, recipe, folder, verb="go on")
    dtype = storage.trajectory_dtype
    require(
        dtype == found.dtype,
        f"{folder} was begun with --trajectory_dtype {found.dtype} and not {dtype}: go on with that.",
    )
    return found, False


def _begin(folder: Path, manifest: Manifest, settings_yaml: str, rank: int) -> None:
    """Begins the folder, unless another process has, while this one was loading its models.

    Raises:
        UserError: if that one was told otherwise.
    """
    begun = read_manifest(folder)
    if begun is None:
        begin(folder, manifest, settings_yaml, rank)
        return
    require_same(begun.recipe, manifest.recipe, folder, verb="go on")
    require(begun == manifest, f"{folder} was begun with other flags just now: give all of its processes the same.")


def _split_as(settings: RolloutsSettings, manifest: Manifest) -> TrainSettings:
    """Cuts the global batch as the folder has it, and leaves out what only the student needs."""
    return replace(
        settings,
        data=replace(settings.data, batch_size=manifest.recipe[SLOTS] // manifest.processes),
        lora=replace(settings.lora, pretrained_lora_path=None),
    )


def _write(
    guide: Guide, mine: list[range], folder: Path, manifest: Manifest, rank: int, *, progress: dict[str, Any]
) -> int:
    """Makes one shard after the other, and returns how many rollouts of this process's share are there then."""
    dtype, rollouts = TORCH_DTYPES[manifest.dtype], guide.rollouts()
    with (
        stop_requests() as stop_requested,
        tqdm(desc="rolling out", unit="rollout", disable=rank > 0, **progress) as bar,
    ):
        done = progress["initial"]
        for part in mine:
            shard = ShardFile(shard_folder(folder), part.start, rank)
            try:
                for _ in part:
                    if stop_requested():
                        break
                    samples = next(rollouts).packed(dtype)
                    _told(lambda shard=shard, samples=samples: shard.add(samples), folder)
                    done += 1
                    bar.update()
                _told(shard.finish, folder)
            finally:
                shard.discard()
            if stop_requested():
                break
        guide.close()
    return done


def _told(write: Callable[[], None], folder: Path) -> None:
    write_or_refuse(write, "shard", folder, go_on="run the same line again")
