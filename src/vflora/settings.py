"""All settings of a training run together: as flags, as YAML, and compared with those of a checkpoint."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from vflora.config import (
    AheadConfig,
    DistributedConfig,
    IdentityConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    RolloutConfig,
    RunConfig,
    StorageConfig,
    ValidationConfig,
)
from vflora.data.config import DataConfig
from vflora.errors import UserError
from vflora.models.speed_config import SpeedConfig


@dataclass(frozen=True)
class TrainSettings:
    """One record of every setting, by concern."""

    model: ModelConfig
    data: DataConfig
    prompts: PromptConfig
    rollout: RolloutConfig
    identity: IdentityConfig
    lora: LoraConfig
    optimizer: OptimizerConfig
    validation: ValidationConfig
    run: RunConfig
    distributed: DistributedConfig
    speed: SpeedConfig

    def flat(self) -> dict[str, Any]:
        """Returns every setting under the name of its flag, as plain values."""
        return flat_settings(*(getattr(self, field.name) for field in fields(self)))

    def yaml(self) -> str:
        """Returns the settings as a file that `--config` takes."""
        return yaml.safe_dump(self.flat(), sort_keys=False)


@dataclass(frozen=True)
class EncodeSettings(TrainSettings):
    """Every flag of `vflora train`, so that one line serves both, and which training it will be."""

    ahead: AheadConfig


@dataclass(frozen=True)
class RolloutsSettings(TrainSettings):
    """Every flag of `vflora train`, so that one line serves both, and how to keep the trajectories."""

    storage: StorageConfig
    ahead: AheadConfig


def flat_settings(*configs: Any) -> dict[str, Any]:
    """Returns the fields of several configurations under the names of their flags, as plain values."""
    values = {field.name: getattr(config, field.name) for config in configs for field in fields(config)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


FREE_TO_CHANGE = frozenset(
    {f.name for config in (RunConfig, ValidationConfig, DistributedConfig) for f in fields(config)} - {"seed"}
    | {"pipeline_dir", "wds_root", "device", "num_workers", "max_bad_samples", "condition_cache", "dino_model_dir"}
    | {"condition_lookahead", "dino_head_path", "pretrained_lora_path", "max_train_steps", "prompt_bank"}
    | {"prompt_builder", "batch_size", "gradient_accumulation_steps"}
    | {"compile", "attention_backend", "enable_gradient_checkpointing", "block_offload", "deterministic"}
    | {"mode", "id_decode_recompute", "id_decode_tile", "keep_student_graph", "rollout_graphs", "student_graphs"}
)
"""Settings that a resumed run may have otherwise: they say where things are and how they are computed, not what is
learned. The batch may be split over another number of processes; its whole size is compared by itself."""


PLAIN: dict[str, Any] = {
    f.name: f.default
    for group in get_type_hints(TrainSettings).values()
    for f in fields(group)
    if f.default is not MISSING
} | {"harvest_below": 0, "id_sigma_low": None, "id_sigma_high": None}
"""Every setting that has a default, with what was done before it had a flag: the default, or what that has replaced."""


def written(value: object) -> str:
    """Returns a value as a flag has it."""
    return "null" if value is None else str(value)


def require_same_recipe(saved: dict[str, Any], current: dict[str, Any], *, where: Path) -> None:
    """Compares the settings of a checkpoint with those of the run that resumes it.

    Raises:
        UserError: naming every setting that differs, with both values.
    """
    before = PLAIN | saved
    differing = [
        f"--{name} was {written(before[name])} and is {written(value)}"
        for name, value in current.items()
        if name in before and name not in FREE_TO_CHANGE and before[name] != value
    ]
    if differing:
        raise UserError(
            f"{where} was trained with other settings: {'; '.join(differing)}. "
            "Resume with the saved ones, or start anew in another --output_dir."
        )
