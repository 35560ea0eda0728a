"""`vflora download`: where every part of the model comes from, how big it is, and under which licence."""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from vflora.atomic import require_space
from vflora.config import require
from vflora.errors import UserError

log = logging.getLogger(__name__)

_TENCENT = "Tencent Hunyuan Community License (not for the EU, the UK and South Korea)"
_DINO_GIGABYTES = {"vits16": 0.1, "vitb16": 0.4, "vitl16": 1.2, "vith16plus": 3.4, "vit7b16": 27.0}


@dataclass(frozen=True)
class Part:
    """One thing to download.

    Attributes:
        key: short name, for --parts.
        what: what it is for.
        source: name of the repository.
        folder: where it goes, inside the output folder.
        gigabytes: about how much, in 10^9 bytes; None if not known.
        licence: what its users agree to.
        patterns: files to take; all if empty.
        gated: whether the licence has to be accepted on the web page first.
        hub: which program fetches it.
        optional: left out unless asked for.
    """

    key: str
    what: str
    source: str
    folder: str
    gigabytes: float | None
    licence: str
    patterns: tuple[str, ...] = ()
    gated: bool = False
    hub: Literal["hf", "modelscope"] = "hf"
    optional: bool = False

    def command(self, output_dir: Path) -> list[str]:
        """Returns the command line that fetches it."""
        target = str(output_dir / self.folder)
        if self.hub == "modelscope":
            words = ["modelscope", "download", "--model", self.source, "--local_dir", target]
        else:
            words = ["hf", "download", self.source, "--local-dir", target]
        for pattern in self.patterns:
            words += ["--include", pattern]
        return words


@dataclass(frozen=True)
class DownloadConfig:
    """What to download, and where to."""

    output_dir: Path = Path("models")
    """Folder that everything goes into."""
    layout: Literal["diffusers", "original"] = "diffusers"
    """diffusers: one repository with everything in it. original: the weights as first published, from five places."""
    transformer_version: str = "480p_i2v"
    """480p_i2v, 480p_i2v_distilled, 480p_i2v_step_distilled, 720p_i2v or 720p_i2v_distilled."""
    dino_model: str = "facebook/dinov3-vitl16-pretrain-lvd1689m"
    """DINOv3 backbone for the identity loss; the head must be trained on the same one."""
    parts: list[str] | None = None
    """Only these parts, by the short names that the command prints."""
    run: bool = False
    """Download now; without it the commands are only printed."""

    def __post_init__(self) -> None:
        known = {part.key for part in all_parts(self)}
        for key in self.parts or ():
            require(key in known, f"--parts {key} is unknown: choose from {', '.join(sorted(known))}.")


def run(config: DownloadConfig) -> None:
    """Prints the commands, or downloads.

    Raises:
        UserError: if the disk is too small, a licence has not been accepted, or the network does not answer.
    """
    parts = chosen_parts(config)
    if not config.run:
        log.info("%s", as_text(parts, config))
        return
    config.output_dir.mkdir(parents=True, exist_ok=True)
    wanted = sum(part.gigabytes or 0.0 for part in parts)
    require_space(config.output_dir, int(wanted * 1e9), "choose another disk with --output_dir.")
    for part in parts:
        log.info("%s: %s (%s)", part.key, part.source, part.licence)
        fetch(part, config.output_dir)
    log.info("%s", _next_step(config))


def all_parts(config: DownloadConfig) -> list[Part]:
    """Lists every part of the layout, optional ones too."""
    version = config.transformer_version
    dino = Part(
        "dino",
        "identity backbone",
        config.dino_model,
        "dinov3",
        next((size for name, size in _DINO_GIGABYTES.items() if f"-{name}-" in config.dino_model), None),
        "DINOv3 License",
        gated=True,
    )
    head = Part(
        "head",
        "a ready-made identity head for Pokemon; your own characters need `vflora train-head`",
        "Kev0208/DINOv3-PokeCon-Head",
        "identity_head",
        0.01,
        "see its page",
        optional=True,
    )
    if config.layout == "diffusers":
        name = f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{version}"
        return [Part("model", "the whole pipeline", name, f"HunyuanVideo-1.5-{version}", 54.2, _TENCENT), dino, head]
    home = "HunyuanVideo-1.5"
    return [
        Part(
            "model",
            "transformer and VAE",
            "tencent/HunyuanVideo-1.5",
            home,
            38.3,
            _TENCENT,
            (f"transformer/{version}/*", "vae/*", "scheduler/*", "*.json"),
        ),
        Part("llm", "text encoder", "Qwen/Qwen2.5-VL-7B-Instruct", f"{home}/text_encoder/llm", 16.6, "Apache 2.0"),
        Part(
            "byt5",
            "tokenizer of quoted text",
            "google/byt5-small",
            f"{home}/text_encoder/byt5-small",
            0.001,
            "Apache 2.0",
            ("*.json",),
        ),
        Part(
            "glyph",
            "encoder of quoted text",
            "AI-ModelScope/Glyph-SDXL-v2",
            f"{home}/text_encoder/Glyph-SDXL-v2",
            0.9,
            "see its page",
            ("assets/*.json", "checkpoints/byt5_model.pt"),
            hub="modelscope",
        ),
        Part(
            "siglip",
            "image encoder",
            "black-forest-labs/FLUX.1-Redux-dev",
            f"{home}/vision_encoder/siglip",
            0.9,
            "FLUX.1 [dev] Non-Commercial License",
            ("image_encoder/*", "feature_extractor/*"),
            gated=True,
        ),
        dino,
        head,
    ]


def chosen_parts(config: DownloadConfig) -> list[Part]:
    """Lists what to fetch: the parts named, or all that are not optional."""
    if config.parts:
        return [part for part in all_parts(config) if part.key in config.parts]
    return [part for part in all_parts(config) if not part.optional]


def as_text(parts: Sequence[Part], config: DownloadConfig) -> str:
    """Returns the commands with sizes and licences, ready to paste into a shell."""
    lines = []
    for part in parts:
        size = "size unknown" if part.gigabytes is None else f"about {part.gigabytes:g} GB"
        lines.append(f"# {part.key}: {part.what}; {size}; licence: {part.licence}")
        if part.gated:
            lines.append(f"#   accept the licence at https://huggingface.co/{part.source}, then `hf auth login`")
        if part.hub == "modelscope":
            lines.append("#   needs `pip install modelscope`")
        lines += [shlex.join(part.command(config.output_dir)), ""]
    total = sum(part.gigabytes or 0.0 for part in parts)
    lines += [f"# about {total:.0f} GB together", f"# {_next_step(config)}"]
    return "\n".join(lines)


def fetch(part: Part, output_dir: Path) -> None:
    """Downloads one part; what is there already is not fetched again.

    Raises:
        UserError: if it cannot be had, with what to do.
    """
    target = output_dir / part.folder
    if part.hub == "modelscope":
        if shutil.which("modelscope") is None:
            raise UserError(f"{part.source} is fetched by modelscope: install it with `pip install modelscope`.")
        if subprocess.run(part.command(output_dir), check=False).returncode:
            raise UserError(f"modelscope could not fetch {part.source}: run the command again, it resumes.")
        return
    try:
        snapshot_download(part.source, local_dir=target, allow_patterns=list(part.patterns) or None)
    except GatedRepoError as error:
        page = f"https://huggingface.co/{part.source}"
        raise UserError(f"{part.source} is gated: accept its licence at {page}, then run `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"there is no repository {part.source}, or it is private: check the name.") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise UserError(f"{part.source} cannot be reached: check the network and HF_HUB_OFFLINE.") from error
    except HfHubHTTPError as error:
        raise UserError(f"{part.source} could not be fetched ({error}): run this again, it resumes.") from error


def _next_step(config: DownloadConfig) -> str:
    folder = all_parts(config)[0].folder
    model, dino = config.output_dir / folder, config.output_dir / "dinov3"
    return f"then: vflora doctor --pipeline_dir {model} --dino_model_dir {dino}"
