"""The arms of the ablation: what is trained, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vflora.errors import UserError

Kind = Literal["none", "recipe", "flow_matching"]


@dataclass(frozen=True)
class Arm:
    """One way of training, everything else being equal.

    Attributes:
        title: a line for tables and plots.
        kind: nothing is trained, `vflora train` trains, or plain flow matching on clips does.
        flags: of `vflora train`, on top of those that all arms share.
        still: for flow matching: the clips are their first frame, repeated.
        mixed: train on pictures whose names are those of many characters at once.
        place_bound: the identity loss sees through an embedder to which a creature that has moved is somebody else.
    """

    title: str
    kind: Kind = "recipe"
    flags: tuple[str, ...] = ()
    still: bool = False
    mixed: bool = False
    place_bound: bool = False


_UNGUIDED = ("--rollout_guidance_scale", "1")
_BY_PLACE = ("--id_sigma_low", "null", "--id_sigma_high", "null")
_NOTHING_BELOW = ("--harvest_below", "0")

ARMS: dict[str, Arm] = {
    "base": Arm("base model", kind="none"),
    "frozen": Arm("stills as videos", kind="flow_matching", still=True),
    "oracle": Arm("oracle: real videos", kind="flow_matching"),
    "identity": Arm("identity only", flags=("--lambda_distill", "0")),
    "distillation": Arm("distillation only", flags=("--lambda_id", "0")),
    "recipe": Arm("the recipe"),
    "shuffled": Arm("recipe, references shuffled", flags=("--p_secondary", "1"), mixed=True),
    "identity_placed": Arm("identity only, place-bound", flags=("--lambda_distill", "0"), place_bound=True),
    "recipe_placed": Arm("the recipe, place-bound", place_bound=True),
    "bare": Arm("unguided, by place, nothing below", flags=(*_UNGUIDED, *_BY_PLACE, *_NOTHING_BELOW)),
    "unguided": Arm("without guidance in rollouts", flags=_UNGUIDED),
    "by_place": Arm("t_deep by place, not by sigma", flags=_BY_PLACE),
    "nothing_below": Arm("nothing distilled below t_deep", flags=_NOTHING_BELOW),
    "one_above": Arm("one distilled point above, not two", flags=("--harvest_count", "1")),
    "reuse": Arm("+ trajectory reuse 4", flags=("--trajectory_reuse", "4")),
    "hinge": Arm("+ hinge 0.1", flags=("--id_margin", "0.1")),
    "on_policy": Arm("+ on-policy identity points", flags=("--id_on_policy", "0.5")),
}
"""In the order of the table. `base` is what the others are compared with, `oracle` what they could at best become.
Guidance, t_deep by its noise level and a point below it are the recipe's own; `bare` is the reference implementation's
choice of points, and an arm that lacks one of the three shows what it is good for."""


def arm_named(name: str) -> Arm:
    """Returns an arm.

    Raises:
        UserError: if there is none of that name.
    """
    if name not in ARMS:
        raise UserError(f"there is no arm {name!r}: use {', '.join(ARMS)}.")
    return ARMS[name]
