"""Switches for time and memory: the defaults change nothing, the rest does what it says."""

import itertools
import logging
from functools import partial

import pytest
import torch
import torch._dynamo

from vflora.errors import UserError
from vflora.models.denoiser import Denoiser
from vflora.models.fast_teacher import FastTeacher
from vflora.models.lora import add_lora
from vflora.models.precision import FrozenLinear
from vflora.models.random_weights import randomise_lora, small_transformer
from vflora.models.recompute import BlockRecompute
from vflora.models.speed import accelerate, compile_blocks
from vflora.models.speed_config import SpeedConfig

CPU = torch.device("cpu")


def make(config, layers=4):
    transformer = small_transformer(layers=layers)
    add_lora(transformer, rank=4, alpha=4, dropout=0.0, targets=None, seed=0)
    randomise_lora(transformer.named_parameters(), std=0.02)
    denoiser = Denoiser(transformer)
    return denoiser, accelerate(transformer, config, CPU)


def velocity_and_gradient(denoiser, conditions):
    latents = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    velocity = denoiser.velocity(latents, 0.7, conditions)
    velocity.square().sum().backward()
    return [velocity.detach()] + [
        torch.zeros_like(p) if p.grad is None else p.grad for p in denoiser.lora_parameters().values()
    ]


@pytest.fixture
def plain(make_conditions):
    transformer = small_transformer(layers=4)
    add_lora(transformer, rank=4, alpha=4, dropout=0.0, targets=None, seed=0)
    randomise_lora(transformer.named_parameters(), std=0.02)
    return velocity_and_gradient(Denoiser(transformer), make_conditions())


@pytest.mark.parametrize(
    "config",
    [
        SpeedConfig(),
        SpeedConfig(enable_gradient_checkpointing="true"),
        SpeedConfig(enable_gradient_checkpointing="false"),
        SpeedConfig(block_offload=True),
        SpeedConfig(rollout_precision="fp8", rollout_stride=2),
    ],
)
def test_exact_settings_and_rollout_settings_leave_the_student_alone(config, plain, make_conditions):
    denoiser, _ = make(config)
    got = velocity_and_gradient(denoiser, make_conditions())
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_it_does_not_matter_which_blocks_keep_their_activations(kept, plain, make_conditions):
    denoiser, acceleration = make(SpeedConfig(enable_gradient_checkpointing="true"))
    acceleration.recompute.kept = kept
    got = velocity_and_gradient(denoiser, make_conditions())
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_kept_blocks_run_once_and_the_others_twice(make_conditions):
    denoiser, acceleration = make(SpeedConfig(enable_gradient_checkpointing="true"))
    acceleration.recompute.kept = 3
    runs = [0] * 4
    for i, block in enumerate(denoiser.transformer.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    velocity_and_gradient(denoiser, make_conditions())
    assert runs == [2, 1, 1, 1]


def test_auto_recomputes_everything_where_memory_cannot_be_measured(transformer):
    recompute = BlockRecompute(transformer, "auto")
    recompute.end_step()
    assert transformer.gradient_checkpointing
    assert recompute.kept == 0


@pytest.fixture
def compiled(monkeypatch):
    """A denoiser with compiled blocks, and a list to which every call adds the number of the code that ran."""
    torch._dynamo.reset()
    ran, numbers = [], itertools.count()
    compile_function = torch.compile

    def backend(graph, inputs):
        number = next(numbers)
        return lambda *values: ran.append(number) or graph.forward(*values)

    monkeypatch.setattr(torch, "compile", partial(compile_function, backend=backend))
    transformer = small_transformer(layers=3)
    add_lora(transformer, rank=4, alpha=4, dropout=0.0, targets=None, seed=0)
    compile_blocks(transformer)
    yield Denoiser(transformer), ran
    torch._dynamo.reset()


def test_compiled_blocks_share_their_code_over_prompts_of_any_length(compiled, make_conditions):
    denoiser, ran = compiled
    for length in (5, 9, 13):
        with denoiser.teacher():
            denoiser.velocity(torch.randn(1, 4, 2, 4, 4), 0.5, make_conditions((length,)))
    assert ran == [0] * 9


def test_compiled_blocks_keep_their_code_when_videos_of_other_sizes_come_between(compiled, make_conditions):
    denoiser, ran = compiled
    for batch, frames in ((1, 2), (1, 3), (2, 2), (1, 2)):
        with denoiser.teacher():
            denoiser.velocity(torch.randn(batch, 4, frames, 4, 4), 0.5, make_conditions((7,) * batch))
    assert ran == [0] * 3 + [1] * 3 + [2] * 3 + [0] * 3, "a resumed run, which had not seen them, has the same code"


def test_compiling_for_the_cpu_is_refused():
    with pytest.raises(UserError, match="--compile is for GPUs.* drop it, or --mode fast"):
        make(SpeedConfig(compile=True))


def test_cudnn_attention_that_does_not_run_here_says_so(caplog, plain, make_conditions):
    with caplog.at_level(logging.WARNING):
        denoiser, _ = make(SpeedConfig(attention_backend="cudnn"))
    assert "cuDNN attention does not run here" in caplog.text
    assert torch.equal(velocity_and_gradient(denoiser, make_conditions())[0], plain[0])


def test_eight_bit_storage_reaches_every_layer_of_the_blocks():
    denoiser, _ = make(SpeedConfig(weight_storage="int8"))
    block = denoiser.transformer.transformer_blocks[0]
    assert isinstance(block.norm1.linear.base_layer, FrozenLinear)
    assert not [n for n, p in block.named_parameters() if "lora" not in n and p.ndim == 2]


def test_gradients_have_an_order_unless_the_kernel_has_none_or_nobody_wants_one():
    assert SpeedConfig().is_deterministic
    assert SpeedConfig.preset("low_memory").is_deterministic
    assert not SpeedConfig.preset("fast").is_deterministic  # with cuDNN's kernel
    assert not SpeedConfig(attention_backend="cudnn").is_deterministic
    assert not SpeedConfig(deterministic=False).is_deterministic


def test_rollouts_are_led_by_the_denoiser_itself_unless_asked_otherwise():
    denoiser, acceleration = make(SpeedConfig())
    assert acceleration.teacher(denoiser, lambda n: ()) is denoiser
    denoiser, acceleration = make(SpeedConfig(rollout_stride=2))
    assert isinstance(acceleration.teacher(denoiser, lambda n: ()), FastTeacher)


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"rollout_stride": 0}, "--rollout_stride"),
        ({"id_decode_tile": 8}, "--id_decode_tile"),
        ({"block_offload": True, "enable_gradient_checkpointing": "false"}, "drop --enable_gradient_checkpointing"),
        ({"rollout_precision": "fp8", "weight_storage": "int8"}, "--weight_storage fp8 or full"),
        ({"deterministic": True, "attention_backend": "cudnn"}, "--attention_backend native"),
    ],
)
def test_settings_that_cannot_work_name_their_fix(settings, fix):
    with pytest.raises(UserError, match=fix):
        SpeedConfig(**settings)
