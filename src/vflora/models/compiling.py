"""Settings of torch.compile that everything compiled here relies on."""

from __future__ import annotations

import torch._dynamo

_RECOMPILE_LIMIT = 64


def allow_recompiles() -> None:
    """Raises the number of variants of a function that may be compiled: past it PyTorch quietly runs uncompiled."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _RECOMPILE_LIMIT)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 64 * _RECOMPILE_LIMIT)
