"""New tokens of several sequences in one pass through the language model: prompts (`Prefill`) and steps (`Decode`).

Tokens stand one after another in a row of batch 1; who belongs to whom is known here, and keys and values lie in the
pools of model/cache.py. A pass reaches the attention of any model of transformers as the keyword `packed`: the models
hand it through to `attention_forward`, which gives it the query, key and value of each layer.

Names of shapes: N new tokens, R rows, H heads of queries, K heads of keys, D head_dim, S positions of a prefix.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphinx_fast import ops
from sphinx_fast.model import attention
from sphinx_fast.model.cache import Pool, Slot
from sphinx_fast.ops import KeyValues, Workspace, attention_workspace


class Pass(ABC):
    """One pass: positions of its tokens, and the attention of a layer over them."""

    positions: Tensor  # [N]
    attended: int  # layers, in the last run

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query [1, H, N, D], key and value [1, K, N, D] -> [1, N, H, D]."""

    def run(self, language_model: Any, embeddings: Tensor) -> Tensor:
        """Embeddings [N, hidden_size] -> last hidden states [N, hidden_size].

        Raises:
            ValueError: not every layer of the model attends through transformers' attention interface.
        """
        self.attended = 0
        with _attention_of(language_model):
            outputs = language_model(
                inputs_embeds=embeddings[None],
                # transformers builds a causal mask [N, N] unless it is given one of four dimensions.
                attention_mask=embeddings.new_empty(1, 1, 0, 0),
                position_ids=self.positions[None],
                use_cache=False,
                packed=self,
            )
        layers = language_model.config.num_hidden_layers
        if self.attended != layers:  # other layers have seen tokens of strangers
            raise ValueError(
                f"{type(language_model).__name__}: {self.attended} of {layers} layers attend through transformers' "
                "attention interface; the engine needs all: use model.generate"
            )
        hidden: Tensor = outputs.last_hidden_state
        return hidden[0]


_lock = threading.Lock()
_passing: dict[int, tuple[int, str]] = {}  # of configurations in passes: how many, and what stood there before


@contextmanager
def _attention_of(language_model: Any) -> Iterator[None]:
    """Lets a language model attend through `attention_forward`, whatever it was loaded with, while passes run."""
    config = language_model.config
    with _lock:
        count, before = _passing.get(id(config), (0, config._attn_implementation))
        _passing[id(config)] = (count + 1, before)
        config._attn_implementation = attention.NAME
    try:
        yield
    finally:
        with _lock:
            count, before = _passing.pop(id(config))
            if count > 1:
                _passing[id(config)] = (count - 1, before)
            else:
                config._attn_implementation = before


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence: `count` of them for `slot`, from position `start` of it on, behind a prefix.

    A piece with `start` > 0 attends to what its slot holds already.
    """

    slot: Slot
    start: int
    count: int
    prefix: Slot | None = None

    @property
    def first(self) -> int:
        """Position of the first new token in its whole sequence."""
        return self.start + (self.prefix.length if self.prefix is not None else 0)


class Prefill(Pass):
    """Prompts. A prefix may be filled in the pass that reads it: put it in front of those that do.

    Lengths of slots are the caller's to set: of prefixes before, of what was appended after.

    Args:
        pieces: those behind one prefix stand side by side.
        device: of the embeddings.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        ends = torch.tensor([piece.count for piece in pieces]).cumsum(0).tolist()
        self.places = [(piece, end - piece.count, end) for piece, end in zip(pieces, ends, strict=True)]
        self.last = torch.tensor(ends, device=device) - 1  # of each piece
        self.positions = torch.cat([torch.arange(p.first, p.first + p.count) for p in pieces]).to(device)
        self.alone = [place for place in self.places if _is_alone(place)]
        # Of neighbours only: a group is one range of the new tokens.
        neighbours = groupby(self.places, key=lambda place: (_is_alone(place), id(place[0].prefix)))
        self.groups = [
            (members[0][1], members[-1][2], [member[0] for member in members], _follow_up(members))
            for members in (list(group) for (alone, _), group in neighbours if not alone)
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        self.attended += 1
        for piece, begin, end in self.places:
            piece.slot.pool.write(layer, piece.slot, piece.start, key[0, :, begin:end], value[0, :, begin:end])
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        for _, begin, end in self.alone:
            part = slice(begin, end)
            out[:, part] = F.scaled_dot_product_attention(
                query[:, :, part], key[:, :, part], value[:, :, part], is_causal=True, scale=scale, enable_gqa=True
            ).transpose(1, 2)
        for begin, end, members, follow_up in self.groups:
            keys, values = key[0, :, begin:end], value[0, :, begin:end]
            if any(piece.start for piece in members):
                whole = [piece.slot.pool.read(layer, piece.slot, piece.start + piece.count) for piece in members]
                keys, values = (torch.cat(parts, 1) for parts in zip(*whole, strict=True))
            prefix = members[0].prefix
            if prefix is not None:
                held = prefix.pool.read(layer, prefix, prefix.length)
                shared = KeyValues(held[0][None], held[1][None])
            else:
                shared = KeyValues(keys[None, :, :0], values[None, :, :0])
            out[0, begin:end] = follow_up(query[0, :, begin:end], keys, values, shared, scale).transpose(0, 1)
        return out


def _is_alone(place: tuple[Piece, int, int]) -> bool:
    """Whether nothing stands before a piece's tokens."""
    return place[0].prefix is None and place[0].start == 0


def _follow_up(members: Sequence[tuple[Piece, int, int]]) -> attention.FollowUp:
    pieces = [member[0] for member in members]
    return attention.FollowUp([piece.count for piece in pieces], [piece.start + piece.count for piece in pieces])


class Decode(Pass):
    """One new token of each row, by the room attention.

    Everything that differs from step to step lies in tensors on the device, so a recorded pass can be replayed.

    Args:
        prefixes, suffixes: the pools.
        pictures: int32 [R], slots of `prefixes`, -1 for none. Rows of one picture stand side by side.
        questions: int32 [R], slots of `suffixes`. On a GPU -1 for a row that is not there, whose result means nothing;
            the kernel of the CPU refuses it.
    """

    def __init__(self, prefixes: Pool, suffixes: Pool, pictures: Tensor, questions: Tensor) -> None:
        self.prefixes, self.suffixes = prefixes, suffixes
        self.pictures, self.questions = pictures, questions
        self._workspaces: dict[tuple[torch.device, tuple[int, int]], Workspace] = {}

    @property
    def positions(self) -> Tensor:  # type: ignore[override]
        """Of the new tokens, [R]: the lengths of prefix and suffix."""
        own = self.suffixes.lengths[self.questions.clamp(min=0)]
        if self.prefixes.slots == 0:
            return own.long()
        shared = self.prefixes.lengths[self.pictures.clamp(min=0)].masked_fill(self.pictures < 0, 0)
        return (own + shared).long()

    def grow(self) -> None:
        """After a step: every row's suffix is one longer."""
        there = (self.questions >= 0).to(torch.int32)
        self.suffixes.lengths.index_add_(0, self.questions.clamp(min=0), there)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        self.attended += 1
        here = query.device  # layers may lie on several
        rows, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        suffix, prefix = self.suffixes.layer(layer, key, value), self.prefixes.layer(layer)
        assert suffix is not None
        step: dict[str, Any] = {
            "prefix": None if prefix is None else prefix._replace(lengths=self.prefixes.lengths.to(here)),
            "suffix": suffix._replace(lengths=self.suffixes.lengths.to(here)),
            "key": keys,
            "value": values,
            "pictures": None if prefix is None else self.pictures.to(here),
            "questions": self.questions.to(here),
            "scale": scale,
        }
        if not attention.steps(rows, rows.shape[1], keys.shape[1]) or values.shape != keys.shape:
            return attention.plain_step(rows, **step)[None]
        return ops.attention(rows, **step, workspace=self._workspace(rows, keys.shape[1]))[None]

    def _workspace(self, rows: Tensor, kv_heads: int) -> Workspace | None:
        """One for all layers on a GPU."""
        if rows.device.type == "cpu":
            return None
        capacities = self.prefixes.capacity, self.suffixes.capacity
        found = self._workspaces.get((rows.device, capacities))
        if found is None:
            count, heads, head_dim = rows.shape
            found = attention_workspace(count, heads, head_dim, kv_heads, *capacities, device=rows.device)
            self._workspaces[rows.device, capacities] = found
        return found
