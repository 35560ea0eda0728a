"""The trace of a few steps, read back."""

import gzip
import json

import pytest
import torch

from vflora.bench import step as bench_step
from vflora.bench.setting import BenchConfig
from vflora.bench.step import BenchStepSettings
from vflora.cli import parse
from vflora.errors import UserError
from vflora.models.speed_config import SpeedConfig
from vflora.profiling import StepTracer, parse_steps
from vflora.step_clock import PARTS
from vflora.train import run


def events(path):
    with gzip.open(path, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if event["ph"] == "X"]


@pytest.mark.parametrize(("text", "steps"), [("5-7", [5, 6, 7]), ("5", [5]), (" 2-2 ", [2])])
def test_steps_are_a_number_or_a_range(text, steps):
    assert list(parse_steps(text)) == steps


@pytest.mark.parametrize("text", ["", "7-5", "0-3", "five", "1,3", "-2"])
def test_anything_else_is_refused_with_the_way_to_write_it(text):
    with pytest.raises(UserError, match="write it like 5-7"):
        parse_steps(text)


def test_steps_that_the_run_does_not_take_are_refused_before_it_starts(tmp_path):
    with pytest.raises(UserError, match="this run takes steps 3 to 4"):
        StepTracer("1-2", tmp_path, run=range(3, 5))


def test_a_run_that_stops_early_leaves_the_trace_of_what_it_did(tmp_path):
    tracer = StepTracer("2-9", tmp_path / "traces", run=range(1, 10))
    for number in (1, 2):
        with tracer.step(number):
            torch.ones(3).cumsum(0)
    tracer.close()
    (path,) = (tmp_path / "traces").iterdir()
    assert path.name == "steps-2-9.json.gz"
    assert {"step 2", "aten::cumsum"} <= set(events(path))
    assert "step 1" not in events(path)


def test_a_training_run_leaves_a_trace_of_the_steps_asked_for(train_flags, tmp_path):
    run(parse("train", [*train_flags, "--max_train_steps", "3", "--profile_steps", "2-3"]))
    (path,) = (tmp_path / "run" / "traces").iterdir()
    found = events(path)
    assert path.name == "steps-2-3.json.gz"
    assert [name for name in found if name.startswith("step ")] == ["step 2", "step 3"]
    assert set(PARTS) <= set(found), "the parts of a step are marked"


def test_the_bench_leaves_its_trace_beside_its_numbers(tmp_path):
    config = BenchConfig(
        size="small", resolution="32x32", frames=5, dtype="fp32", device="cpu", steps=1, profile_steps="3",
        output=tmp_path / "step.json",
    )  # fmt: skip
    bench_step.run(BenchStepSettings(config, SpeedConfig()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step.json", "step.traces"]
    assert "step 3" in events(tmp_path / "step.traces" / "steps-3-3.json.gz")


def test_the_bench_needs_to_know_where_its_trace_goes():
    with pytest.raises(UserError, match="--profile_steps .* --output"):
        BenchConfig(profile_steps="3")
