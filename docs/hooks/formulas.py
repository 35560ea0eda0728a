"""Fences of the kind `math`, written in LaTeX, become MathML, which browsers draw by themselves."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Registers the fence."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _formula})
    return config


def _formula(source: str, *_args: Any, **_options: Any) -> str:
    return f"<p>{convert(source, display='block')}</p>"
