"""From settings to everything the loop works with, checking what can be checked before anything large is loaded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from vflora.checkpoint import find_checkpoint, read_state, read_tensors, verify_checkpoint
from vflora.clips import Clips, as_sampled
from vflora.data.pipeline import TrainLoader
from vflora.data.schema import DataSet
from vflora.distributed.divisible import require_divisible
from vflora.distributed.processes import ALONE, World
from vflora.distributed.strips import Strips
from vflora.errors import UserError
from vflora.identity_term import IdentityTerm
from vflora.models.denoiser import Denoiser
from vflora.models.fast_teacher import harvested_sigmas
from vflora.models.identity import IdentityEmbedder, require_backbone
from vflora.models.loading import ENCODERS, require_pipeline
from vflora.models.roles import Student
from vflora.models.speed import Acceleration, accelerate_decoder
from vflora.optimizer import LoraOptimizer
from vflora.prompts import prompt_maker
from vflora.run_log import require_logger
from vflora.run_sources import require_same_sources, sources_of
from vflora.settings import TrainSettings, require_same_recipe
from vflora.student import TeacherProbe, build_student
from vflora.teacher_source import NO_PROMPT, LessonSource, PromptMaker, TeacherSource, batches_before
from vflora.trajectories.folder import condition_folder, open_trajectories, without_rollouts
from vflora.trajectories.plan import Plan
from vflora.trajectories.reader import TrajectoryReader
from vflora.types import Batch
from vflora.validation import Validator, held_out_batches, held_out_prompt

logger = logging.getLogger(__name__)


@dataclass
class Training:
    """A run that is ready to start or to go on."""

    settings: TrainSettings
    world: World
    device: torch.device
    denoiser: Denoiser
    student: Student
    acceleration: Acceleration
    identity: IdentityTerm
    optimizer: LoraOptimizer
    source: LessonSource
    loader: TrainLoader
    validator: Validator | None
    validation_batches: list[Batch]
    teacher_probe: TeacherProbe | None
    start_step: int
    data_fingerprint: str
    characters: tuple[str, ...]
    sources: dict[str, str]

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns what a checkpoint keeps: the LoRA and the optimizer's state, by name."""
        lora = {f"lora/{name}": p.detach() for name, p in self.denoiser.lora_parameters().items()}
        return lora | {f"optimizer/{key}": value for key, value in self.optimizer.state_tensors().items()}


def set_up(settings: TrainSettings, world: World = ALONE) -> Training:
    """Builds a run, or restores the one that `--resume_from_checkpoint` names; all processes call it together.

    It writes nothing to `--output_dir`; who is going to has reserved it.

    Raises:
        UserError: for whatever is wrong with the settings, the data, the models or the checkpoint.
    """
    model, run = settings.model, settings.run
    device, dtype = model.torch_device(), model.torch_dtype()
    dataset = DataSet.open(settings.data.wds_root, settings.data.metadata_key, "train")
    sources = world.from_main(lambda: _sources(settings))
    settings = as_sampled(settings)
    checkpoint = world.from_main(lambda: _checkpoint(settings, dataset.fingerprint, sources, world))
    start_step = start_batch = 0
    if checkpoint is not None:
        start_step = read_state(checkpoint).step
        start_batch = batches_before(start_step, settings.rollout, settings.optimizer.gradient_accumulation_steps)
    trajectories = world.from_main(lambda: open_trajectories(settings, dataset, world.dp_size, start_step))
    make_prompt = prompt_maker(settings.prompts)
    held_out = held_out_batches(settings) if settings.validation.enable_validation else []

    clips = Clips.load(settings, dataset, keep_images_on_disk=not settings.data.enable_augmentation)
    accelerate_decoder(clips.vae, settings.speed)
    shape = clips.latent_shape(settings.rollout.train_video_length)
    logger.info("loading the identity embedder")
    embedder = IdentityEmbedder.load(
        settings.identity.dino_model_dir, settings.identity.dino_head_path, device=device, dtype=dtype
    )
    logger.info("loading the transformer")
    denoiser, acceleration = build_student(without_rollouts(settings), dtype, device, world)
    lengths = [settings.rollout.train_video_length]
    if settings.validation.enable_validation:
        lengths.append(settings.validation.val_video_length)
    require_divisible(
        heads=denoiser.transformer.config["num_attention_heads"],
        tokens={
            f"{clips.size[0]}x{clips.size[1]} with {frames} frames": _tokens(denoiser, clips.latent_shape(frames))
            for frames in lengths
        },
        sp_size=world.sp_size,
    )
    optimizer = LoraOptimizer(denoiser.lora_parameters(), settings.optimizer)
    if checkpoint is not None:
        _restore(denoiser, optimizer, read_tensors(checkpoint), start_step)

    accumulation = settings.optimizer.gradient_accumulation_steps

    def exact_sigmas(rollout: int) -> Collection[float]:
        """The noise levels that are harvested from a rollout, counted since this process began."""
        block = (start_batch + rollout) // accumulation
        return harvested_sigmas(settings.rollout, run.seed, block, clips.sigmas)

    loader = TrainLoader(dataset, settings.data, seed=run.seed, rank=world.dp_rank, start_batch=start_batch)
    source: LessonSource
    if trajectories:
        source = TrajectoryReader(
            trajectories,
            loader,
            start_batch=start_batch,
            steps=settings.optimizer.max_train_steps,
            encoder=clips.encoder,
            config=settings.rollout,
            sigmas=clips.sigmas,
            latent_shape=shape,
            lookahead=settings.prompts.condition_lookahead,
            device=device,
        )
    else:
        source = TeacherSource(
            loader,
            start_batch=start_batch,
            make_prompt=make_prompt,
            encoder=clips.encoder,
            denoiser=acceleration.teacher(denoiser, exact_sigmas, guidance_scale=settings.rollout.guidance_scale),
            config=settings.rollout,
            sigmas=clips.sigmas,
            latent_shape=shape,
            accumulation=accumulation,
            lookahead=settings.prompts.condition_lookahead,
            seed=run.seed,
            device=device,
            end_batch=Plan.of(settings, world.dp_size).batches(settings.optimizer.max_train_steps),
        )
    validator = None
    if settings.validation.enable_validation:
        validator = Validator(
            denoiser=denoiser,
            vae=clips.vae,
            embedder=embedder,
            encoder=clips.encoder,
            make_prompt=make_prompt,
            sigmas=clips.sigmas,
            latent_shape=clips.latent_shape(settings.validation.val_video_length),
            guidance_scale=settings.rollout.guidance_scale,
            seed=run.seed,
            device=device,
        )
    blank = blank_sample(dataset)
    return Training(
        settings=settings,
        world=world,
        device=device,
        denoiser=denoiser,
        student=acceleration.student(denoiser),
        acceleration=acceleration,
        identity=IdentityTerm(
            settings.identity,
            clips.vae,
            embedder,
            recompute=settings.speed.id_decode_recompute,
            tile=settings.speed.id_decode_tile,
            strips=Strips.of(world),
        ),
        optimizer=optimizer,
        source=source,
        loader=loader,
        validator=validator,
        validation_batches=held_out,
        teacher_probe=TeacherProbe(denoiser, clips.encoder.encode(*blank), shape) if run.teacher_check else None,
        start_step=start_step,
        data_fingerprint=dataset.fingerprint,
        characters=tuple(sorted(dataset.counts)),
        sources=sources,
    )


def _tokens(denoiser: Denoiser, shape: tuple[int, int, int, int]) -> int:
    config, (_, frames, height, width) = denoiser.transformer.config, shape
    return frames // config["patch_size_t"] * (height // config["patch_size"]) * (width // config["patch_size"])


@torch.no_grad()
def _restore(denoiser: Denoiser, optimizer: LoraOptimizer, tensors: dict[str, Tensor], step: int) -> None:
    for name, parameter in denoiser.lora_parameters().items():
        parameter.copy_(tensors[f"lora/{name}"])
    prefix = "optimizer/"
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    optimizer.load_state_tensors(state, step)


def _sources(settings: TrainSettings) -> dict[str, str]:
    require_logger(settings.run.logger)
    encoders = ENCODERS if condition_folder(settings) is None else ()
    require_pipeline(settings.model.pipeline_dir, "vae", "transformer", *encoders)
    require_backbone(Path(settings.identity.dino_model_dir))
    return sources_of(settings)


def _checkpoint(settings: TrainSettings, data_fingerprint: str, sources: dict[str, str], world: World) -> Path | None:
    """Returns the checkpoint to go on from, whole and of the same run, or None to start anew."""
    wanted = settings.run.resume_from_checkpoint
    folder = find_checkpoint(wanted, settings.run.output_dir) if wanted else None
    if folder is None:
        return None
    verify_checkpoint(folder)
    state = read_state(folder)
    require_same_recipe(yaml.safe_load((folder / "config.yaml").read_text()), settings.flat(), where=folder)
    if state.data_fingerprint != data_fingerprint:
        raise UserError(
            f"{folder} was trained on another data set than {settings.data.wds_root}: "
            "resume with that one, or start anew in another --output_dir."
        )
    require_same_sources(state.sources, sources, where=folder)
    if state.torch_version != torch.__version__:
        logger.warning(
            "%s was written with PyTorch %s, and this is %s: the run goes on, but may round otherwise from here",
            folder,
            state.torch_version,
            torch.__version__,
        )
    samples = samples_per_step(settings, world)
    if state.samples_per_step not in (0, samples):
        raise UserError(
            f"{folder} was trained with {state.samples_per_step} samples a step and this run would take {samples}: "
            "choose --batch_size and --gradient_accumulation_steps so that processes x batch x accumulation stays."
        )
    if state.step >= settings.optimizer.max_train_steps:
        raise UserError(f"{folder} has all {state.step} steps already: raise --max_train_steps to go on from it.")
    return folder


def samples_per_step(settings: TrainSettings, world: World) -> int:
    """Returns how many samples an optimizer step sees, over all processes and micro-batches."""
    return world.dp_size * settings.data.batch_size * settings.optimizer.gradient_accumulation_steps


def asked_besides(
    settings: TrainSettings, dataset: DataSet, make_prompt: PromptMaker
) -> Iterator[tuple[list[str], Tensor]]:
    """Yields what a training asks the encoder for besides its lessons: prompts, and pictures, uint8 [N, 3, H, W].

    That is for guidance, `--teacher_check` and validation.

    Args:
        settings: of the run, as `as_sampled` returns them.
        dataset: that it trains on.
        make_prompt: turns a name into a prompt with a generator.

    Raises:
        UserError: while iterating, if it cannot validate.
    """
    prompts, picture = blank_sample(dataset)
    if settings.run.teacher_check or settings.rollout.guidance_scale != 1:
        yield prompts, picture if settings.run.teacher_check else picture[:0]
    if settings.validation.enable_validation:
        batches = held_out_batches(settings)
        names = [pair for batch in batches for pair in zip(batch.characters, batch.keys, strict=True)]
        prompts = [held_out_prompt(make_prompt, settings.run.seed, character, key) for character, key in names]
        yield prompts, torch.cat([batch.images for batch in batches])


def blank_sample(dataset: DataSet) -> tuple[list[str], Tensor]:
    """Returns the fixed input of `--teacher_check`: a prompt, and a picture, uint8 [1, 3, H, W]."""
    return [NO_PROMPT], torch.zeros(1, 3, *dataset.size, dtype=torch.uint8)
