"""How pictures become canvases: the released transforms' rectangles, and Pillow's order of passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sphinx_fast.image.geometry import (
    Geometry,
    padded_resize,
    random_resized_crop,
    resized_center_crop,
    vertical_first,
)
from sphinx_fast.image.views import reference_canvas


@pytest.mark.parametrize(
    ("width", "height", "side", "offset"),
    [(10, 10, 10, (0, 0)), (7, 10, 10, (0, 1)), (10, 7, 10, (1, 0)), (1, 4, 4, (0, 1))],
)
def test_pad_offsets_round_down(width: int, height: int, side: int, offset: tuple[int, int]) -> None:
    geometry = padded_resize(height, width, 8)
    assert geometry.plane == (side, side)
    assert geometry.offset == offset
    assert not geometry.vertical_first, "a padded square goes through the rows first in every Pillow"


@pytest.mark.parametrize(
    ("plane", "resized", "new"),
    [
        ((100, 100), (10, 10), False),
        ((100, 20), (10, 10), True),
        ((30, 20), (10, 10), False),
        ((31, 20), (10, 10), True),
        ((10, 5), (10, 10), False),
        ((5, 1), (10, 100), False),
        ((11, 10), (10, 10), True),
    ],
)
def test_pillow_13_saves_work_by_columns_first(plane: tuple[int, int], resized: tuple[int, int], new: bool) -> None:
    assert vertical_first(plane, resized, (13, 0)) is new
    assert not vertical_first(plane, resized, (12, 3))
    assert not vertical_first(plane, resized, (11, 0))


def test_numbers_are_what_the_compiled_room_reads() -> None:
    geometry = Geometry((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12))
    assert geometry.numbers() == [*range(1, 13), int(geometry.vertical_first)]


@pytest.mark.parametrize(("height", "width"), [(100, 300), (300, 100), (64, 64), (1, 9), (480, 640)])
def test_random_crops_lie_in_the_picture(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(50):
        geometry = random_resized_crop(height, width, 32, generator=generator)
        (top, left), (h, w) = geometry.region, geometry.extent
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        assert geometry.plane == geometry.extent
        seen.add(geometry)
    assert len(seen) > 1 or max(height, width) / min(height, width) > 2


# --- against torchvision, where it is installed -------------------------------------------------------------------
@pytest.fixture
def transforms() -> Any:
    return pytest.importorskip("torchvision.transforms", exc_type=ImportError)


@pytest.mark.parametrize(("height", "width"), [(100, 300), (301, 100), (64, 64), (33, 47), (480, 641), (5, 90)])
def test_center_crop_equals_torchvision(transforms: Any, height: int, width: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    bicubic = transforms.InterpolationMode.BICUBIC
    expected = transforms.Compose([transforms.Resize(48, interpolation=bicubic), transforms.CenterCrop(48)])(image)
    assert np.array_equal(reference_canvas(image, 48, resized_center_crop(height, width, 48)), expected)


@pytest.mark.parametrize(("height", "width"), [(100, 300), (301, 100), (64, 64), (33, 47), (480, 641), (5, 90)])
def test_random_crop_draws_as_torchvision(transforms: Any, height: int, width: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    crop = transforms.RandomResizedCrop(
        48, scale=(0.9, 1.0), ratio=(0.75, 1.3333), interpolation=transforms.InterpolationMode.BICUBIC
    )
    for seed in range(10):
        torch.manual_seed(seed)
        expected = crop(image)
        torch.manual_seed(seed)
        assert np.array_equal(reference_canvas(image, 48, random_resized_crop(height, width, 48)), expected)
