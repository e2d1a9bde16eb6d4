"""The layers that all encoders are made of, as functions over weights that do not train.

Activations are updated in place where that saves a pass: names that end in an underscore write over their first
argument. Shapes: N views, T tokens, C channels, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sphinx_fast import ops

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

# A CPU runs feed-forwards over so many rows at a time: enough for a GEMM, few enough that the hidden layer (four times
# as wide) stays in the cache and in memory the allocator keeps.
CPU_ROWS = 2560

Activation = Callable[[Tensor], Tensor]


class Linear(NamedTuple):
    """x @ weight.T + bias."""

    weight: Tensor
    bias: Tensor | None


class Norm(NamedTuple):
    """LayerNorm over the last axis."""

    weight: Tensor
    bias: Tensor
    eps: float


def project(x: Tensor, parts: Sequence[Linear], count: int) -> Sequence[Tensor]:
    """`count` equally wide projections of x [N, T, C], by as many layers or by one that holds them all."""
    if len(parts) > 1:
        return [F.linear(x, *part) for part in parts]
    weight, bias = parts[0]
    if x.is_cuda or torch.compiler.is_compiling():
        return F.linear(x, weight, bias).chunk(count, dim=-1)
    # Rows whose length is a multiple of 4 KiB would put a head's keys into the same few sets of a CPU's cache. A line
    # more between them spreads them.
    width, line = weight.shape[0], 64 // weight.element_size()
    rows = x.new_empty(x.shape[0] * x.shape[1], width + line)[:, :width]
    if bias is None:
        torch.mm(x.flatten(0, 1), weight.t(), out=rows)
    else:
        torch.addmm(bias, x.flatten(0, 1), weight.t(), out=rows)
    return rows.unflatten(0, x.shape[:2]).chunk(count, dim=-1)


def layer_norm(x: Tensor, w: Norm) -> Tensor:
    """LayerNorm over the last axis."""
    return F.layer_norm(x, w.weight.shape, w.weight, w.bias, w.eps)


def layer_norm_into(x: Tensor, w: Norm, out: Tensor) -> None:
    """LayerNorm over the last axis into `out`, of x's shape and any strides: how an encoder writes its slice."""
    if x.dtype in ops.FLOAT_DTYPES and ops.covers(x.device):
        ops.layer_norm(x, w.weight, w.bias, w.eps, out=out)
    else:
        out.copy_(layer_norm(x, w))


def attend(qkv: Sequence[Tensor], heads: int, implementation: str) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head: [N, T, H*d], [N, S, H*d], [N, S, H*d] -> [N, T, H*d]."""
    query, key, value = (x.unflatten(-1, (heads, -1)) for x in qkv)
    if implementation == "flash_attention_2" and flash_attn_func is not None and query.dtype != torch.float32:
        return flash_attn_func(query, key, value).flatten(2)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def residual_(x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
    """x + scale * y in place. A LayerScale costs nothing here: the addition reads it beside y, weights stay theirs."""
    return x.add_(y) if scale is None else x.addcmul_(y, scale)


def gelu_(x: Tensor) -> Tensor:
    """The exact GELU, over its argument."""
    return torch.ops.aten.gelu_(x)


def feed_forward(x: Tensor, up: Sequence[Linear], act: Activation | None, down: Linear) -> Tensor:
    """down(act(up(x))); or, of two layers and no activation, down(silu(gate(x)) * value(x))."""
    if act is None:
        # As one product they would be one tensor of 42 MB for five views of DINOv2, more than glibc keeps for the next
        # layer: page faults each time.
        gate, value = up
        return F.linear(F.silu(F.linear(x, *gate), inplace=True).mul_(F.linear(x, *value)), *down)
    return F.linear(act(F.linear(x, *up[0])), *down)


def feed_forward_(
    x: Tensor,
    y: Tensor,
    up: Sequence[Linear],
    act: Activation | None,
    down: Linear,
    scale: Tensor | None,
) -> Tensor:
    """x + scale * feed_forward(y) in place; x and y [N, ..., C]."""
    runs = -(-(x.numel() // x.shape[-1]) // CPU_ROWS)
    if runs <= 1 or x.is_cuda or torch.compiler.is_compiling() or not x.is_contiguous():
        return residual_(x, feed_forward(y, up, act, down), scale)
    rows = x.view(1, -1, x.shape[-1]).chunk(runs, dim=1), y.reshape(1, -1, y.shape[-1]).chunk(runs, dim=1)
    for part, normed in zip(*rows, strict=True):
        residual_(part, feed_forward(normed, up, act, down), scale)
    return x
