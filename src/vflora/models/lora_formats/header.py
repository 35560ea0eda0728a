"""The text header of a LoRA file: what it is, how it was made, how to use it.

Keys follow the public ModelSpec fields (`modelspec.*`) and the ones kohya's readers show (`ss_*`); what has no
field there stands under `vflora.*`. Values are strings, as safetensors demands.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from PIL import Image
from safetensors.torch import save
from torch import Tensor

from vflora.models.lora_formats.weights import LoraWeights

ARCHITECTURE = "hunyuan-video-1.5/lora"
_FOLDING_FORMATS = ("diffusers", "original")
_FEW = 8
LICENSE_NOTE = (
    "Made for HunyuanVideo-1.5: use is subject to the Tencent Hunyuan Community License "
    "(not valid in the EU, the UK and South Korea)."
)


def build_header(
    *,
    title: str,
    base_model: str,
    recipe: Mapping[str, Any] | None = None,
    characters: Sequence[str] = (),
    thumbnail: Image.Image | None = None,
    license: str = LICENSE_NOTE,
    author: str | None = None,
    description: str | None = None,
    resolution: str | None = None,
    date: datetime | None = None,
) -> dict[str, str]:
    """Collects what the writer of a file cannot know by looking at the weights.

    Args:
        title: name of the LoRA.
        base_model: what it was trained on, such as a hub name and the transformer's version.
        recipe: the settings it was trained with, anything JSON can hold.
        characters: names to use in a prompt.
        thumbnail: shown by model browsers; shrunk to fit 256 x 256.
        license: note on what its users may do.
        author: who made it.
        description: one paragraph.
        resolution: WIDTHxHEIGHT that it was trained at.
        date: when; now if None.
    """
    fields = {
        "modelspec.title": title,
        "modelspec.author": author,
        "modelspec.description": description,
        "modelspec.date": (date or datetime.now(UTC)).isoformat(timespec="seconds"),
        "modelspec.license": license,
        "modelspec.resolution": resolution,
        "modelspec.trigger_phrase": ", ".join(characters),
        "modelspec.usage_hint": _usage_hint(characters),
        "modelspec.thumbnail": None if thumbnail is None else thumbnail_uri(thumbnail),
        "ss_base_model_version": base_model,
        "vflora.base_model": base_model,
        "vflora.characters": json.dumps(list(characters), ensure_ascii=False) if characters else None,
        "vflora.recipe": None if recipe is None else json.dumps(recipe, sort_keys=True, default=str),
    }
    return {key: value for key, value in fields.items() if value}


def _usage_hint(characters: Sequence[str]) -> str | None:
    if not characters:
        return None
    more = f" and {len(characters) - _FEW} more" if len(characters) > _FEW else ""
    names = ", ".join(characters[:_FEW]) + more
    return f"Image to video: give a picture of the character and name it in the prompt ({names})."


def file_header(weights: LoraWeights, tensors: Mapping[str, Tensor], format: str) -> dict[str, str]:
    """Returns the fields that follow from the weights and the format."""
    alpha = str(weights.alpha)
    before = weights.metadata
    if format in _FOLDING_FORMATS and before.get("vflora.lora_format") in _FOLDING_FORMATS:
        alpha = before.get("ss_network_alpha", alpha)  # folded into the weights already: keep what it was
    implementation = "diffusers" if format == "diffusers" else "https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.implementation": implementation,
        "modelspec.hash_sha256": _payload_hash(tensors),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(weights.rank),
        "ss_network_alpha": alpha,
        "vflora.lora_format": format,
    }


def thumbnail_uri(image: Image.Image, side: int = 256) -> str:
    """Returns a small JPEG of `image` as a data URI."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _payload_hash(tensors: Mapping[str, Tensor]) -> str:
    # ModelSpec hashes the tensor bytes alone: everything behind the length prefix and the JSON header
    content = save(dict(tensors))
    start = 8 + int.from_bytes(content[:8], "little")
    return "0x" + hashlib.sha256(content[start:]).hexdigest()
