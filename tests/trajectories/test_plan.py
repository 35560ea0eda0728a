from itertools import chain

import pytest

from vflora.trajectories.plan import Plan, gaps, shares


def test_steps_that_share_a_rollout_need_it_whole():
    plan = Plan(processes=2, accumulation=3, reuse=4)
    assert [plan.rollouts(steps) for steps in (0, 1, 4, 5)] == [0, 6, 6, 12]
    assert [plan.batches(steps) for steps in (0, 1, 4, 5)] == [0, 3, 3, 6]
    assert [plan.steps(rollouts) for rollouts in (5, 6, 11, 12)] == [0, 4, 4, 8]


def test_rollouts_are_counted_by_batch_then_process():
    plan = Plan(processes=2, accumulation=3, reuse=4)
    assert [plan.place(rollout) for rollout in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [plan.block(number) for number in (0, 2, 3, 5, 6)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("found", "missing"),
    [
        ([], [range(2, 10)]),
        ([range(0, 10)], []),
        ([range(0, 4), range(6, 8)], [range(4, 6), range(8, 10)]),
        ([range(6, 12), range(3, 7)], [range(2, 3)]),
        ([range(2, 5), range(3, 4), range(20, 30)], [range(5, 10)]),
    ],
)
def test_gaps_are_what_no_shard_covers(found, missing):
    assert gaps(found, range(2, 10)) == missing


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_cover_everything_once_whatever_is_there_already(size):
    missing = [range(0, 5), range(7, 23)]
    parts = [shares(missing, per_shard=4, rank=rank, size=size) for rank in range(size)]
    every = sorted(chain.from_iterable(part for mine in parts for part in mine))
    assert every == [*range(0, 5), *range(7, 23)]
    assert all(len(part) <= 4 for mine in parts for part in mine)
    # A process that looks later, when another has finished a shard, still finds the same share for itself.
    later = shares([range(0, 4), range(8, 23)], per_shard=4, rank=0, size=size)
    assert {*chain.from_iterable(later)} <= {*chain.from_iterable(parts[0])}
