"""Recorded decoding steps answer as eager ones do: any number of rows, after pools grew, after weights moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import GOLDEN, converted, tiny_model

from sphinx_fast import Sphinx, SphinxForConditionalGeneration
from sphinx_fast.infer.engine import Engine
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.vision.graphs import EagerRecorder

CAT, COFFEE = GOLDEN / "cat.png", GOLDEN / "coffee_portrait.png"
QUESTIONS = ["What?", "Where is it?", "And now?", "How many are there?", "Why?"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "stop": (), "temperature": 0.7, "seed": 4}


def loaded(model: SphinxForConditionalGeneration | None = None, **options: Any) -> Sphinx:
    """A model whose heads the kernel does not cover: the torch way takes rows that are not there on a CPU too."""
    model = model or tiny_model()
    tokenizer = Sphinx.from_pretrained(converted("llama_ens")).processor.tokenizer
    return Sphinx(model, SphinxProcessor.from_config(model.config, tokenizer), **options)


class Counting(EagerRecorder):
    made: list[int] = []  # noqa: RUF012

    def __call__(self, branches: Any) -> Any:
        Counting.made.append(branches[0].__self__.tokens.shape[0])
        return super().__call__(branches)


def test_recorded_steps_answer_as_eager_ones() -> None:
    eager = loaded()
    recorded = Sphinx(eager.model, eager.processor)
    recorded.engine.runner.steps.record(Counting)
    Counting.made = []
    pairs: list[Any] = [((CAT, COFFEE, None)[k % 3], question) for k, question in enumerate(QUESTIONS)]
    assert recorded.ask_batch(pairs, **SETTINGS) == eager.ask_batch(pairs, **SETTINGS)
    assert Counting.made[0] == 8
    for rows in (3, 4, 1, 2, 5):
        assert recorded.ask_many(CAT, QUESTIONS[:rows], **SETTINGS) == eager.ask_many(CAT, QUESTIONS[:rows], **SETTINGS)
    uneven = {**SETTINGS, "max_new_tokens": [3, 9, 1, 20, 6]}  # rows leave one after another
    assert recorded.ask_many(CAT, QUESTIONS, **uneven) == eager.ask_many(CAT, QUESTIONS, **uneven)
    made = list(Counting.made)
    assert {1, 2, 4, 8} == set(made)
    recorded.ask_many(CAT, QUESTIONS, **uneven)
    assert Counting.made == made, "each bucket once while nothing moves"


def test_grown_pools_and_moved_weights_are_recorded_again() -> None:
    eager = loaded(max_rows=4)
    recorded = Sphinx(eager.model, eager.processor, max_rows=4)
    recorded.engine.runner.steps.record(Counting)
    Counting.made = []
    capacity = recorded.engine.runner.suffixes.capacity
    for question in (QUESTIONS[0], "what is where " * 20):
        assert recorded.ask(CAT, question, **SETTINGS) == eager.ask(CAT, question, **SETTINGS)
    assert recorded.engine.runner.suffixes.capacity > capacity and Counting.made == [1, 1]
    layer = eager.model.model.language_model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
    assert recorded.ask(CAT, QUESTIONS[0], **SETTINGS) == eager.ask(CAT, QUESTIONS[0], **SETTINGS)
    assert Counting.made == [1, 1, 1]


def test_graphs_change_nothing_without_a_gpu() -> None:
    sphinx = Sphinx.from_pretrained(converted("llama_ens"), device="cpu")
    expected = sphinx.ask(CAT, "What?", **SETTINGS)
    sphinx.engine.use_graphs()
    assert sphinx.ask(CAT, "What?", **SETTINGS) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_answer_as_eager_steps(dtype: torch.dtype) -> None:
    eager = Sphinx.from_pretrained(converted("llama_ens5"), device="cuda", dtype=dtype)
    recorded = Sphinx(eager.model, eager.processor)
    assert isinstance(recorded.engine.use_graphs(), Engine)
    settings = {**SETTINGS, "temperature": 0.0, "max_new_tokens": 150}
    for rows in (1, 2, 3, 5):
        pairs: list[Any] = [((CAT, COFFEE, None)[k % 3], question) for k, question in enumerate(QUESTIONS[:rows])]
        assert recorded.ask_batch(pairs, **settings) == eager.ask_batch(pairs, **settings)
