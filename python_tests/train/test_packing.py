"""Packed rows are the same computation as separate rows: losses and gradients, against float64."""

from __future__ import annotations

import copy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from close import assert_close
from tiny import tiny_model, tiny_views
from torch import Tensor
from training_data import tiny_processor

from sphinx_fast.data.record import Conversation
from sphinx_fast.train.learner import Learner
from sphinx_fast.train.packing import Packed, make_row, pack
from sphinx_fast.train.pieces import IGNORED, Piece, PieceMaker

MAKER = PieceMaker(tiny_processor(), 4000)
BRANCHES = PieceMaker(tiny_processor(), 4000, independent_turns=True)


@pytest.mark.parametrize("seed", range(20))
def test_pack(seed: int) -> None:
    rng = Random(seed)
    lengths = [rng.randint(1, 100) for _ in range(rng.randint(0, 60))]
    rows = pack(lengths, 100)
    assert sorted(k for row in rows for k in row) == list(range(len(lengths)))
    assert all(sum(lengths[k] for k in row) <= 100 for row in rows)
    assert all(row == sorted(row) for row in rows)
    assert len(rows) <= 1 + 2 * sum(lengths) / 100, "at most one row is half empty"


def test_a_piece_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="a piece of 101 positions, 100 allowed"):
        pack([3, 101], 100)


def talk(*turns: tuple[str, str], picture: bool = True) -> Conversation:
    return Conversation(turns, Path("p.png") if picture else None, "row")


TALKS = [
    talk(("what?", "a cat")),
    talk(("how many are there?", "5 dogs"), ("sure?", "yes")),
    talk(("text only", "an answer"), picture=False),
    talk(("a", "b")),
]


def summed_loss(model: Any, pieces: list[Piece], views: Tensor | None, together: bool) -> Tensor:
    """Sum of the cross-entropies of pieces, in one row or each in its own."""
    learner = Learner(model)
    groups = [pieces] if together else [[piece] for piece in pieces]
    total, at = torch.zeros((), dtype=next(model.parameters()).dtype), 0
    for group in groups:
        pictures = sum(piece.picture is not None for piece in group)
        row = make_row(group, views[at : at + 5 * pictures] if pictures and views is not None else None)
        at += 5 * pictures
        features = model.model.vision_tower(row.pixel_values) if row.pixel_values is not None else None
        ones = torch.ones(int((row.targets != IGNORED).sum()))
        total = total + learner(row, features, ones)[0]
    return total


@pytest.mark.parametrize("maker", [MAKER, BRANCHES], ids=["turns", "branches"])
def test_packing_is_separate_rows(maker: PieceMaker) -> None:
    pieces = [maker.conversation(record) for record in TALKS]
    views = tiny_views(15, 32)
    model = tiny_model().requires_grad_(False)
    parts = (model.model.fusion, model.model.language_model, model.lm_head)
    for part in parts:
        part.requires_grad_(True)
    wide = copy.deepcopy(model).double()

    def with_gradients(of: Any, together: bool) -> tuple[Tensor, dict[str, Tensor]]:
        of.zero_grad()
        loss = summed_loss(of, pieces, views.to(next(of.parameters()).dtype), together)
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}

    packed, packed_gradients = with_gradients(model, True)
    apart, gradients = with_gradients(model, False)
    exact, exact_gradients = with_gradients(wide, False)
    assert_close(packed, apart, exact.double(), "loss")
    assert packed_gradients.keys() == gradients.keys() == exact_gradients.keys()
    assert any("fusion.view_start" in name for name in gradients)
    for name, gradient in packed_gradients.items():
        assert_close(gradient, gradients[name], exact_gradients[name], name)


def test_branches_are_separate_conversations() -> None:
    """Questions behind one picture: the losses of conversations of one turn each."""
    record = talk(("what?", "a cat"), ("how many?", "5"), ("where is the dog?", "[0.10,0.20,0.30,0.40]"))
    views = tiny_views(5, 32)
    model = tiny_model()
    together = BRANCHES.conversation(record)
    alone = [MAKER.conversation(talk(turn)) for turn in record.turns]
    with torch.no_grad():
        one = summed_loss(model, [together], views, True)
        many = summed_loss(model, alone, views.repeat(3, 1, 1, 1), False)
        exact = summed_loss(copy.deepcopy(model).double(), alone, views.repeat(3, 1, 1, 1).double(), False)
    assert_close(one, many, exact, "loss")


def test_the_models_own_loss() -> None:
    """One conversation through `SphinxForConditionalGeneration.forward` with labels, as any trainer would."""
    model, piece, views = tiny_model(), MAKER.conversation(TALKS[1]), tiny_views(5, 32)
    labels = torch.full((1, len(piece)), IGNORED)
    labels[0, 1:] = torch.from_numpy(piece.targets[:-1])
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(piece.ids)[None], pixel_values=views, labels=labels).loss
        ours = summed_loss(model, [piece], views, True) / piece.targeted
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_nobody_sees_another() -> None:
    """Changing one piece changes no loss of the others, to the bit."""
    learner = Learner(tiny_model())
    texts = [MAKER.conversation(talk(turn, picture=False)) for turn in (("aa", "bb"), ("cc", "dd"), ("ee", "ff"))]
    other = MAKER.conversation(talk(("dd", "cc"), picture=False))
    assert len(other) == len(texts[1])
    rows = [make_row(texts), make_row([texts[0], other, texts[2]])]
    with torch.no_grad():
        losses = [learner(row, None, torch.ones(int((row.targets != IGNORED).sum())))[1] for row in rows]
    first, last = texts[0].targeted, texts[2].targeted
    assert torch.equal(losses[0][:first], losses[1][:first])
    assert torch.equal(losses[0][-last:], losses[1][-last:])
    assert not torch.equal(losses[0], losses[1])


def test_only_targets_have_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from sphinx_fast.train import learner as module

    rows = []
    plain = module.head_cross_entropy
    monkeypatch.setattr(module, "head_cross_entropy", lambda h, *a: rows.append(len(h)) or plain(h, *a))
    pieces = [MAKER.conversation(record) for record in TALKS]
    summed_loss(tiny_model(), pieces, tiny_views(15, 32), True)
    assert rows == [sum(piece.targeted for piece in pieces)]


def test_positions_start_anew() -> None:
    row = make_row([BRANCHES.conversation(TALKS[1]), BRANCHES.conversation(TALKS[2])])
    trunk, first, second = row.lengths[0]
    expected = [*range(trunk), *range(trunk, trunk + first), *range(trunk, trunk + second), *range(row.lengths[1][0])]
    assert row.positions.tolist() == expected


def test_grouped_query_heads_and_lengths_of_one() -> None:
    """The attention itself: 4 heads over 2, against a mask, with pieces and branches of one token."""
    torch.manual_seed(0)
    lengths = [(1,), (3, 1, 2), (5,), (2, 4)]
    total = sum(map(sum, lengths))
    query, key, value = torch.randn(1, 4, total, 8), torch.randn(1, 2, total, 8), torch.randn(1, 2, total, 8)
    seen = torch.zeros(total, total, dtype=torch.bool)
    at = 0
    for trunk, *branches in lengths:
        seen[at : at + trunk, at : at + trunk] = torch.ones(trunk, trunk).tril().bool()
        end = at + trunk
        for branch in branches:
            seen[end : end + branch, at : at + trunk] = True
            seen[end : end + branch, end : end + branch] = torch.ones(branch, branch).tril().bool()
            end += branch
        at = end
    attend = torch.nn.functional.scaled_dot_product_attention
    plain = attend(query, key, value, seen, scale=0.3, enable_gqa=True)[0].transpose(0, 1)
    exact = attend(query.double(), key.double(), value.double(), seen, scale=0.3, enable_gqa=True)[0].transpose(0, 1)
    ours = Packed(lengths, torch.zeros(total)).attend(0, query, key, value, 0.3)[0]
    assert_close(ours, plain, exact)
