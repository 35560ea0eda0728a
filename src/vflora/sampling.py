"""From a loaded pipeline, a picture and a prompt to a video.

The sampling itself is diffusers'. `prepare_for_sampling` makes it precise and quick: text padding is dropped before
attention instead of being masked (exact), timesteps reach the transformer unrounded, and the latents are carried in
fp32 whatever the precision of the weights, as the original code does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import HunyuanVideo15Pipeline
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5_image2video import (
    HunyuanVideo15ImageToVideoPipeline,
)
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vflora.config import require_frames
from vflora.errors import UserError
from vflora.models.dense_attention import make_dense
from vflora.models.guests import Guests

Pipeline = HunyuanVideo15ImageToVideoPipeline | HunyuanVideo15Pipeline

_MARK = "_vflora_prepared_for_sampling"
_KEPT = "_vflora_prompts"
_TEXTS = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")


def is_text_to_video(pipeline: Pipeline) -> bool:
    """Says whether the pipeline starts from words alone."""
    return isinstance(pipeline, HunyuanVideo15Pipeline)


def default_steps(pipeline: Pipeline) -> int:
    """Returns the number of sampling steps the checkpoint was made for: 8 if step-distilled, else 50."""
    return 8 if pipeline.transformer.config.use_meanflow else 50


def default_guidance(pipeline: Pipeline) -> float:
    """Returns the classifier-free guidance that the pipeline samples with where nobody names another; 1 is none."""
    return pipeline.guider.guidance_scale


def video_size(pipeline: Pipeline, aspect: float) -> tuple[int, int]:
    """Returns height and width of the bucket nearest to `aspect` (width over height)."""
    return pipeline.video_processor.calculate_default_height_width(round(10_000 / aspect), 10_000, pipeline.target_size)


def fit_image(pipeline: Pipeline, image: Image.Image) -> Image.Image:
    """Scales and crops a picture to the bucket of its aspect, as the pipeline does before encoding it."""
    height, width = pipeline.video_processor.calculate_default_height_width(
        image.height, image.width, pipeline.target_size
    )
    resize = pipeline.video_processor.resize
    return cast(Image.Image, resize(image.convert("RGB"), height=height, width=width, resize_mode="crop"))


@torch.no_grad()
def keep_prompts(pipeline: Pipeline, prompts: Iterable[str], device: torch.device) -> None:
    """Encodes prompts and lets the text encoders go, in place: the pipeline then knows these prompts and no others.

    Of the real size they take 15 GB and the transformer 17: called before that is loaded, they are never there
    together.

    Args:
        pipeline: with text encoders in main memory; with or without a transformer.
        prompts: every one that will be asked for, negative ones too; the empty one is always kept.
        device: where to encode; text encoders that have no room there come layer by layer.
    """
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    dtype = pipeline.text_encoder.dtype
    kept = {}
    with (
        Guests(device, once=True).visit(*(encoder.requires_grad_(False) for encoder in encoders)),
        tqdm(list(dict.fromkeys(["", *prompts])), desc="encoding prompts", leave=False, delay=2) as bar,
    ):
        for prompt in bar:
            values = pipeline.encode_prompt(prompt, device=device, dtype=dtype, batch_size=1)
            kept[prompt] = {name: value.cpu() for name, value in zip(_TEXTS, values, strict=True)}
    pipeline.register_modules(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    setattr(pipeline, _KEPT, kept)


@torch.no_grad()
def generate_video(
    pipeline: Pipeline,
    image: Image.Image | None,
    prompt: str,
    *,
    seed: int,
    frames: int,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    lora_scale: float | None = None,
    aspect: float = 16 / 9,
) -> Tensor:
    """Generates one video.

    Args:
        pipeline: image to video, or text to video.
        image: first frame of an image-to-video model, None for text to video.
        prompt: what happens.
        seed: of the starting noise, drawn on the CPU, so that it is the same on every device.
        frames: 4n + 1.
        steps: of sampling; None for what the checkpoint was made for.
        guidance_scale: classifier-free guidance, 1 for none; None for the pipeline's own.
        negative_prompt: what guidance leads away from.
        lora_scale: strength of the loaded adapters, relative to what each was loaded with; 0 is the base model bit
            for bit; None leaves them as they are.
        aspect: width over height for text to video; with an image, its own counts.

    Returns:
        The video [3, F, H, W] in [-1, 1], fp32 on the CPU.

    Raises:
        UserError: if frames is not 4n + 1, image and kind of model do not go together, or the pipeline was loaded for
            other prompts.
    """
    require_frames("video_length", frames)
    _check_kind(pipeline, image)
    prepare_for_sampling(pipeline)
    steps = steps or default_steps(pipeline)
    inputs: dict = {"image": image.convert("RGB")} if image is not None else _size_inputs(pipeline, aspect)
    with adapter_strength(pipeline.transformer, lora_scale), _guided(pipeline, guidance_scale):
        output = pipeline(
            **_texts(pipeline, prompt, negative_prompt),
            num_frames=frames,
            num_inference_steps=steps,
            # Without explicit sigmas the scheduler shifts a schedule that it has shifted before.
            sigmas=torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)[:-1].tolist(),
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **inputs,
        )
    video = cast(Tensor, output.frames[0]).float().cpu()  # pyright: ignore[reportAttributeAccessIssue]
    return (video.transpose(0, 1) * 2 - 1).contiguous()


@contextmanager
def _guided(pipeline: Pipeline, scale: float | None) -> Iterator[None]:
    """Inside, the pipeline samples with this guidance; None is its own."""
    if scale is None:
        yield
        return
    own = pipeline.guider
    pipeline.guider = own.new(guidance_scale=float(scale))
    try:
        yield
    finally:
        pipeline.guider = own


def _texts(pipeline: Pipeline, prompt: str, negative_prompt: str) -> dict[str, str] | dict[str, Tensor]:
    kept: dict[str, dict[str, Tensor]] | None = getattr(pipeline, _KEPT, None)
    if kept is None:
        return {"prompt": prompt, "negative_prompt": negative_prompt}
    for text in (prompt, negative_prompt):
        if text not in kept:
            raise UserError(
                f"{text!r} was not encoded before the text encoders went: name it in `prompts` when loading."
            )
    return {**kept[prompt], **{f"negative_{name}": value for name, value in kept[negative_prompt].items()}}


def _check_kind(pipeline: Pipeline, image: Image.Image | None) -> None:
    if is_text_to_video(pipeline) and image is not None:
        raise UserError(
            "This is a text-to-video model, which takes no picture: leave out --image_path, or load an "
            "image-to-video model such as 480p_i2v."
        )
    if not is_text_to_video(pipeline) and image is None:
        raise UserError(
            "This is an image-to-video model: give the first frame with --image_path PICTURE, or load a "
            "text-to-video model."
        )


def _size_inputs(pipeline: Pipeline, aspect: float) -> dict[str, int]:
    height, width = video_size(pipeline, aspect)
    return {"height": height, "width": width}


@contextmanager
def adapter_strength(transformer: torch.nn.Module, scale: float | None) -> Iterator[None]:
    """Inside, every LoRA acts with `scale` times its own strength; at 0 the model is the base, bit for bit.

    Args:
        transformer: with or without adapters.
        scale: factor, or None for no change.
    """
    if scale is None:
        yield
        return
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    before = [(layer, dict(layer.scaling), layer._disable_adapters) for layer in layers]
    for layer, scaling, _ in before:
        layer._disable_adapters = scale == 0
        layer.scaling.update({name: value * scale for name, value in scaling.items()})
    try:
        yield
    finally:
        for layer, scaling, disabled in before:
            layer.scaling.update(scaling)
            layer._disable_adapters = disabled


def prepare_for_sampling(pipeline: Pipeline) -> None:
    """Makes the pipeline's transformer precise and free of padding, in place; a second call does nothing.

    Three differences to the stock pipeline, each towards the original code: timesteps are not rounded to bf16
    (an error of up to 2 in 1000), the noisy latents stay in fp32 between the steps, and padded text, or the picture
    that text to video does not have, is dropped rather than masked.
    """
    transformer = pipeline.transformer
    if getattr(transformer, _MARK, False):
        return
    make_dense(transformer)

    def before(_module: torch.nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
        inputs = dict(inputs)
        batch = inputs["hidden_states"].shape[0]
        now = cast(Tensor | None, pipeline._current_timestep)
        if now is not None:  # outside the pipeline's loop the caller's timesteps stand
            inputs["timestep"] = now.float().expand(batch)
            if inputs.get("timestep_r") is not None:
                inputs["timestep_r"] = _next_timestep(pipeline.scheduler.timesteps, now).expand(batch)
        if is_text_to_video(pipeline):  # it passes zeros for a picture, which the stock forward pass masks
            inputs["image_embeds"] = inputs["image_embeds"][:, :0]
        inputs["hidden_states"] = inputs["hidden_states"].to(transformer.dtype)
        for suffix in ("", "_2"):
            _drop_padding(inputs, f"encoder_hidden_states{suffix}", f"encoder_attention_mask{suffix}")
        return args, inputs

    def after(_module: torch.nn.Module, _args: tuple, output: tuple) -> tuple:
        return (output[0].float(), *output[1:])

    transformer.register_forward_pre_hook(before, with_kwargs=True)
    transformer.register_forward_hook(after)
    setattr(transformer, _MARK, True)


def _next_timestep(timesteps: Tensor, now: Tensor) -> Tensor:
    following = timesteps[timesteps < now]
    return following.max().float() if len(following) else torch.zeros((), device=timesteps.device)


def _drop_padding(inputs: dict, text: str, mask: str) -> None:
    """Cuts the text to its valid tokens if they come first and are as many in every row."""
    if inputs.get(mask) is None:
        return
    valid = inputs[mask].bool()
    lengths = valid.sum(dim=1).tolist()
    if len(set(lengths)) == 1 and bool(valid[:, : lengths[0]].all()):
        inputs[text], inputs[mask] = inputs[text][:, : lengths[0]], None
