"""The tower: what each encoder is fed, the order of views and channels, and that batching changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import light_vision, tiny_config, tiny_tower, tiny_views
from torch import Tensor
from torch.nn import functional as F

from sphinx_fast.vision import VisionTower
from sphinx_fast.vision.clip import clip_features
from sphinx_fast.vision.convnext import convnext_features, repeat_to_grid
from sphinx_fast.vision.dinov2 import dinov2_features, renormalize
from sphinx_fast.vision.tower import join_crops, split_crops


def fed(module: Any, run: Any) -> Tensor:
    """The pixels a module is given while `run` runs."""
    seen: list[Tensor] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["pixel_values"] if kwargs else args[0])

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        run()
    handle.remove()
    assert len(seen) == 1, "all views go through an encoder in one batch"
    return seen[0]


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_split_and_join_are_inverse(ratio: int) -> None:
    square = torch.arange(2 * 3 * 24 * 24).reshape(2, 3, 24, 24)
    crops = split_crops(square, ratio)
    side = 24 // ratio
    assert crops.shape == (2 * ratio * ratio, 3, side, side)
    assert torch.equal(join_crops(crops, ratio), square)
    for picture in range(2):  # row-major within a picture, pictures one after the other
        for row in range(ratio):
            for column in range(ratio):
                cut = square[picture, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
                assert torch.equal(crops[(picture * ratio + row) * ratio + column], cut)


@torch.no_grad()
def test_channels_are_clip_convnext_dinov2() -> None:
    tower = tiny_tower(tiny_config().vision_config)
    views = tiny_views(5, 32)
    features = tower(views)
    assert tower.clip is not None and tower.convnext is not None and tower.dinov2 is not None
    assert tower.qformer is not None and features.queries is not None
    nearest = F.interpolate(views.half(), size=(64, 64)).float()
    parts = [
        clip_features(tower.clip, views),
        repeat_to_grid(convnext_features(tower.convnext, nearest), 16),
        dinov2_features(tower.dinov2, renormalize(views)),
    ]
    assert [part.shape[-1] for part in parts] == [16, 20, 24]
    torch.testing.assert_close(features.patches, torch.cat(parts, dim=-1))
    torch.testing.assert_close(features.queries, tower.qformer(views))


@pytest.mark.parametrize(
    "make", [lambda: tiny_config().vision_config, lambda: light_vision(1), lambda: light_vision(5)]
)
@torch.no_grad()
def test_output_does_not_depend_on_the_batch(make: Any) -> None:
    config = make()
    tower = tiny_tower(config)
    per_picture = config.num_views
    views = tiny_views(3 * per_picture, config.view_size)
    together = tower(views)
    assert together.patches.shape == (3 * per_picture, 17, config.patch_channels)
    assert (together.queries is None) == (config.qformer_config is None)
    for picture in range(3):
        rows = slice(picture * per_picture, (picture + 1) * per_picture)
        alone = tower(views[rows])
        torch.testing.assert_close(together.patches[rows], alone.patches, rtol=1e-4, atol=1e-5)
        if together.queries is not None:
            torch.testing.assert_close(together.queries[rows], alone.queries, rtol=1e-4, atol=1e-5)


def test_views_keep_their_order() -> None:
    tower = tiny_tower(tiny_config().vision_config)
    views = tiny_views(5, 32)
    with torch.no_grad():
        straight, reversed_ = tower(views), tower(views.flip(0))
    torch.testing.assert_close(straight.patches, reversed_.patches.flip(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 32, 32), (5, 3, 64, 64), (5, 1, 32, 32), (5, 3, 32, 31), (1, 5, 3, 32, 32)])
def test_another_shape_is_one_clear_error(shape: tuple[int, ...]) -> None:
    tower = VisionTower(tiny_config().vision_config)
    with pytest.raises(ValueError, match=r"pixel_values: expected \[views, 3, 32, 32\], got \["):
        tower(torch.zeros(shape))


def test_light_with_one_view_rounds_through_half() -> None:
    tower = tiny_tower(light_vision(1))
    view = tiny_views(2, 128)
    convnext = fed(tower.convnext, lambda: tower(view))
    assert torch.equal(convnext, view.half().float()) and not torch.equal(convnext, view)
    dinov2 = fed(tower.dinov2, lambda: tower(view))
    small = F.interpolate(view.half(), size=(56, 56), mode="bicubic").float()
    assert torch.equal(dinov2, renormalize(small))


def test_light_with_five_views_resizes_the_whole_picture_for_dinov2() -> None:
    """The filter crosses crop borders, so DINOv2's views come from the stitched picture; ConvNeXt's are native."""
    tower = tiny_tower(light_vision(5))
    square = tiny_views(2, 256)
    crops = split_crops(square, 2).unflatten(0, (2, 4))
    views = torch.cat([tiny_views(2, 128).unsqueeze(1), crops], dim=1).flatten(0, 1)
    assert torch.equal(fed(tower.convnext, lambda: tower(views)), views)

    dinov2 = fed(tower.dinov2, lambda: tower(views)).unflatten(0, (2, 5))
    half = F.interpolate(square.half(), size=(112, 112), mode="bicubic")
    expected = split_crops(half, 2).unflatten(0, (2, 4)).float()
    torch.testing.assert_close(dinov2[:, 1:].flatten(0, 1), renormalize(expected.flatten(0, 1)))
    small = F.interpolate(square.half(), size=(56, 56), mode="bicubic").float()
    torch.testing.assert_close(dinov2[:, 0], renormalize(small))
    alone = F.interpolate(crops.flatten(0, 1).half(), size=(56, 56), mode="bicubic").float()
    assert not torch.allclose(dinov2[:, 1:].flatten(0, 1), renormalize(alone), atol=1e-2)


def test_light_with_a_view_missing_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="7 views are not 5 for every picture"):
        VisionTower(light_vision(5))(tiny_views(7, 128))


@torch.no_grad()
def test_bfloat16_stays_bfloat16() -> None:
    tower = tiny_tower(tiny_config().vision_config).bfloat16()
    features = tower(tiny_views(5, 32))
    assert features.patches.dtype == torch.bfloat16 and features.queries is not None
    assert features.queries.dtype == torch.bfloat16
    assert torch.isfinite(features.patches).all()
