"""The tokenizer: SentencePiece's ids and SentencePiece's text, through transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece
from tiny import GOLDEN, converted
from transformers import AutoTokenizer

from sphinx_fast.model.tokenizer import SentencePieceFile, SphinxTokenizer

MODEL = GOLDEN / "llama_ens" / "tokenizer.model"
TEXTS = [
    "What is in the image?",
    "",
    " ",
    "  two  spaces ",
    "line\nbreaks\n\n### Human: x\n###",
    "Grüße, 你好, 👋🏽!",
    "tab\tand\x00zero",
    "[0.12,0.34,0.56,0.78]",
    "a" * 300,
    "\u2581already",
]


@pytest.fixture(scope="module")
def pair() -> tuple[SphinxTokenizer, sentencepiece.SentencePieceProcessor]:
    """Our tokenizer as transformers loads it from a folder, and SentencePiece on the released file."""
    tokenizer = AutoTokenizer.from_pretrained(converted("llama_ens"))
    assert isinstance(tokenizer, SphinxTokenizer)
    return tokenizer, sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


def test_ids_are_sentencepieces(pair: tuple) -> None:
    tokenizer, reference = pair
    drawn = random.Random(0)
    letters = "abcdefgh ABC  .,:#\n?0123456789éß漢😀"
    texts = TEXTS + ["".join(drawn.choices(letters, k=drawn.randrange(60))) for _ in range(500)]
    for text in texts:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text), repr(text)
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)]


def test_text_is_sentencepieces_also_for_broken_utf8(pair: tuple) -> None:
    tokenizer, reference = pair
    drawn = random.Random(1)
    differ = 0
    for _ in range(300):
        ids = [drawn.randrange(3, 400) if drawn.random() < 0.5 else drawn.randrange(3, 259) for _ in range(12)]
        ids.insert(drawn.randrange(12), 1)  # a BOS in the middle is skipped
        expected = reference.decode([i for i in ids if i != 1])
        assert tokenizer.decode(ids, skip_special_tokens=True) == expected
        differ += tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True) != expected
    assert differ > 0  # the backend's own ByteFallback rule really is another one


def test_special_tokens_show_when_asked(pair: tuple) -> None:
    tokenizer, _ = pair
    ids = tokenizer("What is")["input_ids"] + [400, 2]
    assert tokenizer.decode(ids) == "<s>What is<image></s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "What is"


def test_special_ids(pair: tuple) -> None:
    tokenizer, _ = pair
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.convert_tokens_to_ids("<image>") == 400


def test_saved_again_it_is_the_same(pair: tuple, tmp_path: Path) -> None:
    tokenizer, reference = pair
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == MODEL.read_bytes()
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode([90, 381, 168, 200, 243]) == reference.decode([90, 381, 168, 200, 243])


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff", MODEL.read_bytes()[:1000] + b"\xff\xff\xff"])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        SentencePieceFile.read(path)
