"""Fusion: how many positions a view takes, in what order, and the arithmetic of the projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_close
from tiny import VISION

from sphinx_fast.model.config import SphinxVisionConfig
from sphinx_fast.model.presets import preset
from sphinx_fast.vision import Fusion, VisionFeatures

WIDTH = 24


def features(config: SphinxVisionConfig, views: int = 5) -> VisionFeatures:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(views, config.num_patch_tokens, config.patch_channels, generator=generator)
    if config.qformer_config is None:
        return VisionFeatures([patches], None)
    width = config.qformer_config.hidden_size
    return VisionFeatures([patches], torch.randn(views, config.num_query_tokens, width, generator=generator))


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
    alone = module(VisionFeatures([seen.patches[2:3]], seen.queries[2:3]))
    torch.testing.assert_close(module(seen)[2:3], alone)


def test_every_parameter_of_the_fusion_is_reached_by_the_gradient() -> None:
    config = SphinxVisionConfig(**VISION)
    module = fusion(config)
    module(features(config)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def seen_by_four(config: SphinxVisionConfig, views: int = 3) -> VisionFeatures:
    """Features as the tower leaves them: one per encoder, ConvNeXt's map not repeated."""
    generator = torch.Generator().manual_seed(2)
    encoders = (config.clip_config, config.convnext_config, config.dinov2_config)
    sides = (config.grid_size, config.convnext_size // 32, config.grid_size)
    parts = [
        torch.randn(views, 1 + side**2, encoder.hidden_size, generator=generator)
        for encoder, side in zip(encoders, sides, strict=True)
    ]
    assert config.qformer_config is not None
    queries = torch.randn(views, config.num_query_tokens, config.qformer_config.hidden_size, generator=generator)
    return VisionFeatures(parts, queries)


def gradients(module: Fusion, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(tokens.square().sum(), list(module.parameters()))
    return dict(zip((name for name, _ in module.named_parameters()), found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_computes_what_the_layers_do(dtype: torch.dtype) -> None:
    config = SphinxVisionConfig(**VISION)
    module, seen = fusion(config), seen_by_four(config)
    exact_module, exact_seen = fusion(config).double(), VisionFeatures([p.double() for p in seen.parts], None)
    module.to(dtype)
    assert seen.queries is not None and module.fuses() and not exact_module.fuses()
    with torch.no_grad():
        for exact_one, one in zip(exact_module.parameters(), module.parameters(), strict=True):
            exact_one.copy_(one)
    given = VisionFeatures([part.to(dtype) for part in seen.parts], seen.queries.to(dtype))
    exact_seen = VisionFeatures([part.double() for part in given.parts], given.queries.double())
    ours, plain, exact = module(given), module.layer_by_layer(given), exact_module(exact_seen)
    assert_close(ours.detach(), plain.detach(), exact.detach(), "tokens")
    found, theirs, truth = gradients(module, ours), gradients(module, plain), gradients(exact_module, exact)
    for name, gradient in found.items():
        assert_close(gradient, theirs[name], truth[name], name)


@pytest.mark.parametrize("change", ["hook", "subclass", "autocast", "float64"])
def test_layers_that_are_not_plain_run_one_by_one(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SphinxVisionConfig(**VISION)
    module, seen = fusion(config), seen_by_four(config)
    called: list[bool] = []
    monkeypatch.setattr(Fusion, "layer_by_layer", lambda self, features: called.append(True))
    module(seen)
    assert not called
    linear = module.patch_projection.linear
    if change == "hook":
        linear.register_forward_hook(lambda *_: None)
    elif change == "subclass":
        linear.__class__ = type("Adapted", (torch.nn.Linear,), {})
    elif change == "float64":
        module.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        module(seen)
    assert called
