"""What a folder of trajectories was made from: everything that the teacher's part of a lesson depends on."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from vflora.config import PromptConfig
from vflora.data.schema import DataSet
from vflora.errors import UserError
from vflora.models.conditions import weights_fingerprint
from vflora.models.loading import load_shift
from vflora.models.original_layout import is_original_layout
from vflora.settings import PLAIN, TrainSettings, written

_DATA = ("metadata_key", "wds_shuffle_buf", "enable_augmentation", "augment_r", "augment_j")
_SPEED = ("rollout_precision", "weight_storage")
_PARTS = ("text_encoder", "text_encoder_2", "image_encoder", "tokenizer", "vae")

# Names of what is no flag, as the message about a difference says them.
DATA_SET = "the data set in --wds_root"
MODEL = "the model in --pipeline_dir"
PROMPTS = "the content of --prompt_bank or --prompt_builder"
SLOTS = "processes x --batch_size"


def recipe_of(settings: TrainSettings, dataset: DataSet, slots: int) -> dict[str, Any]:
    """Returns what the trajectories of a run depend on, by flag or by what it is called, as plain values.

    How the student learns is not among it: trajectories serve any LoRA, optimizer and identity loss. Neither is how
    fast things are computed; as with resuming, bits agree where the kernels do.

    Args:
        settings: of the run.
        dataset: that it trains on.
        slots: samples of a micro-batch over all data-parallel processes.

    Raises:
        UserError: if the model or the prompts are not there.
    """
    flags = asdict(settings.rollout)
    del flags["id_on_policy"]  # the student's own steps, from a harvested point on
    flags |= {name: getattr(settings.data, name) for name in _DATA}
    flags |= {name: getattr(settings.speed, name) for name in _SPEED}
    flags["rollout_stride"] = settings.speed.stride(settings.rollout.guidance_scale)
    model, optimizer = settings.model, settings.optimizer
    return {
        "seed": settings.run.seed,
        "dtype": model.dtype,
        "transformer_version": model.transformer_version,
        "gradient_accumulation_steps": optimizer.gradient_accumulation_steps,
        **flags,
        SLOTS: slots,
        "the schedule's shift": load_shift(model.pipeline_dir, model.transformer_version),
        DATA_SET: dataset.fingerprint,
        MODEL: model_digest(model.pipeline_dir, model.transformer_version),
        PROMPTS: prompts_digest(settings.prompts),
    }


def fingerprint(recipe: dict[str, Any]) -> str:
    """Returns a digest of a recipe."""
    text = "\0".join(f"{name}={recipe[name]!r}" for name in sorted(recipe))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def require_same(made: dict[str, Any], wanted: dict[str, Any], folder: Path, *, verb: str) -> None:
    """Refuses trajectories of another recipe.

    Args:
        made: recipe of the folder.
        wanted: recipe of this run.
        folder: of the trajectories.
        verb: what this run would do with them.

    Raises:
        UserError: naming everything that differs.
    """
    before = PLAIN | made
    differing = [_difference(name, before, wanted) for name in made | wanted if before.get(name) != wanted.get(name)]
    if differing:
        raise UserError(
            f"{folder} was rolled out otherwise: {'; '.join(differing)}; {verb} with the same, or choose another "
            "--trajectory_dir."
        )


def _difference(name: str, made: dict[str, Any], wanted: dict[str, Any]) -> str:
    if name in (DATA_SET, MODEL, PROMPTS):
        return f"{name} is another"
    shown = name if " " in name else f"--{name}"
    return f"{shown} was {written(made.get(name))} and is {written(wanted.get(name))}"


def model_digest(pipeline_dir: str, version: str) -> str:
    """Returns a digest of one transformer and of the encoders and VAE around it, cheaply."""
    transformer = f"transformer/{version}" if is_original_layout(pipeline_dir) else "transformer"
    return weights_fingerprint(pipeline_dir, (transformer, *_PARTS)).hex()


def prompts_digest(config: PromptConfig) -> str:
    """Returns a digest of the file that prompts come from.

    Raises:
        UserError: if it cannot be read.
    """
    path = config.prompt_builder or config.prompt_bank
    try:
        content = path.read_bytes() if path else resources.files("vflora").joinpath("prompts.yaml").read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): correct --prompt_bank or --prompt_builder.") from error
    return hashlib.blake2b(content, digest_size=16).hexdigest()
