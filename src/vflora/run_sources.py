"""What a run learns from besides its pictures, as digests, so that resuming with anything else is refused."""

from __future__ import annotations

from pathlib import Path

from vflora.atomic import sha256
from vflora.errors import UserError
from vflora.models.conditions import weights_fingerprint
from vflora.models.projection_head import find_head
from vflora.settings import TrainSettings
from vflora.trajectories.provenance import MODEL, PROMPTS, model_digest, prompts_digest

HEAD = "the identity head in --dino_head_path"
BACKBONE = "the backbone in --dino_model_dir"


def sources_of(settings: TrainSettings) -> dict[str, str]:
    """Returns digests of what a run learns from besides its pictures, by what it is called.

    Their places may change from one start of a run to the next; what is in them may not. Models that are named as
    on the hub are left out: nothing of them need be here.
    """
    found = {PROMPTS: prompts_digest(settings.prompts), HEAD: sha256(find_head(settings.identity.dino_head_path))}
    if Path(settings.model.pipeline_dir).is_dir():
        found[MODEL] = model_digest(settings.model.pipeline_dir, settings.model.transformer_version)
    if Path(settings.identity.dino_model_dir).is_dir():
        found[BACKBONE] = weights_fingerprint(settings.identity.dino_model_dir, (".",)).hex()
    return found


def require_same_sources(saved: dict[str, str], current: dict[str, str], *, where: Path) -> None:
    """Compares what a checkpoint was trained with and what the run that resumes it would learn from.

    Raises:
        UserError: naming everything that differs.
    """
    differing = [name for name in saved if name in current and saved[name] != current[name]]
    if differing:
        raise UserError(
            f"{where} was trained with other inputs: {', '.join(differing)} changed. Resume with the same, or start "
            "anew in another --output_dir."
        )
