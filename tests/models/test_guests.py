import pytest
import torch

from vflora.models import guests
from vflora.models.guests import Guests
from vflora.models.random_weights import small_pipeline

TOKENS = torch.arange(1, 12)[None]


@pytest.fixture(params=["text_encoder", "text_encoder_2", "image_encoder"])
def encoder(request):
    return getattr(small_pipeline(), request.param).requires_grad_(False)


def run(encoder, device="cpu"):
    """What an encoder says: of a picture if it sees, else of tokens."""
    sees = encoder.main_input_name == "pixel_values"
    given = torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28) if sees else TOKENS
    with torch.no_grad():
        return encoder(given.to(device)).last_hidden_state.cpu()


@pytest.mark.parametrize("room", [True, False])
def test_a_guest_says_the_same_whole_and_layer_by_layer_and_leaves_whole(encoder, room, monkeypatch):
    monkeypatch.setattr(guests, "has_room", lambda device, size: room)
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    expected = run(encoder)
    visits = Guests(torch.device("cpu"))
    for _ in range(2):
        with visits.visit(encoder):
            assert torch.equal(run(encoder), expected)
        assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())


def test_where_there_is_no_room_only_two_layers_are_there_at_a_time_and_it_is_said(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(guests, "has_room", lambda device, size: False)
    encoder = small_pipeline().text_encoder.requires_grad_(False)
    visits = Guests(torch.device("cpu"))
    with visits.visit(encoder):
        run(encoder)
        here = {layer.mlp.down_proj.weight.untyped_storage().data_ptr() for layer in encoder.layers}
    gone = {layer.mlp.down_proj.weight.untyped_storage().data_ptr() for layer in encoder.layers}
    assert len(here) == min(2, len(encoder.layers))
    assert not here & gone
    with visits.visit(encoder):
        pass
    assert ["layer by layer" in message for message in caplog.messages] == [True]


def test_a_guest_for_whom_the_room_is_in_pieces_comes_layer_by_layer(monkeypatch):
    encoder = small_pipeline().text_encoder.requires_grad_(False)
    expected = run(encoder)

    def refuse(device):
        if device.type != "cpu" or not arrived:
            arrived.append(device)
            raise torch.OutOfMemoryError("no piece is large enough")
        return encoder

    arrived = []
    monkeypatch.setattr(encoder, "to", lambda where: refuse(torch.device(where)))
    with Guests(torch.device("cpu")).visit(encoder):
        assert torch.equal(run(encoder), expected)
    assert len(arrived) == 1


def test_a_guest_leaves_when_its_work_fails(monkeypatch):
    monkeypatch.setattr(guests, "has_room", lambda device, size: False)
    encoder = small_pipeline().text_encoder.requires_grad_(False)
    visits = Guests(torch.device("cpu"))
    expected = run(encoder)
    with pytest.raises(RuntimeError, match="broken"), visits.visit(encoder):
        raise RuntimeError("broken")
    with visits.visit(encoder):
        assert torch.equal(run(encoder), expected)


@pytest.mark.parametrize("room", [True, False])
def test_a_guest_who_comes_once_leaves_without_weights(encoder, device, room, monkeypatch):
    monkeypatch.setattr(guests, "has_room", lambda device, size: room)
    expected = run(encoder)
    with Guests(torch.device(device), once=True).visit(encoder):
        torch.testing.assert_close(run(encoder, device), expected, rtol=1e-4, atol=1e-4)
    assert all(tensor.is_meta for tensor in (*encoder.parameters(), *encoder.buffers()))


@pytest.mark.gpu
def test_layer_by_layer_on_a_gpu_is_the_same_to_the_last_bit(encoder, monkeypatch):
    visits = {room: Guests(torch.device("cuda")) for room in (True, False)}
    found = []
    for room in (True, False, False):
        monkeypatch.setattr(guests, "has_room", lambda device, size, room=room: room)
        with visits[room].visit(encoder):
            found.append(run(encoder, "cuda"))
        assert {tensor.device.type for tensor in (*encoder.parameters(), *encoder.buffers())} == {"cpu"}
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
