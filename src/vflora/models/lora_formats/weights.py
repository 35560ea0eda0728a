"""A LoRA in memory, named the diffusers way, whatever file it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraModule:
    """The low-rank update of one Linear layer: weight + (alpha / rank) * up @ down.

    Attributes:
        down: lora_A [rank, in].
        up: lora_B [out, rank].
        alpha: numerator of the scale.
    """

    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        if self.down.ndim != 2 or self.up.ndim != 2 or self.down.shape[0] != self.up.shape[1]:
            raise ValueError(f"down {tuple(self.down.shape)} and up {tuple(self.up.shape)} share no rank")

    @property
    def rank(self) -> int:
        """Rows of `down`, columns of `up`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied with: alpha / rank."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """Returns the change of the layer's weight, float64 [out, in]."""
        return self.up.double() @ self.down.double() * self.scale

    def with_scale_one(self) -> LoraModule:
        """Moves the scale into `up`, so that alpha equals rank and a reader that ignores alpha is right.

        A scale that is no power of two would be rounded in bf16 or fp16; both matrices become fp32 then.
        """
        if self.scale == 1.0:
            return self
        up = (self.up.double() * self.scale).to(self.up.dtype)
        if torch.equal(up.double(), self.up.double() * self.scale):
            return LoraModule(self.down, up, float(self.rank))
        up = (self.up.double() * self.scale).float()
        return LoraModule(self.down.float(), up, float(self.rank))


@dataclass(frozen=True)
class LoraWeights:
    """All low-rank updates of a transformer.

    Attributes:
        modules: diffusers module name -> update.
        metadata: the text header of the file (see `vflora.models.lora_formats.header`).
    """

    modules: Mapping[str, LoraModule]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank that most modules have."""
        return Counter(m.rank for m in self.modules.values()).most_common(1)[0][0]

    @property
    def alpha(self) -> float:
        """The alpha that most modules have."""
        return Counter(m.alpha for m in self.modules.values()).most_common(1)[0][0]

    def __len__(self) -> int:
        return len(self.modules)
