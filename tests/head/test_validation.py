import pytest
import torch
from PIL import Image
from torch import nn

from vflora.data.identities import IdentityIndex
from vflora.errors import UserError
from vflora.head.config import HeadConfig
from vflora.head.picture import draw_validation
from vflora.head.validation import ValidationFeatures, pair_cosines, score, validate
from vflora.head.validation_set import choose_samples, validation_features
from vflora.models.identity import FrozenBackbone
from vflora.models.projection_head import HeadSpec, new_head
from vflora.random_streams import keyed_generator, keyed_noise


def _features(spread: float, blur: float = 0.1) -> ValidationFeatures:
    ids = torch.arange(5).repeat_interleave(4)
    clean = keyed_noise((5, 16), "centres")[ids] + spread * keyed_noise((20, 16), "spread")
    return ValidationFeatures(clean, clean + blur * keyed_noise((20, 16), "blur"), ids)


def _index(root):
    return IdentityIndex.open(root, "identity_id", split="val")


def test_scores_of_a_case_that_can_be_checked_by_hand():
    # Two identities; one picture of the second lies nearest to the first.
    angles = torch.tensor([0.0, 10.0, 15.0, 90.0]).deg2rad()
    scores = score(torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0, 0, 1, 1]))
    cosine = torch.tensor([10.0, 75.0]).deg2rad().cos()
    assert scores.same_mean == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert scores.same_std == pytest.approx((cosine[0] - cosine[1]).item() / 2, abs=1e-6)
    different = torch.tensor([15.0, 90.0, 5.0, 80.0]).deg2rad().cos()
    assert scores.different_mean == pytest.approx(different.mean().item(), abs=1e-6)
    # Nearest neighbours: 0 -> 1 right, 1 -> 2 wrong, 2 -> 1 wrong, 3 -> 2 right; R is 1 for every picture.
    assert scores.recall_at_1 == pytest.approx(0.5)
    assert scores.map_at_r == pytest.approx(0.5)


def test_every_pair_counts_once_and_none_with_itself():
    ids = torch.tensor([0, 0, 1, 1, 1])
    same, different = pair_cosines(torch.eye(5), ids)
    assert (len(same), len(different)) == (1 + 3, 6)
    assert same.sum() == different.sum() == 0


def test_tighter_identities_rank_higher_and_degradation_is_measured():
    tight, loose = (validate(_features(spread), None) for spread in (0.2, 2.0))
    assert tight.rank > loose.rank
    assert tight.clean.recall_at_1 == 1.0
    assert validate(_features(0.2, blur=0.0), None).kept == pytest.approx(1.0, abs=1e-6)
    assert validate(_features(0.2, blur=2.0), None).kept < 0.9


def test_between_equal_retrieval_the_wider_gap_ranks_higher():
    near, far = (validate(_features(spread), None) for spread in (0.3, 0.1))
    assert near.rank[0] == far.rank[0] == 1.0
    assert far.rank > near.rank


def test_a_head_is_judged_without_dropout_and_left_in_its_mode():
    head = new_head(HeadSpec(16, (8, 4), dropout=0.5), keyed_generator(0)).train()
    first, second = (validate(_features(0.5), head) for _ in range(2))
    assert torch.equal(first.cosines["clean"], second.cosines["clean"])
    assert all(m.training for m in head.modules() if isinstance(m, nn.Dropout))


def test_the_picture_shows_both_kinds(tmp_path):
    draw_validation(validate(_features(0.5), None), "step 3", tmp_path / "deep" / "v.png")
    with Image.open(tmp_path / "deep" / "v.png") as image:
        assert image.size[0] > 800
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100


def test_validation_pictures_are_the_same_every_time_and_none_comes_twice(options):
    chosen = choose_samples(_index(options["wds_root"]), HeadConfig(**options))
    again = choose_samples(_index(options["wds_root"]), HeadConfig(**options))
    assert chosen == again
    assert len({sample.name for sample in chosen}) == len(chosen) == 6 * 4
    few = choose_samples(_index(options["wds_root"]), HeadConfig(**options | {"val_batches": 1}))
    assert len(few) == 4 * 2


def test_clean_and_degraded_features_differ_and_identities_are_sorted(options):
    config = HeadConfig(**options)
    backbone = FrozenBackbone.load(config.model_dir)
    found = validation_features(_index(config.wds_root), config, backbone, None)
    assert found.clean.shape == found.degraded.shape == (24, 16)
    assert not torch.allclose(found.clean, found.degraded, atol=1e-4)
    assert found.ids.tolist() == sorted(found.ids.tolist())


def test_a_validation_split_without_pairs_is_refused_with_the_way_out(options, tmp_path, write_split):
    write_split(tmp_path / "lonely", "val", [1, 1, 3])
    with pytest.raises(UserError, match="1 identities with two or more pictures.*--val_every 0"):
        choose_samples(_index(tmp_path / "lonely"), HeadConfig(**options))
