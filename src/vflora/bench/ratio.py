"""`vflora bench ratio`: what two decisions of the denoiser are worth, as ratios that hold on any machine.

Padding and mask: the stock forward pass attends over a padded prompt with an S x S mask, ours over valid tokens only.
Second copy: a separate teacher model, against the student with its adapters switched off.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn
from tqdm import tqdm

from vflora.flow import TIMESTEPS_PER_UNIT
from vflora.models.denoiser import Denoiser
from vflora.models.lora import add_lora
from vflora.models.random_weights import small_transformer
from vflora.random_streams import keyed_generator
from vflora.types import Conditions

_VALID, _PADDED = 32, 1000  # tokens of a short prompt, and of the row that the pipeline pads it to
_SIGMA = 0.7


@dataclass(frozen=True)
class BenchRatioConfig:
    """What is measured."""

    repeats: int = 5
    """Timed calls of each kind; the median counts."""
    output: Path | None = None
    """JSON file for the ratios."""


def run(config: BenchRatioConfig) -> dict[str, float]:
    """Measures, prints, and returns the ratios, each larger than one where our way is the better."""
    transformer = small_transformer(layers=3, heads=4, head_dim=32)
    stock = copy.deepcopy(transformer)
    add_lora(transformer, rank=4, alpha=4, dropout=0.0, targets=None, seed=0)
    ours = Denoiser(transformer)
    second_copy = Denoiser(copy.deepcopy(stock))
    conditions = _conditions()
    latents = torch.randn(1, 4, 3, 8, 8, generator=keyed_generator("latents"))
    padded = torch.zeros(1, _PADDED, conditions.prompt_embeds.shape[2])
    padded[:, :_VALID] = conditions.prompt_embeds
    model_input = ours.model_input(latents, conditions)

    @torch.no_grad()
    def padded_and_masked() -> None:
        stock(
            hidden_states=model_input,
            timestep=torch.full((1,), _SIGMA * TIMESTEPS_PER_UNIT),
            encoder_hidden_states=padded,
            encoder_attention_mask=torch.arange(_PADDED)[None] < _VALID,
            encoder_hidden_states_2=torch.zeros(1, 1, 32),
            encoder_attention_mask_2=torch.zeros(1, 1, dtype=torch.bool),
            image_embeds=conditions.image_embeds,
        )

    def adapters_off() -> None:
        with ours.teacher():
            ours.velocity(latents, _SIGMA, conditions)

    @torch.no_grad()
    def separate_teacher() -> None:
        second_copy.velocity(latents, _SIGMA, conditions)

    kinds = [padded_and_masked, adapters_off, separate_teacher]
    seconds = dict(zip([f.__name__ for f in kinds], _times(kinds, config.repeats), strict=True))
    ratios = {
        "time, padded and masked / dropped": seconds["padded_and_masked"] / seconds["adapters_off"],
        "time, second copy / adapters off": seconds["separate_teacher"] / seconds["adapters_off"],
        "weights, second copy / adapters off": (_bytes(transformer) + _bytes(stock)) / _bytes(transformer),
    }
    tqdm.write("\n".join(f"{name:<40}{ratio:>8.2f}" for name, ratio in ratios.items()))
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(ratios, indent=1))
    return ratios


def _conditions() -> Conditions:
    generator = keyed_generator("conditions")
    return Conditions(
        prompt_embeds=torch.randn(1, _VALID, 16, generator=generator),
        prompt_lengths=(_VALID,),
        prompt_embeds_2=torch.zeros(1, 0, 32),
        prompt_lengths_2=(0,),
        image_embeds=torch.randn(1, 6, 12, generator=generator),
        first_frame=torch.randn(1, 4, 1, 8, 8, generator=generator),
    )


def _times(functions: list[Callable[[], None]], repeats: int) -> list[float]:
    """Takes turns, so that whatever else the machine does hits all of them alike."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, row in zip(functions, seconds, strict=True):
            began = time.perf_counter()
            function()
            row.append(time.perf_counter() - began)
    return [median(row[1:]) for row in seconds]  # the first turn warms up


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
