import pytest

from vflora.data.sizes import bucket_size, parse_size
from vflora.errors import UserError
from vflora.resolution import clip_size


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(1080, 1920)], (480, 848)),
        ([(1920, 1080)], (832, 480)),
        ([(512, 512), (512, 512), (100, 900)], (640, 640)),
    ],
)
def test_the_bucket_follows_the_median_shape(sizes, expected):
    assert bucket_size("480p", sizes) == expected


@pytest.mark.parametrize("sizes", [[(1080, 1920)], [(3, 4)], [(640, 640)], [(1000, 701)]])
@pytest.mark.parametrize("resolution", ["480p", "720p"])
def test_training_keeps_the_size_that_packing_chose(resolution, sizes):
    size = bucket_size(resolution, sizes)
    assert clip_size(resolution, size, 16) == size


def test_sizes_are_height_times_width():
    assert parse_size("480x848") == (480, 848)


@pytest.mark.parametrize(
    ("text", "message"),
    [("480", "HEIGHTxWIDTH"), ("480X848", "HEIGHTxWIDTH"), ("470x848", "use 464x848"), ("16x99999", "use 16x4096")],
)
def test_other_sizes_are_refused_with_the_nearest(text, message):
    with pytest.raises(UserError, match=message):
        parse_size(text)
