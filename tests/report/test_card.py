from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from vflora.report import write_card
from vflora.report.card import card_text


@pytest.fixture
def comparison(tmp_path, make_comparison):
    return make_comparison(tmp_path, gains=(("Momo", 0.5), ("Zig | Zag", -0.2)), notice="Small models.")


def test_the_hub_reads_its_metadata(comparison):
    data = ModelCard(card_text(comparison, "tencent/HunyuanVideo-1.5")).data
    assert data.base_model == "tencent/HunyuanVideo-1.5"
    assert data.license == "other"
    assert data.get("license_name") == "tencent-hunyuan-community"
    assert data.pipeline_tag == "image-to-video"
    assert data.library_name == "diffusers"
    assert "lora" in data.tags


def test_the_hubs_gallery_shows_the_best_clips_with_their_prompts(comparison):
    shown = ModelCard(card_text(comparison, None)).data.to_dict()["widget"]
    names = [row.at(comparison.best_scale).path.name for row in comparison.ranked()]
    assert [entry["output"]["url"] for entry in shown] == [f"videos/{name}" for name in names]
    assert shown[0]["text"] == "Momo hops <fast> & far"


@pytest.mark.parametrize("place", [None, "/models/480p_i2v", "models"])
def test_a_model_that_is_not_on_the_hub_is_not_named_as_base_and_gets_no_licence(comparison, place):
    data = ModelCard(card_text(comparison, place)).data.to_dict()
    assert "base_model" not in data
    assert "license" not in data


def test_a_card_that_was_edited_stays_and_one_that_was_not_is_replaced(comparison, tmp_path):
    def write(title):
        return write_card(replace(comparison, title=title), tmp_path, base_model=None)

    card = write("First")
    assert write("Second") == card == tmp_path / "README.md"
    assert "# Second" in card.read_text()
    edited = card.read_text().replace("# Second", "# Mine")
    card.write_text(edited)
    for title in ("Third", "Fourth"):
        beside = write(title)
        assert beside == tmp_path / "README-2.md"
        assert f"# {title}" in beside.read_text()
    assert card.read_text() == edited


@pytest.mark.parametrize("text", ["", "# A project\n", "# A project\n\n<!-- a note -->\n"])
def test_a_readme_of_something_else_stays(comparison, tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert write_card(comparison, tmp_path, base_model=None) == tmp_path / "README-2.md"
    assert (tmp_path / "README.md").read_text() == text


def test_several_loras_are_named_as_they_were_given(comparison):
    text = card_text(replace(comparison, together=("fox.safetensors", "old style")), None)
    assert "--lora_path fox.safetensors 'old style' --lora_scale 0.5\n" in text
    assert "their files are not in this repository" in text
    assert "pytorch_lora_weights.safetensors" not in text


def test_card_and_preview_lie_beside_each_other_and_the_numbers_are_in_tables(comparison, tmp_path):
    text = write_card(comparison, tmp_path, base_model=None).read_text()
    assert "> Small models." in text
    assert "| Momo |" in text
    assert "| Zig \\| Zag |" in text
    assert text.index("| Momo |") < text.index("| Zig")
    assert f"| LoRA 0.5 | {comparison.identity(0.5):.3f} |" in text
    with Image.open(tmp_path / "preview.png") as preview:
        assert preview.width > preview.height
