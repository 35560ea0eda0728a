import gc
from pathlib import Path

import pytest
import torch

from vflora.config import ModelConfig
from vflora.devices import available_memory, has_room, limit_memory, one_thread, torch_device
from vflora.errors import UserError
from vflora.world.pretrain import PretrainConfig


def test_auto_takes_the_accelerator_of_the_machine_or_else_the_cpu():
    found = torch_device("auto")
    assert found.type == (torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu")
    assert torch.ones(1, device=found).device.type == found.type


@pytest.mark.parametrize("name", ["cpu", "meta"])
def test_a_named_device_is_taken_as_it_is(name):
    assert torch_device(name) == torch.device(name)


def test_a_device_that_pytorch_does_not_know_is_refused_with_the_way_to_write_it():
    with pytest.raises(UserError, match="--device gpu .* write auto, cpu, cuda or cuda:1"):
        torch_device("gpu")


@pytest.mark.parametrize("name", ["cuda:99", "xpu:99"])
def test_a_device_that_this_machine_lacks_is_refused_before_anything_is_loaded(name):
    with pytest.raises(UserError, match=f"--device {name} is not on this machine.* write auto or cpu"):
        torch_device(name)


def test_small_work_has_one_thread_and_what_follows_has_as_many_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_every_command_reads_the_flag_with_the_same_function():
    assert (
        ModelConfig("x", device="auto").torch_device()
        == PretrainConfig(Path("world")).torch_device()
        == torch_device("auto")
    )
    source = Path(__file__).parents[1] / "src"
    others = [p.name for p in source.rglob("*.py") if '"cuda" if torch.cuda.is_available()' in p.read_text()]
    assert others == []


def test_where_memory_cannot_be_asked_for_there_is_room():
    assert has_room(torch.device("cpu"), 2**60)


def test_a_smaller_card_is_a_matter_of_gpus():
    with pytest.raises(UserError, match="--card_gib 16 limits a CUDA GPU's memory, and this computes on cpu"):
        limit_memory(torch.device("cpu"), 16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "cuda:0"])
def test_a_smaller_card_is_full_sooner(name):
    device = torch_device(name)
    gc.collect()  # graphs that other tests left in reference cycles hold memory
    with pytest.raises(UserError, match="at most the"):
        limit_memory(device, 1e6)
    try:
        limit_memory(device, 4.0)
        assert available_memory(device) <= 4 * 2**30
        taken = torch.cuda.memory_allocated(device)
        assert has_room(device, 2**30)
        assert not has_room(device, 4 * 2**30 + 1 - taken)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(4 * 2**30 + 2**21, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)
