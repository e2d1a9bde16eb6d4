"""Fusion: how many positions a view takes, in what order, and the arithmetic of the projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import VISION

from sphinx_fast.model.config import SphinxVisionConfig
from sphinx_fast.model.presets import preset
from sphinx_fast.vision import Fusion, VisionFeatures

WIDTH = 24


def features(config: SphinxVisionConfig, views: int = 5) -> VisionFeatures:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(views, config.num_patch_tokens, config.patch_channels, generator=generator)
    if config.qformer_config is None:
        return VisionFeatures(patches, None)
    width = config.qformer_config.hidden_size
    return VisionFeatures(patches, torch.randn(views, config.num_query_tokens, width, generator=generator))


def fusion(config: SphinxVisionConfig) -> Fusion:
    module = Fusion(config, WIDTH)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return module


@pytest.mark.parametrize(
    ("name", "views", "tagged", "plain"),
    [
        ("sphinx", 1, 291, 289),
        ("sphinx-1k", 5, 1455, 1445),
        ("sphinx-2k", 10, 2910, 2890),
        ("sphinx-tiny", 1, 259, 257),
        ("sphinx-tiny-1k", 5, 1295, 1285),
    ],
)
def test_positions_of_the_presets(name: str, views: int, tagged: int, plain: int) -> None:
    with_tags = preset(name).vision_config
    without = preset(name, vision={"view_tags": False}).vision_config
    assert with_tags.num_views == without.num_views == views
    assert (with_tags.tokens_per_picture, without.tokens_per_picture) == (tagged, plain)
    assert with_tags.patch_channels == (4608 if "tiny" in name else 5632)


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("qformer", [True, False])
@torch.no_grad()
def test_a_view_is_start_queries_class_patches_end(tags: bool, qformer: bool) -> None:
    fields: dict[str, Any] = {**VISION, "view_tags": tags}
    if not qformer:
        fields |= {"qformer_config": None, "qformer_vision_config": None}
    config = SphinxVisionConfig(**fields)
    module, seen = fusion(config), features(config)
    tokens = module(seen)
    assert tokens.shape == (5, config.tokens_per_view, WIDTH)
    if tags:
        assert module.view_start is not None and module.view_end is not None
        assert torch.equal(tokens[:, :1], module.view_start.expand(5, -1, -1))
        assert torch.equal(tokens[:, -1:], module.view_end.expand(5, -1, -1))
        tokens = tokens[:, 1:-1]
    else:
        assert module.view_start is None and module.view_end is None
    queries = config.num_query_tokens if qformer else 0
    torch.testing.assert_close(tokens[:, queries:], module.patch_projection(seen.patches))
    if qformer:
        assert module.query_projection is not None and seen.queries is not None
        torch.testing.assert_close(tokens[:, :queries], module.query_projection(seen.queries))
    else:
        assert module.query_projection is None


@torch.no_grad()
def test_projection_is_a_linear_layer_and_a_layer_norm_of_eps_1e_5() -> None:
    config = SphinxVisionConfig(**VISION)
    module, seen = fusion(config).double(), features(config)
    projection, patches = module.patch_projection, seen.patches.double() * 1e-3  # small, so that eps shows
    projection.linear.bias.zero_()
    y = patches @ projection.linear.weight.T
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    expected = y * projection.norm.weight + projection.norm.bias
    torch.testing.assert_close(projection(patches), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_views_do_not_mix() -> None:
    config = SphinxVisionConfig(**VISION)
    module, seen = fusion(config), features(config)
    assert seen.queries is not None
    alone = module(VisionFeatures(seen.patches[2:3], seen.queries[2:3]))
    torch.testing.assert_close(module(seen)[2:3], alone)


def test_every_parameter_of_the_fusion_is_reached_by_the_gradient() -> None:
    config = SphinxVisionConfig(**VISION)
    module = fusion(config)
    module(features(config)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
