from collections import Counter
from random import Random

import pytest

from vflora.data.sampling import (
    Acceptance,
    IdentityBatches,
    SecondaryCache,
    accept,
    attach_secondary,
    crop_box,
    keyed_random,
)
from vflora.data.shards import Sample
from vflora.errors import UserError


def sample(label, number=0) -> Sample:
    return Sample(f"{label}-{number}", label, "x.tar", 0, 0)


def pools(**sizes: int) -> dict[int, list[Sample]]:
    return {int(name[1:]): [sample(int(name[1:]), i) for i in range(size)] for name, size in sizes.items()}


COUNTS = {"rare": 10, "common": 40, "everywhere": 200}


class TestAcceptance:
    def test_probability_is_inverse_to_the_count(self):
        acceptance = Acceptance(COUNTS)
        assert acceptance.probability("rare") == 1.0
        assert acceptance.probability("common") == 0.25
        assert acceptance.probability("everywhere") == 0.05

    def test_characters_come_equally_often_and_the_frequent_ones_do_come(self):
        """Defect 1: a generator rebuilt for each sample is a threshold, and frequent characters never pass it."""
        stream = [sample(name, i) for name, count in COUNTS.items() for i in range(count)] * 40
        taken = Counter(s.label for s in accept(iter(stream), Acceptance(COUNTS), keyed_random(0, "a")))
        assert taken["rare"] == 400
        assert abs(taken["common"] - 400) < 80
        assert abs(taken["everywhere"] - 400) < 80

    def test_over_time_every_picture_of_a_frequent_character_is_taken(self):
        stream = [sample("everywhere", i) for i in range(200)] * 200
        taken = {s.key for s in accept(iter(stream), Acceptance(COUNTS), keyed_random(0, "a"))}
        assert len(taken) == 200

    def test_by_key_the_choice_is_always_the_same_and_follows_the_probability(self):
        acceptance = Acceptance(COUNTS)
        keys = [f"k{i}" for i in range(4000)]
        chosen = [key for key in keys if acceptance.accepts_key("common", key, seed=3)]
        assert chosen == [key for key in keys if acceptance.accepts_key("common", key, seed=3)]
        assert chosen != [key for key in keys if acceptance.accepts_key("common", key, seed=4)]
        assert abs(len(chosen) - 1000) < 100


class TestSecondary:
    def test_is_another_picture_of_the_same_character(self):
        rng = keyed_random(0, "stream")
        stream = [sample(rng.choice("abc"), rng.randint(0, 4)) for _ in range(3000)]
        draws = list(attach_secondary(iter(stream), 0.5, 8, keyed_random(0, "s")))
        with_secondary = [draw for draw in draws if draw.secondary]
        assert all(draw.secondary.label == draw.sample.label for draw in with_secondary)
        assert all(draw.secondary.key != draw.sample.key for draw in with_secondary)
        assert abs(len(with_secondary) - 1500) < 120

    def test_a_character_with_one_picture_never_gets_one(self):
        draws = attach_secondary(iter([sample("a")] * 50), 1.0, 8, keyed_random(0, "s"))
        assert all(draw.secondary is None for draw in draws)

    @pytest.mark.parametrize(("p_secondary", "expected"), [(0.0, 0), (1.0, 98)])
    def test_certain_and_impossible(self, p_secondary, expected):
        stream = [sample("ab"[i % 2], i) for i in range(100)]
        draws = list(attach_secondary(iter(stream), p_secondary, 8, keyed_random(0, "s")))
        assert sum(draw.secondary is not None for draw in draws) == expected

    def test_only_the_characters_seen_last_are_remembered(self):
        cache = SecondaryCache(2)
        for label in ("a", "b", "a", "c"):
            cache.remember(sample(label, 1))
        assert len(cache) == 2
        assert cache.draw(sample("b", 2), Random(0)) is None
        assert cache.draw(sample("a", 2), Random(0)) == sample("a", 1)

    def test_a_character_is_not_remembered_without_bound(self):
        cache = SecondaryCache(2)
        for i in range(1000):
            cache.remember(sample("a", i))
        drawn = {cache.draw(sample("a", -1), Random(i)).key for i in range(200)}
        assert drawn == {f"a-{i}" for i in range(992, 1000)}

    def test_without_room_there_are_none(self):
        draws = attach_secondary(iter([sample("a", i) for i in range(9)]), 1.0, 0, keyed_random(0, "s"))
        assert all(draw.secondary is None for draw in draws)


class TestCrop:
    @pytest.mark.parametrize("size", [(48, 100), (100, 48), (64, 64)])
    def test_only_the_long_side_is_cropped_and_by_the_right_part(self, size):
        generator = keyed_random(1, "crop")
        height, width = size
        for _ in range(300):
            left, top, right, bottom = crop_box(size, 0.92, 0.04, generator)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            kept = (right - left, width) if width >= height else (bottom - top, height)
            assert 0.87 <= kept[0] / kept[1] <= 0.97
            assert (bottom - top == height) if width >= height else (right - left == width)

    def test_size_and_place_both_vary(self):
        """Defect 1 again: the jitter was one constant."""
        generator = keyed_random(1, "crop")
        boxes = [crop_box((48, 100), 0.92, 0.04, generator) for _ in range(50)]
        assert len({box[2] - box[0] for box in boxes}) > 4
        assert len({box[0] for box in boxes}) > 4

    def test_keeping_everything_changes_nothing(self):
        assert crop_box((48, 100), 1.0, 0.0, keyed_random(0)) == (0, 0, 100, 48)


class TestIdentityBatches:
    def batches(self, pools, count, **settings):
        plan = IdentityBatches(
            pools, **{"identities": 2, "instances": 2, "max_per_identity": 16, "seed": 5, **settings}
        )
        return [plan.batch(number) for number in range(count)]

    def test_each_batch_has_p_identities_with_k_different_pictures(self):
        for batch in self.batches(pools(i0=5, i1=4, i2=9, i3=2, i4=3), 60):
            assert [len(set(batch[:2])), len(set(batch[2:]))] == [2, 2]
            assert batch[0].label == batch[1].label != batch[2].label == batch[3].label

    def test_an_epoch_shows_each_identity_once(self):
        batches = self.batches(pools(i0=5, i1=4, i2=9, i3=2), 40)
        for epoch in range(20):
            seen = [s.label for batch in batches[2 * epoch : 2 * epoch + 2] for s in batch[::2]]
            assert sorted(seen) == [0, 1, 2, 3]

    def test_an_identity_walks_through_its_pictures_before_it_repeats_one(self):
        batches = self.batches(pools(i0=6, i1=6), 6)
        for walk in (batches[:3], batches[3:]):
            seen = [s.key for batch in walk for s in batch if s.label == 0]
            assert len(set(seen)) == 6
        assert [s.key for b in batches[:3] for s in b] != [s.key for b in batches[3:] for s in b]

    def test_a_walk_is_bounded_and_the_next_one_takes_others(self):
        batches = self.batches(pools(i0=100, i1=100), 60, max_per_identity=4)
        first = {s.key for batch in batches[:2] for s in batch if s.label == 0}
        assert len(first) == 4
        assert len({s.key for batch in batches for s in batch if s.label == 0}) > 40

    def test_processes_get_different_identities_of_one_plan(self):
        six = pools(i0=4, i1=4, i2=4, i3=4, i4=4, i5=4)
        ranks = [self.batches(six, 9, identities=1, rank=rank, world_size=3) for rank in range(3)]
        together = self.batches(six, 9, identities=3)
        assert [a + b + c for a, b, c in zip(*ranks, strict=True)] == together

    def test_another_seed_gives_other_batches(self):
        many = pools(i0=9, i1=9, i2=9, i3=9)
        assert self.batches(many, 5) != self.batches(many, 5, seed=6)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"identities": 6}, "--pk_identities 6 .* fits? ?.*5 identities"),
            ({"identities": 3, "world_size": 2}, "use 2 to 2"),
            ({"instances": 1}, "--pk_instances 1"),
            ({"max_per_identity": 1}, "--max_per_identity 1"),
        ],
    )
    def test_what_cannot_be_filled_is_refused(self, settings, message):
        with pytest.raises(UserError, match=message):
            self.batches(pools(i0=3, i1=3, i2=3, i3=3, i4=3), 1, **settings)
