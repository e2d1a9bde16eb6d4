"""The CUDA kernels of the room views, run on the CPU, and the arithmetic that host and device share."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sphinx_fast.ops import encoder_views, resize_padded

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("host") / "host_views.so"
    includes = [f"-I{HERE / 'host_cuda'}", f"-I{ROOT / 'csrc'}"]
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w"]
    command = [compiler, *options, *includes, str(HERE / "host_views.cpp"), "-o", str(library)]
    subprocess.run(command, check=True, timeout=120)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("height", "width", "picture_size", "view_size"),
    [(61, 47, 48, 24), (20, 70, 51, 17), (33, 33, 33, 33), (1, 1, 8, 4), (90, 200, 60, 15), (40, 30, 62, 31)],
)
def test_kernels_equal_the_cpu_half(
    host: Any, height: int, width: int, picture_size: int, view_size: int, dtype: torch.dtype
) -> None:
    picture = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    size: Any = {"picture_size": picture_size, "view_size": view_size, "convnext_size": view_size + 3}
    expected = encoder_views([picture], **size, dtype=dtype)
    outputs = [torch.full_like(tensor, torch.nan) for tensor in expected]
    canvas = torch.empty(picture_size, picture_size, 3, dtype=torch.uint8)
    index = [torch.float32, torch.float16, torch.bfloat16].index(dtype)
    host.views_on_host(
        pointer(picture),
        *(ctypes.c_int64(height), ctypes.c_int64(width), picture_size, view_size, view_size + 3, index, 3),
        *(pointer(tensor) for tensor in (canvas, *outputs)),
    )
    assert torch.equal(canvas, resize_padded(picture, picture_size))
    for name, output, wanted in zip(expected._fields, outputs, expected, strict=True):
        assert torch.equal(output, wanted), name


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
