"""Attention of a language model: one token a row by our kernel, prompts by libraries.

`attn_implementation="sphinx_fast"` (registered by sphinx_fast.model) gives it to any model of transformers.

Names of shapes: B rows, H heads of queries, K heads of keys, D head_dim, S positions, N new tokens of all questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sphinx_fast.ops import FLOAT_DTYPES, KeyValues, attention, covers

try:
    import flash_attn
except ImportError:
    flash_attn = None

NAME = "sphinx_fast"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query [B, H, T, D], key and value [B, K, S, D] -> [B, T, H, D] and None.

    One new token a row (T = 1) without gradients goes to `ops.attention`, keys shared by heads as they are; anything
    else, such as a prompt, additive masks and head sizes the kernel does not have, to scaled_dot_product_attention.
    """
    if dropout or not _fits(query, key, value, attention_mask) or _asks_for_more(kwargs):
        result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    mask = None
    if attention_mask is not None:
        mask = attention_mask[:, 0, 0].expand(query.shape[0], -1)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return attention(query[:, :, 0], prefix=KeyValues(key, value), mask=mask, scale=scaling).unsqueeze(1), None


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel computes this."""
    rows, heads, tokens, head_dim = query.shape
    if tokens != 1 or query.dtype not in FLOAT_DTYPES or (torch.is_grad_enabled() and query.requires_grad):
        return False
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1:] != (1, 1, key.shape[2])):
        return False
    alike = key.dtype == value.dtype == query.dtype and key.shape == value.shape and key.shape[0] == rows
    return (
        alike
        and head_dim % 16 == 0
        and 16 <= head_dim <= 256
        and key.shape[3] == head_dim
        and heads % key.shape[1] == 0
        and heads // key.shape[1] <= 64
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and covers(query.device)
    )


def _asks_for_more(kwargs: dict[str, Any]) -> bool:
    """Whether a model wants what the kernel does not do: soft capping, position biases, sinks, a paged cache."""
    return any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux", "cache"))


def follow_up_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: KeyValues,
    lengths: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """New tokens of several questions on one picture: each attends to the prefix and to its own tokens before it.

    The prefix is read once for all questions. flash-attn reads it where it lies; SDPA wants it in front of the new
    keys, so there it is copied, once and not once per question.

    Args:
        query: [N, H, D], rotated, the questions one after another.
        key, value: [N, K, D] of the same tokens.
        prefix: of one slot, [1, K, S, D]; all of it is attended to.
        lengths: tokens of each question; their sum is N.
        scale: of the scores; None: D**-0.5.

    Returns:
        [N, H, D]. Through flash-attn where it is installed and serves these tensors (two calls, merged by their
        log-sum-exp), otherwise one call of scaled_dot_product_attention with a mask that keeps questions apart.
    """
    if sum(lengths) != query.shape[0] or any(length < 0 for length in lengths):
        raise ValueError(f"lengths: expected counts that sum to {query.shape[0]}, got {list(lengths)}")
    if prefix.key.shape[0] != 1:
        raise ValueError(f"prefix: expected one slot, got {prefix.key.shape[0]}")
    if flash_attn is not None and query.is_cuda and query.dtype != torch.float32:
        return _by_flash_attn(query, key, value, prefix, lengths, scale)
    own = torch.block_diag(*(torch.ones(length, length, dtype=torch.bool).tril() for length in lengths))
    mask = F.pad(own, (prefix.key.shape[2], 0), value=True).to(query.device)
    keys = torch.cat([prefix.key[0], key.transpose(0, 1)], 1)
    values = torch.cat([prefix.value[0], value.transpose(0, 1)], 1)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _by_flash_attn(
    query: Tensor, key: Tensor, value: Tensor, prefix: KeyValues, lengths: Sequence[int], scale: float | None
) -> Tensor:
    """flash-attn's layout is [tokens, heads, D]; its log-sum-exp comes as [.., H, tokens]."""
    shared, shared_lse, *_ = flash_attn.flash_attn_func(
        query[None],
        prefix.key.transpose(1, 2),
        prefix.value.transpose(1, 2),
        softmax_scale=scale,
        return_attn_probs=True,
    )
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device)
    longest = max(lengths, default=0)
    own, own_lse, *_ = flash_attn.flash_attn_varlen_func(
        query, key, value, ends, ends, longest, longest, softmax_scale=scale, causal=True, return_attn_probs=True
    )
    weight = torch.sigmoid(shared_lse[0] - own_lse).transpose(0, 1)[..., None]  # exp(a) / (exp(a) + exp(b))
    return torch.lerp(own.float(), shared[0].float(), weight).to(query.dtype)
