"""Muon for matrices, AdamW for the rest, cosine schedule with warm-up, and their state by parameter name."""

from __future__ import annotations

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.nn import Parameter

from vflora.config import OptimizerConfig
from vflora.errors import NonFiniteError
from vflora.muon import BatchedMuon


class LoraOptimizer:
    """The optimizers of one run behind one step.

    Muon (Jordan et al. 2024) orthogonalises the momentum of each matrix; `match_rms_adamw` scales its update to
    the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that one learning rate serves both.
    """

    def __init__(self, parameters: dict[str, Parameter], config: OptimizerConfig):
        """Takes what is trained, by name; the names are the keys of the saved state."""
        self._parameters, self._max_norm = parameters, config.max_grad_norm
        matrices = [p for p in parameters.values() if config.use_muon and p.ndim == 2]
        others = [p for p in parameters.values() if not (config.use_muon and p.ndim == 2)]
        settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        self._optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self._optimizers.append(BatchedMuon(matrices, adjust_lr_fn="match_rms_adamw", **settings))
        if others:
            self._optimizers.append(torch.optim.AdamW(others, **settings))
        self._schedules = [
            get_scheduler(
                "cosine",
                optimizer,
                num_warmup_steps=config.warmup_steps,
                num_training_steps=config.max_train_steps,
            )
            for optimizer in self._optimizers
        ]

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self._schedules[0].get_last_lr()[0])

    def gradients(self) -> list[Tensor]:
        """Returns the gradients, zeros for a parameter that the loss did not reach.

        The last block's text output feeds nothing; without zeros its optimizer state would be missing on load.
        """
        gradients = []
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        return gradients

    def step(self, step: int) -> float:
        """Clips, checks, updates, and moves the schedule on.

        Returns:
            The norm of the gradient before clipping.

        Raises:
            NonFiniteError: before anything is updated, if the norm is not finite.
        """
        gradients = self.gradients()
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise NonFiniteError(f"the gradient of {self._first_non_finite()}", step)
        torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._max_norm, norm)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for schedule in self._schedules:
            schedule.step()
        return norm.item()

    def _first_non_finite(self) -> str:
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return name
        return "all layers together"

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns every tensor of the optimizers' state, under `parameter/entry`."""
        names = {parameter: name for name, parameter in self._parameters.items()}
        return {
            f"{names[parameter]}/{entry}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for entry, value in state.items()
            if isinstance(value, Tensor)
        }

    def load_state_tensors(self, tensors: dict[str, Tensor], step: int) -> None:
        """Restores what `state_tensors` returned after `step` optimizer steps."""
        owners = {id(p): o for o in self._optimizers for group in o.param_groups for p in group["params"]}
        for key, value in tensors.items():
            name, entry = key.rsplit("/", 1)
            parameter = self._parameters[name]
            # AdamW keeps its step count on the CPU; momenta live beside their parameter.
            place = value if value.ndim == 0 else value.to(parameter.device)
            owners[id(parameter)].state[parameter][entry] = place
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            rates = [rate * f(step) for rate, f in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            at_step = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
            schedule.load_state_dict(schedule.state_dict() | at_step)
