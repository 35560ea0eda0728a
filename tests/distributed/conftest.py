"""Real processes for the tests of several, quickly: a forkserver imports everything once and forks from there.

The process of the tests itself must not fork: torch has computed in it, and a child could wait for ever for a thread
that it did not inherit. The server only imports. What it forks runs functions of the tests, closures too, which
travel by value; a test that replaces a part of the program does so inside the function it sends.
"""

import io
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path

import cloudpickle
import pytest
import torch

from vflora.distributed.processes import joined

TESTS = f"{Path(__file__).parents[1]}{os.sep}"
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cloudpickle", "vflora.train", "vflora.generate", "vflora.compare", "vflora.cli"])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ByValue:
    """A function that reaches a process which cannot import the module it is from."""

    def __init__(self, function):
        self._content = cloudpickle.dumps(function)

    def __reduce__(self):
        return cloudpickle.loads, (self._content,)


def _send_test_modules():
    """What test modules define is sent along: in the other process there are no such modules."""
    for module in list(sys.modules.values()):
        if (getattr(module, "__file__", None) or "").startswith(TESTS):
            cloudpickle.register_pickle_by_value(module)


def _child(rank, port, count, work, answers):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HF_HUB_OFFLINE": "1",
    }
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as in the process of the tests
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
    """Processes that know nothing of each other, each with the environment that torchrun gives."""

    def __init__(self, count, work):
        _send_test_modules()
        child, port = ByValue(_child), free_port()
        self._answers = PROCESSES.Queue()
        self.children = [
            PROCESSES.Process(target=child, args=(rank, port, count, ByValue(work), self._answers))
            for rank in range(count)
        ]
        for process in self.children:
            process.start()

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
def launch():
    """Runs a function in several processes and returns what each returned, by rank."""

    def run(count, work, *, timeout=200):
        outcomes = Processes(count, work).outcomes(count, timeout)
        for rank, (_, error) in outcomes.items():
            assert error is None, f"process {rank}: {error}"
        return [outcomes[rank][0] for rank in range(count)]

    return run


@pytest.fixture
def launch_to_fail():
    """Runs a function in several processes, which raise unless they are killed, and returns the errors by rank."""

    def run(count, work, *, killed=0, timeout=200):
        outcomes = Processes(count, work).outcomes(count - killed, timeout)
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
