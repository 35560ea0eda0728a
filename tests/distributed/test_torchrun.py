"""Real launches with torchrun: restart after a death, and two agents that meet as two machines would."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from vflora.cli import parse
from vflora.train import run

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLED_ONCE = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from vflora import train
from vflora.cli import main
learn = train.learn
def deadly(training, lesson, step, *rest):
    if step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return learn(training, lesson, step, *rest)
train.learn = deadly
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.fixture
def flags(train_flags):
    return [
        *train_flags,
        *("--train_video_length", "5", "--condition_lookahead", "1", "--batch_size", "2", "--save_every_steps", "2"),
    ]


def environment(**more):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def start(command, **more):
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_after_a_death_torchrun_starts_again_and_the_run_goes_on_to_the_same_end(flags, tmp_path, losses, launch):
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    restarting = ["torchrun", "--standalone", "--nproc_per_node=2", "--max_restarts=1", str(script), *flags]
    cut = start([*restarting, "--output_dir", str(tmp_path / "cut"), "--resume_from_checkpoint", "auto"])
    output, _ = cut.communicate(timeout=400)
    assert cut.returncode == 0, output[-9000:]
    assert "exitcode: -9" in output
    assert "local_rank: 1" in output, "who died is named"
    launch(2, partial(run, parse("train", flags)))
    assert losses(tmp_path / "cut") == losses(tmp_path / "run"), "to the last bit"


def test_two_agents_on_one_machine_meet_as_two_machines_would(flags, tmp_path, losses):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["bash", "examples/two_nodes.sh", *flags, "--max_train_steps", "2"]
    agents = [
        start(command, HEAD="127.0.0.1", PORT=port, NODE_RANK=str(number), GPUS_PER_NODE="1") for number in (0, 1)
    ]
    try:
        for agent in agents:
            output, _ = agent.communicate(timeout=400)
            assert agent.returncode == 0, output[-9000:]
    finally:
        for agent in agents:
            agent.kill()
    assert list(losses(tmp_path / "run")) == [1, 2]
    assert (tmp_path / "run" / "checkpoint-2" / "manifest.json").is_file()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sp_size", ["1", "2"])
def test_a_run_by_two_gpus_can_be_repeated_to_the_last_bit(flags, tmp_path, losses, sp_size):
    command = ["torchrun", "--standalone", "--nproc_per_node=2", "train.py", *flags]
    for name in ("first", "second"):
        whole = ["--output_dir", str(tmp_path / name), "--sp_size", sp_size, "--device", "cuda", "--dtype", "bf16"]
        process = start([*command, *whole])
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output[-9000:]
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train.py", "--no_such_flag", "1"), "no_such_flag"),
        (("generate.py", "--model_path", "nowhere", "--prompt", "a"), "There is no model at nowhere"),
    ],
)
def test_a_refusal_is_printed_once_whatever_the_number_of_processes(flags, arguments, sentence):
    script, *rest = arguments
    more = [*flags, *rest] if script == "train.py" else rest
    torchrun = start(["torchrun", "--standalone", "--nproc_per_node=2", script, *more])
    output, _ = torchrun.communicate(timeout=400)
    assert torchrun.returncode != 0
    said = [line for line in output.splitlines() if line.startswith("vflora: ")]
    assert len(said) == 1, output[-5000:]
    assert sentence in said[0]


def test_bars_and_log_lines_come_once(flags):
    torchrun = start(
        [
            "torchrun",
            "--standalone",
            "--nproc_per_node=2",
            "train.py",
            *flags,
            "--max_train_steps",
            "1",
            "--sp_size",
            "2",
        ]
    )
    output, _ = torchrun.communicate(timeout=400)
    assert torchrun.returncode == 0, output[-9000:]
    assert output.count("loading the transformer") == 1
    assert output.count("training:   0%") == 1, "the first picture of the bar"


def test_a_warning_of_one_process_is_heard_and_the_same_of_all_is_heard_once(tmp_path):
    script = tmp_path / "warn.py"
    script.write_text(
        "import logging, os\n"
        "from vflora.cli import start_logging\n"
        "start_logging()\n"
        "log = logging.getLogger('vflora.test')\n"
        "log.info('for the first one')\n"
        "log.warning('all of us')\n"
        "if os.environ['RANK'] == '1': log.warning('only me')\n"
        "log.warning('all of us')\n"
    )
    torchrun = start(["torchrun", "--standalone", "--nproc_per_node=2", str(script)])
    output, _ = torchrun.communicate(timeout=400)
    assert torchrun.returncode == 0, output[-5000:]
    counts = {words: output.count(words) for words in ("for the first one", "only me", "all of us")}
    assert counts == {"for the first one": 1, "only me": 1, "all of us": 2}
