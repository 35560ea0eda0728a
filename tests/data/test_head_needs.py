import re

import pytest

from vflora.data.head_needs import PICTURES_TO_TRAIN, missing_for_the_head
from vflora.head.config import HeadConfig


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        ({"a": 4, "b": 4}, {"a": 2, "b": 2}, []),
        ({"a": 4, "b": 4}, {"c": 2, "d": 2}, []),
        ({"a": 90}, {"a": 10}, ["at least two characters"]),
        ({"a": 4, "b": 3}, {"a": 2, "b": 2}, ["4 pictures in the training split, and 1 have so many.*--pk_instances"]),
        ({"a": 4, "b": 4}, {"a": 2, "b": 1}, ["2 pictures in the validation split, and 1 have so many.*--val_every 0"]),
        ({"a": 4, "b": 4}, {}, ["validation split, and 0 have"]),
        ({"a": 1, "b": 1}, {}, ["training split, and 0 have", "validation split, and 0 have"]),
    ],
)
def test_what_the_head_would_refuse_is_told(train, val, said):
    sentences = missing_for_the_head({"train": train, "val": val})
    assert len(sentences) == len(said)
    for sentence, expected in zip(sentences, said, strict=True):
        assert re.search(expected, sentence)


def test_as_many_pictures_count_as_the_head_takes_by_default():
    assert HeadConfig.pk_instances == PICTURES_TO_TRAIN
