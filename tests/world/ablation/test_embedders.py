from vflora.world.ablation.embedders import Sight, embedder_sights, sight_table
from vflora.world.ablation.lab import LabConfig


def test_the_identity_head_sees_who_moves_and_pixels_see_only_that_something_moved(tmp_path):
    sights = embedder_sights(LabConfig(output=tmp_path, device="cpu"))
    head, pixels = sights["DINOv3 with the identity head"], sights["pixels"]
    assert head.moved > 0.9 > 0.5 > head.other
    assert pixels.moved < pixels.other, "to them, a creature that moves is less itself than another in its place"
    assert list(tmp_path.iterdir()) == []


def test_every_embedder_has_its_row():
    table = sight_table({"one": Sight(0.98, 0.1), "two": Sight(0.5, 0.75)})
    assert table.splitlines()[2:] == ["| one | 0.980 | 0.100 |", "| two | 0.500 | 0.750 |"]
