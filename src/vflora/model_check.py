"""Whether model folders are complete, found out without loading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from vflora.errors import UserError
from vflora.models.original_encoders import PARTS
from vflora.models.original_layout import is_original_layout, transformer_versions

_WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder")
_SETTINGS = ("scheduler", "guider")
_ADVICE = "`vflora download` prints how to get it"


def check_pipeline(pipeline_dir: str, version: str) -> str:
    """Looks for every component of a pipeline, and whether each weight file is whole.

    Args:
        pipeline_dir: folder in either layout, or hub name.
        version: transformer of the original layout.

    Returns:
        What was found, in a few words.

    Raises:
        UserError: naming the first thing that is missing.
    """
    folder = Path(pipeline_dir)
    if (folder / "model_index.json").is_file():
        for component in _WEIGHTS:
            check_weights(folder / component)
        for component in _SETTINGS:
            check_json(folder / component / f"{component}_config.json")
        return f"{pipeline_dir} is a complete diffusers pipeline"
    if is_original_layout(folder):
        there = transformer_versions(folder)
        if version not in there:
            raise UserError(f"{folder} has the transformers {', '.join(there)} but not {version}: {_ADVICE}.")
        check_weights(folder / "transformer" / version)
        check_weights(folder / "vae")
        for what, place in PARTS.items():
            if not (folder / place).is_dir():
                raise UserError(f"the {what} is missing at {folder / place}: {_ADVICE}.")
        check_weights(folder / "text_encoder/llm")
        check_weights(folder / "vision_encoder/siglip/image_encoder")
        glyph = folder / "text_encoder/Glyph-SDXL-v2/checkpoints/byt5_model.pt"
        if not glyph.is_file():
            raise UserError(f"the glyph encoder is missing at {glyph}: {_ADVICE}.")
        return f"{pipeline_dir} is complete in the original layout (transformers: {', '.join(there)})"
    if folder.exists():
        raise UserError(f"{folder} is neither a diffusers pipeline nor the original layout: {_ADVICE}.")
    if pipeline_dir.count("/") != 1 or pipeline_dir.startswith((".", "/", "~")):
        raise UserError(f"there is nothing at {pipeline_dir}: {_ADVICE}.")
    cached = try_to_load_from_cache(pipeline_dir, "model_index.json")
    if not isinstance(cached, str):
        if folder.parent.is_dir():  # a folder that is misspelled or not downloaded yet; no run would fetch it
            raise UserError(f"there is nothing at {pipeline_dir}: {_ADVICE}.")
        raise UserError(f"{pipeline_dir} is not on this machine yet: {_ADVICE}, and a run would fetch it too.")
    return check_pipeline(str(Path(cached).parent), version)


def check_dino(dino_model_dir: str) -> str:
    """Looks for a DINOv3 backbone.

    Returns:
        What was found, in a few words.

    Raises:
        UserError: if it is missing, damaged, or another model.
    """
    folder = Path(dino_model_dir)
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"there is no DINOv3 at {folder}: {_ADVICE}.")
    kind = str(json.loads(config.read_text()).get("model_type"))
    if not kind.startswith("dinov3"):
        raise UserError(f"{folder} holds a {kind}, not a DINOv3: {_ADVICE}.")
    check_weights(folder)
    return f"{kind} at {folder}"


def check_json(file: Path, advice: str = _ADVICE) -> dict[str, Any]:
    """Reads the configuration of a component.

    Args:
        file: its JSON.
        advice: how to get it.

    Raises:
        UserError: if it is missing or broken.
    """
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file} is missing: {advice}.") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): {advice}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is no configuration: {advice}.")
    return found


def check_weights(folder: Path, advice: str = _ADVICE) -> None:
    """Checks that the weight files of a component are all there and whole.

    Args:
        folder: of the component.
        advice: how to get them.

    Raises:
        UserError: naming the first one that is not.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"there are no .safetensors files in {folder}: {advice}.")
    for index in folder.glob("*.safetensors.index.json"):
        for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing: {advice}, which resumes where it stopped.")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{file} is cut short or damaged ({error}): download it again.") from error
