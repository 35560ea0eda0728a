"""Fills a model from safetensors files one tensor at a time, renaming on the way.

The model starts without memory, so the peak is one copy of it plus one tensor. A tensor that is read is a view of its
file: only what is used of it comes from the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from vflora.distributed.launch import is_first
from vflora.errors import UserError

Convert = Callable[[str, Tensor], dict[str, Tensor]]
"""Key in the files and tensor -> model keys and tensors; an empty dict for a key it does not know."""


@dataclass(frozen=True)
class WeightFiles:
    """Where a model's weights lie, and what it calls them.

    Attributes:
        shards: safetensors files; all their tensors belong to the model.
        convert: renames and reshapes one tensor.
    """

    shards: Sequence[Path]
    convert: Convert

    def require_fit(self, wanted: Mapping[str, torch.Size]) -> None:
        """Compares the files with a model, without reading the tensors.

        Args:
            wanted: the shape of every tensor of the model.

        Raises:
            UserError: if tensors are missing in the files or of another shape, or the files hold something the model
                has no place for.
        """
        found: set[str] = set()
        left_over: list[str] = []
        for shard in self.shards:
            for key, shape in sorted(read_shapes([shard]).items()):
                converted = self.convert(key, torch.empty(shape, device="meta"))
                if not converted or not converted.keys() <= wanted.keys():
                    left_over.append(key)
                    continue
                for name, value in converted.items():
                    if value.shape != wanted[name]:
                        raise UserError(
                            f"{key} in {shard} is {list(value.shape)} but the model needs {list(wanted[name])}: "
                            "check that config.json belongs to these weights."
                        )
                found |= converted.keys()
        missing = sorted(set(wanted) - found)
        if missing or left_over:
            raise UserError(
                f"the weights in {self.shards[0].parent} do not fit: {_few('missing', missing)}"
                f"{_few('not known', left_over)}download them again, or check that they belong to HunyuanVideo-1.5."
            )

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor as a view of its file, under the model's name for it. Call `require_fit` first.

        Raises:
            UserError: if a file is cut short.
        """
        keys = {shard: sorted(read_shapes([shard])) for shard in self.shards}
        with tqdm(
            total=sum(map(len, keys.values())),
            desc=f"loading {self.shards[0].parent.name}",
            unit="tensor",
            delay=2,
            disable=not is_first(),
        ) as bar:
            for shard, names in keys.items():
                with _opened(shard) as file:
                    for key in names:
                        yield from self.convert(key, file.get_tensor(key)).items()
                        bar.update()


def fill(model: nn.Module, files: WeightFiles, dtype: torch.dtype | None, device: torch.device | str) -> None:
    """Loads every tensor of the files into `model`, which may be on the meta device.

    Args:
        model: changed in place.
        files: with its weights.
        dtype: of the parameters; None keeps that of the files.
        device: where the parameters go.

    Raises:
        UserError: if the files do not fit the model, before anything is read.
    """
    files.require_fit({name: value.shape for name, value in model.state_dict().items()})
    for name, value in files.read():
        set_module_tensor_to_device(model, name, device, value=value, dtype=dtype or value.dtype)


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


def _few(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}; "


def _opened(shard: Path):
    try:
        return safe_open(shard, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{shard} is cut short or damaged ({error}): download it again.") from error
