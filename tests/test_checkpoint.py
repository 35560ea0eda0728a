import os
import signal
from pathlib import Path

import pytest
import torch

from vflora.checkpoint import (
    RunState,
    find_checkpoint,
    list_checkpoints,
    read_state,
    read_tensors,
    save_checkpoint,
    verify_checkpoint,
)
from vflora.errors import UserError


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "lora/block.weight": torch.randn(3, 5, generator=generator),
        "optimizer/block.weight/momentum_buffer": torch.randn(3, 5, generator=generator).bfloat16(),
        "optimizer/block.weight/step": torch.tensor(7.0),
    }


def write_adapter(folder: Path) -> None:
    (folder / "adapter.bin").write_bytes(b"adapter")


def save(folder, step, keep=None, write=write_adapter):
    return save_checkpoint(folder, RunState(step, 2 * step, "data"), tensors(step), "a: 1\n", write, keep=keep)


def test_everything_comes_back_bit_for_bit(tmp_path):
    folder = save(tmp_path, 3)
    verify_checkpoint(folder)
    assert read_state(folder).step == 3
    assert read_state(folder).batches == 6
    loaded, saved = read_tensors(folder), tensors(3)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) and loaded[name].dtype == saved[name].dtype for name in saved)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert find_checkpoint("latest", tmp_path).name == "checkpoint-100"


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 4)
    verify_checkpoint(save(tmp_path, 4))


@pytest.mark.parametrize("part", ["dcp", "lora", "config.yaml", "state.json"])
def test_a_flipped_bit_is_found_and_the_file_named(tmp_path, part):
    folder = save(tmp_path, 1)
    path = (
        folder / part if (folder / part).is_file() else max((folder / part).iterdir(), key=lambda p: p.stat().st_size)
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        verify_checkpoint(folder)


def test_a_missing_file_is_found(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "lora" / "adapter.bin").unlink()
    with pytest.raises(UserError, match="adapter.bin is missing"):
        verify_checkpoint(folder)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="keep_checkpoints"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    verify_checkpoint(tmp_path / "checkpoint-1")


def test_kill_9_inside_a_save_leaves_the_checkpoint_before(tmp_path, fork):
    save(tmp_path, 1)
    process = fork(lambda: save(tmp_path, 2, write=lambda folder: os.kill(os.getpid(), signal.SIGKILL)))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    found = find_checkpoint("latest", tmp_path)
    assert found.name == "checkpoint-1"
    verify_checkpoint(found)
    verify_checkpoint(save(tmp_path, 2))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        find_checkpoint(str(tmp_path), tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        find_checkpoint("latest", tmp_path)


def test_a_checkpoint_of_a_head_is_none_of_a_lora(tmp_path):
    (tmp_path / "state.json").write_text('{"step": 3, "best": [0.5], "samples_per_step": 4}')
    with pytest.raises(UserError, match="no checkpoint of `vflora train`, but of a head"):
        read_state(tmp_path)
