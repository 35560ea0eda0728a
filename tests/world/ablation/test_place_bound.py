import torch

from vflora.models.identity import IdentityEmbedder
from vflora.world.ablation.embedders import embedder_sights
from vflora.world.ablation.lab import LabConfig
from vflora.world.ablation.place_bound import train_place_bound


def test_to_the_place_bound_embedder_a_creature_that_moves_is_less_itself(tmp_path):
    lab = LabConfig(output=tmp_path, device="cpu")
    folder = lab.embedder_folder(place_bound=True)
    folder.mkdir(parents=True)
    train_place_bound(lab.world_folder, folder, device=torch.device("cpu"), steps=6)
    sights = embedder_sights(lab)
    assert sights["DINOv3, place-bound"].moved < sights["DINOv3 with the identity head"].moved - 0.02
    embedder = IdentityEmbedder.load(folder / "dino", folder / "head")
    assert embedder.width == IdentityEmbedder.load(lab.world_folder / "dino", lab.world_folder / "head").width
