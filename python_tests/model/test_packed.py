"""Passes over the tokens of many sequences at once, against each whole sequence alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from close import assert_close
from torch import Tensor, nn
from transformers import (
    AutoModel,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from sphinx_fast.model import attention, packed
from sphinx_fast.model.cache import Pool, Slot
from sphinx_fast.model.packed import Decode, Piece, Prefill

CPU = torch.device("cpu")
VOCABULARY = 97
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
# Experts one by one: grouped products know no float64.
EXPERTS: dict[str, Any] = {"head_dim": 16, "num_local_experts": 2, "experts_implementation": "eager"}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, **HEADS, head_dim=16),
    "llama, every head its own keys": lambda: LlamaConfig(**SIZES, num_attention_heads=4, head_dim=32),
    "llama, 8 numbers a head": lambda: LlamaConfig(**SIZES, **HEADS, head_dim=8),
    "mistral": lambda: MistralConfig(**SIZES, **HEADS, head_dim=16, sliding_window=500),
    "mixtral": lambda: MixtralConfig(
        **SIZES, **HEADS, head_dim=16, num_local_experts=2, experts_implementation="eager"
    ),
    "qwen2": lambda: Qwen2Config(**SIZES, **HEADS),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=400),
}


def language_model(name: str, implementation: str = attention.NAME) -> Any:
    """Seeded and random, with weights wide enough that every position counts."""
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name](), attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def alone(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Last hidden states [N, D] of a whole sequence by transformers' own causal forward."""
    hidden: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).last_hidden_state
    return hidden[0]


@dataclass(eq=False)
class Sequence_:
    """A sequence: what it reads first, its place, and the hidden states of its own tokens."""

    slot: Slot
    before: Sequence_ | None = None
    ids: list[int] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)

    @property
    def prefix(self) -> Slot | None:
        return None if self.before is None else self.before.slot

    @property
    def whole(self) -> list[int]:
        return [*(self.before.ids if self.before is not None else []), *self.ids]


class Room:
    """Sequences in pools that begin too small, and a pass of each kind over them."""

    def __init__(self, model: Any, seed: int = 0) -> None:
        self.model, self.chance = model, random.Random(seed)
        self.prefixes, self.suffixes = Pool(64, 2, CPU), Pool(64, 2, CPU)
        self.sequences: list[Sequence_] = []

    def make(self, pool: Pool, before: Sequence_ | None = None) -> Sequence_:
        slot = pool.take()
        assert slot is not None
        self.sequences.append(made := Sequence_(slot, before))
        return made

    def prefix(self) -> Sequence_:
        return self.make(self.prefixes)

    def suffix(self, before: Sequence_ | None = None) -> Sequence_:
        return self.make(self.suffixes, before)

    @torch.inference_mode()
    def prefill(self, *counts: tuple[Sequence_, int]) -> None:
        """So many new tokens of each."""
        pieces, new = [], []
        for one, count in counts:
            start = len(one.ids)
            one.ids += (ids := [self.chance.randrange(VOCABULARY) for _ in range(count)])
            new += ids
            one.slot.pool.reserve(len(one.ids))
            if one.slot.pool is self.prefixes:
                self.prefixes.set_length(one.slot, len(one.ids))
            pieces.append(Piece(one.slot, start, count, one.prefix))
        step = Prefill(pieces, CPU)
        hidden = step.run(self.model, self.model.get_input_embeddings()(torch.tensor(new)))
        assert hidden.shape[0] == sum(count for _, count in counts)
        for (one, _), part in zip(counts, hidden.split([count for _, count in counts]), strict=True):
            one.seen.append(part)
            one.slot.pool.set_length(one.slot, len(one.ids))
        ends = torch.tensor([count for _, count in counts]).cumsum(0) - 1
        assert torch.equal(step.last, ends)

    @torch.inference_mode()
    def decode(self, rows: Sequence[Sequence_ | None], steps: int = 1) -> Decode:
        """One step of these rows (None: a row that is not there), several times with the same pass."""
        self.suffixes.reserve(max(len(one.ids) for one in rows if one is not None) + steps)
        pictures = [-1 if one is None or one.prefix is None else one.prefix.index for one in rows]
        questions = [-1 if one is None else one.slot.index for one in rows]
        step = Decode(
            self.prefixes, self.suffixes, *(torch.tensor(i, dtype=torch.int32) for i in (pictures, questions))
        )
        for _ in range(steps):
            self.advance(step, rows)
        return step

    @torch.inference_mode()
    def advance(self, step: Decode, rows: Sequence[Sequence_ | None]) -> None:
        new = [self.chance.randrange(VOCABULARY) for _ in rows]
        hidden = step.run(self.model, self.model.get_input_embeddings()(torch.tensor(new)))
        step.grow()
        for one, token, part in zip(rows, new, hidden, strict=True):
            if one is not None:
                one.ids.append(token)
                one.seen.append(part[None])
                one.slot.length += 1

    def check(self, exact: Any) -> None:
        """Every sequence against itself alone, in this dtype and in float64; together, for short ones say little."""
        seen, plain, right = [], [], []
        with torch.no_grad():
            for one in self.sequences:
                assert one.slot.length == len(one.ids) == int(one.slot.pool.lengths[one.slot.index])
                behind = len(one.whole) - len(one.ids)
                seen += one.seen
                plain.append(alone(self.model, one.whole)[behind:])
                right.append(alone(exact, one.whole)[behind:])
        assert_close(torch.cat(seen), torch.cat(plain), torch.cat(right), "hidden states")


@pytest.fixture(scope="module", params=CONFIGS)
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return exact_too(request.param)


@pytest.fixture(scope="module", params=["llama", "llama, 8 numbers a head"])
def two_ways(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Steps by the kernel and by torch."""
    return exact_too(request.param)


def exact_too(name: str) -> tuple[Any, Any]:
    """A language model in fp32 and in float64; both attend by transformers' eager code when they are alone."""
    model = language_model(name, "eager")
    return model, copy.deepcopy(model).double()


def test_prompts_and_steps_of_many_sequences(models: tuple[Any, Any]) -> None:
    """New prefixes with their readers, follow-ups of all kinds, steps, later turns, and pools that grow in between."""
    room = Room(models[0])
    one, two, empty = room.prefix(), room.prefix(), room.suffix()
    a, b, c, text = room.suffix(one), room.suffix(one), room.suffix(two), room.suffix()
    room.prefill((one, 21), (two, 17), (empty, 1), (text, 6), (a, 3), (b, 5), (c, 1))
    room.decode([a, b, c, text, empty], steps=3)
    three = room.prefix()  # longer than any before
    d = room.suffix(three)
    room.prefill((three, 70), (a, 4), (d, 9), (text, 2))  # turns that go on, beside a new picture
    room.decode([text, a, b, d], steps=2)
    e = room.suffix(two)
    room.prefill((e, 65), (c, 2), (b, 1))  # members of one prefix apart and side by side
    room.decode([e, c, text, empty, d, b, a], steps=6)
    room.check(models[1])


def test_any_order_of_pieces_and_rows(models: tuple[Any, Any]) -> None:
    """Drawn passes: pieces of one prefix need not stand side by side, nor those that go on beside those that begin."""
    room = Room(models[0], seed=1)
    chance = random.Random(2)
    prefixes = [room.prefix() for _ in range(3)]
    room.prefill(*((prefix, chance.randint(1, 12)) for prefix in prefixes))
    suffixes = [room.suffix(chance.choice([None, *prefixes])) for _ in range(8)]
    for _ in range(5):
        some = chance.sample(suffixes, chance.randint(1, 8))
        room.prefill(*((one, chance.randint(1, 4)) for one in some))
        there = [one for one in suffixes if one.ids]
        room.decode(chance.sample(there, chance.randint(1, len(there))), steps=chance.randint(1, 3))
    room.check(models[1])


def test_text_only_needs_no_prefixes(two_ways: tuple[Any, Any]) -> None:
    room = Room(two_ways[0], seed=3)
    a, b, c = room.suffix(), room.suffix(), room.suffix()
    room.prefill((a, 3), (b, 8))
    room.decode([b, a], steps=2)
    room.prefill((a, 2), (c, 4), (b, 3))  # one that begins between two that go on
    room.decode([c, b, a], steps=2)
    assert room.prefixes.slots == 0
    room.check(two_ways[1])


def test_a_pass_goes_on_when_pools_grow_under_it(two_ways: tuple[Any, Any]) -> None:
    """What a step knows lies in tensors of the pools, which others replace between two steps."""
    room = Room(two_ways[0], seed=4)
    one = room.prefix()
    a, b = room.suffix(one), room.suffix(one)
    room.prefill((one, 9), (a, 2), (b, 3))
    step = room.decode([a, b])
    for _ in range(4):
        with torch.inference_mode():
            for pool in (room.prefixes, room.suffixes):
                pool._resize(pool.slots + 1, pool.capacity + 64)
        room.advance(step, [a, b])
    room.check(two_ways[1])


@pytest.mark.parametrize("name", ["llama", "llama, 8 numbers a head"])
def test_a_row_that_is_not_there_touches_nothing(name: str) -> None:
    """On the CPU the kernel refuses it; torch gives it something."""
    model, exact = exact_too(name)
    room = Room(model, seed=5)
    one = room.prefix()
    a, b = room.suffix(one), room.suffix(one)
    room.prefill((one, 5), (a, 2), (b, 3))
    assert {a.slot.index, b.slot.index} == {0, 1}, "-1 must not be taken for the first or the last"
    room.suffixes.reserve(10)
    layers = [room.suffixes.layer(index) for index in (0, 1)]
    # As bits: there may be anything where nothing was written yet.
    tensors = [room.suffixes.lengths]
    tensors += [tensor.view(torch.int32) for layer in layers if layer is not None for tensor in layer[:2]]
    with torch.inference_mode():
        for questions in ([-1, -1], [1, -1]):
            before = [tensor.clone() for tensor in tensors]
            rows = torch.tensor(questions, dtype=torch.int32)
            step = Decode(room.prefixes, room.suffixes, torch.full_like(rows, -1), rows)
            embeddings = model.get_input_embeddings()(torch.tensor([1, 2]))
            if name == "llama":
                with pytest.raises(ValueError, match="got -1"):
                    step.run(model, embeddings)
            else:
                step.run(model, embeddings)
                step.grow()
                if 1 in questions:  # the other row is there
                    assert room.suffixes.lengths.tolist() == [before[0][0], before[0][1] + 1]
                    room.suffixes.set_length(room.sequences[1 if a.slot.index else 2].slot, int(before[0][1]))
                    before[1:] = [
                        torch.cat([old[:1], new[1:]]) for old, new in zip(before[1:], tensors[1:], strict=True)
                    ]
            assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
    room.check(exact)


def test_a_row_in_any_company_has_the_same_bits() -> None:
    """As many others, who say something else: what is appended and attended to is a row's own."""
    model, seen = language_model("llama"), []
    for company in (0, 1):
        room = Room(model, seed=6)
        one = room.prefix()
        a, b, other = room.suffix(one), room.suffix(one), room.suffix()
        room.prefill((one, 9))
        room.prefill((a, 2), (b, 2))
        room.prefill((other, 4 + company))
        room.chance = random.Random(7)
        room.decode([a, b, other], steps=3)
        seen.append(torch.cat([*a.seen[1:], *b.seen[1:]]))
    assert torch.equal(*seen)


def test_heads_the_kernel_does_not_have_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    kernel, plain = packed.ops.attention, attention.plain_step

    def counted(name: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(name)
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(packed.ops, "attention", counted("kernel", kernel))
    monkeypatch.setattr(attention, "plain_step", counted("torch", plain))
    for name, expected in (("llama", "kernel"), ("llama, 8 numbers a head", "torch"), ("gpt2", "kernel")):
        room = Room(language_model(name))
        a = room.suffix()
        room.prefill((a, 3))
        room.decode([a])
        assert calls == [expected] * 2
        calls.clear()


# --- whatever it was loaded with --------------------------------------------------------------------------------------
class Failing(packed.Pass):
    """A pass that fails in the second layer."""

    def __init__(self) -> None:
        self.positions = torch.arange(2)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        if layer == 1:
            raise KeyboardInterrupt
        return query.transpose(1, 2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", attention.NAME])
def test_a_model_keeps_its_attention_after_a_pass_also_when_it_fails(implementation: str) -> None:
    model = language_model("llama", implementation)
    ids = [3, 1, 4, 1, 5]
    with torch.no_grad():
        before = alone(model, ids)
        room = Room(model)
        room.prefill((room.suffix(), 3))
        assert model.config._attn_implementation == implementation
        with pytest.raises(KeyboardInterrupt):
            Failing().run(model, model.get_input_embeddings()(torch.tensor([1, 2])))
        assert model.config._attn_implementation == implementation
        assert all(layer.self_attn.config is model.config for layer in model.layers)
        assert torch.equal(alone(model, ids), before)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", attention.NAME])
def test_a_pass_computes_the_same_whatever_a_model_was_loaded_with(implementation: str) -> None:
    seen = []
    for name in (implementation, attention.NAME):
        room = Room(language_model("llama", name))
        one = room.prefix()
        a = room.suffix(one)
        room.prefill((one, 7), (a, 3))
        room.decode([a], steps=2)
        seen.append(torch.cat([*one.seen, *a.seen]))
    assert torch.equal(*seen)


def test_soft_capping_is_refused() -> None:
    config = Gemma2Config(**SIZES, **HEADS, head_dim=16, attn_logit_softcapping=30.0, sliding_window=500)
    model = AutoModel.from_config(config).eval()
    room = Room(model)
    with pytest.raises(ValueError, match="soft capping, biases or sinks"):
        room.prefill((room.suffix(), 3))
    assert model.config._attn_implementation != attention.NAME


def test_layers_that_do_not_hand_a_pass_on_are_not_believed() -> None:
    """A model whose layers drop keyword arguments would compute something else in silence."""

    class Dropping(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: Any, packed: Any = None, **kwargs: Any) -> Any:
            return self.layer(*args, **kwargs)

    model = language_model("llama")
    model.layers[1].self_attn = Dropping(model.layers[1].self_attn)
    room = Room(model)
    a, b = room.suffix(), room.suffix()
    with pytest.raises((ValueError, RuntimeError)):
        room.prefill((a, 3), (b, 2))
