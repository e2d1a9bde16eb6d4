"""The tokenizer: a SentencePiece file as a fast tokenizer of transformers, decoding by SentencePiece's own rule.

In a run of byte pieces SentencePiece keeps the valid UTF-8 and turns each invalid byte into U+FFFD; the ByteFallback
decoder of `tokenizers` replaces the whole run, which changes answers. So `tokenizer.model` stays beside
`tokenizer.json`, and text is decoded with it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfile
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"  # stands for one visual position; in a prompt, for a whole picture

_SPACE = "\u2581"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # SentencePiece's piece types (sentencepiece_model.proto)
_UNIGRAM, _BPE = 1, 2


@dataclass
class SentencePieceFile:
    """The fields of a SentencePiece model file that decide how text is split."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # text, score, type
    model_type: int = _UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    @classmethod
    def read(cls, path: str | Path) -> SentencePieceFile:
        """Parse the protocol buffer. Raises ValueError naming the file when it is not a SentencePiece model."""
        try:
            spec = cls._parse(Path(path).read_bytes())
        except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path} is not a SentencePiece model") from error
        if not spec.pieces or spec.model_type not in (_UNIGRAM, _BPE):
            raise ValueError(f"{path} is not a SentencePiece model of the BPE or unigram kind")
        return spec

    @classmethod
    def _parse(cls, data: bytes) -> SentencePieceFile:
        spec = cls()
        for number, value in _fields(data):
            if number == 1:
                piece = {n: v for n, v in _fields(value)}
                score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
                spec.pieces.append((piece.get(1, b"").decode(), score, piece.get(3, 1)))
            elif number == 2:
                trainer = {n: v for n, v in _fields(value)}
                spec.model_type = trainer.get(3, _UNIGRAM)
                spec.byte_fallback = bool(trainer.get(35, 0))
            elif number == 3:
                normalizer = {n: v for n, v in _fields(value)}
                spec.charsmap = normalizer.get(2, b"")
                spec.add_dummy_prefix = bool(normalizer.get(3, 1))
                spec.remove_extra_whitespaces = bool(normalizer.get(4, 1))
        return spec


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol-buffer message: ints for varints, bytes for the rest."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("a field is longer than the file")
        yield number, data[at : at + size]
        at += size


def _bpe_merges(vocab: dict[str, int], pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """The merges a scored BPE vocabulary implies: best-scored result first, as SentencePiece merges."""
    scores = {text: score for text, score, _ in pieces}
    merges = []
    for text, score, kind in pieces:
        if kind != 1 or len(text) < 2:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab and scores[left] <= 0 and scores[right] <= 0:
                merges.append((-score, vocab[left], vocab[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def build_tokenizer(path: str | Path) -> Tokenizer:
    """A SentencePiece file as a `tokenizers.Tokenizer` that gives the same ids (without BOS)."""
    spec = SentencePieceFile.read(path)
    vocab = {text: i for i, (text, _, _) in enumerate(spec.pieces)}
    unknown = next((text for text, _, kind in spec.pieces if kind == _UNKNOWN), None)
    if spec.model_type == _BPE:
        model: Any = models.BPE(
            vocab=vocab,
            merges=_bpe_merges(vocab, spec.pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    else:
        scored = [(text, score) for text, score, _ in spec.pieces]
        model = models.Unigram(scored, unk_id=vocab.get(unknown or ""), byte_fallback=spec.byte_fallback)
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(spec.charsmap)] if spec.charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(" {2,}", " ")]
    user_defined = [text for text, _, kind in spec.pieces if kind == _USER_DEFINED]
    if user_defined:
        # Such a piece splits the text; only the very first segment may then get the dummy prefix.
        scheme = "first" if spec.add_dummy_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    else:
        steps += [normalizers.Prepend(_SPACE)] if spec.add_dummy_prefix else []
        steps += [normalizers.Replace(" ", _SPACE)]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0) if spec.add_dummy_prefix else decoders.Fuse(),
        ]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in user_defined])
    control = [text for text, _, kind in spec.pieces if kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    return tokenizer


class SphinxTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer whose text comes back by SentencePiece's rule where `tokenizer.model` lies beside it."""

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    # No __init__ here: transformers then loads tokenizer.json as it stands instead of rebuilding it.
    vocab_file: str | None = None
    _sentencepiece: sentencepiece.SentencePieceProcessor | None = None

    @classmethod
    def from_sentencepiece(cls, path: str | Path) -> SphinxTokenizer:
        """The tokenizer of a released folder: BOS is added, id 0 pads, `<image>` gets the id after the last piece."""
        spec = SentencePieceFile.read(path)
        control = [text for text, _, kind in spec.pieces if kind == _CONTROL]
        unknown = next((text for text, _, kind in spec.pieces if kind == _UNKNOWN), None)
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        return cls(
            tokenizer_object=build_tokenizer(path),
            vocab_file=str(path),
            **{name: text for name, text in tokens.items() if text in control},
            unk_token=unknown,
            pad_token=spec.pieces[0][0],
            extra_special_tokens={"image_token": IMAGE_TOKEN},
            add_bos_token="<s>" in control,
            add_eos_token=False,
            clean_up_tokenization_spaces=False,
            padding_side="left",
        )

    @property
    def sentencepiece(self) -> sentencepiece.SentencePieceProcessor | None:
        """SentencePiece on `tokenizer.model`, or None without that file."""
        if self._sentencepiece is None and self.vocab_file and Path(self.vocab_file).is_file():
            self._sentencepiece = sentencepiece.SentencePieceProcessor(model_file=str(self.vocab_file))
        return self._sentencepiece

    def _decode(  # type: ignore[override]
        self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any
    ) -> str:
        model = self.sentencepiece
        if model is None:
            return super()._decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        special = set(self.all_special_ids)
        if skip_special_tokens:
            return model.decode([i for i in ids if i not in special and i < len(model)])
        parts: list[str] = []
        run: list[int] = []
        first = True
        for token in [*ids, None]:
            if token is not None and token not in special and token < len(model):
                run.append(token)
                continue
            if run:
                text = model.decode(run)
                # decode() drops the dummy prefix of every run; only the first one had it.
                lost = not first and model.id_to_piece(run[0]).startswith(_SPACE)
                parts.append(" " + text if lost else text)
                run, first = [], False
            if token is not None:
                parts.append(str(self.convert_ids_to_tokens(token)))
        return "".join(parts)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers saves, with `tokenizer.model` beside `tokenizer.json`."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        target = Path(save_directory) / "tokenizer.model"
        if self.vocab_file and Path(self.vocab_file).is_file() and Path(self.vocab_file).resolve() != target.resolve():
            copyfile(self.vocab_file, target)
        return files
