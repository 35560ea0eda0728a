import pytest
import torch
from torch.nn.functional import interpolate

from vflora.models.resizing import resize


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(15, 26), (30, 53), (41, 60), (1, 1)])
def test_it_is_the_interpolation_of_pytorch_and_so_is_its_gradient(mode, size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 30, 53, generator=generator, dtype=torch.float64, requires_grad=True)
    ours, theirs = resize(images, size, mode), interpolate(images, size=size, mode=mode, antialias=mode != "area")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    wanted = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((image * wanted).sum(), images)[0] for image in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_on_a_gpu_its_gradient_is_the_same_every_time(mode):
    images = torch.randn(5, 3, 480, 848, device="cuda", requires_grad=True)
    wanted = torch.randn(5, 3, 224, 224, device="cuda")
    first, *others = (torch.autograd.grad((resize(images, (224, 224), mode) * wanted).sum(), images)[0] for _ in "1234")
    assert all(torch.equal(first, other) for other in others)
