"""The rows of a step: what it reads is a function of (seed, step), who computes which row is settled afterwards."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sphinx_fast.data.record import BadRowError, Conversation, Source
from sphinx_fast.image.decode import PictureError, load_picture
from sphinx_fast.train.order import Mixture, mixed, permuted
from sphinx_fast.train.packing import Row, make_row, pack
from sphinx_fast.train.pieces import Piece, text_pieces
from sphinx_fast.train.pointer import BoxFinder, quotes_of
from sphinx_fast.train.text import TokenFile

MakePiece = Callable[[Conversation, int], Piece]


@dataclass
class Batch:
    """One process's rows of a step, what was read in all, and what of it could not be used."""

    step: int
    rows: list[Row]
    rounds: int  # rows of the process that has most
    read: int
    bad: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)  # the first few


@dataclass
class Records:
    """Conversations from several data sets, `per_step` of them in every step, as pieces of one kind."""

    sources: Sequence[Source]
    mixture: Mixture
    per_step: int
    make: MakePiece
    kind: int = 0

    def pieces(self, step: int, batch: Batch) -> Iterator[Piece]:
        for position in range(step * self.per_step, (step + 1) * self.per_step):
            source, row = self.mixture[position]
            batch.read += 1
            try:
                yield self.make(self.sources[source][row], self.kind)
            except BadRowError as error:
                _note(batch, error)


@dataclass
class Texts:
    """`per_step` chunks of a corpus in every step."""

    file: TokenFile
    per_step: int
    tokenizer: Any
    seed: int
    kind: int = 0

    def pieces(self, step: int, batch: Batch) -> Iterator[Piece]:
        for position in range(step * self.per_step, (step + 1) * self.per_step):
            epoch, position = divmod(position, len(self.file))
            chunk = permuted(position, len(self.file), mixed(self.seed, epoch, 2))
            yield from text_pieces(self.file[chunk], self.tokenizer, self.kind, f"text chunk {chunk}")


def _note(batch: Batch, error: BadRowError) -> None:
    batch.bad[error.kind] += 1
    if len(batch.messages) < 3:
        batch.messages.append(str(error))


class Steps(Dataset[Batch]):
    """Batches by step number, for one of `world` processes.

    Every process reads the text of all rows, so that all agree on the packing, and the pictures of its own alone. The
    rows a step holds do not depend on `world`.
    """

    def __init__(
        self,
        streams: Sequence[Records | Texts],
        image_processor: Any,
        max_length: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        finder: BoxFinder | None = None,
    ) -> None:
        self.streams, self.image_processor, self.max_length = list(streams), image_processor, max_length
        self.seed, self.rank, self.world, self.finder = seed, rank, world, finder

    def __getitem__(self, step: int) -> Batch:
        batch = Batch(step, [], 0, 0)
        pieces = [piece for stream in self.streams for piece in stream.pieces(step, batch)]
        if self.rank > 0:  # the first process reports what all of them saw
            batch.read, batch.bad, batch.messages = 0, Counter(), []
        packed = pack([len(piece) for piece in pieces], self.max_length)
        for row in deal([sum(len(pieces[k]) for k in row) for row in packed], self.world)[self.rank]:
            made = self._row([pieces[k] for k in packed[row]], batch)
            if made is not None:
                batch.rows.append(made)
        batch.rounds = -(-len(packed) // self.world)
        return batch

    def _row(self, pieces: list[Piece], batch: Batch) -> Row | None:
        """The row without the pieces whose picture cannot be read; None if nothing is left."""
        kept, views = [], []
        for piece in pieces:
            if piece.picture is not None:
                try:
                    views.append(self._views(piece, batch.step))
                except PictureError as error:
                    missing = isinstance(piece.picture, Path) and not piece.picture.is_file()
                    _note(batch, BadRowError("no picture" if missing else "picture", f"{piece.name}: {error}"))
                    continue
            kept.append(piece)
        if not kept:
            return None
        row = make_row(kept, torch.cat(views) if views else None)
        if self.finder is not None:
            row.pointers, row.pointed, row.anywhere = self.finder(row, kept)
            row.quotes = quotes_of(kept)
        return row

    def _views(self, piece: Piece, step: int) -> Tensor:
        """The picture's views. A transform that draws, draws by (seed, step, row), whoever computes it."""
        picture = load_picture(piece.picture, max_pixels=self.image_processor.max_pixels)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(mixed(self.seed, step, *piece.name.encode()) >> 1)
            views: Tensor = self.image_processor.cut([picture])[0]
        return views


def deal(sizes: Sequence[int], world: int) -> list[list[int]]:
    """Rows by number for each process: counts differ by one at most, and the longest go to different processes."""
    order = sorted(range(len(sizes)), key=lambda k: (-sizes[k], k))
    hands: list[list[int]] = [[] for _ in range(world)]
    for place, row in enumerate(order):
        turn, seat = divmod(place, world)
        hands[seat if turn % 2 == 0 else world - 1 - seat].append(row)
    return hands


def batches(steps: Steps, start: int, end: int, workers: int) -> Iterator[Batch]:
    """Batches start .. end - 1 in order, read ahead by `workers` processes (0: read when asked for)."""
    loader: DataLoader[Batch] = DataLoader(
        steps,
        sampler=range(start, end),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_unasked if workers else None,
    )
    yield from loader


def _unasked(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: the run saves and ends, and then its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
