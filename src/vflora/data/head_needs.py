"""What `vflora train-head` will miss in a data set, told before it is started."""

from __future__ import annotations

from collections.abc import Mapping

PICTURES_TO_TRAIN = 4
"""Pictures of a character that a batch of the head takes, as it is set (--pk_instances)."""
PICTURES_TO_VALIDATE = 2
"""Pictures of a character that its judging needs: a pair."""


def missing_for_the_head(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Returns a sentence for each thing that training the head would refuse.

    Args:
        counts: split -> character -> pictures.
    """
    train, val = counts["train"], counts["val"]
    if len({*train, *val}) == 1:
        return [
            "train-head needs at least two characters, as it learns to tell them apart: pack pictures of others of "
            "its kind into a set for the head, and this one into a set for the training."
        ]
    sentences = []
    if (enough := _with_at_least(train, PICTURES_TO_TRAIN)) < 2:
        sentences.append(
            f"train-head needs two characters with {PICTURES_TO_TRAIN} pictures in the training split, and {enough} "
            "have so many: add pictures, or give train-head a lower --pk_instances."
        )
    if (enough := _with_at_least(val, PICTURES_TO_VALIDATE)) < 2:
        sentences.append(
            f"train-head needs two characters with {PICTURES_TO_VALIDATE} pictures in the validation split, and "
            f"{enough} have so many: pack more into it (--val_split; with --val_by sample 6 pictures of each of two "
            "characters do), or give train-head --val_every 0."
        )
    return sentences


def _with_at_least(counts: Mapping[str, int], pictures: int) -> int:
    return sum(count >= pictures for count in counts.values())
