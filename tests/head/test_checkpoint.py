import json

import pytest
import torch

from vflora.errors import UserError
from vflora.head.checkpoint import HeadState, load_state, save_state, starting_point
from vflora.models.projection_head import HEAD_FILE, HeadSpec, load_head, new_head
from vflora.random_streams import keyed_generator

SETTINGS = {"seed": 1, "proj_dims": [8, 4], "data set": "abc", "processes": 1}


@pytest.fixture
def state():
    head = new_head(HeadSpec(6, (8, 4)), keyed_generator(0))
    optimizer = torch.optim.AdamW(head.parameters())
    head(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return HeadState(3, head, optimizer.state_dict(), schedule.state_dict(), (0.5, 0.25), SETTINGS)


def test_everything_comes_back(tmp_path, state):
    folder = save_state(state, tmp_path, None)
    again = load_state(folder)
    assert (again.step, again.best, again.settings) == (3, (0.5, 0.25), SETTINGS)
    assert all(torch.equal(v, again.head.state_dict()[k]) for k, v in state.head.state_dict().items())
    assert again.schedule == state.schedule
    for index, slots in state.optimizer["state"].items():
        assert all(torch.equal(v, again.optimizer["state"][index][k]) for k, v in slots.items())
    assert load_head(folder).spec == state.head.spec
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", [HEAD_FILE, "optimizer.pt", "state.json"])
def test_a_flipped_bit_is_noticed(tmp_path, state, name):
    folder = save_state(state, tmp_path, None)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}.*another checkpoint"):
        load_state(folder)


def test_only_the_newest_are_kept(tmp_path, state):
    for step in (8, 9, 10):
        save_state(HeadState(**vars(state) | {"step": step}), tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_auto_goes_on_where_there_is_something_to_go_on_from(tmp_path, state):
    assert starting_point(None, tmp_path, SETTINGS) is None
    assert starting_point("auto", tmp_path, SETTINGS) is None
    save_state(state, tmp_path, None)
    assert starting_point("latest", tmp_path, SETTINGS).step == 3
    assert starting_point("auto", tmp_path, SETTINGS).step == 3


def test_another_recipe_data_set_or_number_of_processes_is_refused(tmp_path, state):
    save_state(state, tmp_path, None)
    for name, value in {"seed": 2, "data set": "xyz", "processes": 2}.items():
        with pytest.raises(UserError, match=f"{name} was {SETTINGS[name]} and is {value}"):
            starting_point("latest", tmp_path, SETTINGS | {name: value})


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        starting_point("latest", tmp_path, SETTINGS)
    foreign = tmp_path / "checkpoint-1"
    foreign.mkdir()
    (foreign / "state.json").write_text("{}")
    (foreign / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="no checkpoint of `vflora train-head`"):
        starting_point("latest", tmp_path, SETTINGS)
