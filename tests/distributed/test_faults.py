"""What happens to a run when a process, a disk or a number breaks, and how it goes on."""

import logging
import os
import resource
import shutil
import signal
from functools import partial

import pytest
import torch

import vflora.checkpoint
import vflora.train
from vflora.checkpoint import read_state, read_tensors, verify_checkpoint
from vflora.cli import parse
from vflora.train import run


@pytest.fixture
def settings(train_flags, tmp_path):
    """Settings for so many processes that share a global batch of four and save every second of four steps."""

    def make(processes, *extra, output_dir=tmp_path / "run"):
        flags = ["--train_video_length", "5", "--condition_lookahead", "1", "--learning_rate", "3e-2"]
        flags += ["--use_muon", "false", "--save_every_steps", "2", "--batch_size", str(4 // processes)]
        return parse("train", [*train_flags, *flags, "--output_dir", str(output_dir), *extra])

    return make


def as_numbers(rows):
    return [float.fromhex(value) for values in rows.values() for value in values]


def run_and_act(settings, number, act):
    """A run in which `act` is called before step `number`; for a process of its own, whose `learn` it replaces."""

    def work():
        learn = vflora.train.learn

        def wrapped(training, lesson, step, *rest):
            if step == number:
                act(training)
            return learn(training, lesson, step, *rest)

        vflora.train.learn = wrapped
        return run(settings)

    return work


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_saved_by_two_processes_resumed_by_two_one_and_four(launch, settings, tmp_path, losses):
    whole = tmp_path / "run"
    launch(2, partial(run, settings(2)))
    for processes in (2, 1, 4):
        part = tmp_path / f"by-{processes}"
        shutil.copytree(whole, part)
        shutil.rmtree(part / "checkpoint-4")
        resumed = settings(processes, "--resume_from_checkpoint", "auto", output_dir=part)
        launch(processes, partial(run, resumed))
        if processes == 2:
            assert losses(part) == losses(whole), "to the last bit"
        assert as_numbers(losses(part)) == pytest.approx(as_numbers(losses(whole)), rel=1e-4, abs=1e-12)


def test_saving_beside_the_training_changes_nothing_and_leaves_the_same_files(launch, settings, tmp_path, losses):
    launch(2, partial(run, settings(2)))
    beside = tmp_path / "beside"
    launch(2, partial(run, settings(2, "--async_save", output_dir=beside)))
    assert losses(beside) == losses(tmp_path / "run")
    for step in (2, 4):
        verify_checkpoint(beside / f"checkpoint-{step}")
        ours, theirs = (read_tensors(d / f"checkpoint-{step}") for d in (beside, tmp_path / "run"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_global_batch_is_refused(launch, launch_to_fail, settings):
    launch(2, partial(run, settings(2, "--max_train_steps", "2")))
    errors = launch_to_fail(2, partial(run, settings(2, "--batch_size", "1", "--resume_from_checkpoint", "latest")))
    assert all("4 samples a step and this run would take 2" in error for error in errors.values())


def test_a_signal_to_one_process_saves_once_on_all_together(launch, settings, tmp_path):
    def stop(training):
        logging.getLogger("vflora").addHandler(logging.FileHandler(tmp_path / f"log-{training.world.rank}"))
        if training.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    saved = launch(2, run_and_act(settings(2), 0, stop))
    assert "stopped after step 1" in (tmp_path / "log-0").read_text()
    assert (tmp_path / "log-1").read_text() == "", "only the process with the bar can write above it"
    assert saved == [tmp_path / "run" / "checkpoint-1"] * 2
    assert [p.name for p in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-1"]
    verify_checkpoint(saved[0])


def test_a_process_that_dies_is_named_by_the_others(launch_to_fail, settings):
    dying = run_and_act(settings(2), 1, lambda training: training.world.rank == 1 and die())
    errors = launch_to_fail(2, dying, killed=1, timeout=60)
    assert "LostProcessError: process 1 (pid " in errors[0]
    assert "--resume_from_checkpoint auto" in errors[0]


@pytest.mark.parametrize("function", ["_save_tensors", "finish_folder"])
def test_killed_inside_a_save_leaves_the_checkpoint_before_whole(launch, launch_to_fail, settings, tmp_path, function):
    """Rank 1 dies while tensors are written, or rank 0 between the last file and the renaming."""
    launch(2, partial(run, settings(2, "--max_train_steps", "2")))
    again = settings(2, "--resume_from_checkpoint", "auto")

    def work():
        inner = getattr(vflora.checkpoint, function)

        def killed(*args):
            if function == "finish_folder" or args[2].rank == 1:
                die()
            return inner(*args)

        setattr(vflora.checkpoint, function, killed)
        return run(again)

    # Rank 0 of these processes holds the store; without it the other one ends itself, as a killed one would look.
    launch_to_fail(2, work, killed=2 if function == "finish_folder" else 1, timeout=60)
    folder = tmp_path / "run"
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    verify_checkpoint(folder / "checkpoint-2")
    assert launch(2, partial(run, again)) == [folder / "checkpoint-4"] * 2


def test_a_full_disk_stops_all_with_the_checkpoint_before_intact(launch, launch_to_fail, settings, tmp_path):
    launch(2, partial(run, settings(2, "--max_train_steps", "2")))

    again = settings(2, "--resume_from_checkpoint", "auto")

    def without_room():
        # Writing beyond this size fails as writing to a full disk does: with an OSError.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return run(again)

    errors = launch_to_fail(2, without_room)
    assert all("no checkpoint could be written" in error and "are whole" in error for error in errors.values())
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    verify_checkpoint(tmp_path / "run" / "checkpoint-2")


def test_a_flipped_bit_is_found_on_load_by_all(launch, launch_to_fail, settings, tmp_path):
    launch(2, partial(run, settings(2, "--max_train_steps", "2")))
    victim = max((tmp_path / "run" / "checkpoint-2" / "dcp").glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    errors = launch_to_fail(2, partial(run, settings(2, "--resume_from_checkpoint", "latest")))
    assert all(f"{victim} is damaged" in error for error in errors.values())


def test_a_loss_that_is_not_finite_on_one_process_stops_all_before_the_optimizer(launch_to_fail, settings):
    def poison(training):
        if training.world.rank == 1:
            with torch.no_grad():
                for parameter in training.identity.embedder.head.parameters():
                    parameter.fill_(float("nan"))

    errors = launch_to_fail(2, run_and_act(settings(2), 1, poison))
    assert all("NonFiniteError: the identity loss is not finite in step 2" in error for error in errors.values())


def test_every_rank_writes_a_share_of_what_is_trained_and_nothing_of_the_base(launch, settings, tmp_path):
    folder = launch(2, partial(run, settings(2, "--max_train_steps", "2")))[0]
    assert len(list((folder / "dcp").glob("*.distcp"))) == 2
    tensors = read_tensors(folder)
    assert {name.split("/")[0] for name in tensors} == {"lora", "optimizer"}
    assert all("lora_" in name for name in tensors)
    assert read_state(folder).samples_per_step == 4
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()
