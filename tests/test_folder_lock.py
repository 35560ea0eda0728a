import errno
import fcntl
import subprocess
import sys
from typing import Any

import pytest

from vflora.errors import UserError
from vflora.folder_lock import held

HOLD = """
import os, pathlib, sys
from vflora.folder_lock import held
folder, rank, size = sys.argv[1:]
with held(pathlib.Path(folder), "--output_dir", rank=int(rank), size=int(size)):
    lives, says_so = os.pipe()
    if not os.fork():  # as the workers that read pictures, which end a while after a trainer that is killed
        os.write(says_so, b"!")
        sys.stdin.read()
        os._exit(0)
    os.read(lives, 1)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def at_work(tmp_path):
    """Holds a folder in a process of its own, which is returned."""
    started = []

    def start(rank=0, size=1):
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), str(rank), str(size)]
        process: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


def refused(folder, **options):
    sentence = r"another run is at work in .*run: .* or choose another --output_dir\."
    with pytest.raises(UserError, match=sentence), held(folder, "--output_dir", **options):
        pass


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    with held(folder, "--output_dir"):
        refused(folder)
    with held(folder, "--output_dir"):
        pass


def test_a_run_that_is_killed_leaves_no_lock_behind(tmp_path, at_work):
    process = at_work()
    refused(tmp_path / "run")
    process.kill()
    process.wait()
    with held(tmp_path / "run", "--output_dir"):
        pass


def test_processes_of_one_launch_share_the_folder_and_other_launches_stay_out(tmp_path, at_work):
    at_work(rank=1, size=3)
    with held(tmp_path / "run", "--output_dir", rank=0, size=3):
        pass
    refused(tmp_path / "run", rank=1, size=3)
    refused(tmp_path / "run", rank=0, size=2)
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.endswith("-of-2")] == []


def fail(folder, before=lambda: None, **options):
    def work():
        with held(folder, "--output_dir", **options):
            before()
            raise UserError("there is no such model.")

    with pytest.raises(UserError, match="no such model"):
        work()


def test_a_run_that_fails_before_it_wrote_leaves_nothing_behind(tmp_path):
    fail(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    fail(tmp_path / "run")
    assert list(tmp_path.rglob("*")) == [tmp_path / "run"], "the folder was there before"


def test_of_several_processes_the_last_that_fails_takes_the_folder_away(tmp_path):
    def the_other_fails():
        fail(tmp_path / "run", rank=1, size=2)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock-0-of-2"]

    fail(tmp_path / "run", the_other_fails, rank=0, size=2)
    assert list(tmp_path.iterdir()) == []


def test_what_a_failing_run_wrote_stays_and_so_does_what_was_there(tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    fail(tmp_path / "run", lambda: metrics.write_text("1"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [metrics.name]
    with held(tmp_path / "run", "--output_dir"):
        pass
    before = sorted(tmp_path.rglob("*"))
    fail(tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_fails_takes_no_lock_from_others(tmp_path, at_work):
    at_work(rank=0, size=2)
    refused(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock-0-of-2"]
    refused(tmp_path / "run", rank=0, size=2)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock-0-of-2"]


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with held(tmp_path, "--output_dir"):
        assert f"{tmp_path} cannot be locked" in caplog.text
