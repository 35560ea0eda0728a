"""The student: the frozen base model with a LoRA on it, on its device. Without the LoRA it is the teacher."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from vflora.adapters import read_adapter
from vflora.config import require
from vflora.distributed.modes import WHOLE_BASE
from vflora.distributed.processes import ALONE, World
from vflora.distributed.sequence_parallel import enable_context_parallel
from vflora.distributed.sharding import fill_shards, shard
from vflora.errors import UserError
from vflora.models.denoiser import Denoiser
from vflora.models.loading import open_transformer
from vflora.models.lora import ADAPTER, add_lora
from vflora.models.speed import Acceleration, accelerate
from vflora.models.speed_config import SpeedConfig
from vflora.models.streamed_weights import fill
from vflora.random_streams import keyed_noise
from vflora.settings import TrainSettings
from vflora.types import Conditions

logger = logging.getLogger(__name__)


def build_student(
    settings: TrainSettings,
    dtype: torch.dtype,
    device: torch.device,
    world: World = ALONE,
) -> tuple[Denoiser, Acceleration]:
    """Loads the base model into main memory, adds the LoRA, and places both on `device` as the speed settings say.

    Several processes hold a share of the base each, unless they are told not to; each reads its share only.

    Raises:
        UserError: if the model, the layers to train or the LoRA to start from do not fit, or the device lacks what a
            setting needs.
    """
    model, lora = settings.model, settings.lora
    sharded = world.size > 1 and settings.distributed.enable_fsdp
    require_shareable(settings.speed, sharded=sharded)
    require(
        not (settings.speed.student_graphs and lora.lora_dropout > 0),
        "--student_graphs would drop the same inputs at every step: set it to false, or drop --lora_dropout.",
    )
    transformer, files = open_transformer(model.pipeline_dir, model.transformer_version, dtype)
    if not sharded:
        if world.size > 1:  # said whoever chose it: a mode, a flag, or the settings of a run that goes on
            logger.info("each of the %d processes keeps the whole base (--enable_fsdp false)", world.size)
        fill(transformer, files, dtype, "cpu")
    add_lora(
        transformer,
        rank=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        targets=lora.lora_target_modules,
        seed=settings.run.seed,
    )
    if lora.lora_dropout > 0:
        transformer.train()
    denoiser = Denoiser(transformer)
    if lora.pretrained_lora_path:
        _start_from(denoiser, lora.pretrained_lora_path, lora.lora_alpha / lora.lora_r)
    if sharded:
        shard(transformer, world, device)
        world.everywhere(lambda: fill_shards(transformer, files, device))
    acceleration = accelerate(transformer, settings.speed, device)
    enable_context_parallel(transformer, world)
    return denoiser, acceleration


def require_shareable(speed: SpeedConfig, *, sharded: bool) -> None:
    """Refuses settings that several processes cannot have.

    Args:
        speed: of the run.
        sharded: whether the base is in pieces.

    Raises:
        UserError: with the way out.
    """
    if not sharded:
        return
    plain = SpeedConfig()
    for name in WHOLE_BASE:
        require(
            getattr(speed, name) == getattr(plain, name),
            f"--{name} does not go with a base that is sharded over processes: drop it, or add --enable_fsdp false.",
        )


@torch.no_grad()
def _start_from(denoiser: Denoiser, path: str, scale: float) -> None:
    """Copies a LoRA into the fresh one; a strength other than ours is folded into its B factors."""
    parameters = denoiser.lora_parameters()
    for name, module in read_adapter(path).modules.items():
        for factor, value in (("lora_A", module.down), ("lora_B", module.up * (module.scale / scale))):
            parameter = parameters.get(f"{name}.{factor}.{ADAPTER}.weight")
            if parameter is None or parameter.shape != value.shape:
                ours = "nothing" if parameter is None else f"shape {tuple(parameter.shape)}"
                raise UserError(
                    f"--pretrained_lora_path {path} has {name} with shape {tuple(value.shape)} where this run has "
                    f"{ours}: give its --lora_r and --lora_target_modules."
                )
            parameter.copy_(value)


class TeacherProbe:
    """A fixed input whose prediction by the teacher must never change by a bit."""

    def __init__(self, denoiser: Denoiser, conditions: Conditions, latent_shape: tuple[int, ...]):
        """Remembers the prediction as it is now."""
        self._denoiser, self._conditions = denoiser, conditions
        device = conditions.prompt_embeds.device
        self._latents = keyed_noise((1, *latent_shape), "teacher probe").to(device)
        self._expected = self._predict()

    def _predict(self) -> Tensor:
        with self._denoiser.teacher():
            return self._denoiser.velocity(self._latents, 0.5, self._conditions)

    def check(self, step: int) -> None:
        """Predicts again.

        Raises:
            RuntimeError: if the prediction differs.
        """
        if not torch.equal(self._predict(), self._expected):
            raise RuntimeError(f"the teacher's prediction on a fixed input has moved by step {step}: this is a defect")
