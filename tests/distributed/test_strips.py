"""Decoding in strips, one for each process: the same frames, and the same gradient."""

import pytest
import torch

from vflora.config import IdentityConfig
from vflora.distributed.strips import Strips
from vflora.identity_term import IdentityTerm
from vflora.models.identity import IdentityEmbedder
from vflora.models.light_decoder import lighten_decoder
from vflora.models.random_weights import small_vae
from vflora.models.video_vae import decode_frames


def latents(*, long_side=-1, side=40):
    size = (2, side) if long_side == -1 else (side, 2)
    return torch.randn(2, 4, 2, *size, generator=torch.Generator().manual_seed(3))


def decoded(vae, x, strips, **options):
    """Frames, the gradient of a loss that looks at every pixel of them differently, and how much was computed."""
    x = x.clone().requires_grad_()
    sizes = []
    last = vae.decoder.up_blocks[-1].resnets[0]
    handle = last.register_forward_pre_hook(lambda _module, args: sizes.append(args[0].shape[-2] * args[0].shape[-1]))
    frames = decode_frames(vae, x, [1, 4], strips=strips, **options)
    handle.remove()
    weight = torch.randn(frames.shape, generator=torch.Generator().manual_seed(4))
    (gradient,) = torch.autograd.grad((frames * weight).sum() + frames.square().sum(), x)
    return frames.detach(), gradient, max(sizes, default=0)


def frozen_vae(light=False):
    vae = small_vae().requires_grad_(False)
    if light:
        lighten_decoder(vae)
    return vae


@pytest.mark.parametrize(
    ("processes", "long_side", "light", "options"),
    [
        (2, -1, False, {}),
        (2, -2, False, {"checkpointed": True}),
        (2, -1, True, {"tile": 64}),
        (2, -2, False, {"tile": 24}),
        (4, -1, True, {}),
    ],
)
def test_frames_and_gradient_are_those_of_the_whole(in_processes, processes, long_side, light, options):
    x = latents(long_side=long_side)
    wanted_frames, wanted_gradient, whole = decoded(frozen_vae(light), x, None, **options)

    def work(world):
        return decoded(frozen_vae(light), x, Strips.of(world), **options)

    for frames, gradient, computed in in_processes(processes, work, sp_size=processes):
        torch.testing.assert_close(frames, wanted_frames, rtol=1e-5, atol=1e-5)
        scale = wanted_gradient.abs().max()
        assert (gradient - wanted_gradient).abs().max() < 1e-5 * scale
        if "tile" not in options:
            assert computed < 1.1 * whole / processes, (
                "where it is expensive, every process does its part and hardly more"
            )


def test_strips_that_are_uneven_or_narrower_than_their_border_and_more_processes_than_pixels(in_processes):
    sides = {"uneven": 41, "narrow": 7, "tiled": 7, "too few": 2}
    options = {"tiled": {"tile": 24}}
    inputs = {name: latents(side=side)[..., : min(2, side - 1), :] for name, side in sides.items()}
    wanted = {name: decoded(frozen_vae(), x, None, **options.get(name, {})) for name, x in inputs.items()}

    def work(world):
        strips = Strips.of(world)
        return {name: decoded(frozen_vae(), x, strips, **options.get(name, {})) for name, x in inputs.items()}

    for answers in in_processes(3, work, sp_size=3):
        for name, (frames, gradient, _) in answers.items():
            wanted_frames, wanted_gradient, _ = wanted[name]
            torch.testing.assert_close(frames, wanted_frames, rtol=1e-5, atol=1e-5)
            assert (gradient - wanted_gradient).abs().max() < 1e-5 * wanted_gradient.abs().max()
        assert answers["narrow"][2] < 0.6 * wanted["narrow"][2], "the border is as wide as the picture only at first"
        assert answers["too few"][2] == wanted["too few"][2], "all compute the whole"


def test_the_identity_gradient_of_processes_that_share_a_sample(in_processes, small_models):
    x = latents()[:1]
    anchors = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)

    def judge(strips):
        embedder = IdentityEmbedder.load(small_models / "dino", small_models / "head.safetensors")
        config = IdentityConfig("unused", "unused", id_num_frames=2)
        return IdentityTerm(config, frozen_vae(), embedder, strips=strips).gradient(x, anchors, "frames")

    wanted = judge(None)
    for judged in in_processes(4, lambda world: judge(Strips.of(world)), sp_size=2):
        assert judged.loss == pytest.approx(wanted.loss, rel=1e-6)
        torch.testing.assert_close(judged.cosines, wanted.cosines, rtol=1e-5, atol=1e-6)
        assert (judged.gradient - wanted.gradient).abs().max() < 1e-5 * wanted.gradient.abs().max()
