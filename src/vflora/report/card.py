"""The Hugging Face model card that goes with the page."""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml
from PIL import Image

from vflora.file_names import first_free
from vflora.report.records import BASE, Comparison, scale_name
from vflora.video_io import frame_grid, read_mp4

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WEIGHTS = "pytorch_lora_weights.safetensors"
_LICENCE = {
    "license": "other",
    "license_name": "tencent-hunyuan-community",
    "license_link": "https://huggingface.co/tencent/HunyuanVideo-1.5/blob/main/LICENSE",
}


def write_card(comparison: Comparison, folder: Path, *, base_model: str | None) -> Path:
    """Writes README.md and preview.png into `folder`, beside the page.

    A README.md that somebody else wrote or edited stays, and the card gets a number.

    Args:
        comparison: what was found.
        folder: that will be uploaded.
        base_model: hub name of the base model; a local path names none.

    Returns:
        The card.
    """
    videos, labels = [], []
    for row in comparison.ranked()[:2]:
        for scale in (BASE, comparison.best_scale):
            videos.append(read_mp4(row.at(scale).path)[0])
            labels.append(
                f"{shorten(row.character, 24, placeholder='…')}, {'' if scale == BASE else 'LoRA '}{scale_name(scale)}"
            )
    frame_grid(videos, labels).save(folder / "preview.png")
    card = first_free(folder / "README.md", lambda place: not place.exists() or _is_own(place))
    card.write_text(_signed(card_text(comparison, base_model)), encoding="utf-8")
    return card


def _signed(text: str) -> str:
    """Adds a line that no reader sees, and that tells a card as it was written from an edited one."""
    return f"{text}\n<!-- written by vflora compare, {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _is_own(card: Path) -> bool:
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8", errors="replace")
    return text == _signed(text[: text.rfind("\n<!-- ")])


def card_text(comparison: Comparison, base_model: str | None) -> str:
    """Returns the card: metadata, what was measured, how to use it."""
    hub_name = base_model if base_model and _HUB_NAME.fullmatch(base_model) else None
    parts = [
        "---\n" + yaml.safe_dump(_metadata(comparison, hub_name), sort_keys=False, allow_unicode=True) + "---",
        f"# {comparison.title}",
        *([f"> {comparison.notice}"] if comparison.notice else []),
        "A LoRA that teaches an image-to-video model its characters from still images alone, made with vflora: "
        "distilled from the base model to keep its motion, with an identity loss that keeps the character.",
        "![Base and LoRA, frames from the first to the last](preview.png)",
        f"[index.html](index.html) plays all videos side by side; the scale that keeps at least 80 % of the motion "
        f"with the most identity is **{scale_name(comparison.best_scale)}**.",
        "## Numbers",
        _summary(comparison),
        f"Identity is the cosine between a frame and the reference picture as {comparison.judge} sees them, over the "
        "last quarter of the frames; the training did not optimise that embedder. Motion is the median ratio to the "
        "base model at the same seed. Distance is the mean squared error of the velocity against the base model's.",
        f"### By character, at scale {scale_name(comparison.best_scale)}",
        _by_character(comparison),
        "## Use",
        _usage(comparison, hub_name),
        "## Settings of the comparison",
        "```bash\n" + comparison.command + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def best_frame(comparison: Comparison) -> Image.Image:
    """Returns the middle frame of the row that gained most, at the best scale: the face of this LoRA."""
    frames, _ = read_mp4(comparison.ranked()[0].at(comparison.best_scale).path)
    return Image.fromarray(frames[len(frames) // 2])


def _metadata(comparison: Comparison, hub_name: str | None) -> dict[str, Any]:
    best = comparison.best_scale
    shown = [
        {"text": row.prompt, "output": {"url": f"videos/{row.at(best).path.name}"}} for row in comparison.ranked()[:4]
    ]
    based = {"base_model": hub_name, "base_model_relation": "adapter", **_LICENCE} if hub_name else {}
    return {
        **based,
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video",
        "tags": ["lora", "image-to-video", "hunyuanvideo-1.5", "vflora"],
        "widget": shown,
    }


def _summary(comparison: Comparison) -> str:
    lines = ["| | identity, last quarter | drift over the clip | motion | distance |", "|---|---|---|---|---|"]
    for scale in (BASE, *comparison.scales):
        lines.append(
            f"| {'' if scale == BASE else 'LoRA '}{scale_name(scale)} | {comparison.identity(scale):.3f} "
            f"| {comparison.drift(scale):+.3f} | {100 * comparison.motion(scale):.0f} % "
            f"| {comparison.deviation(scale):.2g} |"
        )
    return "\n".join(lines)


def _by_character(comparison: Comparison) -> str:
    best = comparison.best_scale
    lines = ["| character | base | LoRA | gain | motion |", "|---|---|---|---|---|"]
    for row in comparison.ranked():
        clip = row.at(best)
        name = row.character.replace("|", "\\|")
        lines.append(
            f"| {name} | {row.at(BASE).identity:.3f} | {clip.identity:.3f} | {row.gain(best):+.3f} "
            f"| {100 * clip.motion_ratio:.0f} % |"
        )
    return "\n".join(lines)


def _usage(comparison: Comparison, hub_name: str | None) -> str:
    scale = f"{comparison.best_scale:g}"
    model = hub_name or "/path/to/base_model"
    command = f"""```bash
vflora generate --model_path {model} --image_path picture.png --prompt "..." \\
  --lora_path {shlex.join(comparison.together or [_WEIGHTS])} --lora_scale {scale}
```"""
    if comparison.together:
        return f"{command}\n\nThe LoRAs act together; their files are not in this repository."
    return f"""{command}

or with diffusers:

```python
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline

pipeline = HunyuanVideo15ImageToVideoPipeline.from_pretrained("{model}", dtype=torch.bfloat16)
pipeline.transformer.load_lora_adapter("{_WEIGHTS}", prefix="transformer", adapter_name="vflora")
pipeline.transformer.set_adapters("vflora", {scale})
```"""
