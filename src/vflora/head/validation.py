"""How well embeddings tell identities apart, on clean pictures and on pictures degraded like decoded estimates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor, nn


@dataclass(frozen=True)
class ValidationFeatures:
    """Backbone features of the validation pictures: the backbone is frozen, so they are computed once.

    Attributes:
        clean: [N, width].
        degraded: the same pictures after blur, noise and, where there is a VAE, a round trip, [N, width].
        ids: identity of each picture, int64 [N], sorted, each at least twice.
    """

    clean: Tensor
    degraded: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Scores:
    """Cosine statistics over pairs, and retrieval of each picture among the others.

    Attributes:
        same_mean: mean cosine between two pictures of one identity.
        same_std: its standard deviation.
        different_mean: mean cosine between pictures of two identities.
        different_std: its standard deviation.
        recall_at_1: how often the nearest other picture shows the same identity.
        map_at_r: mean average precision at R (Musgrave et al. 2020, arXiv 2003.08505, section 3.2).
    """

    same_mean: float
    same_std: float
    different_mean: float
    different_std: float
    recall_at_1: float
    map_at_r: float


@dataclass(frozen=True)
class Validation:
    """One validation.

    Attributes:
        clean: scores of clean pictures among each other.
        degraded: scores of degraded pictures among each other.
        kept: mean cosine between a picture and its own degraded version: 1 means that degradation is not noticed.
        cosines: all cosines by kind of picture, [N, N], for plots.
        ids: identity of each row, int64 [N].
    """

    clean: Scores
    degraded: Scores
    kept: float
    cosines: Mapping[str, Tensor]
    ids: Tensor

    @property
    def rank(self) -> tuple[float, ...]:
        """What the best head is chosen by: MAP@R over both kinds; between equals, the wider gap of cosines."""
        both = (self.clean, self.degraded)
        return (sum(s.map_at_r for s in both) / 2, sum(s.same_mean - s.different_mean for s in both) / 2)

    def numbers(self) -> dict[str, float]:
        """Returns the metrics by name, for logs."""
        named = {f"{kind}/{k}": v for kind in ("clean", "degraded") for k, v in asdict(getattr(self, kind)).items()}
        return named | {"degraded/cosine_to_clean": self.kept, "map_at_r": self.rank[0]}


@torch.no_grad()
def validate(features: ValidationFeatures, head: nn.Module | None) -> Validation:
    """Scores a head, or the backbone's own features where `head` is None.

    Args:
        features: of the validation pictures.
        head: maps features to unit vectors; it is used in eval mode and left in the mode it was in.
    """
    if head is None:
        clean, degraded = (nn.functional.normalize(f, dim=-1) for f in (features.clean, features.degraded))
    else:
        training = head.training
        head.eval()
        clean, degraded = head(features.clean), head(features.degraded)
        head.train(training)
    clean, degraded, ids = clean.cpu(), degraded.cpu(), features.ids.cpu()
    return Validation(
        clean=score(clean, ids),
        degraded=score(degraded, ids),
        kept=(clean * degraded).sum(-1).mean().item(),
        cosines={"clean": clean @ clean.T, "degraded": degraded @ degraded.T},
        ids=ids,
    )


def score(embeddings: Tensor, ids: Tensor) -> Scores:
    """Scores unit vectors [N, D] with identities [N]; every identity needs two pictures, and there must be two."""
    same, different = pair_cosines(embeddings @ embeddings.T, ids)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity()),
        device=embeddings.device,
    )
    retrieval = calculator.get_accuracy(embeddings, ids)
    return Scores(
        same_mean=same.mean().item(),
        same_std=same.std(correction=0).item(),
        different_mean=different.mean().item(),
        different_std=different.std(correction=0).item(),
        recall_at_1=retrieval["precision_at_1"],
        map_at_r=retrieval["mean_average_precision_at_r"],
    )


def pair_cosines(cosines: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Splits [N, N] cosines into those of pairs of one identity and of two; each pair once, none with itself."""
    above = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    same = ids.unsqueeze(0) == ids.unsqueeze(1)
    return cosines[same & above], cosines[~same & above]
