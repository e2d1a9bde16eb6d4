"""The matrix products of the room fusion: features and weights -> sums, and back.

On the CPU they are torch's. They come in blocks of columns, so that what they need beside the tokens is at most as much
memory as the tokens take, or 8 MiB. Half precision that the processor does not compute with is widened on the way,
slice by slice: exact, and faster than the emulation in torch (docs/fusion.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sphinx_fast.ops._extension import FLOAT_DTYPES, extension

Sums = tuple[Tensor | None, Tensor | None, Tensor | None]  # fine, coarse, queries

_SLICE = 512  # columns of a feature that are widened at a time: they, and their weights, stay in the cache
_LEAST = 8 << 20  # bytes that a call may always take: fewer for one view would starve the products
_BLOCK = 64  # columns of a weight's result come in multiples of this

# On a GPU: our kernel, one launch for all products of a call, or cuBLAS. Ours has not run yet (docs/gpu.md); it becomes
# the default when it has been shown right there, and faster in the same run.
own_gemm = False


class Shape(NamedTuple):
    """Sizes of a call, and which features are `coarse`: those with fewer rows than the grid."""

    views: int
    queries: int
    grid: int
    repeat: int
    width: int
    tags: bool
    coarse: tuple[bool, ...]

    @property
    def fine_rows(self) -> int:
        return 1 + self.grid**2

    @property
    def coarse_rows(self) -> int:
        return 1 + (self.grid // self.repeat) ** 2

    @property
    def projected(self) -> int:
        return self.queries + self.fine_rows

    @property
    def tokens(self) -> int:
        return self.projected + 2 * self.tags

    @property
    def sum_rows(self) -> list[int | None]:
        """Rows of the fine, coarse and query sums; None where there are no such sums."""
        there = (not all(self.coarse), any(self.coarse), self.queries > 0)
        rows = (self.fine_rows, self.coarse_rows, self.queries)
        return [self.views * count if has else None for count, has in zip(rows, there, strict=True)]


def checked_shape(
    features: Sequence[Tensor],
    queries: Tensor | None,
    patch: Sequence[Tensor],
    query: Sequence[Tensor],
    tags: Sequence[Tensor],
) -> Shape:
    """What the arguments of a fusion say about its sizes. Raises ValueError or TypeError, naming the argument."""
    if not features:
        raise ValueError("features: expected at least one tensor, got none")
    if (queries is None) != (not query):
        raise ValueError("queries, query: expected both or none")
    views, dtype, device = features[0].shape[0] if features[0].dim() else 0, features[0].dtype, features[0].device
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"features[0]: expected dtype float32, float16 or bfloat16, got {dtype}")
    names = [f"features[{index}]" for index in range(len(features))]
    named = dict(zip(names, features, strict=True))
    if queries is not None:
        named["queries"] = queries
    for name, tensor in named.items():
        if tensor.dim() != 3 or tensor.shape[0] != views or 0 in tensor.shape[1:]:
            raise ValueError(f"{name}: expected shape [{views}, rows, channels], got {list(tensor.shape)}")
    sides = [math.isqrt(feature.shape[1] - 1) for feature in features]
    grid = max(sides)
    for name, side, feature in zip(names, sides, features, strict=True):
        if side * side != feature.shape[1] - 1 or side == 0:
            raise ValueError(f"{name}: expected a class row and a square of patch rows, got {list(feature.shape)}")
        if grid % side or side not in (grid, min(sides)):
            raise ValueError(f"{name}: a map of {side} x {side} does not fit beside one of {grid} x {grid}")
    width = patch[0].shape[0] if patch[0].dim() == 2 else 0
    channels = {"patch": sum(feature.shape[2] for feature in features)}
    if queries is not None:
        channels["query"] = queries.shape[2]
    for name, of in (("patch", patch), *([("query", query)] if query else [])):
        parts = ((f"{name}.{part}", tensor) for part, tensor in zip(
            ("weight", "bias", "norm_weight", "norm_bias"), of, strict=True))  # fmt: skip
        for part, tensor in parts:
            expected = (width, channels[name]) if part.endswith(".weight") else (width,)
            if tuple(tensor.shape) != expected or width == 0:
                raise ValueError(f"{part}: expected shape {[width or 'D', *expected[1:]]}, got {list(tensor.shape)}")
            named[part] = tensor
    if tags and len(tags) != 2:
        raise ValueError(f"tags: expected start and end, got {len(tags)} tensors")
    for name, tag in zip(("tags[0]", "tags[1]"), tags, strict=False):
        if tag.shape[-1] != width:
            raise ValueError(f"{name}: expected {width} values, got shape {list(tag.shape)}")
        named[name] = tag
    for name, tensor in named.items():
        if tensor.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype} (that of features[0]), got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device} (that of features[0]), got {tensor.device}")
        if not torch.compiler.is_compiling() and (tensor.is_conj() or tensor.is_neg()):
            raise ValueError(f"{name}: expected plain memory, got a lazily negated tensor; resolve it first")
    coarse = tuple(side < grid for side in sides)
    return Shape(
        views, queries.shape[1] if queries is not None else 0, grid, grid // min(sides), width, bool(tags), coarse
    )


@cache
def computes_with(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of `dtype` itself: float32 always, half precision where it has
    instructions for it. Elsewhere torch emulates them, slower than float32."""
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        probes: tuple[str, ...] = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_sve_supported")
    else:
        probes = ("_is_amx_fp16_supported",)
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)


def sums_dtype(tensor: Tensor) -> torch.dtype:
    """What the products come in: float32 on a GPU; on the CPU what its products are computed in."""
    return tensor.dtype if tensor.device.type == "cpu" and computes_with(tensor.dtype) else torch.float32


def sums(
    shape: Shape,
    features: Sequence[Tensor],
    queries: Tensor | None,
    weight: Tensor,
    query_weight: Tensor | None,
    out: Tensor,
) -> Iterator[tuple[int, Sums]]:
    """Blocks of columns of the products: (first column, (fine, coarse, queries)), each [rows, columns]."""
    flat = [feature.reshape(-1, feature.shape[-1]) for feature in features]
    if out.device.type == "cuda":
        yield 0, _sums_cuda(shape, flat, queries, weight, query_weight)
        return
    dtype = sums_dtype(out)
    widened = dtype != out.dtype
    columns = _columns(shape, out.element_size(), dtype.itemsize, widened)
    rows = shape.sum_rows
    memory = [torch.empty(count * columns, dtype=dtype) if count is not None else None for count in rows]
    scratch = _Scratch(max(count or 0 for count in rows), columns) if widened else None
    for column in range(0, shape.width, columns):
        count = min(columns, shape.width - column)
        part = slice(column, column + count)
        fine, coarse, of_queries = (
            None if block is None or of is None else block[: of * count].view(of, count)
            for block, of in zip(memory, rows, strict=True)
        )
        begun: set[bool] = set()
        channel = 0
        for x, small in zip(flat, shape.coarse, strict=True):
            target = coarse if small else fine
            assert target is not None
            _add_product(target, x, weight[part, channel : channel + x.shape[1]], small in begun, scratch)
            begun.add(small)
            channel += x.shape[1]
        if of_queries is not None and queries is not None and query_weight is not None:
            _add_product(of_queries, queries.reshape(-1, queries.shape[-1]), query_weight[part], False, scratch)
        yield column, (fine, coarse, of_queries)


def _columns(shape: Shape, token_size: int, sum_size: int, widened: bool) -> int:
    """Columns of a block, so that its memory is at most that of the tokens or `_LEAST`, and blocks are of one size."""
    limit = max(shape.views * shape.tokens * shape.width * token_size, _LEAST)
    rows = [count or 0 for count in shape.sum_rows]
    fixed = 4 * _SLICE * max(rows) if widened else 0
    most = (limit - fixed) // max(1, sum(rows) * sum_size + (4 * _SLICE if widened else 0))
    blocks = math.ceil(shape.width / max(most // _BLOCK * _BLOCK, 4 * _BLOCK))
    return min(math.ceil(shape.width / blocks / _BLOCK) * _BLOCK, shape.width)


class _Scratch:
    """Room for a slice of features and of weights in float32."""

    def __init__(self, rows: int, columns: int) -> None:
        self.x, self.weight = torch.empty(rows * _SLICE), torch.empty(columns * _SLICE)

    @staticmethod
    def widen(memory: Tensor, x: Tensor) -> Tensor:
        return memory[: x.numel()].view(x.shape).copy_(x)


def _add_product(target: Tensor, x: Tensor, weight: Tensor, add: bool, scratch: _Scratch | None) -> None:
    """target = x weight^T, or += where `add`."""
    step = x.shape[1] if scratch is None else _SLICE
    for begin in range(0, x.shape[1], step):
        part, of = x[:, begin : begin + step], weight[:, begin : begin + step]
        if scratch is not None:
            part, of = scratch.widen(scratch.x, part), scratch.widen(scratch.weight, of)
        if add or begin:
            target.addmm_(part, of.T)
        else:
            torch.mm(part, of.T, out=target)


def _sums_cuda(
    shape: Shape, flat: Sequence[Tensor], queries: Tensor | None, weight: Tensor, query_weight: Tensor | None
) -> Sums:
    """float32 sums of all columns: our kernel's with `own_gemm` and where it fits, else cuBLAS'."""
    problems: list[list[tuple[Tensor, Tensor]]] = [[], [], []]
    channel = 0
    for x, small in zip(flat, shape.coarse, strict=True):
        problems[int(small)].append((x, weight[:, channel : channel + x.shape[1]]))
        channel += x.shape[1]
    if queries is not None and query_weight is not None:
        problems[2].append((queries.reshape(-1, queries.shape[-1]), query_weight))
    gemm = getattr(extension(), "fusion_gemm", None) if own_gemm else None
    if gemm is not None:
        targets = _empty_rows(shape, torch.float32, weight.device)
        pairs = zip(targets, problems, strict=True)
        if gemm([(target, segments) for target, segments in pairs if target is not None]):
            return targets
    fine, coarse, of_queries = (_sum_of_products(segments) for segments in problems)
    return fine, coarse, of_queries


def _sum_of_products(segments: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """The float32 sum of x weight^T over (x, weight); None of no segments."""
    total: Tensor | None = None
    for x, weight in segments:
        how = {} if x.dtype == torch.float32 else {"out_dtype": torch.float32}
        product = torch.mm(x, weight.T, **how)  # type: ignore[call-overload]
        total = product if total is None else total.add_(product)
    return total


def empty_sums(shape: Shape, like: Tensor) -> Sums:
    """Memory for the gradients of the sums, all columns."""
    return _empty_rows(shape, sums_dtype(like), like.device)


def _empty_rows(shape: Shape, dtype: torch.dtype, device: torch.device) -> Sums:
    fine, coarse, queries = (
        None if count is None else torch.empty(count, shape.width, dtype=dtype, device=device)
        for count in shape.sum_rows
    )
    return fine, coarse, queries


def gradients(
    shape: Shape,
    features: Sequence[Tensor],
    queries: Tensor | None,
    weight: Tensor,
    query_weight: Tensor | None,
    of_sums: Sums,
    wanted: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """From the gradients of the sums to those of features and queries (empty where not wanted) and of both weights."""
    fine, coarse, of_queries = of_sums
    inputs: list[Tensor] = []
    of_weight = torch.empty_like(weight)
    channel = 0
    for x, small, want in zip(features, shape.coarse, wanted, strict=False):
        part, target = slice(channel, channel + x.shape[-1]), coarse if small else fine
        assert target is not None
        of_weight[:, part] = _matmul(target.T, x.reshape(-1, x.shape[-1]))
        inputs.append(_input_gradient(target, weight[:, part], x, want))
        channel += x.shape[-1]
    of_query_weight = None
    if queries is not None and query_weight is not None and of_queries is not None:
        of_query_weight = torch.empty_like(query_weight)
        of_query_weight.copy_(_matmul(of_queries.T, queries.reshape(-1, queries.shape[-1])))
        inputs.append(_input_gradient(of_queries, query_weight, queries, wanted[-1]))
    return inputs, of_weight, of_query_weight


def _matmul(gradient: Tensor, other: Tensor) -> Tensor:
    """In the dtype the device is fast in: `gradient` is float32 on a GPU, where half precision is faster."""
    dtype = other.dtype if gradient.is_cuda else gradient.dtype
    return torch.mm(gradient.to(dtype), other.to(dtype))


def _input_gradient(of_sums: Tensor, weight: Tensor, x: Tensor, wanted: bool) -> Tensor:
    return _matmul(of_sums, weight).to(x.dtype).view(x.shape) if wanted else x.new_empty(0)
