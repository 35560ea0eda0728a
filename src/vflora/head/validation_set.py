"""The validation pictures of the head, as backbone features."""

from __future__ import annotations

import logging
from collections import Counter

import torch
from tqdm import tqdm

from vflora.data.augment import VaeRoundTrip, augment, for_validation
from vflora.data.decoding import FaultCounter, Faults, decode_sample
from vflora.data.head_needs import PICTURES_TO_VALIDATE
from vflora.data.identities import IdentityIndex
from vflora.data.images import to_tensor
from vflora.data.sampling import keyed_random
from vflora.data.shards import Sample
from vflora.distributed.launch import is_first
from vflora.errors import UserError
from vflora.head.config import HeadConfig
from vflora.head.validation import ValidationFeatures
from vflora.models.identity import FrozenBackbone
from vflora.random_streams import keyed_generator

logger = logging.getLogger(__name__)

_PER_PASS = 32


def choose_samples(index: IdentityIndex, config: HeadConfig) -> list[Sample]:
    """Chooses about --val_batches times P*K pictures, the same ones every time, sorted by identity.

    Raises:
        UserError: if there are no two identities with two pictures.
    """
    pools = index.with_at_least(PICTURES_TO_VALIDATE)
    if len(pools) < 2:
        raise UserError(
            f"The validation split has {len(pools)} identities with two or more pictures and needs two: "
            "pack more of its pictures into it (--val_split), or train without validation by --val_every 0."
        )
    limit = config.val_batches * config.pk_identities * config.pk_instances
    each = min(config.max_per_identity, max(config.pk_instances, limit // len(pools)))
    identities = sorted(pools)
    keyed_random(config.seed, "validation").shuffle(identities)
    chosen: list[Sample] = []
    for identity in identities:
        pool = list(pools[identity])
        keyed_random(config.seed, "validation", identity).shuffle(pool)
        chosen += pool[:each]
        if len(chosen) >= limit:
            break
    return sorted(chosen, key=lambda sample: (sample.label, sample.name))


@torch.no_grad()
def validation_features(
    index: IdentityIndex, config: HeadConfig, backbone: FrozenBackbone, round_trip: VaeRoundTrip | None
) -> ValidationFeatures:
    """Reads, degrades and encodes the pictures, once for the whole run.

    Args:
        index: of the validation split.
        config: how many pictures, and how they are cropped.
        backbone: that encodes them.
        round_trip: the VAE, where there is one.

    Raises:
        UserError: if there are too few, or too many are damaged.
    """
    samples = choose_samples(index, config)
    degraded_config = for_validation(config, crop=config.val_crop, degrade=True)
    clean_config = for_validation(config, crop=config.val_crop, degrade=False)
    counter = FaultCounter(config.max_bad_samples)
    clean, degraded, ids = [], [], []
    for start in tqdm(
        range(0, len(samples), _PER_PASS),
        desc="encoding validation pictures",
        delay=2,
        leave=False,
        disable=not is_first(),
    ):
        faults: Faults = {}
        read = [(s, decode_sample(s, index.size, faults)) for s in samples[start : start + _PER_PASS]]
        counter.add(faults)
        rows = [(sample, to_tensor(image)) for sample, image in read if image is not None]
        if not rows:
            continue
        images = torch.stack([image for _, image in rows]).to(backbone.device)
        for settings, features in ((clean_config, clean), (degraded_config, degraded)):
            generators = [keyed_generator(config.seed, "validation", sample.name) for sample, _ in rows]
            changed = augment(images, generators, settings, backbone.preprocessing.size, round_trip)
            features.append(backbone(changed))
        ids += [sample.label for sample, _ in rows]
    pictures = Counter(ids)
    kept = torch.tensor([pictures[identity] >= 2 for identity in ids], device=backbone.device)
    if len({identity for identity in ids if pictures[identity] >= 2}) < 2:
        raise UserError("Too few validation pictures can be read: see `vflora data check`, and pack them again.")
    logger.info("Validating on %d pictures of %d identities.", len(ids), len(pictures))
    return ValidationFeatures(torch.cat(clean)[kept], torch.cat(degraded)[kept], torch.tensor(ids)[kept.cpu()])
