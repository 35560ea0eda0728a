import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from vflora.data.images import to_signed, to_tensor
from vflora.errors import UserError
from vflora.judge import Judge
from vflora.models.random_weights import small_pipeline, small_text_to_video


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


def test_siglip_of_the_pipeline_sees_what_its_own_processor_would_show_it(pipeline):
    picture = Image.effect_noise((28, 28), 80).convert("RGB")
    with torch.no_grad():
        pixels = pipeline.feature_extractor(images=picture, return_tensors="pt").pixel_values
        expected = pipeline.image_encoder(pixels).pooler_output[0]
    ours = Judge.from_pipeline(pipeline).embed(to_signed(to_tensor(picture))[None])[0]
    assert torch.allclose(ours, expected / expected.norm(), atol=1e-4)
    assert ours.norm() == pytest.approx(1, abs=1e-5)


def test_any_vision_model_of_transformers_can_judge(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    judge = Judge.load(tmp_path / "dinov2")
    vectors = judge.embed(torch.rand(3, 3, 40, 50) * 2 - 1)
    assert vectors.shape == (3, 16)
    assert not vectors.requires_grad
    assert judge.name == "dinov2"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no model in"):
        Judge.load(tmp_path)


def test_a_text_to_video_pipeline_has_no_judge():
    with pytest.raises(UserError, match="image-to-video"):
        Judge.from_pipeline(small_text_to_video())
