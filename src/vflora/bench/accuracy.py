"""`vflora bench accuracy`: how far each approximation is from the exact step."""

from __future__ import annotations

import gc
import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vflora.atomic import replace_file
from vflora.bench.setting import BenchConfig, Setting, build_setting
from vflora.cli import parse
from vflora.config import require
from vflora.devices import limit_memory, torch_device
from vflora.learning import learn
from vflora.models.random_weights import randomise_lora
from vflora.models.speed_config import SpeedConfig
from vflora.random_streams import keyed_noise
from vflora.settings import TrainSettings
from vflora.step_clock import StepClock
from vflora.teacher_source import Lesson
from vflora.training_setup import Training, set_up

logger = logging.getLogger(__name__)

_LORA_B_STD = 0.01  # a LoRA in the middle of its training: its layers' outputs are moved by about 2 %
_PROBE_SIGMA = 0.7
_WEIGHTS = {"distillation": "lambda_distill", "identity": "lambda_id"}
"""Parts of the loss, and the setting that weighs each."""


@dataclass(frozen=True)
class AccuracyConfig:
    """Whose step is taken."""

    train_config: Path | None = None
    """YAML file with the settings of a training, such as checkpoint-10/config.yaml: its models, pictures and sizes take
    the step, where otherwise random ones of the sizes below do. Only with trained weights do the errors of rollouts
    and of 8-bit weights mean what they will mean in training."""


@dataclass(frozen=True)
class BenchAccuracySettings:
    """Flags of `vflora bench accuracy`."""

    accuracy: AccuracyConfig
    bench: BenchConfig


@dataclass(frozen=True)
class Variant:
    """One way to take a step.

    Attributes:
        name: for the table.
        speed: switches.
        identity: settings of the identity loss that differ from the exact ones.
        needs_cuda: whether a CPU cannot do it, or not as it is meant.
    """

    name: str
    speed: SpeedConfig
    identity: dict[str, Any]
    needs_cuda: bool = False


EXACT = Variant("exact", SpeedConfig(), {})
VARIANTS = (
    Variant(
        "compiled blocks, cuDNN attention (rounding)", SpeedConfig(compile=True, attention_backend="cudnn"), {}, True
    ),
    Variant("decoder in tiles (rounding)", SpeedConfig(id_decode_tile=128), {}),
    Variant("fp8 rollouts", SpeedConfig(rollout_precision="fp8"), {}),
    Variant("every second rollout point", SpeedConfig(rollout_stride=2), {}),
    Variant("every third rollout point", SpeedConfig(rollout_stride=3), {}),
    Variant("LoRA in bf16 (rounding)", SpeedConfig(lora_precision="bf16"), {}),
    Variant("int8 weights", SpeedConfig(weight_storage="int8"), {}),
    Variant("fp8 weights", SpeedConfig(weight_storage="fp8"), {}),
    Variant("half-size decode (area)", SpeedConfig(), {"id_decode_downsample_mode": "area"}),
    Variant("half-size decode (bicubic)", SpeedConfig(), {"id_decode_downsample_mode": "bicubic"}),
)


@dataclass(frozen=True)
class Outcome:
    """What a step comes to.

    Attributes:
        velocity: the teacher's, at a fixed input, in the precision of rollouts.
        state: x_t at the last point of the rollout.
        gradients: of the LoRA, each in one vector: of those parts of the loss that have a weight, and of the whole.
    """

    velocity: Tensor
    state: Tensor
    gradients: dict[str, Tensor]


def run(settings: BenchAccuracySettings) -> None:
    """Takes the first step exactly and in every other way, and prints how they differ.

    Raises:
        UserError: for settings that cannot work.
    """
    config = settings.bench
    require(config.profile_steps is None, "--profile_steps is for `vflora bench step`: drop it here.")
    with TemporaryDirectory() as nowhere:
        source = _recorded(settings.accuracy.train_config, config, Path(nowhere))
        exact = _outcome(source, EXACT)
        on_cuda = torch_device(config.device).type == "cuda"
        rows = []
        for variant in tqdm([v for v in VARIANTS if on_cuda or not v.needs_cuda], desc="variants"):
            rows.append({"name": variant.name, **compare(_outcome(source, variant), exact)})
            tqdm.write(line(rows[-1]))
    tqdm.write("\n".join([HEADER, *map(line, rows)]))
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        measured = asdict(config) if settings.accuracy.train_config is None else asdict(settings.accuracy)
        bench = {k: str(v) if isinstance(v, Path) else v for k, v in measured.items()}
        found = json.dumps({"torch": torch.__version__, "bench": bench, "rows": rows}, indent=1)
        replace_file(config.output, lambda path: path.write_text(found))


def compare(outcome: Outcome, exact: Outcome) -> dict[str, float]:
    """Returns relative errors of velocity and state, and cosine and relative error of the gradient and its parts."""
    found = {
        "velocity_error": relative_error(outcome.velocity, exact.velocity),
        "state_error": relative_error(outcome.state, exact.state),
    }
    for part, expected in exact.gradients.items():
        gradient = outcome.gradients[part]
        name = "gradient" if part == "whole" else f"{part}_gradient"
        found[f"{name}_cosine"] = torch.cosine_similarity(gradient, expected, dim=0).item()
        found[f"{name}_error"] = relative_error(gradient, expected)
    return found


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Returns |value - expected| / |expected|."""
    return ((value - expected).norm() / expected.norm()).item()


HEADER = (
    f"{'':<46}{'relative error of':<20}{'cosine of the gradient':>33}\n"
    f"{'':<46}{'velocity':>10}{'state':>10}{'whole':>11}{'distillation':>14}{'identity':>11}"
)


def line(row: dict[str, Any]) -> str:
    """Formats one row of the table."""
    cosines = [row.get(f"{part}gradient_cosine") for part in ("", "distillation_", "identity_")]
    whole, distillation, identity = ("-" if cosine is None else f"{cosine:.6f}" for cosine in cosines)
    errors = f"{row['velocity_error']:>10.1e}{row['state_error']:>10.1e}"
    return f"{row['name']:<46}{errors}{whole:>11}{distillation:>14}{identity:>11}"


def _recorded(path: Path | None, config: BenchConfig, nowhere: Path) -> BenchConfig | TrainSettings:
    """Returns what the step is taken with: the random models of `config`, or the training of a file."""
    if path is None:
        return config
    require(path.is_file(), f"--train_config {path} is no file: name the config.yaml of a checkpoint.")
    flags = ["--config", str(path), "--output_dir", str(nowhere), "--logger", "none", "--resume_from_checkpoint", ""]
    flags += ["--gradient_accumulation_steps", "1", "--num_workers", "0", "--enable_validation", "false"]
    flags += ["--lambda_id_schedule", "constant"]  # its first step would have no identity loss
    if config.card_gib is not None:
        limit_memory(torch_device(config.device), config.card_gib)
    return parse("train", [*flags, "--device", config.device])


def _build(source: BenchConfig | TrainSettings, variant: Variant) -> Setting | Training:
    # A guided rollout skips points where nothing is said, and only the variants that say so are to skip any.
    speed = replace(variant.speed, rollout_stride=variant.speed.rollout_stride or 1)
    if isinstance(source, BenchConfig):
        return build_setting(replace(source, **variant.identity), speed)
    return set_up(replace(source, identity=replace(source.identity, **variant.identity), speed=speed))


def _outcome(source: BenchConfig | TrainSettings, variant: Variant) -> Outcome:
    setting = _build(source, variant)
    # With its B factors at zero, student and teacher would agree, and half of the gradient would be missing.
    randomise_lora(setting.denoiser.lora_parameters().items(), std=_LORA_B_STD)
    clock = StepClock(setting.device)
    (lesson,) = setting.source.lessons(0, clock)
    latents = keyed_noise(tuple(lesson.trajectory.latents.shape[1:]), "probe").to(setting.device)
    with setting.acceleration.switch.turned_on(), setting.denoiser.teacher():
        velocity = setting.denoiser.velocity(latents, _PROBE_SIGMA, lesson.conditions)
    gradients = _gradients(setting, lesson, clock)
    outcome = Outcome(velocity.cpu(), lesson.trajectory.latents[-1].cpu(), gradients)
    del setting, lesson, clock
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return outcome


def _gradients(setting: Setting | Training, lesson: Lesson, clock: StepClock) -> dict[str, Tensor]:
    """Returns the LoRA's gradients, fp64, on the CPU: of each part of the loss alone, and their sum, the whole."""
    weights = setting.settings.identity
    gradients = {}
    for part, flag in _WEIGHTS.items():
        if getattr(weights, flag) == 0:
            continue
        alone = replace(weights, **{other: 0.0 for other in _WEIGHTS.values() if other != flag})
        learn(replace(setting, settings=replace(setting.settings, identity=alone)), lesson, 0, 0, clock)
        gradients[part] = torch.cat([g.flatten() for g in setting.optimizer.gradients()]).double().cpu()
        for parameter in setting.denoiser.lora_parameters().values():
            parameter.grad = None
    return gradients | {"whole": torch.stack(list(gradients.values())).sum(0)}
