"""The measurement of several processes runs at small size and says what it should."""

import json
from functools import partial

import pytest

from vflora.bench.parallel import BenchParallelSettings, ParallelConfig, run
from vflora.bench.setting import BenchConfig
from vflora.errors import UserError
from vflora.models.speed_config import SpeedConfig

SMALL = {"size": "small", "resolution": "32x32", "frames": 5, "dtype": "fp32", "device": "cpu", "steps": 1}


def settings(ways, **options):
    speed = options.pop("speed", SpeedConfig())
    return BenchParallelSettings(ParallelConfig(ways), BenchConfig(**SMALL, **options), speed)


def test_every_way_is_timed_and_compared_with_one_process(launch, tmp_path):
    output = tmp_path / "new" / "parallel.json"
    launch(2, partial(run, settings(["alone", "data", "sharded", "sequence"], output=output)), timeout=200)
    result = json.loads(output.read_text())
    ways = result["ways"]
    assert list(ways) == ["alone", "data", "sharded", "sequence"]
    assert [len(way["base_gib"]) for way in ways.values()] == [1, 2, 2, 2]
    for name, way in (("data_efficiency", "data"), ("sharded_efficiency", "sharded"), ("sequence_speedup", "sequence")):
        assert result[name] == pytest.approx(ways["alone"]["step_s"] / ways[way]["step_s"])
    assert 0.49 < result["base_share"] < 0.52
    assert sum(ways["sharded"]["base_gib"]) == pytest.approx(ways["alone"]["base_gib"][0], rel=0.02)


@pytest.mark.parametrize(
    ("processes", "speed", "sentence"),
    [
        (2, {"rollout_graphs": True}, "--rollout_graphs does not go with a base that is sharded"),
        (2, {"weight_storage": "int8"}, "--weight_storage does not go with a base that is sharded"),
        (4, {}, "2 attention heads do not divide by --nproc_per_node 4: use 1 or 2"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_all(launch_to_fail, processes, speed, sentence):
    work = partial(run, settings(["sharded_sequence"], speed=SpeedConfig(**speed)))
    errors = launch_to_fail(processes, work)
    assert len(errors) == processes
    assert all(sentence in error for error in errors.values())


def test_one_process_is_told_how_to_start_two():
    with pytest.raises(UserError, match="torchrun --standalone --nproc_per_node=2 -m vflora.cli bench parallel"):
        run(settings(["alone"]))
    with pytest.raises(UserError, match="--ways fast: use alone, data, sharded, sequence, sharded_sequence"):
        ParallelConfig(["fast"])
