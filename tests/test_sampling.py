import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from PIL import Image

from vflora.errors import UserError
from vflora.models.lora import add_lora
from vflora.models.random_weights import randomise_lora, small_pipeline, small_text_to_video
from vflora.sampling import adapter_strength, fit_image, generate_video, prepare_for_sampling, video_size

PICTURE = Image.linear_gradient("L").resize((80, 60)).convert("RGB")


def pipeline(**options):
    pipe = small_pipeline(**options)
    # the bookkeeping of the real checkpoints, at the size of the small tokenizer
    pipe.prompt_template_encode_start_idx, pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 4, 32, 16
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_lora(pipe):
    add_lora(pipe.transformer, rank=2, alpha=2, dropout=0.0, targets=None, seed=0)
    randomise_lora(pipe.transformer.named_parameters(), std=0.3)
    return pipe


def sample(pipe, **options):
    return generate_video(pipe, PICTURE, 'a cat says "hi"', **{"seed": 1, "frames": 5, "steps": 2} | options)


def test_a_video_has_the_frames_and_bucket_of_its_picture_and_the_range_of_pixels():
    video = sample(pipeline())
    assert video.shape == (3, 5, 48, 64)
    assert video.dtype == torch.float32
    assert -1 <= video.min() < video.max() <= 1


def test_the_seed_decides_and_nothing_else_does():
    pipe = pipeline()
    first = sample(pipe)
    torch.manual_seed(99)
    assert torch.equal(sample(pipe), first)
    assert not torch.equal(sample(pipe, seed=2), first)


def stock_video(pipe, **inputs):
    return pipe(
        prompt='a cat says "hi"',
        negative_prompt="",
        num_frames=5,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
        **inputs,
    ).frames[0]


@pytest.mark.parametrize("meanflow", [False, True])
def test_in_fp32_it_equals_the_stock_pipeline(meanflow):
    pipe = pipeline(use_meanflow=meanflow)
    stock = stock_video(pipe, image=PICTURE)
    ours = sample(pipe, steps=3)
    assert torch.allclose(ours.transpose(0, 1) / 2 + 0.5, stock, atol=1e-5)


def test_a_pipeline_that_was_offloaded_before_it_was_prepared_is_refused():
    pipe = pipeline()
    cpu_offload_with_hook(pipe.transformer, execution_device="cpu")  # as pipe.enable_model_cpu_offload() does on a GPU
    with pytest.raises(UserError, match="prepare_for_sampling"):
        sample(pipe, steps=1)
    remove_hook_from_module(pipe.transformer)
    sample(pipe, steps=1)


def test_in_bf16_it_is_nearer_to_the_exact_video_than_the_stock_pipeline():
    def latents(dtype, prepared):
        pipe = pipeline().to(dtype)
        if prepared:
            prepare_for_sampling(pipe)
        return pipe(
            image=PICTURE,
            prompt="a cat",
            num_frames=5,
            num_inference_steps=12,
            latents=torch.randn(1, 4, 2, 3, 4, generator=torch.Generator().manual_seed(1)),
            output_type="latent",
        ).frames.float()

    exact = latents(torch.float32, True)
    stock = (latents(torch.bfloat16, False) - exact).abs().mean()
    ours = (latents(torch.bfloat16, True) - exact).abs().mean()
    assert ours < 0.8 * stock


def test_the_schedule_is_shifted_once():
    pipe = pipeline()
    sample(pipe, steps=4)
    uniform = torch.linspace(1, 0, 5)
    assert torch.allclose(pipe.scheduler.sigmas, 5 * uniform / (1 + 4 * uniform), atol=1e-6)


def test_guidance_of_one_runs_the_transformer_once_a_step():
    pipe, calls = pipeline(), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    sample(pipe, guidance_scale=1.0, steps=3)
    assert len(calls) == 3
    sample(pipe, guidance_scale=4.0, steps=3)
    assert len(calls) == 3 + 6


def test_the_guidance_of_one_video_is_not_that_of_the_next():
    pipe = pipeline()
    own = sample(pipe)
    assert not torch.equal(sample(pipe, guidance_scale=1.0), own)
    with pytest.raises(RuntimeError, match="manual_seed"):
        sample(pipe, guidance_scale=1.0, seed="not a number")
    assert torch.equal(sample(pipe), own)


def test_scale_zero_is_the_base_bit_for_bit_and_scales_are_put_back():
    base = sample(pipeline())
    pipe = with_lora(pipeline())
    full = sample(pipe)
    assert torch.equal(sample(pipe, lora_scale=0.0), base)
    assert torch.equal(sample(pipe, lora_scale=1.0), full)
    assert not torch.equal(full, base)
    half = sample(pipe, lora_scale=0.5)
    assert not torch.equal(half, full)
    assert not torch.equal(half, base)


def test_adapter_strength_is_linear_in_the_scale():
    pipe = with_lora(pipeline())
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(2, layer.in_features)

    def change(scale):
        with torch.no_grad(), adapter_strength(pipe.transformer, scale):
            return layer(x) - layer.base_layer(x)

    assert torch.allclose(change(0.5) * 2, change(1.0), atol=1e-5)
    assert not change(0.0).any()


def test_text_to_video_equals_the_stock_pipeline_in_fp32():
    pipe = small_text_to_video()
    pipe.prompt_template_encode_start_idx, pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 4, 32, 16
    pipe.set_progress_bar_config(disable=True)
    height, width = video_size(pipe, 9 / 16)
    stock = stock_video(pipe, height=height, width=width)
    ours = generate_video(pipe, None, 'a cat says "hi"', seed=1, frames=5, steps=3, aspect=9 / 16)
    assert ours.shape == (3, 5, height, width)
    assert height > width
    assert torch.allclose(ours.transpose(0, 1) / 2 + 0.5, stock, atol=1e-5)
    with pytest.raises(UserError, match="leave out --image_path"):
        sample(pipe)


def test_image_to_video_without_a_picture_is_refused_with_the_flag_to_give():
    with pytest.raises(UserError, match="--image_path"):
        generate_video(pipeline(), None, "a cat", seed=1, frames=5)


def test_frames_that_are_not_4n_plus_1_are_refused_before_any_work():
    with pytest.raises(UserError, match="--video_length 60 .* use 57 or 61"):
        sample(pipeline(), frames=60)


def test_the_picture_is_cropped_to_its_bucket_and_not_squeezed():
    pipe = pipeline()
    tall = fit_image(pipe, Image.new("RGB", (30, 120)))
    assert tall.height > tall.width
    assert tall.height % 16 == tall.width % 16 == 0
