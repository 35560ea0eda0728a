"""`vflora bench attention`: every attention kernel against fp32 arithmetic, forward and backward, and how fast it is.

Kernels whose forward pass is right and whose gradient is not have been shipped, and a run trained with one looks
healthy: this table is what to look at before one is chosen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from tqdm import tqdm

from vflora.bench.step import device_name
from vflora.config import TORCH_DTYPES, Precision, require
from vflora.devices import torch_device
from vflora.models.attention_choice import BACKENDS, attend, attention_errors, attention_inputs
from vflora.models.speed_config import AttentionKernel

KERNELS = get_args(AttentionKernel)


@dataclass(frozen=True)
class BenchAttentionConfig:
    """What is measured."""

    tokens: list[int] = field(default_factory=lambda: [1031, 8759])
    """Lengths of the sequence; 8759 is a training step at 480x848 with 17 frames."""
    heads: int = 16
    """Heads of the attention."""
    head_dim: int = 128
    """Width of each."""
    kernels: list[str] = field(default_factory=lambda: list(KERNELS))
    """Which to measure: native (PyTorch's choice), flash, cudnn, efficient."""
    dtype: Precision = "bf16"
    """Precision of the inputs."""
    device: str = "auto"
    """Where to compute: auto takes the accelerator if there is one, else the CPU."""
    repeats: int = 5
    """Timed calls of each kind; the median counts."""
    output: Path | None = None
    """JSON file for all numbers."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kernels) - set(KERNELS))
        require(not unknown, f"--kernels {' '.join(unknown)} is not known: choose among {' '.join(KERNELS)}.")
        for name in ("heads", "head_dim", "repeats"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1.")
        require(all(n >= 1 for n in self.tokens), "--tokens must be at least 1.")


def run(config: BenchAttentionConfig) -> list[dict[str, Any]]:
    """Measures, prints and returns a row per kernel and length; writes JSON if asked to.

    A kernel that does not run on this device has the reason in its row, under `failed`.
    """
    device = torch_device(config.device)
    pairs = [(tokens, kernel) for tokens in config.tokens for kernel in config.kernels]
    rows = [_row(config, device, tokens, kernel) for tokens, kernel in tqdm(pairs, desc="kernels")]
    tqdm.write("\n".join([HEADER, *map(line, rows)]))
    if config.output is not None:
        facts = {"device": device_name(device), "torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
        settings = {name: str(value) if name == "output" else value for name, value in asdict(config).items()}
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(facts | {"bench": settings, "rows": rows}, indent=1))
    return rows


def _row(config: BenchAttentionConfig, device: torch.device, tokens: int, kernel: str) -> dict[str, Any]:
    shape = (config.heads, config.head_dim, TORCH_DTYPES[config.dtype], device, tokens)
    row: dict[str, Any] = {"kernel": kernel, "tokens": tokens}
    try:
        row |= attention_errors(kernel, *shape)  # pyright: ignore[reportArgumentType]
    except RuntimeError as error:
        return row | {"failed": str(error).splitlines()[0]}
    *inputs, wanted = attention_inputs(*shape)

    @torch.no_grad()
    def forward() -> None:
        attend(*inputs, backend=BACKENDS[kernel])

    out = attend(*inputs, backend=BACKENDS[kernel])

    def backward() -> None:
        torch.autograd.grad(out, inputs, wanted, retain_graph=True)

    operations = 4 * config.heads * tokens**2 * config.head_dim
    for name, function, share in (("forward", forward, 1.0), ("backward", backward, 2.5)):
        seconds = _seconds(function, config.repeats, device)
        row |= {f"{name}_ms": 1e3 * seconds, f"{name}_tflops": share * operations / seconds / 1e12}
    return row


def _seconds(function: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Median time of a call, waiting for the device before and after each."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - began)
    return median(times[1:])  # the first warms up


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


_ERRORS = ("output", "gradient of the queries", "gradient of the keys", "gradient of the values")
HEADER = (
    f"{'kernel':<11}{'tokens':>8}{'out':>10}{'dq':>10}{'dk':>10}{'dv':>10}{'fwd ms':>10}{'bwd ms':>10}{'TFLOP/s':>16}"
)


def line(row: dict[str, Any]) -> str:
    """Formats one row: |value - fp32 arithmetic| / |fp32 arithmetic|, times, and rates forward / backward."""
    start = f"{row['kernel']:<11}{row['tokens']:>8}"
    if "failed" in row:
        return f"{start}  does not run here: {row['failed'][:80]}"
    errors = "".join(f"{row[name]:>10.1e}" for name in _ERRORS)
    rates = f"{row['forward_tflops']:.1f} / {row['backward_tflops']:.1f}"
    return f"{start}{errors}{row['forward_ms']:>10.3f}{row['backward_ms']:>10.3f}{rates:>16}"
