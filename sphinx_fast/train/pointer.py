"""Attention that learns to look at what an answer is about.

While a coordinate of a box is being said, and while the words before it begin (`circle` in `, circle[0.10,...]`), two
heads of the middle layer are asked to put their weight on the patches of the global view that lie in the box; for a
point, on its patch; for any other answer whose record says what it is about (`Conversation.looks`), on the patches of
all those boxes while its first token is said. The model is unchanged: training reads the queries and keys it has
anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
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

    def __call__(self, row: Row, pieces: Sequence[Piece] = ()) -> tuple[Tensor, Tensor]:
        """Positions [K] and, in the padded square, boxes [K, N, 4]; where there are fewer than N, nan.

        Coordinates are found in the row's tokens, what other answers are about in the pieces it was made of.
        """
        ids, targets = row.input_ids.tolist(), row.targets.tolist()
        found: dict[int, Boxes] = {}
        start = 0
        for piece in pieces:
            found.update((start + at, boxes) for at, boxes in piece.looks)
            start += len(piece)
        for at, token in enumerate(ids):
            if token == self.bracket and targets[at] != IGNORED:
                behind = (self.values.get(ids[at + k]) for k in COORDINATES if at + k < len(ids))
                said = [value for value in takewhile(lambda v: v is not None, behind) if value is not None]
                if len(said) in (2, 4):
                    box = tuple(said * (4 // len(said)))
                    found[self._words(ids, targets, at) - 1] = (box,)
                    found.update((at + k - 1, (box,)) for k in COORDINATES[: len(said)])
        order = sorted(found)
        return torch.tensor(order, dtype=torch.long), stacked([found[at] for at in order])

    def _words(self, ids: Sequence[int], targets: Sequence[int], bracket: int) -> int:
        """Where the words before a bracket begin: behind the last box of the answer, or with the answer."""
        first = bracket
        while first > 1 and targets[first - 2] != IGNORED and ids[first - 1] != self.end:
            first -= 1
        return first + (first < bracket and ids[first] in self.separators)


def stacked(rows: Sequence[Boxes]) -> Tensor:
    """Rows of boxes -> [K, N, 4], nan behind the end of a row."""
    most = max(map(len, rows), default=0)
    none = (math.nan,) * 4
    return torch.tensor([[*row, *[none] * (most - len(row))] for row in rows]).reshape(len(rows), most, 4)


class Pointing(Packed):
    """The attention of a row, and what the heads look at where coordinates are said.

    `losses` [K] after the run: -log of the attention on the right patches, mean over the heads.
    """

    def __init__(self, row: Row, config: SphinxConfig) -> None:
        super().__init__(row.lengths, row.positions)
        vision = config.vision_config
        self.row, self.patches = row, vision.grid_size**2
        queries = vision.num_query_tokens if vision.qformer_config is not None else 0
        self.before = queries + 1 + (1 if vision.view_tags else 0)  # of the first patch in the picture
        self.layer = config.text_config.num_hidden_layers // 2
        self.image = config.image_token_id
        at = (torch.arange(vision.grid_size, device=row.positions.device) + 0.5) / vision.grid_size
        y, x = torch.meshgrid(at, at, indexing="ij")
        self.middles, self.half = torch.stack([x, y], dim=-1).flatten(0, 1), 0.5 / vision.grid_size
        self.losses = torch.zeros(0, device=row.positions.device)

    @torch.compiler.disable
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        if layer == self.layer and len(self.row.pointers):
            self.losses = self._look(query[0], key[0], scale)
        return super().attend(layer, query, key, value, scale)

    def targets(self, boxes: Tensor) -> Tensor:
        """Boxes [K, N, 4] -> [K, P] bool: patches whose middle lies in a box, and those that hold a box's middle."""
        inside = ((self.middles >= boxes[..., None, :2]) & (self.middles <= boxes[..., None, 2:])).all(-1)
        middle = (boxes[..., :2] + boxes[..., 2:]) / 2
        return (inside | ((self.middles - middle[..., None, :]).abs() <= self.half).all(-1)).any(1)

    def _look(self, query: Tensor, key: Tensor, scale: float | None) -> Tensor:
        """Query [H, T, D], key [K, T, D] -> losses of the row's pointers."""
        shared = query.shape[0] // key.shape[0]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        losses, start = [], 0
        for lengths in self.lengths:
            end = start + sum(lengths)
            mine = (self.row.pointers >= start) & (self.row.pointers < end)
            at, boxes = self.row.pointers[mine], self.row.pointed[mine]
            pictures = (self.row.input_ids[start:end] == self.image).nonzero()
            if len(at) and len(pictures):
                first = int(pictures[0]) + self.before
                keys = torch.stack([key[head // shared, start:end] for head in HEADS])
                scores = torch.stack([query[head, at] for head in HEADS]) @ keys.transpose(1, 2) * scale
                scores = scores.float().masked_fill(~_seen(lengths, at - start), -torch.inf).log_softmax(-1)
                patches = scores[..., first : first + self.patches]
                wrong = ~self.targets(boxes)
                losses.append(-patches.masked_fill(wrong, -torch.inf).logsumexp(-1).mean(0))
            else:
                losses.append(query.new_zeros(len(at), dtype=torch.float32))
            start = end
        return torch.cat(losses)


def _seen(lengths: Sequence[int], at: Tensor) -> Tensor:
    """[K, n] bool: what the positions `at` of a piece see of it."""
    trunk, *branches = lengths
    place = torch.arange(sum(lengths), device=at.device)
    branch = torch.repeat_interleave(torch.tensor([trunk, *branches], device=at.device))
    return (place <= at[:, None]) & ((branch == 0) | (branch == branch[at][:, None]))
