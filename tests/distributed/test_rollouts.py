"""Training from trajectories on disk as several processes."""

from functools import partial

from vflora.cli import parse
from vflora.rollouts import run as roll_out
from vflora.train import run as train


def test_two_processes_from_disk_equal_two_that_roll_out_to_the_last_bit(launch, make_train_flags, tmp_path, losses):
    trajectories = tmp_path / "trajectories"
    flags = ["--train_video_length", "5", "--learning_rate", "3e-2", "--batch_size", "2", "--trajectory_reuse", "2"]

    def settings(command, output, *extra):
        return parse(command, [*make_train_flags(tmp_path / output), *flags, *extra])

    launch(2, partial(train, settings("train", "own")))
    # Three processes share the work, each shard a rollout: the number of processes that roll out changes nothing.
    storing = ["--trajectory_dir", str(trajectories), "--train_processes", "2", "--rollouts_per_shard", "1"]
    launch(3, partial(roll_out, settings("rollouts", "none", *storing)))
    launch(2, partial(train, settings("train", "disk", "--trajectory_dir", str(trajectories))))
    assert losses(tmp_path / "disk") == losses(tmp_path / "own")
    assert any(float.fromhex(row[0]) > 0 for row in losses(tmp_path / "disk").values())
    assert len(list((trajectories / "shards").iterdir())) == 4
