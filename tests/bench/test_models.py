import torch
from torch import nn

from vflora.bench.models import drawn


def test_random_weights_are_the_same_every_time():
    # what is compared between two builds is what was done to them, and not other weights
    one, other = (drawn(lambda: nn.Linear(8, 8), torch.device("cpu")) for _ in range(2))
    assert torch.equal(one.weight, other.weight)
