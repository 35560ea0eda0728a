"""The real arms on the world that ships, with as little of everything as shows that the parts fit."""

import json
import os
import signal
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml

import vflora.train
from vflora.cli import parse
from vflora.errors import UserError
from vflora.world.ablation import ablate, arm
from vflora.world.ablation.arms import ARMS
from vflora.world.ablation.lab import LabConfig, prepare
from vflora.world.retrieval import make_lineup

TINY = ["--steps", "1", "--batch_size", "2", "--characters", "4", "--pictures", "8"]
TINY += ["--exam_clips", "2", "--sampling_steps", "2", "--device", "cpu"]


@pytest.mark.slow
def test_arms_are_trained_graded_and_put_side_by_side(tmp_path, monkeypatch):
    # One picture of everybody in the line-up, not eight; the arms find it on disk.
    monkeypatch.setattr("vflora.world.ablation.lab.make_lineup", partial(make_lineup, pictures=1))
    (tmp_path / "quick.yaml").write_text("train_video_length: 9\nnum_inference_steps: 8\n")
    flags = ["--output", str(tmp_path / "lab"), *TINY, "--recipe", str(tmp_path / "quick.yaml")]
    flags += ["--seeds", "1", "--jobs", "2", "--arms"]
    written = ablate.run(parse("world ablate", [*flags, "base", "recipe", "hinge"]))
    text = written.read_text()
    assert "| base model |" in text
    assert "| the recipe |" in text
    assert "retrieval, own domain" in text
    for name in ("plot.png", "grid.png", "results.json"):
        assert (written.parent / name).stat().st_size > 500
    result = json.loads((written.parent / "arms" / "recipe-0" / "result.json").read_text())
    assert result["numbers"]["base_domain_loss"] > 0
    assert 0 < result["share/rollout"] < 1
    assert len(result["cosine_by_frame"]) == 17
    by_sigma = result["base_domain_loss_by_sigma"]
    assert len(by_sigma) == 8
    assert sum(by_sigma) / 8 == pytest.approx(result["numbers"]["base_domain_loss"], rel=1e-5)
    # Encoded once, before either arm began.
    encoded = written.parent / "shared"
    assert "all 3 prompts and 2 pictures" in (encoded / "encoding-0.log").read_text()
    assert len(list((encoded / "conditions").rglob("*.safetensors"))) == 5

    # What is finished is not done again; other settings do not mix with it.
    before = (written.parent / "arms" / "recipe-0" / "result.json").stat().st_mtime_ns
    ablate.run(parse("world ablate", [*flags, "base", "recipe"]))
    assert (written.parent / "arms" / "recipe-0" / "result.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--steps was 1.*another --output"):
        ablate.run(parse("world ablate", [*flags, "base", "--steps", "2"]))
    begun = yaml.safe_load((written.parent / "lab.yaml").read_text())
    assert begun.pop("lambda_id") == 0.6
    (written.parent / "lab.yaml").write_text(yaml.safe_dump(begun))
    with pytest.raises(UserError, match="another version of vflora: use another --output"):
        ablate.run(parse("world ablate", [*flags, "base"]))


def test_every_recipe_arm_is_a_command_line_that_training_accepts(tmp_path):
    lab = LabConfig(output=tmp_path)
    plain = parse("train", arm.train_flags(lab, ARMS["recipe"], tmp_path, 0)).flat()
    for name, chosen in ARMS.items():
        if chosen.kind == "recipe":
            settings = parse("train", arm.train_flags(lab, chosen, tmp_path, 0)).flat()
            differing = {key for key in settings if settings[key] != plain[key]}
            assert bool(differing) == (name != "recipe")
            asked = {flag[2:] for flag in chosen.flags if flag.startswith("--")} | {"wds_root"}
            assert differing <= asked | ({"dino_model_dir", "dino_head_path"} if chosen.place_bound else set())


def test_a_file_of_flags_changes_the_recipe_of_every_arm(tmp_path):
    (tmp_path / "tuned.yaml").write_text("lambda_id: 1.25\np_secondary: 0.3\n")
    lab = LabConfig(output=tmp_path, recipe=tmp_path / "tuned.yaml")
    settings = parse("train", arm.train_flags(lab, ARMS["hinge"], tmp_path, 0))
    assert settings.identity.lambda_id == 1.25
    assert settings.data.p_secondary == 0.3
    assert settings.identity.id_margin == 0.1


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [({"characters": 3}, "use 4 to 384"), ({"pictures": 1}, "use 2 or more"), ({"steps": 0}, "at least 1")],
)
def test_a_lab_that_cannot_work_is_refused(changed, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(LabConfig(), **changed)


def test_a_world_without_a_head_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(UserError, match="no identity head in .*vflora world pretrain --stage head"):
        prepare(LabConfig(output=tmp_path / "lab", world=tmp_path))
    assert not (tmp_path / "lab").exists()


def test_only_what_several_arms_share_is_encoded_before_them():
    jobs = [("base", 0), ("oracle", 0), ("recipe", 0), ("hinge", 0), ("shuffled", 0), ("recipe", 1), ("shuffled", 1)]
    assert ablate._shared_encodings(jobs) == [(False, 0)]


def test_where_encoding_fails_its_arms_fail_with_the_log_that_says_why(tmp_path):
    (tmp_path / "typo.yaml").write_text("lambda_idd: 1\n")
    lab = LabConfig(output=tmp_path, recipe=tmp_path / "typo.yaml", device="cpu")
    jobs = [("recipe", 0), ("hinge", 0)]
    (tmp_path / "shared").mkdir()
    assert sorted(ablate._run_jobs(lab, jobs, 2)) == sorted(jobs)
    named = tmp_path / "shared" / "encoding-0.log"
    assert (tmp_path / "arms" / "hinge-0" / "log.txt").read_text().endswith(f"read {named}\n")
    assert "lambda_id" in named.read_text()


def test_after_a_ctrl_c_no_other_arm_begins(tmp_path, monkeypatch):
    begun = []

    def job(lab, job, encoding, own):
        begun.append(job[0])
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # an arm takes a moment to save and go
        return 130

    monkeypatch.setattr(ablate, "_run_job", job)
    with pytest.raises(KeyboardInterrupt):
        ablate._run_jobs(LabConfig(output=tmp_path), [("base", 0), ("recipe", 0), ("oracle", 0)], 1)
    assert begun == ["base"]


def test_an_arm_that_was_told_to_stop_is_not_graded(tmp_path, monkeypatch):
    monkeypatch.setattr("vflora.world.ablation.lab._line_up", lambda *_: None)  # nobody gets as far as the exam
    learn = vflora.train.learn

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return learn(*arguments)

    monkeypatch.setattr(vflora.train, "learn", stopped)
    (tmp_path / "quick.yaml").write_text("train_video_length: 5\nnum_inference_steps: 4\n")
    flags = ["--arm", "recipe", "--output", str(tmp_path / "lab"), *TINY, "--recipe", str(tmp_path / "quick.yaml")]
    with pytest.raises(KeyboardInterrupt):
        arm.run(parse("world arm", [*flags, "--steps", "2"]))
    folder = tmp_path / "lab" / "arms" / "recipe-0"
    assert (folder / "lora" / "checkpoint-1").is_dir()
    assert not (folder / "result.json").exists()


def test_several_gpus_are_taken_in_turn_and_those_that_are_hidden_stay_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    any_gpu, named = torch.device("cuda"), torch.device("cuda:1")
    assert [ablate.environment(n, 1, any_gpu)["CUDA_VISIBLE_DEVICES"] for n in range(3)] == ["0", "1", "0"]
    assert "CUDA_VISIBLE_DEVICES" not in ablate.environment(0, 1, named)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [ablate.environment(n, 1, any_gpu)["CUDA_VISIBLE_DEVICES"] for n in range(3)] == ["5", "7", "5"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES" not in ablate.environment(0, 1, any_gpu)


def test_an_unknown_arm_is_refused_with_the_names_of_all():
    with pytest.raises(UserError, match=r"no arm 'magic': use base, frozen, oracle"):
        parse("world ablate", ["--arms", "magic"])
