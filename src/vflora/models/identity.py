"""Who is in the picture: a frozen DINOv3 backbone and a projection head, differentiable down to the pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from vflora.errors import UserError
from vflora.model_check import check_json, check_weights
from vflora.models.projection_head import ProjectionHead, load_head
from vflora.models.resizing import resize

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_KINDS = ("dinov3_vit", "dinov3_convnext")
_EXAMPLE_MODEL = "facebook/dinov3-vitl16-pretrain-lvd1689m"


@dataclass(frozen=True)
class Preprocessing:
    """How the backbone wants its pixels.

    Attributes:
        size: height and width that every image is resized to, without keeping its aspect, as DINOv3's own
            image processor does.
        mean: per channel, subtracted from values in [0, 1].
        std: per channel, divided by.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD

    @classmethod
    def read(cls, model_dir: Path, config: PretrainedConfig) -> Self:
        """Reads preprocessor_config.json; where there is none, takes the size from the model's config."""
        path = model_dir / "preprocessor_config.json"
        fields = json.loads(path.read_text()) if path.is_file() else {}
        return cls(
            size=_size(fields.get("size") or config.image_size),
            mean=tuple(fields.get("image_mean") or _IMAGENET_MEAN),
            std=tuple(fields.get("image_std") or _IMAGENET_STD),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Maps [B, 3, H, W] in [-1, 1] to normalised pixels [B, 3, *size], fp32, differentiably."""
        pixels = (images.float() * 0.5 + 0.5).clamp(0, 1)
        pixels = resize(pixels, self.size, "bilinear")
        mean, std = (pixels.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std


def _size(value: int | Sequence[int] | dict[str, int]) -> tuple[int, int]:
    if isinstance(value, dict):
        edge = value.get("shortest_edge", 0)
        return value.get("height", edge), value.get("width", edge)
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width


def require_backbone(folder: Path) -> None:
    """Looks at the folder of a DINOv3, without loading it.

    Raises:
        UserError: if the folder is missing, incomplete, or another kind of model.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"There is no DINOv3 model in {folder}: accept its licence on its page and run "
            f"`hf download {_EXAMPLE_MODEL} --local-dir {folder}`."
        )
    advice = f"finish the download with `hf download {_EXAMPLE_MODEL} --local-dir {folder}`"
    kind = check_json(folder / "config.json", advice).get("model_type", "nameless")
    if kind not in _KINDS:
        raise UserError(
            f"{folder} holds a {kind} model, not DINOv3: pass the folder of a DINOv3 ViT or "
            f"ConvNeXt in the transformers layout, for example {_EXAMPLE_MODEL}."
        )
    check_weights(folder, advice)


class FrozenBackbone(nn.Module):
    """DINOv3, ViT or ConvNeXt: always in eval mode (in train mode it shifts its position code at random)."""

    def __init__(self, model: PreTrainedModel, preprocessing: Preprocessing, name: str) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.name = f"{model.config.model_type} {name}"

    @classmethod
    def load(
        cls, model_dir: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Loads a folder in the transformers layout; nothing is downloaded.

        Raises:
            UserError: if the folder is missing, incomplete, or another kind of model.
        """
        folder = Path(model_dir)
        require_backbone(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
        return cls(model.to(device), Preprocessing.read(folder, config), folder.resolve().name)

    @property
    def width(self) -> int:
        """Width of the features."""
        config = self.model.config
        return config.hidden_sizes[-1] if config.model_type == "dinov3_convnext" else config.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever the module around it does."""
        del mode
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns pooled features [B, width], fp32, of images [B, 3, H, W] in [-1, 1]."""
        pixels = self.preprocessing(images).to(self.model.dtype)
        return self.model(pixel_values=pixels).pooler_output.float()


class IdentityEmbedder(nn.Module):
    """Frozen backbone and frozen head: images in, unit vectors out, with gradients to the images only."""

    def __init__(self, backbone: FrozenBackbone, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        dino_model_dir: str | Path,
        dino_head_path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Loads both; the backbone runs in `dtype`, the head always in fp32.

        Raises:
            UserError: if either is missing, or the head belongs to a backbone of another width.
        """
        head = load_head(dino_head_path)
        backbone = FrozenBackbone.load(dino_model_dir, device, dtype)
        head.check_width(backbone.width, str(dino_head_path))
        return cls(backbone, head.to(device))

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return self.head.spec.dims[-1]

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: this module grades, it does not learn."""
        del mode
        return super().train(False)

    def embed(self, images: Tensor) -> Tensor:
        """Embeds images for comparison by dot product.

        Args:
            images: [B, 3, H, W] in [-1, 1], of any size and floating type, on any device; values outside are
                clamped, as an image file would clamp them.

        Returns:
            [B, D] fp32, each of length one, where the weights are.
        """
        return self.head(self.backbone(images.to(self.backbone.device)))

    forward = embed
