import copy

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel

from vflora.models.denoiser import Denoiser
from vflora.models.lora import add_lora
from vflora.models.random_weights import randomise_lora, small_transformer


def stock_velocity(transformer, latents, sigma, conditions):
    """What the diffusers pipeline computes: masked attention over padded text."""
    reference, given = torch.zeros_like(latents), torch.zeros_like(latents[:, :1])
    reference[:, :, :1], given[:, :, :1] = conditions.first_frame, 1
    pad_text = torch.nn.functional.pad(conditions.prompt_embeds, (0, 0, 0, 5), value=3.0)
    pad_text_2 = torch.nn.functional.pad(conditions.prompt_embeds_2, (0, 0, 0, 4), value=3.0)

    def mask(text, lengths):
        return (torch.arange(text.shape[1]) < torch.tensor(lengths)[:, None]).float()

    return transformer(
        hidden_states=torch.cat([latents, reference, given], 1),
        timestep=torch.full((latents.shape[0],), 1000 * sigma),
        encoder_hidden_states=pad_text,
        encoder_attention_mask=mask(pad_text, conditions.prompt_lengths),
        encoder_hidden_states_2=pad_text_2,
        encoder_attention_mask_2=mask(pad_text_2, conditions.prompt_lengths_2),
        image_embeds=conditions.image_embeds,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize(
    ("lengths", "lengths_2"), [((7,), (0,)), ((7, 7), (3, 3)), ((7, 4), (0, 0)), ((5, 9), (3, 1)), ((5, 9), (0, 2))]
)
def test_dense_velocity_equals_the_stock_masked_one(make_conditions, lengths, lengths_2, patch_size):
    transformer = small_transformer(patch_size=patch_size)
    conditions = make_conditions(lengths, lengths_2)
    latents = torch.randn(len(lengths), 4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = stock_velocity(transformer, latents, 0.7, conditions)
        actual = Denoiser(transformer).velocity(latents, 0.7, conditions)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_conditions_of_the_right_sample_are_used_in_a_batch(transformer, make_conditions):
    conditions = make_conditions((7, 4), (2, 0))
    latents = torch.randn(2, 4, 2, 4, 4)
    denoiser = Denoiser(transformer)
    with torch.no_grad():
        together = denoiser.velocity(latents, torch.tensor([0.9, 0.2]), conditions)
        alone = [denoiser.velocity(latents[i : i + 1], (0.9, 0.2)[i], conditions.select(i)) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_teacher_is_the_base_model_bit_for_bit_even_when_the_lora_has_learned(transformer, make_conditions):
    base = copy.deepcopy(transformer)
    add_lora(transformer, rank=4, alpha=4, dropout=0.0, targets=None, seed=0)
    student = Denoiser(transformer)
    randomise_lora(student.lora_parameters().items(), std=0.1)
    latents, conditions = torch.randn(1, 4, 2, 4, 4), make_conditions()
    with torch.no_grad():
        expected = Denoiser(base).velocity(latents, 0.5, conditions)
        learned = student.velocity(latents, 0.5, conditions)
    with student.teacher():
        actual = student.velocity(latents, 0.5, conditions)
    assert torch.equal(actual, expected)
    assert not torch.equal(learned, expected)
    assert all(p.requires_grad for p in student.lora_parameters().values())


def test_fresh_lora_changes_nothing_at_all(transformer, make_conditions):
    add_lora(transformer, rank=4, alpha=4, dropout=0.0, targets=None, seed=0)
    denoiser = Denoiser(transformer)
    latents, conditions = torch.randn(1, 4, 2, 4, 4), make_conditions()
    with denoiser.teacher():
        teacher = denoiser.velocity(latents, 0.5, conditions)
    assert torch.equal(denoiser.velocity(latents, 0.5, conditions), teacher)


def test_default_targets_are_543_layers_of_the_real_model():
    with torch.device("meta"):
        transformer = HunyuanVideo15Transformer3DModel()
        add_lora(transformer, rank=16, alpha=16, dropout=0.0, targets=None, seed=0)
    trained = [p for p in transformer.parameters() if p.requires_grad]
    assert len(trained) == 2 * 543
    assert round(sum(p.numel() for p in trained) / 1e6, 1) == 53.4


def test_bf16_weights_get_the_timestep_in_full_precision(make_conditions):
    transformer = small_transformer().to(torch.bfloat16)
    seen = []
    transformer.time_embed.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        Denoiser(transformer).velocity(torch.randn(1, 4, 2, 4, 4), 0.7654, make_conditions())
    assert seen[0].dtype == torch.float32
    assert seen[0].item() == pytest.approx(765.4, abs=1e-3)


def test_conditions_of_another_batch_size_are_refused(transformer, make_conditions):
    with pytest.raises(ValueError, match="2 latents, but conditions of 1"):
        Denoiser(transformer).velocity(torch.randn(2, 4, 2, 4, 4), 0.5, make_conditions())
