"""Every process reads its own part of the base, and only that: the weights of the files, bit for bit."""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from vflora.cli import parse
from vflora.models.loading import load_transformer
from vflora.models.random_original import write_small_original
from vflora.student import build_student
from vflora.train import run

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def folder(small_models, tmp_path):
    """A copy of the pipeline that a test may spoil."""
    return Path(shutil.copytree(small_models / "pipeline", tmp_path / "pipeline"))


def in_several_files(folder, transformer):
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="50KB")


def maps():
    """The files that are mapped into this process's memory, on systems that say so."""
    file = Path("/proc/self/maps")
    return file.read_text().splitlines() if file.exists() else []


def held(settings, dtype, world):
    """What a process has after loading; whole values by the name that the files have for them."""
    denoiser, _ = build_student(settings, dtype, CPU, world)
    parameters = dict(denoiser.transformer.named_parameters())
    parts = {name.replace(".base_layer", ""): p for name, p in parameters.items() if not p.requires_grad}
    assert all(isinstance(p, DTensor) for p in parts.values())
    return {
        "bytes": sum(p.to_local().untyped_storage().nbytes() for p in parts.values()),
        "base": {name: p.full_tensor() for name, p in parts.items()},
        "lora": {name: p.detach() for name, p in parameters.items() if p.requires_grad},
        "mapped": [line for line in maps() if line.endswith(".safetensors")],
    }


@pytest.mark.parametrize(
    ("layout", "dtype", "processes"),
    [("one file", "bf16", 2), ("several files", "fp32", 2), ("original", "bf16", 2), ("several files", "bf16", 4)],
)
def test_the_parts_are_those_of_the_files_bit_for_bit(
    in_processes, train_flags, small_models, folder, tmp_path, layout, dtype, processes
):
    if layout == "original":
        folder = tmp_path / "original"
        write_small_original(folder)
    elif layout == "several files":
        in_several_files(folder, load_transformer(str(folder), "480p_i2v", torch.float32, "cpu"))
    settings = parse("train", [*train_flags, "--pipeline_dir", str(folder), "--dtype", dtype])
    wanted = load_transformer(str(folder), "480p_i2v", DTYPES[dtype], "cpu").state_dict()
    alone, _ = build_student(settings, DTYPES[dtype], CPU)
    for answer in in_processes(processes, partial(held, settings, DTYPES[dtype])):
        assert answer["base"].keys() == wanted.keys()
        for name, value in wanted.items():
            assert answer["base"][name].dtype == value.dtype, name
            assert torch.equal(answer["base"][name], value), name
        lora = alone.lora_parameters()
        assert answer["lora"].keys() == lora.keys()
        assert all(torch.equal(answer["lora"][name], p) for name, p in lora.items())
        whole = sum(value.nbytes for value in wanted.values())
        assert answer["bytes"] < 1.1 * whole / processes, "nothing of the others' parts is kept"
        assert not answer["mapped"], "no part is a view of a file that may change"


@pytest.mark.parametrize("damage", ["missing", "another shape"])
@pytest.mark.parametrize("whose", ["the files of all", "those of one machine"])
def test_files_that_do_not_fit_are_refused_by_all_with_one_sentence(
    launch_to_fail, train_flags, small_models, folder, damage, whose
):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    value = tensors.pop("proj_out.weight")
    if damage == "another shape":
        tensors["proj_out.weight"] = value[:-1].contiguous()
    save_file(tensors, file)
    sentence = {
        "missing": f"UserError: the weights in {file.parent} do not fit: missing proj_out.weight; download",
        "another shape": f"UserError: proj_out.weight in {file} is [3, 32] but the model needs [4, 32]: check",
    }[damage]
    spoilt, good = (
        parse("train", [*train_flags, "--pipeline_dir", str(place)]) for place in (folder, small_models / "pipeline")
    )

    def work():
        return run(good if whose == "those of one machine" and os.environ["RANK"] == "0" else spoilt)

    errors = launch_to_fail(2, work)
    assert len(errors) == 2
    assert all(error.startswith(sentence) for error in errors.values()), errors
