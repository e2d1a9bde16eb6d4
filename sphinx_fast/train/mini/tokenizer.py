"""The tokenizer of sphinx-mini: a SentencePiece BPE model written by hand, in which a coordinate is one piece.

Merges come in three ranks. First the coordinates 0.00 .. 1.00; then the words that carry meaning in scenes (colours,
shapes, printed words ...), grown letter by letter, which never merge further; then merges learned on the scenes'
conversations, which may run across spaces, so that an instruction becomes a few pieces. Bytes are the fallback.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from sphinx_fast.data.scene_drawing import COLOURS, DEFECTS, SHAPES, TEXTURES
from sphinx_fast.data.scene_questions import corpus
from sphinx_fast.data.scene_words import NUMERALS
from sphinx_fast.data.scenes import WORDS
from sphinx_fast.model.conversation import SYSTEM
from sphinx_fast.model.tokenizer import SphinxTokenizer
from sphinx_fast.train.mini.texts import documents

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # piece types of sentencepiece_model.proto
BPE = 2  # its model type
LONGEST = 60  # characters of a learned piece
EXTRA_WORDS = ("small", "large", "left", "right", "above", "below", "top", "bottom", "nose", "elbow", "wrist", "knee",
               "ankle", "yes", "Unanswerable", "person", "word", "number", "surface", "Human:",
               "Assistant:")  # fmt: skip

Merge = tuple[str, str]


def coordinates() -> list[str]:
    """0.00 .. 1.00, one piece each."""
    return [f"{k / 100:.2f}" for k in range(101)]


def _chain(text: str) -> list[Merge]:
    """Merges that grow a text from its left end."""
    return [(text[:k], text[k]) for k in range(1, len(text))]


def first_merges() -> list[Merge]:
    """Coordinates, the stop text, then the words that carry meaning and the numbers below ten, each with its space."""
    texts = [*coordinates(), "\n###", "###"]
    texts += [SPACE + word for word in (*COLOURS, *SHAPES, *DEFECTS, *TEXTURES, *NUMERALS, *EXTRA_WORDS, *WORDS)]
    texts += [f"{SPACE}{digit}" for digit in range(10)]
    return list(dict.fromkeys(merge for text in texts for merge in _chain(text)))


def whole_pieces() -> set[str]:
    """Pieces that learned merges must leave alone."""
    words = (*COLOURS, *SHAPES, *DEFECTS, *TEXTURES, *NUMERALS, *EXTRA_WORDS, *WORDS)
    punctuation = (*coordinates(), *"[],;0123456789\n", "\n###", "###", "<", ">")
    return {SPACE + word for word in words} | set(punctuation) | {f"{SPACE}{digit}" for digit in range(10)}


def apply_merges(pieces: list[str], ranks: dict[Merge, int]) -> list[str]:
    """Plain BPE: the best-ranked pair first, the leftmost of equals."""
    while True:
        pairs = [(ranks.get(pair, len(ranks)), k) for k, pair in enumerate(pairwise(pieces))]
        rank, at = min(pairs, default=(len(ranks), 0))
        if rank == len(ranks):
            return pieces
        pieces = [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]


def learn_merges(texts: Counter[str], count: int) -> list[Merge]:
    """The fixed merges, then up to `count` in all, learned on weighted texts; the most frequent pair next."""
    merges = first_merges()
    ranks = {merge: k for k, merge in enumerate(merges)}
    known = {left + right for left, right in merges}
    whole = whole_pieces()
    rows = [(apply_merges(list(text), ranks), weight) for text, weight in texts.items()]
    while len(known) < count:
        pairs: Counter[Merge] = Counter()
        for row, weight in rows:
            for pair in pairwise(row):
                pairs[pair] += weight
        usable = ((weight, pair) for pair, weight in pairs.items() if not (pair[0] in whole or pair[1] in whole))
        best = max((item for item in usable if len("".join(item[1])) <= LONGEST), default=None)
        if best is None or best[0] < 2:
            break
        merges.append(best[1])
        known.add("".join(best[1]))
        rows = [(_merge_pair(row, best[1]), weight) for row, weight in rows]
    return merges


def _merge_pair(row: list[str], pair: Merge) -> list[str]:
    """Every occurrence of a pair, from the left."""
    if pair[0] not in row:
        return row
    merged: list[str] = []
    for piece in row:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def training_texts(scenes: int) -> Counter[str]:
    """Texts of the scenes' conversations in SentencePiece's form and how often they occur; every coordinate is 0.50."""
    texts: Counter[str] = Counter()
    turn = True
    for text in corpus(scenes):
        text = re.sub(r"\d\.\d\d", "0.50", text)
        texts[(f"\n### Human: {text}\n### Assistant:" if turn else f" {text}").replace(" ", SPACE)] += 1
        turn = not turn
    for text in documents(scenes):
        texts[f" {text}".replace(" ", SPACE)] += 1
    texts[(" " + SYSTEM).replace(" ", SPACE)] += 40 * scenes
    return texts


def pieces_of(tokenizer: SphinxTokenizer) -> SentencePieceProcessor:
    """SentencePiece on the tokenizer's file. ValueError where there is none."""
    if tokenizer.sentencepiece is None:
        raise ValueError("the tokenizer has no tokenizer.model")
    return tokenizer.sentencepiece


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def _message(fields: Iterable[tuple[int, int | float | bytes]]) -> bytes:
    """A protocol-buffer message: ints as varints, floats as 32 bits, bytes with their length."""
    data = b""
    for number, value in fields:
        if isinstance(value, bytes):
            data += _varint(number << 3 | 2) + _varint(len(value)) + value
        elif isinstance(value, float):
            data += _varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            data += _varint(number << 3) + _varint(value)
    return data


def sentencepiece_model(merges: list[Merge], vocab_size: int) -> bytes:
    """A SentencePiece BPE file: <unk> <s> </s>, 256 bytes, merged pieces by rank, then single characters."""
    merged = list(dict.fromkeys(left + right for left, right in merges))
    characters = [chr(code) for code in range(33, 127)] + [SPACE, "\n"]
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pieces += [(text, -float(k), NORMAL) for k, text in enumerate(merged)]
    pieces += [(text, -float(len(merged) + k), NORMAL) for k, text in enumerate(characters)]
    if len(pieces) > vocab_size:
        raise ValueError(f"{len(pieces)} pieces do not fit a vocabulary of {vocab_size}")
    fields: list[tuple[int, int | float | bytes]] = [
        (1, _message([(1, text.encode()), (2, score), (3, kind)])) for text, score, kind in pieces
    ]
    trainer = [(3, BPE), (4, len(pieces)), (24, 0), (35, 1), (40, 0), (41, 1), (42, 2), (43, 2**64 - 1)]
    normalizer: list[tuple[int, int | float | bytes]] = [(1, b"identity"), (3, 1), (4, 0), (5, 1)]
    return _message([*fields, (2, _message(trainer)), (3, _message(normalizer))])


def fixed_size() -> int:
    """Pieces that are there whatever is learned: specials, bytes and characters."""
    return 3 + 256 + 96


def write_tokenizer(path: Path, vocab_size: int, scenes: int = 1500) -> None:
    """Learn the merges on `scenes` scenes and write `tokenizer.model` with at most `vocab_size` pieces."""
    merges = learn_merges(training_texts(scenes), vocab_size - fixed_size())
    path.write_bytes(sentencepiece_model(merges, vocab_size))
