"""Time and memory of a training step: every switch in one place.

The defaults change no result beyond the order of floating-point sums, but for the points that a guided rollout skips.
Whatever approximates says so in its help text, and `vflora bench accuracy` prints how far it is from the exact step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from vflora.config import require

AttentionKernel = Literal["native", "flash", "cudnn", "efficient"]
Mode = Literal["exact", "fast", "low_memory"]
Recompute = Literal["auto", "true", "false"]


@dataclass(frozen=True)
class SpeedConfig:
    """Time and memory."""

    mode: Mode = "exact"
    """Presets of the flags below; a flag that is given wins. exact: their defaults; fast: less time; low_memory: less
    memory. fast and low_memory approximate; of exact, only states between harvested points, where guidance skips some
    (--rollout_stride 1 computes all)."""
    compile: bool = False
    """Compile the transformer's blocks, one by one: about a minute at the start, then a third less time a step."""
    attention_backend: AttentionKernel = "native"
    """Attention kernel of the transformer's blocks; native is PyTorch's choice, `vflora bench attention` compares."""
    enable_gradient_checkpointing: Recompute = "auto"
    """Compute activations again in the backward pass: true, false, or auto, which recomputes what does not fit."""
    keep_student_graph: bool = False
    """Keep the student's activations while the identity loss is computed: one forward pass fewer, the most memory."""
    rollout_graphs: bool = False
    """Replay the teacher's passes as CUDA graphs, which takes the wait for Python out of rollouts; not with
    --block_offload."""
    student_graphs: bool = False
    """Replay the student's passes, forward and backward, as CUDA graphs; not with --block_offload or
    LoRA dropout."""
    rollout_precision: Literal["full", "fp8"] = "full"
    """fp8: the widest layers multiply in float8 between harvested points; approximates states, not targets."""
    rollout_stride: int | None = None
    """Compute only every so many points between harvested ones and extrapolate the rest; above 1 approximates. By
    default 2 with guidance, which asks the teacher twice at a point, and 1 without."""
    lora_precision: Literal["full", "bf16"] = "full"
    """bf16: the student's LoRA multiplies in the precision of the frozen layers; approximates by rounding."""
    weight_storage: Literal["full", "int8", "fp8"] = "full"
    """Keep the frozen weights of the blocks in 8 bits, half the memory; approximates the base model."""
    block_offload: bool = False
    """Keep the frozen weights in main memory and bring them in block by block, while the block before computes: exact,
    and 15 GiB less on the GPU, or 7 of 8-bit weights."""
    id_decode_recompute: bool = True
    """Compute the decoder's activations again in the backward pass of the identity loss; false is faster."""
    deterministic: bool | None = None
    """On a GPU, add up gradients in the same order every time: a run that is resumed or repeated on one machine has
    the same losses to the last bit. By default true, but not with the cudnn kernel, which has no such order."""
    id_decode_tile: int | None = None
    """Decode in tiles with sides of so many pixels, one at a time: the same result with the least memory."""

    @staticmethod
    def presets() -> dict[str, SpeedConfig]:
        """Returns what each mode stands for."""
        return {mode: SpeedConfig.preset(mode) for mode in _PRESETS}

    @classmethod
    def preset(cls, mode: str, **flags: Any) -> SpeedConfig:
        """Returns the settings of a mode, with `flags` on top: what `--mode` and flags are on a command line.

        Raises:
            UserError: for another mode, or flags that do not go together.
        """
        require(mode in _PRESETS, f"There is no mode {mode}: use {', '.join(_PRESETS)}.")
        return cls(**{"mode": mode, **_PRESETS[mode], **flags})

    @property
    def is_deterministic(self) -> bool:
        """Whether gradients have an order."""
        return self.attention_backend != "cudnn" if self.deterministic is None else self.deterministic

    def stride(self, guidance_scale: float) -> int:
        """Returns every how many points rollouts with so much guidance are computed."""
        return self.rollout_stride or (1 if guidance_scale == 1 else 2)

    def __post_init__(self) -> None:
        plain = all(getattr(self, f.name) == f.default for f in fields(self) if f.name != "mode")
        require(
            self.mode == "exact" or not plain,
            f"--mode {self.mode} with every flag at its plain value is --mode exact: say so (in Python, "
            f'SpeedConfig.preset("{self.mode}") has what the mode stands for).',
        )
        require(
            not (self.deterministic and self.attention_backend == "cudnn"),
            "--deterministic true is more than --attention_backend cudnn can do, which adds up gradients in any order: "
            "use --attention_backend native, or drop --deterministic.",
        )
        require(self.rollout_stride is None or self.rollout_stride >= 1, "--rollout_stride must be at least 1.")
        require(
            self.id_decode_tile is None or self.id_decode_tile >= 32,
            "--id_decode_tile must be at least 32 pixels.",
        )
        require(
            not (self.block_offload and self.enable_gradient_checkpointing == "false"),
            "--block_offload needs the blocks recomputed: drop --enable_gradient_checkpointing false, or give "
            "--block_offload false.",
        )
        require(
            not (self.block_offload and (self.rollout_graphs or self.student_graphs)),
            "--block_offload moves weights about, which graphs cannot replay: set it to false, or --rollout_graphs and "
            "--student_graphs.",
        )
        require(
            not (self.rollout_precision == "fp8" and self.weight_storage == "int8"),
            "--rollout_precision fp8 cannot multiply int8 weights: use --weight_storage fp8 or full.",
        )


_PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "fast": {
        "compile": True,
        "attention_backend": "cudnn",
        "lora_precision": "bf16",
        "keep_student_graph": True,
        "rollout_graphs": True,
        "student_graphs": True,
        "rollout_precision": "fp8",
        "rollout_stride": 2,
        "id_decode_recompute": False,
    },
    "low_memory": {
        "weight_storage": "int8",
        "block_offload": True,
        "enable_gradient_checkpointing": "true",
        "id_decode_tile": 128,
    },
}
"""Where a mode differs from the plain values."""
