import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig

from vflora.adapters import read_adapter
from vflora.errors import UserError
from vflora.models.lora_formats import from_transformer, is_dcp, read_reference_dcp, to_state_dict
from vflora.models.random_weights import randomise_lora, small_transformer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _adapted():
    transformer = small_transformer()
    targets = r".*\.(to_q|to_out\.0|add_v_proj|norm1\.linear)|.*norm_out\.linear|norm_out\.linear"
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    randomise_lora(transformer.named_parameters(), std=1.0)
    return transformer


def _save_like_the_reference(transformer, folder):
    """A whole model under the original names, adapter weights beside base weights, and the optimizer's state."""
    weights = from_transformer(transformer)
    tensors, _ = to_state_dict(weights, "original")  # alpha is folded in: 8 / 4 doubled every lora_B
    model, moments = {}, {}
    for key, tensor in tensors.items():
        module, part, _ = key.rsplit(".", 2)
        tensor = tensor / 2 if part == "lora_B" else tensor
        if module.startswith("double_blocks.1."):
            module = module.replace("double_blocks.1.", "double_blocks.1._checkpoint_wrapped_module.")
        model[f"{module}.{part}.default.weight"] = tensor
        model[f"{module}.base_layer.weight"] = torch.zeros(2, 2)
        moments[f"{module}.{part}.default.weight"] = {"exp_avg": torch.zeros_like(tensor)}
    dcp.save({"model": model, "optimizer": {"state": moments}}, checkpoint_id=folder, no_dist=True)
    return weights


@pytest.mark.parametrize("given", ["checkpoint-10", "checkpoint-10/dcp"])
def test_the_adapter_comes_out_of_a_whole_checkpoint(tmp_path, given):
    weights = _save_like_the_reference(_adapted(), tmp_path / "checkpoint-10" / "dcp")
    assert is_dcp(tmp_path / given)
    read = read_reference_dcp(tmp_path / given, alpha=8)
    assert set(read.modules) == set(weights.modules)
    for name, update in weights.modules.items():
        assert read.modules[name].scale == 2.0
        torch.testing.assert_close(read.modules[name].delta(), update.delta(), rtol=0, atol=0)


@pytest.mark.parametrize("given", ["checkpoint-10", "checkpoint-10/dcp"])
def test_adapters_are_found_in_it_by_path(tmp_path, given):
    weights = _save_like_the_reference(_adapted(), tmp_path / "checkpoint-10" / "dcp")
    assert set(read_adapter(tmp_path / given).modules) == set(weights.modules)
    assert read_adapter(tmp_path / given, alpha=8).alpha == 8


def test_alpha_is_the_reference_default_unless_given(tmp_path):
    _save_like_the_reference(_adapted(), tmp_path)
    assert read_reference_dcp(tmp_path).alpha == 16.0


def test_a_checkpoint_without_lora_is_refused(tmp_path):
    dcp.save({"model": {"proj_out.weight": torch.zeros(2)}}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(UserError, match="holds no LoRA"):
        read_reference_dcp(tmp_path)
    with pytest.raises(UserError, match="no sharded checkpoint"):
        read_reference_dcp(tmp_path / "nowhere")


def test_an_index_that_runs_code_is_refused_without_running_it(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match="cannot be read"):
        read_reference_dcp(tmp_path)
    assert not (tmp_path / "ran").exists()
