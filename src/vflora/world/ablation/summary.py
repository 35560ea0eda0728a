"""From the results of arms and seeds to a table and to the gates that were written down before the runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vflora.world.ablation.arm import RESULT
from vflora.world.ablation.arms import ARMS

IDENTITY = "cosine_last_quarter"
"""What gate B looks at: the grader's cosine to the right character; retrieval stands beside it in the table."""
OWN_RETRIEVAL, DRIFT_POINTS, DIRECTION = 0.80, 0.10, 0.90
_FIRST = ("first_quarter", "first_generated")
MOTION_LOST, RECOVERED, PATH_TOLERANCE, FORGETTING = 0.8, 0.5, 0.10, 1.05

Results = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and their standard deviation; None with one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Takes one value per seed."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)

    def text(self, digits: int = 2, factor: float = 1.0, sign: str = "-") -> str:
        """Returns "mean ± deviation"; with `sign` "+" also where the mean is positive."""
        bar = "" if self.deviation is None else f" ± {factor * self.deviation:.{digits}f}"
        return f"{factor * self.mean:{sign}.{digits}f}{bar}"


@dataclass(frozen=True)
class Gate:
    """One question that was asked before the runs."""

    name: str
    asked: str
    found: str
    passed: bool


def read_results(output: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the finished arms in the order of the table, each with its seeds."""
    found = [json.loads(path.read_text()) for path in sorted((output / "arms").glob(f"*/{RESULT}"))]
    by_arm = {arm: [result for result in found if result["arm"] == arm] for arm in ARMS}
    return {arm: sorted(own, key=lambda r: r["seed"]) for arm, own in by_arm.items() if own}


def number(results: Results, arm: str, name: str) -> Spread:
    """Returns a mark of an arm over its seeds."""
    return Spread.of([result["numbers"][name] for result in results[arm]])


def ratio_to_base(results: Results, arm: str, name: str) -> Spread:
    """Returns a mark as a ratio to the base's of the same seed."""
    base, own = (_by_seed(results, key, name) for key in ("base", arm))
    return Spread.of([own[s] / base[s] for s in own if s in base])


def ahead_of_recipe(results: Results, arm: str, name: str = IDENTITY) -> Spread:
    """Returns by how much a mark of an arm is above the plain recipe's of the same seed: pairs see the same exam."""
    recipe, own = (_by_seed(results, key, name) for key in ("recipe", arm))
    return Spread.of([own[s] - recipe[s] for s in own if s in recipe])


def recovered(results: Results, arm: str, name: str = IDENTITY) -> Spread:
    """Returns the share of the gap between base and oracle that an arm closes, seed by seed."""
    base, oracle, own = (_by_seed(results, key, name) for key in ("base", "oracle", arm))
    return Spread.of([(own[s] - base[s]) / (oracle[s] - base[s]) for s in own if s in base and s in oracle])


def _by_seed(results: Results, arm: str, name: str) -> dict[int, float]:
    return {result["seed"]: result["numbers"][name] for result in results[arm]}


def gates(results: Results) -> list[Gate]:
    """Returns every gate whose arms are finished."""
    found: list[Gate] = []
    if "base" in results:
        own, own_made = (number(results, "base", f"own_domain/retrieval_{part}") for part in _FIRST)
        turns = number(results, "base", "own_domain/direction_accuracy")
        first, made, last = (number(results, "base", f"retrieval_{part}") for part in (*_FIRST, "last_quarter"))
        found += [
            Gate("base: path direction, own domain", "90 %", f"{turns.text(1, 100)} %", turns.mean >= DIRECTION),
            Gate(
                "base: retrieval, own domain, first quarter",
                "80 %",
                f"{own.text(1, 100)} %; {own_made.text(1, 100)} % without the given frame",
                own.mean >= OWN_RETRIEVAL,
            ),
            Gate(
                "base: retrieval lost from first to last quarter, creatures",
                "10 points",
                f"{first.text(1, 100)} to {last.text(1, 100)} %; from {made.text(1, 100)} % without the given frame",
                first.mean - last.mean >= DRIFT_POINTS,
            ),
        ]
    for arm, through in (("identity", ""), ("identity_placed", ", through the place-bound embedder")):
        if {"base", arm} <= results.keys():
            path = ratio_to_base(results, arm, "path_ratio")
            name, asked = f"A: identity alone loses motion{through}", f"path under {MOTION_LOST} of the base's"
            found.append(Gate(name, asked, path.text(), path.mean < MOTION_LOST))
    if {"base", "oracle", "recipe"} <= results.keys():
        share = recovered(results, "recipe")
        path = ratio_to_base(results, "recipe", "path_ratio")
        loss = ratio_to_base(results, "recipe", "base_domain_loss")
        found += [
            Gate("B: gap to the oracle recovered, last quarter", "half", share.text(), share.mean >= RECOVERED),
            Gate("B: path length", "within 10 % of the base's", path.text(), abs(path.mean - 1) <= PATH_TOLERANCE),
            Gate("B: loss on the base's own domain", "within 5 % of the base's", loss.text(3), loss.mean <= FORGETTING),
        ]
    return found


def table(results: Results) -> str:
    """Returns the table of arms as Markdown: differences, ratios and gaps are to the arms of the same seed."""
    lines = [
        "| arm | identity, last quarter | against the recipe | gap recovered | retrieval, first quarter | "
        "last quarter | path length | direction right | limbs | loss on own domain | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, own in results.items():
        cells = [
            ARMS[arm].title,
            number(results, arm, IDENTITY).text(3),
            ahead_of_recipe(results, arm).text(3, sign="+") if arm != "recipe" and "recipe" in results else "",
            recovered(results, arm).text() if {"base", "oracle"} <= results.keys() else "",
            f"{number(results, arm, 'retrieval_first_quarter').text(1, 100)} %",
            f"{number(results, arm, 'retrieval_last_quarter').text(1, 100)} %",
            ratio_to_base(results, arm, "path_ratio").text(),
            f"{number(results, arm, 'direction_accuracy').text(0, 100)} %",
            ratio_to_base(results, arm, "limb_ratio").text(),
            ratio_to_base(results, arm, "base_domain_loss").text(3),
            str(len(own)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gate_table(found: Sequence[Gate]) -> str:
    """Returns the gates as Markdown."""
    lines = ["| gate | asked for | measured | |", "|---|---|---|---|"]
    lines += [f"| {g.name} | {g.asked} | {g.found} | {'holds' if g.passed else 'FAILS'} |" for g in found]
    return "\n".join(lines) + "\n"
