"""What the file of an adapter says about the run that trained it: fit to be shared, so without folders of a machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vflora.models.lora_formats import build_header
from vflora.models.original_layout import is_original_layout
from vflora.settings import TrainSettings

log = logging.getLogger(__name__)

_PLACES = ("_dir", "_path", "_root", "_cache", "_bank", "_builder", "_from_checkpoint")
_RESOLUTIONS = {"480p": "848x480", "720p": "1280x720"}


def run_header(settings: TrainSettings, step: int, characters: Sequence[str]) -> dict[str, str]:
    """Returns the header of the adapter as it is at one step.

    Args:
        settings: of the run.
        step: optimizer steps done.
        characters: that it was trained on.
    """
    config = settings.optimizer
    return build_header(
        title=settings.run.output_dir.resolve().name,
        base_model=base_model_name(settings.model.pipeline_dir, settings.model.transformer_version),
        recipe={"method": "video-free-lora", "step": step, **shareable(settings.flat())},
        characters=characters,
        resolution=_resolution(settings.rollout.train_target_resolution),
        description=(
            f"Teaches an image-to-video model its characters from still images alone: {step} of "
            f"{config.max_train_steps} steps of distillation from the base model with an identity loss."
        ),
    )


def base_model_name(pipeline_dir: str, transformer_version: str) -> str:
    """Returns a hub name as it is, and of a folder its name, with the transformer's where there are several."""
    folder = Path(pipeline_dir)
    if not folder.exists():
        return pipeline_dir
    name = folder.resolve().name
    return f"{name} {transformer_version}" if is_original_layout(folder) else name


def hub_name(pipeline_dir: str) -> str | None:
    """Returns the hub name that `pipeline_dir` is; a folder may look like one and is none, which is worth a warning."""
    if Path(pipeline_dir).exists():
        log.warning("the model card names no base model and no licence: give --base_model with its hub name")
        return None
    return pipeline_dir


def shareable(settings: dict[str, Any]) -> dict[str, Any]:
    """Shortens every path to its last part: where things lie on one machine is nobody else's concern."""
    return {
        name: Path(value).name if name.endswith(_PLACES) and isinstance(value, str) and _is_place(value) else value
        for name, value in settings.items()
    }


def _is_place(value: str) -> bool:
    return Path(value).is_absolute() or value.startswith((".", "~")) or value.count("/") > 1 or Path(value).exists()


def _resolution(setting: str) -> str | None:
    """Returns width x height, as ModelSpec writes it, of a setting that says height x width."""
    if setting in _RESOLUTIONS:
        return _RESOLUTIONS[setting]
    height, _, width = setting.partition("x")
    return f"{width}x{height}"
