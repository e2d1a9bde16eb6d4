"""The room attention against float64 on the CPU, in every instruction set, and what it promises."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    DTYPES,
    Cache,
    Case,
    Inputs,
    Results,
    assert_results_close,
    draw,
    flat,
    indices,
    raw,
    rotate,
    same_bits,
    together,
)
from close import Guarded, assert_repeatable
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sphinx_fast.ops import KeyValues, Rope, attention, extension

ISAS = extension().isas()

CASES = [
    # prefix or suffix alone, no rows
    Case(1, 1, 16, (1,)),
    Case(4, 4, 32, (70, 5)),
    Case(6, 1, 80, (9, 33, 64), spare=0),
    Case(1, 1, 16, None, (0,)),
    Case(8, 2, 64, None, (0, 1, 63, 64, 65), rope="halves"),
    Case(4, 4, 32, None, (3, 17, 1), appends=False, spare=0),
    Case(4, 1, 128, None, (600, 511, 512), rope="interleaved", layout="pool"),
    Case(4, 2, 16, (5,), (3,), pictures=(), questions=(), rope="halves"),
    Case(4, 2, 16, (0,), (0,), spare=0),
    Case(4, 2, 16, (0, 3), (0, 3), appends=False),
    # pictures with different numbers of questions, some with none, rows in any order, slots permuted
    Case(4, 4, 32, (17,), (0, 5, 70), pictures=(0, 0, 0), rope="halves"),
    Case(8, 2, 64, (65, 3, 130), (0, 1, 15, 16, 31, 64), (0, 1, 0, -1, 2, 2), (5, 2, 0, 1, 4, 3), "interleaved"),
    Case(6, 1, 80, (20, 64), (7, 40, 0, 2), (1, -1, 1, 0), (3, 0, 1, 2), "halves partial", layout="fused"),
    Case(
        3, 3, 256, (66, 1), (2, 9, 30), (0, 0, 1), (2, 1, 0), "interleaved partial", layout="transposed", appends=False
    ),
    Case(8, 2, 128, (1, 512, 16), (9, 0, 3, 1, 4), (1, 1, 1, 0, 2), (0, 4, 3, 1, 2), "halves", layout="pool"),
    Case(4, 1, 64, (40, 90), (8, 6, 3), (-1, -1, -1), rope="halves"),
    Case(2, 1, 32, (30, 31), (8, 6, 3), (1, 0, 1), (2, 0, 1), "interleaved", positions=True),
    Case(2, 2, 112, (64, 200), (1, 2), rope="halves", layout="fused", scale=0.3),
    Case(4, 2, 48, (128,), (2, 3), (0, 0), scale=-0.2),
    # masks
    Case(4, 2, 32, (150, 20), (3, 2, 1, 0), (0, 0, 1, -1), mask="some", rope="halves"),
    Case(8, 2, 16, (200,), (3, 2, 1, 0), (0,) * 4, mask="tiles", layout="pool"),
    Case(4, 4, 64, (130, 64), None, (0, 0, 1, 1), mask="nothing"),
    Case(4, 1, 32, (520,), (3, 0, 1), (0, 0, 0), mask="nothing", rope="interleaved", appends=False),
    # more rows of a picture than walk together
    Case(2, 2, 16, (100,), tuple(range(70)), (0,) * 70, rope="halves"),
    Case(8, 1, 32, (130, 7), (*range(12), 5), (*(0,) * 12, 1), layout="fused"),
    Case(64, 1, 16, (80,), (1, 2), (0, 0)),
    Case(66, 2, 16, (65,), (4, 0, 7), (0, 0, 0), mask="some"),
    # long ones
    Case(4, 2, 64, (1455, 600), (4, 9, 2), (0, 1, 1), rope="halves", layout="pool"),
    Case(2, 1, 128, (4096,), (30, 3), (0, 0), rope="interleaved"),
]


def check(*draws: Inputs, isas: Iterable[str] = ISAS, name: str = "", layout: str = "plain") -> None:
    """Every draw by the op (in the best instruction set) and in the others; errors of all draws are judged at once."""
    plain = together(given.reference(given.query.dtype) for given in draws)
    exact = together(given.reference() for given in draws)
    for isa in isas:
        made = together(given.run(None if isa == ISAS[-1] else isa, layout=layout) for given in draws)
        assert_results_close(made, plain, exact, f"{name} {isa}")


def drawn(case: Case, dtype: torch.dtype) -> list[Inputs]:
    """In half precision the rounding of the result outweighs all chance."""
    return [draw(case, dtype, seed) for seed in range(case.draws if dtype == torch.float32 else min(case.draws, 6))]


# --- against float64 --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case, dtype: torch.dtype) -> None:
    check(*drawn(case, dtype), layout=case.layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 128, 511, 512, 513, 1025])
def test_every_length_of_a_prefix(length: int, dtype: torch.dtype) -> None:
    case = Case(4, 2, 32, (length, 1), (0, 2, 7, 1), (0, 0, 1, 0), (2, 0, 3, 1), "halves")
    check(*drawn(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_of_a_suffix(dtype: torch.dtype) -> None:
    lengths = (*range(34), *range(60, 71))
    check(draw(Case(3, 1, 48, None, lengths, questions=tuple(reversed(range(45)))), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_every_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    for rope in ("halves", "interleaved partial"):
        check(*drawn(Case(6, 2, head_dim, (70,), (5, 1), (0, 0), rope=rope), dtype), name=rope)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 13, 31, 33])
def test_any_number_of_rows_of_a_picture(rows: int, isa: str) -> None:
    for heads, kv_heads in ((1, 1), (5, 1)):
        check(*drawn(Case(heads, kv_heads, 16, (90,), (2,) * rows, (0,) * rows), torch.float16), isas=[isa])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_angle_turns_two_elements(dtype: torch.dtype) -> None:
    """The least a table may hold, and 3: neither is a whole vector."""
    for half in (1, 3, 5, 13):
        for interleaved in (False, True):
            given = draw(Case(8, 4, 32, (5,), (2, 3, 1), (0, 0, 0)), dtype)
            turns = torch.rand(20, half, generator=torch.Generator().manual_seed(half)) * 6
            given.rope = Rope(turns.cos(), turns.sin(), interleaved)
            check(given, name=f"{half} {interleaved}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_apart(dtype: torch.dtype, isa: str) -> None:
    """Scores of +-10000: all weight lies on few positions, and no power overflows or loses the largest."""
    for sign in (1, -1):
        given = draw(Case(8, 4, 64, (70, 513), (3, 5, 1, 9), (0, 1, 1, 0)), dtype)
        assert given.prefix is not None and given.suffix is not None and given.key is not None
        given.scale = sign * 800.0
        exact = given.reference()
        assert exact.lse.abs().max() > 10000
        assert_results_close(given.run(isa), given.reference(dtype), exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_scores_give_the_mean(dtype: torch.dtype, isa: str) -> None:
    """Of 608 and 601 positions; scores of some hundreds, another for each query."""
    given = draw(Case(8, 2, 32, (600,), (7, 0), (0, 0)), dtype)
    assert given.prefix is not None and given.suffix is not None and given.key is not None
    given.query *= 300
    given.key[:] = given.key[:1]
    for cache in (given.prefix, given.suffix):
        keys = cache.tensors().key
        keys[:] = given.key[0, :, None].where(~keys.isnan(), keys)
    made, exact = given.run(isa), given.reference()
    assert_results_close(made, given.reference(dtype), exact)
    for r, count in enumerate((608, 601)):
        score = (given.query[r].double() * given.key[0].double().repeat_interleave(4, 0)).sum(-1) * 32**-0.5
        assert torch.allclose(exact.lse[r], score + math.log(count), rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_judge_sees_what_is_wrong(dtype: torch.dtype) -> None:
    """A position too few, a mistaken rotation, another slot: none of them hides in the rule's tolerance."""
    given = draw(Case(4, 2, 32, (65,), (3, 9), (0, 0), (1, 0), "halves"), dtype)
    made = given.run()
    assert given.prefix is not None and given.rope is not None
    shorter = given.copy()
    assert shorter.prefix is not None
    shorter.prefix.lengths = indices((64,))
    wrong = [
        shorter,
        dataclasses.replace(given, questions=indices((0, 1))),
        dataclasses.replace(given, rope=given.rope._replace(interleaved=True)),
        dataclasses.replace(given, positions=indices((70, 78))),
        dataclasses.replace(given, scale=0.2),
    ]
    for other in wrong:
        plain, exact = other.reference(dtype), other.reference()
        with pytest.raises(AssertionError):
            assert_results_close(made, plain, exact)


# --- what is written --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "pool", "fused", "transposed"])
def test_the_new_key_is_appended_and_attended_to(layout: str, dtype: torch.dtype, isa: str) -> None:
    """`run` asserts that nothing else of the caches is written."""
    given = draw(Case(4, 2, 32, (9,), (4, 0, 7, 2), (0, -1, 0), (2, 0, 3), "halves", layout=layout), dtype)
    assert given.key is not None and given.suffix is not None and given.suffix.lengths is not None
    assert given.query is not None and given.value is not None and given.rope is not None
    lengths = given.suffix.lengths.clone()
    made, exact = given.run(isa, layout=layout), given.reference()
    assert torch.equal(given.suffix.lengths, lengths)
    assert made.keys is not None and exact.keys is not None
    positions = [9 + 7, 0 + 4, 9 + 2]
    for dtype_of, keys in ((torch.float64, exact.keys), (dtype, given.reference(dtype).keys)):
        assert keys is not None
        for r, position in enumerate(positions):
            assert torch.equal(keys[r], rotate(given.key[r].to(dtype_of), given.rope, position))
    without = draw(Case(4, 2, 32, (9,), (4, 0, 7, 2), (0, -1, 0), (2, 0, 3), "halves", layout=layout), dtype)
    without.key, without.value, without.positions = None, None, indices(positions)
    assert (without.run(isa).lse < made.lse).all(), "one position less"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unrotated_keys_are_copied(dtype: torch.dtype) -> None:
    given = draw(Case(4, 2, 32, None, (4, 0, 7), questions=(2, 0, 1)), dtype)
    for isa in ISAS:
        made = given.run(isa)
        assert made.keys is not None and given.key is not None
        assert same_bits(made.keys, given.key)


def test_steps_of_a_conversation() -> None:
    """Appending token for token gives the bits of attending to all of them at once."""
    steps, rows = 70, 2
    whole = draw(Case(4, 2, 32, (20,), (steps, steps), (0, 0), appends=False, spare=0), torch.bfloat16)
    assert whole.suffix is not None
    grown = whole.copy()
    assert grown.suffix is not None
    keys = grown.suffix.tensors()
    new = [part.clone() for part in keys[:2]]
    keys.key.fill_(math.nan), keys.value.fill_(math.nan)
    grown.suffix.lengths = torch.zeros(rows, dtype=torch.int32)
    for step in range(steps):
        grown.key, grown.value = (part[:, :, step] for part in new)
        out = attention(grown.query, **grown.arguments())
        grown.suffix.lengths += 1
    assert same_bits(grown.suffix.memory, whole.suffix.memory)
    assert torch.equal(out, whole.run().out)


def test_out_is_made_and_returned() -> None:
    given = draw(Case(4, 2, 32, (20,), (3, 4), (0, 0), layout="transposed", appends=False))
    made = attention(given.query, **given.arguments())
    assert made.is_contiguous() and made.dtype == given.query.dtype
    assert torch.equal(made, given.run().out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_out_may_lie_in_any_order(dtype: torch.dtype) -> None:
    """Rows and heads of any stride: heads first, as the next product may want them."""
    given = draw(Case(4, 2, 32, (20,), (3, 4, 5), (0, 0, 0)), dtype)
    out = Guarded((4, 3, 32), dtype)
    raw(given.copy(), out.tensor.transpose(0, 1))
    assert torch.equal(out.check().transpose(0, 1), given.run().out)


def test_the_prefix_may_be_expanded_memory() -> None:
    """What is only read may lie in itself."""
    given = draw(Case(4, 2, 32, (20, 20), None))
    assert given.prefix is not None
    key, value, lengths = given.prefix.tensors()
    one = KeyValues(key[:1].expand(2, -1, -1, -1), value[:1].expand(2, -1, -1, -1), lengths)
    arguments = given.arguments() | {"prefix": one}
    expected = attention(given.query, **given.arguments() | {"pictures": indices((0, 0))})
    assert torch.equal(attention(given.query, **arguments), expected)
    arguments |= {"mask": torch.ones(1, 23, dtype=torch.bool).expand(2, 23)}
    same = attention(given.query[:1].expand(2, -1, -1), **arguments)
    assert torch.equal(same, expected[:1].expand(2, -1, -1))


# --- the same bits ----------------------------------------------------------------------------------------------------
MIXED = Case(
    8, 2, 48, (70, 520, 3), (5, 0, 66, 1, 9, 2, 30, 17), (0, 0, 1, -1, 0, 1, 1, 2), (7, 3, 1, 0, 2, 6, 5, 4), "halves",
    mask="tiles",
)  # fmt: skip


def equal_rows(made: Results, all_of: Results, rows: list[int]) -> bool:
    pairs = zip(made, all_of, strict=True)
    return all(one is None or (many is not None and same_bits(one, many[rows])) for one, many in pairs)


def recached(given: Inputs, layout: str, spare: int) -> Inputs:
    """The same keys and values in caches of another capacity and order in memory."""
    made = given.copy()
    for name, cache in given.caches().items():
        assert cache is not None and cache.lengths is not None
        held, lengths = cache.tensors(), tuple(map(int, cache.lengths))
        slots, kv_heads, _, head_dim = held.key.shape
        capacity = max(lengths) + 1 + spare
        other = Cache(lengths, kv_heads, capacity, head_dim, layout).filled(
            lengths, given.query.dtype, torch.Generator().manual_seed(1)
        )
        for to, source in zip(other.tensors()[:2], held[:2], strict=True):
            for slot in range(slots):
                to[slot, :, : lengths[slot]] = source[slot, :, : lengths[slot]]
        setattr(made, name, other)
        if name == "prefix" and given.mask is not None:
            made.mask = F.pad(given.mask, (0, max(0, capacity - given.mask.shape[1])), value=True)[:, :capacity]
    return made


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, isa: str) -> None:
    for case in (MIXED, MIXED._replace(mask=""), MIXED._replace(heads=2, rope="interleaved partial")):
        given = draw(case, dtype)
        every = given.run(isa)
        order = [6, 2, 7, 0, 5, 3, 1, 4]
        for rows in (*([r] for r in range(8)), [0, 1], [2, 5, 6], [0, 4], order, order[::-1], order[2:5]):
            assert equal_rows(given.only(*rows).run(isa), every, rows), rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_questions_on_a_picture(dtype: torch.dtype, isa: str) -> None:
    """Alone, or as one of many: how many queries walk over a prefix together changes no bit of any."""
    given = draw(Case(6, 2, 32, (150,), (1,) * 23, (0,) * 23), dtype)
    every = given.run(isa)
    for count in (*range(1, 9), 12, 15, 20, 22):
        rows = list(range(23 - count, 23))
        assert equal_rows(given.only(*rows).run(isa), every, rows), count


@pytest.mark.parametrize("isa", ISAS)
def test_threads_leave_the_bits(isa: str) -> None:
    given = draw(MIXED, torch.bfloat16)
    expected = given.run(isa, threads=1)
    for threads in (2, 3, 32):
        assert equal_rows(given.run(isa, threads), expected, list(range(8))), threads


def test_torch_threads_leave_the_bits() -> None:
    given, threads = draw(MIXED), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert equal_rows(given.run(), given.run(ISAS[-1], 1), list(range(8))), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["plain", "pool", "fused", "transposed"])
def test_capacities_and_strides_leave_the_bits(layout: str, isa: str) -> None:
    given = draw(MIXED, torch.float16)
    given.key = given.value = None  # which layouts may be appended to is another matter
    expected = given.run(isa)
    for spare in (0, 1, 61, 300):
        other = recached(given, layout, spare).run(isa)
        assert equal_rows(other, expected, list(range(8))), spare


@pytest.mark.parametrize("isa", ISAS)
def test_a_mask_of_ones_leaves_the_bits(isa: str) -> None:
    given = draw(MIXED._replace(mask=""))
    assert given.prefix is not None
    masked = dataclasses.replace(given, mask=torch.ones(8, given.prefix.tensors().key.shape[2], dtype=torch.bool))
    assert equal_rows(masked.run(isa), given.run(isa), list(range(8)))


@pytest.mark.parametrize("isa", ISAS)
def test_repeats_are_equal(isa: str) -> None:
    given = draw(Case(4, 2, 32, (600, 70), (3, 9, 1), (0, 0, 1), rope="halves"), torch.bfloat16)
    suffix = given.copy()
    out, lse = torch.empty(3, 4, 32, dtype=torch.bfloat16), torch.empty(3, 4)

    def once() -> Tensor:
        raw(suffix, out.fill_(math.nan), lse.fill_(math.nan), isa=isa)
        assert suffix.suffix is not None
        return torch.cat([out.float().flatten(), lse.flatten(), suffix.suffix.memory.float().nan_to_num()])

    assert_repeatable(once)


# --- what is not finite -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["prefix", "suffix", "query", "key"])
def test_nan_reaches_the_rows_that_attend_to_it(where: str, dtype: torch.dtype, isa: str) -> None:
    given = draw(Case(4, 2, 32, (600, 70), (3, 9, 80, 1), (0, 1, 0, -1)), dtype)
    clean, bad = given.run(isa), given.copy()
    assert bad.prefix is not None and bad.suffix is not None and bad.key is not None
    if where == "prefix":
        bad.prefix.tensors().key[0, 1, 517, 3] = math.nan
    elif where == "suffix":
        bad.suffix.tensors().key[2, 1, 66, 3] = math.nan
    else:
        tensor = bad.query if where == "query" else bad.key
        spoiled = tensor.clone()
        spoiled[2, 3 if where == "query" else 1, 5] = math.nan
        setattr(bad, where, spoiled)
    rows = [0, 2] if where == "prefix" else [2]
    heads = [3] if where == "query" else [2, 3]
    arguments = bad.copy()
    out, lse = torch.full_like(given.query, 7.0), torch.full((4, 4), 7.0)
    raw(arguments, out, lse, isa=isa)
    touched = torch.zeros(4, 4, dtype=torch.bool)
    for row in rows:
        touched[row, heads] = True
    assert torch.equal(lse.isnan(), touched)
    assert torch.equal(out.isnan().all(-1), touched), "not hidden"
    assert torch.equal(out.isnan().any(-1), touched), "and not spread"
    assert torch.equal(out[~touched], clean.out[~touched])


@pytest.mark.parametrize("isa", ISAS)
def test_a_masked_key_is_not_seen(isa: str) -> None:
    """Nan or infinity at a position that a row does not attend to leaves it as it is, alone and beside rows that do.

    Values there must be finite: 0 times nan is nan, for scaled_dot_product_attention too.
    """
    given = draw(Case(4, 2, 32, (150,), (3, 2), (0, 0)))
    assert given.prefix is not None
    given.mask = torch.ones(2, 153, dtype=torch.bool)
    given.mask[0, 64:128] = False  # a whole tile
    given.mask[0, 3] = False
    clean = given.run(isa)
    for position in (3, 70):
        for value in (math.nan, math.inf):
            bad = given.copy()
            assert bad.prefix is not None
            bad.prefix.tensors().key[0, :, position] = value
            for rows in ([0], [0, 1], [1, 0]):
                part = bad.only(*rows)
                out = torch.empty_like(part.query)
                raw(part, out, isa=isa)
                assert torch.equal(out[rows.index(0)], clean.out[0]), f"{value} at {position}, rows {rows}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_value_stays_in_its_column(dtype: torch.dtype, isa: str) -> None:
    given = draw(Case(4, 2, 32, (70,), (3, 9), (0, 0)), dtype)
    clean = given.run(isa)
    assert given.prefix is not None
    given.prefix.tensors().value[0, 1, 65, 9] = math.nan
    out = torch.empty_like(given.query)
    raw(given.copy(), out, isa=isa)
    touched = torch.zeros_like(out, dtype=torch.bool)
    touched[:, 2:, 9] = True
    assert torch.equal(out.isnan(), touched)
    assert torch.equal(out[~touched], clean.out[~touched])


# --- as a torch op ----------------------------------------------------------------------------------------------------
def op_arguments(given: Inputs) -> tuple[Any, ...]:
    """In the order of the schema; without nan, which schema checks would take for a change."""
    made, given = given.query, given.copy()
    for cache in given.caches().values():
        if cache is not None:
            cache.memory.nan_to_num_(0.5)
    arguments = flat(made, **given.arguments(), out=torch.zeros_like(made), lse=torch.zeros(made.shape[:2]))
    if given.mask is not None:
        arguments["mask"] = given.mask.clone()
    names = [argument.name for argument in torch.ops.sphinx_fast.attention.default._schema.arguments]
    return made, *(arguments[name] for name in names[1:])


def test_opcheck() -> None:
    given = op_arguments(draw(Case(2, 1, 16, (5, 9), (3, 1), (0, 1), (1, 0), "halves", "some")))
    torch.library.opcheck(torch.ops.sphinx_fast.attention.default, given)


def test_the_schema_says_what_is_written() -> None:
    schema = torch.ops.sphinx_fast.attention.default._schema
    written = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert written == ["suffix_key", "suffix_value", "out", "lse", "partial", "arrived"]


def test_fake_tensors() -> None:
    given = draw(Case(4, 2, 16, (5,), (3, 1), (0, 0), rope="halves"), torch.bfloat16)
    mode, arguments = FakeTensorMode(), given.arguments()

    def fake(one: Any) -> Any:
        if isinstance(one, tuple):
            return type(one)(*map(fake, one))  # type: ignore[call-arg]
        return mode.from_tensor(one) if isinstance(one, Tensor) else one

    with mode:
        made = attention(fake(given.query), **{name: fake(one) for name, one in arguments.items()})
    assert (made.shape, made.dtype, made.device) == (given.query.shape, torch.bfloat16, torch.device("cpu"))


def test_compiles_without_a_graph_break() -> None:
    given = draw(Case(4, 2, 16, (5,), (3, 1), (0, 0), (1, 0), "halves", "some", "pool"))
    assert given.suffix is not None and given.rope is not None

    def step(query: Tensor, key: Tensor, value: Tensor, prefix: KeyValues, suffix: KeyValues, wide: Tensor) -> Tensor:
        rest: dict[str, Any] = {
            "pictures": given.pictures,
            "questions": given.questions,
            "rope": given.rope,
            "mask": given.mask,
        }
        rest |= {"key": key * 2, "value": value, "out": wide[:, 1:5, 3:19]}
        out = attention(query * 2, prefix=prefix, suffix=suffix, **rest)
        return out.sum() + wide.flatten() + suffix.key[1, :, 1].sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    made = []
    for function in (step, compiled, compiled):
        own, wide = given.copy(), torch.zeros(2, 6, 24)
        assert own.key is not None and own.value is not None and own.prefix is not None and own.suffix is not None
        own.suffix.memory.nan_to_num_(0.5)
        result = function(own.query, own.key, own.value, own.prefix.tensors(), own.suffix.tensors(), wide)
        made.append((result, wide, own.suffix.memory))
    for other in made[1:]:
        assert all(torch.equal(one, expected) for one, expected in zip(other, made[0], strict=True))


FORK = """
import multiprocessing, sys
sys.path[:0] = {path!r}
import torch
from attention_cases import Case, draw
from sphinx_fast.ops import Projection, attention, fusion, layer_norm, views

torch.set_num_threads(2)
given = draw(Case(8, 4, 64, (1300, 70), (3, 9, 80), (0, 0, 1), rope="halves"), torch.bfloat16)
picture = torch.arange(90 * 70 * 3).remainder(251).byte().view(90, 70, 3)
rows, one, few = torch.randn(300, 64), torch.ones(64), torch.ones(16)

def everything():  # torch itself must not be given enough to want its threads: in a child it waits for ever
    made = [
        attention(given.query, **given.arguments()),
        views([picture], picture_size=64, view_size=32),
        layer_norm(rows, one, one, 1e-5),
        fusion([torch.ones(1, 5, 4)], Projection(torch.ones(16, 4), few, few, few)),
    ]
    return [tensor.view(torch.uint8).numpy().tobytes() for tensor in made]

def child(sender):
    torch.set_num_threads(2)
    for _ in range(20):
        made = everything()
    sender.send(made)

if __name__ == "__main__":
    expected = everything()
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(sender,))
    process.start()
    hangs = not receiver.poll(60)
    made = None if hangs else receiver.recv()
    process.kill()
    process.join()
    assert not hangs, "the child hangs"
    assert made == expected, "the child gets other bits"
    assert everything() == expected, "the parent is disturbed"
    print("the same")
"""


def test_a_forked_child_computes_the_same() -> None:
    """Its parent's threads are not its own: whoever waits for them waits for ever."""
    tests = Path(__file__).parents[1]
    code = FORK.format(path=[str(tests), str(tests.parent)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0 and done.stdout == "the same\n", done.stdout + done.stderr
