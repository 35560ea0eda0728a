import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess

import pytest
import torch
from safetensors.torch import load
from webdataset.tariterators import group_by_keys, tar_file_expander

from vflora.cli import main, parse
from vflora.errors import UserError
from vflora.folder_lock import held
from vflora.models.conditions import ConditionEncoder
from vflora.models.denoiser import Denoiser
from vflora.rollouts import run as roll_out
from vflora.teacher_source import Rollouts
from vflora.train import run as train
from vflora.trajectories.teacher import Guide

SHORT = ("--train_video_length", "5", "--learning_rate", "3e-2", "--harvest_count", "1")
VALUES = 4 * 2 * 2 * 2
"""Of one sample's latents: channels, latent frames, height, width."""


@pytest.fixture
def flags(train_flags):
    """Four steps of the shortest clip."""
    return [*train_flags, *SHORT]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "trajectories"


def storing(flags, folder, *extra):
    return parse("rollouts", [*flags, "--trajectory_dir", str(folder), "--rollouts_per_shard", "2", *extra])


def trained(flags, output_dir, *extra):
    return train(parse("train", [*flags, "--output_dir", str(output_dir), *extra]))


def samples(folder):
    """Everything in the finished shards, as webdataset groups it."""
    found = {}
    for shard in sorted((folder / "shards").glob("*.tar")):
        with open(shard, "rb") as stream:
            for row in group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}])):
                assert row["__key__"] not in found
                found[row["__key__"]] = (row["json"], row["safetensors"])
    return found


def shard_names(folder):
    return sorted(path.name for path in (folder / "shards").iterdir())


@pytest.fixture(scope="module")
def shared(make_train_flags, tmp_path_factory):
    """Trajectories of four steps, with their flags; only to be read."""
    folder = tmp_path_factory.mktemp("shared")
    flags = [*make_train_flags(folder / "run"), *SHORT]
    roll_out(storing(flags, folder / "trajectories"))
    return flags, folder / "trajectories"


def refuse(*_args, **_kwargs):
    raise AssertionError("not needed by a run from disk")


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--batch_size", "2", "--enable_augmentation", "--p_secondary", "0.5", "--num_workers", "2"],
        ["--rollout_guidance_scale", "2", "--harvest_below", "1", "--max_train_steps", "2"],
    ],
)
def test_training_from_disk_equals_the_run_that_rolled_out_itself_without_teacher_or_encoders(
    flags, folder, tmp_path, monkeypatch, extra, losses, device
):
    flags = [*flags, "--device", device]
    trained([*flags, *extra], tmp_path / "own")
    roll_out(storing([*flags, *extra], folder))
    monkeypatch.setattr(Denoiser, "teacher", refuse)
    monkeypatch.setattr("vflora.models.conditions.load_encoders", refuse)
    trained([*flags, *extra], tmp_path / "disk", "--trajectory_dir", str(folder))
    assert losses(tmp_path / "disk") == losses(tmp_path / "own")
    assert any(float.fromhex(row[0]) > 0 for row in losses(tmp_path / "disk").values())


def test_killed_and_resumed_from_disk_with_reuse_and_accumulation_equals_the_run_that_rolled_out_itself(
    flags, folder, tmp_path, losses, train_until_killed
):
    flags = [*flags, "--trajectory_reuse", "3", "--gradient_accumulation_steps", "2"]
    flags += ["--save_every_steps", "2"]
    trained(flags, tmp_path / "own")
    roll_out(storing(flags, folder))
    disk = [*flags, "--output_dir", str(tmp_path / "disk"), "--trajectory_dir", str(folder)]
    train_until_killed(disk)
    train(parse("train", [*disk, "--resume_from_checkpoint", "latest"]))
    assert losses(tmp_path / "disk") == losses(tmp_path / "own")


def test_a_run_may_go_over_from_its_own_rollouts_to_the_disk(flags, shared, tmp_path, losses):
    _, folder = shared
    trained(flags, tmp_path / "own", "--save_every_steps", "2")
    shutil.copytree(tmp_path / "own", tmp_path / "both")
    shutil.rmtree(tmp_path / "both" / "checkpoint-4")
    trained(flags, tmp_path / "both", "--trajectory_dir", str(folder), "--resume_from_checkpoint", "latest")
    assert losses(tmp_path / "both") == losses(tmp_path / "own")


def test_any_number_of_processes_makes_the_same_shards_without_waiting_for_each_other(
    flags, shared, folder, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = samples(shared[1])
    for rank, names in (("1", ["rollouts-00000002-00000003.tar"]), ("0", shard_names(shared[1]))):
        monkeypatch.setenv("RANK", rank)
        roll_out(storing(flags, folder, "--train_processes", "1"))
        assert shard_names(folder) == names
    assert samples(folder) == alone


def test_samples_are_what_the_steps_look_at_and_no_more(shared):
    _, folder = shared
    found = samples(folder)
    assert sorted(found) == [f"{number:010d}-0000" for number in range(4)]
    for note, content in found.values():
        points = json.loads(note)["points"]
        tensors = load(content)
        assert sorted(tensors) == ["latents", "velocities"]
        assert points[-1] == 5
        assert len(points) == (3 if 4 in points else 2), "one above, the deep one, and one below where there is one"
        assert all(t.shape == (len(points), 4, 2, 2, 2) and t.dtype == torch.float32 for t in tensors.values())
        assert len(points) * 2 * VALUES * 4 <= len(content) < len(points) * 2 * VALUES * 4 + 300


def test_room_is_asked_for_the_points_below_too(flags, folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("vflora.rollouts.require_space", lambda folder, needed, advice: asked.append(needed))
    flags = [*flags, "--max_train_steps", "1", "--id_timestep_frac_high", "0.7"]
    roll_out(storing([*flags, "--harvest_below", "0"], tmp_path / "without"))
    roll_out(storing([*flags, "--harvest_below", "1"], folder))
    (without,), (more,) = (samples(place).values() for place in (tmp_path / "without", folder))
    latents_and_velocity = 2 * VALUES * 4
    assert len(load(more[1])["latents"]) == len(load(without[1])["latents"]) + 1
    assert asked[1] - asked[0] == latents_and_velocity


def test_bf16_takes_half_the_bytes_and_only_rounds(shared, flags, folder, tmp_path, losses):
    roll_out(storing(flags, folder, "--trajectory_dtype", "bf16", "--max_train_steps", "1"))
    ((_, rounded),) = samples(folder).values()
    exact = load(next(iter(samples(shared[1]).values()))[1])
    assert len(rounded) < 2 * 2 * VALUES * 2 + 300
    for name, value in load(rounded).items():
        assert torch.equal(value, exact[name].bfloat16())
    trained(flags, tmp_path / "disk", "--trajectory_dir", str(folder), "--max_train_steps", "1")
    assert 0 < float.fromhex(losses(tmp_path / "disk")[1][0]) < 1e-3, "the student starts as the teacher, but rounded"


def test_a_stop_keeps_what_is_done_and_the_same_line_goes_on(shared, flags, folder, monkeypatch, caplog):
    made, plain = [], Rollouts.trajectory

    def stopping(self, prepared, step):
        made.append(prepared.number)
        if len(made) == 3:
            # As torchrun and Slurm do: to the workers that read pictures, too.
            processes = (os.getpid(), *(child.pid for child in multiprocessing.active_children()))
            subprocess.run(["kill", *map(str, processes)], check=True)
        return plain(self, prepared, step)

    monkeypatch.setattr(Rollouts, "trajectory", stopping)
    line = ["--rollouts_per_shard", "4", "--num_workers", "2", "--condition_lookahead", "1"]
    roll_out(storing(flags, folder, *line))
    assert "stopped after 3 of 4 rollouts" in caplog.text
    assert shard_names(folder) == ["rollouts-00000000-00000002.tar"]
    roll_out(storing(flags, folder, *line))
    assert made == [0, 1, 2, 3]
    assert samples(folder) == samples(shared[1])


def test_a_kill_loses_only_the_shard_in_hand(shared, flags, folder, tmp_path, fork):
    def work():
        plain = Rollouts.trajectory

        def killed(self, prepared, step):
            if prepared.number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, prepared, step)

        Rollouts.trajectory = killed
        roll_out(storing(flags, folder))

    process = fork(work, log=tmp_path / "stderr")
    process.join(200)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "stderr").read_text()[-2000:]
    assert shard_names(folder) == [".unfinished-0.tmp", "rollouts-00000000-00000001.tar"]
    roll_out(storing(flags, folder))
    assert shard_names(folder) == shard_names(shared[1])
    assert samples(folder) == samples(shared[1])


@pytest.fixture
def fill_disk(capsys):
    """Lets no file grow beyond some bytes, which the kernel refuses as it refuses a full disk."""
    # capsys keeps what is printed in memory; the file that pytest keeps it in otherwise has a limit now, too.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("rollouts_per_shard", [2, 64])
def test_a_full_disk_stops_with_a_sentence_and_leaves_whole_shards(
    flags, folder, monkeypatch, fill_disk, rollouts_per_shard
):
    plain = Rollouts.trajectory

    def filling(self, prepared, step):
        if prepared.number == 3:
            fill_disk(3000)
        return plain(self, prepared, step)

    monkeypatch.setattr(Rollouts, "trajectory", filling)
    with pytest.raises(UserError, match="no shard could be written.*make room and run the same line again"):
        roll_out(storing(flags, folder, "--rollouts_per_shard", str(rollouts_per_shard)))
    assert shard_names(folder) == (["rollouts-00000000-00000001.tar"] if rollouts_per_shard == 2 else [])


def test_conditions_that_the_disk_does_not_take_stop_the_run_with_a_sentence(flags, folder, fill_disk, monkeypatch):
    plain = ConditionEncoder.prepare

    def filling(self, *what):
        fill_disk(10)
        plain(self, *what)

    monkeypatch.setattr(ConditionEncoder, "prepare", filling)
    with pytest.raises(UserError, match="encoded prompts and pictures cannot be kept in .*conditions.*make room"):
        roll_out(storing(flags, folder))
    assert not [path for path in folder.rglob("*") if path.suffix in (".tmp", ".safetensors", ".tar")]


def test_running_past_the_end_is_refused_with_the_command_that_extends_it(flags, folder, tmp_path, capsys):
    roll_out(storing(flags, folder, "--max_train_steps", "1"))
    longer = [*flags, "--max_train_steps", "3", "--trajectory_dir", str(folder)]
    assert main(["train", *longer]) == 2
    message = capsys.readouterr().err
    assert "holds the first 1 of the 3 steps" in message
    command = message.split("`")[1].split()
    assert command[:2] == ["vflora", "rollouts"]
    assert main(command[1:]) == 0
    assert main(["train", *longer]) == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--seed", "1"], "--seed was 42 and is 1"),
        (["--harvest_count", "2"], "--harvest_count was 1 and is 2"),
        (["--harvest_below", "0"], "--harvest_below was 1 and is 0"),
        (["--rollout_guidance_scale", "2", "--rollout_stride", "1"], "--rollout_guidance_scale was 1.0 and is 2.0"),
        (["--train_video_length", "9"], "--train_video_length was 5 and is 9"),
        (["--batch_size", "2"], "processes x --batch_size was 1 and is 2"),
        (["--gradient_accumulation_steps", "2"], "--gradient_accumulation_steps was 1 and is 2"),
        (["--wds_shuffle_buf", "4"], "--wds_shuffle_buf was 128 and is 4"),
        (["--dtype", "bf16"], "--dtype was fp32 and is bf16"),
        (["--trajectory_dir", "/nowhere/at/all"], "holds no trajectories"),
    ],
)
def test_another_recipe_is_refused_with_what_differs(shared, capsys, change, sentence):
    flags, folder = shared
    assert main(["train", *flags, "--trajectory_dir", str(folder), *change]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("was") <= 2, "only what differs is named"
    assert "Traceback" not in message


@pytest.mark.parametrize("what", ["wds_root", "pipeline_dir", "prompt_bank"])
def test_another_data_set_model_or_prompt_bank_is_refused(shared, small_data, small_models, tmp_path, capsys, what):
    flags, folder = shared
    other = tmp_path / "other"
    if what == "prompt_bank":
        other.write_text("template: '{character} waves.'\n")
    elif what == "wds_root":
        shutil.copytree(small_data, other)
        manifest = other / "manifest" / "train_manifest.csv"
        manifest.write_text(manifest.read_text().replace("fox", "dog").replace("dog", "fox", 1) + "\n")
    else:
        shutil.copytree(small_models / "pipeline", other)
        (weights,) = (other / "transformer").glob("*.safetensors")
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    assert main(["train", *flags, "--trajectory_dir", str(folder), f"--{what}", str(other)]) == 2
    assert f"--{what}" in capsys.readouterr().err


def test_what_the_student_learns_with_may_differ(shared, tmp_path, losses):
    flags, folder = shared
    other = [
        "--lora_r",
        "2",
        "--lambda_id",
        "0.1",
        "--learning_rate",
        "1e-3",
        "--p_secondary",
        "0",
        "--id_margin",
        "0.1",
    ]
    trained([*flags, *other], tmp_path / "disk", "--trajectory_dir", str(folder), "--max_train_steps", "2")
    assert losses(tmp_path / "disk")[1][0] == float(0).hex()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:2000] + bytes([content[2000] ^ 1]) + content[2001:],
        lambda content: content[:-600],
        lambda content: content.replace(b'"points"', b'"paints"'),
    ],
    ids=["a flipped bit", "cut off", "a damaged note"],
)
def test_damage_is_found_and_told(shared, tmp_path, capsys, damage):
    flags, folder = shared[0], tmp_path / "copy"
    shutil.copytree(shared[1], folder)
    shard = folder / "shards" / shard_names(folder)[0]
    shard.write_bytes(damage(shard.read_bytes()))
    assert main(["train", *flags, "--trajectory_dir", str(folder)]) == 2
    assert f"{shard} is damaged" in capsys.readouterr().err


def test_a_builder_that_draws_for_itself_is_asked_once(flags, folder, tmp_path, losses):
    builder = tmp_path / "builder.py"
    builder.write_text("import random\ndef build_prompt(character): return f'{character} {random.random()}'\n")
    flags = [*flags, "--prompt_builder", str(builder), "--max_train_steps", "2"]
    roll_out(storing(flags, folder))
    trained(flags, tmp_path / "disk", "--trajectory_dir", str(folder))
    assert losses(tmp_path / "disk")[1][0] == float(0).hex(), "the student heard what the teacher heard"


def test_a_folder_goes_on_as_it_was_begun(shared, capsys):
    flags, folder = shared
    line = ["rollouts", *flags, "--trajectory_dir", str(folder), "--rollouts_per_shard", "2"]
    assert main([*line, "--trajectory_dtype", "bf16"]) == 2
    assert "begun with --trajectory_dtype fp32" in capsys.readouterr().err
    assert main([*line, "--seed", "7"]) == 2
    assert "--seed was 42 and is 7; go on with the same" in capsys.readouterr().err
    assert main(["rollouts", *flags]) == 2
    assert "needs --trajectory_dir" in capsys.readouterr().err


def test_a_second_launch_on_the_same_folder_is_refused(flags, folder, capsys):
    line = ["rollouts", *flags, "--trajectory_dir", str(folder)]
    with held(folder, "--trajectory_dir", rank=1, size=2):
        assert main(line) == 2
    assert f"another run is at work in {folder}: wait" in capsys.readouterr().err
    assert not [path for path in folder.iterdir() if not path.name.startswith(".lock")]


def test_the_folder_is_held_while_it_fills_and_free_afterwards(flags, folder, monkeypatch):
    plain = Rollouts.trajectory

    def looking(self, prepared, step):
        with pytest.raises(UserError, match="another run is at work"), held(folder, "--trajectory_dir"):
            pass
        return plain(self, prepared, step)

    monkeypatch.setattr(Rollouts, "trajectory", looking)
    roll_out(storing(flags, folder, "--max_train_steps", "1"))
    with held(folder, "--trajectory_dir"):
        pass


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--prompt_bank", "nothing.yaml"], "nothing.yaml"),
        (["--compile"], "--compile is for GPUs"),
    ],
    ids=["before the models load", "when they have been"],
)
def test_what_is_refused_in_a_new_folder_leaves_nothing_behind(flags, folder, tmp_path, capsys, wrong, sentence):
    before = sorted(tmp_path.rglob("*"))
    assert main(["rollouts", *flags, "--trajectory_dir", str(folder / "new"), *wrong]) == 2
    assert sentence in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (["--seed", "7"], "was rolled out otherwise: --seed"),
        (["--trajectory_dtype", "bf16"], "was begun with other flags just now"),
        ([], None),
    ],
    ids=["another recipe", "another precision", "the same"],
)
def test_two_processes_that_begin_a_folder_together_must_agree(flags, folder, monkeypatch, other, sentence):
    load = Guide.load

    def load_while_the_other_begins(*arguments):
        monkeypatch.setattr(Guide, "load", load)
        monkeypatch.setenv("RANK", "1")
        roll_out(storing(flags, folder, *other))
        return load(*arguments)

    monkeypatch.setattr(Guide, "load", load_while_the_other_begins)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    if sentence is None:
        roll_out(storing(flags, folder))
        assert len(shard_names(folder)) == 4
        return
    with pytest.raises(UserError, match=sentence):
        roll_out(storing(flags, folder))
    assert len(shard_names(folder)) == 2, "what the other made stays as it is"


def test_a_folder_that_cannot_be_is_refused(flags, capsys):
    assert main(["rollouts", *flags, "--trajectory_dir", __file__]) == 2
    assert "is a file and no folder: choose another --trajectory_dir" in capsys.readouterr().err
