import pytest

from vflora.distributed.launch import is_first, process_count, process_number


@pytest.mark.parametrize(
    ("environment", "number", "count"),
    [({}, 0, 1), ({"RANK": "0", "WORLD_SIZE": "2"}, 0, 2), ({"RANK": "3", "WORLD_SIZE": "4"}, 3, 4)],
)
def test_a_process_knows_its_number_from_the_launcher_or_is_alone(monkeypatch, environment, number, count):
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert (process_number(), process_count(), is_first()) == (number, count, number == 0)
