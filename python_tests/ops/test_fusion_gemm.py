"""The matrix products of the room fusion on a GPU: sums over operands that are never concatenated."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from close import Guarded, assert_close, assert_repeatable
from torch import Tensor

from sphinx_fast.ops import extension

pytestmark = pytest.mark.gpu

Problem = tuple[Tensor, list[tuple[Tensor, Tensor]]]  # out, and (x, weight) of each segment


def problems_of(
    sizes: list[tuple[int, list[int]]], columns: int, dtype: torch.dtype, pad: int = 8
) -> tuple[list[Problem], list[Guarded]]:
    """Rows and depths of each problem. Operands are slices of wider buffers, outputs lie between guards."""
    problems: list[Problem] = []
    guarded: list[Guarded] = []
    for rows, depths in sizes:
        total = sum(depths)
        x = torch.randn(rows, total + pad, device="cuda", dtype=dtype)
        weight = torch.randn(columns, total + pad, device="cuda", dtype=dtype)
        out = Guarded((rows, columns), torch.float32, "cuda")
        starts = [0, *itertools.accumulate(depths)]
        slices = [slice(start, start + depth) for start, depth in zip(starts, depths, strict=False)]
        problems.append((out.tensor, [(x[:, part], weight[:, part]) for part in slices]))
        guarded.append(out)
    return problems, guarded


def check(problems: list[Problem], guarded: list[Guarded]) -> None:
    for index, ((_, segments), out) in enumerate(zip(problems, guarded, strict=True)):
        exact = sum(x.double() @ weight.double().T for x, weight in segments)
        plain = sum(x.float() @ weight.float().T for x, weight in segments)
        assert_close(out.check(f"problem {index}"), plain, exact, f"problem {index}")


def gemm(problems: list[Problem]) -> Any:
    return getattr(extension(), "fusion_gemm")(problems)  # noqa: B009 - absent from a build without CUTLASS


REAL = [(1285, [1024, 1536]), (325, [3072]), (160, [768])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "columns"),
    [
        (REAL, 4096),
        (REAL, 5120),
        ([(257, [1024, 1536]), (65, [3072]), (32, [768])], 4096),
        ([(2570, [1024, 1536]), (650, [3072]), (320, [768])], 5120),
        ([(1, [8])], 8),
        ([(127, [64]), (128, [64]), (129, [64])], 128),
        ([(300, [72, 8, 136, 200])], 264),
        ([(5, [56]), (63, [64]), (64, [120]), (65, [24])], 136),
    ],
)
def test_sums_over_segments(sizes: list[tuple[int, list[int]]], columns: int, dtype: torch.dtype) -> None:
    problems, guarded = problems_of(sizes, columns, dtype)
    assert gemm(problems)
    check(problems, guarded)


def test_the_same_bits_whatever_else_is_in_the_launch() -> None:
    problems, _ = problems_of(REAL, 4096, torch.bfloat16)
    alone = [torch.empty_like(out) for out, _ in problems]
    for target, (_, segments) in zip(alone, problems, strict=True):
        assert gemm([(target, segments)])
    assert gemm(problems)
    assert all(torch.equal(target, out) for target, (out, _) in zip(alone, problems, strict=True))
    out = problems[0][0]
    assert_repeatable(lambda: (gemm(problems), out)[1])


def test_graph_replay() -> None:
    problems, guarded = problems_of(REAL, 4096, torch.bfloat16)
    assert gemm(problems)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm(problems)
    for out in guarded:
        out.tensor.fill_(float("nan"))
    problems[0][1][0][0].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    check(problems, guarded)


def test_what_does_not_fit_is_left_to_the_library() -> None:
    odd, _ = problems_of([(16, [12])], 8, torch.bfloat16, pad=0)
    assert not gemm(odd)
    single, _ = problems_of([(16, [16])], 8, torch.float32)
    assert not gemm(single)
    with pytest.raises(ValueError, match="weight: expected shape"):
        gemm([(torch.empty(4, 8, device="cuda"), [(torch.empty(4, 8).cuda().half(), torch.empty(9, 8).cuda().half())])])
