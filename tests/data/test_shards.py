from pathlib import Path

import pytest

from vflora.data.images import decode
from vflora.data.schema import CharacterLabel
from vflora.data.shards import BadSampleError, BadShardError, check_ending, index_shard, scan_shard
from vflora.errors import UserError

LABEL = CharacterLabel("species", frozenset({"ada", "bob", "cleo"}))


@pytest.fixture
def shard(wds_root: Path) -> Path:
    return wds_root / "data" / "train" / "train-000000.tar"


def test_lists_samples_and_finds_their_pictures(kit, shard):
    samples = index_shard(shard, LABEL)
    assert [s.key for s in samples] == [
        *("ada-0", "bob-0", "bob-2", "bob-4"),
        *("cleo-0", "cleo-2", "cleo-4", "cleo-6", "cleo-8", "cleo-10"),
    ]
    assert samples[1].label == "bob"
    assert samples[1].name == "train-000000.tar: bob-0"
    assert decode(samples[2].read()).tobytes() == kit.picture(1002).tobytes()


def test_a_shard_is_listed_anew_when_it_changes(kit, shard):
    assert len(index_shard(shard, LABEL)) == 10
    kit.write_tar(shard, kit.sample_members("new", "ada", 0, kit.encoded(kit.picture(1))))
    assert [s.key for s in index_shard(shard, LABEL)] == ["new"]


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.77, 1.0])
def test_a_cut_off_shard_is_refused_cheaply_and_when_read(shard, keep):
    data = shard.read_bytes().rstrip(b"\0")
    shard.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UserError, match="cut off"):
        check_ending(shard)
    with pytest.raises(UserError, match="train-000000.tar cannot be read after sample"):
        index_shard(shard, LABEL)


def test_a_cut_between_two_members_is_noticed(shard):
    """Python's tarfile takes this for the end of the archive and says nothing."""
    data = shard.read_bytes()
    header = data.index(b"bob-2.png")
    shard.write_bytes(data[:header])
    with pytest.raises(BadShardError, match="cut off"):
        list(scan_shard(shard))


def test_a_damaged_header_does_not_hide_the_rest(shard):
    """Here too tarfile would stop without a word."""
    data = bytearray(shard.read_bytes())
    header = data.index(b"bob-2.png")
    data[header + 150] ^= 0xFF
    shard.write_bytes(data)
    check_ending(shard)
    with pytest.raises(BadShardError, match="damaged in the middle"):
        list(scan_shard(shard))


def test_what_is_no_tar_file_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"hello" * 1000)
    with pytest.raises(UserError, match="not a readable tar file"):
        index_shard(path, LABEL)


def test_two_members_of_one_name_are_refused(kit, tmp_path):
    members = kit.sample_members("a", "ada", 0, kit.encoded(kit.picture(1)))
    path = kit.write_tar(tmp_path / "x.tar", [*members, members[0]])
    with pytest.raises(BadShardError, match="same name"):
        list(scan_shard(path))


def test_members_that_are_no_pictures_or_json_are_never_touched(kit, tmp_path):
    members = kit.sample_members("a", "ada", 0, kit.encoded(kit.picture(1)))
    evil = [("a.pyd", b"cos\nsystem\n(S'false'\ntR."), ("a.pickle", b"x"), ("a.txt", b"words")]
    path = kit.write_tar(tmp_path / "x.tar", [*evil, *members])
    (raw,) = scan_shard(path)
    assert list(raw.images) == ["png"]
    assert [s.key for s in index_shard(path, LABEL)] == ["a"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"x")], "no JSON"),
        ([("a.json", b'{"species": "ada"}')], "has none"),
        ([("a.json", b'{"species": "ada"}'), ("a.png", b"x"), ("a.jpg", b"x")], "has jpg, png"),
        ([("a.json", b"{"), ("a.png", b"x")], "cannot be parsed"),
        ([("a.json", b"[" * 100_000), ("a.png", b"x")], "cannot be parsed"),
        ([("a.json", b"[]"), ("a.png", b"x")], "not an object"),
        ([("a.json", b"{}"), ("a.png", b"x")], "no field 'species'"),
        ([("a.json", b'{"species": 3}'), ("a.png", b"x")], "names no character"),
        ([("a.json", b'{"species": "  "}'), ("a.png", b"x")], "names no character"),
        ([("a.json", b'{"species": "zoe"}'), ("a.png", b"x")], "manifest does not list"),
    ],
)
def test_an_unusable_sample_is_named_with_its_shard(kit, tmp_path, members, message):
    path = kit.write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=message) as caught:
        index_shard(path, LABEL)
    assert "Sample 'a' of" in str(caught.value)
    assert "x.tar" in str(caught.value)


def test_metadata_that_would_fill_the_memory_is_refused(kit, tmp_path):
    path = kit.write_tar(tmp_path / "x.tar", [("a.json", b" " * (1 << 20) + b"{}")])
    with pytest.raises(BadShardError, match="no sample's metadata"):
        list(scan_shard(path))


def test_a_sample_without_a_picture_says_so(kit, tmp_path):
    (raw,) = scan_shard(kit.write_tar(tmp_path / "x.tar", [("a.json", b"{}")]))
    with pytest.raises(BadSampleError, match="exactly one picture"):
        raw.image()
