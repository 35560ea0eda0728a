"""The decode used in training against the stock decode of diffusers."""

import copy
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15

from vflora.models.light_decoder import lighten_decoder
from vflora.models.random_weights import small_vae
from vflora.models.video_vae import decode_frames, encode_first_frame, latent_frames_for, patch_frame_attention

SCALING = 1.03682


@pytest.fixture(scope="module")
def stock():
    return small_vae().requires_grad_(False)


@pytest.fixture
def vae(stock):
    return copy.deepcopy(stock)


def latents(batch=1, t=3, h=3, w=4, seed=0):
    return torch.randn(batch, 4, t, h, w, generator=torch.Generator().manual_seed(seed))


def with_gradient(decode, z, weight):
    z = z.clone().requires_grad_(True)
    video = decode(z)
    (video * weight).sum().backward()
    return video.detach(), z.grad


def relative(value, expected):
    return torch.linalg.norm(value - expected) / torch.linalg.norm(expected)


def test_the_whole_decode_equals_the_stock_decode(stock, vae):
    z = latents()
    with torch.no_grad():
        expected = stock.decode(z / SCALING).sample
        assert torch.allclose(decode_frames(vae, z), expected, atol=1e-6)


def test_the_stock_class_is_left_alone(stock, vae):
    patch_frame_attention(vae)
    assert type(stock.decoder.mid_block.attentions[0]).__name__ == "HunyuanVideo15AttnBlock"
    assert type(vae.decoder.mid_block.attentions[0]).__name__ == "FrameAttention"


@pytest.mark.parametrize("frames", [[0], [0, 3], [4, 1], [8], [2, 5, 8]])
def test_wanted_frames_equal_those_frames_of_the_whole_video(vae, frames):
    z = latents()
    with torch.no_grad():
        whole = decode_frames(vae, z)
        assert torch.allclose(decode_frames(vae, z, frames), whole[:, :, frames], atol=1e-6)


def test_only_the_needed_latents_take_part(vae):
    z = latents().requires_grad_(True)
    decode_frames(vae, z, [0, 4]).sum().backward()
    assert z.grad[:, :, :2].abs().min() > 0
    assert z.grad[:, :, 2:].abs().max() == 0


@pytest.mark.parametrize(("frame", "needed"), [(0, 1), (1, 2), (4, 2), (5, 3), (16, 5), (120, 31)])
def test_latents_needed_for_a_frame(frame, needed):
    assert latent_frames_for([0, frame]) == needed


def test_every_sample_may_want_its_own_frames(vae):
    z = latents(2)
    with torch.no_grad():
        whole = decode_frames(vae, z)
        picked = decode_frames(vae, z, torch.tensor([[0, 7], [3, 8]]))
    assert torch.allclose(picked[0], whole[0][:, [0, 7]], atol=1e-6)
    assert torch.allclose(picked[1], whole[1][:, [3, 8]], atol=1e-6)


def test_a_batch_of_two_equals_two_batches_of_one(vae):
    z = latents(2)
    weight = torch.randn(2, 3, 9, 48, 64)
    both, both_grad = with_gradient(lambda x: decode_frames(vae, x), z, weight)
    for i in range(2):
        one, one_grad = with_gradient(lambda x: decode_frames(vae, x), z[i : i + 1], weight[i : i + 1])
        assert torch.allclose(both[i : i + 1], one, atol=1e-5)
        assert relative(both_grad[i : i + 1], one_grad) < 1e-5


@pytest.mark.parametrize(
    "options", [{"checkpointed": True}, {"tile": 32}, {"tile": 16}, {"tile": 48}, {"tile": 8}, {"tile": 20}]
)
def test_recomputed_and_tiled_decodes_equal_the_stock_decode_and_its_gradient(stock, vae, options):
    z = latents(seed=1)
    weight = torch.randn(1, 3, 9, 48, 64)
    expected, expected_grad = with_gradient(lambda x: stock.decode(x / SCALING).sample, z, weight)
    video, grad = with_gradient(lambda x: decode_frames(vae, x, **options), z, weight)
    assert torch.allclose(video, expected, atol=1e-5)
    assert relative(grad, expected_grad) < 1e-5


@pytest.mark.parametrize("tile", [6, 8, 56])
@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("size", [(2, 7), (5, 1)])
def test_tiles_of_any_size_give_the_chosen_frames_and_the_gradient_of_the_whole(vae, size, light, tile):
    # Around 8 pixels wide they have neighbours that end at the frame's edge, inside the border; 56 leave a sliver.
    if light:
        lighten_decoder(vae)
    z = latents(2, 2, *size, seed=2)
    frames = torch.tensor([[0, 3], [4, 1]])
    weight = torch.randn(2, 3, 2, 16 * size[0], 16 * size[1])
    expected, expected_grad = with_gradient(lambda x: decode_frames(vae, x, frames), z, weight)
    video, grad = with_gradient(lambda x: decode_frames(vae, x, frames, tile=tile), z, weight)
    assert torch.allclose(video, expected, atol=1e-5)
    for edge in (..., (..., 0), (..., -1), (..., 0, slice(None)), (..., -1, slice(None))):
        assert relative(grad[edge], expected_grad[edge]) < 1e-5


def multiplications(vae, decode):
    """How many all convolutions of a part of the decoder do together, by the name of the part."""
    counted = Counter()

    def count(part, conv):
        def hook(_module, _args, out):
            counted[part] += out.numel() * conv.weight[0].numel()

        return conv.register_forward_hook(hook)

    convs = {name: module for name, module in vae.decoder.named_modules() if isinstance(module, torch.nn.Conv3d)}
    handles = [count(".".join(name.split(".")[:2]), conv) for name, conv in convs.items()]
    decode()
    for handle in handles:
        handle.remove()
    return counted


@pytest.mark.parametrize("with_backward", [False, True])
def test_tiles_do_little_more_than_the_whole_decode(with_backward):
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo15().requires_grad_(False).eval()  # 3 resnets in every block of the decoder
        z = torch.zeros(1, 32, 1, 30, 53, requires_grad=with_backward)

    def decode(tile):
        video = decode_frames(vae, z, tile=tile)
        if with_backward and tile:
            video.sum().backward()

    whole = multiplications(vae, lambda: decode(None))
    tiled = multiplications(vae, lambda: decode(128))
    runs = 2 if with_backward else 1
    ratio = {part: tiled[part] / whole[part] / runs for part in whole}
    # At the full resolution, 3 resnets and a convolution are left: 7 pixels on each side, and one for rounding. With
    # the border of the last two blocks it would be 22 pixels all the way, which is 1.67 times the whole decode.
    assert ratio["up_blocks.4"] < (1 + 2 * 8 / 128) ** 2
    assert ratio["conv_out.conv"] < (1 + 2 * 2 / 128) ** 2
    # One stage alone needs a border of 2 in its own pixels, and its tiles are 4 times as wide.
    assert ratio["up_blocks.2"] < (1 + 2 * 2 / (4 * 128 / 4)) ** 2
    assert tiled.total() < 1.2 * runs * whole.total(), "all in all"


def saved_megabytes(decode, z):
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        video = decode(z.clone().requires_grad_(True))
    assert video.requires_grad
    return sum(saved.values()) / 1e6


def test_checkpointing_engages_in_eval_mode(vae):
    # Defect 7 of the reference: its decoder's checkpointing never engages in eval.
    assert not vae.training
    z = latents()
    kept = saved_megabytes(lambda x: decode_frames(vae, x), z)
    recomputed = saved_megabytes(lambda x: decode_frames(vae, x, checkpointed=True), z)
    assert recomputed < kept / 4


def test_recomputing_with_a_trainable_vae_is_refused(vae):
    vae.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze the VAE"):
        decode_frames(vae, latents(), checkpointed=True)


def test_a_frame_outside_the_video_is_refused(vae):
    with pytest.raises(IndexError, match="between 0 and 8"):
        decode_frames(vae, latents(), [9])


def test_the_first_frame_is_the_mode_of_the_posterior_for_bytes_and_floats(stock, vae):
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    floats = images.float() / 127.5 - 1
    with torch.no_grad():
        expected = stock.encode(floats.unsqueeze(2)).latent_dist.mode() * SCALING
    assert torch.allclose(encode_first_frame(vae, images), expected, atol=1e-5)
    assert torch.allclose(encode_first_frame(vae, floats.repeat(2, 1, 1, 1))[1:], expected, atol=1e-5)
