"""Video-Free LoRA: new characters for an image-to-video model, from still images alone.

The names below are for notebooks. They load their modules when they are first used, so that `import vflora` costs
nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# The workspace with which cuBLAS is repeatable, see determinism.py. PyTorch 2.9 looks once, at a process's first
# product; from 2.10 on it brings such a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if TYPE_CHECKING:
    from vflora.demo import world_folder as world_folder
    from vflora.errors import UserError as UserError
    from vflora.inference import open_image as open_image
    from vflora.notebook import configure as configure
    from vflora.notebook import load_pipeline as load_pipeline
    from vflora.notebook import open_training as open_training
    from vflora.notebook import run as run
    from vflora.sampling import generate_video as generate_video
    from vflora.video_io import write_mp4 as write_mp4

__version__ = "0.1.0"

_PLACES = {
    "UserError": "vflora.errors",
    "configure": "vflora.notebook",
    "generate_video": "vflora.sampling",
    "load_pipeline": "vflora.notebook",
    "open_image": "vflora.inference",
    "open_training": "vflora.notebook",
    "run": "vflora.notebook",
    "world_folder": "vflora.demo",
    "write_mp4": "vflora.video_io",
}
"""Where each public name is. None of them is the name of a module, which would take its place once imported."""

__all__ = ["__version__", *_PLACES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'vflora' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
