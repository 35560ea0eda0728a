"""The training loop: lessons, step, log, validate, save."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from vflora.atomic import replace_file
from vflora.checkpoint import CheckpointWriter, RunState
from vflora.config import require
from vflora.determinism import deterministic
from vflora.distributed.processes import joined
from vflora.learning import learn
from vflora.models.lora import ADAPTER
from vflora.models.lora_formats import from_transformer, write_lora
from vflora.previews import contact_sheet, find_previews, step_folder
from vflora.profiling import StepTracer
from vflora.run_folder import leave_later, reserved
from vflora.run_header import run_header
from vflora.run_log import NoLog, RunLog
from vflora.settings import TrainSettings
from vflora.step_clock import StepClock, split
from vflora.stopping import stop_requests
from vflora.training_setup import Training, samples_per_step, set_up
from vflora.types import LossReport
from vflora.validation import Validator

logger = logging.getLogger(__name__)

_ROOM_FOR_PARTS = 160
"""Columns of a terminal from which on the parts of a step stand behind its bar; metrics.jsonl always has them."""
_JUDGED = ("loss/identity", "lambda_id", "cosine/first_frame", "cosine/last_frame")
"""What there is to say of a step only if it judged identity."""


def run(settings: TrainSettings) -> Path:
    """Trains, alone or as one of the processes that torchrun started, and returns the folder of the last checkpoint.

    Raises:
        UserError: for bad input, and NonFiniteError where a loss or gradient is not finite.
    """
    with opened(settings) as progress:
        return _loop(progress)


@contextmanager
def opened(settings: TrainSettings) -> Iterator[Run]:
    """Sets a run up, new or resumed, and closes its files and processes in the end.

    Raises:
        UserError: for whatever is wrong with the settings, the data, the models or the checkpoint.
    """
    place = settings.run.output_dir, settings.run.resume_from_checkpoint
    device = settings.model.torch_device()
    with (
        joined(settings.distributed.sp_size, device) as world,
        deterministic(settings.speed.is_deterministic, device),
        ExitStack() as closing,
    ):
        world.from_main(lambda: closing.enter_context(reserved(*place)))
        training = set_up(settings, world)
        tracer = _tracer(training)
        log = _open_log(training)
        writer = CheckpointWriter(world, asynchronous=settings.run.async_save)
        try:
            yield Run(training, log, writer, tracer)
        finally:
            tracer.close()
            log.close()
            training.loader.close()
            writer.close()


class Run:
    """A run in progress.

    Attributes:
        training: everything the steps work with; the student is `training.denoiser`.
        step_count: optimizer steps done.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(self, training: Training, log: RunLog | NoLog, writer: CheckpointWriter, tracer: StepTracer):
        """Takes what `opened` made."""
        self._tracer = tracer
        self.training, self._log, self._writer = training, log, writer
        self.step_count, self.total_steps = training.start_step, training.settings.optimizer.max_train_steps
        self._saved: tuple[int, Path] | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.step_count >= self.total_steps

    def step(self) -> dict[str, float]:
        """Takes one optimizer step, then logs, saves and validates whatever is due.

        Returns:
            The numbers of the step, under the names that metrics.jsonl has: loss/total, loss/distill (mean squared
            error of velocities), gradient_norm, learning_rate, seconds/step with its parts, and on steps that judge
            identity loss/identity (mean of 1 - cosine), lambda_id, cosine/first_frame and cosine/last_frame.

        Raises:
            UserError: if a loss or gradient is not finite, or a checkpoint cannot be written; after the last step.
        """
        require(not self.is_finished, f"all {self.total_steps} steps are done: raise --max_train_steps for more.")
        metrics, reports = self._learn()
        training, settings = self.training, self.training.settings
        self.step_count += 1
        done, last = self.step_count, self.is_finished
        self._log_step(metrics, reports)
        if training.teacher_probe and done % settings.run.teacher_check == 0:
            training.teacher_probe.check(done)
        if last or done % settings.run.save_every_steps == 0:
            self.save()  # first: validation decodes longer clips than training does, and may run out of memory
        if training.validator and (last or done % settings.validation.val_every_steps == 0):
            _validate(training, training.validator, done, self._log)
        return metrics

    def _log_step(self, metrics: dict[str, float], reports: list[LossReport]) -> None:
        """A line where one is due; of the last step before it that judged identity, the numbers of that alone.

        Where not every step judges, the steps with a line may never be among those that do.
        """
        settings, done = self.training.settings, self.step_count
        every = settings.run.log_every_steps
        line = min(math.ceil(done / every) * every, self.total_steps)
        if done == line:
            self._log.scalars(done, metrics)
        elif "loss/identity" in metrics and done + settings.identity.id_every_steps > line:
            self._log.scalars(done, {name: metrics[name] for name in _JUDGED})
        else:
            return
        _log_cosines(self._log, done, reports)

    def _learn(self) -> tuple[dict[str, float], list[LossReport]]:
        training, world, step = self.training, self.training.world, self.step_count
        began = time.perf_counter()
        clock = StepClock(training.device)
        with self._tracer.step(step + 1):
            reports = [
                learn(training, lesson, step, micro, clock, world)
                for micro, lesson in enumerate(training.source.lessons(step, clock))
            ]
            with clock.part("optimizer"):
                learning_rate = training.optimizer.learning_rate
                world.reduce_gradients(training.optimizer.gradients())
                gradient_norm = training.optimizer.step(step + 1)
        training.acceleration.end_step(world.least)
        reports = [report for own in world.gather_over_data(reports) for report in own]
        metrics = _metrics(reports, gradient_norm, learning_rate)
        metrics |= {f"seconds/{part}": value for part, value in clock.seconds().items()}
        metrics["seconds/step"] = time.perf_counter() - began
        return metrics, reports

    def save(self) -> Path:
        """Writes a checkpoint of this step, unless there is one, and returns its folder.

        Its adapter is ready to use: the folder is a `--lora_path`.

        Raises:
            UserError: if it cannot be written; the checkpoints before stay as they are.
        """
        if self._saved is None or self._saved[0] != self.step_count:
            self._saved = self.step_count, _save(self.training, self.step_count, self._writer)
        return self._saved[1]

    def wait(self) -> None:
        """Returns when everything that was saved is on the disk."""
        self._writer.wait()


def _tracer(training: Training) -> StepTracer:
    settings = training.settings
    steps = range(training.start_step + 1, settings.optimizer.max_train_steps + 1)
    wanted = settings.run.profile_steps if training.world.is_main else None
    return StepTracer(wanted, settings.run.output_dir / "traces", run=steps)


def _open_log(training: Training) -> RunLog | NoLog:
    if not training.world.is_main:
        return NoLog()
    settings, config = training.settings, training.settings.run
    leave_later(config.output_dir, training.start_step)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    replace_file(config.output_dir / "config.yaml", lambda path: path.write_text(settings.yaml()))
    return RunLog(config.output_dir, config.logger, start_step=training.start_step, config=settings.flat())


def _loop(progress: Run) -> Path:
    world = progress.training.world
    with (
        stop_requests() as stop_requested,
        tqdm(
            total=progress.total_steps,
            initial=progress.step_count,
            desc="training",
            unit="step",
            disable=not world.is_main,
        ) as bar,
    ):
        while not progress.is_finished:
            metrics = progress.step()
            bar.update()
            bar.set_postfix(_glance(metrics))
            if world.agree(stop_requested()):
                saved = progress.save()
                progress.wait()
                if world.is_main:  # the process with the bar, which would be written over by another's
                    logger.warning(
                        "stopped after step %d; go on with --resume_from_checkpoint latest (saved: %s)",
                        progress.step_count,
                        saved,
                    )
                return saved
        saved = progress.save()
        progress.wait()
        logger.info("all %d steps are done; `vflora export` makes a file of %s", progress.total_steps, saved)
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
        "gradient_norm": gradient_norm,
        "learning_rate": learning_rate,
    }
    judged = [report for report in reports if report.identity is not None]
    if judged:
        metrics["loss/identity"] = fmean(report.identity or 0.0 for report in judged)
        metrics["lambda_id"] = reports[0].weight
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
    if shutil.get_terminal_size().columns >= _ROOM_FOR_PARTS:
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
        sources=training.sources,
    )
    header = run_header(settings, step, training.characters)

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
