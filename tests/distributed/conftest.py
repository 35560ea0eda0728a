"""Several processes that meet, each with the environment that torchrun gives."""

import io
import multiprocessing
import os
import socket
import traceback
from functools import partial

import pytest
import torch

from vflora.distributed.processes import joined


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(rank, port, count, work, answers):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    answer, error = None, None
    try:
        answer = work()
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}\n{traceback.format_exc()}"
    # As bytes: shared tensors would die with the process that made them.
    packed = io.BytesIO()
    torch.save(answer, packed)
    answers.put((rank, packed.getvalue(), error))
    answers.close()
    answers.join_thread()
    os._exit(0 if error is None else 1)


class Processes:
    """Processes that know nothing of each other."""

    def __init__(self, fork, count, work):
        port = free_port()
        self._answers = multiprocessing.get_context("forkserver").Queue()
        self.children = [fork(partial(_child, rank, port, count, work), self._answers) for rank in range(count)]

    def outcomes(self, expected, timeout):
        """What `expected` of them returned or raised, by rank: (answer, error)."""
        try:
            found = [self._answers.get(timeout=timeout) for _ in range(expected)]
            for child in self.children:
                child.join(timeout)
                assert not child.is_alive(), "a process still waits"
        finally:
            for child in self.children:
                child.kill()
        return {rank: (torch.load(io.BytesIO(answer), weights_only=False), error) for rank, answer, error in found}


@pytest.fixture
def launch(fork):
    """Runs a function in several processes and returns what each returned, by rank."""

    def run(count, work, *, timeout=200):
        outcomes = Processes(fork, count, work).outcomes(count, timeout)
        for rank, (_, error) in outcomes.items():
            assert error is None, f"process {rank}: {error}"
        return [outcomes[rank][0] for rank in range(count)]

    return run


@pytest.fixture
def launch_to_fail(fork):
    """Runs a function in several processes, which raise unless they are killed, and returns the errors by rank."""

    def run(count, work, *, killed=0, timeout=200):
        outcomes = Processes(fork, count, work).outcomes(count - killed, timeout)
        assert all(error is not None for _, error in outcomes.values())
        return {rank: error for rank, (_, error) in outcomes.items()}

    return run


def _in_world(work, sp_size):
    with joined(sp_size, torch.device("cpu")) as world:
        return work(world)


@pytest.fixture
def in_processes(launch):
    """Runs a function of a World in several processes and returns what each returned, by rank."""
    return lambda count, work, *, sp_size=1: launch(count, partial(_in_world, work, sp_size))
