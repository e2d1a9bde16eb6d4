"""The room views against Pillow and torch: equal bit for bit, in every dtype, and never more memory than its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from close import Guarded, assert_repeatable
from PIL import Image
from torch import Tensor

from sphinx_fast.image.views import CLIP_MEAN, CLIP_STD, DINOV2_MEAN, DINOV2_STD, reference_canvas, reference_views
from sphinx_fast.ops import EncoderViews, encoder_views, resize_padded, views

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pillow(picture: Tensor, size: int) -> Tensor:
    return torch.from_numpy(np.array(reference_canvas(picture.numpy(), size)))


def reference(pictures: list[Tensor], picture_size: int, view_size: int, dtype: torch.dtype) -> Tensor:
    return torch.cat([reference_views(picture.numpy(), picture_size, view_size) for picture in pictures]).to(dtype)


# --- the canvas -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("folder", "size"), [("llama_ens", 224), ("llama_ens5", 448)])
@pytest.mark.parametrize(("index", "photo"), [(0, "cat.png"), (1, "coffee_portrait.png")])
def test_canvas_equals_the_released_implementation(
    golden: Path, folder: str, size: int, index: int, photo: str
) -> None:
    picture = torch.from_numpy(np.array(Image.open(golden / photo).convert("RGB")))
    expected = np.array(Image.open(golden / folder / f"{index}.resized.png").convert("RGB"))
    assert np.array_equal(resize_padded(picture, size).numpy(), expected)


GEOMETRIES = [
    *[(1, 1, 224), (1, 37, 64), (37, 1, 64), (50, 8000, 224), (8000, 50, 56), (1, 4000, 16), (3000, 1, 1)],
    *[(224, 224, 224), (223, 224, 224), (224, 225, 224), (448, 447, 224), (2, 3, 448), (640, 481, 448)],
]


@pytest.mark.parametrize(("height", "width", "size"), GEOMETRIES)
def test_canvas_equals_pillow(height: int, width: int, size: int) -> None:
    picture = noise(height, width)
    assert torch.equal(resize_padded(picture, size), pillow(picture, size))


@pytest.mark.parametrize(("height", "width"), [(1, 60_000), (60_000, 1), (1, 2**20)])
def test_a_thread_of_a_picture_costs_no_square(height: int, width: int) -> None:
    """The square of 60,000 x 1 would take 10.8 GB. All of it but one line is padding."""
    canvas = resize_padded(noise(height, width), 16)
    lines = canvas if width > height else canvas.transpose(0, 1)
    assert torch.equal(lines[:5], torch.tensor([122, 116, 104], dtype=torch.uint8).expand(5, 16, 3))


def test_canvas_equals_pillow_on_random_sizes() -> None:
    random = np.random.default_rng(1)
    for trial in range(120):
        height, width = (int(extent) for extent in random.integers(1, 700, 2))
        size = int(random.choice([1, 7, 32, 56, 113, 224, 448]))
        picture = noise(height, width, trial)
        if trial % 3 == 0:  # hard edges overshoot and clip
            picture = (picture > 127).to(torch.uint8) * 255
        assert torch.equal(resize_padded(picture, size), pillow(picture, size)), (height, width, size)


def test_pillow_resizes_squares_horizontally_first() -> None:
    """The order of the passes shows in the bits; a padded square must take Pillow's."""
    picture = noise(300, 300)
    image = Image.fromarray(picture.numpy())
    bicubic = Image.Resampling.BICUBIC
    horizontal_first = np.array(image.resize((64, 300), bicubic).resize((64, 64), bicubic))
    vertical_first = np.array(image.resize((300, 64), bicubic).resize((64, 64), bicubic))
    assert not np.array_equal(horizontal_first, vertical_first)
    assert np.array_equal(resize_padded(picture, 64).numpy(), horizontal_first)


# --- the views --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("picture_size", "view_size"),
    [(224, 224), (448, 224), (672, 224), (96, 48), (51, 17), (64, 16), (65, 13), (62, 31), (4, 2), (2, 1), (1, 1)],
)
def test_views_equal_plain_torch(picture_size: int, view_size: int, dtype: torch.dtype) -> None:
    pictures = [noise(61, 47), noise(33, 120, 1), noise(1, 1, 2)]
    expected = reference(pictures, picture_size, view_size, dtype)
    output = Guarded(expected.shape, dtype)
    result = views(pictures, picture_size=picture_size, view_size=view_size, dtype=dtype, out=output.tensor)
    assert result is output.tensor
    assert torch.equal(output.check(), expected)


@pytest.mark.parametrize("seed", range(4))
def test_global_view_equals_interpolate_on_half(seed: int) -> None:
    picture = noise(448, 448, seed)
    assert torch.equal(views([picture], picture_size=448, view_size=224), reference([picture], 448, 224, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("picture_size", "view_size", "convnext_size"),
    [(448, 224, 256), (224, 224, 256), (96, 32, 37), (24, 24, 48), (10, 5, 1)],
)
def test_encoder_views_equal_plain_torch(
    picture_size: int, view_size: int, convnext_size: int, dtype: torch.dtype
) -> None:
    pictures = [noise(90, 61), noise(40, 41, 1)]
    clip = reference(pictures, picture_size, view_size, dtype)
    constants = [torch.tensor(v).to(dtype).view(3, 1, 1) for v in (CLIP_STD, CLIP_MEAN, DINOV2_MEAN, DINOV2_STD)]
    clip_std, clip_mean, mean, std = constants
    expected = EncoderViews(
        clip,
        (clip * clip_std + clip_mean - mean) / std,
        F.interpolate(clip.half(), (convnext_size, convnext_size)).to(dtype),
    )
    outputs = [Guarded(tensor.shape, dtype) for tensor in expected]
    size: Any = {"picture_size": picture_size, "view_size": view_size, "convnext_size": convnext_size, "dtype": dtype}
    encoder_views(pictures, **size, out=EncoderViews(*(output.tensor for output in outputs)))
    for name, output, wanted in zip(expected._fields, outputs, expected, strict=True):
        assert torch.equal(output.check(name), wanted), name
    for result, wanted in zip(encoder_views(pictures, **size), expected, strict=True):
        assert torch.equal(result, wanted)


def test_any_strides() -> None:
    base = noise(40, 60)
    planar = base.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    pictures = [base[::2, 3:50:3], base.transpose(0, 1), planar, base.flip(2), base[:1].expand(30, 60, 3)]
    assert torch.equal(
        views(pictures, picture_size=32, view_size=16),
        reference([picture.contiguous() for picture in pictures], 32, 16, torch.float32),
    )


def test_an_empty_batch() -> None:
    assert views([], picture_size=32, view_size=16).shape == (0, 3, 16, 16)


def test_a_picture_does_not_depend_on_its_batch_or_the_threads() -> None:
    pictures = [noise(70 + 13 * index, 50 + 31 * index, index) for index in range(5)]
    size: Any = {"picture_size": 64, "view_size": 32}
    alone = torch.cat([views([picture], **size) for picture in pictures])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            assert torch.equal(views(pictures, **size), alone)
    finally:
        torch.set_num_threads(threads)


def test_repeats_are_equal() -> None:
    pictures = [noise(99, 47), noise(20, 90, 1)]
    assert_repeatable(lambda: views(pictures, picture_size=64, view_size=32))


@pytest.mark.parametrize("fill", [0, 255])
def test_every_byte_of_the_canvas_is_written(fill: int) -> None:
    picture = noise(31, 77)
    output = Guarded((45, 45, 3), torch.uint8, fill=fill)
    resize_padded(picture, 45, out=output.tensor)
    assert torch.equal(output.check(), pillow(picture, 45))


# --- as a torch op ----------------------------------------------------------------------------------------------------
def test_opcheck() -> None:
    out, nearest = torch.empty(10, 3, 8, 8), torch.empty(10, 3, 9, 9)
    pictures = [noise(20, 30), noise(5, 5)]
    torch.library.opcheck(torch.ops.sphinx_fast.views.default, (pictures, out, None, None, 16, 8))
    torch.library.opcheck(torch.ops.sphinx_fast.views.default, (pictures, out, torch.empty_like(out), nearest, 16, 8))
    canvas = torch.empty(16, 16, 3, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.sphinx_fast.resize_padded.default, (pictures[0], canvas))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("picture_size", "view_size"), [(224, 224), (448, 224), (672, 224), (51, 17), (62, 31)])
def test_cuda_equals_cpu(picture_size: int, view_size: int, dtype: torch.dtype) -> None:
    pictures = [noise(61, 47), noise(333, 120, 1), noise(1, 1, 2), noise(50, 8000)[:, ::3]]
    size: Any = {"picture_size": picture_size, "view_size": view_size, "convnext_size": view_size + 5, "dtype": dtype}
    expected = encoder_views(pictures, **size)
    outputs = [Guarded(tensor.shape, dtype, "cuda") for tensor in expected]
    on_device = [picture.cuda() for picture in pictures]
    encoder_views(on_device, **size, out=EncoderViews(*(output.tensor for output in outputs)))
    for name, output, wanted in zip(expected._fields, outputs, expected, strict=True):
        assert torch.equal(output.check(name).cpu(), wanted), name
    for picture in on_device:
        assert torch.equal(resize_padded(picture, picture_size).cpu(), resize_padded(picture.cpu(), picture_size))
