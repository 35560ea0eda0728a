"""What `--mode` stands for where several processes train: presets that work as they stand. Pure but for one line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, fields

from vflora.presets import MODE, expand_mode, flag_values, saved_settings, typed

logger = logging.getLogger(__name__)

WHOLE_BASE = ("weight_storage", "rollout_precision", "rollout_graphs", "student_graphs", "block_offload")
"""Flags that do not go with a base in pieces, but for their plain values."""


def expand_mode_for(processes: int, arguments: Sequence[str], groups: Sequence[type]) -> list[str]:
    """Expands the mode, and settles what its flags and several processes cannot have at the same time.

    A mode leaves every process its whole base where its flags need that, as a single process has it: memory and
    numbers are those of the mode. Only where `--enable_fsdp true` is on the command line (every saved run of a single
    process has it too, without meaning it) the mode does without those flags. A flag that is given stays, and may be
    refused.

    Args:
        processes: that torchrun started.
        arguments: as for `expand_mode`.
        groups: as for `expand_mode`.
    """
    expanded = expand_mode(arguments, groups)
    of_mode = dict(flag_values(expanded[len(arguments) :]))
    spread = any(field.name == "enable_fsdp" for group in groups for field in fields(group))
    if processes == 1 or not of_mode or not spread:
        return expanded
    presets = [group() for group in groups if hasattr(group, "presets")]
    plain = {name: typed(value) for preset in presets for name, value in asdict(preset).items()}
    given = dict(flag_values(arguments))
    settings = saved_settings(flag_values(arguments)) | given
    # Trajectories on the disk were rolled out elsewhere: how, is no matter of these processes.
    inert = "rollout_" if settings.get("trajectory_dir") else "-"
    wanted = [name for name in WHOLE_BASE if of_mode.get(name, plain[name]) != plain[name]]
    needed = [name for name in wanted if not name.startswith(inert)]
    if not needed:
        return expanded
    if given.get("enable_fsdp") != "true":
        return [*expanded, "--enable_fsdp=false"]
    said = ", ".join(f"--{name}" for name in needed)
    logger.info("--mode %s on %d processes leaves out what they cannot have: %s", settings[MODE], processes, said)
    return [*expanded, *(f"--{name}={plain[name]}" for name in needed)]
