"""The room attention: one decoding step over visual prefixes that questions share.

Names of shapes: R rows (one question with one new token each), H heads of queries, K heads of keys, D head_dim,
S positions of a prefix, T positions of a suffix, P pictures, Q questions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphinx_fast.ops._extension import CUDA_HINT, extension
from sphinx_fast.ops._register import refuse_lazy, register

_NOTHING = (None, None, None)
_NAMES = (
    "query", "prefix key", "prefix value", "prefix lengths", "suffix key", "suffix value", "suffix lengths", "key",
    "value", "pictures", "questions", "positions", "rope cos", "rope sin", "mask", "out", "lse", "workspace partial",
    "workspace arrived",
)  # fmt: skip


class KeyValues(NamedTuple):
    """Keys and values [slots, K, capacity, D], D without gaps, and int32 `lengths` [slots] (None: all are full)."""

    key: Tensor
    value: Tensor
    lengths: Tensor | None = None


class Rope(NamedTuple):
    """Rotary embedding by tables: float32 `cos` and `sin` [positions, half].

    Element i < half turns with element half + i (Hugging Face's Llama), or, `interleaved`, 2 i with 2 i + 1 (the
    released LLaMA). Elements from 2 * half on keep their values.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


class Workspace(NamedTuple):
    """What a GPU's step writes its splits to; made by `attention_workspace`, for one stream at a time."""

    partial: Tensor
    arrived: Tensor


def attention(
    query: Tensor,
    *,
    prefix: KeyValues | None = None,
    suffix: KeyValues | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    pictures: Tensor | None = None,
    questions: Tensor | None = None,
    positions: Tensor | None = None,
    rope: Rope | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """One new token of every row: rotate, append, attend to prefix and suffix, [R, H, D].

    Neighbouring rows of one picture read its prefix once. A row's bits do not depend on the other rows, nor on
    capacities, threads or (on a GPU those that keep 16-byte alignment) strides. Indices and lengths are read where the
    tensors lie: on a GPU nothing is allocated but `out` and `workspace`, nothing is waited for, and a captured call
    replays at other lengths.

    Args:
        query: [R, H, D] in float32, float16 or bfloat16, D a multiple of 16 up to 256, D without gaps.
        prefix: of P pictures, read only. H is a multiple of K; neighbouring heads share keys.
        suffix: of Q questions; `lengths` are those before this call.
        key, value: [R, K, D] of the new tokens: the key is rotated, both are written to the suffix at its length and
            attended to. The lengths stay as they are; they grow once a step, not once a layer. None: nothing is new.
        pictures: int32 [R], which prefix; -1: none. None: row r has prefix r.
        questions: int32 [R], which suffix, another one for each row. None: row r has suffix r.
        positions: int32 [R] of the new tokens. None: length of prefix + length of suffix.
        rope: rotates `query` and `key`. None: they come rotated.
        mask: bool [R, S], False: that prefix position is not attended to; its value must be finite. None: all are.
        scale: of the scores; None: D**-0.5.
        out: [R, H, D], rows and heads of any stride.
        lse: float32 [R, H], where log(sum(exp(scores))) goes.
        workspace: on a GPU, memory for splits; None: allocated for this call.

    Returns:
        [R, H, D] in the dtype of `query`; `out` when given. A row that attends to nothing gives zeros, its lse -inf.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; on the CPU also an index or a length out of
            range, before anything is written. On a GPU such a row becomes nan, and nothing is appended for it.

    Equivalent to, for each row r with its picture p and its question q of lengths s and t:
        key[r], query[r] = rotated to position s + t; suffix.key[q, :, t], suffix.value[q, :, t] = key[r], value[r]
        k = torch.cat([prefix.key[p, :, :s], suffix.key[q, :, : t + 1]], 1)
        v = torch.cat([prefix.value[p, :, :s], suffix.value[q, :, : t + 1]], 1)
        F.scaled_dot_product_attention(query[r, :, None], k, v, scale=scale, enable_gqa=True)[:, 0]
    Sums are kept in float32 and rounded once. Source: docs/attention.md.
    """
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a tensor, got {type(query).__name__}")
    prefix, suffix = _group("prefix", prefix, KeyValues), _group("suffix", suffix, KeyValues)
    rope, workspace = _group("rope", rope, Rope), _group("workspace", workspace, Workspace)
    tensors = (query, *(prefix or _NOTHING), *(suffix or _NOTHING), key, value, pictures, questions, positions,
               *(rope or _NOTHING)[:2], mask, out, lse, *(workspace or _NOTHING)[:2])  # fmt: skip
    for name, tensor in zip(_NAMES, tensors, strict=True):
        if tensor is not None:
            _check_tensor(name, tensor, query.device)
    if query.dim() != 3:
        raise ValueError(f"query: expected shape [rows, heads, head_dim], got {list(query.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype bool, got {mask.dtype}")
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if workspace is None and query.device.type == "cuda":
        workspace = _workspace_for(query, prefix, suffix)
    torch.ops.sphinx_fast.attention(
        query, *(prefix or _NOTHING), *(suffix or _NOTHING), key, value, pictures, questions, positions,
        *(rope or (None, None, False)), mask, query.shape[-1] ** -0.5 if scale is None else scale,
        out, lse, *(workspace or (None, None)),
    )  # fmt: skip
    return out


def _workspace_for(query: Tensor, prefix: KeyValues | None, suffix: KeyValues | None) -> Workspace:
    rows, heads, head_dim = query.shape
    given = [cache for cache in (prefix, suffix) if cache is not None]
    kv_heads = given[0][0].shape[1] if given else 1
    prefix_capacity, suffix_capacity = (cache[0].shape[2] if cache is not None else 0 for cache in (prefix, suffix))
    return attention_workspace(rows, heads, head_dim, kv_heads, prefix_capacity, suffix_capacity, device=query.device)


def _group(name: str, group: Any, kind: type[Any]) -> Any:
    """A plain tuple as the named one it stands for; None stays None."""
    if group is None or type(group) is kind:
        return group
    least, most = len(kind._fields) - len(kind._field_defaults), len(kind._fields)
    if not isinstance(group, tuple) or not least <= len(group) <= most:
        raise TypeError(f"{name}: expected a tuple of {', '.join(kind._fields)}, got {type(group).__name__}")
    return kind(*group)


def _check_tensor(name: str, tensor: Any, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} (that of query), got {tensor.device}")
    refuse_lazy(tensor, name)


def attention_workspace(
    rows: int,
    heads: int,
    head_dim: int,
    kv_heads: int,
    prefix_capacity: int,
    suffix_capacity: int,
    device: torch.device,
) -> Workspace:
    """Memory for `attention` on a GPU, for calls of at most these sizes one after another, of all layers alike."""
    module = extension()
    if not hasattr(module, "attention_partial_floats"):
        raise RuntimeError(f"sphinx-fast was built without CUDA; {CUDA_HINT}")
    floats = module.attention_partial_floats(rows, heads, head_dim, prefix_capacity, suffix_capacity)
    return Workspace(torch.empty(floats, device=device), torch.zeros(rows * kv_heads, dtype=torch.int32, device=device))


@register(
    "attention(Tensor query, Tensor? prefix_key, Tensor? prefix_value, Tensor? prefix_lengths, Tensor(a!)? suffix_key, "
    "Tensor(b!)? suffix_value, Tensor? suffix_lengths, Tensor? key, Tensor? value, Tensor? pictures, "
    "Tensor? questions, Tensor? positions, Tensor? cos, Tensor? sin, bool interleaved, Tensor? mask, float scale, "
    "Tensor(c!) out, Tensor(d!)? lse, Tensor(e!)? partial, Tensor(f!)? arrived) -> ()"
)
def _attention(
    query: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    prefix_lengths: Tensor | None,
    suffix_key: Tensor | None,
    suffix_value: Tensor | None,
    suffix_lengths: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    pictures: Tensor | None,
    questions: Tensor | None,
    positions: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    partial: Tensor | None,
    arrived: Tensor | None,
) -> None:
    extension().attention(
        query,
        prefix_key=prefix_key, prefix_value=prefix_value, prefix_lengths=prefix_lengths,
        suffix_key=suffix_key, suffix_value=suffix_value, suffix_lengths=suffix_lengths,
        key=key, value=value, pictures=pictures, questions=questions, positions=positions,
        cos=cos, sin=sin, interleaved=interleaved,
        mask=None if mask is None else mask.view(torch.uint8),
        scale=scale, out=out, lse=lse, partial=partial, arrived=arrived,
        isa=None, threads=torch.get_num_threads(),
    )  # fmt: skip
