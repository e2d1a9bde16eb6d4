"""The hand-written SentencePiece file: coordinates are pieces, and both readers agree on it."""

from itertools import islice
from random import Random

import pytest
import sentencepiece

from sphinx_fast.data.record import Conversation
from sphinx_fast.data.scene_questions import corpus, questions
from sphinx_fast.data.scenes import scene
from sphinx_fast.infer import EMBEDDED_MODEL
from sphinx_fast.model import SphinxProcessor, preset
from sphinx_fast.model.conversation import SYSTEM
from sphinx_fast.model.tokenizer import SphinxTokenizer
from sphinx_fast.train.mini.tokenizer import coordinates, write_tokenizer
from sphinx_fast.train.pieces import IGNORED, PieceMaker


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_tokenizer(path, 900, scenes=4)
    return path


def readers(path):
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), SphinxTokenizer.from_sentencepiece(path)


def test_written_file_is_sentencepiece_and_coordinates_are_single_pieces(written):
    pieces, _ = readers(written)
    assert pieces.vocab_size() <= 900
    for text in coordinates():
        assert pieces.encode(f"red circle[{text},{text}]", out_type=str).count(text) == 2


@pytest.mark.parametrize("text", ["", "naïve 東京 \U0001f600", "10.255", "a  b", "\n\n###", "tab\tand ### Human:x"])
def test_any_text_comes_back(written, text):
    pieces, tokenizer = readers(written)
    ids = pieces.encode(text)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert pieces.decode(ids) == text


def test_embedded_tokenizer_agrees_with_sentencepiece_on_2000_texts():
    pieces, _ = readers(EMBEDDED_MODEL / "tokenizer.model")
    tokenizer = SphinxTokenizer.from_pretrained(EMBEDDED_MODEL)
    for text in islice(corpus(400, seed=7_000), 2000):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text), text


def test_prompt_then_answer_is_the_conversation(written):
    """The tokens that are asked with are the tokens that were trained: no piece runs across the end of the prompt."""
    pieces, tokenizer = readers(written)
    maker = PieceMaker(SphinxProcessor.from_config(preset("sphinx-mini"), tokenizer), 900)
    drawn = scene(3, split="validation")
    for question in questions(drawn, Random(0)):
        piece = maker.conversation(Conversation(((question.prompt, question.answer),)))
        first = int((piece.targets != IGNORED).argmax()) + 1
        asked = pieces.encode(f"{SYSTEM}### Human: {question.prompt}\n### Assistant:")
        assert piece.ids[1:first].tolist() == asked
        assert pieces.decode(piece.ids[first:].tolist()).strip() == f"{question.answer}\n###"
