"""The plain Pillow and torch pipeline: its geometry, its constants and the released implementation's canvases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sphinx_fast.image.views import (
    CLIP_MEAN,
    CLIP_STD,
    PAD_COLOUR,
    normalise,
    num_views,
    reference_canvas,
    reference_views,
)


@pytest.mark.parametrize(("picture_size", "view_size", "count"), [(224, 224, 1), (448, 224, 5), (672, 224, 10)])
def test_number_of_views(picture_size: int, view_size: int, count: int) -> None:
    assert num_views(picture_size, view_size) == count


@pytest.mark.parametrize(("picture_size", "view_size"), [(450, 224), (224, 448), (224, 0), (0, 224)])
def test_views_that_do_not_tile_are_refused(picture_size: int, view_size: int) -> None:
    with pytest.raises(ValueError, match="multiple of view_size"):
        num_views(picture_size, view_size)


@pytest.mark.parametrize(("folder", "size"), [("llama_ens", 224), ("llama_ens5", 448)])
@pytest.mark.parametrize(("index", "photo"), [(0, "cat.png"), (1, "coffee_portrait.png")])
def test_canvas_of_the_released_implementation(golden: Path, folder: str, size: int, index: int, photo: str) -> None:
    canvas = reference_canvas(Image.open(golden / photo), size)
    expected = Image.open(golden / folder / f"{index}.resized.png").convert("RGB")
    assert np.array_equal(np.array(canvas), np.array(expected))


def test_order_of_the_views() -> None:
    """Quadrants of one colour each: the crops come row-major after the global view."""
    picture = np.zeros((8, 8, 3), np.uint8)
    for row in range(2):
        for column in range(2):
            picture[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 60 * (2 * row + column + 1)
    views = reference_views(picture, 8, 4)
    assert views.shape == (5, 3, 4, 4)
    values = (views[:, 0] * CLIP_STD[0] + CLIP_MEAN[0]) * 255
    for crop in range(4):
        assert torch.allclose(values[1 + crop], torch.full((4, 4), 60.0 * (crop + 1)), atol=1e-3)
    assert torch.allclose(values[0, ::3, ::3], torch.tensor([[60.0, 120.0], [180.0, 240.0]]), atol=12)


def test_ratio_three_takes_the_middle_pixels() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    pixels = normalise(Image.fromarray(picture))
    views = reference_views(picture, 24, 8)
    assert torch.equal(views[0], pixels[:, 1::3, 1::3].half().float())
    assert torch.equal(views[6], pixels[:, 8:16, 16:24])


def test_padding_keeps_its_colour_and_other_modes_become_rgb() -> None:
    picture = Image.new("L", (4, 40), 200)
    canvas = np.array(reference_canvas(picture, 20))
    assert tuple(canvas[10, 0]) == PAD_COLOUR
    assert tuple(canvas[10, 19]) == PAD_COLOUR


def test_a_square_too_large_to_build_is_refused() -> None:
    with pytest.raises(ValueError, match="60000"):
        reference_canvas(Image.new("RGB", (60_000, 1)), 224)
