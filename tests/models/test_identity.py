import json

import pytest
import torch
from torch import nn

from vflora.errors import UserError
from vflora.models.identity import FrozenBackbone, IdentityEmbedder
from vflora.models.projection_head import HeadSpec, new_head, save_head
from vflora.models.random_weights import small_dinov3_convnext, small_dinov3_vit
from vflora.random_streams import keyed_generator, keyed_noise

MODELS = {"vit": small_dinov3_vit, "convnext": small_dinov3_convnext}


@pytest.fixture(params=sorted(MODELS))
def model_dir(request, tmp_path):
    MODELS[request.param]().save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


@pytest.fixture
def head_path(tmp_path):
    save_head(new_head(HeadSpec(in_width=16, dims=(8, 4)), keyed_generator(0)), tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


def _images(height=40, width=72):
    return keyed_noise((2, 3, height, width), "images").clamp(-1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_fp32_unit_vectors_with_gradients_to_the_pixels_only(model_dir, head_path, dtype):
    embedder = IdentityEmbedder.load(model_dir, head_path, dtype=dtype)
    images = _images().requires_grad_()
    embeddings = embedder.embed(images)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (2, 4)
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(2), atol=1e-5)
    (1 - embeddings[0] @ embeddings[1]).backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in embedder.parameters())


def test_pictures_come_from_any_device(model_dir, head_path):
    embedder = IdentityEmbedder.load(model_dir, head_path).to("meta")
    assert embedder.embed(_images()).device.type == "meta"


def test_gradient_to_the_pixels_matches_finite_differences(model_dir, head_path):
    embedder = IdentityEmbedder.load(model_dir, head_path)
    images = (_images(64, 64) * 0.9)[:1]
    anchor = embedder.embed(_images(64, 64)[1:])
    direction = keyed_noise((1, 3, 64, 64), "direction") * 0.05

    def loss(x):
        return 1 - (embedder.embed(x) * anchor).sum()

    probe = images.clone().requires_grad_()
    loss(probe).backward()
    slope = (loss(images + 1e-2 * direction) - loss(images - 1e-2 * direction)) / 2e-2
    assert (probe.grad * direction).sum().item() == pytest.approx(slope.item(), rel=0.05)


def test_training_mode_of_the_outer_module_changes_nothing(model_dir, head_path):
    outer = nn.ModuleDict({"identity": IdentityEmbedder.load(model_dir, head_path)}).train()
    embedder = outer["identity"]
    assert not any(m.training for m in embedder.modules())
    assert torch.equal(embedder.embed(_images()), embedder.embed(_images()))


def test_size_comes_from_the_processor_when_there_is_one_and_from_the_model_otherwise(model_dir):
    assert FrozenBackbone.load(model_dir).preprocessing.size == (64, 64)
    fields = {"size": {"height": 32, "width": 48}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (model_dir / "preprocessor_config.json").write_text(json.dumps(fields))
    preprocessing = FrozenBackbone.load(model_dir).preprocessing
    assert preprocessing.size == (32, 48)
    pixels = preprocessing(torch.tensor([-1.0, 0.0, 3.0]).view(1, 3, 1, 1).expand(1, 3, 32, 48))
    assert pixels[0, :, 0, 0].tolist() == [-2.0, 0.0, 2.0]


def test_resizing_matches_pillow_antialiasing(model_dir):
    import numpy as np
    from PIL import Image

    pixels = torch.randint(0, 256, (3, 128, 160), generator=keyed_generator(0), dtype=torch.uint8)
    ours = FrozenBackbone.load(model_dir).preprocessing(pixels[None].float() / 127.5 - 1)[0]
    small = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.BILINEAR)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    theirs = (torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255 - mean) / std
    assert (ours - theirs).abs().max() < 0.02


def test_missing_or_foreign_models_are_refused_with_the_line_to_run(model_dir, head_path, tmp_path):
    with pytest.raises(UserError, match=r"hf download facebook/dinov3-\S+ --local-dir"):
        IdentityEmbedder.load(tmp_path / "nowhere", head_path)
    for weights in model_dir.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UserError, match=r"no \.safetensors files.*hf download"):
        FrozenBackbone.load(model_dir)
    (model_dir / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"model\.safetensors is cut short or damaged"):
        FrozenBackbone.load(model_dir)
    (tmp_path / "dino" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(UserError, match="holds a nameless model, not DINOv3"):
        FrozenBackbone.load(model_dir)
    (tmp_path / "dino" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged .*hf download"):
        FrozenBackbone.load(model_dir)
    (tmp_path / "dino" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="holds a bert model, not DINOv3"):
        FrozenBackbone.load(model_dir)


def test_a_head_for_another_backbone_is_refused(model_dir, tmp_path):
    save_head(new_head(HeadSpec(in_width=1024, dims=(4,)), keyed_generator(0)), tmp_path / "big.safetensors")
    with pytest.raises(UserError, match="width 1024.*width 16"):
        IdentityEmbedder.load(model_dir, tmp_path / "big.safetensors")
