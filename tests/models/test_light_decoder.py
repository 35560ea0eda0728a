"""The decoder that remembers little against the stock decoder."""

import copy

import pytest
import torch

from vflora.models.light_decoder import lighten_decoder
from vflora.models.random_weights import small_vae
from vflora.models.video_vae import decode_frames

SCALING = 1.03682


@pytest.fixture(scope="module")
def stock():
    vae = small_vae().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in vae.named_parameters():
        if "gamma" in name:
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return vae


@pytest.fixture
def light(stock):
    vae = copy.deepcopy(stock)
    lighten_decoder(vae)
    return vae


def latents(batch=1, t=2, h=3, w=5, seed=0):
    return torch.randn(batch, 4, t, h, w, generator=torch.Generator().manual_seed(seed))


def relative(value, expected):
    return float(torch.linalg.norm(value - expected) / torch.linalg.norm(expected))


def with_gradient(decode, z):
    z = z.clone().requires_grad_(True)
    video = decode(z)
    weight = torch.randn(video.shape, generator=torch.Generator().manual_seed(9))
    (video * weight).sum().backward()
    return video.detach(), z.grad


@pytest.mark.parametrize("options", [{}, {"checkpointed": True}, {"tile": 32}])
def test_frames_and_gradient_equal_those_of_the_stock_decoder(stock, light, options):
    z = latents(seed=1)
    expected, expected_grad = with_gradient(lambda x: stock.decode(x / SCALING).sample, z)
    video, grad = with_gradient(lambda x: decode_frames(light, x, **options), z)
    assert relative(video, expected) < 1e-5
    assert relative(grad, expected_grad) < 1e-5


def test_one_frame_decodes_alone(stock, light):
    z = latents(t=1)
    expected, expected_grad = with_gradient(lambda x: stock.decode(x / SCALING).sample, z)
    video, grad = with_gradient(lambda x: decode_frames(light, x, [0]), z)
    assert relative(video, expected) < 1e-5
    assert relative(grad, expected_grad) < 1e-5


def test_working_frame_by_frame_changes_nothing(light, monkeypatch):
    z = latents(batch=2)
    whole = with_gradient(lambda x: decode_frames(light, x), z)
    monkeypatch.setattr("vflora.models.light_decoder._CHUNK", 1)
    pieces = with_gradient(lambda x: decode_frames(light, x), z)
    assert all(relative(a, b) < 1e-6 for a, b in zip(pieces, whole, strict=True))


def test_it_keeps_less_than_half_of_what_the_stock_decoder_keeps(stock, light):
    def kept(vae):
        saved = {}

        def keep(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in vae.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            video = vae.decoder(latents().requires_grad_(True))
        assert video.requires_grad
        return sum(size for pointer, size in saved.items() if pointer not in weights)

    assert kept(light) < 0.5 * kept(stock)


def test_a_trainable_vae_is_refused(light):
    light.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze the VAE"):
        decode_frames(light, latents())


@pytest.mark.parametrize("tiling", [False, True])
def test_frames_stay_the_same_while_layers_are_offloaded_one_by_one(stock, light, tiling):
    # As `vflora generate --group_offloading true` does on a GPU; on the CPU it moves nothing, but every hook runs.
    vae = copy.deepcopy(light)
    for one in (light, vae):
        if tiling:
            one.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32,
                              tile_latent_min_height=2, tile_latent_min_width=2)  # fmt: skip
    vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    ran = []
    owners = {module for module in vae.decoder.modules() if module._parameters}
    for module in owners:
        if isinstance(module, torch.nn.Conv3d):
            registry = module._diffusers_hook
            assert registry.get_hook("group_offloading") is not None
        module.register_forward_hook(lambda m, *_: ran.append(m))
    with torch.no_grad():
        frames = vae.decode(latents(t=3)).sample
        assert torch.equal(frames, light.decode(latents(t=3)).sample)
    assert set(ran) == owners, "weights come by the hook of the module that is called"
