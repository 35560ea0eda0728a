"""Recognises a projection head in a file that another program wrote: a bag of tensors without a description.

Linear layers are the 2-D weights, LayerNorms the 1-D ones that come with a bias; their order in the file is the
order of the layers, and gaps between numbers ("0.weight", "1.weight", "4.weight") tell where the layers without
weights sit. Only plain tensors are read, never pickled objects.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from vflora.errors import UserError

# Everything that reading random bytes was seen to raise.
_BROKEN = (
    *(pickle.UnpicklingError, EOFError, BadZipFile, RuntimeError, struct.error),
    *(LookupError, ValueError, AttributeError, AssertionError, TypeError),
)
_ACTIVATION_FIELDS = ("activation", "act", "act_fn")


@dataclass(frozen=True)
class ForeignHead:
    """A recognised head.

    Attributes:
        in_width: width of the features it reads.
        dims: output width of each Linear layer.
        layout: the layers in order, from linear, norm and act.
        activation: gelu, unless the file says relu.
        layers: weight and bias of each Linear and LayerNorm, in order.
    """

    in_width: int
    dims: tuple[int, ...]
    layout: tuple[str, ...]
    activation: str
    layers: tuple[tuple[Tensor, Tensor | None], ...]


def read_torch_file(path: Path) -> Any:
    """Reads a `.pt` of tensors and plain values.

    Raises:
        UserError: if it holds anything else (a pickled object could run code), or is broken.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        raise UserError(
            f"{path} is not a file of plain tensors, so it is not opened (it could run code): ask its author for "
            "the state dict saved with torch.save(head.state_dict(), ...) or as safetensors."
        ) from error


def recognise(content: Any, path: Path) -> ForeignHead:
    """Finds the one head inside `content`, a dict of tensors that may be nested and have prefixes.

    Raises:
        UserError: if there is none, or more than one.
    """
    activation = _stated_activation(content)
    found = []
    for tensors in _tensor_dicts(content):
        for group in _groups(tensors):
            head = _as_chain(group, activation)
            if head is not None:
                found.append(head)
    if len(found) != 1:
        what = "no chain of Linear layers" if not found else f"{len(found)} chains of Linear layers"
        raise UserError(
            f"{path} holds {what}, so it is not clear what the identity head is: save its state dict alone, "
            "or train one with `vflora train-head`."
        )
    return found[0]


def _tensor_dicts(content: Any) -> Iterator[dict[str, Tensor]]:
    """Yields every dict in `content` that has named tensors; optimizer states are not heads."""
    if not isinstance(content, dict):
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield tensors
    for key, value in content.items():
        if isinstance(key, str) and not key.startswith(("optim", "sched", "ema")):
            yield from _tensor_dicts(value)


def _groups(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Splits a whole model's dict into candidates: names that mention a head first, otherwise everything."""
    named = {k: v for k, v in tensors.items() if re.search(r"(^|[._])(head|proj\w*)[._]", k)}
    return [named] if named and len(named) < len(tensors) else [tensors]


def _as_chain(tensors: dict[str, Tensor], activation: str) -> ForeignHead | None:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parent, _, name = key.rpartition(".")
        if name not in ("weight", "bias") or not value.is_floating_point():
            return None
        layers.setdefault(parent, {})[name] = value
    kinds, dims, width, first = [], [], None, None
    for parts in layers.values():
        weight, bias = parts.get("weight"), parts.get("bias")
        if weight is None or weight.ndim not in (1, 2) or (bias is not None and bias.shape != weight.shape[:1]):
            return None
        reads = weight.shape[-1]
        if width is not None and reads != width:
            return None
        first = reads if first is None else first
        width = weight.shape[0]
        kinds.append("linear" if weight.ndim == 2 else "norm")
        if weight.ndim == 2:
            dims.append(width)
    if not dims or first is None:
        return None
    return ForeignHead(
        in_width=first,
        dims=tuple(dims),
        layout=_with_activations(kinds, _numbers(list(layers))),
        activation=activation,
        layers=tuple((p["weight"], p.get("bias")) for p in layers.values()),
    )


def _numbers(names: list[str]) -> list[int] | None:
    """Returns the positions of the layers where the names are one prefix and a number each."""
    matches = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    if not all(matches) or len({m.group(1) for m in matches if m}) != 1:
        return None
    numbers = [int(m.group(2)) for m in matches if m]
    return numbers if numbers == sorted(set(numbers)) else None


def _with_activations(kinds: list[str], numbers: list[int] | None) -> tuple[str, ...]:
    """Puts one activation between each two Linear layers: in the first gap, or just before the next Linear."""
    linears = [i for i, kind in enumerate(kinds) if kind == "linear"]
    places = set()
    for start, end in zip(linears, linears[1:], strict=False):
        between = range(start, end)
        gaps = [i for i in between if numbers is not None and numbers[i + 1] - numbers[i] > 1]
        places.add(gaps[0] if gaps else end - 1)
    layout: list[str] = []
    for i, kind in enumerate(kinds):
        layout.append(kind)
        if i in places:
            layout.append("act")
    return tuple(layout)


def _stated_activation(content: Any) -> str:
    """Looks for the activation among the settings that a checkpoint may carry; gelu is the reference's default."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in _ACTIVATION_FIELDS and value in ("gelu", "relu"):
                return value
        for value in content.values():
            if isinstance(value, dict) and _stated_activation(value) == "relu":
                return "relu"
    return "gelu"
