import pytest
import torch

from vflora.models.denoiser import Denoiser
from vflora.types import Conditions
from vflora.world.base_training import FlowErrors, ReplayedFlowErrors, flow_errors
from vflora.world.models import WorldSizes, build_transformer

SIZES = WorldSizes(frame_size=16, frames=5, latent_channels=4, layers=1)


@pytest.fixture
def transformer():
    transformer = build_transformer(SIZES, seed=0)
    # what starts at zero would hide everything before it
    torch.nn.init.normal_(transformer.proj_out.weight, generator=torch.Generator().manual_seed(1))
    return transformer


def clips(tokens=5, seed=0):
    """Latents, noise, noise levels, prompts, no quoted text, and vision tokens."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 4, 2, 4, 4), (2, 4, 2, 4, 4), (2,), (2, tokens, SIZES.text_width), (2, 0, SIZES.glyph_width)]
    return [torch.rand(shape, generator=generator) for shape in (*shapes, (2, 3, SIZES.vision_width))]


def test_the_function_of_tensors_is_the_one_of_conditions(transformer):
    clean, noise, sigma, prompts, quoted, vision = clips()
    conditions = Conditions(prompts, (5, 5), quoted, (0, 0), vision, clean[:, :, :1])
    expected = flow_errors(Denoiser(transformer), clean, conditions, sigma, noise)
    assert expected.shape == (2,)
    assert torch.equal(FlowErrors(transformer)(*clips()), expected)


@pytest.mark.gpu
def test_replayed_errors_and_gradients_are_the_plain_ones(transformer):
    transformer.to("cuda")
    plain, replayed = FlowErrors(transformer), ReplayedFlowErrors(transformer)
    for seed, tokens in enumerate((5, 7, 5, 7, 5)):
        inputs = [tensor.cuda() for tensor in clips(tokens, seed)]
        found = []
        for errors in (plain, replayed):
            transformer.zero_grad()
            loss = errors(*inputs)
            loss.mean().backward()
            gradients = {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}
            found.append((loss.detach().clone(), gradients))
            del loss
        torch.testing.assert_close(found[1][0], found[0][0])
        assert found[1][1].keys() == found[0][1].keys()
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(found[1][1][name], gradient, msg=name)
