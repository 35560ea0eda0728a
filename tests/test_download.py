import logging
import shlex

import pytest

from vflora.download import DownloadConfig, all_parts, as_text, chosen_parts, run
from vflora.errors import UserError
from vflora.models.original_encoders import PARTS


def _commands(text):
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_every_part_has_a_command_a_size_and_a_licence(layout):
    config = DownloadConfig(layout=layout)
    parts = chosen_parts(config)
    text = as_text(parts, config)
    assert len(_commands(text)) == len(parts)
    assert text.count("licence: ") == len(parts)
    assert all(part.gigabytes for part in parts)
    assert "Tencent Hunyuan Community License" in text
    assert "GB together" in text


def test_the_original_parts_land_where_the_loader_looks():
    folders = {part.folder.partition("/")[2] for part in all_parts(DownloadConfig(layout="original"))}
    assert set(PARTS.values()) <= folders


def test_the_version_picks_repository_and_files():
    config = DownloadConfig(transformer_version="720p_i2v")
    assert "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v" in as_text(chosen_parts(config), config)
    config = DownloadConfig(layout="original", transformer_version="720p_i2v")
    assert "'transformer/720p_i2v/*'" in as_text(chosen_parts(config), config)


def test_gated_parts_say_where_to_accept_the_licence():
    config = DownloadConfig(layout="original")
    text = as_text(chosen_parts(config), config)
    for source in ("black-forest-labs/FLUX.1-Redux-dev", "facebook/dinov3-vitl16-pretrain-lvd1689m"):
        assert f"https://huggingface.co/{source}" in text


def test_nothing_is_downloaded_unless_asked(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(DownloadConfig(output_dir=tmp_path / "models"))
    assert "hf download" in caplog.text
    assert not (tmp_path / "models").exists()


def test_optional_parts_come_only_by_name():
    assert "head" not in [part.key for part in chosen_parts(DownloadConfig())]
    assert [part.key for part in chosen_parts(DownloadConfig(parts=["head"]))] == ["head"]
    with pytest.raises(UserError, match="--parts nothing is unknown: choose from dino, head, model"):
        DownloadConfig(parts=["nothing"])


def test_without_a_network_the_user_learns_why(tmp_path):
    # the test session is offline (HF_HUB_OFFLINE), so this goes through the real client
    with pytest.raises(UserError, match="cannot be reached: check the network"):
        run(DownloadConfig(output_dir=tmp_path, parts=["head"], run=True))


def test_a_small_disk_is_noticed_first(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    with pytest.raises(UserError, match="choose another disk"):
        run(DownloadConfig(output_dir=tmp_path, run=True))


def test_a_missing_modelscope_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="pip install modelscope"):
        run(DownloadConfig(output_dir=tmp_path, layout="original", parts=["glyph"], run=True))
