import pytest
import torch

from vflora.determinism import deterministic
from vflora.errors import UserError


def added_up(device):
    """A sum for which threads of a GPU race, unless told not to."""
    places = torch.zeros(1 << 18, dtype=torch.int64, device=device)
    values = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)).to(device)
    return torch.zeros(1, device=device).index_add_(0, places, values)


@pytest.mark.gpu
def test_on_a_gpu_sums_have_an_order_inside_and_the_setting_of_before_comes_back():
    device = torch.device("cuda")
    with deterministic(True, device):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert len({added_up(device).item() for _ in range(20)}) == 1
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.gpu
def test_a_kernel_without_an_order_is_refused_with_the_flag_that_lets_it_be():
    image = torch.ones(1, 1, 30, 53, device="cuda", requires_grad=True)
    with (
        pytest.raises(UserError, match="adaptive_avg_pool2d_backward.* cannot add up in a fixed order"),
        deterministic(True, image.device),
    ):
        torch.nn.functional.adaptive_avg_pool2d(image, (15, 26)).sum().backward()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("wanted", "device"), [(True, "cpu"), (False, "cuda")])
def test_where_it_is_not_wanted_or_not_needed_nothing_changes(wanted, device):
    with deterministic(wanted, torch.device(device)):
        assert not torch.are_deterministic_algorithms_enabled()
