"""Batch -> Conditions: text, quoted text, vision and the first frame's latent, encoded once and kept."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15ImageToVideoPipeline
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from vflora.distributed.launch import is_first
from vflora.errors import UserError
from vflora.models.guests import Guests
from vflora.models.loading import load_encoders
from vflora.models.video_vae import encode_first_frame
from vflora.types import Conditions

logger = logging.getLogger(__name__)

_MEMORY_BYTES = 2 << 30


class ConditionCache:
    """Tensors by content: the newest two gigabytes in memory, everything on disk if there is a folder."""

    def __init__(self, folder: Path | None):
        """Takes the folder; None keeps entries in memory only."""
        self._folder = folder
        self._memory: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Returns the entry, or None; a damaged file, as a power cut leaves them, counts as none."""
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            entry = load_file(path)
        except SafetensorError as error:
            logger.warning("%s is damaged (%s) and is made again", path, error)
            return None
        self._remember(key, entry)
        return entry

    def put(self, key: str, entry: dict[str, Tensor], *, on_disk: bool = True) -> None:
        """Keeps an entry; on disk it appears whole or not at all.

        Raises:
            UserError: if the disk does not take it.
        """
        self._remember(key, entry)
        path = self._path(key) if on_disk else None
        if path is None:
            return
        temporary = path.with_suffix(f".{uuid4().hex}.tmp")  # the folder may be shared by several machines
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in entry.items()}, temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise UserError(
                f"encoded prompts and pictures cannot be kept in {self._folder} ({error}): make room there, or choose "
                "another --condition_cache."
            ) from error

    def _path(self, key: str) -> Path | None:
        return self._folder / key[:2] / f"{key}.safetensors" if self._folder else None

    def _remember(self, key: str, entry: dict[str, Tensor]) -> None:
        self._memory[key] = entry
        self._bytes += _bytes(entry)
        while self._bytes > _MEMORY_BYTES and len(self._memory) > 1:
            _, oldest = self._memory.popitem(last=False)
            self._bytes -= _bytes(oldest)


def _bytes(entry: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in entry.values())


class ConditionEncoder:
    """Encodes prompts and reference images with the pipeline's own code, each distinct one once.

    The text and vision encoders are loaded at the first miss and are on the accelerator only while they encode,
    so a run whose cache is complete never loads them.
    """

    def __init__(
        self,
        pipeline_dir: str,
        vae: AutoencoderKLHunyuanVideo15,
        *,
        size: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        cache_folder: Path | None = None,
        keep_images_on_disk: bool = True,
    ):
        """Takes the frozen VAE and the clip's size.

        Args:
            pipeline_dir: where the encoders are.
            vae: of the same pipeline, already on `device`.
            size: height and width of the clip, pixels.
            dtype: of the encoders and of the embeddings.
            device: where to encode, and where conditions are returned.
            cache_folder: keeps entries across runs.
            keep_images_on_disk: false where every image comes only once, as with augmentation.
        """
        self._pipeline_dir, self._vae, self._size = pipeline_dir, vae, size
        self._dtype, self._device = dtype, device
        self._keep_images = keep_images_on_disk
        self._cache = ConditionCache(cache_folder)
        self._fingerprint = pipeline_fingerprint(pipeline_dir, dtype)
        self._guests = Guests(device)
        self._pipeline: HunyuanVideo15ImageToVideoPipeline | None = None

    def encode(self, prompts: Sequence[str], images: Tensor) -> Conditions:
        """Returns the conditions of B samples on the device.

        Args:
            prompts: B texts.
            images: reference images, uint8 [B, 3, H, W].
        """
        self.prepare(prompts, images)
        rows = []
        for prompt, image in zip(prompts, images, strict=True):
            text, vision = self._cached(self._text_key(prompt)), self._cached(self._image_key(image))
            rows.append(
                Conditions(
                    prompt_embeds=text["prompt_embeds"][None],
                    prompt_lengths=(text["prompt_embeds"].shape[0],),
                    prompt_embeds_2=text["prompt_embeds_2"][None],
                    prompt_lengths_2=(text["prompt_embeds_2"].shape[0],),
                    image_embeds=vision["image_embeds"][None],
                    first_frame=vision["first_frame"][None],
                )
            )
        return Conditions.stack(rows).to(self._device)

    def keys(self, prompt: str, image: Tensor) -> tuple[str, str]:
        """Returns under which names the cache keeps a prompt and a picture: what they are, as digests."""
        return self._text_key(prompt), self._image_key(image)

    def _cached(self, key: str) -> dict[str, Tensor]:
        entry = self._cache.get(key)
        if entry is None:
            raise KeyError(f"condition {key} was prepared and is gone: the batch does not fit the memory cache")
        return entry

    @torch.no_grad()
    def prepare(self, prompts: Sequence[str], images: Tensor) -> None:
        """Encodes whatever of this is not in the cache yet, in one visit of the encoders to the device."""
        texts = [p for p in dict.fromkeys(prompts) if self._cache.get(self._text_key(p)) is None]
        pictures = {key: image for image in images if self._cache.get(key := self._image_key(image)) is None}
        if not texts and not pictures:
            return
        pipeline = self._loaded_pipeline()
        with tqdm(
            total=len(texts) + len(pictures), desc="encoding conditions", leave=False, delay=2, disable=not is_first()
        ) as bar:
            if texts:
                with self._guests.visit(pipeline.text_encoder, pipeline.text_encoder_2):
                    for prompt in texts:
                        self._cache.put(self._text_key(prompt), self._encode_text(pipeline, prompt))
                        bar.update()
            if pictures:
                with self._guests.visit(pipeline.image_encoder):
                    for key, image in pictures.items():
                        entry = self._encode_image(pipeline, image)
                        self._cache.put(key, entry, on_disk=self._keep_images)
                        bar.update()

    def _loaded_pipeline(self) -> HunyuanVideo15ImageToVideoPipeline:
        if self._pipeline is None:
            self._pipeline = load_encoders(self._pipeline_dir, self._vae, self._dtype)
        return self._pipeline

    def _encode_text(self, pipeline: HunyuanVideo15ImageToVideoPipeline, prompt: str) -> dict[str, Tensor]:
        # The embeddings of valid tokens do not depend on the padding after them, so a first pass over a row as
        # long as the prompt itself replaces one over 1,000 tokens.
        tokens = pipeline.tokenizer(prompt).input_ids
        pipeline.tokenizer_max_length = min(1000, len(tokens) + 32)
        embeds, mask, embeds_2, mask_2 = pipeline.encode_prompt(
            prompt, device=self._device, dtype=self._dtype, batch_size=1
        )
        return {
            "prompt_embeds": embeds[0, : int(mask.sum())].cpu(),
            "prompt_embeds_2": embeds_2[0, : int(mask_2.sum())].cpu(),
        }

    def _encode_image(self, pipeline: HunyuanVideo15ImageToVideoPipeline, image: Tensor) -> dict[str, Tensor]:
        height, width = self._size
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        picture = pipeline.video_processor.resize(picture, height=height, width=width, resize_mode="crop")
        embeds = pipeline.encode_image(picture, batch_size=1, device=self._device, dtype=self._dtype)
        pixels = pipeline.video_processor.preprocess(picture, height=height, width=width)
        return {"image_embeds": embeds[0].cpu(), "first_frame": encode_first_frame(self._vae, pixels)[0].cpu()}

    def _text_key(self, prompt: str) -> str:
        return _content_key(self._fingerprint, b"text", prompt.encode())

    def _image_key(self, image: Tensor) -> str:
        shape = f"{tuple(image.shape)}->{self._size}".encode()
        return _content_key(self._fingerprint, b"image", shape, image.cpu().contiguous().numpy().tobytes())


def _content_key(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def pipeline_fingerprint(pipeline_dir: str, dtype: torch.dtype) -> bytes:
    """Identifies the encoders cheaply: configurations whole, weights by size and three samples of each file.

    A hub name stands for itself.
    """
    parts = ("text_encoder", "text_encoder_2", "image_encoder", "tokenizer", "vae")
    return weights_fingerprint(pipeline_dir, parts, str(dtype).encode())


def weights_fingerprint(pipeline_dir: str, parts: Sequence[str], start: bytes = b"") -> bytes:
    """As `pipeline_fingerprint`, of any folders of the pipeline; `start` joins the digest."""
    digest = hashlib.blake2b(start, digest_size=16)
    folder = Path(pipeline_dir)
    if not folder.is_dir():
        digest.update(pipeline_dir.encode())
        return digest.digest()
    for part in parts:
        for path in sorted((folder / part).rglob("*")):
            if path.suffix == ".safetensors":
                digest.update(_sampled(path))
            elif path.suffix == ".json":
                digest.update(path.read_bytes())
    return digest.digest()


def _sampled(path: Path) -> bytes:
    size, chunk = path.stat().st_size, 1 << 16
    digest = hashlib.blake2b(f"{path.name}:{size}".encode())
    with path.open("rb") as file:
        for offset in (0, size // 2, max(0, size - chunk)):
            file.seek(offset)
            digest.update(file.read(chunk))
    return digest.digest()
