"""Wrong arguments to the room attention: an error that names the argument, nothing written, no crash."""

from __future__ import annotations

import contextlib
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import DTYPES, Case, bits, draw, flat, indices, reference
from close import assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sphinx_fast.ops import KeyValues, Rope, attention, build_info, extension

# Three rows, two pictures, four questions: H = 4, K = 2, D = 16; prefixes of 7 positions, suffixes of 6.
CASE = Case(4, 2, 16, (5, 4), (0, 3, 2, 1), (0, 0, 1), (2, 0, 3), "halves", "some", spare=2)
GOOD = draw(CASE)
HALF, TABLE = 8, 5 + 3 + 9  # angles, positions
NAMES = [argument.name for argument in torch.ops.sphinx_fast.attention.default._schema.arguments]


def good(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Right arguments of `ops.attention`, with memory of their own."""
    given = draw(CASE, dtype)
    for cache in given.caches().values():
        assert cache is not None
        cache.memory.nan_to_num_(3.0)
    made = {"query": given.query} | given.arguments()
    return made | {"out": torch.zeros(3, 4, 16, dtype=dtype), "lse": torch.zeros(3, 4), "scale": 0.25}


def tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Those with memory that may be looked at, by name."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        many = value if isinstance(value, tuple) else (value,)
        found |= {f"{name}[{index}]": one for index, one in enumerate(many) if isinstance(one, Tensor)}
    return {
        name: one for name, one in found.items()
        if one.device.type == "cpu" and one.layout == torch.strided and not one.is_quantized
    }  # fmt: skip


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def fake(tensor: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(tensor)


def cache(slots: int, kv_heads: int, capacity: int, head_dim: int, lengths: Any = None) -> KeyValues:
    key, value = torch.zeros(2, slots, kv_heads, capacity, head_dim)
    return KeyValues(key, value, None if lengths is None else indices(lengths))


def prefix(**changes: Any) -> dict[str, Any]:
    return {"prefix": good()["prefix"]._replace(**changes)}


def suffix(**changes: Any) -> dict[str, Any]:
    return {"suffix": good()["suffix"]._replace(**changes)}


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope": good()["rope"]._replace(**changes)}


PREFIX, SUFFIX, NO_KEY = (2, 2, 7, 16), (4, 2, 6, 16), {"key": None, "value": None}
LONG = torch.tensor([0, 0, 1])
WRONG = (ValueError, TypeError)  # of a lack, either will do

BAD_CALLS: list[tuple[str, Any, str, dict[str, Any]]] = [
    # query
    ("query none", TypeError, "query", {"query": None}),
    ("query list", TypeError, "query", {"query": [[[1.0] * 16]]}),
    ("query rank 2", ValueError, "query", {"query": zeros(3, 64)}),
    ("query rank 4", ValueError, "query", {"query": zeros(1, 3, 4, 16)}),
    ("query scalar", ValueError, "query", {"query": torch.tensor(1.0)}),
    ("query float64", TypeError, "query", {"query": zeros(3, 4, 16).double()}),
    ("query int", TypeError, "query", {"query": zeros(3, 4, 16).int()}),
    ("query complex", TypeError, "query", {"query": zeros(3, 4, 16).to(torch.complex64)}),
    ("query conjugate", ValueError, "query", {"query": torch.zeros(3, 4, 16, dtype=torch.complex64).conj()}),
    ("query half", TypeError, "prefix|out", {"query": zeros(3, 4, 16).half()}),
    ("query sparse", WRONG, "query", {"query": zeros(3, 4, 16).to_sparse()}),
    ("query gaps", ValueError, "query", {"query": zeros(3, 4, 32)[..., ::2]}),
    ("query transposed", ValueError, "query", {"query": zeros(3, 16, 4).mT}),
    ("query rows", ValueError, "out|key|pictures", {"query": zeros(2, 4, 16)}),
    ("query head_dim", ValueError, "prefix|out", {"query": zeros(3, 4, 32)}),
    *[(f"head_dim {dim}", ValueError, "query.*head_dim", {
        "query": zeros(3, 4, dim), "prefix": cache(2, 2, 7, dim), "suffix": None, "key": None, "value": None,
        "rope": None, "out": None}) for dim in (0, 1, 8, 15, 24, 72, 250, 264, 272, 512)],
    ("heads no multiple", ValueError, "query", {"query": zeros(3, 5, 16), "out": None}),
    ("no heads", ValueError, "query", {"query": zeros(3, 0, 16), "out": None}),
    ("fewer heads", ValueError, "query", {"query": zeros(3, 1, 16), "out": None}),
    ("too many heads", ValueError, "query", {"query": zeros(3, 130, 16), "out": None}),
    # prefix and suffix
    ("neither", ValueError, "prefix, suffix", {"prefix": None, "suffix": None, **NO_KEY, "mask": None}),
    ("prefix tensor", TypeError, "prefix", {"prefix": zeros(*PREFIX)}),
    ("prefix list", TypeError, "prefix", {"prefix": [zeros(*PREFIX)] * 2}),
    ("prefix one", TypeError, "prefix", {"prefix": (zeros(*PREFIX),)}),
    ("prefix four", TypeError, "prefix", {"prefix": (zeros(*PREFIX),) * 4}),
    ("prefix text", TypeError, "prefix", {"prefix": "kv"}),
    ("prefix number", TypeError, "prefix", {"prefix": 3}),
    ("prefix key text", TypeError, "prefix", prefix(key="x")),
    ("prefix key none", WRONG, "prefix", prefix(key=None)),
    ("prefix value none", WRONG, "prefix", prefix(value=None)),
    ("prefix key rank", ValueError, "prefix", prefix(key=zeros(2, 7, 16))),
    ("prefix dtype", TypeError, "prefix", prefix(key=zeros(*PREFIX).half())),
    ("prefix value dtype", TypeError, "prefix", prefix(value=zeros(*PREFIX).bfloat16())),
    ("prefix values of other capacity", ValueError, "prefix", prefix(value=zeros(2, 2, 8, 16))),
    ("prefix values of other slots", ValueError, "prefix", prefix(value=zeros(3, 2, 7, 16))),
    ("prefix head_dim", ValueError, "prefix", prefix(value=zeros(2, 2, 7, 32))),
    ("prefix gaps", ValueError, "prefix", prefix(key=zeros(2, 2, 7, 32)[..., ::2])),
    ("prefix transposed", ValueError, "prefix", prefix(value=zeros(2, 2, 16, 7).mT)),
    ("prefix no key heads", ValueError, "query|prefix", {"prefix": cache(2, 0, 7, 16)}),
    ("kv_heads differ", ValueError, "suffix", {"prefix": cache(2, 4, 7, 16, (5, 4))}),
    ("kv_heads differ the other way", ValueError, "suffix", {"suffix": cache(4, 1, 6, 16, (0, 3, 2, 1))}),
    ("suffix head_dim", ValueError, "suffix", {"suffix": cache(4, 2, 6, 32, (0, 3, 2, 1))}),
    ("suffix dtype", TypeError, "suffix", suffix(value=zeros(*SUFFIX).half())),
    ("suffix key lies in itself", ValueError, "suffix", suffix(key=zeros(1, 2, 6, 16).expand(4, -1, -1, -1))),
    ("suffix value lies in itself", ValueError, "suffix", suffix(value=zeros(4, 1, 6, 16).expand(-1, 2, -1, -1))),
    ("suffix positions overlap", ValueError, "suffix", suffix(
        key=torch.as_strided(zeros(4 * 2 * 6 * 16), SUFFIX, (160, 80, 8, 1)))),
    ("prefix lengths int64", TypeError, "prefix", prefix(lengths=torch.tensor([5, 4]))),
    ("prefix lengths float", TypeError, "prefix", prefix(lengths=torch.tensor([5.0, 4.0]))),
    ("prefix lengths list", TypeError, "prefix", prefix(lengths=[5, 4])),
    ("prefix lengths count", ValueError, "prefix", prefix(lengths=indices((5,)))),
    ("prefix lengths rank", ValueError, "prefix", prefix(lengths=indices((5, 4))[None])),
    ("prefix lengths strided", ValueError, "prefix", prefix(lengths=indices((5, 0, 4, 0))[::2])),
    ("prefix lengths alone", ValueError, "prefix", prefix(key=None, value=None)),
    ("prefix length negative", ValueError, "prefix lengths", prefix(lengths=indices((5, -1)))),
    ("prefix length least", ValueError, "prefix lengths", prefix(lengths=indices((-(2**31), 4)))),
    ("prefix too long", ValueError, "prefix lengths", prefix(lengths=indices((8, 4)))),
    ("prefix far too long", ValueError, "prefix lengths", prefix(lengths=indices((5, 2**31 - 1)))),
    ("suffix full", ValueError, "suffix lengths", suffix(lengths=indices((6, 3, 2, 1)))),
    ("suffix length negative", ValueError, "suffix lengths", suffix(lengths=indices((0, 3, 2, -1)))),
    ("suffix length least", ValueError, "suffix lengths", suffix(lengths=indices((0, 3, -(2**31), 1)))),
    ("suffix length most", ValueError, "suffix lengths", suffix(lengths=indices((0, 3, 2**31 - 1, 1)))),
    ("suffix too long", ValueError, "suffix lengths", {**NO_KEY, **suffix(lengths=indices((7, 3, 2, 1)))}),
    ("suffix no room", ValueError, "suffix lengths", {"suffix": cache(4, 2, 0, 16, (0, 0, 0, 0))}),
    ("suffix without lengths", ValueError, "suffix", suffix(lengths=None)),
    # new keys and values
    ("key alone", ValueError, "key, value", {"value": None}),
    ("value alone", ValueError, "key, value", {"key": None}),
    ("key without suffix", ValueError, "suffix", {"suffix": None}),
    ("key rank", ValueError, "key", {"key": zeros(3, 32)}),
    ("key rows", ValueError, "key", {"key": zeros(2, 2, 16)}),
    ("key heads", ValueError, "key", {"key": zeros(3, 4, 16)}),
    ("key head_dim", ValueError, "key", {"key": zeros(3, 2, 32)}),
    ("key dtype", TypeError, "key", {"key": zeros(3, 2, 16).half()}),
    ("key gaps", ValueError, "key", {"key": zeros(3, 2, 32)[..., ::2]}),
    ("key list", TypeError, "key", {"key": [1.0]}),
    ("value heads", ValueError, "value", {"value": zeros(3, 1, 16)}),
    ("value dtype", TypeError, "value", {"value": zeros(3, 2, 16).bfloat16()}),
    ("value gaps", ValueError, "value", {"value": zeros(3, 2, 32)[..., ::2]}),
    ("value number", TypeError, "value", {"value": 1.0}),
    # indices
    *[(f"pictures {bad}", ValueError, "pictures", {"pictures": indices((0, bad, 1))}) for bad in
      (-2, 2, 2**31 - 1, -(2**31))],
    *[(f"questions {bad}", ValueError, "questions", {"questions": indices((2, bad, 3))}) for bad in
      (-1, -2, 4, 2**31 - 1, -(2**31))],
    ("questions twice", ValueError, "questions", {"questions": indices((2, 0, 2))}),
    ("pictures of no prefixes", ValueError, "pictures", {"prefix": cache(0, 2, 7, 16)}),
    ("prefixes too few", ValueError, "prefix", {"pictures": None}),
    ("suffixes too few", ValueError, "suffix", {"questions": None, "suffix": cache(2, 2, 6, 16, (0, 3))}),
    *[(f"{name} int64", TypeError, name, {name: LONG}) for name in ("pictures", "questions", "positions")],
    *[(f"{name} bool", TypeError, name, {name: LONG.bool()}) for name in ("pictures", "questions", "positions")],
    *[(f"{name} list", TypeError, name, {name: [0, 0, 1]}) for name in ("pictures", "questions", "positions")],
    *[(f"{name} count", ValueError, name, {name: indices((0, 1))}) for name in ("pictures", "questions", "positions")],
    *[(f"{name} rank", ValueError, name, {name: indices((0, 1, 2))[:, None]}) for name in
      ("pictures", "questions", "positions")],
    *[(f"{name} strided", ValueError, name, {name: indices((0, 9, 1, 9, 2, 9))[::2]}) for name in
      ("pictures", "questions", "positions")],
    *[(f"positions {bad}", ValueError, "positions", {"positions": indices((0, bad, 1))}) for bad in
      (-1, TABLE, 2**31 - 1, -(2**31))],
    ("a table too short", ValueError, "positions", rope(cos=zeros(7, HALF), sin=zeros(7, HALF))),
    ("a table of nothing", ValueError, "positions", rope(cos=zeros(0, HALF), sin=zeros(0, HALF))),
    # rope
    ("rope tensor", TypeError, "rope", {"rope": zeros(TABLE, HALF)}),
    ("rope list", TypeError, "rope", {"rope": [zeros(TABLE, HALF), zeros(TABLE, HALF), False]}),
    ("rope number", TypeError, "rope", {"rope": 10000}),
    ("rope one", TypeError, "rope", {"rope": (zeros(TABLE, HALF),)}),
    ("rope four", WRONG, "rope", {"rope": (zeros(TABLE, HALF), zeros(TABLE, HALF), False, 1)}),
    ("rope interleaved text", (*WRONG, RuntimeError), "rope|interleaved", rope(interleaved="x")),
    ("cos alone", WRONG, "rope", rope(sin=None)),
    ("sin alone", WRONG, "rope", rope(cos=None)),
    ("cos rank", ValueError, "cos", rope(cos=zeros(1, TABLE, HALF))),
    ("cos too wide", ValueError, "cos", rope(cos=zeros(TABLE, 9), sin=zeros(TABLE, 9))),
    ("cos whole head", ValueError, "cos", rope(cos=zeros(TABLE, 16), sin=zeros(TABLE, 16))),
    ("cos no angles", ValueError, "cos", rope(cos=zeros(TABLE, 0), sin=zeros(TABLE, 0))),
    ("cos dtype", TypeError, "cos", rope(cos=zeros(TABLE, HALF).half())),
    ("cos strided", ValueError, "cos", rope(cos=zeros(TABLE, 2 * HALF)[:, ::2])),
    ("cos list", TypeError, "rope", rope(cos=[1.0])),
    ("sin dtype", TypeError, "sin", rope(sin=zeros(TABLE, HALF).bfloat16())),
    ("sin positions", ValueError, "sin", rope(sin=zeros(TABLE - 1, HALF))),
    ("sin angles", ValueError, "sin", rope(sin=zeros(TABLE, HALF - 1))),
    ("sin of columns", ValueError, "sin", rope(sin=zeros(HALF, TABLE).T)),
    # mask
    ("mask uint8", TypeError, "mask", {"mask": torch.ones(3, 7, dtype=torch.uint8)}),
    ("mask float", TypeError, "mask", {"mask": torch.ones(3, 7)}),
    ("mask list", TypeError, "mask", {"mask": [[True] * 7] * 3}),
    ("mask rows", ValueError, "mask", {"mask": torch.ones(2, 7, dtype=torch.bool)}),
    ("mask length", ValueError, "mask", {"mask": torch.ones(3, 5, dtype=torch.bool)}),
    ("mask too long", ValueError, "mask", {"mask": torch.ones(3, 8, dtype=torch.bool)}),
    ("mask rank", ValueError, "mask", {"mask": torch.ones(3, 1, 7, dtype=torch.bool)}),
    ("mask gaps", ValueError, "mask", {"mask": torch.ones(3, 14, dtype=torch.bool)[:, ::2]}),
    ("mask expanded", ValueError, "mask", {"mask": torch.ones(3, 1, dtype=torch.bool).expand(3, 7)}),
    ("mask without prefix", ValueError, "mask", {"prefix": None}),
    # scale, out, lse, workspace
    ("scale text", (*WRONG, RuntimeError), "scale", {"scale": "small"}),
    ("scale tensor", (*WRONG, RuntimeError), "scale", {"scale": zeros(2)}),
    ("out rank", ValueError, "out", {"out": zeros(3, 64)}),
    ("out rows", ValueError, "out", {"out": zeros(2, 4, 16)}),
    ("out heads", ValueError, "out", {"out": zeros(3, 2, 16)}),
    ("out head_dim", ValueError, "out", {"out": zeros(3, 4, 32)}),
    ("out dtype", TypeError, "out", {"out": zeros(3, 4, 16).half()}),
    ("out list", TypeError, "out", {"out": [zeros(3, 4, 16)]}),
    ("out gaps", ValueError, "out", {"out": zeros(3, 4, 32)[..., ::2]}),
    ("out of one row", ValueError, "out", {"out": zeros(1, 4, 16).expand(3, 4, 16)}),
    ("out of one head", ValueError, "out", {"out": zeros(3, 1, 16).expand(3, 4, 16)}),
    ("out rows overlap", ValueError, "out", {"out": torch.as_strided(zeros(192), (3, 4, 16), (63, 16, 1))}),
    ("out heads overlap", ValueError, "out", {"out": torch.as_strided(zeros(192), (3, 4, 16), (64, 15, 1))}),
    ("out rows between heads", ValueError, "out", {"out": torch.as_strided(zeros(192), (3, 4, 16), (24, 16, 1))}),
    ("lse rank", ValueError, "lse", {"lse": zeros(12)}),
    ("lse shape", ValueError, "lse", {"lse": zeros(4, 3)}),
    ("lse dtype", TypeError, "lse", {"lse": zeros(3, 4).half()}),
    ("lse float64", TypeError, "lse", {"lse": zeros(3, 4).double()}),
    ("lse strided", ValueError, "lse", {"lse": zeros(3, 8)[:, ::2]}),
    ("lse transposed", ValueError, "lse", {"lse": zeros(4, 3).T}),
    ("lse text", TypeError, "lse", {"lse": "x"}),
    ("workspace list", TypeError, "workspace", {"workspace": [zeros(1), zeros(1)]}),
    ("workspace text", TypeError, "workspace", {"workspace": (zeros(1), "x")}),
    ("workspace three", WRONG, "workspace", {"workspace": (zeros(1),) * 3}),
]  # fmt: skip


def changed_everywhere(change: Any, only_floats: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """For every tensor the right arguments with it changed, by its name."""
    made = []
    for name, value in good().items():
        if isinstance(value, tuple):
            for index, one in enumerate(value):
                if isinstance(one, Tensor) and (one.is_floating_point() or not only_floats):
                    parts = [*value]
                    parts[index] = change(one)
                    made.append((name, {name: type(value)(*parts)}))
        elif isinstance(value, Tensor) and (value.is_floating_point() or not only_floats):
            made.append((name, {name: change(value)}))
    return made


BAD_CALLS += [
    *[(f"{name} {index} gradients", ValueError, name, change) for index, (name, change) in
      enumerate(changed_everywhere(lambda one: one.clone().requires_grad_(), only_floats=True))],
    *[(f"{name} {index} negative", ValueError, name, change) for index, (name, change) in
      enumerate(changed_everywhere(torch._neg_view, only_floats=True))],
    *[(f"{name} {index} meta", WRONG, name, change) for index, (name, change) in
      enumerate(changed_everywhere(lambda one: one.to("meta")))],
    *[(f"{name} {index} sparse", WRONG, name, change) for index, (name, change) in
      enumerate(changed_everywhere(Tensor.to_sparse))],
    *[(f"{name} {index} array", TypeError, name, change) for index, (name, change) in
      enumerate(changed_everywhere(Tensor.numpy))],
]  # fmt: skip


@pytest.fixture
def short_tensors() -> Iterator[None]:
    """pybind11 prints every argument of a call whose types do not match."""
    torch.set_printoptions(threshold=1, edgeitems=1)
    yield
    torch.set_printoptions(profile="default")


@pytest.mark.parametrize(("error", "message", "changes"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS])
def test_bad_call(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    arguments = good() | changes
    before = {name: one.detach().clone() for name, one in tensors(arguments).items()}
    query = arguments.pop("query")
    with pytest.raises(error, match=message):
        attention(query, **arguments)
    for name, one in tensors({"query": query} | arguments).items():
        assert torch.equal(one.detach(), before[name]), f"{name} was written"


def test_the_good_call_is_good() -> None:
    """What the bad calls change one thing of."""
    arguments = good()
    query, out = arguments.pop("query"), arguments["out"]
    assert attention(query, **arguments) is out
    assert out.all() and arguments["lse"].all()
    run(raw_of(good()))


def test_a_pair_of_tables_is_a_rope() -> None:
    """As for keys and values, what is left out of the tuple takes its default."""
    with_pair, with_rope = good(), good()
    with_pair["rope"] = tuple(with_pair["rope"][:2])
    made, expected = (attention(one.pop("query"), **one) for one in (with_pair, with_rope))
    assert torch.equal(made, expected)


def test_edges_that_are_right() -> None:
    """The last of everything, and what is allowed though there is nothing in it."""
    arguments = good()
    query = arguments.pop("query")
    for changes in (
        {"positions": indices((0, TABLE - 1, 1))},
        prefix(lengths=indices((7, 0))),
        suffix(lengths=indices((5, 0, 5, 5))),
        {"pictures": indices((-1, -1, -1)), "prefix": cache(1, 2, 0, 16), "mask": None},
        {"scale": 0}, {"scale": 1}, {"scale": torch.tensor(0.5)}, {"lse": None}, {"out": None},
        rope(cos=zeros(TABLE, 1), sin=zeros(TABLE, 1)),
        {"pictures": None, "prefix": cache(3, 2, 7, 16)},
        {"questions": None},
    ):  # fmt: skip
        out = attention(query, **arguments | changes)
        assert out.isfinite().all()


def test_nothing_is_appended_when_a_later_row_is_bad() -> None:
    """All rows are looked at before the first is computed."""
    arguments = good()
    arguments["questions"] = indices((2, 0, 4))
    before = [bits(one).clone() for one in (*arguments["suffix"], arguments["out"], arguments["lse"]) if one.dim() > 1]
    with pytest.raises(ValueError, match="questions"):
        attention(arguments.pop("query"), **arguments)
    after = [bits(one) for one in (*arguments["suffix"], arguments["out"], arguments["lse"]) if one.dim() > 1]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


APPEND_TO_NOTHING = """
import importlib.machinery, importlib.util
import numpy as np
loader = importlib.machinery.ExtensionFileLoader("_C", {path!r})
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(module)
one, none, lengths = np.zeros((1, 2, 16), np.float32), np.zeros((9, 2, 6, 16), np.float32)[9:], np.zeros(0, np.int32)
given = dict.fromkeys({names!r})
given |= dict(suffix_key=none, suffix_value=none, suffix_lengths=lengths, key=one, value=one, out=one.copy())
for question in (0, -1, 2**31 - 1):
    try:
        questions = np.array([question], np.int32)
        module.attention(one, **given | dict(questions=questions, scale=1.0, interleaved=False, threads=1))
    except ValueError as error:
        assert "questions" in str(error), error
    else:
        raise AssertionError(f"accepted question {{question}} of none")
print("refused")
"""


def test_there_is_no_question_to_append_to() -> None:
    """In a process of its own: it wrote in front of the memory of no suffixes."""
    names = [name for name in raw_of(good()) if name != "query"]
    code = APPEND_TO_NOTHING.format(path=extension().__file__, names=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout == "refused\n", f"exit status {done.returncode}\n{done.stderr}"


# --- the compiled function itself, past the wrapper's checks ----------------------------------------------------------
def raw_of(arguments: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in arguments.items() if name != "query"}
    return {"query": arguments["query"]} | flat(arguments["query"], **rest) | {"threads": 1}


def run(given: dict[str, Any]) -> None:
    rest = {name: value for name, value in given.items() if name != "query"}
    extension().attention(given["query"], **rest)


RAW = raw_of(good())
RAW_TENSORS = [name for name, value in RAW.items() if isinstance(value, Tensor)]
RAW_CALLS: list[tuple[str, Any, str, dict[str, Any]]] = [
    *[(f"{name} text", TypeError, name.split("_")[0], {name: "x"}) for name in RAW_TENSORS],
    *[(f"{name} fake", ValueError, name.split("_")[0], {name: fake(RAW[name])}) for name in RAW_TENSORS],
    *[(f"{name} none", WRONG, name, {name: None}) for name in ("query", "out")],
    ("isa", ValueError, "isa", {"isa": "mmx"}),
    ("no isa", ValueError, "isa", {"isa": ""}),
    *[(f"threads {count}", ValueError, "threads", {"threads": count}) for count in (0, -1, 1025, 2**40)],
    ("threads text", TypeError, "threads", {"threads": "x"}),
    ("threads huge", TypeError, "threads", {"threads": 2**70}),
    ("scale none", TypeError, "scale", {"scale": None}),
    ("mask bool", TypeError, "mask", {"mask": RAW["mask"].bool()}),
    ("out reversed", ValueError, "out", {"out": zeros(3, 4, 16).numpy()[::-1]}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), [c[1:] for c in RAW_CALLS], ids=[c[0] for c in RAW_CALLS])
@pytest.mark.usefixtures("short_tensors")
def test_bad_raw_call(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        run(raw_of(good()) | changes)


# --- drawn calls ------------------------------------------------------------------------------------------------------
WRITTEN = ("out", "lse", "suffix_key", "suffix_value")
NUMBERS = [-2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 2**20, 2**31 - 1, -(2**31)]


def variants(one: Tensor, raw: bool) -> list[Any]:
    """What a call may be given for a tensor, right and mostly wrong."""
    ways: list[Any] = [
        lambda: one[1:], lambda: one[:0], lambda: one[:1], lambda: one[..., :1], lambda: one[None], lambda: one.mT,
        lambda: one.flatten(), lambda: one.double(), lambda: one.half(), lambda: one.bfloat16(), lambda: one.long(),
        lambda: one.int(), lambda: one[::2], lambda: one[..., ::2], lambda: one.expand(3, *one.shape),
        lambda: one[:1].expand(one.shape), lambda: one[:, :1].expand(one.shape), lambda: one[:, :, :-1],
        lambda: one[:, 1:], lambda: torch.cat([one, one]), lambda: torch.cat([one, one], -1), lambda: None, lambda: 3,
        lambda: "x", lambda: [one], lambda: one, lambda: one, lambda: one.flip(0), lambda: one.clone().requires_grad_(),
        lambda: one.transpose(0, 1), lambda: one.transpose(1, 2).contiguous().transpose(1, 2),
        lambda: torch.as_strided(one, one.shape, (*one.stride()[:-2], 1, 1)),
    ]  # fmt: skip
    if raw:
        ways += [lambda: fake(one), lambda: fake(one)[1:], lambda: one.numpy(), lambda: one.to("meta")]
    if one.dtype == torch.int32:
        ways += [lambda index=index: torch.full_like(one, index) for index in NUMBERS]
        ways += [lambda step=step: indices(range(step, step + len(one))) for step in (-1, 0, 1, 2)]
    made = []
    for way in ways:
        with contextlib.suppress(TypeError, ValueError, RuntimeError, IndexError):
            made.append(way())
    return made


def grouped(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `ops.attention` from flat ones."""
    rest = {name: value for name, value in given.items() if name not in ("isa", "threads", "partial", "arrived")}
    for name in ("prefix", "suffix"):
        parts = [rest.pop(f"{name}_{part}") for part in ("key", "value", "lengths")]
        rest[name] = None if all(part is None for part in parts) else KeyValues(*parts)
    cos, sin, interleaved = rest.pop("cos"), rest.pop("sin"), rest.pop("interleaved")
    return rest | {"rope": None if cos is None and sin is None else Rope(cos, sin, interleaved)}


def as_tensors(given: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.as_tensor(one).detach() if hasattr(one, "__dlpack__") else one for name, one in given.items()}


def judged(given: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What an accepted call has written, what plain torch gives and what the formula. Its suffix holds new keys by now;
    the formula takes those of before, and the new ones from `key`."""
    arguments = grouped(as_tensors(given))
    out, lse, query = arguments.pop("out"), arguments.pop("lse"), arguments.pop("query")
    if out is None or not query.numel():
        return []
    plain, exact = (reference(query, **arguments, dtype=dtype) for dtype in (query.dtype, torch.float64))
    some = exact.lse > -math.inf
    assert not out[~some].any(), "a row of nothing gives zeros"
    assert lse is None or torch.equal(lse > -math.inf, some), "which rows attend to nothing"
    pairs = [(out, plain.out, exact.out)] + ([] if lse is None else [(lse, plain.lse, exact.lse)])
    return [tuple(one[some].flatten() for one in pair) for pair in pairs]  # type: ignore[misc]


@pytest.mark.usefixtures("short_tensors")
@pytest.mark.parametrize("raw", [False, True], ids=["op", "raw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drawn_calls_are_answered_or_refused(dtype: torch.dtype, raw: bool) -> None:
    """Thousands of calls with one to four arguments changed: the right answer or a Python exception, never a crash, and
    no write to what is only read."""
    draw_from = random.Random(0)
    start = raw_of(good(dtype))
    if not raw:
        start["mask"] = start["mask"].bool()
    read = {name: one.clone() for name, one in start.items() if isinstance(one, Tensor) and name not in WRITTEN}
    start |= read
    pool = {name: variants(one, raw) for name, one in start.items() if isinstance(one, Tensor)}
    kept = {name: bits_of_any(one) for name, one in read.items()}
    numbers: dict[str, list[Any]] = {
        "interleaved": [True, False] if raw else [True, False, "x"],
        "scale": [0.0, -0.3, 1] if raw else [0.0, -0.3, 1, "x"],
        "isa": [*extension().isas(), "mmx"] if raw else [None],
        "threads": [1, 2, 3, 0, -1, 2**20] if raw else [1],
    }
    accepted, refused = 0, 0
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(500):
        given = dict(start)
        for name in draw_from.sample(list(start), draw_from.choice([0, 1, 1, 1, 2, 4])):
            if name in numbers:
                given[name] = draw_from.choice(numbers[name])
            elif name in pool:
                mixed = name not in WRITTEN and draw_from.random() < 0.2
                own = draw_from.choice([one for one in pool if one not in WRITTEN]) if mixed else name
                given[name] = draw_from.choice(pool[own])
        try:
            if raw:
                run(given)
            else:
                arguments = grouped(given)
                attention(arguments.pop("query"), **arguments)
        except (TypeError, ValueError):
            refused += 1
        except RuntimeError as error:  # torch's own, of numbers that are none
            assert not raw and any(given[name] == "x" for name in ("scale", "interleaved")), error
            refused += 1
        else:
            accepted += 1
            results += judged(given)
    print(f"tried {accepted + refused}, accepted {accepted}, refused {refused}")
    assert accepted > 80
    assert refused > 200
    for kind in {pair[0].dtype for pair in results}:
        ours, plain, exact = zip(*(one for one in results if one[0].dtype == kind), strict=True)
        assert_close(torch.cat(ours), torch.cat(plain), torch.cat(exact), f"{kind}")
    assert all(torch.equal(bits_of_any(one), kept[name]) for name, one in read.items()), "what is read was written"


def bits_of_any(one: Tensor) -> Tensor:
    return one.contiguous().view(torch.uint8).clone()


@pytest.mark.skipif(build_info()["cuda"] is not None, reason="this build has CUDA kernels")
@pytest.mark.gpu
def test_cuda_tensors_need_a_cuda_build() -> None:
    query = torch.zeros(1, 2, 16, device="cuda")
    with pytest.raises(RuntimeError, match="built without CUDA"):
        attention(query, prefix=KeyValues(*torch.zeros(2, 1, 2, 3, 16, device="cuda")))
