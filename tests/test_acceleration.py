import pytest
import torch
from torch import nn

from vflora.acceleration import cache_steps, offload_layers, parse_blocks, place
from vflora.errors import UserError
from vflora.models.random_weights import small_pipeline

CACHE = {"kind": "taylorcache", "skip_blocks": "", "start": 11, "end": 45, "total": 50, "interval": 4, "steps": 50}


@pytest.mark.parametrize(
    ("text", "blocks"),
    [("0-53", (0, 1, 2, 3)), ("53", ()), ("2, 0-1", (0, 1, 2)), ("", ()), ("1 3", (1, 3))],
)
def test_blocks_are_numbers_and_ranges_within_the_model(text, blocks):
    assert parse_blocks(text, 4, "--no_cache_block_id") == blocks


def test_anything_else_is_refused_with_the_way_to_write_it():
    with pytest.raises(UserError, match="--sage_blocks_range 'all' .* like 0-53"):
        parse_blocks("all", 4, "--sage_blocks_range")


def test_the_cache_leaves_the_named_blocks_alone():
    pipeline = small_pipeline(layers=3)
    cache_steps(pipeline, **CACHE | {"skip_blocks": "1"})
    hooked = [hasattr(block.attn, "_diffusers_hook") for block in pipeline.transformer.transformer_blocks]
    assert hooked == [True, False, True]


def test_a_cache_that_skips_every_block_is_refused():
    with pytest.raises(UserError, match="leaves no block"):
        cache_steps(small_pipeline(), **CACHE | {"skip_blocks": "0-1"})


def test_an_unknown_cache_is_refused_with_the_one_there_is():
    with pytest.raises(UserError, match="use --cache_type taylorcache"):
        cache_steps(small_pipeline(), **CACHE | {"kind": "teacache"})


def test_tiling_is_switched_on_only_when_asked_for():
    for tiling in (False, True):
        pipeline = small_pipeline()
        place(
            pipeline,
            torch.device("cpu"),
            offloading=True,
            group_offloading=None,
            overlap=False,
            vae_tiling=tiling,
        )
        assert pipeline.vae.use_tiling is tiling


def test_layers_that_are_read_without_being_called_come_with_what_reads_them():
    # torch's MultiheadAttention takes the weights of its out_proj and never calls it; on a GPU they would stay behind
    pipeline = small_pipeline()
    offload_layers(pipeline, torch.device("cpu"), overlap=False)
    assert brings_itself(pipeline.transformer.transformer_blocks[0].attn.to_q)
    pooling = [m for m in pipeline.image_encoder.modules() if isinstance(m, nn.MultiheadAttention)]
    assert pooling
    assert not any(brings_itself(inner) for module in pooling for inner in module.modules())
    assert brings_itself(pipeline.image_encoder)


def brings_itself(module):
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("group_offloading") is not None
