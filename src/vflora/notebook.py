"""What a notebook needs besides the parts themselves: commands and their settings as Python calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any

from vflora import train
from vflora.cli import COMMANDS, execute, parse
from vflora.config import Precision, require
from vflora.devices import torch_device
from vflora.errors import UserError
from vflora.inference import load_with_adapters
from vflora.presets import typed
from vflora.sampling import Pipeline


def configure(command: str, **settings: Any) -> Any:
    """Returns the configuration of a command, with the checks and the defaults of the command line.

    Args:
        command: as on the command line, such as "train" or "data pack".
        **settings: flags by their names, without the dashes; the reference lists them. Lists may be given as one
            value where there is only one.

    Raises:
        UserError: for an unknown command or flag, and for a value that the command refuses.
    """
    require(command in COMMANDS, f"There is no command {command!r}: use one of {', '.join(COMMANDS)}.")
    try:
        return parse(command, [f"--{name}={typed(value)}" for name, value in settings.items()])
    except SystemExit as stop:  # of the one flag that prints and ends
        raise UserError("There is nothing to print here: leave out print_config, the settings are returned.") from stop


def run(command: str, **settings: Any) -> Any:
    """Runs a command, as `vflora COMMAND` does, and returns what it made.

    Args:
        command: as on the command line, such as "data pack", "export" or "compare".
        **settings: see `configure`.

    Returns:
        What the command wrote: the checkpoint of "train", the folder of "train-head", the file of "export" and
        "generate", the page of "compare", the report of "demo"; `data check` returns 0 where nothing is wrong.

    Raises:
        UserError: for settings or input that the command refuses.
    """
    config = configure(command, **settings)
    return execute(command, config)


@contextmanager
def open_training(**settings: Any) -> Iterator[train.Run]:
    """Opens a training run, new or resumed, whose steps you take yourself.

    Logs, checkpoints and validation are those of `vflora train`; the run's files are closed at the end of the
    `with` block.

    Args:
        **settings: the flags of `vflora train`.

    Yields:
        The run: `step()`, `save()`, `step_count`, `total_steps`, `is_finished`.

    Raises:
        UserError: for whatever is wrong with the settings, the data, the models or the checkpoint.
    """
    with train.opened(configure("train", **settings)) as run:
        yield run


def load_pipeline(
    model_path: str | PathLike[str],
    lora_path: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    *,
    lora_scale: float | Sequence[float] = 1.0,
    transformer_version: str = "480p_i2v",
    dtype: Precision = "bf16",
    device: str = "auto",
    offloading: bool = True,
    group_offloading: bool = False,
    vae_tiling: bool = True,
    prompts: str | Sequence[str] | None = None,
) -> Pipeline:
    """Loads a model, with LoRAs or without, ready for `generate_video`.

    Args:
        model_path: folder or hub name of the pipeline, in the layout of diffusers or the original one.
        lora_path: one or several LoRA files, folders or training checkpoints, of any of the four formats.
        lora_scale: strength of each, or one for all, on top of alpha / rank.
        transformer_version: transformer of the original layout, such as 480p_i2v or 720p_i2v.
        dtype: bf16 or fp32, of the weights.
        device: auto, or a device as PyTorch writes it.
        offloading: keep each model in main memory until it is its turn; no meaning on the CPU.
        group_offloading: bring in one layer at a time instead of one model: least memory, slower.
        vae_tiling: decode videos larger than 256 x 256 pixels in overlapping tiles.
        prompts: all that you will ask `generate_video` for, with the negative ones that are not empty: they are
            encoded now and the text encoders go, which saves 15 GB of main memory. None keeps the encoders for any
            prompt.

    Returns:
        The pipeline of diffusers; its own methods work as usual, where no `prompts` were given.

    Raises:
        UserError: if there is no pipeline, or a LoRA cannot be read or does not fit.
    """
    paths = [lora_path] if isinstance(lora_path, str | PathLike) else list(lora_path)
    scales = list(lora_scale) if isinstance(lora_scale, Sequence) else [lora_scale]
    require(
        len(scales) in (1, len(paths)),
        f"lora_scale has {len(scales)} values for {len(paths)} LoRAs: give one, or as many.",
    )
    pipeline, _ = load_with_adapters(
        fspath(model_path),
        [fspath(path) for path in paths],
        scales,
        transformer_version=transformer_version,
        dtype=dtype,
        device=torch_device(device),
        offloading=offloading,
        group_offloading=group_offloading,
        vae_tiling=vae_tiling,
        prompts=[prompts] if isinstance(prompts, str) else prompts,
    )
    return pipeline
