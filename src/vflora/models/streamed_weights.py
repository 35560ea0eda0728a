"""Fills a model from safetensors files one tensor at a time, renaming on the way.

The model starts without memory, so the peak is one copy of it plus one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from vflora.distributed.voice import is_first
from vflora.errors import UserError

Convert = Callable[[str, Tensor], dict[str, Tensor]]
"""Original key and tensor -> model keys and tensors; an empty dict for a key it does not know."""


def find_shards(folder: Path) -> list[Path]:
    """Returns the weight files in `folder`, in order.

    Raises:
        UserError: if there are none.
    """
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise UserError(f"there are no .safetensors files in {folder}: `vflora download` prints how to get them.")
    return shards


def read_shapes(shards: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor, without reading the tensors.

    Raises:
        UserError: if a file is cut short.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        with _opened(shard) as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes


def fill(
    model: nn.Module,
    shards: Sequence[Path],
    convert: Convert,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Loads and converts every tensor of `shards` into `model`, which may be on the meta device.

    Args:
        model: changed in place.
        shards: safetensors files.
        convert: renames and reshapes one tensor.
        dtype: of the parameters; None keeps that of the files.
        device: where the parameters go.

    Raises:
        UserError: if parameters are missing in the files, or the files hold something the model has no place for.
    """
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    filled: set[str] = set()
    left_over: list[str] = []
    keys = {shard: sorted(_keys(shard)) for shard in shards}
    total = sum(len(names) for names in keys.values())
    with tqdm(
        total=total, desc=f"loading {shards[0].parent.name}", unit="tensor", delay=2, disable=not is_first()
    ) as bar:
        for shard, names in keys.items():
            with _opened(shard) as file:
                for key in names:
                    converted = convert(key, file.get_tensor(key))
                    if not converted or not converted.keys() <= wanted.keys():
                        left_over.append(key)
                        continue
                    for name, value in converted.items():
                        if value.shape != wanted[name]:
                            raise UserError(
                                f"{key} in {shard} is {list(value.shape)} but the model needs {list(wanted[name])}: "
                                "check that config.json belongs to these weights."
                            )
                        set_module_tensor_to_device(model, name, device, value=value, dtype=dtype or value.dtype)
                        filled.add(name)
                    bar.update()
    missing = sorted(set(wanted) - filled)
    if missing or left_over:
        raise UserError(
            f"the weights in {shards[0].parent} do not fit: {_few('missing', missing)}{_few('not known', left_over)}"
            "download them again, or check that they belong to HunyuanVideo-1.5."
        )


def _few(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}; "


def _keys(shard: Path) -> list[str]:
    with _opened(shard) as file:
        return list(file.keys())


def _opened(shard: Path):
    try:
        return safe_open(shard, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{shard} is cut short or damaged ({error}): download it again.") from error
