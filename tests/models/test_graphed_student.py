import pytest
import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from vflora.models.denoiser import Denoiser
from vflora.models.graphed_student import FixedGradients, GraphedStudent
from vflora.models.lean_lora import lean_lora
from vflora.models.lora import add_lora
from vflora.models.random_weights import randomise_lora, small_transformer
from vflora.models.recompute import BlockRecompute
from vflora.models.replay import FixedInputs, Recordings, shapes


def make(device="cpu", recompute="false", kept=0):
    transformer = small_transformer(layers=3)
    add_lora(transformer, rank=2, alpha=2, dropout=0.0, targets=None, seed=0)
    randomise_lora(transformer.named_parameters(), std=0.02)
    lean_lora(transformer)
    transformer.to(device)
    blocks = BlockRecompute(transformer, recompute)
    blocks.kept = kept or blocks.kept
    return Denoiser(transformer), blocks


def latents(seed):
    return torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def learn(student, denoiser, conditions, seeds, device="cpu"):
    """Two passes whose gradients add up, as in a step."""
    velocities = []
    for seed in seeds:
        x = latents(seed).expand(len(conditions), -1, -1, -1, -1).to(device)
        velocities.append(student.velocity(x, 0.1 * seed + 0.3, conditions))
        velocities[-1].square().sum().backward()
    gradients = {name: p.grad for name, p in denoiser.lora_parameters().items()}
    for parameter in denoiser.lora_parameters().values():
        parameter.grad = None
    return velocities, {n: torch.zeros_like(denoiser.lora_parameters()[n]) if g is None else g.clone()
                        for n, g in gradients.items()}  # fmt: skip


class NothingFromMainMemory(TorchDispatchMode):
    """Fails where a tensor of main memory meets the device: a copy that a graph cannot replay."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        brought = [t for t in tensors if t.device.type == "cpu"]
        assert not brought, f"{function} takes {[tuple(t.shape) for t in brought]} from main memory"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [(7,), (7, 9)])
@pytest.mark.parametrize("recompute", ["true", "false"])
def test_a_pass_waits_for_nothing_and_brings_nothing_from_main_memory(recompute, lengths, make_conditions):
    # On the meta device whatever asks for a value fails, and the mode sees what comes from elsewhere.
    denoiser, _ = make("meta", recompute)
    batch = latents(0).expand(len(lengths), -1, -1, -1, -1).to("meta")
    inputs = FixedInputs.like(batch, 0.5, make_conditions(lengths).to("meta"), 0.4)
    with NothingFromMainMemory():
        velocity = inputs.velocity(denoiser)
        assert velocity.shape == inputs.latents.shape
        torch.autograd.grad(velocity, list(denoiser.lora_parameters().values()), velocity, allow_unused=True)
        with denoiser.teacher():
            inputs.velocity(denoiser)


def test_without_cuda_it_is_the_denoiser(make_conditions):
    denoiser, blocks = make()
    student = GraphedStudent(denoiser, blocks)
    expected = learn(denoiser, denoiser, make_conditions(), (1, 2))
    for _ in range(3):
        velocities, gradients = learn(student, denoiser, make_conditions(), (1, 2))
        assert all(torch.equal(a, b) for a, b in zip(velocities, expected[0], strict=True))
        assert all(torch.equal(gradients[name], expected[1][name]) for name in gradients)
    assert len(student.recordings) == 0


def test_gradients_at_fixed_addresses_keep_what_the_parameters_have():
    parameters = [Parameter(torch.ones(2, 3)), Parameter(torch.ones(4))]
    fixed = FixedGradients(parameters)
    fixed.views[0].fill_(7)  # of the step before
    fixed.put_in_place()
    assert all(p.grad is view and not view.any() for p, view in zip(parameters, fixed.views, strict=True))
    fixed.views[1].fill_(2)
    fixed.put_in_place()
    assert parameters[1].grad.tolist() == [2] * 4, "what is there adds up within a step"
    parameters[0].grad = torch.full((2, 3), 5.0)
    fixed.put_in_place()
    assert parameters[0].grad is fixed.views[0]
    assert (fixed.views[0].unique().tolist(), fixed.views[1].unique().tolist()) == ([5], [2])


def test_a_gradient_that_others_started_goes_on_where_only_some_parameters_have_one():
    parameters = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    fixed = FixedGradients(parameters)
    fixed.views[1].fill_(9)  # stale
    parameters[0].grad = torch.ones(2)
    fixed.put_in_place()
    assert [p.grad.tolist() for p in parameters] == [[1, 1], [0, 0]]


def test_fixed_inputs_take_the_values_of_another_call(make_conditions):
    inputs = FixedInputs.like(latents(0), 0.5, make_conditions(seed=0), 0.4)
    place = inputs.latents.data_ptr()
    other = make_conditions(seed=1)
    inputs.load(latents(1), 0.3, other, 0.2)
    assert torch.equal(inputs.latents, latents(1))
    assert inputs.latents.data_ptr() == place
    assert (inputs.sigma.tolist(), inputs.next_sigma.tolist()) == (pytest.approx([0.3]), pytest.approx([0.2]))
    assert torch.equal(inputs.conditions.prompt_embeds, other.prompt_embeds)
    assert torch.equal(inputs.conditions.first_frame, other.first_frame)


def test_calls_of_other_shapes_are_other_recordings(make_conditions):
    keys = {
        shapes(latents(0), make_conditions(lengths), next_sigma)
        for lengths in ((7,), (9,))
        for next_sigma in (None, 0.1, 0.2)
    }
    assert len(keys) == 4
    masked, other, full = (shapes(latents(0), make_conditions(n), None) for n in ((7, 9), (9, 8), (9, 9)))
    assert masked == other != full, "which tokens count is an input, whether all do is not"


def test_fixed_inputs_take_the_lengths_of_another_batch(make_conditions):
    denoiser, _ = make()
    batch = latents(0).expand(2, -1, -1, -1, -1)
    inputs = FixedInputs.like(batch, 0.5, make_conditions((9, 8)), None)
    inputs.load(batch, 0.5, make_conditions((4, 9)), None)
    with torch.no_grad():
        assert torch.equal(inputs.velocity(denoiser), denoiser.velocity(batch, 0.5, make_conditions((4, 9))))


def test_the_second_call_is_recorded_and_the_oldest_recording_goes_first():
    class Recording:
        def __init__(self, name):
            self.name = name

        def release(self):
            released.append(self.name)

    released = []
    recordings = Recordings(kept=2)
    for key in "abc":
        assert recordings.find(key, lambda: None) is None
    assert [recordings.find(key, lambda key=key: Recording(key)).name for key in "ab"] == ["a", "b"]
    assert recordings.find("a", lambda: None).name == "a"
    recordings.find("c", lambda: Recording("c"))
    assert (released, len(recordings)) == (["b"], 2)


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [1, 3])
def test_replayed_velocities_and_gradients_are_the_denoisers(kept, make_conditions):
    denoiser, blocks = make("cuda", "true", kept)
    student = GraphedStudent(denoiser, blocks)
    for _ in range(3):
        for lengths in ((7,), (9,), (7, 9), (9, 8)):
            conditions = make_conditions(lengths).to("cuda")
            plain, wanted = learn(denoiser, denoiser, conditions, (1, 2), "cuda")
            expected = [velocity.detach() for velocity in plain]
            del plain  # who steps aside from the student's stream must be gone before it records
            # The first pass is a plain one, and still alive when the second is recorded: so is a student's graph
            # that is kept for the identity loss.
            velocities, gradients = learn(student, denoiser, conditions, (1, 2), "cuda")
            assert all(torch.equal(a, b) for a, b in zip(velocities, expected, strict=True))
            assert all(torch.allclose(gradients[n], wanted[n], rtol=1e-4, atol=1e-6) for n in wanted)
            del velocities  # the other way round: the plain passes of the next turn
    assert len(student.recordings) == 3
