"""The tile list of the fusion GEMM: who computes what, and what the kernels refuse. The kernels need a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

Sizes = list[tuple[int, list[int]]]  # m and the k of every segment

FIVE_VIEWS: Sizes = [(1285, [1024, 1536]), (325, [3072]), (160, [768])]
ONE_VIEW: Sizes = [(257, [1024, 1536]), (65, [3072]), (32, [768])]
ODD: Sizes = [(1, [8]), (0, [64]), (129, [72, 8, 200, 56]), (128, [64])]
MULTIPROCESSORS = 132  # of an H200


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("host") / "host_fusion_gemm.so"
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    command = [compiler, *options, str(HERE / "host_fusion_gemm.cpp"), "-o", str(library)]
    subprocess.run(command, check=True, timeout=240)
    loaded = ctypes.CDLL(str(library))
    loaded.gemm_makespan.restype = ctypes.c_int64
    return loaded


def packed(sizes: Sizes) -> Any:
    numbers = [len(sizes)]
    for m, ks in sizes:
        numbers += [m, len(ks), *ks]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def tiles(host: Any, sizes: Sizes, n: int, tile_n: int, tile_k: int, blocks: int) -> list[list[int]]:
    out = (ctypes.c_int64 * (6 * 8192))()
    count = host.gemm_tiles(packed(sizes), ctypes.c_int64(n), tile_n, tile_k, blocks, out)
    assert count >= 0, "a block computed a tile after its last"
    return [list(out[6 * i : 6 * i + 6]) for i in range(count)]


@pytest.mark.parametrize("blocks", [1, 7, 66, MULTIPROCESSORS, 1000])
@pytest.mark.parametrize(("tile_n", "tile_k"), [(256, 64), (128, 64), (128, 32)])
@pytest.mark.parametrize("n", [8, 128, 264, 4096])
@pytest.mark.parametrize("sizes", [FIVE_VIEWS, ONE_VIEW, ODD])
def test_every_tile_is_computed_once(host: Any, sizes: Sizes, n: int, tile_n: int, tile_k: int, blocks: int) -> None:
    seen = tiles(host, sizes, n, tile_n, tile_k, blocks)
    expected = [
        (p, row, column) for p, (m, _) in enumerate(sizes) for row in range(0, m, 128) for column in range(0, n, tile_n)
    ]
    assert sorted((p, row, column) for _, p, row, column, _, _ in seen) == expected
    for _, p, _, _, steps, same in seen:
        assert steps == sum(-(-k // tile_k) for k in sizes[p][1])
        assert same


def test_the_deepest_tiles_come_first_and_rounds_alternate(host: Any) -> None:
    depths = defaultdict(list)
    for block, _, _, _, steps, _ in tiles(host, FIVE_VIEWS, 4096, 256, 64, MULTIPROCESSORS):
        depths[block].append(steps)
    assert all(row == sorted(row, reverse=True) for row in depths.values())
    assert [depths[block][0] for block in (0, 47, 48, 131)] == [48, 48, 40, 40]
    assert max(sum(row) for row in depths.values()) <= 48 + 40


@pytest.mark.parametrize(
    ("sizes", "n", "tile_n"), [(FIVE_VIEWS, 4096, 256), (ONE_VIEW, 4096, 128), ([(100_000, [64])], 4096, 256)]
)
def test_the_tile_shape_is_the_one_that_ends_first(host: Any, sizes: Sizes, n: int, tile_n: int) -> None:
    assert host.gemm_tile_n(packed(sizes), ctypes.c_int64(n), MULTIPROCESSORS) == tile_n
    if sum(m for m, _ in sizes) < 10_000:
        spans = {t: host.gemm_makespan(packed(sizes), ctypes.c_int64(n), t, MULTIPROCESSORS) for t in (128, 256)}
        assert min(spans, key=spans.__getitem__) == tile_n


CHANGES: list[tuple[int, int, bool]] = [
    *[(0, 0, True), (1, 3, True), (1, 6, False), (2, 0, False), (2, 5, False), (2, 1, True)],
    *[(3, 0, True), (3, -1, False), (3, 1, True), (3, 2**31, False), (4, 0, False), (4, 5, False)],
    *[(5, 0, False), (5, 4104, False), (5, 4112, True), (6, 4092, False), (6, 4098, False), (6, 4100, True)],
    *[(7, 0, False), (7, 24, False), (8, 8, False), (8, 32, True), (9, 1016, False), (9, 1028, False), (9, 5632, True)],
    *[(10, 1020, False), (10, 5632, True), (11, 0, False), (11, 1020, False), (11, 8, True), (11, 2048, False)],
]


@pytest.mark.parametrize(("what", "value", "fits"), CHANGES)
def test_what_the_kernels_refuse(host: Any, what: int, value: int, fits: bool) -> None:
    sizes = packed(FIVE_VIEWS)
    changed = host.gemm_fits_changed(sizes, ctypes.c_int64(4096), what, ctypes.c_int64(value))
    assert bool(changed) is fits


def test_sizes_the_kernels_refuse(host: Any) -> None:
    def fits(sizes: Sizes, n: int) -> bool:
        return bool(host.gemm_fits_changed(packed(sizes), ctypes.c_int64(n), 0, ctypes.c_int64(0)))

    assert fits(ODD, 8)
    assert not fits(ODD, 12)
    assert not fits(ODD, 0)
    assert fits([(5, [8] * 4)] * 3, 64)
    assert not fits([(5, [8] * 4)] * 4, 64), "more tensor maps than kernel arguments hold"
    assert not fits([(2**30 - 1, [8])], 2**29), "more tiles than an int counts"
