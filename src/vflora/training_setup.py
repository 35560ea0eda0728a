"""From settings to everything the loop works with, checking what can be checked before anything large is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKLHunyuanVideo15
from torch import Tensor

from vflora.checkpoint import find_checkpoint, read_state, read_tensors, verify_checkpoint
from vflora.data.pipeline import TrainLoader
from vflora.data.schema import DataSet
from vflora.data.validation import ValidationLoader
from vflora.errors import UserError
from vflora.flow import sampling_sigmas
from vflora.identity_term import IdentityTerm
from vflora.models.conditions import ConditionEncoder
from vflora.models.denoiser import Denoiser
from vflora.models.identity import IdentityEmbedder
from vflora.models.loading import load_shift, load_transformer, load_vae
from vflora.models.lora import ADAPTER, add_lora
from vflora.models.lora_formats import read_lora
from vflora.optimizer import LoraOptimizer
from vflora.prompts import prompt_maker
from vflora.random_streams import keyed_noise
from vflora.resolution import clip_size
from vflora.settings import TrainSettings, require_same_recipe
from vflora.teacher_source import TeacherSource
from vflora.types import Batch, Conditions
from vflora.validation import Validator

logger = logging.getLogger(__name__)


@dataclass
class Training:
    """A run that is ready to start or to go on."""

    settings: TrainSettings
    device: torch.device
    denoiser: Denoiser
    identity: IdentityTerm
    optimizer: LoraOptimizer
    source: TeacherSource
    loader: TrainLoader
    validator: Validator | None
    validation_batches: list[Batch]
    teacher_probe: TeacherProbe
    start_step: int
    data_fingerprint: str
    characters: tuple[str, ...]

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns what a checkpoint keeps: the LoRA and the optimizer's state, by name."""
        lora = {f"lora/{name}": p.detach() for name, p in self.denoiser.lora_parameters().items()}
        return lora | {f"optimizer/{key}": value for key, value in self.optimizer.state_tensors().items()}


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


def set_up(settings: TrainSettings) -> Training:
    """Builds a run, or restores the one that `--resume_from_checkpoint` names.

    Raises:
        UserError: for whatever is wrong with the settings, the data, the models or the checkpoint.
    """
    model, run = settings.model, settings.run
    device, dtype = model.torch_device(), model.torch_dtype()
    dataset = DataSet.open(settings.data.wds_root, settings.data.metadata_key, "train")
    checkpoint = find_checkpoint(run.resume_from_checkpoint, run.output_dir) if run.resume_from_checkpoint else None
    start_step = start_batch = 0
    if checkpoint is not None:
        verify_checkpoint(checkpoint)
        state = read_state(checkpoint)
        _require_same_run(checkpoint, settings, dataset.fingerprint, state.data_fingerprint)
        start_step, start_batch = state.step, state.batches
        if start_step >= settings.optimizer.max_train_steps:
            raise UserError(
                f"{checkpoint} has all {start_step} steps already: raise --max_train_steps to go on from it."
            )
    make_prompt = prompt_maker(settings.prompts)

    logger.info("loading the VAE")
    vae = load_vae(model.pipeline_dir, dtype, device)
    size = clip_size(settings.rollout.train_target_resolution, dataset.size, vae.spatial_compression_ratio)
    latent_shape = _latent_shape(vae, settings.rollout.train_video_length, size)
    logger.info("loading the identity embedder")
    embedder = IdentityEmbedder.load(
        settings.identity.dino_model_dir, settings.identity.dino_head_path, device=device, dtype=dtype
    )
    encoder = ConditionEncoder(
        model.pipeline_dir,
        vae,
        size=size,
        dtype=dtype,
        device=device,
        cache_folder=settings.prompts.condition_cache,
        keep_images_on_disk=not settings.data.enable_augmentation,
    )
    logger.info("loading the transformer")
    denoiser = _student(settings, dtype, device)
    optimizer = LoraOptimizer(denoiser.lora_parameters(), settings.optimizer)
    if checkpoint is not None:
        _restore(denoiser, optimizer, read_tensors(checkpoint), start_step)

    sigmas = sampling_sigmas(settings.rollout.num_inference_steps, load_shift(model.pipeline_dir))
    loader = TrainLoader(dataset, settings.data, seed=run.seed, start_batch=start_batch)
    source = TeacherSource(
        loader,
        start_batch=start_batch,
        make_prompt=make_prompt,
        encoder=encoder,
        denoiser=denoiser,
        config=settings.rollout,
        sigmas=sigmas,
        latent_shape=latent_shape,
        accumulation=settings.optimizer.gradient_accumulation_steps,
        lookahead=settings.prompts.condition_lookahead,
        seed=run.seed,
        device=device,
    )
    validator, held_out = None, []
    if settings.validation.enable_validation:
        validator = Validator(
            denoiser=denoiser,
            vae=vae,
            embedder=embedder,
            encoder=encoder,
            make_prompt=make_prompt,
            sigmas=sigmas,
            latent_shape=_latent_shape(vae, settings.validation.val_video_length, size),
            guidance_scale=settings.rollout.rollout_guidance_scale,
            seed=run.seed,
            device=device,
        )
        held_out = _validation_batches(settings)
    blank = torch.zeros(1, 3, *dataset.size, dtype=torch.uint8)
    return Training(
        settings=settings,
        device=device,
        denoiser=denoiser,
        identity=IdentityTerm(
            settings.identity, vae, embedder, recompute=settings.distributed.enable_gradient_checkpointing
        ),
        optimizer=optimizer,
        source=source,
        loader=loader,
        validator=validator,
        validation_batches=held_out,
        teacher_probe=TeacherProbe(denoiser, encoder.encode([""], blank), latent_shape),
        start_step=start_step,
        data_fingerprint=dataset.fingerprint,
        characters=tuple(sorted(dataset.counts)),
    )


def _latent_shape(vae: AutoencoderKLHunyuanVideo15, frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    space, time = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    return vae.config.latent_channels, (frames - 1) // time + 1, size[0] // space, size[1] // space


def _student(settings: TrainSettings, dtype: torch.dtype, device: torch.device) -> Denoiser:
    model, lora = settings.model, settings.lora
    transformer = load_transformer(model.pipeline_dir, model.transformer_version, dtype, device)
    add_lora(
        transformer,
        rank=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        targets=lora.lora_target_modules,
        seed=settings.run.seed,
    )
    if settings.distributed.enable_gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if lora.lora_dropout > 0:
        transformer.train()
    denoiser = Denoiser(transformer)
    if lora.pretrained_lora_path:
        _start_from(denoiser, lora.pretrained_lora_path, lora.lora_alpha / lora.lora_r)
    return denoiser


@torch.no_grad()
def _start_from(denoiser: Denoiser, path: str, scale: float) -> None:
    """Copies a LoRA into the fresh one; a strength other than ours is folded into its B factors."""
    parameters = denoiser.lora_parameters()
    for name, module in read_lora(path).modules.items():
        for factor, value in (("lora_A", module.down), ("lora_B", module.up * (module.scale / scale))):
            parameter = parameters.get(f"{name}.{factor}.{ADAPTER}.weight")
            if parameter is None or parameter.shape != value.shape:
                ours = "nothing" if parameter is None else f"shape {tuple(parameter.shape)}"
                raise UserError(
                    f"--pretrained_lora_path {path} has {name} with shape {tuple(value.shape)} where this run has "
                    f"{ours}: give its --lora_r and --lora_target_modules."
                )
            parameter.copy_(value)


@torch.no_grad()
def _restore(denoiser: Denoiser, optimizer: LoraOptimizer, tensors: dict[str, Tensor], step: int) -> None:
    for name, parameter in denoiser.lora_parameters().items():
        parameter.copy_(tensors[f"lora/{name}"])
    prefix = "optimizer/"
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    optimizer.load_state_tensors(state, step)


def _require_same_run(checkpoint: Path, settings: TrainSettings, data: str, saved_data: str) -> None:
    saved = yaml.safe_load((checkpoint / "config.yaml").read_text())
    require_same_recipe(saved, settings.flat(), where=checkpoint)
    if data != saved_data:
        raise UserError(
            f"{checkpoint} was trained on another data set than {settings.data.wds_root}: "
            "resume with that one, or start anew in another --output_dir."
        )


def _validation_batches(settings: TrainSettings) -> list[Batch]:
    """The first pictures of the validation list, one per batch: validation clips may be long."""
    dataset = DataSet.open(settings.data.wds_root, settings.data.metadata_key, "val")
    config = replace(settings.data, batch_size=1, num_workers=0)
    batches = list(ValidationLoader(dataset, config, seed=settings.run.seed, limit=settings.validation.val_num_samples))
    if not batches:
        raise UserError(f"{settings.data.wds_root} has no validation samples: pack with a larger --val_split.")
    return batches
