"""The projection head: a small MLP from DINOv3 features to identity embeddings, and its files.

A head is saved as safetensors with its layout in the metadata. Heads that others trained as `.pt` are read by
`vflora.models.foreign_heads`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from vflora.errors import UserError
from vflora.models.foreign_heads import ForeignHead, read_torch_file, recognise

METADATA_KEY = "vflora_head"
HEAD_FILE = "identity_head.safetensors"
"""What the head is called in a folder: the best one of a run, or that of a checkpoint."""
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


@dataclass(frozen=True)
class HeadSpec:
    """What a head looks like, and which backbone it belongs to.

    Attributes:
        in_width: width of the backbone features it reads.
        dims: output width of each Linear layer; the last is the width of the embedding.
        activation: gelu or relu.
        layernorm: whether hidden layers are normalised.
        dropout: probability used while training.
        backbone: kind and name of the backbone it was trained on; empty where nobody wrote it down.
        layout: the layers in order, from linear, norm, act and dropout; empty for the usual one.
    """

    in_width: int
    dims: tuple[int, ...]
    activation: str = "gelu"
    layernorm: bool = True
    dropout: float = 0.1
    backbone: str = ""
    layout: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.dims or min(self.dims) < 1:
            raise UserError(f"--proj_dims {list(self.dims)} must be one or more positive widths: try 512 256.")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"--activation {self.activation} is unknown: use gelu or relu.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout} must be at least 0 and below 1: the default is 0.1.")
        if not self.layout:
            object.__setattr__(self, "layout", _usual_layout(len(self.dims), self.layernorm))


def _usual_layout(linears: int, layernorm: bool) -> tuple[str, ...]:
    hidden = ("linear", "norm", "act", "dropout") if layernorm else ("linear", "act", "dropout")
    return hidden * (linears - 1) + ("linear",)


class ProjectionHead(nn.Module):
    """MLP whose output has length one."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        layers: list[nn.Module] = []
        width, dims = spec.in_width, iter(spec.dims)
        for kind in spec.layout:
            if kind == "linear":
                out = next(dims)
                layers.append(nn.Linear(width, out))
                width = out
            elif kind == "norm":
                layers.append(nn.LayerNorm(width))
            elif kind == "act":
                layers.append(ACTIVATIONS[spec.activation]())
            else:
                layers.append(nn.Dropout(spec.dropout))
        self.net = nn.Sequential(*layers)

    def forward(self, features: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Maps features to unit vectors.

        Args:
            features: [B, in_width], fp32.
            generators: one per row, for dropout in training: a resumed or resharded run then drops the same
                units. Without them dropout uses PyTorch's global generator.

        Returns:
            [B, dims[-1]], fp32, length one.
        """
        hidden = features
        for layer in self.net:
            if isinstance(layer, nn.Dropout) and generators is not None and self.training:
                hidden = _keyed_dropout(hidden, layer.p, generators)
            else:
                hidden = layer(hidden)
        return nn.functional.normalize(hidden, dim=-1)

    def check_width(self, width: int, source: str) -> None:
        """Refuses a backbone of another width.

        Raises:
            UserError: naming both widths and what to do.
        """
        if width != self.spec.in_width:
            trained_on = f" ({self.spec.backbone})" if self.spec.backbone else ""
            raise UserError(
                f"The identity head {source} was trained on features of width {self.spec.in_width}{trained_on}, "
                f"but this backbone has width {width}: pass the backbone the head was trained on, or train a "
                "head for this one with `vflora train-head`."
            )


def _keyed_dropout(hidden: Tensor, probability: float, generators: Sequence[Generator]) -> Tensor:
    if probability == 0:
        return hidden
    draws = torch.stack([torch.rand(hidden.shape[1:], generator=g) for g in generators])
    return hidden * (draws >= probability).to(hidden) / (1 - probability)


def new_head(spec: HeadSpec, generator: Generator) -> ProjectionHead:
    """Builds an untrained head whose weights depend on `generator` alone (nn.Linear's own distribution)."""
    with torch.device("meta"):
        head = ProjectionHead(spec)
    head = head.to_empty(device="cpu")
    with torch.no_grad():
        for layer in head.net:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(layer, nn.LayerNorm):
                layer.reset_parameters()
    return head


def save_head(head: ProjectionHead, path: Path) -> None:
    """Writes the head in fp32 with its spec in the metadata."""
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in head.state_dict().items()}
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(asdict(head.spec))})
    path.chmod(0o644)  # safetensors writes for its owner alone; heads are made to be shared


def load_head(path: str | Path) -> ProjectionHead:
    """Reads a head: our safetensors (or the folder `vflora train-head` wrote), or a `.pt` of plain tensors.

    Returns:
        the head in fp32, in eval mode, on the CPU.

    Raises:
        UserError: if there is no such file, or it is not a head.
    """
    path = find_head(path)
    if path.suffix == ".safetensors":
        spec, tensors = _read_safetensors(path)
        if spec is not None:
            head = ProjectionHead(spec)
            _load_strictly(head, tensors, path)
            return head.eval()
        found = recognise(tensors, path)
    else:
        found = recognise(read_torch_file(path), path)
    return _from_foreign(found, path)


def find_head(path: str | Path) -> Path:
    """Returns the file that `--dino_head_path` means: itself, or the best head of a run's folder.

    Raises:
        UserError: if there is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / HEAD_FILE
    if path.is_file():
        return path
    sibling = path.with_suffix(".safetensors")
    if sibling.is_file():
        raise UserError(f"There is no {path}, but {sibling} is there: pass that to --dino_head_path.")
    raise UserError(
        f"There is no identity head at {path}: train one with `vflora train-head`, or correct --dino_head_path."
    )


def _read_safetensors(path: Path) -> tuple[HeadSpec | None, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): copy or train it again.") from error
    if METADATA_KEY not in metadata:
        return None, tensors
    fields = json.loads(metadata[METADATA_KEY])
    return HeadSpec(**{**fields, "dims": tuple(fields["dims"]), "layout": tuple(fields["layout"])}), tensors


def _from_foreign(found: ForeignHead, path: Path) -> ProjectionHead:
    spec = HeadSpec(
        in_width=found.in_width,
        dims=found.dims,
        activation=found.activation,
        layernorm="norm" in found.layout,
        dropout=0.0,
        layout=found.layout,
    )
    head = ProjectionHead(spec)
    weighted = [(str(i), layer) for i, layer in enumerate(head.net) if isinstance(layer, nn.Linear | nn.LayerNorm)]
    tensors = {}
    for (index, layer), (weight, bias) in zip(weighted, found.layers, strict=True):
        tensors[f"net.{index}.weight"] = weight
        tensors[f"net.{index}.bias"] = layer.bias.detach() * 0 if bias is None else bias
    _load_strictly(head, tensors, path)
    return head.eval()


def _load_strictly(head: ProjectionHead, tensors: dict[str, Tensor], path: Path) -> None:
    expected = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    if {name: tuple(value.shape) for name, value in tensors.items()} != expected:
        raise UserError(f"{path} does not hold the tensors that its layout {head.spec.layout} needs: train it again.")
    head.load_state_dict({name: value.float() for name, value in tensors.items()})
