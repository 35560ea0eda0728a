"""`vflora train-head`: teaches a projection head which pictures show the same character.

The DINOv3 backbone stays frozen; only a small MLP on top of it learns, with a supervised contrastive loss on
batches of P identities with K pictures each, degraded the way the identity loss will degrade them.
"""

from __future__ import annotations

import gc
import itertools
import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
import yaml
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from vflora.atomic import replace_file
from vflora.data.augment import VaeRoundTrip
from vflora.data.identities import HeadLoader, IdentityIndex
from vflora.determinism import deterministic
from vflora.devices import torch_device
from vflora.distributed.launch import process_count
from vflora.distributed.processes import World, claim_device
from vflora.errors import NonFiniteError
from vflora.head.checkpoint import LAST_HEAD_FILE, HeadState, save_state, starting_point
from vflora.head.config import HeadConfig
from vflora.head.learning import Learner
from vflora.head.picture import draw_validation
from vflora.head.validation import ValidationFeatures, validate
from vflora.head.validation_set import validation_features
from vflora.models.identity import FrozenBackbone
from vflora.models.projection_head import HEAD_FILE, HeadSpec, ProjectionHead, new_head, save_head
from vflora.random_streams import keyed_generator
from vflora.run_folder import leave_later, reserved
from vflora.run_log import RunLog
from vflora.settings import flat_settings
from vflora.stopping import stop_requests

__all__ = ["HeadConfig", "run"]

logger = logging.getLogger(__name__)


def run(config: HeadConfig) -> Path:
    """Trains, and returns the folder that holds identity_head.safetensors, the best head so far.

    Raises:
        UserError: for bad input, and NonFiniteError where a loss or gradient is not finite.
    """
    device = torch_device(config.device)
    claim_device(device, process_count())
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    world = World(accelerator.process_index, accelerator.num_processes)
    with deterministic(config.deterministic, device), ExitStack() as closing:
        world.from_main(lambda: closing.enter_context(reserved(config.output_dir, config.resume_from_checkpoint)))
        training = _set_up(config, accelerator)
        try:
            with stop_requests() as stop_requested:
                training.loop(stop_requested)
        finally:
            training.loader.close()
            if training.log:
                training.log.close()
    if accelerator.num_processes > 1:
        # The wrapper that averages gradients must not be the last to hold the process group: it would wait for the
        # group's threads with Python's lock in its hand, and they may be waiting for that lock.
        del training
        accelerator.free_memory()
        gc.collect()
        accelerator.end_training()
    return config.output_dir


@dataclass
class _Training:
    """A run in progress."""

    config: HeadConfig
    accelerator: Accelerator
    learner: Learner
    loader: HeadLoader
    head: ProjectionHead
    settings: dict[str, object]
    features: ValidationFeatures | None
    log: RunLog | None
    step: int
    best: tuple[float, ...] = field(default=())

    def loop(self, stop_requested) -> None:
        """Trains until the last step, or until somebody asks to stop."""
        config, main = self.config, self.accelerator.is_main_process
        if self.features and self.log and self.step == 0:
            raw = validate(self.features, None)
            self.log.scalars(0, {f"backbone/{k}": v for k, v in raw.numbers().items()})
            draw_validation(raw, "DINOv3 without a head", config.output_dir / "validation" / "backbone.png")
        bar = tqdm(total=config.total_steps, initial=self.step, desc="training the head", unit="step", disable=not main)
        with bar:
            while self.step < config.total_steps:
                metrics = self._learn()
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", MAP=f"{self.best[0]:.3f}" if self.best else "-")
                last = self.step == config.total_steps
                if self.log and (self.step % config.log_every == 0 or last):
                    self.log.scalars(self.step, metrics)
                if config.val_every and (self.step % config.val_every == 0 or last):
                    self._validate()
                stopping = self._anyone(stop_requested())
                if self.step % config.save_every == 0 or last or stopping:
                    self._save()
                if stopping and not last:
                    logger.warning("Stopped after step %d; --resume_from_checkpoint latest goes on.", self.step)
                    return
        logger.info("All %d steps are done; the head is %s.", self.step, config.output_dir / HEAD_FILE)

    def _learn(self) -> dict[str, float]:
        batches = itertools.islice(self.loader, self.config.grad_accum)
        try:
            metrics = self.learner.step(batches, self.step * self.config.grad_accum)
        except NonFiniteError as error:
            raise NonFiniteError(error.part, self.step + 1) from None
        self.step += 1
        return metrics

    def _validate(self) -> None:
        if self.features is None or self.log is None:
            return
        found = validate(self.features, self.head)
        self.log.scalars(self.step, {f"val/{name}": value for name, value in found.numbers().items()})
        picture = self.config.output_dir / "validation" / f"step-{self.step:06d}.png"
        draw_validation(found, f"step {self.step}", picture)
        if found.rank > self.best:
            self.best = found.rank
            replace_file(self.config.output_dir / HEAD_FILE, lambda path: save_head(self.head, path))

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            optimizer, schedule = self.learner.optimizer.state_dict(), self.learner.schedule.state_dict()
            state = HeadState(self.step, self.head, optimizer, schedule, self.best, self.settings)
            save_state(state, self.config.output_dir, self.config.keep_checkpoints)
            for name in [LAST_HEAD_FILE] if self.best else [LAST_HEAD_FILE, HEAD_FILE]:
                replace_file(self.config.output_dir / name, lambda path: save_head(self.head, path))
        self.accelerator.wait_for_everyone()

    def _anyone(self, wish: bool) -> bool:
        """Whether any process was asked to stop: all of them must leave the loop after the same step."""
        if self.accelerator.num_processes == 1:
            return wish
        flag = torch.tensor([float(wish)], device=self.accelerator.device)
        return cast(torch.Tensor, self.accelerator.reduce(flag)).item() > 0


def _set_up(config: HeadConfig, accelerator: Accelerator) -> _Training:
    index = IdentityIndex.open(
        config.wds_root, config.id_key, split="train", shards=config.train_shards, manifest=str(config.train_manifest)
    )
    settings = config.recipe() | {"data set": index.fingerprint, "processes": accelerator.num_processes}
    resumed = starting_point(config.resume_from_checkpoint, config.output_dir, settings)
    step = resumed.step if resumed else 0
    loader = HeadLoader(
        index,
        identities=config.pk_identities,
        instances=config.pk_instances,
        max_per_identity=config.max_per_identity,
        num_workers=config.num_workers,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_batch=step * config.grad_accum,
        max_bad_samples=config.max_bad_samples,
    )
    backbone = FrozenBackbone.load(config.model_dir, accelerator.device, config.torch_dtype)
    round_trip = _load_vae(config, accelerator.device)
    head = resumed.head if resumed else _untrained(config, backbone)
    head.check_width(backbone.width, f"in {config.output_dir}")
    features = log = None
    if accelerator.is_main_process:
        if config.val_every:
            features = validation_features(_validation_index(config), config, backbone, round_trip)
        leave_later(config.output_dir, step)
        log = RunLog(config.output_dir, config.logger, start_step=step, config=flat_settings(config))
        written = yaml.safe_dump(flat_settings(config), sort_keys=False)
        replace_file(config.output_dir / "config.yaml", lambda path: path.write_text(written))
    learner = _learner(config, accelerator, backbone, round_trip, head)
    if resumed:
        learner.optimizer.load_state_dict(resumed.optimizer)
        learner.schedule.load_state_dict(resumed.schedule)
    best = resumed.best if resumed else ()
    return _Training(config, accelerator, learner, loader, head, settings, features, log, step, best)


def _validation_index(config: HeadConfig) -> IdentityIndex:
    return IdentityIndex.open(
        config.wds_root, config.id_key, split="val", shards=config.val_shards, manifest=str(config.val_manifest)
    )


def _load_vae(config: HeadConfig, device: torch.device) -> VaeRoundTrip | None:
    if config.vae_folder is None:
        return None
    # As in the LoRA's training, so that the pictures come out the same.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return VaeRoundTrip.load(config.vae_folder, config.augment_vae_side, device, dtype)


def _untrained(config: HeadConfig, backbone: FrozenBackbone) -> ProjectionHead:
    spec = HeadSpec(
        in_width=backbone.width,
        dims=tuple(config.proj_dims),
        activation=config.activation,
        layernorm=config.layernorm,
        dropout=config.dropout,
        backbone=backbone.name,
    )
    return new_head(spec, keyed_generator(config.seed, "head"))


def _learner(
    config: HeadConfig,
    accelerator: Accelerator,
    backbone: FrozenBackbone,
    round_trip: VaeRoundTrip | None,
    head: ProjectionHead,
) -> Learner:
    head.to(accelerator.device).train()
    wrapped = accelerator.prepare_model(head)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
    )
    schedule = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=round(config.warmup_ratio * config.total_steps),
        num_training_steps=config.total_steps,
    )
    return Learner(config, accelerator, backbone, round_trip, wrapped, optimizer, schedule)
