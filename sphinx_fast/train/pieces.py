"""Conversations, captions and documents as token ids with a target at every position that is to predict something.

A piece is one sequence that sees nothing but itself. It may have a trunk and branches: every branch sees the trunk and
itself, and its positions go on where the trunk ends. So many questions about one picture cost its visual tokens once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sphinx_fast.data.record import BadRowError, Conversation, Look
from sphinx_fast.model.conversation import STOP, SYSTEM, conversation_prompt

IGNORED = -100

Boxes = tuple[tuple[float, ...], ...]
Asked = tuple[tuple[str, str], Sequence[Look]]  # a question and its answer, what the answer is about


class Turn(NamedTuple):
    """A turn in the tokens of its conversation: its answer with the stop text, and what must be looked at for tokens of
    it: boxes, or a token of the question."""

    answer: range
    looks: list[tuple[int, Boxes]]
    quotes: list[tuple[int, int]]


@dataclass
class Piece:
    """n tokens.

    ids        [n]
    targets    [n]: what is to be predicted at this position, IGNORED where nothing is
    weights    [n]: of the targets in the loss
    looks      (position that predicts a token of an answer, the boxes it is about)
    quotes     (position that predicts a token of an answer, position of the token of the question that decides it)
    lengths    tokens of the trunk, then of each branch; (n,): no branches
    picture    what stands at the placeholders, or None
    kind       which mean of the loss its targets belong to
    name       for messages
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    lengths: tuple[int, ...]
    picture: Path | bytes | None = None
    kind: int = 0
    name: str = ""
    looks: list[tuple[int, Boxes]] = field(default_factory=list)
    quotes: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targeted(self) -> int:
        """How many tokens it teaches."""
        return int((self.targets != IGNORED).sum())


class PieceMaker:
    """Turns records into pieces for one model.

    Args:
        processor: the model's: tokenizer, placeholders, views.
        max_length: positions a piece may have.
        independent_turns: turns become branches.
    """

    def __init__(self, processor: Any, max_length: int, independent_turns: bool = False) -> None:
        self.processor, self.max_length = processor, max_length
        self.independent_turns = independent_turns
        self.tokenizer = processor.tokenizer
        self.visual = [processor.image_token_id] * (processor.image_processor.num_views * processor.tokens_per_view)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.bos, self.eos = [] if bos is None else [bos], [] if eos is None else [eos]

    def _head(self, record: Conversation) -> list[int]:
        return [*self.bos, *(self.visual if record.picture is not None else ())]

    def caption(self, record: Conversation, kind: int = 0) -> Piece:
        """Stage 1: BOS, picture, caption, EOS; no prompt. Everything behind the picture is a target."""
        text = "".join(answer for _, answer in record.turns)
        if not text.strip():
            raise BadRowError("no answer", f"{record.name}: an empty caption")
        if record.picture is None:
            raise BadRowError("no picture", f"{record.name}: a caption without a picture")
        head = self._head(record)
        body = [*self._encode([text])[0][0], *self.eos]
        room = self.max_length - len(head)
        if room < 1:
            raise BadRowError(
                "too long", f"{record.name}: {len(head)} positions before the caption, {self.max_length} allowed"
            )
        body = body[:room]
        labelled = np.arange(len(head), len(head) + len(body))
        return self._piece([*head, *body], labelled, (len(head) + len(body),), record, kind)

    def conversation(self, record: Conversation, kind: int = 0) -> Piece:
        """Stage 2: BOS, picture, system prompt, turns; targets are the tokens of every answer and its stop text.

        What does not fit is cut off. Raises BadRowError("too long") when no answer is left whole.
        """
        if not record.turns or not all(answer.strip() for _, answer in record.turns):
            raise BadRowError("no answer", f"{record.name}: a question without an answer")
        if self.independent_turns and len(record.turns) > 1:
            return self._branches(record, kind)
        head = self._head(record)
        ((ids, turns),) = self._told([_turns(record)])
        whole = [turn for turn in turns if len(head) + turn.answer.stop <= self.max_length]
        if not whole:
            raise BadRowError(
                "too long",
                f"{record.name}: its first answer ends at position {len(head) + turns[0].answer.stop:,}, "
                f"{self.max_length:,} allowed ({len(head):,} are before the text); raise max_length",
            )
        answers = [turn.answer for turn in whole]
        ids = ids[: answers[-1].stop]
        labelled = np.concatenate([np.arange(a.start, a.stop) for a in answers]) + len(head)
        weights = self._weights(record, answers)
        piece = self._piece([*head, *ids], labelled, (len(head) + len(ids),), record, kind, weights)
        piece.looks = [(len(head) + at - 1, boxes) for turn in whole for at, boxes in turn.looks]
        piece.quotes = [(len(head) + at - 1, len(head) + quoted) for turn in whole for at, quoted in turn.quotes]
        return piece

    def _branches(self, record: Conversation, kind: int) -> Piece:
        """Each turn as a conversation of its own; what all of them begin with is the trunk."""
        head = self._head(record)
        rows = self._told([[turn] for turn in _turns(record)])
        shared = min(turns[0].answer.start for _, turns in rows) - 1  # what predicts an answer's first token is its own
        first = rows[0][0]
        for ids, _ in rows[1:]:
            same = next((k for k, (a, b) in enumerate(zip(first, ids, strict=False)) if a != b), len(ids))
            shared = min(shared, same)
        tokens, lengths, labelled, weights = [*head, *first[:shared]], [len(head) + shared], [], []
        looks, quotes = [], []
        for number, (ids, (turn,)) in enumerate(rows):
            answer = turn.answer
            own = ids[shared : answer.stop]
            if len(tokens) + len(own) > self.max_length:
                continue
            start = len(tokens) - shared
            labelled.append(np.arange(start + answer.start, start + answer.stop))
            looks += [(start + at - 1, boxes) for at, boxes in turn.looks]
            quotes += [(start + at - 1, (len(head) if q < shared else start) + q) for at, q in turn.quotes]
            weights.append(np.full(len(answer), self._weight(record, number), np.float32))
            tokens += own
            lengths.append(len(own))
        if not labelled:
            raise BadRowError(
                "too long", f"{record.name}: no turn fits {self.max_length:,} positions; raise max_length"
            )
        piece = self._piece(tokens, np.concatenate(labelled), tuple(lengths), record, kind, np.concatenate(weights))
        piece.looks, piece.quotes = looks, quotes
        return piece

    def _told(self, conversations: Sequence[Sequence[Asked]]) -> list[tuple[list[int], list[Turn]]]:
        """Of each conversation the token ids without BOS, and where in them its turns are."""
        texts, spans = [], []
        for turns in conversations:
            text, marks = "", []
            for number, ((question, answer), looks) in enumerate(turns):
                prompt = conversation_prompt([(question, None)], system=SYSTEM if number == 0 else "")
                asked = len(text) + prompt.rfind(question)
                text += prompt
                marks.append((asked, len(text), len(text) + len(f" {answer}{STOP}"), looks))
                text += f" {answer}\n"
            texts.append(text + STOP[1:])
            spans.append(marks)
        return [
            (ids, [_turn(ends, *mark) for mark in marks])
            for (ids, ends), marks in zip(self._encode(texts), spans, strict=True)
        ]

    def _encode(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """Of each text the ids, and where in it each token ends."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        ends = (np.array([end for _, end in offsets], np.int64) for offsets in encoded["offset_mapping"])
        return list(zip(encoded["input_ids"], ends, strict=True))

    def _weight(self, record: Conversation, turn: int) -> float:
        return record.weights[turn] if record.weights else 1.0

    def _weights(self, record: Conversation, answers: Sequence[range]) -> np.ndarray:
        parts = [np.full(len(answer), self._weight(record, turn), np.float32) for turn, answer in enumerate(answers)]
        return np.concatenate(parts)

    def _piece(
        self,
        ids: list[int],
        labelled: np.ndarray,
        lengths: tuple[int, ...],
        record: Conversation,
        kind: int,
        weights: np.ndarray | None = None,
    ) -> Piece:
        array = np.array(ids, np.int64)
        targets = np.full(len(ids), IGNORED, np.int64)
        targets[labelled - 1] = array[labelled]
        given = np.zeros(len(ids), np.float32)
        given[labelled - 1] = 1.0 if weights is None else weights
        targets[given == 0] = IGNORED
        return Piece(array, targets, given, lengths, record.picture, kind, record.name)


def _turns(record: Conversation) -> list[Asked]:
    looks = record.looks or ((),) * len(record.turns)
    return list(zip(record.turns, looks, strict=True))


def _turn(ends: np.ndarray, asked: int, start: int, stop: int, looks: Sequence[Look]) -> Turn:
    """A turn whose question begins at a character and whose answer, from the blank before it, is start .. stop."""

    def tokens(first: int, last: int) -> range:
        """Those with characters in first .. last."""
        return range(np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last, side="left") + 1)

    # A token belongs to an answer if its last character does: the blank before the answer goes with it.
    turn = Turn(range(*np.searchsorted(ends, (start, stop), side="right")), [], [])
    for look in looks:
        part = tokens(start + 1 + look.start, start + 1 + look.stop)
        if look.boxes:
            first = turn.answer.start if look.start == 0 else part.start
            turn.looks.extend((at, look.boxes) for at in range(first, part.stop))
        if look.quote:
            turn.quotes.extend(zip(part, tokens(asked + look.quote[0], asked + look.quote[1]), strict=False))
    return turn


def text_pieces(tokens: np.ndarray, tokenizer: Any, kind: int, name: str) -> list[Piece]:
    """[n + 1] neighbouring tokens of a corpus -> pieces of n tokens together: documents begin with BOS and see only
    themselves. BOS is given, never said, unless it ends documents too."""
    bos = tokenizer.bos_token_id
    ids, targets = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
    starts = [0] if bos is None else [0, *(np.flatnonzero(ids[1:] == bos) + 1)]
    if bos != tokenizer.eos_token_id:
        targets = np.where(targets == bos, IGNORED, targets)
    weights = (targets != IGNORED).astype(np.float32)
    return [
        Piece(ids[a:b], targets[a:b], weights[a:b], (int(b - a),), None, kind, name)
        for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)
    ]
