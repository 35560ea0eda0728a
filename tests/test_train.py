import json
import shutil
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vflora.atomic import sha256
from vflora.cli import main, parse
from vflora.demo import world_folder
from vflora.errors import UserError
from vflora.folder_lock import held
from vflora.models.loading import load_vae
from vflora.models.projection_head import HeadSpec, new_head, save_head
from vflora.models.random_original import write_small_original
from vflora.models.random_weights import small_pipeline
from vflora.settings import require_same_recipe
from vflora.train import opened, run
from vflora.training_setup import set_up
from vflora.trajectories.provenance import require_same


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def same(losses):
    """Up to the order of sums, which the memory layout of the weights decides on CPUs."""

    def compare(folder, other):
        ours, theirs = ([float.fromhex(x) for row in losses(f).values() for x in row] for f in (folder, other))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-9)

    return compare


@pytest.mark.parametrize(("columns", "shown"), [("100", False), ("200", True)])
def test_the_parts_of_a_step_stand_behind_its_bar_where_there_is_room(train_flags, monkeypatch, capsys, columns, shown):
    monkeypatch.setenv("COLUMNS", columns)
    run(parse("train", [*train_flags, "--max_train_steps", "1"]))
    bar = capsys.readouterr().err
    assert "s/step=" in bar
    assert ("of which=" in bar) is shown


def test_first_step_has_no_distillation_loss_because_the_student_is_the_teacher(train_flags, tmp_path):
    run(parse("train", [*train_flags, "--max_train_steps", "2"]))
    first, second = metrics(tmp_path / "run")
    assert first["loss/distill"] == 0.0
    assert second["loss/distill"] > 0.0
    assert first["loss/identity"] > 0.0


def test_identity_is_logged_where_the_steps_that_judge_it_are_others_than_those_with_a_line(train_flags, tmp_path):
    flags = ["--max_train_steps", "6", "--log_every_steps", "4", "--id_every_steps", "2"]
    run(parse("train", [*train_flags, *flags]))
    lines = {line.pop("step"): line for line in metrics(tmp_path / "run")}
    judged = {"loss/identity", "lambda_id", "cosine/first_frame", "cosine/last_frame"}
    assert list(lines) == [3, 4, 5, 6]
    assert set(lines[3]) == set(lines[5]) == judged
    assert not judged & (set(lines[4]) | set(lines[6]))


def test_a_run_leaves_an_adapter_settings_and_metrics(train_flags, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = run(parse("train", train_flags))
    assert f"all 4 steps are done; `vflora export` makes a file of {folder}" in caplog.text
    assert folder.name == "checkpoint-4"
    adapter = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert any(value.abs().sum() > 0 for name, value in adapter.items() if "lora_B" in name)
    assert sum(p.stat().st_size for p in folder.rglob("*")) < 5e6, "the frozen base is never saved"
    assert "lora_r: 4" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    "extra",
    [
        ["--num_workers", "2"],
        ["--trajectory_reuse", "3", "--gradient_accumulation_steps", "2", "--use_muon", "false"]
        + ["--rollout_guidance_scale", "3", "--harvest_below", "1"],
        ["--lora_dropout", "0.2", "--batch_size", "2", "--p_secondary", "0.5"],
    ],
)
def test_killed_and_resumed_equals_uninterrupted_to_the_last_bit(
    train_flags, tmp_path, extra, losses, train_until_killed, device
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*train_flags, "--max_train_steps", "6", "--save_every_steps", "2", "--device", device, *extra]
    run(parse("train", [*flags, "--output_dir", str(whole)]))
    train_until_killed([*flags, "--output_dir", str(cut)])
    run(parse("train", [*flags, "--output_dir", str(cut), "--resume_from_checkpoint", "latest"]))
    assert losses(cut) == losses(whole)


def test_a_run_that_goes_on_with_another_pytorch_is_told(train_flags, caplog):
    folder = run(parse("train", [*train_flags, "--max_train_steps", "1"]))
    manifest, state = folder / "manifest.json", folder / "state.json"
    state.write_text(state.read_text().replace(torch.__version__, "1.0.0"))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state.json": sha256(state)}))
    run(parse("train", [*train_flags, "--max_train_steps", "2", "--resume_from_checkpoint", "latest"]))
    assert f"was written with PyTorch 1.0.0, and this is {torch.__version__}" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize(
    "extra",
    [
        # What PyTorch's compiler says of itself is not this test's business.
        pytest.param(["--compile", "true"], marks=pytest.mark.filterwarnings("default")),
        ["--mode", "low_memory", "--id_decode_tile", "32", "--id_decode_downsample_mode", "area"],
        ["--rollout_graphs", "true", "--student_graphs", "true", "--keep_student_graph", "true"],
    ],
)
def test_on_a_gpu_a_run_can_be_repeated_to_the_last_bit(train_flags, tmp_path, extra, losses):
    flags = [*train_flags, "--device", "cuda", "--dtype", "bf16", *extra]
    for name in ("first", "second"):
        run(parse("train", [*flags, "--output_dir", str(tmp_path / name)]))
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert not torch.are_deterministic_algorithms_enabled()


def test_sigterm_saves_the_step_and_exits(train_flags, tmp_path, fork):
    flags = [*train_flags, "--max_train_steps", "100000", "--save_every_steps", "100000"]
    process = fork(lambda: sys.exit(main(["train", *flags])), log=tmp_path / "stderr")
    try:
        log = tmp_path / "run" / "metrics.jsonl"
        while process.is_alive() and not (log.exists() and log.read_text().count("\n") >= 2):
            process.join(0.02)
        process.terminate()
        process.join(60)
    finally:
        process.kill()
    assert process.exitcode == 0, (tmp_path / "stderr").read_text()[-2000:]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    steps = json.loads((checkpoint / "state.json").read_text())["step"]
    assert steps == metrics(tmp_path / "run")[-1]["step"]


def test_non_finite_gradient_stops_before_the_optimizer(train_flags, tmp_path):
    training = set_up(parse("train", train_flags))
    parameters = training.denoiser.lora_parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    name, broken = next(iter(parameters.items()))
    broken.grad = torch.full_like(broken, float("nan"))
    with pytest.raises(Exception, match=rf"gradient of {name} is not finite in step 3"):
        training.optimizer.step(3)
    assert all(torch.equal(before[name], p) for name, p in parameters.items())


def test_validation_reports_student_and_teacher_and_writes_previews(train_flags, tmp_path, device):
    flags = ["--enable_validation", "--val_num_samples", "2", "--val_video_length", "5", "--val_every_steps", "4"]
    run(parse("train", [*train_flags, *flags, "--device", device]))
    row = next(r for r in metrics(tmp_path / "run") if "val/motion_ratio" in r)
    for who in ("student", "teacher"):
        assert {f"val/{who}_{k}" for k in ("cosine_mean", "cosine_std", "cosine_last_quarter", "motion")} <= set(row)
    assert row["val/teacher_deviation"] > 0
    assert len(list((tmp_path / "run" / "previews" / "step-000004").glob("*.mp4"))) == 2


def test_a_validation_that_fails_finds_its_step_saved(train_flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "previews").write_text("no room for clips")
    flags = ["--enable_validation", "--val_num_samples", "1", "--val_video_length", "5", "--val_every_steps", "1"]
    with pytest.raises(OSError, match="previews"):
        run(parse("train", [*train_flags, *flags, "--max_train_steps", "2", "--save_every_steps", "1"]))
    flags = ["--max_train_steps", "2", "--resume_from_checkpoint", "latest"]
    assert run(parse("train", [*train_flags, *flags])).name == "checkpoint-2"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--lora_r", "8"], "--lora_r was 4 and is 8"),
        (["--harvest_count", "1"], "--harvest_count was 2 and is 1"),
        (["--seed", "1"], "--seed was 42 and is 1"),
    ],
)
def test_resuming_another_recipe_is_refused(train_flags, capsys, change, sentence):
    run(parse("train", [*train_flags, "--max_train_steps", "1"]))
    code = main(["train", *train_flags, "--resume_from_checkpoint", "latest", *change])
    assert code == 2
    assert sentence in capsys.readouterr().err


def test_a_setting_that_had_no_flag_then_is_taken_as_it_was(train_flags, tmp_path):
    current = parse("train", [*train_flags, "--harvest_below", "1"]).flat()
    before = {name: value for name, value in current.items() if name != "harvest_below"}
    with pytest.raises(UserError, match="other settings: --harvest_below was 0 and is 1"):
        require_same_recipe(before, current, where=tmp_path)
    require_same_recipe(before, current | {"harvest_below": 0}, where=tmp_path)
    with pytest.raises(UserError, match="--harvest_below was 0 and is 1"):
        require_same({"seed": 1}, {"seed": 1, "harvest_below": 1}, tmp_path, verb="train")
    require_same({"seed": 1}, {"seed": 1, "harvest_below": 0}, tmp_path, verb="train")
    by_level = {"id_sigma_low": 0.15, "id_sigma_high": 0.45}
    with pytest.raises(UserError, match=r"--id_sigma_low was null and is 0\.15; --id_sigma_high was null and is 0\.45"):
        require_same_recipe({}, by_level, where=tmp_path)
    require_same_recipe({}, dict.fromkeys(by_level), where=tmp_path)


def test_a_cache_that_is_complete_spares_loading_the_text_encoder(train_flags, tmp_path, monkeypatch, losses):
    flags = [*train_flags, "--max_train_steps", "2", "--condition_cache", str(tmp_path / "cache")]
    run(parse("train", [*flags, "--output_dir", str(tmp_path / "first")]))

    def refuse(*_):
        raise AssertionError("the encoders were loaded")

    monkeypatch.setattr("vflora.models.conditions.load_encoders", refuse)
    run(parse("train", [*flags, "--output_dir", str(tmp_path / "second")]))
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def test_a_damaged_entry_of_the_cache_is_named_and_made_again(train_flags, tmp_path, caplog):
    flags = [*train_flags, "--max_train_steps", "1", "--condition_cache", str(tmp_path / "cache")]
    run(parse("train", [*flags, "--output_dir", str(tmp_path / "first")]))
    damaged = next((tmp_path / "cache").rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:20])
    run(parse("train", [*flags, "--output_dir", str(tmp_path / "second")]))
    assert f"{damaged} is damaged" in caplog.text
    first, second = (metrics(tmp_path / name)[0]["loss/total"] for name in ("first", "second"))
    assert first == second
    assert len(load_file(damaged)) == 2


def test_teacher_check_passes_while_the_student_learns(train_flags):
    run(parse("train", [*train_flags, "--teacher_check", "1", "--max_train_steps", "2"]))


def test_guidance_changes_the_states_but_the_student_still_starts_as_the_teacher(train_flags, tmp_path):
    run(parse("train", [*train_flags, "--rollout_guidance_scale", "3", "--max_train_steps", "1"]))
    assert metrics(tmp_path / "run")[0]["loss/distill"] == 0.0


def test_by_default_a_run_is_guided_as_the_pipeline_samples_and_says_so_in_its_settings(train_flags, tmp_path):
    run(parse("train", [*train_flags, "--rollout_guidance_scale", "null", "--max_train_steps", "1"]))
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["rollout_guidance_scale"] == 6.0
    again = ["--config", str(tmp_path / "run" / "config.yaml")]
    assert parse("train", again).rollout.guidance_scale == 6.0
    # What follows from it does so again, in another mode or without it.
    assert parse("train", [*again, "--mode", "fast"]).speed.rollout_stride == 2
    assert parse("train", [*again, "--rollout_guidance_scale", "1"]).speed.stride(1.0) == 1


def test_a_new_run_never_touches_the_one_that_is_there(train_flags, tmp_path, capsys):
    run(parse("train", [*train_flags, "--max_train_steps", "2", "--save_every_steps", "1"]))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert main(["train", *train_flags, "--max_train_steps", "1", "--keep_checkpoints", "1"]) == 2
    assert "already holds a run (checkpoint-2): go on with --resume_from_checkpoint latest" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_folder_with_a_run_at_work_is_refused_before_anything_loads(train_flags, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr("vflora.clips.load_vae")
    with held(tmp_path / "run", "--output_dir"):
        assert main(["train", *train_flags, "--resume_from_checkpoint", "auto"]) == 2
    assert f"another run is at work in {tmp_path / 'run'}: wait" in capsys.readouterr().err


def test_a_run_holds_its_folder_from_before_anything_loads_until_it_is_closed(train_flags, tmp_path, monkeypatch):
    """Two that start in the same minute: the second one must not load its models only to be refused."""
    refusals = []

    def refused_then_loaded(*arguments):
        files = sorted((tmp_path / "run").rglob("*"))
        with pytest.raises(UserError, match="another run is at work"), opened(parse("train", train_flags)):
            pass
        assert sorted((tmp_path / "run").rglob("*")) == files
        refusals.append(files)
        return load_vae(*arguments)

    monkeypatch.setattr("vflora.clips.load_vae", refused_then_loaded)
    work = pytest.raises(UserError, match="another run is at work")
    with opened(parse("train", train_flags)), work, held(tmp_path / "run", "--output_dir"):
        pass
    assert len(refusals) == 1
    with held(tmp_path / "run", "--output_dir"):
        pass


def test_a_run_that_is_refused_leaves_no_folder_behind(train_flags, tmp_path):
    with pytest.raises(UserError, match="There is no model at"):
        run(parse("train", [*train_flags, "--pipeline_dir", str(tmp_path / "nothing")]))
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_back_leaves_later_checkpoints_aside_and_keeps_its_own(train_flags, tmp_path, losses):
    flags = [*train_flags, "--save_every_steps", "1"]
    run(parse("train", flags))
    went = losses(tmp_path / "run")
    back = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-1"), "--keep_checkpoints", "2"]
    saved = run(parse("train", [*flags, *back, "--max_train_steps", "3", "--learning_rate", "1e-2"]))
    assert saved.name == "checkpoint-3"
    names = {path.name for path in (tmp_path / "run").glob("*checkpoint-*")}
    assert names == {
        "checkpoint-2",
        "checkpoint-3",
        "left-1-checkpoint-2",
        "left-1-checkpoint-3",
        "left-1-checkpoint-4",
    }
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    assert losses(tmp_path / "run")[2] == went[2]


def test_who_reads_settings_or_curves_while_a_run_is_resumed_reads_them_whole(train_flags, tmp_path):
    run(parse("train", [*train_flags, "--max_train_steps", "2"]))
    settings, curves = ((tmp_path / "run" / name) for name in ("config.yaml", "metrics.jsonl"))
    whole = settings.read_text(), curves.read_text()
    with settings.open() as old_settings, curves.open() as old_curves:
        run(parse("train", [*train_flags, "--max_train_steps", "3", "--resume_from_checkpoint", "latest"]))
        assert (old_settings.read(), old_curves.read()) == whole
    assert yaml.safe_load(settings.read_text())["max_train_steps"] == 3
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("what", ["bank", "head", "model"])
def test_resuming_with_other_prompts_head_or_weights_is_refused(train_flags, small_models, tmp_path, capsys, what):
    shutil.copytree(small_models, tmp_path / "models")
    bank, head = tmp_path / "bank.yaml", tmp_path / "models" / "head.safetensors"
    bank.write_text("template: '{character} runs'\n")
    flags = [*train_flags, "--prompt_bank", str(bank), "--dino_head_path", str(head)]
    flags += ["--pipeline_dir", str(tmp_path / "models" / "pipeline")]
    run(parse("train", [*flags, "--max_train_steps", "1"]))
    if what == "bank":
        bank.write_text("template: '{character} sleeps'\n")
    elif what == "head":
        tensors = load_file(head)
        save_head(new_head(HeadSpec(16, (8,)), torch.Generator().manual_seed(1)), head)
        assert load_file(head).keys() == tensors.keys()
    else:
        small_pipeline(seed=1).save_pretrained(tmp_path / "models" / "pipeline")
    assert main(["train", *flags, "--resume_from_checkpoint", "latest"]) == 2
    named = {"bank": "the content of --prompt_bank", "head": "the identity head", "model": "the model in"}[what]
    message = capsys.readouterr().err
    assert named in message
    assert "Resume with the same" in message


def test_the_learning_rate_in_the_log_is_that_of_the_step(train_flags, tmp_path):
    run(parse("train", [*train_flags, "--warmup_steps", "2", "--max_train_steps", "3"]))
    assert [row["learning_rate"] for row in metrics(tmp_path / "run")] == pytest.approx([0.0, 0.005, 0.01])


def test_a_prompt_builder_that_draws_at_random_draws_the_same_when_resumed(train_flags, tmp_path, losses):
    builder = tmp_path / "builder.py"
    builder.write_text(
        "import random\nimport numpy as np\n"
        "def build_prompt(character):\n"
        "    return f'{character} {random.random()} {np.random.rand()}'\n"
    )
    flags = [*train_flags, "--prompt_builder", str(builder), "--save_every_steps", "2"]
    run(parse("train", [*flags, "--output_dir", str(tmp_path / "whole")]))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    run(parse("train", [*flags, "--output_dir", str(tmp_path / "cut"), "--resume_from_checkpoint", "latest"]))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_run_can_start_from_a_lora(train_flags, tmp_path):
    folder = run(parse("train", [*train_flags, "--max_train_steps", "2", "--output_dir", str(tmp_path / "first")]))
    flags = [*train_flags, "--max_train_steps", "1", "--pretrained_lora_path", str(folder / "lora")]
    run(parse("train", flags))
    assert metrics(tmp_path / "run")[0]["loss/distill"] > 0.0


def test_a_run_starts_from_the_weights_as_first_published(train_flags, small_models, tmp_path, losses):
    write_small_original(tmp_path / "original")
    flags = [*train_flags, "--max_train_steps", "2", "--pipeline_dir"]
    run(parse("train", [*flags, str(tmp_path / "original"), "--output_dir", str(tmp_path / "first")]))
    run(parse("train", [*flags, str(small_models / "pipeline"), "--output_dir", str(tmp_path / "second")]))
    assert list(losses(tmp_path / "first")) == [1, 2]
    assert losses(tmp_path / "first")[1][0] == float(0).hex()


@pytest.mark.parametrize(
    "switch",
    [
        ["--enable_gradient_checkpointing", "false"],
        ["--block_offload"],
        ["--id_decode_recompute", "false"],
    ],
)
def test_switches_for_time_and_memory_change_no_loss_and_may_change_on_resume(train_flags, tmp_path, switch, same):
    plain, other = tmp_path / "plain", tmp_path / "other"
    # Far from the teacher and without Muon's bf16 iteration: what differs then is not all rounding.
    far = [*train_flags, "--learning_rate", "3e-2", "--use_muon", "false"]
    run(parse("train", [*far, "--output_dir", str(plain)]))
    flags = [*far, "--output_dir", str(other)]
    run(parse("train", [*flags, "--max_train_steps", "4", "--save_every_steps", "2", *switch]))
    same(other, plain)
    shutil.rmtree(other / "checkpoint-4")
    run(parse("train", [*flags, "--resume_from_checkpoint", "latest"]))
    same(other, plain)


def test_a_quick_teacher_changes_the_states_not_the_first_distillation_loss(train_flags, tmp_path, losses):
    flags = [*train_flags, "--gradient_accumulation_steps", "2", "--max_train_steps", "1"]
    run(parse("train", [*flags, "--output_dir", str(tmp_path / "plain")]))
    run(parse("train", [*flags, "--rollout_stride", "2", "--output_dir", str(tmp_path / "quick")]))
    plain, quick = losses(tmp_path / "plain")[1], losses(tmp_path / "quick")[1]
    assert plain[0] == quick[0] == float(0).hex()
    assert plain[1] != quick[1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--train_video_length", "16"], "use 13 or 17"),
        (["--enable_validation", "--val_video_length", "60"], "use 57 or 61"),
        (["--train_target_resolution", "60x64"], "does not divide by 16: use 64x64"),
        (["--pipeline_dir", "/nowhere/at/all"], "hf download"),
        (["--dino_model_dir", "/nowhere/at/all"], "hf download"),
        (["--wds_root", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--use_lora", "false"], "trains a LoRA only"),
        (["--resume_from_checkpoint", "latest"], "holds no checkpoint"),
        (["--lora_target_modules", "nonsense"], "matches no layer"),
        (["--batch_size", "many"], "batch_size"),
        (["--no_such_flag", "1"], "no_such_flag"),
        (["--warmup_steps", "-1"], "--warmup_steps must not be negative"),
        (["--weight_decay", "-1"], "--weight_decay must not be negative"),
        (["--lambda_id_warmup_steps", "-1"], "--lambda_id_warmup_steps must not be negative"),
        (["--logger", "wandb"], "pip install 'vflora[wandb]'"),
        (["--output_dir", __file__], "is a file and no folder: choose another --output_dir"),
        (["--pipeline_dir", "nobody/nothing"], "nobody/nothing is no folder here"),
        (["--pipeline_dir", "docs/nothing"], "There is no model at docs/nothing: correct the name, or get"),
        (["--id_sigma_low", "null"], "belong together: set both to null or neither"),
        (["--device", "cuda:99"], "--device cuda:99 is not on this machine"),
    ],
)
def test_bad_settings_get_a_sentence_and_code_2(train_flags, tmp_path, capsys, change, sentence):
    assert main(["train", *train_flags, *change]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_a_validation_without_pictures_is_refused_before_any_model_is_loaded(train_flags, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    data = shutil.copytree(train_flags[train_flags.index("--wds_root") + 1], tmp_path / "data")
    for shard in (data / "data" / "val").glob("*.tar"):
        shard.unlink()
    assert main(["train", *train_flags, "--wds_root", str(data), "--enable_validation"]) == 2
    assert "no pictures for validation: pack it with a larger --val_split" in capsys.readouterr().err
    assert "loading" not in caplog.text


def test_a_size_that_is_no_whole_number_of_patches_is_refused(train_flags, capsys):
    """The world's transformer takes latents in patches of two by two; the full model's takes them one by one."""
    flags = ["--pipeline_dir", str(world_folder()), "--train_target_resolution", "60x64"]
    assert main(["train", *train_flags, *flags]) == 2
    assert "--train_target_resolution 60x64 does not divide by 8: use 64x64" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "image_encoder"])
@pytest.mark.parametrize("damage", ["gone", "cut short", "without weights"])
def test_a_download_that_was_not_finished_is_told(train_flags, small_models, tmp_path, capsys, part, damage):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(small_models / "pipeline", pipeline)
    weights = next((pipeline / part).glob("*.safetensors"))
    if damage == "gone":
        shutil.rmtree(pipeline / part)
    elif damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
    assert main(["train", *train_flags, "--pipeline_dir", str(pipeline)]) == 2
    message = capsys.readouterr().err
    assert str(pipeline / part) in message
    assert "download" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["transformer", "vae", "DINOv3"])
def test_a_model_that_is_missing_is_told_before_any_is_loaded(
    train_flags, small_models, tmp_path, capsys, caplog, part
):
    caplog.set_level("INFO")
    pipeline = shutil.copytree(small_models / "pipeline", tmp_path / "pipeline")
    flags = ["--pipeline_dir", str(pipeline)]
    if part == "DINOv3":
        flags += ["--dino_model_dir", str(tmp_path / "nowhere")]
    else:
        shutil.rmtree(pipeline / part)
    assert main(["train", *train_flags, *flags]) == 2
    assert part in capsys.readouterr().err
    assert "loading" not in caplog.text


@pytest.mark.parametrize(
    "part", ["transformer", "image_encoder", "scheduler", "tokenizer", "feature_extractor", "guider"]
)
def test_a_configuration_that_is_gone_or_cut_short_is_told(train_flags, small_models, tmp_path, capsys, part):
    train_flags = [*train_flags, "--rollout_guidance_scale", "null"]
    pipeline = tmp_path / "pipeline"
    shutil.copytree(small_models / "pipeline", pipeline)
    config = next((pipeline / part).glob("*config.json"))
    config.write_text('{"half": ')
    assert main(["train", *train_flags, "--pipeline_dir", str(pipeline)]) == 2
    assert f"{config} is damaged" in capsys.readouterr().err
    config.unlink()
    assert main(["train", *train_flags, "--pipeline_dir", str(pipeline)]) == 2
    assert f"{config} is missing: go on with `hf download" in capsys.readouterr().err
