import gc
import json
import os
import runpy
import signal
import socket
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.parallel import DistributedDataParallel

from vflora.cli import main, parse
from vflora.errors import NonFiniteError, UserError
from vflora.folder_lock import held
from vflora.head.config import HeadConfig
from vflora.models.identity import FrozenBackbone, IdentityEmbedder
from vflora.models.projection_head import load_head
from vflora.models.random_weights import small_dinov3_convnext, small_vae
from vflora.settings import flat_settings
from vflora.train_head import run

ROOT = Path(__file__).parents[2]


def _rows(folder, part=""):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if any(name.startswith(part) for name in row)]


def _losses(folder):
    return {row["step"]: row["loss"].hex() for row in _rows(folder, "loss")}


def _weights(path):
    return torch.cat([p.flatten() for p in load_head(path).parameters()])


def _written(config):
    """The settings as a file."""
    settings = config.output_dir.with_suffix(".yaml")
    settings.write_text(yaml.safe_dump(flat_settings(config)))
    return settings


def _run_script(settings):
    """The script that is started by its path, in a process of its own."""
    sys.argv = ["train_projection_head.py", "--config", str(settings)]
    runpy.run_path(str(ROOT / "identity_loss" / "train_projection_head.py"), run_name="__main__")


def _run_checked(rank, port, settings):
    """One of two processes as torchrun starts them; ends with an error where leaving the group could wait forever."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    destroy = torch.distributed.destroy_process_group

    def checked(*arguments):
        # The wrapper around the head would still hold the process group.
        assert not any(type(thing) is DistributedDataParallel for thing in gc.get_objects())
        destroy(*arguments)

    torch.distributed.destroy_process_group = checked
    sys.exit(main(["train-head", "--config", str(settings)]))


def _wait_for_step(process, folder, step):
    deadline = time.monotonic() + 200
    while not (folder / "metrics.jsonl").is_file() or not any(r["step"] >= step for r in _rows(folder)):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_head_learns_to_tell_identities_apart(config):
    folder = run(replace(config, total_steps=60, val_every=60, learning_rate=1e-2, dropout=0.0))
    losses = [row["loss"] for row in _rows(folder, "loss")]
    before, after = _rows(folder, "backbone")[0], _rows(folder, "val/")[-1]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:3]) / 3 * 10
    gap_before = before["backbone/clean/same_mean"] - before["backbone/clean/different_mean"]
    assert after["val/clean/same_mean"] - after["val/clean/different_mean"] > 10 * gap_before


def test_a_run_leaves_heads_metrics_pictures_and_settings(config, model_dir, caplog):
    caplog.set_level("INFO")
    folder = run(replace(config, logger="tensorboard", save_every=5))
    assert f"All 10 steps are done; the head is {folder / 'identity_head.safetensors'}." in caplog.text
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("identity_head.safetensors", "identity_head_last.safetensors", "metrics.jsonl", "config.yaml"),
        *("checkpoint-5", "checkpoint-10", "validation", "tensorboard", ".lock-0-of-1"),
    }
    assert {p.name for p in (folder / "validation").iterdir()} == {
        *("backbone.png", "step-000005.png", "step-000010.png")
    }
    embedder = IdentityEmbedder.load(model_dir, folder)
    assert embedder.head.spec.dims == (16, 8)
    assert embedder.head.spec.backbone == "dinov3_vit dino"
    assert [row["step"] for row in _rows(folder, "loss")] == list(range(1, 11))
    best = max(_rows(folder, "val/"), key=lambda row: row["val/map_at_r"])
    assert torch.equal(_weights(folder / "identity_head_last.safetensors"), _weights(folder / "checkpoint-10"))
    if best["step"] == 10:
        assert torch.equal(_weights(folder), _weights(folder / "checkpoint-10"))


@pytest.mark.parametrize(
    ("cut", "accumulate"),
    [(signal.SIGKILL, 1), (signal.SIGTERM, 2), pytest.param(signal.SIGKILL, 2, marks=pytest.mark.gpu)],
)
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(config, tmp_path, fork, cut, accumulate):
    """With two data workers before the cut, and none after it and in the run that is never cut."""
    config = replace(config, total_steps=18, val_every=9, grad_accum=accumulate, augment_flip=0.5)
    whole = run(replace(config, output_dir=tmp_path / "whole"))
    process = fork(_run_script, _written(replace(config, num_workers=2)))
    _wait_for_step(process, config.output_dir, 9)
    os.kill(process.pid, cut)
    process.join(200)
    assert process.exitcode == (-signal.SIGKILL if cut == signal.SIGKILL else 0)
    reached = max(int(p.name.rsplit("-")[1]) for p in config.output_dir.glob("checkpoint-*"))
    assert 8 <= reached < 18
    resumed = run(replace(config, resume_from_checkpoint="latest"))
    assert _losses(resumed) == _losses(whole)
    assert len(_losses(whole)) == 18
    for name in ("identity_head.safetensors", "identity_head_last.safetensors"):
        assert torch.equal(_weights(resumed / name), _weights(whole / name))
    without_time = [{k: v for k, v in row.items() if "seconds" not in k} for row in _rows(resumed)]
    assert without_time == [{k: v for k, v in row.items() if "seconds" not in k} for row in _rows(whole)]


@pytest.fixture
def run_as_two(fork, tmp_path):
    """Runs the command in two processes, and returns the exit code of each and what it said."""

    def start(config):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        logs = [tmp_path / "0.log", tmp_path / "1.log"]
        settings = _written(replace(config, device="cpu"))
        processes = [fork(_run_checked, rank, port, settings, log=log) for rank, log in enumerate(logs)]
        try:
            for process in processes:
                process.join(200)
            return [(process.exitcode, log.read_text()) for process, log in zip(processes, logs, strict=True)]
        finally:
            for process in processes:
                process.kill()

    return start


def test_two_processes_learn_what_one_learns_on_both_their_batches(config, tmp_path, run_as_two):
    one = run(replace(config, output_dir=tmp_path / "one", pk_identities=4))
    for code, said in run_as_two(replace(config, output_dir=tmp_path / "two", pk_identities=2)):
        assert code == 0, said[-2000:]
    alone, together = ([row["loss"] for row in _rows(folder, "loss")] for folder in (one, tmp_path / "two"))
    assert together == pytest.approx(alone, rel=1e-4)
    head = "identity_head_last.safetensors"
    assert torch.allclose(_weights(one / head), _weights(tmp_path / "two" / head), atol=1e-5)


def test_with_a_vae_pictures_take_the_round_trip(config, tmp_path):
    small_vae().save_pretrained(tmp_path / "pipeline" / "vae")
    trip = replace(config, total_steps=2, augment_vae=1.0, augment_vae_side=32, val_every=0)
    plain = _losses(run(trip))
    through = _losses(run(replace(trip, pipeline_dir=tmp_path / "pipeline", output_dir=tmp_path / "through")))
    assert plain[1] != through[1]


def test_a_convnext_backbone_serves_as_well(config, tmp_path):
    small_dinov3_convnext().save_pretrained(tmp_path / "convnext")
    convnext = replace(config, model_dir=tmp_path / "convnext", total_steps=2, val_every=0, model_dtype="bf16")
    folder = run(convnext)
    assert load_head(folder).spec.backbone == "dinov3_convnext convnext"
    assert torch.equal(_weights(folder), _weights(folder / "checkpoint-2"))


def test_a_second_run_in_the_folder_is_refused_while_the_first_goes_on(config, monkeypatch):
    refused = []

    def load(*arguments):
        with pytest.raises(UserError, match=r"another run is at work in .*out: wait .* another --output_dir\."):
            run(replace(config, resume_from_checkpoint="auto"))
        refused.append(True)
        return load_backbone(*arguments)

    load_backbone = FrozenBackbone.load
    monkeypatch.setattr(FrozenBackbone, "load", load)
    run(replace(config, total_steps=2, val_every=0))
    assert refused == [True], "the second is refused before it loads anything"
    assert [row["step"] for row in _rows(config.output_dir, "loss")] == [1, 2]


def test_two_processes_both_refuse_a_folder_that_is_taken_and_it_is_said(config, run_as_two):
    with held(config.output_dir, "--output_dir"):
        codes, said = zip(*run_as_two(config), strict=True)
    assert codes == (2, 2), said
    # by one of them, or by both where the first is gone before the second speaks
    assert "another run is at work" in "".join(said)
    assert [path.name for path in config.output_dir.iterdir()] == [".lock-0-of-1"]


def test_a_finished_run_resumes_to_nothing(config):
    folder = run(replace(config, total_steps=4))
    before = (folder / "metrics.jsonl").read_text()
    assert run(replace(config, total_steps=4, resume_from_checkpoint="latest")) == folder
    assert (folder / "metrics.jsonl").read_text() == before


def test_who_reads_the_settings_while_a_run_is_resumed_reads_them_whole(config):
    settings = run(replace(config, total_steps=2, val_every=0)) / "config.yaml"
    whole = settings.read_text()
    with settings.open() as old:
        run(replace(config, total_steps=2, val_every=0, log_every=7, resume_from_checkpoint="latest"))
        assert old.read() == whole
    assert yaml.safe_load(settings.read_text())["log_every"] == 7


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(config):
    with pytest.raises(NonFiniteError, match="in step 2;"):
        run(replace(config, learning_rate=1e37, no_layernorm=True, val_every=0))
    assert not list(config.output_dir.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"pk_identities": 7}, r"--pk_identities 7.*6 identities.*use 2 to 6"),
        ({"pk_instances": 7}, "only 0 identities have 7 or more pictures.*lower --pk_instances"),
        ({"id_key": "number"}, "no column 'number'.*--id_key"),
        ({"train_shards": "x-*.tar"}, "no shards"),
        ({"model_dir": Path("nowhere")}, "hf download"),
        ({"vae_dir": Path("nowhere")}, "no VAE.*hf download"),
        ({"resume_from_checkpoint": "latest"}, "holds no checkpoint"),
        ({"device": "cuda:99"}, "--device cuda:99 is not on this machine"),
    ],
)
def test_bad_input_gets_a_sentence_and_leaves_nothing_behind(options, changed, sentence):
    with pytest.raises(UserError, match=sentence):
        run(HeadConfig(**options | changed))
    assert not options["output_dir"].exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"pk_identities": 1},
        {"pk_instances": 1},
        {"grad_accum": 0},
        {"learning_rate": 0},
        {"temperature": 0},
        {"warmup_ratio": 2},
        {"val_every": -1},
    ],
)
def test_settings_out_of_range_name_their_flag(options, changed):
    with pytest.raises(UserError, match=f"--{next(iter(changed))}"):
        HeadConfig(**options | changed)


def test_the_command_of_the_description_is_understood():
    words = [
        *("--model-dir", "/m", "--wds-root", "/w", "--output-dir", "/o", "--id-key", "identity_id"),
        *("--train-shards", "train-*.tar", "--val-shards", "val-*.tar", "--proj-dims", "512", "256"),
        *("--pk-identities", "32", "--pk-instances", "2", "--total-steps", "4000", "--val-every", "250"),
        *("--save-every", "250", "--model-dtype", "bf16", "--no-layernorm"),
    ]
    config = parse("train-head", words)
    assert (config.proj_dims, config.pk_identities, config.pk_instances) == ([512, 256], 32, 2)
    assert (config.total_steps, config.val_every, config.save_every) == (4000, 250, 250)
    assert not config.layernorm


def test_defaults_are_the_reference_s():
    expected = {
        "train_manifest": "manifest/train_manifest.csv",
        "val_manifest": "manifest/val_manifest.csv",
        "train_shards": "train-*.tar",
        "val_shards": "val-*.tar",
        "shuffle_buffer": 4096,
        "pk_identities": 16,
        "pk_instances": 4,
        "max_per_identity": 16,
        "total_steps": 10000,
        "grad_accum": 1,
        "learning_rate": 0.0005,
        "weight_decay": 0.01,
        "warmup_ratio": 0.05,
        "temperature": 0.1,
        "dropout": 0.1,
        "activation": "gelu",
        "use_layernorm": True,
        "no_layernorm": False,
        "proj_dims": [512, 256],
        "val_batches": 4,
        "val_every": 1000,
        "log_every": 25,
        "save_every": 500,
        "seed": 1337,
        "model_dtype": "bf16",
        "crop_ratio": 0.9,
        "crop_jitter": 0.06,
        "val_crop": False,
    }
    required = ["--model_dir=m", "--wds_root=w", "--output_dir=o", "--id_key=identity_id"]
    config = parse("train-head", required)
    found = {f.name: getattr(config, f.name) for f in fields(config) if f.name in expected}
    assert {k: v if not hasattr(v, "as_posix") else v.as_posix() for k, v in found.items()} == expected
