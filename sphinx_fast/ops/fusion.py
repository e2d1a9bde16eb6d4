"""The room fusion: encoder features -> visual tokens, the rows a language model reads.

Names of shapes: N views, P = grid * grid patches, Q queries, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sphinx_fast.ops import _fusion_products as products
from sphinx_fast.ops._extension import extension
from sphinx_fast.ops._register import refuse_lazy, register

_CHUNKS = {"cpu": 64, "cuda": 264}  # of rows whose gradients are summed apart; two blocks for each of 132 processors


class Projection(NamedTuple):
    """LayerNorm(Linear(x)) as tensors: `weight` [D, C], `bias`, `norm_weight` and `norm_bias` [D]."""

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def fusion(
    features: Sequence[Tensor],
    patch: Projection,
    *,
    queries: Tensor | None = None,
    query: Projection | None = None,
    tags: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    out: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """The tokens of every view, [N, T, D]: start tag, queries, class token, patches row-major, end tag.

    The features of the encoders are multiplied with their columns of `patch.weight` one after another and never
    concatenated. An encoder whose map is smaller than the grid gives its distinct rows only: they are multiplied once,
    and the products repeated (ConvNeXt's 65 rows instead of 257 spare 40 % of the arithmetic).

    Args:
        features: of each encoder [N, 1 + p, C_i], class row first, sum of C_i = C; p = P, or fewer: P / r**2, the same
            for all that have fewer. Rows may be strided, as slices of one buffer are. Their gradient is computed
            only where they require it; frozen encoders do not.
        patch: weight [D, C] and vectors [D].
        queries: [N, Q, Cq], with `query`: weight [D, Cq] and vectors [D].
        tags: start and end, D values each.
        out: where the tokens go, [N * T, D], or with `first` the rows of something larger [rows, D], such as the
            embeddings of a batch. Not where gradients are wanted.
        first: int64 [N], the row of `out` where each view starts, ascending. On a GPU a view that would leave `out` is
            not written.

    Returns:
        [N, T, D] in the features' dtype (float32, float16, bfloat16), T = 1 + P + Q + (2 with tags); `out` when given.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names the argument.

    Equivalent to, for one coarse encoder of ratio r between two others:
        map = coarse[:, 1:].unflatten(1, (g, g)).repeat_interleave(r, 1).repeat_interleave(r, 2).flatten(1, 2)
        x = torch.cat([fine_1, torch.cat([coarse[:, :1], map], 1), fine_2], -1)
        tokens = F.layer_norm(F.linear(x, patch.weight, patch.bias), (D,), patch.norm_weight, patch.norm_bias, eps)
        torch.cat([start.expand(N, 1, D), the same of queries, tokens, end.expand(N, 1, D)], 1)
    Source: paper section 3.1; rounding as there, the linear layer's result in the features' dtype.
    """
    features, patch_ = _tensors("features", features), _tensors("patch", patch, 4)
    query_ = _tensors("query", query, 4) if query is not None else []
    tags_ = [tag.reshape(-1) for tag in _tensors("tags", tags, 2)] if tags is not None else []
    rest = {name: one for name, one in (("queries", queries), ("out", out), ("first", first)) if one is not None}
    for name, one in rest.items():
        _tensors(name, [one])
    if first is not None and out is None:
        raise ValueError("first: expected out beside it")
    shape = products.checked_shape(features, queries, patch_, query_, tags_)
    given = [*features, *([queries] if queries is not None else []), *patch_, *query_, *tags_]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        if out is not None:
            raise ValueError("out: expected None where gradients are wanted")
        return _Fusion.apply(shape, eps, len(features), *given)
    if out is None:
        tokens = features[0].new_empty(shape.views, shape.tokens, shape.width)
        out = tokens.flatten(0, 1)
    else:
        refuse_lazy(out, "out")
        if out.dtype != features[0].dtype:
            raise TypeError(f"out: expected dtype {features[0].dtype} (that of the features), got {out.dtype}")
        if out.device != features[0].device:
            raise ValueError(f"out: expected device {features[0].device} (that of the features), got {out.device}")
        tokens = out
    torch.ops.sphinx_fast.fusion(features, queries, patch_, query_, tags_, eps, first, out, None, None)
    return tokens


def _tensors(name: str, given: Any, count: int | None = None) -> list[Tensor]:
    """`given` as a list of `count` tensors. TypeError or ValueError, naming the argument, where it is none."""
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name}: expected a sequence of tensors, got {type(given).__name__}")
    for one in given:
        if not isinstance(one, Tensor):
            raise TypeError(f"{name}: expected tensors, got {type(one).__name__}")
    if count is not None and len(given) != count:
        raise ValueError(f"{name}: expected {count} tensors, got {len(given)}")
    return list(given)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """LayerNorm over the last dimension, written to where it belongs, such as an encoder's slice of a wider buffer.

    Args:
        x: [..., C] in float32, float16 or bfloat16, the last dimension without gaps. No gradient flows back.
        weight, bias: [C].
        out: [..., C] of the same shape, its rows of any stride, as its groups of rows; x itself is allowed.

    Equivalent to `torch.nn.functional.layer_norm(x, (C,), weight, bias, eps)`.
    """
    for tensor, name in ((x, "x"), (weight, "weight"), (bias, "bias"), *([(out, "out")] if out is not None else [])):
        _tensors(name, [tensor])
        refuse_lazy(tensor.detach(), name)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got shape []")
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    elif out.shape != x.shape:
        raise ValueError(f"out: expected shape {list(x.shape)}, got {list(out.shape)}")
    elif out.requires_grad:
        raise ValueError("out: expected a tensor without requires_grad; detach it first")
    groups = math.prod(x.shape[:-2]), x.shape[-2] if x.dim() > 1 else 1, x.shape[-1]
    try:
        rows = out.view(groups)
    except RuntimeError as error:
        raise ValueError(f"out: expected at most two strides of rows, got strides {list(out.stride())}") from error
    torch.ops.sphinx_fast.layer_norm(x.detach().reshape(groups), weight.detach(), bias.detach(), eps, rows)
    return out


@register("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor(a!) out) -> ()")
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    extension().layer_norm(x, weight, bias, eps, out, isa=None, threads=torch.get_num_threads())


@register(
    "fusion(Tensor[] features, Tensor? queries, Tensor[] patch, Tensor[] query, Tensor[] tags, float eps, "
    "Tensor? first, Tensor(a!) out, Tensor(b!)? kept, Tensor(c!)? stats) -> ()"
)
def _fusion(
    features: list[Tensor],
    queries: Tensor | None,
    patch: list[Tensor],
    query: list[Tensor],
    tags: list[Tensor],
    eps: float,
    first: Tensor | None,
    out: Tensor,
    kept: Tensor | None,
    stats: Tensor | None,
) -> None:
    shape = products.checked_shape(features, queries, patch, query, tags)
    if out.dim() != 2 or out.shape[1] != shape.width:
        raise ValueError(f"out: expected shape [rows, {shape.width}], got {list(out.shape)}")
    rest: dict[str, Any] = {
        "views": shape.views,
        "query_count": shape.queries,
        "grid": shape.grid,
        "repeat": shape.repeat,
        "patch": patch[1:],
        "query": query[1:] or None,
        "start": tags[0] if tags else None,
        "end": tags[1] if tags else None,
        "eps": eps,
        "first": first,
        "kept": kept,
        "stats": stats,
        "isa": None,
        "threads": torch.get_num_threads(),
    }
    for column, sums in products.sums(shape, features, queries, patch[0], query[0] if query else None, out):
        extension().fusion(*sums, out, column=column, **rest)


def _backward_fake(grad: Tensor, features: list[Tensor], queries: Tensor | None, *args: Any) -> list[Tensor]:
    patch, query, _, _, tags, wanted = args
    given = [*features, *([queries] if queries is not None else [])]
    inputs = [torch.empty(tensor.shape if want else 0, dtype=grad.dtype, device=grad.device) for tensor, want in
              zip(given, wanted, strict=True)]  # fmt: skip
    return [
        *inputs,
        *(torch.empty_like(tensor) for tensor in (*patch, *query)),
        *(grad.new_empty(grad.shape[-1]) for _ in range(tags)),
    ]


@register(
    "fusion_backward(Tensor grad, Tensor[] features, Tensor? queries, Tensor[] patch, Tensor[] query, Tensor kept, "
    "Tensor stats, int tags, bool[] wanted) -> Tensor[]",
    fake=_backward_fake,
)
def _fusion_backward(
    grad: Tensor,
    features: list[Tensor],
    queries: Tensor | None,
    patch: list[Tensor],
    query: list[Tensor],
    kept: Tensor,
    stats: Tensor,
    tags: int,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of features (where wanted), queries, patch, query and tags, in this order; [0] where not wanted."""
    shape = products.checked_shape(features, queries, patch, query, [grad] * tags)
    grad = grad.contiguous()
    fine, coarse, query_sums = products.empty_sums(shape, grad)
    chunks = torch.empty(2, _CHUNKS[grad.device.type], 3, shape.width, device=grad.device)
    extension().fusion_backward(
        grad, kept, stats,
        query_count=shape.queries, grid=shape.grid, repeat=shape.repeat, tags=tags > 0,
        patch_weight=patch[2], query_weight=query[2] if query else None,
        fine=fine, coarse=coarse, queries=query_sums,
        patch_sums=chunks[0], query_sums=chunks[1] if query else None,
        isa=None, threads=torch.get_num_threads(),
    )  # fmt: skip
    inputs, weight, query_weight = products.gradients(
        shape, features, queries, patch[0], query[0] if query else None, (fine, coarse, query_sums), wanted
    )

    def vectors(sums: Tensor) -> list[Tensor]:  # bias, norm weight, norm bias; each in memory of its own
        return [sums[:, row].sum(0).to(grad.dtype) for row in (2, 0, 1)]

    of_query = [query_weight, *vectors(chunks[1])] if query_weight is not None else []
    ends = [grad[:, row].sum(0, dtype=torch.float32).to(grad.dtype) for row in (0, -1)] if tags else []
    return [*inputs, weight, *vectors(chunks[0]), *of_query, *ends]


class _Fusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: products.Shape, eps: float, count: int, *given: Tensor) -> Tensor:
        given = tuple(tensor.detach() for tensor in given)
        features, rest = list(given[:count]), list(given[count:])
        queries = rest.pop(0) if shape.queries else None
        patch, query, tags = rest[:4], rest[4:8] if shape.queries else [], rest[8 if shape.queries else 4 :]
        tokens = features[0].new_empty(shape.views, shape.tokens, shape.width)
        kept = features[0].new_empty(shape.views, shape.projected, shape.width)
        stats = torch.empty(shape.views, shape.projected, 2, device=kept.device)
        torch.ops.sphinx_fast.fusion(
            features, queries, patch, query, tags, eps, None, tokens.flatten(0, 1), kept, stats
        )
        ctx.save_for_backward(*given, kept, stats)
        ctx.shape, ctx.count = shape, count
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *given, kept, stats = ctx.saved_tensors
        features, rest = given[: ctx.count], given[ctx.count :]
        queries = rest.pop(0) if ctx.shape.queries else None
        split = 8 if ctx.shape.queries else 4
        patch, query, tags = rest[:4], rest[4:split], rest[split:]
        inputs = len(features) + (queries is not None)
        wanted = list(ctx.needs_input_grad[3 : 3 + inputs])
        gradients = torch.ops.sphinx_fast.fusion_backward(
            grad, features, queries, patch, query, kept, stats, len(tags), wanted
        )
        return (None, None, None, *(
            gradient if needed else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad[3:], strict=True)
        ))  # fmt: skip
