"""Several pieces in one row, none of which sees another: what is computed is what separate rows would be, without
padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sphinx_fast.model.attention import FollowUp
from sphinx_fast.model.packed import Pass
from sphinx_fast.ops import KeyValues
from sphinx_fast.train.pieces import IGNORED, Piece

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


@dataclass
class Row:
    """T tokens of one or more pieces, a batch of one for the language model.

    input_ids, targets, weights, kinds, positions [T]; `lengths`: per piece its trunk and branches; `pixel_values`
    [views, 3, s, s] of the pictures in order, or None; `names` of the pieces. What is looked at (train/pointer.py): at
    `pointers` [K] the boxes `pointed` [K, N, 4], at most N, the others nan, where `anywhere` [K] says so in any view;
    `quotes` [Q, 2]: at one position another.
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor
    kinds: Tensor
    positions: Tensor
    lengths: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    pixel_values: Tensor | None = None
    pointers: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    pointed: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 4))
    anywhere: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    quotes: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.long))

    def to(self, device: torch.device) -> Row:
        """The same row with its tensors on a device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def looked(self) -> int:
        """How many positions are told what to look at."""
        return len(self.pointers) + len(self.quotes)


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Pieces by number -> rows of at most `max_length` positions: the longest first, each into the first row with room.

    Raises ValueError for a piece that is longer.
    """
    if lengths and max(lengths) > max_length:
        raise ValueError(f"a piece of {max(lengths)} positions, {max_length} allowed")
    rows: list[list[int]] = []
    rooms: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        fits = next((row for row, room in enumerate(rooms) if room >= lengths[number]), None)
        if fits is None:
            rows.append([])
            rooms.append(max_length)
            fits = len(rows) - 1
        rows[fits].append(number)
        rooms[fits] -= lengths[number]
    return [sorted(row) for row in rows]


def make_row(pieces: Sequence[Piece], pixel_values: Tensor | None = None) -> Row:
    """Pieces one after another. `pixel_values` are the views of their pictures, in order."""
    positions = []
    for piece in pieces:
        trunk, *branches = piece.lengths
        positions += [np.arange(trunk), *(np.arange(trunk, trunk + n) for n in branches)]

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(piece, name) for piece in pieces]))

    return Row(
        input_ids=joined("ids"),
        targets=joined("targets"),
        weights=joined("weights"),
        kinds=torch.cat([torch.full((len(piece),), piece.kind) for piece in pieces]),
        positions=torch.from_numpy(np.concatenate(positions)),
        lengths=tuple(piece.lengths for piece in pieces),
        names=tuple(piece.name for piece in pieces),
        pixel_values=pixel_values,
    )


def nothing() -> Row:
    """A row that teaches nothing: what a process computes while others still have rows."""
    return make_row([Piece(np.zeros(1, np.int64), np.full(1, IGNORED), np.zeros(1, np.float32), (1,))])


class Packed(Pass):
    """The attention of a row, with gradients: every piece causal in itself, its branches behind its trunk.

    One call of scaled_dot_product_attention per piece costs what the pieces cost; a mask over the whole row would cost
    its square. flash-attn does pieces without branches in one call where it is installed.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], positions: Tensor) -> None:
        self.positions = positions
        self.lengths = [tuple(piece) for piece in lengths]
        self.attended = 0
        self.plain = all(len(piece) == 1 for piece in self.lengths)
        counts = [sum(piece) for piece in self.lengths]
        self._ends = torch.tensor([0, *counts], dtype=torch.int32, device=positions.device).cumsum(0, dtype=torch.int32)
        self._longest = max(counts)

    @torch.compiler.disable  # lengths change with every row: compiled blocks break here instead of compiling anew
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        self.attended += 1
        if self.plain and flash_attn_varlen_func is not None and query.is_cuda and query.dtype != torch.float32:
            tensors = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
            ends = (self._ends, self._ends, self._longest, self._longest)
            return flash_attn_varlen_func(*tensors, *ends, softmax_scale=scale, causal=True)[None]
        counts = [sum(piece) for piece in self.lengths]
        queries, keys, values = (tensor[0].split(counts, dim=1) for tensor in (query, key, value))
        outputs = [_attend(*part, scale) for part in zip(queries, keys, values, self.lengths, strict=True)]
        return torch.cat(outputs, dim=1).transpose(0, 1)[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float | None) -> Tensor:
    """Query [H, n, D], key and value [K, n, D] of one piece -> [H, n, D]."""
    trunk, *branches = lengths
    prefix = KeyValues(key[None, :, :trunk], value[None, :, :trunk])
    output = F.scaled_dot_product_attention(
        query[None, :, :trunk], prefix.key, prefix.value, is_causal=True, scale=scale, enable_gqa=True
    )[0]
    if not branches:
        return output
    behind = FollowUp(branches).masked(query[:, trunk:], key[:, trunk:], value[:, trunk:], prefix, scale)
    return torch.cat([output, behind], dim=1)
