"""One optimizer step of the head: augment, encode, contrast."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import Tensor, nn

from vflora.data.augment import VaeRoundTrip, augment
from vflora.errors import NonFiniteError
from vflora.head.config import HeadConfig
from vflora.head.validation import pair_cosines
from vflora.models.identity import FrozenBackbone
from vflora.random_streams import keyed_generator


def contrastive_loss(embeddings: Tensor, ids: Tensor, temperature: float, processes: int = 1) -> Tensor:
    """Supervised contrastive loss over the pictures of all processes (Khosla et al. 2020, arXiv 2004.11362, eq. 2).

    Args:
        embeddings: unit vectors [N, D] of this process.
        ids: their identities [N].
        temperature: divides the cosines.
        processes: how many there are; they must call this together.

    Returns:
        the loss of the global batch times `processes`, so that the mean over processes of the gradients, each of
        which reaches this process's embeddings only, is the gradient of the global loss.
    """
    loss = SupConLoss(temperature=temperature)
    if processes == 1:
        return loss(embeddings, ids)
    return DistributedLossWrapper(loss)(embeddings, ids)


@dataclass(frozen=True)
class Learner:
    """What a step needs and does not change, besides the head and its optimizer.

    Attributes:
        config: the settings.
        accelerator: device and process group.
        backbone: the frozen backbone.
        round_trip: the VAE, where there is one.
        head: the head, wrapped for several processes if there are several.
        optimizer: of the head.
        schedule: of the learning rate.
    """

    config: HeadConfig
    accelerator: Accelerator
    backbone: FrozenBackbone
    round_trip: VaeRoundTrip | None
    head: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def step(self, batches: Iterable[tuple[Tensor, Tensor]], first_batch: int) -> dict[str, float]:
        """Learns from --grad_accum batches.

        Args:
            batches: images uint8 [P*K, 3, H, W] and their identities [P*K].
            first_batch: number of the first of them in the run, which keys what is random about it.

        Returns:
            metrics by name.

        Raises:
            NonFiniteError: before the optimizer sees a loss or gradient that is not finite.
        """
        accumulated, metrics, waited = self.config.grad_accum, [], 0.0
        began = asked = time.perf_counter()
        for micro, (images, ids) in enumerate(batches):
            waited += time.perf_counter() - asked
            last = micro + 1 == accumulated
            with nullcontext() if last else self.accelerator.no_sync(self.head):
                metrics.append(self._backward(images, ids, first_batch + micro))
            asked = time.perf_counter()
            if last:
                break
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.head.parameters() if p.grad is not None]).item()
        if not torch.tensor(norm).isfinite():
            raise NonFiniteError("the gradient of the head")
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        means = {name: sum(m[name] for m in metrics) / accumulated for name in metrics[0]}
        seconds = {"seconds/step": time.perf_counter() - began, "seconds/waiting_for_data": waited}
        return means | {"gradient_norm": norm, "learning_rate": rate} | seconds

    def _backward(self, images: Tensor, ids: Tensor, batch: int) -> dict[str, float]:
        processes, device = self.accelerator.num_processes, self.accelerator.device
        ids = ids.to(device)
        embeddings = self.head(self._features(images, batch), self._generators("dropout", batch, len(images)))
        loss = contrastive_loss(embeddings, ids, self.config.temperature, processes)
        value = loss.item() / processes
        if not torch.tensor(value).isfinite():
            raise NonFiniteError("the contrastive loss (is --model_dtype too narrow?)")
        self.accelerator.backward(loss / self.config.grad_accum)
        with torch.no_grad():
            same, different = pair_cosines(embeddings @ embeddings.T, ids)
        return {"loss": value, "cosine/same": same.mean().item(), "cosine/different": different.mean().item()}

    @torch.no_grad()
    def _features(self, images: Tensor, batch: int) -> Tensor:
        generators = self._generators("augment", batch, len(images))
        images = images.to(self.accelerator.device)
        size = self.backbone.preprocessing.size
        return self.backbone(augment(images, generators, self.config, size, self.round_trip))

    def _generators(self, purpose: str, batch: int, count: int) -> list[torch.Generator]:
        """One generator per picture, keyed by its place in the batch of all processes."""
        first = self.accelerator.process_index * count
        return [keyed_generator(self.config.seed, purpose, batch, slot) for slot in range(first, first + count)]
