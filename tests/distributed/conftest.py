import io
import os
import socket
import traceback

import pytest
import torch
import torch.multiprocessing as mp

from vflora.distributed.world import start


def _child(rank, port, count, sp_size, work, answers):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        world = start(sp_size, torch.device("cpu"))
        answer = work(world)
        world.close()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
        raise
    # As bytes: shared tensors would die with the process that made them.
    packed = io.BytesIO()
    torch.save(answer, packed)
    answers.put((rank, packed.getvalue(), None))


@pytest.fixture
def in_processes():
    """Runs a function of a World in several processes and returns what each returned, by rank.

    They are forked, so that they need not import everything again.
    """

    def run(count, work, *, sp_size=1, timeout=60):
        context = mp.get_context("fork")
        answers = context.Queue()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = [
            context.Process(target=_child, args=(rank, port, count, sp_size, work, answers)) for rank in range(count)
        ]
        for child in children:
            child.start()
        results = {}
        try:
            for _ in children:
                rank, answer, error = answers.get(timeout=timeout)
                assert error is None, f"process {rank}:\n{error}"
                results[rank] = torch.load(io.BytesIO(answer), weights_only=False)
            for child in children:
                child.join(timeout)
                assert child.exitcode == 0
        finally:
            for child in children:
                child.kill()
        return [results[rank] for rank in range(count)]

    return run
