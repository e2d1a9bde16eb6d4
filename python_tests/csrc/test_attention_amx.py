"""The room attention's products on AMX tiles, which csrc/host_amx computes in software by Intel's pseudo-code."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from host import SOURCES, library, pointer
from torch import Tensor

from sphinx_fast.ops import extension

pytestmark = pytest.mark.skipif("avx512" not in extension().isas(), reason="the loops around the tiles are AVX-512")

LONG, ADDRESS = ctypes.c_int64, ctypes.c_void_p
LOG2E = 1.4426950408889634
TILED, PLAIN = 1, 0  # which loops


class Region(ctypes.Structure):
    _fields_ = (("key", ADDRESS), ("value", ADDRESS), ("bytes", LONG))


class Keys(ctypes.Structure):
    _fields_ = (
        ("key", ADDRESS), ("value", ADDRESS), ("key_row", LONG), ("value_row", LONG), ("count", LONG),
        ("mask", ADDRESS), ("mask_step", LONG), ("per_row", LONG), ("factor", ctypes.c_float), ("next", Region),
        ("soon", ADDRESS), ("soon_count", LONG),
    )  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    sets = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl")
    options = [f"-I{SOURCES / 'host_amx'}", *(f"-m{name}" for name in sets)]
    made = library("host_attention_amx.cpp", tmp_path_factory.mktemp("amx"), *options)
    made.size_of_keys.restype = made.products.restype = LONG
    for name in ("attend", "use_tiles", "use_after_release", "use_more_tiles", "multiply"):
        getattr(made, name).restype = ctypes.c_char_p
    assert made.size_of_keys() == ctypes.sizeof(Keys)
    return made


# --- what is asked ----------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Inputs:
    query: Tensor  # [M, D]
    key: Tensor  # [count, D], of wider memory in which all else is nan
    value: Tensor
    scale: float
    mask: Tensor | None = None  # [M / per_row, count]
    per_row: int = 1

    def run(self, host: Any, tiles: int = TILED, one_chain: bool = False) -> tuple[Tensor, Tensor]:
        """What is summed, [M, D], and the softmax, [M, 2], as the loops leave them."""
        queries, head_dim = self.query.shape
        mask = None if self.mask is None else self.mask.byte()
        step = 0 if mask is None else mask.stride(0)
        keys = Keys(
            pointer(self.key), pointer(self.value), self.key.stride(0), self.value.stride(0), len(self.key),
            pointer(mask), step, self.per_row, self.scale * LOG2E, Region(), None, 0,
        )  # fmt: skip
        memory = torch.full((queries + 2, head_dim), 77.0)
        softmax = torch.full((queries + 2, 2), 77.0)
        query, out = self.query.contiguous(), memory[1:-1]
        told = host.attend(tiles, one_chain, pointer(query), LONG(queries), LONG(head_dim), ctypes.byref(keys),
                           pointer(softmax[1:-1]), pointer(out))  # fmt: skip
        assert told == b"", told
        assert not host.in_use(), "tiles are given back"
        for tensor in (memory, softmax):
            assert (tensor[0] == 77).all() and (tensor[-1] == 77).all(), "memory around the results was written"
        return out, softmax[1:-1]

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Results and lse; the logarithm of what is not float64 is float32's."""
        query, key, value = (tensor.to(dtype)[None] for tensor in (self.query, self.key, self.value))
        kept = None if self.mask is None else self.mask.repeat_interleave(self.per_row, 0)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=kept, scale=self.scale)[0]
        exact = dtype if dtype == torch.float64 else torch.float32
        scores = self.query.to(exact) * self.scale @ self.key.to(exact).T
        return out, torch.logsumexp(scores if kept is None else scores.masked_fill(~kept, -math.inf), -1)

    def only(self, first: int, end: int) -> Inputs:
        return dataclasses.replace(self, query=self.query[first:end], mask=None if self.mask is None else
                                   self.mask[first // self.per_row : -(-end // self.per_row)])  # fmt: skip


def finished(out: Tensor, softmax: Tensor) -> tuple[Tensor, Tensor]:
    largest, total = softmax.unbind(-1)
    return (out / total[:, None]).bfloat16(), (largest.double() + total.double().log2()).mul(math.log(2)).float()


def check(host: Any, *draws: Inputs, tiled: bool = True) -> None:
    """All draws are judged together: AMX, by either order of its sums, and AVX-512."""
    plain, exact = ([torch.cat(of) for of in zip(*(given.reference(dtype) for given in draws), strict=True)]
                    for dtype in (torch.bfloat16, torch.float64))  # fmt: skip
    for tiles, one_chain in ((TILED, False), (TILED, True), (PLAIN, False)):
        made = []
        for given in draws:
            made.append(finished(*given.run(host, tiles, one_chain)))
            assert (host.products() > 0) == (tiles == TILED and tiled), "by tiles, where they pay"
        out, lse = (torch.cat(of) for of in zip(*made, strict=True))
        assert_close(out, plain[0], exact[0], f"out {tiles} {one_chain}")
        assert_close(lse, plain[1], exact[1], f"lse {tiles} {one_chain}")


def draw(queries: int, count: int, head_dim: int, *, seed: int = 0, spare: int = 0, masked: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def rows(number: int) -> Tensor:
        wide = torch.full((number + 3, head_dim + spare), math.nan, dtype=torch.bfloat16)
        wide[:number, :head_dim] = torch.randn(number, head_dim, generator=generator).bfloat16()
        return wide[:number, :head_dim]

    mask = torch.rand(queries, count + 9, generator=generator)[:, 4 : 4 + count] < 0.6 if masked else None
    return Inputs(rows(queries) * 0.5, rows(count), rows(count), head_dim**-0.5, mask)


def drawn(queries: int, count: int, head_dim: int, **rest: Any) -> list[Inputs]:
    """More of the small ones: the largest of few errors is chance."""
    return [draw(queries, count, head_dim, seed=seed, **rest) for seed in range(max(2, 24 // queries))]


# --- against float64 and the loops without tiles ----------------------------------------------------------------------
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("count", [64, 65, 100, 128, 511, 512])
def test_every_count_and_head_dim(host: Any, count: int, head_dim: int) -> None:
    check(host, *drawn(3, count, head_dim))


@pytest.mark.parametrize("queries", [1, 2, 15, 16, 17, 32, 33, 64])
def test_any_number_of_queries(host: Any, queries: int) -> None:
    check(host, *drawn(queries, 100, 64))
    check(host, *drawn(queries, 130, 32, spare=8))


def test_whole_splits_of_many_queries(host: Any) -> None:
    check(host, draw(64, 512, 128))
    check(host, draw(17, 512, 256))


@pytest.mark.parametrize("spare", [1, 8, 64])
def test_positions_may_lie_apart(host: Any, spare: int) -> None:
    """And keys farther than values."""
    for given in (draw(5, 200, 96, spare=spare), draw(5, 200, 64, spare=spare)):
        other = dataclasses.replace(given, value=given.value.clone())
        check(host, given, other)
        assert all(torch.equal(*pair) for pair in zip(given.run(host), other.run(host), strict=True))


@pytest.mark.parametrize("count", [64, 100, 300])
def test_masks(host: Any, count: int) -> None:
    check(host, *drawn(5, count, 64, masked=True))
    shared = [dataclasses.replace(given, mask=given.mask[::4], per_row=4) for given in drawn(20, count, 64, masked=True)
              if given.mask is not None]  # fmt: skip
    check(host, *shared)


def test_tiles_nobody_attends_to(host: Any) -> None:
    given = draw(4, 300, 64)
    given.mask = torch.ones(4, 300, dtype=torch.bool)
    given.mask[:, 64:128] = False
    given.mask[1, :200] = False
    check(host, given)
    before = given.run(host)
    for tensor in (given.key, given.value):
        tensor[64:128] = math.nan
    assert all(torch.equal(*pair) for pair in zip(given.run(host), before, strict=True)), "a tile that is not read"
    given.mask[2] = False
    out, softmax = given.run(host)
    assert not out[2].any() and softmax[2].tolist() == [-math.inf, 0.0]
    given.mask[:] = False
    out, softmax = given.run(host)
    assert not out.any() and (softmax == torch.tensor([-math.inf, 0.0])).all()


@pytest.mark.parametrize("scale", [0.3, -0.2, 800.0, -800.0])
def test_any_scale(host: Any, scale: float) -> None:
    """Up to scores of +-10000, of which few positions get all weight."""
    check(host, *(dataclasses.replace(given, scale=scale) for given in drawn(8, 200, 64)))


def test_equal_scores_give_the_mean(host: Any) -> None:
    given = draw(3, 500, 64)
    given.query *= 100
    given.key[:] = given.key[:1].clone()
    check(host, given)
    assert (given.run(host)[1][:, 1] == 500).all(), "powers of nothing but 1"


def test_other_shapes_are_left_to_the_loops_without_tiles(host: Any) -> None:
    """To the bit."""
    for count, head_dim in ((1, 64), (17, 128), (63, 256), (100, 16), (512, 48), (64, 80)):
        given = draw(5, count, head_dim)
        check(host, given, tiled=False)
        assert all(torch.equal(*pair) for pair in zip(given.run(host), given.run(host, PLAIN), strict=True))
    assert host.shared_loops() == 13, "all but two of three times five"


# --- the same bits ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("masked", [False, True])
def test_a_query_does_not_depend_on_the_others(host: Any, masked: bool) -> None:
    given = draw(64, 150, 96, masked=masked)
    every = given.run(host)
    for first, end in ((0, 1), (15, 16), (16, 17), (40, 41), (63, 64), (0, 15), (5, 22), (30, 64), (1, 64)):
        for part, whole in zip(given.only(first, end).run(host), every, strict=True):
            assert torch.equal(part, whole[first:end]), (first, end)


def test_nan_stays_where_it_is(host: Any) -> None:
    clean = draw(18, 100, 64)
    out, softmax = clean.run(host)
    for what, row, column in (("query", 17, 5), ("value", 99, 9), ("value", 64, 40), ("key", 70, 3), ("key", 99, 63)):
        bad = dataclasses.replace(clean, **{what: getattr(clean, what).clone()})
        getattr(bad, what)[row, column] = math.nan
        made, sums = bad.run(host)
        touched = torch.zeros(18, 64, dtype=torch.bool)
        touched[row if what == "query" else slice(None), column if what == "value" else slice(None)] = True
        assert torch.equal(made.isnan(), touched), what
        assert torch.equal(made[~touched], out[~touched])
        assert torch.equal(sums[:, 1].isnan(), touched.all(1))
        assert torch.equal(sums[~touched.all(1)], softmax[~touched.all(1)])


def test_scores_of_minus_infinity_are_nothing(host: Any) -> None:
    """Where a ragged tile ends, infinity would meet zeros."""
    given = draw(3, 100, 64)
    given.key[:, 5] = given.key[:, 5].abs() + 1
    given.query[1, 5] = -math.inf
    for tiles in (TILED, PLAIN):
        out, softmax = given.run(host, tiles)
        assert not out[1].any() and softmax[1].tolist() == [-math.inf, 0.0]
        assert out[::2].isfinite().all()


def test_what_is_masked_may_be_nan_in_a_key(host: Any) -> None:
    given = draw(2, 100, 64)
    given.mask = torch.ones(2, 100, dtype=torch.bool)
    given.mask[0, 70] = False
    before = given.run(host)
    for value in (math.nan, math.inf):
        given.key[70] = value
        for made, was in zip(given.run(host), before, strict=True):
            assert torch.equal(made[0], was[0])


# --- the tiles in software --------------------------------------------------------------------------------------------
def test_misuse_of_tiles_is_an_error(host: Any) -> None:
    assert host.use_tiles(16, 64) == b""
    for rows, row_bytes, what in (
        (17, 64, b"too large"), (16, 66, b"too large"), (16, 0, b"rows without bytes"), (0, 64, b"rows without bytes"),
        (0, 0, b"a tile that is not configured"), (8, 64, b"product: shapes"), (1, 2, b"product: broken words"),
    ):  # fmt: skip
        assert what in host.use_tiles(rows, row_bytes), (rows, row_bytes)
    assert host.use_tiles(8, 32) == b""
    assert b"not configured" in host.use_after_release()
    assert b"more than eight" in host.use_more_tiles()


def test_a_short_tile_ends_in_zeros(host: Any) -> None:
    source, made = torch.randn(20, 16), torch.ones(16, 16)
    host.load_short(pointer(source), pointer(made))
    assert torch.equal(made[:5], source[:5]) and not made[5:].any()


@pytest.mark.parametrize("one_chain", [False, True])
def test_a_product_of_tiles(host: Any, one_chain: bool) -> None:
    """Of whole numbers, which are summed exactly in any order; and of what is too small to be normal."""
    left, right = (torch.randint(-9, 10, (16, 32)).bfloat16() for _ in range(2))
    start = torch.randint(-9, 10, (16, 16)).float()
    sums = start.clone()
    assert host.multiply(pointer(left), pointer(right), pointer(sums), int(one_chain)) == b""
    columns = right.view(16, 16, 2).permute(0, 2, 1).reshape(32, 16)
    assert torch.equal(sums, start + left.float() @ columns.float())
    small = torch.full((16, 32), 2.0**-70).bfloat16()
    sums = torch.zeros(16, 16)
    assert host.multiply(pointer(small), pointer(small), pointer(sums), int(one_chain)) == b""
    assert not sums.any()
