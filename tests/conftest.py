import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach out for weights
torch.set_num_threads(1)

from diffusers.utils import logging as diffusers_logging  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from vflora.models.random_weights import small_transformer  # noqa: E402
from vflora.types import Conditions  # noqa: E402

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@pytest.fixture
def transformer():
    return small_transformer()


@pytest.fixture
def make_conditions():
    """Random conditions for `small_transformer`: text lengths, byT5 lengths, and a first frame."""

    def make(lengths=(7,), lengths_2=None, *, size=(4, 4), seed=0) -> Conditions:
        generator = torch.Generator().manual_seed(seed)
        lengths_2 = lengths_2 or (0,) * len(lengths)

        def text(sizes, channels):
            value = torch.randn(len(sizes), max(sizes), channels, generator=generator)
            for row, length in zip(value, sizes, strict=True):
                row[length:] = 0
            return value

        return Conditions(
            prompt_embeds=text(lengths, 16),
            prompt_lengths=tuple(lengths),
            prompt_embeds_2=text(lengths_2, 32),
            prompt_lengths_2=tuple(lengths_2),
            image_embeds=torch.randn(len(lengths), 6, 12, generator=generator),
            first_frame=torch.randn(len(lengths), 4, 1, *size, generator=generator),
        )

    return make
