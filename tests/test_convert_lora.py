import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from vflora.convert_lora import ConvertLoraConfig, run
from vflora.errors import UserError
from vflora.models.lora_formats import LoraModule, LoraWeights, read_lora, write_lora

MODULE = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    names = [MODULE, "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v", "norm_out.linear"]

    def update():
        return LoraModule(torch.randn(4, 8, generator=generator), torch.randn(8, 4, generator=generator), 2.0)

    return LoraWeights({name: update() for name in names}, {"modelspec.title": "Mudkip"})


def test_a_file_for_one_program_becomes_a_file_for_another(weights, tmp_path):
    write_lora(weights, tmp_path / "in.safetensors", "diffusers")
    file = run(ConvertLoraConfig(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "comfyui"))
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight" in load_file(file)
    read = read_lora(file)
    assert read.metadata["modelspec.title"] == "Mudkip"
    for name, update in weights.modules.items():
        torch.testing.assert_close(read.modules[name].delta(), update.delta(), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("alpha", "scale"), [(None, 4.0), (8.0, 2.0)])
def test_a_checkpoint_of_the_reference_becomes_a_file(tmp_path, alpha, scale):
    down, up = torch.randn(4, 8), torch.randn(8, 4)
    name = "double_blocks.0.img_attn_q"
    model = {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
    dcp.save({"model": model}, checkpoint_id=tmp_path / "checkpoint-10/dcp", no_dist=True)
    run(ConvertLoraConfig(tmp_path / "checkpoint-10", tmp_path / "out", "kohya", alpha))
    update = read_lora(tmp_path / "out").modules[MODULE]
    assert update.scale == scale
    assert torch.equal(update.up, up)


def test_alpha_can_be_given_for_a_file_without_one(tmp_path, weights):
    tensors = {f"{MODULE}.lora_A.weight": torch.ones(4, 8), f"{MODULE}.lora_B.weight": torch.ones(8, 4)}
    save_file(tensors, tmp_path / "bare.safetensors")
    run(ConvertLoraConfig(tmp_path / "bare.safetensors", tmp_path / "out", "kohya", 8.0))
    assert read_lora(tmp_path / "out").modules[MODULE].scale == 2.0
    write_lora(weights, tmp_path / "own", "kohya")
    with pytest.raises(UserError, match="records its own alpha"):
        run(ConvertLoraConfig(tmp_path / "own", tmp_path / "out2", "kohya", 8.0))


def test_the_input_is_never_overwritten(weights, tmp_path):
    file = write_lora(weights, tmp_path / "in.safetensors", "diffusers")
    with pytest.raises(UserError, match="the input itself"):
        run(ConvertLoraConfig(file, file))


@pytest.mark.parametrize("output", ["there", "there/out.safetensors"])
def test_a_file_in_the_place_of_the_folder_is_refused(weights, tmp_path, output):
    write_lora(weights, tmp_path / "in.safetensors", "diffusers")
    (tmp_path / "there").write_text("in the way")
    with pytest.raises(UserError, match="is a file and no folder: choose another --output_path"):
        run(ConvertLoraConfig(tmp_path / "in.safetensors", tmp_path / output))
