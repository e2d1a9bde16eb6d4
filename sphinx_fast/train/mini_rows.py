"""Rows for sphinx-mini's language model: one picture, the system prompt, and many questions that do not see each other.

A row is BOS, the visual placeholders, the system prompt (the prefix), then a block per question,
"\\n### Human: ..\\n### Assistant: ..\\n###".
A block attends to the prefix and to itself, and its positions start where the prefix ends: every block is exactly the
conversation that is asked later, but the prefix is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from sphinx_fast.data.scene_questions import Question, questions
from sphinx_fast.data.scenes import Scene
from sphinx_fast.model.conversation import SYSTEM
from sphinx_fast.model.tokenizer import SphinxTokenizer
from sphinx_fast.train.dense import soft_bins
from sphinx_fast.train.mini_tokenizer import coordinates, pieces_of

ROUNDS = 4  # times a scene is asked for questions; a question that comes up again is dropped
SHARES = {  # of a task's questions, how many are kept in a round
    "vqa": 0.5,
    "refer": 1.0,
    "read": 0.5,
    "region_description": 0.15,
    "caption": 0.1,
    "relation": 0.12,
    "detect_category": 0.1,
    "detect_all": 0.05,
    "text_boxes": 0.25,
    "defect": 0.5,
    "key_points": 0.12,
    "grounded_caption": 0.03,
}
WEIGHTS = {"vqa": 2.0, "refer": 1.5, "read": 1.0, "relation": 1.0}
OTHER_WEIGHT = 0.5
OPEN_SHARE = 0.2  # short questions asked without "Answer the question using a single word or phrase."


@dataclass
class Rows:
    """A batch. T is prefix + text length.

    input_ids [B, T]; positions [B, T]; blocks [B, T]: 0 prefix, 1.. the block, -1 padding; labels [B, T]: the token to
    be predicted *at* this position, -100 elsewhere; weights [B, T]. `pointers` [K, 2]: (row, position) where a
    coordinate of a box is to be said, `pointed` [K, 4]: that box, in the padded square.
    """

    input_ids: Tensor
    positions: Tensor
    blocks: Tensor
    labels: Tensor
    weights: Tensor
    pointers: Tensor
    pointed: Tensor

    def mask(self) -> Tensor:
        """Additive [B, 1, T, T]: causal, and a block sees the prefix and itself."""
        seen = (self.blocks.unsqueeze(1) == 0) | (self.blocks.unsqueeze(1) == self.blocks.unsqueeze(2))
        causal = torch.ones(seen.shape[1:], dtype=torch.bool).tril()
        return torch.zeros(seen.shape).masked_fill(~(seen & causal), torch.finfo(torch.float32).min).unsqueeze(1)


class RowMaker:
    """Turns scenes into rows of a fixed length."""

    def __init__(
        self, tokenizer: SphinxTokenizer, tokens_per_picture: int, image_token_id: int, text_length: int
    ) -> None:
        self.pieces = pieces_of(tokenizer)
        system = self.pieces.encode(SYSTEM[:-1])  # its last newline belongs to "\n###"
        self.prefix = [tokenizer.bos_token_id, *[image_token_id] * tokens_per_picture, *system]
        self.text_length = text_length
        self.values = {self.pieces.piece_to_id(text): float(text) for text in coordinates()}
        self.bracket = self.pieces.piece_to_id("[")

    def block(self, question: Question) -> tuple[list[int], int]:
        """Ids of one question with its answer, and how many of them the prompt takes."""
        prompt = f"\n### Human: {question.prompt}\n### Assistant:"  # the newline is the system prompt's last
        ids = self.pieces.encode(f"{prompt} {question.answer}\n###")[1:]  # without SentencePiece's leading space
        return ids, len(self.pieces.encode(prompt)) - 1

    def pick(self, drawn: Scene, rng: Random) -> list[Question]:
        """Questions about a scene, several of each short kind, in random order."""
        found: dict[str, Question] = {}
        for _ in range(ROUNDS):
            for question in questions(drawn, rng, open_share=OPEN_SHARE):
                if rng.random() < SHARES[question.task]:
                    found.setdefault(question.prompt, question)
        picked = list(found.values())
        rng.shuffle(picked)
        return picked

    def rows(self, scenes: Sequence[Scene], rng: Random) -> Rows:
        """One row per scene."""
        count, start = len(scenes), len(self.prefix)
        length = start + self.text_length
        input_ids = torch.zeros(count, length, dtype=torch.long)
        input_ids[:, :start] = torch.tensor(self.prefix)
        positions = torch.arange(length).repeat(count, 1)
        blocks = torch.full((count, length), -1)
        blocks[:, :start] = 0
        pointers: list[tuple[int, int]] = []
        pointed: list[tuple[float, ...]] = []
        labels, weights = torch.full((count, length), -100), torch.zeros(count, length)
        for row, drawn in enumerate(scenes):
            at = start
            for number, question in enumerate(self.pick(drawn, rng), 1):
                ids, prompt = self.block(question)
                end = at + len(ids)
                if end > length:
                    continue
                input_ids[row, at:end] = torch.tensor(ids)
                positions[row, at:end] = torch.arange(start, start + len(ids))
                blocks[row, at:end] = number
                labels[row, at + prompt - 1 : end - 1] = input_ids[row, at + prompt : end]
                weights[row, at + prompt - 1 : end - 1] = WEIGHTS.get(question.task, OTHER_WEIGHT)
                for place, box in self.boxes(ids, prompt):
                    pointers.append((row, at + place - 1))
                    pointed.append(box)
                at = end
        where = torch.tensor(pointers, dtype=torch.long).reshape(-1, 2)
        return Rows(input_ids, positions, blocks, labels, weights, where, torch.tensor(pointed).reshape(-1, 4))

    def boxes(self, ids: Sequence[int], start: int) -> Iterator[tuple[int, tuple[float, ...]]]:
        """(place, box) of every coordinate of every `[x1,y1,x2,y2]` from `start` on."""
        for place in range(start, len(ids) - 8):
            values = tuple(self.values.get(ids[place + k], -1.0) for k in (1, 3, 5, 7))
            if ids[place] == self.bracket and min(values) >= 0:
                yield from ((place + k, values) for k in (1, 3, 5, 7))


def soft_labels(tokenizer: SphinxTokenizer, vocab_size: int, softness: float) -> Tensor:
    """[vocab, vocab]: the target distribution of each label; a coordinate spreads over its neighbours."""
    table = torch.eye(vocab_size)
    ids = torch.tensor([pieces_of(tokenizer).piece_to_id(text) for text in coordinates()])
    table[ids] = 0.0
    table[ids.unsqueeze(1), ids] = soft_bins(torch.linspace(0, 1, len(ids)), len(ids), softness)
    return table
