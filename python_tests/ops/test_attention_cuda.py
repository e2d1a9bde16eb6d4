"""The room attention on a GPU: by the rule of the CPU half, on the caller's stream, replayed from a graph."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from attention_cases import DTYPES, Case, Inputs, Results, assert_results_close, draw, same_bits, together
from close import Guarded, assert_repeatable
from torch import Tensor

from sphinx_fast.ops import KeyValues, Rope, Workspace, attention, attention_workspace

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

CASES = [
    # what tensor cores take: head_dim 64 and 128 in 16 bits
    Case(1, 1, 64, (1,), (0,), rope="halves"),
    Case(4, 4, 128, (127, 128, 129), (127, 128, 0), rope="interleaved"),
    Case(8, 2, 64, (257,), (0, 3, 128, 300), pictures=(0, 0, 0, 0), rope="halves partial", mask="some"),
    Case(
        8,
        2,
        128,
        (700, 5, 1),
        (9, 0, 3, 1, 4),
        (1, 1, -1, 0, 2),
        (0, 4, 3, 1, 2),
        "halves",
        mask="tiles",
        layout="pool",
    ),
    Case(2, 2, 64, (300, 40), (7,) * 37, (0,) * 30 + (1,) * 7, rope="halves"),
    Case(24, 1, 128, (200,), (5, 6), pictures=(0, 0), rope="halves", mask="nothing"),
    Case(40, 1, 64, (200,), (5, 600), pictures=(0, 0), rope="interleaved"),
    Case(4, 4, 128, (640, 300), None, pictures=(1, 0, 0)),
    Case(4, 1, 128, None, (600, 511, 512), rope="interleaved", layout="transposed"),
    Case(4, 4, 64, (17, 17, 17), (9, 9, 9), appends=False, spare=0),
    # what they do not
    Case(4, 4, 32, (130, 5), (1, 0), rope="halves"),
    Case(6, 1, 80, (20, 264), (7, 140, 0, 2), (1, -1, 1, 0), (3, 0, 1, 2), "halves partial", layout="fused"),
    Case(3, 3, 256, (266, 1), (2, 9, 30), (0, 0, 1), (2, 1, 0), "interleaved partial", mask="some"),
    Case(2, 1, 16, (30,), (1,) * 20, (0,) * 20),
    Case(4, 2, 64, (5,), (3,), pictures=(), questions=(), rope="halves"),
]
REAL = [  # 7B, one view's and five views' positions
    Case(32, 32, 128, (289,), (40,), rope="interleaved", spare=200),
    Case(32, 32, 128, (1455, 1455), (16, 80, 3, 130), (0, 0, 1, 1), rope="interleaved", spare=200),
]


def on(device: str, inputs: Inputs) -> Inputs:
    """With caches of its own."""
    made = inputs.copy()
    for cache in made.caches().values():
        if cache is not None:
            cache.memory = cache.memory.to(device)
            cache.lengths = None if cache.lengths is None else cache.lengths.to(device)
    moved = {
        field.name: value.to(device)
        for field in dataclasses.fields(made)
        if isinstance(value := getattr(made, field.name), Tensor)
    }
    rope = made.rope and Rope(made.rope.cos.to(device), made.rope.sin.to(device), made.rope.interleaved)
    return dataclasses.replace(made, rope=rope, **moved)


def run(inputs: Inputs, **rest: Any) -> Results:
    """On the GPU, in guarded memory; all caches looked at afterwards."""
    given, shape = on(DEVICE, inputs), inputs.query.shape
    out = Guarded((shape[0], shape[1] + 2, shape[2] + 16), inputs.query.dtype, DEVICE, fill=7.0)
    lse = Guarded(shape[:2], torch.float32, DEVICE)
    mine = out.tensor[:, 1:-1, 8:-8]
    assert attention(given.query, **given.arguments(), out=mine, lse=lse.tensor, **rest) is mine
    made, kept = mine.clone().cpu(), lse.tensor.clone().cpu()
    mine.fill_(7.0)
    assert (out.check("out") == 7.0).all(), "out: memory around the rows was written"
    lse.tensor.fill_(0.0)
    lse.check("lse")
    return Results(made, kept, inputs.appended_by(on("cpu", given)))


def scratch(inputs: Inputs) -> Workspace:
    given, kv_heads, capacities = inputs.arguments(), 1, [0, 0]
    for index, name in enumerate(("prefix", "suffix")):
        if (cache := given[name]) is not None:
            kv_heads, capacities[index] = cache.key.shape[1], cache.key.shape[2]
    rows, heads, head_dim = inputs.query.shape
    return attention_workspace(
        rows, heads, head_dim, kv_heads, capacities[0], capacities[1], device=torch.device(DEVICE)
    )


def same(one: Results, other: Results) -> None:
    assert same_bits(one.out, other.out)
    assert same_bits(one.lse, other.lse)
    assert one.keys is None or other.keys is None or same_bits(one.keys, other.keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    draws = [draw(case, dtype, seed) for seed in range(case.draws)]
    plain = together(one.reference(dtype) for one in draws)
    exact = together(one.reference() for one in draws)
    assert_results_close(together(run(one) for one in draws), plain, exact, "gpu")
    assert_results_close(together(one.run() for one in draws), plain, exact, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 96])
def test_a_row_does_not_depend_on_its_batch(head_dim: int, dtype: torch.dtype) -> None:
    """Nor on who shares its picture, on the size of the tile or on the blocks' turns."""
    pictures = (0,) * 20 + (1, 0, -1, 1, 1)
    case = Case(4, 2, head_dim, (300, 129), tuple(range(25)), pictures, rope="halves", mask="some")
    inputs = draw(case, dtype)
    whole = run(inputs)
    for rows in [(0,), (19,), (22,), (24, 20), (3, 21, 4), tuple(range(7, 25)), tuple(range(24, -1, -1))]:
        part = run(inputs.only(*rows))
        same(part, Results(*(None if tensor is None else tensor[list(rows)] for tensor in whole)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_equal(dtype: torch.dtype) -> None:
    """One workspace for all of them: its counters are zero after each."""
    case = Case(8, 4, 128, (700, 300), (1, 200, 3, 50), (0, 0, 1, 0), rope="interleaved")
    inputs = on(DEVICE, draw(case, dtype))
    workspace = scratch(inputs)
    assert_repeatable(lambda: attention(inputs.query, **inputs.arguments(), workspace=workspace))
    assert not workspace.arrived.any()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_that_no_vector_fits(dtype: torch.dtype) -> None:
    """Rows of a cache that start anywhere."""
    inputs = draw(Case(4, 2, 64, (300,), (7,), rope="halves"), dtype)
    given = on(DEVICE, inputs)
    arguments = given.arguments()
    for name in ("prefix", "suffix"):
        key, value, lengths = arguments[name]
        wide = (torch.nn.functional.pad(tensor, (3, 0))[..., 3:] for tensor in (key, value))
        arguments[name] = KeyValues(next(wide), next(wide), lengths)
    lse = torch.zeros(given.query.shape[:2], device=DEVICE)
    made = attention(given.query, **arguments, lse=lse)
    results = Results(made.cpu(), lse.cpu(), None)
    assert_results_close(results, inputs.reference(dtype), inputs.reference())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [128, 80])
def test_bad_rows_become_nan(head_dim: int, dtype: torch.dtype) -> None:
    """Nobody waits for indices and lengths to look at them. The other rows stay as they are."""
    case = Case(4, 2, head_dim, (140, 9, 5), (1, 2, 3, 4, 5, 6), (0, 0, 0, 1, 2, 2), tuple(range(6)), "halves")
    inputs = draw(case, dtype)
    inputs.positions = torch.arange(6).int()
    expected = run(inputs)
    changes: dict[str, tuple[dict[int, int], list[int]]] = {
        "pictures": ({1: 3, 5: -2, 0: 2**31 - 1}, [0, 1, 5]),
        "questions": ({0: -1, 2: 6, 3: -(2**31)}, [0, 2, 3]),
        "positions": ({0: -1, 4: 10**6}, [0, 4]),
        "prefix": ({2: -1, 0: 144}, [0, 1, 2, 4, 5]),
        "suffix": ({0: -1, 1: 10, 3: 2**31 - 1}, [0, 1, 3]),
    }
    for name, (entries, bad) in changes.items():
        given = on(DEVICE, inputs)
        good = [row for row in range(6) if row not in bad]
        caches = given.caches()
        target = getattr(given, name) if name not in caches else caches[name] and caches[name].lengths
        for index, value in entries.items():
            target[index] = value
        before = given.copy()
        lse = torch.zeros(6, 4, device=DEVICE)
        made = attention(given.query, **given.arguments(), lse=lse)
        assert made[bad].isnan().all() and lse[bad].isnan().all(), name
        assert same_bits(made[good].cpu(), expected.out[good]) and same_bits(lse[good].cpu(), expected.lse[good]), name
        assert given.suffix is not None and before.suffix is not None and expected.keys is not None
        for now, then, new in zip(
            given.suffix.tensors()[:2], before.suffix.tensors()[:2], (expected.keys, inputs.value), strict=True
        ):
            for row in good:
                then[row, :, row + 1] = new[row].to(DEVICE)
            assert same_bits(now, then), f"{name}: what was appended"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_replays_at_other_lengths(dtype: torch.dtype) -> None:
    """Lengths, pictures, questions and masks are read when it runs; only capacities are fixed."""
    case = Case(8, 4, 128, (700, 300), (1, 200, 3, 50), (0, 0, 1, 0), (3, 2, 0, 1), "halves", mask="some", spare=300)
    inputs = draw(case, dtype)
    for cache in inputs.caches().values():
        assert cache is not None
        cache.memory.nan_to_num_(0.5)
    given = on(DEVICE, inputs)
    workspace, lse = scratch(given), torch.zeros(4, 8, device=DEVICE)
    out = torch.zeros_like(given.query)

    def step(of: Inputs) -> Tensor:
        return attention(of.query, **of.arguments(), out=out, lse=lse, workspace=workspace)

    step(given)  # once outside: loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(given)
    for prefixes, suffixes, pictures, questions in [
        ((700, 300), (1, 200, 3, 50), (0, 0, 1, 0), (3, 2, 0, 1)),
        ((1, 1000), (0, 128, 500, 127), (1, 1, 1, 1), (0, 1, 2, 3)),
        ((0, 129), (255, 0, 1, 2), (-1, 0, -1, 1), (2, 3, 1, 0)),
    ]:
        new = [(given.prefix.lengths, prefixes), (given.suffix.lengths, suffixes)]  # type: ignore[union-attr]
        new += [(given.pictures, pictures), (given.questions, questions)]
        for tensor, values in new:
            assert tensor is not None
            tensor.copy_(torch.tensor(values))
        other = given.copy()
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        made, kept = out.clone(), lse.clone()
        step(other)
        assert same_bits(made, out) and same_bits(kept, lse)
        assert not made.isnan().any()
        assert given.suffix is not None and other.suffix is not None
        assert same_bits(given.suffix.memory, other.suffix.memory)
        assert not workspace.arrived.any()


def test_two_streams_at_once() -> None:
    """Each with a workspace of its own."""
    case = Case(32, 32, 128, (1455, 700), (16, 80, 3, 130), (0, 0, 1, 1), rope="interleaved")
    both = [on(DEVICE, draw(case, torch.bfloat16, seed)) for seed in range(2)]
    expected = [attention(one.query, **one.arguments()) for one in both]
    workspaces, streams = [scratch(one) for one in both], [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    made: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for index, (one, stream) in enumerate(zip(both, streams, strict=True)):
            with torch.cuda.stream(stream):
                made[index].append(attention(one.query, **one.arguments(), workspace=workspaces[index]))
    torch.cuda.synchronize()
    for tensors, result in zip(made, expected, strict=True):
        assert all(same_bits(tensor, result) for tensor in tensors)


def test_everything_runs_on_the_callers_stream() -> None:
    """The queries come into being on the same stream, behind a long wait."""
    inputs = draw(Case(8, 8, 128, (700,), (16,), rope="halves"), torch.bfloat16)
    expected, given = run(inputs), on(DEVICE, inputs)
    late, pinned = torch.zeros_like(given.query), inputs.query.contiguous().pin_memory()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(pinned, non_blocking=True)
        made = attention(late, **given.arguments())
    stream.synchronize()
    assert same_bits(made.cpu(), expected.out)


def test_devices_are_not_mixed() -> None:
    inputs = draw(Case(4, 2, 64, (30,), (5,), (0,), (0,), "halves", mask="some"), torch.bfloat16)
    given = on(DEVICE, inputs)
    for name in ("key", "pictures", "questions", "mask"):
        with pytest.raises(ValueError, match=name):
            attention(given.query, **given.arguments() | {name: getattr(inputs, name)})
    with pytest.raises(ValueError, match="out"):
        attention(given.query, **given.arguments(), out=torch.zeros_like(inputs.query))
    with pytest.raises(ValueError, match="workspace"):
        small = Workspace(torch.zeros(8, device=DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE))
        attention(given.query, **given.arguments(), workspace=small)
