"""The LoRA layers of the student with the one way through them that training takes.

peft's layer asks at every call for merged weights, mixed batches, several adapters and kinds of LoRA. On the way to
a compiled block each of these questions becomes a condition that is checked again at every call, and without
compilation it is time of the Python that the accelerator waits for.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from vflora.models.lora import ADAPTER


class LeanLora(Linear):
    """A layer with the trained adapter and no other: peft's result, bit for bit, unless `narrow`."""

    narrow: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Maps [..., in] to [..., out]."""
        result = cast(Tensor, self.base_layer(x))
        if self._disable_adapters:
            return result
        down, up = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        scaling = self.scaling[ADAPTER]
        if self.narrow:
            return result + F.linear(F.linear(x, down.to(x.dtype)) * scaling, up.to(x.dtype))
        wide = self.lora_dropout[ADAPTER](x.to(down.dtype))
        return (result + F.linear(F.linear(wide, down), up) * scaling).to(result.dtype)


def lean_lora(transformer: nn.Module, *, narrow: bool = False) -> int:
    """Gives the LoRA layers of the trained adapter this way, in place; weights and names stay.

    Args:
        transformer: after `add_lora`.
        narrow: multiply in the precision of what goes through the layer, instead of fp32. The products are summed in
            fp32 either way; their factors are rounded. Four times less memory is moved. Layers with dropout stay wide.

    Returns:
        The number of layers that changed; others, of kinds that training does not make, stay as they are.
    """
    changed = 0
    for module in transformer.modules():
        if type(module) in (Linear, LeanLora) and list(module.lora_A) == [ADAPTER] and not module.lora_variant:
            module.__class__ = LeanLora
            module = cast(LeanLora, module)
            module.narrow = narrow and isinstance(module.lora_dropout[ADAPTER], nn.Identity)
            changed += 1
    return changed
