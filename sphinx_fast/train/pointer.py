"""Attention that learns to look at what an answer is about.

While a coordinate of a box is being said, and while the words before it begin (`circle` in `, circle[0.10,...]`), two
heads of the middle layer are asked to put their weight on the patches of the global view that lie in the box; for a
point, on its patch; for any other part of an answer whose record says what it is about (`Conversation.looks`), on the
patches of all those boxes in any view: coordinates are said in the frame of the whole, small things are named best from
near. Where an answer quotes its question, two heads of the last layer are asked to look at the token that it repeats,
or at the option whose letter it is: by then the middle layer knows what is in the picture. The model is unchanged:
training reads the queries and keys it has anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor

from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.train.packing import Packed, Row
from sphinx_fast.train.pieces import IGNORED, Piece

HEADS = (0, 1)
COORDINATES = (1, 3, 5, 7)  # where behind `[` those of `[x1,y1,x2,y2]` or `[x,y]` stand, one token each

Boxes = Sequence[tuple[float, ...]]


def coordinate_ids(tokenizer: Any) -> list[int] | None:
    """Ids of 0.00 .. 1.00; None where one of them is several tokens."""
    ids = []
    for k in range(101):
        text = f"{k / 100:.2f}"
        single = tokenizer.convert_tokens_to_ids(text)
        encoded = tokenizer(f"[{text}", add_special_tokens=False)["input_ids"]
        if single is None or single == tokenizer.unk_token_id or encoded[-1] != single:
            return None
        ids.append(single)
    return ids


class BoxFinder:
    """The places in a row where something is to be said about boxes, and those boxes.

    Raises:
        ValueError: in this tokenizer a coordinate is more than one token.
    """

    def __init__(self, tokenizer: Any) -> None:
        ids = coordinate_ids(tokenizer)
        if ids is None:
            raise ValueError("pointer_weight: this tokenizer writes 0.37 as several tokens")
        self.values = {token: k / 100 for k, token in enumerate(ids)}
        self.bracket, self.end, *separators = tokenizer.convert_tokens_to_ids(["[", "]", ",", ";"])
        self.separators = tuple(separators)

    def __call__(self, row: Row, pieces: Sequence[Piece] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Positions [K] and, in the padded square, boxes [K, N, 4]; where there are fewer than N, nan. Whether any view
        will do [K].

        Coordinates are found in the row's tokens, what other answers are about in the pieces it was made of.
        """
        ids, targets = row.input_ids.tolist(), row.targets.tolist()
        found: dict[int, tuple[Boxes, bool]] = {}
        start = 0
        for piece in pieces:
            found.update((start + at, (boxes, True)) for at, boxes in piece.looks)
            start += len(piece)
        for at, token in enumerate(ids):
            if token == self.bracket and targets[at] != IGNORED:
                behind = (self.values.get(ids[at + k]) for k in COORDINATES if at + k < len(ids))
                said = [value for value in takewhile(lambda v: v is not None, behind) if value is not None]
                if len(said) in (2, 4):
                    box = tuple(said * (4 // len(said)))
                    found[self._words(ids, targets, at) - 1] = ((box,), False)
                    found.update((at + k - 1, ((box,), False)) for k in COORDINATES[: len(said)])
        order = sorted(found)
        boxes, anywhere = stacked([found[at][0] for at in order]), [found[at][1] for at in order]
        return torch.tensor(order, dtype=torch.long), boxes, torch.tensor(anywhere, dtype=torch.bool)

    def _words(self, ids: Sequence[int], targets: Sequence[int], bracket: int) -> int:
        """Where the words before a bracket begin: behind the last box of the answer, or with the answer."""
        first = bracket
        while first > 1 and targets[first - 2] != IGNORED and ids[first - 1] != self.end:
            first -= 1
        return first + (first < bracket and ids[first] in self.separators)


def quotes_of(pieces: Sequence[Piece]) -> Tensor:
    """[Q, 2]: where pieces in a row quote their questions, and the tokens that are quoted."""
    starts = accumulate(map(len, pieces), initial=0)
    found = [(start + a, start + b) for start, piece in zip(starts, pieces, strict=False) for a, b in piece.quotes]
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2)


def stacked(rows: Sequence[Boxes]) -> Tensor:
    """Rows of boxes -> [K, N, 4], nan behind the end of a row."""
    most = max(map(len, rows), default=0)
    none = (math.nan,) * 4
    return torch.tensor([[*row, *[none] * (most - len(row))] for row in rows]).reshape(len(rows), most, 4)


class Pointing(Packed):
    """The attention of a row, and what the heads look at where they are told to.

    `losses` [K + Q] after the run: -log of the attention on the right patches, then on the quoted tokens; mean over the
    heads.
    """

    def __init__(self, row: Row, config: SphinxConfig) -> None:
        super().__init__(row.lengths, row.positions)
        vision = config.vision_config
        self.row = row
        queries = vision.num_query_tokens if vision.qformer_config is not None else 0
        before = queries + 1 + (1 if vision.view_tags else 0)  # of the first patch in a view
        self.layer = config.text_config.num_hidden_layers // 2
        self.image = config.image_token_id
        device = row.positions.device
        views, patches = (torch.arange(n, device=device) for n in (vision.num_views, vision.grid_size**2))
        self.patches = views[:, None] * vision.tokens_per_view + before + patches  # [V, P] in the picture
        side = math.isqrt(vision.num_views - 1)
        corners = [(x / side, y / side) for y in range(side) for x in range(side)]
        self.windows = [(0.0, 0.0, 1.0), *((*corner, 1 / side) for corner in corners)]  # x, y, side of each view
        at = (torch.arange(vision.grid_size, device=device) + 0.5) / vision.grid_size
        y, x = torch.meshgrid(at, at, indexing="ij")
        self.middles, self.half = torch.stack([x, y], dim=-1).flatten(0, 1), 0.5 / vision.grid_size
        self.last = config.text_config.num_hidden_layers - 1
        self.losses = torch.zeros(0, device=device)

    @torch.compiler.disable
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        if layer == self.layer and len(self.row.pointers):
            self.losses = self._look(query[0], key[0], scale)
        if layer == self.last and len(self.row.quotes):
            self.losses = torch.cat([self.losses, self._quote(query[0], key[0], scale)])
        return super().attend(layer, query, key, value, scale)

    def targets(self, boxes: Tensor, anywhere: Tensor) -> Tensor:
        """Boxes [K, N, 4] -> [K, V, P] bool: patches whose middle lies in a box, and those that hold a box's middle; of
        the global view alone but where `anywhere` [K]."""
        found = list[Tensor]()
        for x, y, side in self.windows:
            origin = boxes.new_tensor([x, y, x, y])
            found.append(self._in_view((boxes - origin) / side) & (anywhere[:, None] | (not found)))
        return torch.stack(found, dim=1)

    def _in_view(self, boxes: Tensor) -> Tensor:
        """Boxes in a view's frame [K, N, 4] -> [K, P] bool."""
        inside = ((self.middles >= boxes[..., None, :2]) & (self.middles <= boxes[..., None, 2:])).all(-1)
        middle = (boxes[..., :2] + boxes[..., 2:]) / 2
        return (inside | ((self.middles - middle[..., None, :]).abs() <= self.half).all(-1)).any(1)

    def _look(self, query: Tensor, key: Tensor, scale: float | None) -> Tensor:
        """Query [H, T, D], key [K, T, D] -> losses of the row's pointers."""
        losses = []
        for start, lengths, mine in self._pieces(self.row.pointers):
            end = start + sum(lengths)
            at = self.row.pointers[mine]
            pictures = (self.row.input_ids[start:end] == self.image).nonzero()
            if len(at) and len(pictures):
                patches = _logs(query, key, at, start, lengths, scale)[..., int(pictures[0]) + self.patches.flatten()]
                wrong = ~self.targets(self.row.pointed[mine], self.row.anywhere[mine]).flatten(1)
                losses.append(-patches.masked_fill(wrong, -torch.inf).logsumexp(-1).mean(0))
            else:
                losses.append(query.new_zeros(len(at), dtype=torch.float32))
        return torch.cat(losses)

    def _quote(self, query: Tensor, key: Tensor, scale: float | None) -> Tensor:
        """Query [H, T, D], key [K, T, D] -> losses of the row's quotes."""
        losses = []
        for start, lengths, mine in self._pieces(self.row.quotes[:, 0]):
            at, quoted = self.row.quotes[mine].unbind(1)
            logs = _logs(query, key, at, start, lengths, scale)
            losses.append(-logs.gather(-1, (quoted - start).expand(len(HEADS), -1)[..., None])[..., 0].mean(0))
        return torch.cat(losses)

    def _pieces(self, places: Tensor) -> Iterator[tuple[int, tuple[int, ...], Tensor]]:
        """Per piece where it starts, its lengths, and which of some positions in the row are in it."""
        start = 0
        for lengths in self.lengths:
            yield start, lengths, (places >= start) & (places < start + sum(lengths))
            start += sum(lengths)


def _logs(query: Tensor, key: Tensor, at: Tensor, start: int, lengths: tuple[int, ...], scale: float | None) -> Tensor:
    """Logarithm of the attention that HEADS at some positions of a row pay to the piece they are in: [heads, K, n]."""
    shared, end = query.shape[0] // key.shape[0], start + sum(lengths)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keys = torch.stack([key[head // shared, start:end] for head in HEADS])
    scores = torch.stack([query[head, at] for head in HEADS]) @ keys.transpose(1, 2) * scale
    return scores.float().masked_fill(~_seen(lengths, at - start), -torch.inf).log_softmax(-1)


def _seen(lengths: Sequence[int], at: Tensor) -> Tensor:
    """[K, n] bool: what the positions `at` of a piece see of it."""
    trunk, *branches = lengths
    place = torch.arange(sum(lengths), device=at.device)
    branch = torch.repeat_interleave(torch.tensor([trunk, *branches], device=at.device))
    return (place <= at[:, None]) & ((branch == 0) | (branch == branch[at][:, None]))
