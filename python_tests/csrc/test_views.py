"""The CUDA kernels of the room views, run on the CPU, and the arithmetic that host and device share."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from host import library, pointer, under_thread_sanitizer
from torch import Tensor

from sphinx_fast.image.geometry import PILLOW, Geometry, padded_resize, resized_center_crop, resized_region
from sphinx_fast.ops import EncoderViews, canvas, encoder_views


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return library("host_views.cpp", tmp_path_factory.mktemp("host"))


def axes_of(geometry: Geometry) -> list[int]:
    """in, before, extent, out, begin of y and then of x."""
    pairs = geometry.plane, geometry.offset, geometry.extent, geometry.resized, geometry.origin
    return [pair[axis] for axis in (0, 1) for pair in pairs]


def run_kernel(
    host: Any,
    pictures: list[Tensor],
    geometries: list[Geometry],
    canvas: Tensor,
    out: EncoderViews,
    sizes: list[int],
    threads: int = 1,
) -> None:
    """The one launch of run_cuda; `sizes`: picture, view. `threads` of a block."""
    picture_size, view_size = sizes
    count = len(pictures)
    starts = [
        p.data_ptr() + g.region[0] * p.stride(0) + g.region[1] * p.stride(1)
        for p, g in zip(pictures, geometries, strict=True)
    ]
    numbers = [n for geometry in geometries for n in axes_of(geometry)]
    strides = [stride for picture in pictures for stride in picture.stride()]
    kept = host.views_on_host(
        count,
        (ctypes.c_void_p * count)(*starts),
        (ctypes.c_int64 * len(strides))(*strides),
        (ctypes.c_int64 * len(numbers))(*numbers),
        (ctypes.c_int * count)(*(int(geometry.vertical_first) for geometry in geometries)),
        *(picture_size, view_size, out.dinov2.shape[-1], out.convnext.shape[-1]),
        [torch.float32, torch.float16, torch.bfloat16].index(out.clip.dtype),
        threads,
        *(pointer(tensor) for tensor in (canvas, *out)),
    )
    assert kept == 1, "a block wrote past its shared memory"


SIZES = [  # picture_size, view_size, dinov2_size, convnext_size
    *[(48, 24, 24, 27), (51, 17, 17, 20), (33, 33, 33, 36), (8, 4, 4, 7), (60, 15, 15, 9), (62, 31, 31, 31)],
    *[(96, 48, 21, 48), (64, 64, 28, 64), (84, 42, 42, 48)],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("picture_size", "view_size", "dinov2_size", "convnext_size"), SIZES)
def test_the_kernel_equals_the_cpu_half(
    host: Any, picture_size: int, view_size: int, dinov2_size: int, convnext_size: int, dtype: torch.dtype
) -> None:
    """A batch of pictures: small, large, oblong, strided, planar; padded, cropped, columns first."""
    torch.manual_seed(1)
    shapes = [(61, 47), (20, 170), (1, 1), (333, 90), (200, 400), (400, 90)]
    pictures = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8) for h, w in shapes]
    pictures[1] = pictures[1].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    pictures[3] = pictures[3][::2, 5:80:2]
    geometries = [padded_resize(p.shape[0], p.shape[1], picture_size) for p in pictures]
    geometries[4] = resized_center_crop(200, 400, picture_size)
    geometries[5] = resized_region((7, 3), (390, 80), picture_size)
    assert geometries[5].vertical_first == (PILLOW >= (13,))
    size: Any = {"picture_size": picture_size, "view_size": view_size}
    expected = encoder_views(
        pictures, **size, dinov2_size=dinov2_size, convnext_size=convnext_size, geometries=geometries, dtype=dtype
    )
    outputs = [torch.full_like(tensor, torch.nan) for tensor in expected]
    canvases = torch.empty(len(pictures), picture_size, picture_size, 3, dtype=torch.uint8)
    run_kernel(host, pictures, geometries, canvases, EncoderViews(*outputs), [picture_size, view_size])
    for picture, geometry, made in zip(pictures, geometries, canvases, strict=True):
        assert torch.equal(made, canvas(picture, picture_size, geometry=geometry))
    for name, output, wanted in zip(expected._fields, outputs, expected, strict=True):
        assert torch.equal(output, wanted), name


def test_the_threads_of_a_block_wait_for_each_other(host: Any) -> None:
    """Seven threads a block on shared memory that starts as garbage: a missing barrier shows as a wrong byte."""
    pictures = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8) for h, w in ((150, 90), (70, 300))]
    geometries = [padded_resize(150, 90, 84), resized_region((3, 5), (60, 290), 84)]
    size: Any = {"picture_size": 84, "view_size": 42, "dinov2_size": 42, "convnext_size": 48}
    expected = encoder_views(pictures, **size, geometries=geometries)
    made = torch.empty(2, 84, 84, 3, dtype=torch.uint8)
    for _ in range(3):
        outputs = EncoderViews(*(torch.full_like(tensor, torch.nan) for tensor in expected))
        run_kernel(host, pictures, geometries, made, outputs, [84, 42], threads=7)
        assert all(torch.equal(output, wanted) for output, wanted in zip(outputs, expected, strict=True))


def test_no_two_threads_of_a_block_race(tmp_path: Path) -> None:
    (run,) = under_thread_sanitizer("race_views.cpp", tmp_path, [])
    assert "ThreadSanitizer" not in run.stderr, run.stderr[:2000]
    assert run.stdout.strip() == "done"


@pytest.mark.parametrize(("height", "width", "size"), [(3000, 2, 5), (5, 70_000, 16), (1, 2000, 2), (900, 1200, 3)])
def test_the_kernel_without_room_for_its_tables(host: Any, height: int, width: int, size: int) -> None:
    picture = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    geometry = padded_resize(height, width, size)
    expected = encoder_views([picture], picture_size=size, view_size=size, convnext_size=size)
    outputs = [torch.full_like(tensor, torch.nan) for tensor in expected]
    made = torch.empty(1, size, size, 3, dtype=torch.uint8)
    run_kernel(host, [picture], [geometry], made, EncoderViews(*outputs), [size, size])
    assert torch.equal(made[0], canvas(picture, size))
    assert torch.equal(outputs[0], expected[0])


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_sixteen_bit_floats_equal_torch(host: Any, name: str, dtype: torch.dtype) -> None:
    """Every 16-bit pattern widened; every pattern, its neighbours and every midpoint rounded."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    widened = torch.empty(2**16)
    getattr(host, f"{name}_to_float")(pointer(bits), pointer(widened), ctypes.c_int64(2**16))
    assert torch.equal(widened.nan_to_num(1e30), bits.view(dtype).float().nan_to_num(1e30))

    patterns = widened.view(torch.int32)[:, None] + torch.tensor(
        [-1, 0, 1, 2**11, 2**12 - 1, 2**12, 2**12 + 1, 2**15, 2**16 - 1]
    )
    values = torch.cat([patterns.flatten().view(torch.float32), torch.linspace(-2e-7, 2e-7, 9999)]).contiguous()
    rounded = torch.empty(len(values), dtype=torch.int16)
    getattr(host, f"float_to_{name}")(pointer(values), pointer(rounded), ctypes.c_int64(len(values)))
    expected = values.to(dtype)
    same = (rounded == expected.view(torch.int16)) | (rounded.view(dtype).isnan() & expected.isnan())
    assert bool(same.all()), values[~same][:5]


def test_nearest_index_equals_torch(host: Any) -> None:
    for extent in (1, 2, 5, 7, 56, 224, 225):
        for target in (1, 3, 8, 64, 100, 256, 448):
            row = torch.arange(extent, dtype=torch.float32).view(1, 1, 1, -1)
            expected = torch.nn.functional.interpolate(row, (1, target)).flatten().tolist()
            assert [host.nearest(i, extent, target) for i in range(target)] == expected, (extent, target)


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
@pytest.mark.parametrize(("count", "grain"), [(0, 1), (1, 1), (7, 3), (1000, 1), (1000, 4096), (10, 0)])
def test_parallel_for_covers_every_item_once(host: Any, threads: int, count: int, grain: int) -> None:
    covers = host.parallel_covers
    assert covers(ctypes.c_int64(count), ctypes.c_int64(grain), threads, ctypes.c_int64(-1)) == 1
    if count:
        assert covers(ctypes.c_int64(count), ctypes.c_int64(grain), threads, ctypes.c_int64(count - 1)) == -1
