import pytest
import torch

from vflora.errors import UserError
from vflora.models.attention_choice import BACKENDS, attend, attention_errors, require_true

CPU = torch.device("cpu")


@pytest.mark.parametrize("kernel", ["native", "flash"])
def test_output_and_gradients_are_those_of_plain_arithmetic(kernel):
    errors = attention_errors(kernel, 2, 16, torch.float32, CPU, tokens=67)
    assert set(errors) == {f"gradient of the {name}" for name in ("queries", "keys", "values")} | {"output"}
    assert max(errors.values()) < 1e-5
    require_true(kernel, errors)


@pytest.mark.parametrize("kernel", ["native", "flash", "cudnn", "efficient"])
def test_texts_of_unequal_length_are_masked_whichever_kernel_is_chosen(kernel):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 9, 2, 16, generator=generator) for _ in range(3))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    out = attend(query, key, value, mask, BACKENDS[kernel])
    assert torch.allclose(out[0], attend(query, key, value)[0], atol=1e-6)
    alone = attend(query[1:], key[1:, :6], value[1:, :6])
    assert torch.allclose(out[1], alone[0], atol=1e-6)


def test_rounding_to_bf16_passes():
    errors = attention_errors("native", 2, 16, torch.bfloat16, CPU, tokens=67)
    assert 1e-4 < max(errors.values()) < 0.02


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_a_wrong_gradient_is_refused_with_another_kernel_named(wrong):
    errors = {"output": 0.001, "gradient of the keys": wrong}
    with pytest.raises(UserError, match="wrong gradient of the keys .* --attention_backend flash"):
        require_true("cudnn", errors)
