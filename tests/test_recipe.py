from dataclasses import replace

import pytest
import torch

from vflora.config import IdentityConfig
from vflora.errors import NonFiniteError
from vflora.flow import clean_estimate
from vflora.identity_term import IdentityTerm
from vflora.losses import distillation_loss
from vflora.models.denoiser import Denoiser
from vflora.models.identity import FrozenBackbone, IdentityEmbedder, Preprocessing
from vflora.models.lora import add_lora
from vflora.models.projection_head import HeadSpec, new_head
from vflora.models.random_weights import randomise_lora, small_dinov3_vit, small_vae
from vflora.models.video_vae import decode_frames
from vflora.recipe import StepInputs, training_step
from vflora.step_clock import StepClock
from vflora.types import Point

CPU = torch.device("cpu")


@pytest.fixture
def student(transformer):
    add_lora(transformer, rank=4, alpha=4, dropout=0.0, targets=None, seed=0)
    denoiser = Denoiser(transformer)
    randomise_lora(denoiser.lora_parameters().items(), std=0.1)
    return denoiser


@pytest.fixture
def make_identity(tmp_path):
    def make(**settings) -> IdentityTerm:
        dino = small_dinov3_vit()
        dino.save_pretrained(tmp_path / "dino")
        backbone = FrozenBackbone(dino, Preprocessing.read(tmp_path / "dino", dino.config), "dino")
        head = new_head(HeadSpec(dino.config.hidden_size, (8,)), torch.Generator().manual_seed(0))
        config = IdentityConfig("unused", "unused", **settings)
        return IdentityTerm(config, small_vae().requires_grad_(False), IdentityEmbedder(backbone, head))

    return make


def make_inputs(conditions, weight=0.6, seed=0, deep=2):
    generator = torch.Generator().manual_seed(seed)
    points = [
        Point(index, sigma, *(torch.randn(len(conditions), 4, 3, 4, 4, generator=generator) for _ in range(2)))
        for index, sigma in enumerate((0.9, 0.7, 0.4))
    ]
    anchors = torch.randint(0, 256, (len(conditions), 3, 64, 64), generator=generator, dtype=torch.uint8)
    return StepInputs(conditions, points, deep, anchors, weight, (0, "frames", 0))


def gradients(denoiser):
    return {name: p.grad.clone() for name, p in denoiser.lora_parameters().items() if p.grad is not None}


@pytest.mark.parametrize(
    ("mode", "batch", "deep"), [("false", 1, 2), ("false", 2, 1), ("area", 2, 2), ("bicubic", 1, 0)]
)
def test_two_stage_gradient_equals_the_plain_one(student, make_identity, make_conditions, mode, batch, deep):
    identity = make_identity(id_decode_downsample_mode=mode)
    inputs = make_inputs(make_conditions((7,) * batch), deep=deep)
    report = training_step(student, identity, inputs, scale=1.0, clock=StepClock(CPU))
    staged = gradients(student)

    student.transformer.zero_grad()
    velocities = [student.velocity(point.latents, point.sigma, inputs.conditions) for point in inputs.points]
    pairs = zip(velocities, inputs.points, strict=True)
    errors = [distillation_loss(velocity, point.teacher_velocity) for velocity, point in pairs]
    clean = clean_estimate(inputs.points[deep].latents, inputs.points[deep].sigma, velocities[deep])
    frames = report.frames[0].tolist()
    pixels = decode_frames(identity.vae, identity._shrunk(clean), frames)
    embedded = identity.embedder.embed(pixels.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1))
    cosines = (embedded * identity.embed_anchors(inputs.anchors)[:, None]).sum(-1)
    (sum(errors) / 3 + 0.6 * (1 - cosines).mean()).backward()
    plain = gradients(student)

    assert staged.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(staged[name], plain[name], rtol=1e-3, atol=1e-6, msg=name)
    assert report.total == pytest.approx(report.distill + 0.6 * report.identity)


def test_without_identity_the_step_is_distillation_alone(student, make_identity, make_conditions):
    inputs = make_inputs(make_conditions(), weight=0.0)
    report = training_step(student, make_identity(), inputs, scale=1.0, clock=StepClock(CPU))
    assert report.identity is None
    assert report.cosines is None
    assert report.total == report.distill == pytest.approx(sum(report.distill_by_point) / 3)


def test_without_distillation_the_gradient_is_the_identitys_alone(student, make_identity, make_conditions):
    identity, inputs = make_identity(), make_inputs(make_conditions())
    report = training_step(student, identity, replace(inputs, distill_weight=0.0), scale=1.0, clock=StepClock(CPU))
    alone = gradients(student)
    assert report.total == pytest.approx(0.6 * report.identity)
    assert report.distill > 0
    student.transformer.zero_grad()
    training_step(student, identity, replace(inputs, identity_weight=0.0), scale=1.0, clock=StepClock(CPU))
    distilled = gradients(student)
    student.transformer.zero_grad()
    training_step(student, identity, inputs, scale=1.0, clock=StepClock(CPU))
    for name, together in gradients(student).items():
        torch.testing.assert_close(together, alone[name] + distilled[name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_batch_gives_the_mean_of_its_samples_gradients(student, make_identity, make_conditions):
    # Defect 2 of the reference: at batch 2 a sample met the conditions of the other.
    identity, conditions = make_identity(), make_conditions((7, 5))
    both = make_inputs(conditions)
    training_step(student, identity, both, scale=1.0, clock=StepClock(CPU))
    together = gradients(student)
    student.transformer.zero_grad()
    for index in range(2):
        row = slice(index, index + 1)
        alone = StepInputs(
            conditions.select(index),
            [Point(p.index, p.sigma, p.latents[row], p.teacher_velocity[row]) for p in both.points],
            both.deep,
            both.anchors[row],
            0.6,
            both.key,
        )
        training_step(student, identity, alone, scale=0.5, clock=StepClock(CPU))
    for name, expected in gradients(student).items():
        torch.testing.assert_close(together[name], expected, rtol=1e-3, atol=1e-6, msg=name)


def test_a_non_finite_part_is_named(student, make_identity, make_conditions):
    inputs = make_inputs(make_conditions(), weight=0.0)
    inputs.points[1].teacher_velocity[0, 0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="distillation loss at sigma 0.700 is not finite"):
        training_step(student, make_identity(), inputs, scale=1.0, clock=StepClock(CPU))


def test_gradient_checkpointing_changes_no_bit_of_the_gradient(student, make_identity, make_conditions):
    identity, inputs = make_identity(), make_inputs(make_conditions())
    training_step(student, identity, inputs, scale=1.0, clock=StepClock(CPU))
    kept = gradients(student)
    student.transformer.zero_grad()
    student.transformer.enable_gradient_checkpointing()
    training_step(student, identity, inputs, scale=1.0, clock=StepClock(CPU))
    assert all(torch.equal(kept[name], g) for name, g in gradients(student).items())


@pytest.mark.parametrize("deep", [2, 1])
def test_keeping_the_students_graph_saves_a_pass_and_changes_nothing_else(
    student, make_identity, make_conditions, deep
):
    identity, inputs = make_identity(), make_inputs(make_conditions(), deep=deep)
    passes = []
    student.transformer.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    plain = training_step(student, identity, inputs, scale=1.0, clock=StepClock(CPU))
    expected = gradients(student)
    student.transformer.zero_grad()
    kept = training_step(student, identity, inputs, scale=1.0, clock=StepClock(CPU), keep_graph=True)
    assert passes.count(False) == 1
    assert passes.count(True) == 2 * len(inputs.points)
    assert (kept.distill_by_point, kept.identity) == (plain.distill_by_point, plain.identity)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-9, msg=name)
