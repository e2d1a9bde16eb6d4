"""The CUDA kernels of the room fusion, run on the CPU, and the arithmetic that host and device share."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import Guarded, assert_close
from fusion_cases import DTYPES, spread
from fusion_sums import EPS, LAYOUTS, Layout, Sums, draw_sums
from host import library, pointer, under_thread_sanitizer
from torch import Tensor

PAIRS = [(torch.float32, torch.float32), *[(dtype, sums) for dtype in DTYPES[1:] for sums in (torch.float32, dtype)]]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = library("host_fusion.cpp", tmp_path_factory.mktemp("host"))
    long = ["rows_of", "coarse_row_of", "repeats", "patch_row_of", "row_index", "first_of", "chunk_begin", "chunk_end"]
    for name in long:
        getattr(made, name).restype = ctypes.c_int64
    return made


def numbers(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def pointers(*tensors: Tensor | None) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def layout_numbers(layout: Layout) -> Any:
    return numbers(*layout[:6])


def run_forward(
    host: Any, given: Sums, threads: int, out: Tensor, kept: Tensor | None, stats: Tensor | None,
    first: Tensor | None = None,
) -> None:  # fmt: skip
    for tensor in (given.fine, given.coarse, given.queries, *given.patch, *(given.query or ())):
        assert tensor is None or tensor.is_contiguous()
    tags = given.tags or (None, None)
    parts = (given.fine, given.coarse, given.queries, *given.patch, *(given.query or (None, None, None)), *tags)
    written = host.forward_on_host(
        layout_numbers(given.layout), pointers(*parts), pointers(out, kept, stats), ctypes.c_int64(out.shape[0]),
        ctypes.c_int64(out.stride(0)), pointer(first), ctypes.c_float(EPS),
        DTYPES.index(given.dtype), DTYPES.index(given.sums), threads,
    )  # fmt: skip
    assert written == 1, "a block wrote past its shared memory"


def run_backward(host: Any, given: Sums, threads: int, kept: Tensor, stats: Tensor, **out: Any) -> None:
    names = ("fine", "coarse", "queries", "patch_sums", "query_sums")
    chunks = out["patch_sums"].shape[0]
    weights = given.patch[1], None if given.query is None else given.query[1]
    written = host.backward_on_host(
        layout_numbers(given.layout), pointers(given.grad, kept, stats, *weights),
        pointers(*(out[name] for name in names)), ctypes.c_int64(chunks),
        DTYPES.index(given.dtype), DTYPES.index(given.sums), threads,
    )  # fmt: skip
    assert written == 1, "a block wrote past its shared memory"


# A thread of a block of 256 adds up 16 values where D = 4096: one that adds up hundreds one by one rounds more.
BLOCKS = [(layout, threads) for layout in LAYOUTS for threads in (1, 8) if layout.width <= 160 * threads]


@pytest.mark.parametrize(("dtype", "sums"), PAIRS, ids=str)
@pytest.mark.parametrize(("layout", "threads"), BLOCKS, ids=str)
def test_the_kernels(host: Any, layout: Layout, dtype: torch.dtype, sums: torch.dtype, threads: int) -> None:
    """By the rule that the CPU half is judged by."""
    given = draw_sums(layout, dtype, sums)
    given.check_forward(lambda *args, **rest: run_forward(host, args[0], threads, **rest))
    given.check_backward(lambda *args, **rest: run_backward(host, args[0], threads, *args[1:], **rest), 3)


@pytest.mark.parametrize("chunks", [1, 2, 7, 40])
def test_any_number_of_chunks(host: Any, chunks: int) -> None:
    given = draw_sums(Layout(2, 3, 4, 2, True, 33, "both"), torch.bfloat16, torch.float32)
    given.check_backward(lambda *args, **rest: run_backward(host, args[0], 2, *args[1:], **rest), chunks)


@pytest.mark.parametrize("absent", ["fine", "queries"])
def test_gradients_that_are_not_wanted(host: Any, absent: str) -> None:
    given = draw_sums(Layout(2, 3, 4, 2, True, 33, "both"), torch.float32, torch.float32)
    kept = given.kept()
    made = []
    for missing in ((), (absent,)):
        outputs = given.backward_outputs(3)
        for name in missing:
            outputs.named[name] = None
        run_backward(host, given, 4, kept, given.stats(kept.float()), **outputs.tensors())
        made.append(outputs.check())
    for name, tensor in made[1].items():
        assert tensor is None if name == absent else torch.equal(tensor, made[0][name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [4, 5, 64])
def test_first_rows_out_of_range_are_not_written(host: Any, width: int, dtype: torch.dtype) -> None:
    """On a GPU nobody has looked at them before. Rows of a wider buffer, so that vectors straddle alignments."""
    layout = Layout(6, 1, 2, 2, True, width, "both")
    given, tokens = draw_sums(layout, dtype, torch.float32), 8
    whole = given.forward_outputs(keep=False)
    run_forward(host, given, 2, **whole.tensors())
    expected = whole.check()["out"].view(6, tokens, width)
    first = torch.tensor([-1, 22, -(2**63), 2, 2**63 - 1, 23])
    output = Guarded((30, width + 3), dtype, fill=7.0)
    run_forward(host, given, 2, output.tensor[:, 2 : 2 + width], None, None, first)
    untouched = torch.ones(30, width + 3, dtype=torch.bool)
    for view, row in ((1, 22), (3, 2)):
        assert torch.equal(output.tensor[row : row + tokens, 2 : 2 + width], expected[view])
        untouched[row : row + tokens, 2 : 2 + width] = False
    assert (output.check()[untouched] == 7.0).all()


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 4, 7, 32, 33, 97, 640])
def test_the_norm_kernel(host: Any, width: int, dtype: torch.dtype, threads: int) -> None:
    """Two groups of five rows: side by side, in place, and as slices."""
    generator = torch.Generator().manual_seed(width)
    x = (torch.randn(2, 5, width, generator=generator) + spread(width, generator)).to(dtype)
    weight, bias = (torch.randn(width, generator=generator).to(dtype) for _ in range(2))

    def run(x: Tensor, out: Tensor) -> None:
        written = host.norm_on_host(
            numbers(*x.shape), numbers(*x.stride()[:2], *out.stride()[:2]), pointer(x), pointer(weight), pointer(bias),
            pointer(out), ctypes.c_float(EPS), DTYPES.index(dtype), threads,
        )  # fmt: skip
        assert written == 1, "a block wrote past its shared memory"

    output = Guarded(x.shape, dtype)
    run(x, output.tensor)
    plain, exact = (F.layer_norm(x.to(of), (width,), weight.to(of), bias.to(of), EPS) for of in (dtype, torch.float64))
    assert_close(output.check(), plain, exact)
    own = x.clone()
    run(own, own)
    assert torch.equal(own, output.tensor)
    wide = Guarded((2, 7, width + 3), dtype, fill=7.0)
    run(x, wide.tensor[:, 1:6, 1 : 1 + width])
    assert torch.equal(wide.tensor[:, 1:6, 1 : 1 + width], output.tensor)
    wide.tensor[:, 1:6, 1 : 1 + width] = 7.0
    assert (wide.check() == 7.0).all()


def test_no_two_threads_of_a_block_race_and_every_barrier_is_needed(tmp_path: Path) -> None:
    whole, *lacking = under_thread_sanitizer("race_fusion.cpp", tmp_path, [], *([str(index)] for index in range(3)))
    assert "ThreadSanitizer" not in whole.stderr, whole.stderr[:2000]
    assert whole.stdout.splitlines() == ["done", f"{len(lacking)} barriers"]
    for index, run in enumerate(lacking):
        assert "data race" in run.stderr, f"nobody misses barrier {index}"


# --- arithmetic -------------------------------------------------------------------------------------------------------
SMALL = [
    Layout(1, queries, grid, repeat, tags, 1)
    for queries, grid, tags in itertools.product((0, 1, 3), range(1, 9), (False, True))
    for repeat in range(1, grid + 1)
    if grid % repeat == 0
]
LONG = ctypes.c_int64


@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_which_row_is_what(host: Any, layout: Layout) -> None:
    n, queries, patches, coarse = layout_numbers(layout), layout.queries, layout.patch_rows, layout.coarse_rows
    assert [host.rows_of(n, kind) for kind in range(4)] == [patches, layout.projected, layout.tokens, coarse]
    kinds = [(1, index) for index in range(queries)] + [(2, index) for index in range(patches)]
    if layout.tags:
        kinds = [(0, 0), *kinds, (3, 0)]
    rows = range(layout.tokens)
    assert [(host.row_kind(n, LONG(row)), host.row_index(n, LONG(row))) for row in rows] == kinds

    small = torch.arange(coarse, dtype=torch.float32)[:, None].expand(coarse, 1)
    repeated = layout.repeated(small.contiguous())[0, :, 0].int().tolist()
    assert [host.coarse_row_of(n, LONG(row)) for row in range(patches)] == repeated
    counts = [host.repeats(n, LONG(row)) for row in range(coarse)]
    inverse = [[host.patch_row_of(n, LONG(row), LONG(k)) for k in range(count)] for row, count in enumerate(counts)]
    assert [sorted(rows) for rows in inverse] == [
        [patch for patch, of in enumerate(repeated) if of == row] for row in range(coarse)
    ]


def test_where_a_view_starts(host: Any) -> None:
    layout = Layout(3, 0, 1, 1, True, 1)  # four rows a view
    n = layout_numbers(layout)
    assert [host.first_of(n, LONG(rows), None, LONG(2)) for rows in (11, 12, 13)] == [-1, 8, 8]
    first = numbers(-1, 0, 5, 6, 7, 2**63 - 1, -(2**63))
    assert [host.first_of(n, LONG(10), first, LONG(view)) for view in range(7)] == [-1, 0, 5, 6, -1, -1, -1]


def test_chunks_cover_every_unit_once_in_order(host: Any) -> None:
    for count, chunks in itertools.product(range(41), range(1, 45)):
        ends = [(host.chunk_begin(LONG(count), LONG(c), LONG(chunks)),
                 host.chunk_end(LONG(count), LONG(c), LONG(chunks))) for c in range(chunks)]  # fmt: skip
        assert [unit for begin, end in ends for unit in range(begin, end)] == list(range(count))
        assert all(0 <= begin <= end <= count for begin, end in ends)
