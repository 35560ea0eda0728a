"""The training loop: lessons, step, log, validate, save."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from vflora.checkpoint import CheckpointWriter, RunState
from vflora.distributed.world import joined
from vflora.learning import learn
from vflora.models.lora import ADAPTER
from vflora.models.lora_formats import build_header, from_transformer, write_lora
from vflora.previews import contact_sheet, find_previews, step_folder
from vflora.run_log import NoLog, RunLog
from vflora.settings import TrainSettings
from vflora.step_clock import StepClock, split
from vflora.stopping import stop_requests
from vflora.training_setup import Training, samples_per_step, set_up
from vflora.types import LossReport
from vflora.validation import Validator

logger = logging.getLogger(__name__)


def run(settings: TrainSettings) -> Path:
    """Trains, alone or as one of the processes that torchrun started, and returns the folder of the last checkpoint.

    Raises:
        UserError: for bad input, and NonFiniteError where a loss or gradient is not finite.
    """
    with joined(settings.distributed.sp_size, settings.model.torch_device()) as world:
        training = set_up(settings, world)
        log = _open_log(training)
        writer = CheckpointWriter(world, asynchronous=settings.run.async_save)
        try:
            return _loop(training, log, writer)
        finally:
            log.close()
            training.loader.close()
            writer.close()


def _open_log(training: Training) -> RunLog | NoLog:
    if not training.world.is_main:
        return NoLog()
    settings, config = training.settings, training.settings.run
    log = RunLog(config.output_dir, config.logger, start_step=training.start_step, config=settings.flat())
    (config.output_dir / "config.yaml").write_text(settings.yaml())
    return log


def _loop(training: Training, log: RunLog | NoLog, writer: CheckpointWriter) -> Path:
    settings, world = training.settings, training.world
    total = settings.optimizer.max_train_steps
    saved: Path | None = None
    with (
        stop_requests() as stop_requested,
        tqdm(total=total, initial=training.start_step, desc="training", unit="step", disable=not world.is_main) as bar,
    ):
        for step in range(training.start_step, total):
            began = time.perf_counter()
            clock = StepClock(training.device)
            reports = [
                learn(training, lesson, step, micro, clock, world)
                for micro, lesson in enumerate(training.source.lessons(step, clock))
            ]
            with clock.part("optimizer"):
                world.reduce_gradients(training.optimizer.gradients())
                gradient_norm = training.optimizer.step(step + 1)
            training.acceleration.end_step(world.least)
            done = step + 1
            reports = [report for own in world.gather_over_data(reports) for report in own]
            metrics = _metrics(reports, gradient_norm, training.optimizer.learning_rate)
            metrics |= {f"seconds/{part}": value for part, value in clock.seconds().items()}
            metrics["seconds/step"] = time.perf_counter() - began
            bar.update()
            bar.set_postfix(_glance(metrics))
            if done % settings.run.log_every_steps == 0 or done == total:
                log.scalars(done, metrics)
                _log_cosines(log, done, reports)
            if settings.run.teacher_check and done % settings.run.teacher_check == 0:
                training.teacher_probe.check(done)
            if training.validator and (done % settings.validation.val_every_steps == 0 or done == total):
                _validate(training, training.validator, done, log)
            stopping = world.agree(stop_requested())
            if done % settings.run.save_every_steps == 0 or done == total or stopping:
                saved = _save(training, done, writer)
            if stopping:
                writer.wait()
                logger.warning(
                    "stopped after step %d; go on with --resume_from_checkpoint latest (saved: %s)", done, saved
                )
                break
        writer.wait()
    if saved is None:
        raise RuntimeError("the loop ended without a step: the checkpoint it resumed from was already complete")
    return saved


def _validate(training: Training, validator: Validator, step: int, log: RunLog | NoLog) -> None:
    began = time.perf_counter()
    output_dir, world = training.settings.run.output_dir, training.world
    metrics = validator.run(training.validation_batches, step_folder(output_dir, step), world)
    log.scalars(step, metrics | {"seconds/validation": time.perf_counter() - began})
    if world.is_main:
        for preview in find_previews(output_dir, step):
            log.picture(step, f"preview/{preview.sample.name}", contact_sheet(preview))


def _metrics(reports: list[LossReport], gradient_norm: float, learning_rate: float) -> dict[str, float]:
    metrics = {
        "loss/total": fmean(report.total for report in reports),
        "loss/distill": fmean(report.distill for report in reports),
        "lambda_id": reports[0].weight,
        "gradient_norm": gradient_norm,
        "learning_rate": learning_rate,
    }
    judged = [report for report in reports if report.identity is not None]
    if judged:
        metrics["loss/identity"] = fmean(report.identity or 0.0 for report in judged)
        cosines = torch.cat([report.cosines for report in judged if report.cosines is not None])
        metrics["cosine/first_frame"] = cosines[:, 0].mean().item()
        metrics["cosine/last_frame"] = cosines[:, -1].mean().item()
    for name, sigma in (("high", max), ("low", min)):
        report = reports[0]
        index = report.sigmas.index(sigma(report.sigmas))
        metrics[f"loss/distill_{name}_noise"] = fmean(r.distill_by_point[index] for r in reports)
    return metrics


def _glance(metrics: dict[str, float]) -> dict[str, str]:
    shown = {"distill": f"{metrics['loss/distill']:.4g}"}
    if "loss/identity" in metrics:
        shown["identity"] = f"{metrics['loss/identity']:.3f}"
    shown["s/step"] = f"{metrics['seconds/step']:.2f}"
    parts = {name.removeprefix("seconds/"): value for name, value in metrics.items() if name.startswith("seconds/")}
    parts.pop("step")
    shown["of which"] = split(parts)
    return shown


def _log_cosines(log: RunLog | NoLog, step: int, reports: list[LossReport]) -> None:
    cosines = [report.cosines for report in reports if report.cosines is not None]
    if cosines:
        log.histogram(step, "cosine", torch.cat(cosines))


def _save(training: Training, step: int, writer: CheckpointWriter) -> Path:
    settings = training.settings
    state = RunState(
        step,
        training.source.batches_before(step),
        training.data_fingerprint,
        samples_per_step(settings, training.world),
    )
    header = build_header(
        title=settings.run.output_dir.resolve().name,
        base_model=settings.model.pipeline_dir,
        recipe={"method": "video-free-lora", "step": step, **settings.flat()},
        characters=training.characters,
    )

    # Copied now: the writer may work on while the training goes on.
    weights = from_transformer(training.denoiser.transformer, ADAPTER)

    def write_adapter(folder: Path) -> None:
        write_lora(weights, folder / "pytorch_lora_weights.safetensors", "diffusers", header)

    return writer.save(
        settings.run.output_dir,
        state,
        training.state_tensors(),
        settings.yaml(),
        write_adapter,
        keep=settings.run.keep_checkpoints,
    )
