"""The CUDA kernels of the room attention, run on the CPU, and the arithmetic that host and device share."""

from __future__ import annotations

import copy
import ctypes
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from close import Guarded, assert_close
from host import library, pointer, under_thread_sanitizer
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODES = {torch.float32: 5, torch.float16: 3, torch.bfloat16: 4}  # DType
LONG, INT, ADDRESS = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
BITS = {4: torch.int32, 2: torch.int16}


def structure(name: str, **fields: Any) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


CACHE = structure(
    "Cache", key=ADDRESS, value=ADDRESS, slots=LONG, capacity=LONG, key_slot=LONG, key_head=LONG, key_row=LONG,
    value_slot=LONG, value_head=LONG, value_row=LONG, lengths=ADDRESS,
)  # fmt: skip
ROPE = structure("Rope", cos=ADDRESS, sin=ADDRESS, positions=LONG, half=LONG, interleaved=ctypes.c_bool)
HEADS = structure("Heads", data=ADDRESS, row_step=LONG, head_step=LONG)
ARGS = structure(
    "Args", rows=LONG, heads=LONG, kv_heads=LONG, head_dim=LONG, query=HEADS, key=HEADS, value=HEADS, out=HEADS,
    prefix=CACHE, suffix=CACHE, pictures=ADDRESS, questions=ADDRESS, positions=ADDRESS, mask=ADDRESS, mask_step=LONG,
    rope=ROPE, scale=ctypes.c_float, lse=ADDRESS, dtype=ctypes.c_uint8,
)  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = library("host_attention.cpp", tmp_path_factory.mktemp("host"))
    for name in ("size_of_args", "partial_floats_of", "group_size"):
        getattr(made, name).restype = LONG
    for name in ("rotated_element", "log_sum_exp_of"):
        getattr(made, name).restype = ctypes.c_float
    assert made.size_of_args() == ctypes.sizeof(ARGS)
    return made


# --- what is asked ----------------------------------------------------------------------------------------------------
class Case(NamedTuple):
    """Lengths per slot; of the suffix before the new token. Capacities are a little more."""

    heads: int
    kv_heads: int
    head_dim: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    pictures: tuple[int, ...] | None = None
    questions: tuple[int, ...] | None = None
    appends: bool = True
    rotates: str = "halves"  # "", "halves", "interleaved", "partial"
    masked: bool = False

    @property
    def rows(self) -> int:
        for slots in (self.questions, self.pictures, self.suffix or None, self.prefix):
            if slots is not None:
                return len(slots)
        raise AssertionError


class Cache:
    """Keys and values between guards; what lies beyond the lengths is nan."""

    def __init__(self, case: Case, lengths: tuple[int, ...], spare: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(lengths), case.kv_heads, max(lengths) + spare, case.head_dim)
        self.guarded = [Guarded(shape, dtype, fill=0.0) for _ in range(2)]
        self.key, self.value = (guarded.tensor for guarded in self.guarded)
        self.lengths: Tensor | None = torch.tensor(lengths, dtype=torch.int32)
        for tensor in (self.key, self.value):
            tensor.copy_(torch.randn(shape, generator=generator))
            for slot, length in enumerate(lengths):
                tensor[slot, :, max(length, 0) :] = math.nan

    def memory(self) -> list[Tensor]:
        return [guarded.memory.view(BITS[guarded.memory.element_size()]) for guarded in self.guarded]

    def length(self, slot: int) -> int:
        return self.key.shape[2] if self.lengths is None else int(self.lengths[slot])

    def argument(self) -> Any:
        return CACHE(pointer(self.key), pointer(self.value), *self.key.shape[::2], *self.key.stride()[:3],
                     *self.value.stride()[:3], pointer(self.lengths))  # fmt: skip


class Call:
    """One case drawn: its tensors, the kernel's results and plain torch's."""

    def __init__(self, case: Case, dtype: torch.dtype, seed: int = 0) -> None:
        self.case, self.dtype, rows, dim = case, dtype, case.rows, case.head_dim
        generator = torch.Generator().manual_seed(1000 + seed)

        def draw(heads: int) -> Tensor:  # rows and heads lie apart
            wide = torch.randn(rows, heads + 1, dim + 8, generator=generator).to(dtype)
            return wide[:, :heads, :dim]

        self.query, self.key, self.value = draw(case.heads), draw(case.kv_heads), draw(case.kv_heads)
        self.prefix = Cache(case, case.prefix, 5, dtype, seed + 1) if case.prefix else None
        self.suffix = Cache(case, case.suffix, 3, dtype, seed + 2) if case.suffix else None
        self.pictures, self.questions = (
            None if slots is None else torch.tensor(slots, dtype=torch.int32)
            for slots in (case.pictures, case.questions)
        )
        self.positions: Tensor | None = None
        half = {"": 0, "partial": dim // 4}.get(case.rotates, dim // 2)
        angles = torch.rand(700, half, generator=generator) * 6
        self.cos, self.sin = angles.cos(), angles.sin()
        self.mask: Tensor | None = None
        if case.masked and self.prefix is not None:
            kept = torch.rand(rows, self.prefix.key.shape[2] + 3, generator=generator) < 0.7
            kept[:, 40:120] = False  # nobody
            kept[0, :] = False
            self.mask = kept[:, : self.prefix.key.shape[2]]
            nobody = ~self.mask.any(0)
            for tensor in (self.prefix.key, self.prefix.value):
                tensor[:, :, nobody] = math.nan
        self.scale = dim**-0.5
        self.wants_lse = True

    def only(self, *rows: int) -> Call:
        """The same rows in a smaller batch."""
        part, chosen = copy.copy(self), list(rows)
        part.query, part.key, part.value = (tensor[chosen] for tensor in (self.query, self.key, self.value))
        for name, cache in (("pictures", self.prefix), ("questions", self.suffix)):
            slots = [self.slot(getattr(self, name), cache, row) for row in chosen]
            setattr(part, name, torch.tensor(slots, dtype=torch.int32) if cache else None)
            pictures, questions = (
                tuple(slots) if name == of else getattr(part.case, of) for of in ("pictures", "questions")
            )
            part.case = part.case._replace(pictures=pictures, questions=questions)
        part.positions = None if self.positions is None else self.positions[chosen]
        part.mask = None if self.mask is None else self.mask[chosen]
        return part

    # --- by the kernel ---
    def run(self, host: Any, tensor_cores: bool = True, enough: int = 2048, order: int = 0) -> tuple[Tensor, Tensor]:
        """out [R, H, D] and lse [R, H]; everything around them untouched."""
        case, appends = self.case, self.case.appends and self.suffix is not None
        out = Guarded((case.rows, case.heads + 1, case.head_dim + 5), self.dtype, fill=7.0)
        result = out.tensor[:, 1:, 4:-1]
        lse = Guarded((case.rows, case.heads), torch.float32)

        def heads_of(tensor: Tensor | None) -> Any:
            return HEADS() if tensor is None else HEADS(pointer(tensor), *tensor.stride()[:2])

        given = ARGS(
            case.rows, case.heads, case.kv_heads, case.head_dim, heads_of(self.query),
            heads_of(self.key if appends else None), heads_of(self.value if appends else None), heads_of(result),
            self.prefix.argument() if self.prefix else CACHE(), self.suffix.argument() if self.suffix else CACHE(),
            pointer(self.pictures), pointer(self.questions), pointer(self.positions),
            pointer(self.mask), self.mask.stride(0) if self.mask is not None else 0,
            ROPE(pointer(self.cos), pointer(self.sin), *self.cos.shape, case.rotates == "interleaved")
            if case.rotates else ROPE(),
            self.scale, pointer(lse.tensor) if self.wants_lse else None, CODES[self.dtype],
        )  # fmt: skip
        partial = Guarded((host.partial_floats_of(ctypes.byref(given)),), torch.float32)
        arrived = Guarded((case.rows * case.kv_heads,), torch.int32, fill=0)
        kept = host.attention_on_host(
            ctypes.byref(given), pointer(partial.tensor), pointer(arrived.tensor), int(tensor_cores), LONG(enough),
            ctypes.c_uint(order),
        )  # fmt: skip
        assert kept == 1, "a block wrote past its shared memory"
        assert not arrived.check().any(), "counters are left"
        partial.tensor.nan_to_num_(0.0)
        partial.check("partial")
        made = result.clone()
        result.fill_(7.0)
        assert (out.check() == 7.0).all(), "memory around the rows of out was written"
        assert torch.equal(lse.memory[:256], torch.full((256,), lse.guard))
        return made, lse.tensor

    # --- by plain torch ---
    def position(self, row: int) -> int:
        if self.positions is not None:
            return int(self.positions[row])
        return sum(len(part) for part in self.attended(row))

    def slot(self, slots: Tensor | None, cache: Cache | None, row: int) -> int:
        return -1 if cache is None else row if slots is None else int(slots[row])

    def attended(self, row: int) -> tuple[range, range]:
        picture = self.slot(self.pictures, self.prefix, row)
        question = self.slot(self.questions, self.suffix, row)
        prefix = 0 if self.prefix is None or picture < 0 else self.prefix.length(picture)
        return range(prefix), range(0 if self.suffix is None else self.suffix.length(question))

    def rotated(self, head: Tensor, position: int, dtype: torch.dtype) -> Tensor:
        """[..., D] rotated in float32, or float64 for the oracle, and rounded to dtype."""
        half = self.cos.shape[1]
        if not self.case.rotates:
            return head.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin, head = self.cos[position].to(wide), self.sin[position].to(wide), head.to(wide)
        step = 2 if self.case.rotates == "interleaved" else 1
        first = slice(0, 2 * half, 2) if step == 2 else slice(0, half)
        second = slice(1, 2 * half, 2) if step == 2 else slice(half, 2 * half)
        result = head.clone()
        result[..., first] = head[..., first] * cos - head[..., second] * sin
        result[..., second] = head[..., second] * cos + head[..., first] * sin
        return result.to(dtype)

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        outs, lses, group = [], [], self.case.heads // self.case.kv_heads
        for row in range(self.case.rows):
            keys, values, seen = [], [], []
            prefix, suffix = self.attended(row)
            position = self.position(row)
            if len(prefix) and self.prefix is not None:
                picture = self.slot(self.pictures, self.prefix, row)
                keep = torch.ones(len(prefix), dtype=torch.bool)
                if self.mask is not None:
                    keep = self.mask[row, : len(prefix)]
                keys.append(self.prefix.key[picture, :, : len(prefix)].nan_to_num())
                values.append(self.prefix.value[picture, :, : len(prefix)].nan_to_num())
                seen.append(keep)
            if self.suffix is not None:
                question = self.slot(self.questions, self.suffix, row)
                keys.append(self.suffix.key[question, :, : len(suffix)])
                values.append(self.suffix.value[question, :, : len(suffix)])
                seen.append(torch.ones(len(suffix), dtype=torch.bool))
                if self.case.appends:
                    keys.append(self.rotated(self.key[row], position, dtype)[:, None])
                    values.append(self.value[row][:, None])
                    seen.append(torch.ones(1, dtype=torch.bool))
            if not seen or not torch.cat(seen).any():
                outs.append(torch.zeros(self.case.heads, self.case.head_dim, dtype=dtype))
                lses.append(torch.full((self.case.heads,), -math.inf, dtype=dtype))
                continue
            query = self.rotated(self.query[row], position, dtype)[:, None]
            key, value = (torch.cat([t.to(dtype) for t in of], 1).repeat_interleave(group, 0) for of in (keys, values))
            scores = (query @ key.transpose(1, 2) * self.scale)[:, 0].masked_fill(~torch.cat(seen), -math.inf)
            outs.append((scores.softmax(-1)[:, None] @ value)[:, 0])
            lses.append(scores.logsumexp(-1))
        return torch.stack(outs), torch.stack(lses)

    def check(self, host: Any, **how: Any) -> tuple[Tensor, Tensor]:
        """By the rule; and the new token is appended, exactly, and nothing else is written."""
        (plain, plain_lse), (exact, exact_lse) = self.reference(self.dtype), self.reference(torch.float64)
        expected = [] if self.suffix is None else self.suffix.memory()
        if self.suffix is not None and self.case.appends:
            before = [tensor.clone() for tensor in (self.suffix.key, self.suffix.value)]
            for row in range(self.case.rows):
                question, at = self.slot(self.questions, self.suffix, row), len(self.attended(row)[1])
                self.suffix.key[question, :, at] = self.rotated(self.key[row], self.position(row), self.dtype)
                self.suffix.value[question, :, at] = self.value[row]
            expected = [memory.clone() for memory in self.suffix.memory()]
            for tensor, old in zip((self.suffix.key, self.suffix.value), before, strict=True):
                tensor.copy_(old)
        prefix = [] if self.prefix is None else [memory.clone() for memory in self.prefix.memory()]
        out, lse = self.run(host, **how)
        assert_close(out, plain, exact)
        finite = exact_lse.isfinite()
        assert torch.equal(lse.isinf(), ~finite)
        assert_close(lse[finite].to(self.dtype), plain_lse[finite], exact_lse[finite], "lse")
        for cache, memory in ((self.suffix, expected), (self.prefix, prefix)):
            for now, then in zip([] if cache is None else cache.memory(), memory, strict=True):
                assert torch.equal(now, then), "a cache is not as expected"
        return out, lse


# --- the kernels ------------------------------------------------------------------------------------------------------
MATRIX = [  # those that tensor cores take
    Case(1, 1, 64, (1,), (0,)),
    Case(2, 2, 64, (127, 128), (127, 1), rotates="interleaved"),
    Case(4, 2, 64, (129,), (128, 0, 3), (0, 0, 0), rotates="partial"),
    Case(4, 1, 128, (130, 5), (2, 0, 40), (1, 0, -1), (2, 0, 1), masked=True),
    Case(2, 2, 128, (257,), (), (0, 0), rotates=""),
    Case(2, 1, 128, (), (129, 0)),
    Case(1, 1, 64, (140, 20), (1,) * 20, (0,) * 17 + (1,) * 3, masked=True),  # more than 16 queries together
    Case(20, 1, 64, (60,), (3,), masked=True),  # more heads than a tile of 16
    Case(40, 1, 64, (135,), (3, 130), (0, 0)),  # more heads than any tile
]
PLAIN = [
    Case(1, 1, 8, (1,), (0,)),
    Case(4, 2, 24, (129, 3), (0, 2, 128), (0, 0, 1), masked=True),
    Case(2, 1, 80, (128,), (127, 5), (0, -1), rotates="interleaved"),
    Case(2, 2, 256, (131,), (1,), rotates="partial"),
    Case(1, 1, 8, (40, 5), (1,) * 20, (0,) * 17 + (1,) * 3),
    Case(20, 1, 16, (33,), (2,)),
    Case(1, 1, 8, (4200,), (130,), rotates=""),  # more splits than a warp has threads
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*MATRIX, *PLAIN], ids=str)
def test_the_kernel(host: Any, case: Case, dtype: torch.dtype) -> None:
    Call(case, dtype).check(host)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", MATRIX[2:4], ids=str)
def test_without_tensor_cores(host: Any, case: Case, dtype: torch.dtype) -> None:
    call = Call(case, dtype)
    plain, lse = call.check(host, tensor_cores=False)
    out, other = call.run(host)
    assert not torch.equal(out, plain)
    torch.testing.assert_close(lse, other, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_no_vector_fits(host: Any, dtype: torch.dtype) -> None:
    """Rows of a cache that start anywhere are read one by one."""
    call = Call(Case(2, 1, 64, (130,), (3,)), dtype)
    for cache in (call.prefix, call.suffix):
        assert cache is not None
        cache.guarded = [Guarded((1, 1, cache.key.shape[2], 67), dtype, fill=0.0) for _ in range(2)]
        key, value = (guarded.tensor[..., 3:] for guarded in cache.guarded)
        cache.key, cache.value = key.copy_(cache.key), value.copy_(cache.value)
    call.check(host)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(4, 2, 64, (130, 9), (0, 3, 128, 5, 1, 2), (0, 0, 1, 0, -1, 0), masked=True)])
def test_a_row_depends_on_nothing_else(host: Any, case: Case, dtype: torch.dtype) -> None:
    """The same bits alone and in any batch, in any order of the blocks, however the work is dealt out."""
    call = Call(case, dtype)
    out, lse = call.check(host)
    for enough, order in ((2048, 1), (1, 0), (1, 2), (60, 3), (60, 4)):
        again, other = call.run(host, enough=enough, order=order)
        assert torch.equal(again, out), (enough, order)
        assert torch.equal(other, lse), (enough, order)
    batches = [(row,) for row in range(case.rows)] + [(4, 0, 2), (5, 3, 1, 0), (1, 1, 1, 1, 1)]
    for rows in batches:
        again, other = call.only(*rows).run(host, enough=1 + 7 * len(rows), order=len(rows))
        assert torch.equal(again, out[list(rows)]), rows
        assert torch.equal(other, lse[list(rows)]), rows


def test_a_row_does_not_depend_on_the_tile(host: Any) -> None:
    call = Call(Case(1, 1, 64, (20,), (1,) * 20, (0,) * 20), torch.bfloat16)
    out, _ = call.check(host)
    for rows in ((0,), (16,), (19,), tuple(range(8, 20)), tuple(range(1, 20))):
        assert torch.equal(call.only(*rows).run(host)[0], out[list(rows)]), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 40])
def test_bad_rows_are_nan_and_harm_no_other(host: Any, head_dim: int, dtype: torch.dtype) -> None:
    """On a GPU nobody has looked at indices and lengths before."""
    case = Case(2, 1, head_dim, (130, 9, 5), (1, 2, 3, 4, 5, 6), (0, 0, 0, 1, 2, 2))
    whole = Call(case, dtype)
    out, lse = whole.check(host)
    assert whole.suffix is not None
    suffix = 6 + 3  # its capacity
    changes: list[tuple[str, list[tuple[int, int]], list[int]]] = [
        ("pictures", [(1, 3), (5, -2)], [1, 5]),
        ("pictures", [(0, 2**31 - 1), (1, -(2**31))], [0, 1]),
        ("questions", [(0, -1), (2, 6), (3, 2**31 - 1)], [0, 2, 3]),
        ("prefix", [(2, -1)], [4, 5]),
        ("prefix", [(0, 136)], [0, 1, 2]),
        ("suffix", [(0, -1), (1, suffix), (2, suffix + 1), (3, -(2**31))], [0, 1, 2, 3]),
        ("positions", [(0, -1), (4, 700), (5, 2**31 - 1)], [0, 4, 5]),
    ]
    for name, entries, bad in changes:
        call = Call(case._replace(questions=tuple(range(6))), dtype)
        assert call.prefix is not None and call.suffix is not None
        call.positions = torch.tensor([call.position(row) for row in range(6)], dtype=torch.int32)
        good = [row for row in range(6) if row not in bad]
        target = {"prefix": call.prefix.lengths, "suffix": call.suffix.lengths}.get(name, getattr(call, name, None))
        assert target is not None
        call.only(*good).run(host)
        expected = [memory.clone() for memory in call.suffix.memory()]
        for tensor in (call.suffix.key, call.suffix.value):
            for row in range(6):
                tensor[row, :, row + 1] = math.nan
        for index, value in entries:
            target[index] = value
        made, other = call.run(host, order=1)
        assert made[bad].isnan().all() and other[bad].isnan().all(), name
        assert torch.equal(made[good], out[good]) and torch.equal(other[good], lse[good]), name
        for now, then in zip(call.suffix.memory(), expected, strict=True):
            assert torch.equal(now, then), name


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_nothing_to_attend_to(host: Any, dtype: torch.dtype) -> None:
    """Zeros, and a log-sum-exp of -inf: no prefix and no suffix; a prefix of which nothing is seen."""
    call = Call(Case(2, 1, 64, (5, 0), (0, 0, 0, 2), (-1, 1, 0, -1), appends=False, masked=True), dtype)
    assert call.mask is not None
    call.mask[2] = False
    out, lse = call.check(host)
    assert (out[:3] == 0).all() and (lse[:3] == -math.inf).all() and lse[3].isfinite().all()
    call = Call(Case(2, 2, 64, (0, 3), (), (0, -1, 1)), dtype)
    out, lse = call.check(host)
    assert (out[:2] == 0).all() and (lse[:2] == -math.inf).all() and lse[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_what_may_be_left_out(host: Any, dtype: torch.dtype) -> None:
    case = Case(4, 2, 64, (18, 5, 9), (6, 2, 12))
    call = Call(case, dtype)
    assert call.prefix is not None and call.suffix is not None
    out, _ = call.check(host)
    call.positions = torch.tensor([24, 7, 21], dtype=torch.int32)
    call.wants_lse = False
    assert torch.equal(call.run(host)[0], out)
    call.positions[1:] = torch.tensor([650, 0])
    call.wants_lse = True
    call.check(host)
    full = Call(case._replace(appends=False), dtype)
    assert full.prefix is not None and full.suffix is not None
    for cache in (full.prefix, full.suffix):  # without lengths all of it counts
        cache.lengths = None
        cache.key.nan_to_num_(0.5)
        cache.value.nan_to_num_(0.25)
    full.check(host)
    empty = ARGS(rows=0, heads=2, kv_heads=2, head_dim=64, dtype=5)
    assert host.attention_on_host(ctypes.byref(empty), None, None, 1, LONG(9), 0) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_that_are_large_or_nan(host: Any, dtype: torch.dtype) -> None:
    call = Call(Case(2, 1, 64, (200,), (3,), rotates=""), dtype)
    call.scale = 20.0  # one position has all the weight
    call.check(host)
    call.query[0, 1, 5] = math.nan
    out, _ = call.run(host)
    assert out[0, 0].isfinite().all() and out[0, 1].isnan().all()


def test_no_two_threads_of_a_block_race_and_every_barrier_is_needed(tmp_path: Path) -> None:
    whole, *lacking = under_thread_sanitizer("race_attention.cpp", tmp_path, [], *([str(index)] for index in range(8)))
    assert "ThreadSanitizer" not in whole.stderr, whole.stderr[:2000]
    assert whole.stdout.splitlines() == ["done", f"{len(lacking)} barriers"]
    for index, run in enumerate(lacking):
        assert "data race" in run.stderr, f"nobody misses barrier {index}"


# --- arithmetic -------------------------------------------------------------------------------------------------------
def cut(rows: int, heads: int, kv_heads: int, prefix: int, suffix: int) -> Any:
    return ARGS(rows=rows, heads=heads, kv_heads=kv_heads, head_dim=64, prefix=CACHE(slots=int(prefix > 0),
                capacity=prefix), suffix=CACHE(slots=int(suffix > 0), capacity=suffix), dtype=4)  # fmt: skip


@pytest.mark.parametrize("enough", [1, 50, 2048])
@pytest.mark.parametrize("prefix", [0, 1, 128, 129, 700])
@pytest.mark.parametrize("suffix", [0, 1, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (17, 1), (33, 1)])
def test_every_piece_of_work_has_one_block(
    host: Any, heads: int, kv_heads: int, suffix: int, prefix: int, enough: int
) -> None:
    for rows in (1, 2, 16, 17, 40):
        given = ctypes.byref(cut(rows, heads, kv_heads, prefix, suffix))
        plan, block = (LONG * 8)(), (LONG * 7)()
        host.plan_numbers(given, LONG(enough), plan)
        tile, head_tiles, together, row_tiles, prefix_deal, suffix_deal, prefix_blocks, blocks = plan
        group = heads // kv_heads
        assert tile == (16 if rows * group <= 16 else 32)
        assert head_tiles == -(-group // tile) and together == max(1, tile // group)
        assert row_tiles == -(-rows // together)
        seen = []
        for index in range(blocks):
            host.block_numbers(given, LONG(enough), index, block)
            is_prefix, kv_head, head_tile, row, split, first, step = block
            assert bool(is_prefix) == (index < prefix_blocks)
            assert step == (prefix_deal if is_prefix else suffix_deal) and 0 <= first < step
            if is_prefix:
                own = range(row + first, min(rows, row + together), step)
                seen += [(1, kv_head, head_tile, leader, split) for leader in own]
            else:
                splits = range(first, -(-suffix // 128), step)
                seen += [(0, kv_head, head_tile, row, split) for split in splits]
        expected = [
            (kind, kv_head, head_tile, row, split)
            for kind, capacity in ((1, prefix), (0, suffix))
            for kv_head, head_tile, row in itertools.product(range(kv_heads), range(head_tiles), range(rows))
            for split in range(-(-capacity // 128))
        ]
        assert sorted(seen) == sorted(expected)
        assert blocks >= kv_heads * head_tiles * rows  # somebody answers for every row


def numbers(*values: int) -> Any:
    return (INT * len(values))(*values)


def test_rows_that_read_together(host: Any) -> None:
    pictures = [0, 0, 0, 1, 1, 0, -1, -1, 2, 2, 2, 2, 2]
    for most in range(1, 9):
        given = cut(len(pictures), 1, 1, 1, 0)
        given.pictures = ctypes.cast(numbers(*pictures), ADDRESS)
        sizes = [host.group_size(ctypes.byref(given), LONG(row), LONG(most)) for row in range(len(pictures))]
        expected = []
        for _, group in itertools.groupby((picture, row // most) for row, picture in enumerate(pictures)):
            size = len(list(group))
            expected += [size] + [0] * (size - 1)
        assert sizes == expected
    alone = cut(5, 1, 1, 1, 0)
    assert [host.group_size(ctypes.byref(alone), LONG(row), LONG(4)) for row in range(5)] == [1] * 5


def test_what_a_row_attends_to(host: Any) -> None:
    given = cut(4, 1, 1, 10, 6)
    given.prefix.slots, given.suffix.slots = 2, 3
    lengths, pictures, questions = numbers(10, 4), numbers(1, -1, 0, 2), numbers(2, 0, 3, 1)
    held, positions = numbers(5, 0, 6), numbers(3, 99, 1, 0)
    for name, array in (("pictures", pictures), ("questions", questions)):
        setattr(given, name, ctypes.cast(array, ADDRESS))
    given.prefix.lengths, given.suffix.lengths = ctypes.cast(lengths, ADDRESS), ctypes.cast(held, ADDRESS)

    def row(r: int) -> tuple[Any, ...]:
        to = (LONG * 5)()
        valid = host.row_numbers(ctypes.byref(given), LONG(r), to)
        return (valid, *to)

    assert row(0) == (1, 1, 2, 4, 6, 10)
    assert row(1) == (1, -1, 0, 0, 5, 5)
    assert [row(2)[0], row(3)[0]] == [0, 0]  # no such question, no such picture
    given.key.data = 8  # one more in the suffix: the question of row 0 is full
    assert row(0)[0] == 0 and row(1) == (1, -1, 0, 0, 6, 5)
    given.positions = ctypes.cast(positions, ADDRESS)
    assert row(1) == (1, -1, 0, 0, 6, 99)
    given.rope.cos, given.rope.positions = 8, 99
    assert row(1)[0] == 0
    given.rope.positions = 100
    assert row(1)[0] == 1


@pytest.mark.parametrize("half", [0, 1, 3, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(host: Any, interleaved: bool, half: int) -> None:
    generator = torch.Generator().manual_seed(half)
    head, angles = torch.randn(8, generator=generator), torch.rand(5, half, generator=generator) * 6
    cos, sin = angles.cos().contiguous(), angles.sin().contiguous()
    rope = ROPE(pointer(cos), pointer(sin), 5, half, interleaved)
    made = [host.rotated_element(pointer(head), LONG(i), ctypes.byref(rope), LONG(3)) for i in range(8)]
    expected = head.clone()
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, half + pair)
        expected[a] = head[a] * cos[3, pair] - head[b] * sin[3, pair]
        expected[b] = head[b] * cos[3, pair] + head[a] * sin[3, pair]
    assert made == expected.tolist()
    none = [host.rotated_element(pointer(head), LONG(i), ctypes.byref(ROPE()), LONG(3)) for i in range(8)]
    assert none == head.tolist()


def test_merging_unfinished_softmaxes(host: Any) -> None:
    pair = ctypes.c_float * 2
    parts = [(-math.inf, 0.0), (3.0, 1.5), (-math.inf, 0.0), (5.0, 2.0), (-100.0, 1.0), (5.0, 1.0)]
    all_parts, weighted = pair(-math.inf, 0.0), 0.0
    for index, part in enumerate(parts):
        weights = pair()
        host.merge_into(all_parts, pair(*part), weights)
        weighted = weighted * weights[0] + index * part[1] * weights[1]
    total = sum(2.0 ** (largest - 5) * count for largest, count in parts)
    exact = sum(2.0 ** (largest - 5) * count * index for index, (largest, count) in enumerate(parts))
    assert all_parts[0] == 5.0
    assert all_parts[1] == pytest.approx(total, rel=1e-6) and weighted == pytest.approx(exact, rel=1e-6)
    assert host.log_sum_exp_of(ctypes.c_float(5), ctypes.c_float(8)) == pytest.approx(8 * math.log(2), rel=1e-6)
    assert host.log_sum_exp_of(ctypes.c_float(-math.inf), ctypes.c_float(0)) == -math.inf
