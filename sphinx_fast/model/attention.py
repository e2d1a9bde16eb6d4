"""Attention of a language model: one token a row by our kernel, prompts by libraries.

`attn_implementation="sphinx_fast"` (registered by sphinx_fast.model) gives it to any model of transformers.

Names of shapes: B rows, H heads of queries, K heads of keys, D head_dim, S positions, N new tokens of all questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
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

    `packed`, a pass of model/packed.py, attends by its own rules: query [1, H, N, D], key and value [1, K, N, D].
    Otherwise one new token a row (T = 1) without gradients goes to `ops.attention`, keys shared by heads as they are;
    anything else, such as a prompt, additive masks and head sizes the kernel does not have, to
    scaled_dot_product_attention.
    """
    if (packed := kwargs.get("packed")) is not None:
        if _asks_for_more(kwargs):
            raise ValueError("this language model's attention wants soft capping, biases or sinks: use model.generate")
        passed: Tensor = packed.attend(module.layer_idx, query, key, value, scaling)
        return passed, None
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
    if tokens != 1 or (torch.is_grad_enabled() and query.requires_grad):
        return False
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1:] != (1, 1, key.shape[2])):
        return False
    alike = key.dtype == value.dtype == query.dtype and key.shape == value.shape and key.shape[0] == rows
    dense = query.stride(3) == key.stride(3) == value.stride(3) == 1
    return alike and dense and key.shape[3] == head_dim and steps(query, heads, key.shape[1])


def steps(query: Tensor, heads: int, kv_heads: int) -> bool:
    """Whether the kernel decodes queries of this dtype, head_dim and device."""
    head_dim = query.shape[-1]
    sizes = head_dim % 16 == 0 and 16 <= head_dim <= 256 and heads % kv_heads == 0 and heads // kv_heads <= 64
    return sizes and query.dtype in FLOAT_DTYPES and covers(query.device)


def _asks_for_more(kwargs: dict[str, Any]) -> bool:
    """Whether a model wants what the kernel does not do: soft capping, position biases, sinks, a paged cache."""
    return any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux", "cache"))


class FollowUp:
    """New tokens of several sequences behind one prefix: each attends to the prefix and to its own tokens up to itself.

    The prefix is read once for all of them. flash-attn reads it where it lies; SDPA wants it in front of the new keys,
    so there it is copied, once and not once per sequence.

    Args:
        lengths: new tokens of each sequence; N together.
        key_lengths: keys of each behind the prefix, the last `lengths` of which are the new tokens'; M together. None:
            there are no others.
    """

    def __init__(self, lengths: Sequence[int], key_lengths: Sequence[int] | None = None) -> None:
        key_lengths = lengths if key_lengths is None else key_lengths
        if len(lengths) != len(key_lengths) or any(
            not 0 <= new <= all_ for new, all_ in zip(lengths, key_lengths, strict=True)
        ):
            raise ValueError(f"lengths: expected counts of 0 to {list(key_lengths)}, got {list(lengths)}")
        self.lengths, self.key_lengths = list(lengths), list(key_lengths)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValues, scale: float | None = None
    ) -> Tensor:
        """Attention of the new tokens, [H, N, D].

        Args:
            query: [H, N, D], rotated, the sequences one after another.
            key, value: [K, M, D].
            prefix: of one slot, [1, K, S, D]; all of it is attended to.
            scale: of the scores; None: D**-0.5.

        Returns:
            [H, N, D]. Through flash-attn where it is installed and serves these tensors (two calls, merged by their
            log-sum-exp), otherwise one call of scaled_dot_product_attention with a mask that keeps sequences apart.
        """
        if (sum(self.lengths), sum(self.key_lengths)) != (query.shape[1], key.shape[1]):
            raise ValueError(
                f"lengths: they sum to {sum(self.lengths)} queries and {sum(self.key_lengths)} keys, "
                f"got {query.shape[1]} and {key.shape[1]}"
            )
        if prefix.key.shape[0] != 1:
            raise ValueError(f"prefix: expected one slot, got {prefix.key.shape[0]}")
        if flash_attn is not None and query.is_cuda and query.dtype != torch.float32:
            return self._by_flash_attn(query, key, value, prefix, scale)
        return self.masked(query, key, value, prefix, scale)

    def masked(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValues, scale: float | None = None
    ) -> Tensor:
        """The same by scaled_dot_product_attention and a mask, whatever is installed: gradients flow."""
        keys, values = torch.cat([prefix.key[0], key], 1), torch.cat([prefix.value[0], value], 1)
        mask = F.pad(self._own, (prefix.key.shape[2], 0), value=True).to(query.device)
        return F.scaled_dot_product_attention(
            query[None], keys[None], values[None], mask, scale=scale, enable_gqa=True
        )[0]

    @cached_property
    def _own(self) -> Tensor:
        """Which keys behind the prefix a new token sees: bool [N, M]."""
        return torch.block_diag(
            *(
                torch.ones(new, all_, dtype=torch.bool).tril(all_ - new)
                for new, all_ in zip(self.lengths, self.key_lengths, strict=True)
            )
        )

    def _by_flash_attn(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValues, scale: float | None
    ) -> Tensor:
        """flash-attn's layout is [tokens, heads, D]; its log-sum-exp comes as [.., H, tokens]."""
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        ends, key_ends = (
            torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device)
            for counts in (self.lengths, self.key_lengths)
        )
        own, own_lse, *_ = flash_attn.flash_attn_varlen_func(
            query,
            key,
            value,
            ends,
            key_ends,
            max(self.lengths, default=0),
            max(self.key_lengths, default=0),
            softmax_scale=scale,
            causal=True,
            return_attn_probs=True,
        )
        if prefix.key.shape[2] == 0:
            return own.transpose(0, 1)
        shared, shared_lse, *_ = flash_attn.flash_attn_func(
            query[None],
            prefix.key.transpose(1, 2),
            prefix.value.transpose(1, 2),
            softmax_scale=scale,
            return_attn_probs=True,
        )
        weight = torch.sigmoid(shared_lse[0] - own_lse).transpose(0, 1)[..., None]  # exp(a) / (exp(a) + exp(b))
        return torch.lerp(own.float(), shared[0].float(), weight).to(query.dtype).transpose(0, 1)


def plain_step(
    query: Tensor,
    *,
    prefix: KeyValues | None,
    suffix: KeyValues,
    key: Tensor,
    value: Tensor,
    pictures: Tensor | None,
    questions: Tensor,
    scale: float | None,
) -> Tensor:
    """`ops.attention` in torch, row by row, for what the kernel does not cover. A row of question -1 gives zeros."""
    assert suffix.lengths is not None
    out = torch.zeros_like(query)
    held = suffix.lengths.tolist()
    for row, question in enumerate(questions.tolist()):
        if question < 0:
            continue
        length = held[question]
        suffix.key[question, :, length], suffix.value[question, :, length] = key[row], value[row]
        parts = [(suffix.key[question, :, : length + 1], suffix.value[question, :, : length + 1])]
        if prefix is not None and pictures is not None and (picture := int(pictures[row])) >= 0:
            assert prefix.lengths is not None
            shared = int(prefix.lengths[picture])
            parts.insert(0, (prefix.key[picture, :, :shared], prefix.value[picture, :, :shared]))
        keys, values = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        out[row] = F.scaled_dot_product_attention(query[row, :, None], keys, values, scale=scale, enable_gqa=True)[:, 0]
    return out
