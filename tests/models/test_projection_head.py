import argparse
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vflora.errors import UserError
from vflora.models.foreign_heads import read_torch_file
from vflora.models.projection_head import HeadSpec, ProjectionHead, load_head, new_head, save_head
from vflora.random_streams import keyed_generator


def test_saved_head_comes_back_with_its_spec_and_the_same_numbers(tmp_path):
    spec = HeadSpec(in_width=6, dims=(8, 4), activation="relu", layernorm=False, dropout=0.2, backbone="dinov3_vit x")
    head = new_head(spec, keyed_generator(0)).eval()
    save_head(head, tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors")
    features = torch.randn(3, 6, generator=keyed_generator(1))
    assert again.spec == spec
    assert not again.training
    assert torch.equal(again(features), head(features))


def test_a_saved_head_may_be_read_by_others(tmp_path):
    save_head(new_head(HeadSpec(4, (2,)), keyed_generator(0)), tmp_path / "head.safetensors")
    assert (tmp_path / "head.safetensors").stat().st_mode & 0o044 == 0o044


def test_embeddings_have_length_one():
    head = new_head(HeadSpec(in_width=6, dims=(8, 4)), keyed_generator(0)).eval()
    norms = head(torch.randn(5, 6, generator=keyed_generator(1))).norm(dim=-1)
    assert torch.allclose(norms, torch.ones(5))


def test_a_folder_of_a_run_stands_for_its_best_head(tmp_path):
    save_head(new_head(HeadSpec(in_width=6, dims=(4,)), keyed_generator(0)), tmp_path / "identity_head.safetensors")
    assert load_head(tmp_path).spec.dims == (4,)


def test_weights_of_a_new_head_depend_on_the_generator_alone():
    spec = HeadSpec(in_width=6, dims=(8, 4))
    first = new_head(spec, keyed_generator(3))
    torch.rand(7)
    second = new_head(spec, keyed_generator(3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.net[0].weight, new_head(spec, keyed_generator(4)).net[0].weight)


def test_dropout_of_a_row_depends_on_its_generator_not_on_its_neighbours():
    head = new_head(HeadSpec(in_width=6, dims=(64, 4), dropout=0.5), keyed_generator(0)).train()
    features = torch.randn(4, 6, generator=keyed_generator(1))
    together = head(features, [keyed_generator("d", i) for i in range(4)])
    apart = torch.cat([head(features[i : i + 1], [keyed_generator("d", i)]) for i in range(4)])
    other = head(features, [keyed_generator("e", i) for i in range(4)])
    assert torch.allclose(together, apart, atol=1e-6)
    assert not torch.allclose(together, other, atol=1e-2)


def test_dropout_zeroes_its_share_and_scales_the_rest():
    head = ProjectionHead(HeadSpec(in_width=4000, dims=(4000,), layout=("linear", "dropout"), dropout=0.25)).train()
    nn.init.eye_(head.net[0].weight)
    nn.init.zeros_(head.net[0].bias)
    dropped = head(torch.ones(1, 4000), [keyed_generator(0)])
    zero = dropped == 0
    assert zero.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert dropped[~zero].unique().numel() == 1


def _foreign_net(norm_after_activation: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = [nn.GELU(), nn.LayerNorm(8)] if norm_after_activation else [nn.LayerNorm(8), nn.GELU()]
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Dropout(0.1), nn.Linear(8, 4)).eval()


class _NamedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.ln1, self.fc2 = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.ln1(self.fc1(x))))


def _assert_same(path, foreign):
    features = torch.randn(3, 6, generator=keyed_generator(1))
    expected = nn.functional.normalize(foreign(features), dim=-1)
    assert torch.allclose(load_head(path)(features), expected, atol=1e-6)


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "head", "deep"])
@pytest.mark.parametrize("prefix", ["", "net.", "module.proj.mlp."])
def test_foreign_pt_is_read_whatever_it_is_nested_in(tmp_path, wrap, prefix):
    net = _foreign_net()
    state = {prefix + k: v for k, v in net.state_dict().items()}
    content = {
        "bare": state,
        "state_dict": {"state_dict": state, "step": 7},
        "head": {"head": state, "optimizer": torch.optim.AdamW(net.parameters()).state_dict(), "args": {"lr": 1e-3}},
        "deep": {"model": {"head": state}, "epoch": torch.tensor(3)},
    }[wrap]
    torch.save(content, tmp_path / "head.pt")
    _assert_same(tmp_path / "head.pt", net)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("layernorm", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dims", [(8, 4), (8, 8, 4), (4,)])
def test_the_references_checkpoint_is_read_safely_with_every_setting(tmp_path, activation, layernorm, dropout, dims):
    """A head called `net` under head_state_dict, the optimizer's state, and the flags as a plain dictionary."""
    torch.manual_seed(0)
    layers, width = [], 6
    for place, out in enumerate(dims):
        layers.append(nn.Linear(width, out))
        width = out
        if place < len(dims) - 1:
            layers += [nn.LayerNorm(out)] if layernorm else []
            layers += [nn.GELU() if activation == "gelu" else nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
    head = nn.Module()
    head.net = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(head.parameters())
    head.net(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    flags = {"activation": activation, "use_layernorm": layernorm, "dropout": dropout, "proj_dims": list(dims)}
    content = {
        "step": 4000,
        "head_state_dict": head.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": {"model_dir": "/models/dinov3", "learning_rate": 5e-4, "val_crop": False} | flags,
    }
    torch.save(content, tmp_path / "projection_head_step4000.pt")
    _assert_same(tmp_path / "projection_head_step4000.pt", head.net.eval())


def test_gaps_in_the_numbers_tell_where_the_activation_sits(tmp_path):
    net = _foreign_net(norm_after_activation=True)
    torch.save(net.state_dict(), tmp_path / "head.pt")
    assert load_head(tmp_path / "head.pt").spec.layout == ("linear", "act", "norm", "linear")
    _assert_same(tmp_path / "head.pt", net)


def test_foreign_head_with_names_and_without_a_bias_is_read(tmp_path):
    torch.manual_seed(0)
    head = _NamedHead().eval()
    torch.save({"model": {f"head.{k}": v for k, v in head.state_dict().items()}}, tmp_path / "head.pt")
    _assert_same(tmp_path / "head.pt", head)


def test_head_is_found_inside_a_whole_model(tmp_path):
    net = _foreign_net()
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(6, 6))
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    torch.save(state | {f"head.{k}": v for k, v in net.state_dict().items()}, tmp_path / "model.pt")
    _assert_same(tmp_path / "model.pt", net)


def test_stated_activation_is_used(tmp_path):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    torch.save({"head": net.state_dict(), "config": {"activation": "relu"}}, tmp_path / "head.pt")
    _assert_same(tmp_path / "head.pt", net)


def test_foreign_safetensors_are_read_and_bf16_becomes_fp32(tmp_path):
    net = _foreign_net()
    save_file({k: v.bfloat16() for k, v in net.state_dict().items()}, tmp_path / "head.safetensors")
    head = load_head(tmp_path / "head.safetensors")
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    features = torch.randn(3, 6, generator=keyed_generator(1))
    cosine = (head(features) * nn.functional.normalize(net(features), dim=-1)).sum(-1)
    assert cosine.min() > 0.999


def test_defect_12_a_file_that_could_run_code_is_refused(tmp_path):
    torch.save({"head": _foreign_net().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "head.pt")
    with pytest.raises(UserError, match="not a file of plain tensors"):
        load_head(tmp_path / "head.pt")


@pytest.mark.parametrize("content", [{}, {"a": torch.zeros(3)}, [1], {"x.weight": torch.zeros(2, 2, 2)}])
def test_tensors_that_are_no_head_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "head.pt")
    with pytest.raises(UserError, match="holds no chain of Linear layers"):
        load_head(tmp_path / "head.pt")


def test_two_heads_in_one_file_are_refused(tmp_path):
    state = _foreign_net().state_dict()
    torch.save({"student": state, "teacher": state}, tmp_path / "head.pt")
    with pytest.raises(UserError, match="2 chains"):
        load_head(tmp_path / "head.pt")


@pytest.mark.parametrize("content", [b"", b"not a head", b"hello", b"\xe5\x00", b"\x80\x02}q\x00.", b"PK\x03\x04"])
def test_broken_files_are_refused(tmp_path, content):
    for name in ("head.pt", "head.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError):
            load_head(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_head_with_any_byte_wrong_is_read_or_refused_but_never_breaks(tmp_path, zipped):
    file = tmp_path / "head.pt"
    torch.save({"0.weight": torch.zeros(2, 3)}, file, _use_new_zipfile_serialization=zipped)
    whole, generator = file.read_bytes(), torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        place, value = torch.randint(0, 256, (2,), generator=generator).tolist()
        damaged[place] = value
        file.write_bytes(damaged)
        try:
            read_torch_file(file)
        except UserError:
            refused += 1
    assert refused > 0


def test_missing_head_says_what_to_do_and_finds_the_safetensors_beside_it(tmp_path):
    with pytest.raises(UserError, match="vflora train-head"):
        load_head(tmp_path / "identity_head.pt")
    save_head(new_head(HeadSpec(in_width=6, dims=(4,)), keyed_generator(0)), tmp_path / "identity_head.safetensors")
    with pytest.raises(UserError, match=r"identity_head\.safetensors is there"):
        load_head(tmp_path / "identity_head.pt")


def test_another_backbone_width_is_refused_with_both_widths_and_the_fix():
    head = new_head(HeadSpec(in_width=1024, dims=(4,), backbone="dinov3_vit large"), keyed_generator(0))
    with pytest.raises(UserError, match=r"width 1024 \(dinov3_vit large\).*width 384.*vflora train-head"):
        head.check_width(384, "head.safetensors")


@pytest.mark.parametrize("bad", [{"dims": ()}, {"dims": (0,)}, {"activation": "tanh"}, {"dropout": 1.0}])
def test_bad_layouts_are_refused(bad):
    with pytest.raises(UserError):
        HeadSpec(**{"in_width": 6, "dims": (4,)} | bad)


def test_untrained_weights_have_the_scale_of_pytorch():
    weight = new_head(HeadSpec(in_width=64, dims=(512,)), keyed_generator(0)).net[0].weight
    assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.02)
