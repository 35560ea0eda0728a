"""`vflora doctor`: what is missing on this machine before a run can start."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import psutil
import torch

from vflora.errors import UserError
from vflora.model_check import check_dino, check_pipeline
from vflora.models.projection_head import load_head

log = logging.getLogger(__name__)

_AREA = "--id_decode_downsample_mode area"
_LAYERS = "--group_offloading true"
_SHORT = "--val_video_length 17"
_TRAINING: tuple[tuple[float, Literal["ok", "warning"], str], ...] = (
    (83.0, "ok", "training fits in every mode, --mode fast included"),
    (60.0, "ok", f"training fits as it is, and with --mode fast {_AREA}"),
    (56.0, "ok", "training fits as it is; with --mode fast it does not"),
    (30.0, "warning", f"training fits with {_AREA}, or with --mode low_memory"),
    (23.0, "warning", "training fits with --mode low_memory"),
    (14.5, "warning", f"training fits with --mode low_memory {_SHORT}; generate and compare with {_LAYERS}"),
    (
        11.2,
        "warning",
        f"training fits with --mode low_memory {_AREA} {_SHORT} together; generate and compare with {_LAYERS}",
    ),
    (
        9.5,
        "warning",
        f"training fits with --mode low_memory {_AREA} {_SHORT} together; generate and compare, fewer than "
        f"121 frames, with {_LAYERS}",
    ),
)
"""Free GiB from which on, with a little to spare: how it trains at 480x848 with 17 frames, as it was measured."""
_MAIN_MEMORY_GIB = 25.0
"""What generating took, of all commands the most: 26 GB."""
_RUN_GB = 10.0
_MARKS = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: a problem stops a run, a warning may slow or limit it.
        what: what was found, and what to do about it.
        seen: whether it could be looked at.
    """

    level: Literal["ok", "warning", "problem"]
    what: str
    seen: bool = True


@dataclass(frozen=True)
class DoctorConfig:
    """What to look at; everything left out is skipped, with a word about it."""

    pipeline_dir: str | None = None
    """Folder or hub name of the pipeline, diffusers or original layout."""
    transformer_version: str = "480p_i2v"
    """Transformer of the original layout that you want to use."""
    dino_model_dir: str | None = None
    """Folder of the DINOv3 backbone."""
    dino_head_path: str | None = None
    """Projection head for it."""
    output_dir: Path = Path("outputs")
    """Folder that runs will write to."""


def run(config: DoctorConfig) -> int:
    """Looks at everything and reports it.

    Returns:
        1 if something would stop a run, else 0.
    """
    findings = list(examine(config))
    for finding in findings:
        log.info("%s  %s", _MARKS[finding.level], finding.what)
    log.info("%s", verdict(findings))
    return int(any(finding.level == "problem" for finding in findings))


def verdict(findings: Sequence[Finding]) -> str:
    """Says in one line what they come to."""
    problems = sum(finding.level == "problem" for finding in findings)
    if problems:
        return f"fix what says PROBLEM ({problems}) before you train the full model"
    if not all(finding.seen for finding in findings):
        return "nothing found that would stop a run, but not everything was looked at"
    return "this machine can train"


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """Yields what was found, part by part."""
    yield check_accelerator()
    yield _memory()
    yield _disk(config.output_dir)
    yield _video_encoder()
    if config.pipeline_dir is None:
        yield _unseen("model", "--pipeline_dir")
    else:
        yield _attempt("model", lambda: check_pipeline(str(config.pipeline_dir), config.transformer_version))
    if config.dino_model_dir is None:
        yield _unseen("DINOv3", "--dino_model_dir")
    else:
        yield _attempt("DINOv3", lambda: check_dino(str(config.dino_model_dir)))
    if config.dino_head_path is None:
        yield _unseen("identity head", "--dino_head_path")
    else:
        yield _attempt("identity head", lambda: _head(str(config.dino_head_path)))


def _unseen(part: str, flag: str) -> Finding:
    return Finding("warning", f"{part}: not looked at; give {flag} to have it checked", seen=False)


def check_accelerator() -> Finding:
    """Looks for a GPU, and compares its memory with the measured needs."""
    if not torch.cuda.is_available():
        return Finding("problem", f"accelerator: {_without_cuda(torch.version.cuda)}")
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    free, total = (value / 2**30 for value in torch.cuda.mem_get_info(index))
    name = f"accelerator: {properties.name}, {free:.0f} of {total:.0f} GiB free"
    if not torch.cuda.is_bf16_supported():
        return Finding("problem", f"{name}, but it has no bf16, which the model is trained in")
    return judge_memory(name, free)


def judge_memory(name: str, free_gib: float) -> Finding:
    """Says which modes of training fit into `free_gib`."""
    for needed, level, sentence in _TRAINING:
        if free_gib >= needed:
            return Finding(level, f"{name}: {sentence} (480x848, 17 frames)")
    least = f"training needs {_TRAINING[-1][0]:.1f} GiB free at the least, with --mode low_memory {_AREA}"
    return Finding("problem", f"{name}: {least}; generating 121 frames takes 11, with {_LAYERS}")


def _without_cuda(built_for: str | None) -> str:
    cause = (
        "this PyTorch was built without CUDA; if the machine has an NVIDIA GPU, install a PyTorch for CUDA"
        if built_for is None
        else f"this PyTorch is for CUDA {built_for} but finds no GPU; does `nvidia-smi` show one?"
    )
    return f"no GPU that PyTorch can use, and on the CPU only small models train, as in `vflora demo`: {cause}"


def _memory() -> Finding:
    free = psutil.virtual_memory().available / 2**30
    if free < _MAIN_MEMORY_GIB:
        return Finding(
            "warning",
            f"main memory: {free:.0f} GiB free; generating takes {_MAIN_MEMORY_GIB:.0f}, `vflora encode` 20, "
            "training 21 with --mode low_memory (reckoned: 25 unless encoded before, 16 without the mode)",
        )
    return Finding("ok", f"main memory: {free:.0f} GiB free")


def _disk(folder: Path) -> Finding:
    there = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(there).free / 1e9
    if free < _RUN_GB:
        return Finding("problem", f"disk: {free:.1f} GB free at {there}; a run with checkpoints wants {_RUN_GB:.0f}")
    return Finding("ok", f"disk: {free:.0f} GB free at {there}")


def _video_encoder() -> Finding:
    if "libx264" not in av.codecs_available:
        return Finding("problem", "video: this PyAV has no libx264; run `pip install --force-reinstall av`")
    return Finding("ok", "video: libx264 is there")


def _head(path: str) -> str:
    spec = load_head(path).spec
    trained_on = f", trained on {spec.backbone}" if spec.backbone else ""
    return f"{path} turns {spec.in_width} features into {spec.dims[-1]}{trained_on}"


def _attempt(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding("ok", f"{name}: {check()}")
    except UserError as error:
        return Finding("problem", f"{name}: {error}")
