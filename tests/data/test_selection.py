import pytest
from PIL import Image

from vflora.data.images import decode
from vflora.data.selection import near_duplicates, perceptual_hash, validation_keys


def groups(**sizes: int) -> dict[str, list[str]]:
    return {name: [f"{name}{i}" for i in range(size)] for name, size in sizes.items()}


def test_the_hash_hardly_moves_under_compression_and_scaling(kit):
    smooth = kit.picture(4, (120, 160)).resize((160, 120), Image.Resampling.BICUBIC, reducing_gap=None)
    smooth = smooth.resize((12, 9), Image.Resampling.BOX).resize((160, 120), Image.Resampling.BICUBIC)
    again = decode(kit.encoded(smooth.resize((320, 240)), "JPEG", quality=60))
    other = kit.picture(5, (120, 160))
    assert (perceptual_hash(smooth) ^ perceptual_hash(again)).bit_count() <= 2
    assert (perceptual_hash(smooth) ^ perceptual_hash(other)).bit_count() > 10


def test_only_hashes_further_apart_than_the_distance_stay():
    hashes = [("a", 0b0000), ("b", 0b0011), ("c", 0b0111), ("d", 0b1111), ("e", 0b0000)]
    assert near_duplicates(hashes, 2) == {"b": "a", "d": "c", "e": "a"}
    assert near_duplicates(hashes, 0) == {"e": "a"}
    assert near_duplicates(hashes, -1) == {}


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5])
def test_by_sample_the_part_is_met_overall_and_no_character_is_emptied(fraction):
    sizes = {"a": 4, "b": 4, "c": 4, "d": 4, "e": 4, "f": 1, "g": 30}
    chosen = validation_keys(groups(**sizes), fraction, "sample", seed=0)
    assert len(chosen) == round(fraction * 51)
    left = [key for keys in groups(**sizes).values() for key in keys if key not in chosen]
    assert {key[0] for key in left} == set(sizes)


def test_by_sample_frequent_characters_give_their_share():
    chosen = validation_keys(groups(a=100, b=20, c=10), 0.1, "sample", seed=0)
    assert sum(key.startswith("a") for key in chosen) == 10
    assert sum(key.startswith("b") for key in chosen) == 2
    assert sum(key.startswith("c") for key in chosen) == 1


def test_by_sample_a_small_data_set_holds_pairs_out_for_the_head():
    made = groups(**{name: 8 for name in "abcdefghijkl"})
    chosen = validation_keys(made, 0.1, "sample", seed=0)
    counts = sorted(len(chosen & set(keys)) for keys in made.values())
    assert counts == [0] * 7 + [2] * 5


@pytest.mark.parametrize("characters", [2, 3, 4, 5])
@pytest.mark.parametrize("pictures", [6, 7, 8, 10, 16])
@pytest.mark.parametrize("fraction", [0.01, 0.1])
def test_by_sample_few_characters_hold_two_pairs_out_however_few_pictures_there_are(characters, pictures, fraction):
    made = groups(**{name: pictures for name in "abcde"[:characters]})
    chosen = validation_keys(made, fraction, "sample", seed=42)
    counts = [len(chosen & set(keys)) for keys in made.values()]
    assert sum(count >= 2 for count in counts) >= 2
    assert max(counts) == 2


@pytest.mark.parametrize("sizes", [{"a": 100, "b": 6}, {"a": 60, "b": 8, "c": 8}, {"a": 6, "b": 6, "c": 3, "d": 2}])
def test_by_sample_the_second_pair_comes_from_whoever_has_room_for_it(sizes):
    made = groups(**sizes)
    chosen = validation_keys(made, 0.1, "sample", seed=0)
    counts = {name: len(chosen & set(keys)) for name, keys in made.items()}
    assert sum(count >= 2 for count in counts.values()) == 2
    assert all(sizes[name] >= 6 for name, count in counts.items() if count >= 2)


def test_by_sample_nothing_is_held_out_where_nothing_was_asked_for():
    assert validation_keys(groups(a=8, b=8), 0.0, "sample", seed=0) == set()


def test_by_sample_no_pair_is_held_out_where_too_few_would_stay_to_train_on():
    made = groups(a=5, b=5, c=5, d=5)
    chosen = validation_keys(made, 0.2, "sample", seed=0)
    assert all(len(chosen & set(keys)) == 1 for keys in made.values())


def test_by_identity_whole_characters_validate():
    made = groups(a=3, b=3, c=3, d=3)
    chosen = validation_keys(made, 0.5, "identity", seed=0)
    assert sorted(len(chosen & set(keys)) for keys in made.values()) == [0, 0, 3, 3]
    assert len(validation_keys(made, 0.01, "identity", seed=0)) == 3
    assert len(validation_keys(made, 0.99, "identity", seed=0)) == 9
    assert validation_keys(made, 0.0, "identity", seed=0) == set()
    assert validation_keys(groups(a=3), 0.5, "identity", seed=0) == set()


@pytest.mark.parametrize(("by", "fraction"), [("sample", 0.3), ("sample", 0.05), ("identity", 0.3)])
def test_the_seed_decides_and_the_order_of_input_does_not(by, fraction):
    made = groups(a=20, b=20, c=20, d=20, e=20, f=20)
    turned = {name: keys[::-1] for name, keys in reversed(made.items())}
    assert validation_keys(made, fraction, by, seed=0) == validation_keys(turned, fraction, by, seed=0)
    assert validation_keys(made, fraction, by, seed=0) != validation_keys(made, fraction, by, seed=1)
