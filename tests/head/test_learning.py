import pytest
import torch
from torch import nn

from vflora.head.learning import contrastive_loss
from vflora.random_streams import keyed_noise


def test_loss_is_supervised_contrastive():
    """Against equation 2 of Khosla et al. 2020, written out."""
    embeddings = nn.functional.normalize(keyed_noise((6, 4), "x").double(), dim=-1)
    ids, temperature = torch.tensor([0, 0, 0, 1, 1, 2]), 0.1
    rows = []
    for i in range(5):  # the last has no partner
        others = [a for a in range(6) if a != i]
        denominator = sum(torch.exp(embeddings[i] @ embeddings[a] / temperature) for a in others)
        partners = [p for p in others if ids[p] == ids[i]]
        terms = [torch.log(torch.exp(embeddings[i] @ embeddings[p] / temperature) / denominator) for p in partners]
        rows.append(-sum(terms) / len(terms))
    assert contrastive_loss(embeddings, ids, temperature).item() == pytest.approx(sum(rows).item() / 5, rel=1e-9)
