"""The loop that all stages of the pretraining share: it ends on time, with averaged weights, and can be resumed.

The learning rate follows the share of the time that is used up, not a number of steps, so that a run of seven
minutes is a whole cosine on any machine.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from vflora.errors import UserError
from vflora.muon import BatchedMuon


@dataclass(frozen=True)
class LoopSettings:
    """How a stage is optimised.

    Attributes:
        peak_lr: learning rate after the warm-up; a cosine takes it to zero at the end of the time.
        muon_lr: the same for the stage's hidden weights, if they are to go to Muon; None leaves all to AdamW. A
            coherent step of AdamW is far too long for kernels of a thousand inputs: for the VAE, Muon was 2 dB
            ahead after 100 steps at the best rate of either. For the base, 3,100 steps with Muon came as far as
            6,300 with AdamW from the same weights.
        warmup_steps: steps over which it rises.
        weight_decay: of AdamW, on everything.
        betas: of AdamW.
        clip_norm: largest gradient norm.
        ema_decay: of the average of the weights, which is what is kept.
        log_every: steps between two lines of metrics.
        save_every_s: seconds between two saves of the state.
    """

    peak_lr: float
    muon_lr: float | None = None
    warmup_steps: int = 200
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    log_every: int = 100
    save_every_s: float = 120.0


class Clock:
    """Time of one call of a stage. It runs from the start; the schedule begins after the first step.

    Before that, data are rendered and kernels compiled; the schedule then spreads over what is left.
    """

    def __init__(self, minutes: float) -> None:
        """Starts the clock."""
        self._origin = time.monotonic()
        self.total_s = 60 * minutes
        self._begun_s: float | None = None
        self._first = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start of this call."""
        return time.monotonic() - self._origin

    @property
    def over(self) -> bool:
        """Whether the time is used up."""
        return self.elapsed_s >= self.total_s

    def skip_to(self, fraction: float) -> None:
        """Says that this share of the schedule is behind us already."""
        self._first = fraction

    def begin(self) -> None:
        """Marks the end of the preparations."""
        self._begun_s = self.elapsed_s

    def fraction(self) -> float:
        """Returns the share of the schedule that is used up, in [0, 1]."""
        if self._begun_s is None:
            return self._first
        left = max(self.total_s - self._begun_s, 1e-6)
        done = min(1.0, (self.elapsed_s - self._begun_s) / left)
        return self._first + (1 - self._first) * done


def rate_factor(settings: LoopSettings, step: int, fraction: float) -> float:
    """Returns the share of the peak learning rate: linear warm-up in steps, then a cosine to zero in time."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))


@dataclass
class StageRun:
    """One stage in the making.

    Attributes:
        name: of the stage, in file names and logs.
        module: what is trained.
        loss: called with the step and the used share of the schedule; returns the loss and numbers for the log.
        settings: as said.
        clock: with the time of this call, preparations included.
        folder: where metrics and the state go.
        keep: called with a copy of the averaged weights at every save and at the end.
        hidden: matrices and convolution kernels between the first and the last layer, which Muon is for.
        resume: go on from the state in `folder` if there is one.
        max_steps: stop here even if there is time.
    """

    name: str
    module: nn.Module
    loss: Callable[[int, float], tuple[Tensor, dict[str, Tensor | float]]]
    settings: LoopSettings
    clock: Clock
    folder: Path
    keep: Callable[[dict[str, Tensor]], None]
    hidden: Sequence[nn.Parameter] = ()
    resume: bool = False
    max_steps: int | None = None
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]
        hidden = [] if self.settings.muon_lr is None else list(self.hidden)
        self._matrices = [(p, nn.Parameter(_as_matrix(p.data))) for p in hidden]
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(
                [p for p in self._parameters if not any(p is other for other in hidden)],
                lr=self.settings.peak_lr,
                betas=self.settings.betas,
                weight_decay=self.settings.weight_decay,
                fused=self._parameters[0].is_cuda,
            )
        }
        if self._matrices:
            self._optimizers["muon"] = BatchedMuon(
                [matrix for _, matrix in self._matrices],
                lr=self.settings.muon_lr or 0.0,
                weight_decay=self.settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        self._ema = EMAModel(
            self._parameters, decay=self.settings.ema_decay, use_ema_warmup=True, power=0.75, foreach=True
        )
        self._ema.to(self._parameters[0].device)

    @property
    def state_path(self) -> Path:
        """The resumable state: weights, their average, the optimizer, and where the schedule is."""
        return self.folder / f"{self.name}-state.pt"

    def run(self) -> None:
        """Trains until the time is over.

        Raises:
            RuntimeError: if the loss is no longer a number; the last saved state is then still good.
        """
        clock = self.clock
        if self.resume:
            clock.skip_to(self._load())
        last_save = last_log = clock.elapsed_s
        logged_step, device = self.step, self._parameters[0].device
        first = self.step
        with tqdm(total=round(clock.total_s), desc=self.name, unit="s") as bar:
            while not clock.over and (self.max_steps is None or self.step < self.max_steps):
                fraction = clock.fraction()
                loss, numbers = self._update(fraction)
                self.step += 1
                if self.step == first + 1:
                    _wait(device)
                    clock.begin()
                    last_log, logged_step = clock.elapsed_s, self.step
                    bar.set_postfix_str(f"first step after {clock.elapsed_s:.0f} s")
                if self.step % self.settings.log_every == 0:
                    now = clock.elapsed_s
                    pace = (self.step - logged_step) / max(now - last_log, 1e-9)
                    self._log(loss, {**numbers, "steps_per_s": pace, "fraction": fraction})
                    last_log, logged_step = now, self.step
                    bar.set_postfix_str(f"step {self.step} loss {loss.item():.4f} {pace:.1f} steps/s")
                if clock.elapsed_s - last_save > self.settings.save_every_s:
                    self._save(clock.fraction())
                    last_save = clock.elapsed_s
                bar.update(round(clock.elapsed_s) - bar.n)
        self._save(clock.fraction())

    def _update(self, fraction: float) -> tuple[Tensor, dict[str, Tensor | float]]:
        factor = rate_factor(self.settings, self.step, fraction)
        for name, peak in (("adamw", self.settings.peak_lr), ("muon", self.settings.muon_lr)):
            for group in self._optimizers[name].param_groups if name in self._optimizers else ():
                group["lr"] = factor * (peak or 0.0)
        loss, numbers = self.loss(self.step, fraction)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, self.settings.clip_norm)
        for weight, matrix in self._matrices:
            matrix.grad = None if weight.grad is None else _as_matrix(weight.grad)
        for optimizer in self._optimizers.values():
            optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        self._ema.step(self._parameters)
        return loss.detach(), {**numbers, "grad_norm": norm}

    def averaged(self) -> dict[str, Tensor]:
        """Returns a copy of the averaged weights, contiguous, fp32, on the CPU."""
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.module.state_dict().items()}
        trained = [name for name, p in self.module.named_parameters() if p.requires_grad]
        for name, value in zip(trained, self._ema.shadow_params, strict=True):
            state[name] = value.detach().cpu().contiguous().clone()
        return state

    def _log(self, loss: Tensor, numbers: dict[str, Tensor | float]) -> None:
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss of stage {self.name} is {loss.item()} at step {self.step}")
        line = {"stage": self.name, "step": self.step, "seconds": round(self.clock.elapsed_s, 1), "loss": loss.item()}
        line |= {key: round(float(value), 6) for key, value in numbers.items()}
        with (self.folder / f"{self.name}-metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self, fraction: float) -> None:
        state = {
            "module": self.module.state_dict(),
            "ema": self._ema.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
            "step": self.step,
            "fraction": fraction,
        }
        temporary = self.state_path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.state_path)
        self.keep(self.averaged())

    def _load(self) -> float:
        """Restores the state; returns the share of the schedule that is behind it.

        A stage that had reached its end is trained further: its schedule starts again.

        Raises:
            UserError: for a state that other optimizers left.
        """
        if not self.state_path.is_file():
            return 0.0
        device = self._parameters[0].device
        state = torch.load(self.state_path, map_location=device, weights_only=True)
        if state["optimizers"].keys() != self._optimizers.keys():
            raise UserError(f"{self.state_path} is of other optimizers: delete it, to go on from the weights alone.")
        self.module.load_state_dict(state["module"])
        self._ema.load_state_dict(state["ema"])
        self._ema.to(device)
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.step = state["step"]
        return state["fraction"] if state["fraction"] < 1 else 0.0


def _as_matrix(weight: Tensor) -> Tensor:
    """Views a convolution kernel in channels-last layout [O, I, T, H, W] as a matrix [O, T H W I]."""
    if weight.ndim == 2:
        return weight
    return weight.permute(0, 2, 3, 4, 1).reshape(weight.shape[0], -1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
