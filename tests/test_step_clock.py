import time

import pytest
import torch

from vflora.step_clock import PARTS, StepClock, split


def test_parts_within_parts_are_counted_once():
    clock = StepClock(torch.device("cpu"))
    began = time.perf_counter()
    with clock.part("identity"):
        time.sleep(0.02)
        with clock.part("decode"):
            time.sleep(0.03)
        time.sleep(0.02)
        with clock.part("decode"):
            time.sleep(0.03)
    whole = time.perf_counter() - began
    seconds = clock.seconds()
    assert seconds["identity"] >= 0.04
    assert seconds["decode"] >= 0.06
    assert sum(seconds.values()) == pytest.approx(whole, abs=1e-3)


def test_a_part_that_fails_is_closed_and_the_outer_one_goes_on():
    clock = StepClock(torch.device("cpu"))
    with clock.part("identity"):
        with pytest.raises(ValueError, match="inside"), clock.part("decode"):
            raise ValueError("inside")
        time.sleep(0.01)
    assert clock.seconds()["identity"] >= 0.01


def test_every_part_of_a_step_is_always_there():
    clock = StepClock(torch.device("cpu"))
    with clock.part("rollout"), clock.part("something else"):
        pass
    assert list(clock.seconds()) == [*PARTS, "something else"]


def test_the_split_names_the_longest_parts_first_and_leaves_out_what_is_nothing():
    assert split({"data": 0.001, "rollout": 2.3, "decode": 0.4}) == "rollout 2.30, decode 0.40"
