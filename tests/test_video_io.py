import resource

import numpy as np
import pytest
import torch

from vflora.errors import UserError
from vflora.video_io import enlarge, frame_grid, read_mp4, to_uint8_frames, write_mp4


def moving_square(frames=9, height=48, width=64):
    video = np.full((frames, height, width, 3), (40, 90, 160), np.uint8)
    for i in range(frames):
        video[i, 10:30, 3 * i : 3 * i + 20] = (220, 60, 30)
    return video


def test_a_video_comes_back_with_its_size_rate_and_colours(tmp_path):
    source = moving_square()
    path = write_mp4(tmp_path / "new" / "clip.mp4", source, fps=24)
    frames, fps = read_mp4(path)
    assert frames.shape == source.shape
    assert fps == 24
    # 4:2:0 halves the colour resolution, so edges differ; flat areas must be right to a few levels
    assert np.abs(frames[:, 40:, :].astype(int) - source[:, 40:, :]).max() <= 4
    assert np.abs(frames.astype(int) - source).mean() < 4


def test_the_index_is_in_front_and_the_pixels_are_what_browsers_decode(tmp_path):
    import av

    path = write_mp4(tmp_path / "clip.mp4", moving_square())
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


def test_odd_sides_get_one_more_row_and_column(tmp_path):
    frames, _ = read_mp4(write_mp4(tmp_path / "odd.mp4", moving_square(height=33, width=35)))
    assert frames.shape[1:3] == (34, 36)


def test_a_decoded_tensor_and_its_uint8_frames_are_the_same_video():
    frames = torch.from_numpy(moving_square())
    tensor = frames.permute(3, 0, 1, 2).float() / 127.5 - 1
    assert np.array_equal(to_uint8_frames(tensor), frames.numpy())
    assert to_uint8_frames(tensor * 10).max() == 255


@pytest.mark.parametrize("shape", [(3, 4, 8), (4, 5, 8, 8)])
def test_a_tensor_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"\[3, F, H, W\]"):
        to_uint8_frames(torch.zeros(shape))


def test_a_larger_video_is_scaled_to_the_longest_side(tmp_path):
    frames, _ = read_mp4(write_mp4(tmp_path / "small.mp4", moving_square(), max_side=32))
    assert frames.shape[1:3] == (24, 32)


def test_small_frames_are_enlarged_pixel_by_pixel_and_keep_their_colours(tmp_path):
    checks = np.zeros((2, 8, 8, 3), np.uint8)
    checks[:, ::2, ::2] = (220, 40, 40)
    large = enlarge(checks, 64)
    assert np.array_equal(large[:, 4::8, 4::8], checks)
    frames, _ = read_mp4(write_mp4(tmp_path / "large.mp4", large))
    assert np.abs(frames[:, 4::8, 4::8].astype(int) - checks).max() < 24
    frames, _ = read_mp4(write_mp4(tmp_path / "small.mp4", checks))
    assert np.abs(frames.astype(int) - checks).max() > 60
    assert enlarge(large, 64) is large


def test_the_same_frames_give_the_same_bytes_whatever_was_in_memory_before(tmp_path):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (9, 48, 64, 3), dtype=np.uint8).repeat(5, axis=1).repeat(5, axis=2)
    written = set()
    for size in generator.integers(1, 400_000, 12):
        generator.random(size)  # freed again, so the encoder's buffers start out different
        written.add(write_mp4(tmp_path / "clip.mp4", noise).read_bytes())
    assert len(written) == 1


def test_a_failure_in_the_middle_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = write_mp4(tmp_path / "clip.mp4", moving_square(frames=2))
    before = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (9, 128, 128, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as if the disk were full
    try:
        with pytest.raises(OSError, match="File too large"):
            write_mp4(path, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_truncated_file_is_named_in_the_error(tmp_path):
    whole = write_mp4(tmp_path / "clip.mp4", moving_square()).read_bytes()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(whole[:200])
    with pytest.raises(UserError, match=r"broken\.mp4"):
        read_mp4(broken)


def test_a_contact_sheet_has_a_row_for_each_video_and_shows_first_and_last_frame():
    videos = [moving_square(), moving_square(frames=2, height=64)]
    sheet = frame_grid(videos, ["base", "LoRA 0.7"], columns=4, cell_height=48)
    assert sheet.height == 2 * 12 + 2 * 48 + 6
    pixels = np.asarray(sheet)
    row = pixels[12:60]
    first, last = videos[0][0], videos[0][-1]
    where = [x for x in range(sheet.width - 64) if np.array_equal(row[:, x : x + 64], first)]
    assert len(where) == 1
    assert any(np.array_equal(row[:, x : x + 64], last) for x in range(where[0], sheet.width - 63))


def test_labels_must_match_the_videos():
    with pytest.raises(ValueError, match="one label"):
        frame_grid([moving_square()], [])
