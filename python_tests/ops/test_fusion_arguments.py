"""Wrong arguments to the room fusion: a TypeError or ValueError that names the argument, nothing written, no crash."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from close import Guarded
from fusion_arguments import (
    BACKWARD,
    COARSE,
    FINE,
    FORWARD,
    GOOD,
    LAYER_NORM,
    NORM,
    OUT,
    ROWS,
    fake,
    negative,
    run,
    vectors,
    zeros,
)
from torch import Tensor

from sphinx_fast.ops import build_info, fusion, layer_norm


def call(**changes: Any) -> Any:
    """`ops.fusion` with something changed in it."""
    arguments: dict[str, Any] = {"features": GOOD.features, "patch": GOOD.patch, **GOOD.arguments()} | changes
    return fusion(arguments.pop("features"), arguments.pop("patch"), **arguments)


def patch(**changes: Any) -> Any:
    return call(patch=GOOD.patch._replace(**changes))


def norm(x: Any = ROWS, weight: Any = NORM, bias: Any = NORM, eps: Any = 1e-5, out: Any = None) -> Any:
    return layer_norm(x, weight, bias, eps, out)


# --- the compiled functions themselves, past the wrappers' checks ---------------------------------------------------
def raw(**changes: Any) -> None:
    run("fusion", FORWARD | changes)


def back(**changes: Any) -> None:
    run("fusion_backward", BACKWARD | changes)


def raw_norm(**changes: Any) -> None:
    run("layer_norm", LAYER_NORM | changes)


class Tensors:
    """A sequence whose tensors die as soon as they are handed out."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        return zeros(12)


TENSORS = [name for name, value in BACKWARD.items() if isinstance(value, Tensor)]
BAD_CALLS: list[tuple[str, Any, str, Any]] = [
    # ops.fusion
    ("no features", ValueError, "features", lambda: call(features=[])),
    ("one tensor", TypeError, "features", lambda: call(features=FINE)),
    ("features none", TypeError, "features", lambda: call(features=None)),
    ("feature none", TypeError, "features", lambda: call(features=[FINE, None])),
    ("feature array", TypeError, "features", lambda: call(features=[FINE.numpy(), COARSE])),
    ("feature rank", ValueError, r"features\[1\]", lambda: call(features=[FINE, COARSE[0]])),
    ("feature scalar", ValueError, r"features\[0\]", lambda: call(features=[torch.tensor(1.0)])),
    ("feature views", ValueError, r"features\[1\]", lambda: call(features=[FINE, COARSE[:1]])),
    ("feature no rows", ValueError, r"features\[0\]", lambda: call(features=[FINE[:, :0], COARSE])),
    ("feature no channels", ValueError, r"features\[0\]", lambda: call(features=[FINE[..., :0], COARSE])),
    ("feature class row only", ValueError, r"features\[1\]", lambda: call(features=[FINE, COARSE[:, :1]])),
    ("feature no square", ValueError, r"features\[0\]", lambda: call(features=[FINE[:, :16], COARSE])),
    ("feature does not divide", ValueError, r"features\[1\]", lambda: call(features=[FINE, zeros(2, 10, 3)])),
    ("three sides", ValueError, r"features\[1\]", lambda: call(features=[FINE, COARSE, zeros(2, 2, 1)])),
    ("feature float64", TypeError, r"features\[0\]", lambda: call(features=[FINE.double(), COARSE.double()])),
    ("feature int", TypeError, r"features\[0\]", lambda: call(features=[FINE.int(), COARSE])),
    ("feature complex", TypeError, r"features\[0\]", lambda: call(features=[FINE.to(torch.complex64)])),
    ("feature mixed", TypeError, r"features\[1\]", lambda: call(features=[FINE, COARSE.half()])),
    ("feature meta", ValueError, r"features\[1\]", lambda: call(features=[FINE, COARSE.to("meta")])),
    ("feature negative", ValueError, r"features\[0\]", lambda: call(features=[negative(FINE), COARSE])),
    ("feature sparse", ValueError, r"features\[0\]", lambda: call(features=[FINE.to_sparse(), COARSE])),
    ("patch none", TypeError, "patch", lambda: call(patch=None)),
    ("patch short", ValueError, "patch", lambda: call(patch=GOOD.patch[:3])),
    ("patch long", ValueError, "patch", lambda: call(patch=[*GOOD.patch, NORM])),
    ("patch text", TypeError, "patch", lambda: call(patch="abcd")),
    ("weight none", TypeError, "patch", lambda: patch(weight=None)),
    ("weight rank", ValueError, "patch.weight", lambda: patch(weight=GOOD.patch.bias)),
    ("weight transposed", ValueError, "patch.weight", lambda: patch(weight=GOOD.patch.weight.T)),
    ("weight channels", ValueError, "patch.weight", lambda: patch(weight=GOOD.patch.weight[:, 1:])),
    ("weight no rows", ValueError, "patch.weight", lambda: patch(weight=GOOD.patch.weight[:0])),
    ("weight dtype", TypeError, "patch.weight", lambda: patch(weight=GOOD.patch.weight.bfloat16())),
    ("bias shape", ValueError, "patch.bias", lambda: patch(bias=GOOD.patch.bias[1:])),
    ("bias strided", ValueError, "patch", lambda: patch(bias=zeros(24)[::2])),
    ("bias negative", ValueError, "patch.bias", lambda: patch(bias=negative(GOOD.patch.bias))),
    ("norm weight meta", ValueError, "patch.norm_weight", lambda: patch(norm_weight=zeros(12).to("meta"))),
    ("norm bias rank", ValueError, "patch.norm_bias", lambda: patch(norm_bias=zeros(1, 12))),
    ("queries alone", ValueError, "query", lambda: call(query=None)),
    ("query alone", ValueError, "queries", lambda: call(queries=None)),
    ("queries rank", ValueError, "queries", lambda: call(queries=GOOD.queries[0])),  # type: ignore[index]
    ("queries views", ValueError, "queries", lambda: call(queries=zeros(3, 2, 11))),
    ("queries none of", ValueError, "queries", lambda: call(queries=zeros(2, 0, 11))),
    ("queries channels", ValueError, "query.weight", lambda: call(queries=zeros(2, 2, 10))),
    ("queries dtype", TypeError, "queries", lambda: call(queries=GOOD.queries.half())),  # type: ignore[union-attr]
    ("queries list", TypeError, "queries", lambda: call(queries=[[1.0]])),
    ("query short", ValueError, "query", lambda: call(query=GOOD.patch[:2])),
    ("query bias", ValueError, "query.bias", lambda: call(query=GOOD.query._replace(bias=zeros(11)))),  # type: ignore[union-attr]
    ("tags one", ValueError, "tags", lambda: call(tags=(zeros(12),))),
    ("tags three", ValueError, "tags", lambda: call(tags=[zeros(12)] * 3)),
    ("tags tensor", TypeError, "tags", lambda: call(tags=zeros(2, 12))),
    ("tags none", TypeError, "tags", lambda: call(tags=(None, None))),
    ("tag width", ValueError, r"tags\[1\]", lambda: call(tags=(zeros(12), zeros(13)))),
    ("tag dtype", TypeError, r"tags\[0\]", lambda: call(tags=(zeros(12).half(), zeros(12)))),
    ("eps text", RuntimeError, "eps", lambda: call(eps="small")),
    ("out rank", ValueError, "out", lambda: call(out=OUT.view(2, 21, 12))),
    ("out rows", ValueError, "out", lambda: call(out=OUT[1:])),
    ("out width", ValueError, "out", lambda: call(out=OUT[:, 1:])),
    ("out dtype", TypeError, "out", lambda: call(out=OUT.half())),
    ("out list", TypeError, "out", lambda: call(out=[OUT])),
    ("out gaps", ValueError, "out", lambda: call(out=zeros(42, 24)[:, ::2])),
    ("out overlaps", ValueError, "out", lambda: call(out=zeros(12).expand(42, 12))),
    ("out overlaps by one", ValueError, "out", lambda: call(out=torch.as_strided(OUT, (42, 12), (11, 1)))),
    ("out columns first", ValueError, "out", lambda: call(out=zeros(12, 42).T)),
    ("out meta", ValueError, "out", lambda: call(out=OUT.to("meta"))),
    ("out grad", ValueError, "requires_grad", lambda: call(out=OUT.clone().requires_grad_())),
    ("out negative", ValueError, "out", lambda: call(out=negative(OUT))),
    ("out and gradients", ValueError, "out", lambda: call(out=OUT, tags=(zeros(12).requires_grad_(), zeros(12)))),
    ("first alone", ValueError, "first", lambda: call(first=torch.tensor([0, 21]))),
    ("first alone, gradients", ValueError, "first", lambda: call(
        first=torch.tensor([0, 21]), tags=(zeros(12).requires_grad_(), zeros(12)))),
    ("first list", TypeError, "first", lambda: call(out=OUT, first=[0, 21])),
    ("first int32", TypeError, "first", lambda: call(out=OUT, first=torch.tensor([0, 21], dtype=torch.int32))),
    ("first count", ValueError, "first", lambda: call(out=OUT, first=torch.tensor([0]))),
    ("first rank", ValueError, "first", lambda: call(out=OUT, first=torch.tensor([[0, 21]]))),
    ("first strided", ValueError, "first", lambda: call(out=OUT, first=torch.tensor([0, 5, 21, 5])[::2])),
    ("first negative row", ValueError, "first", lambda: call(out=OUT, first=torch.tensor([-1, 21]))),
    ("first past the end", ValueError, "first", lambda: call(out=OUT, first=torch.tensor([0, 22]))),
    ("first overlaps", ValueError, "first", lambda: call(out=OUT, first=torch.tensor([0, 20]))),
    ("first descends", ValueError, "first", lambda: call(out=OUT, first=torch.tensor([21, 0]))),
    ("first huge", ValueError, "first", lambda: call(out=OUT, first=torch.tensor([0, 2**63 - 1]))),
    ("first least", ValueError, "first", lambda: call(out=OUT, first=torch.tensor([-(2**63), 0]))),
    # ops.layer_norm
    ("x list", TypeError, "x", lambda: norm([1.0])),
    ("x scalar", ValueError, "x", lambda: norm(torch.tensor(1.0))),
    ("x float64", TypeError, "out: .*float64", lambda: norm(ROWS.double(), NORM.double(), NORM.double())),
    ("x gaps", ValueError, "x", lambda: norm(zeros(3, 16)[:, ::2])),
    ("x negative", ValueError, "x", lambda: norm(negative(ROWS))),
    ("norm weight none", TypeError, "weight", lambda: norm(weight=None)),
    ("norm weight extent", ValueError, "weight", lambda: norm(weight=NORM[1:])),
    ("norm bias dtype", TypeError, "bias", lambda: norm(bias=NORM.half())),
    ("norm bias strided", ValueError, "bias", lambda: norm(bias=zeros(16)[::2])),
    ("norm out shape", ValueError, "out", lambda: norm(out=ROWS[1:])),
    ("norm out rank", ValueError, "out", lambda: norm(out=ROWS[None])),
    ("norm out dtype", TypeError, "x: .*float16", lambda: norm(out=ROWS.half())),
    ("norm out overlaps", ValueError, "out", lambda: norm(out=zeros(8).expand(3, 8))),
    ("norm out gaps", ValueError, "out", lambda: norm(out=zeros(3, 16)[:, ::2])),
    ("norm out three strides", ValueError, "out", lambda: norm(zeros(2, 2, 2, 8), out=zeros(3, 3, 3, 8)[1:, 1:, 1:])),
    ("norm out grad", ValueError, "out", lambda: norm(out=zeros(3, 8).requires_grad_())),
    ("norm out negative", ValueError, "out", lambda: norm(out=negative(zeros(3, 8)))),
    # the compiled functions
    *[(f"raw {name} text", TypeError, name, lambda name=name: raw(**{name: "x"})) for name in
      ("fine", "coarse", "queries", "out", "patch", "query", "start", "end", "first", "kept", "stats")],
    *[(f"raw {name} fake", ValueError, name, lambda name=name: raw(**{name: fake(FORWARD[name])})) for name in
      ("fine", "coarse", "queries", "out", "start", "end", "first", "kept", "stats")],
    *[(f"raw {name} dtype", TypeError, name, lambda name=name: raw(**{name: FORWARD[name].double()})) for name in
      ("fine", "coarse", "queries", "out", "start", "end", "first", "kept", "stats")],
    *[(f"raw {name} extent", ValueError, name, lambda name=name: raw(**{name: FORWARD[name][1:]})) for name in
      ("coarse", "queries", "start", "end", "first", "kept", "stats")],
    *[(f"raw {name} {value}", ValueError, name, lambda name=name, value=value: raw(**{name: value})) for name in
      ("views", "grid", "repeat", "threads") for value in (-1, 2**31, 2**63 - 1, -(2**63))],
    *[(f"raw {name} 0", ValueError, name, lambda name=name: raw(**{name: 0})) for name in
      ("grid", "repeat", "threads")],
    ("raw views 0", ValueError, "fine", lambda: raw(views=0)),
    ("raw query_count", ValueError, "queries", lambda: raw(query_count=0)),
    ("raw queries missing", ValueError, "queries", lambda: raw(queries=None)),
    ("raw grid", ValueError, "grid", lambda: raw(grid=4097)),
    ("raw repeat", ValueError, "repeat", lambda: raw(repeat=3)),
    ("raw repeat alone", ValueError, "repeat", lambda: raw(coarse=None)),
    ("raw products", ValueError, "views", lambda: raw(views=2**20, grid=4096, out=zeros(0, 2**20))),
    ("raw number", TypeError, "views", lambda: raw(views=2**70)),
    ("raw no sums", ValueError, "fine", lambda: raw(fine=None, coarse=None, repeat=1)),
    ("raw sums differ", TypeError, "coarse", lambda: raw(coarse=zeros(10, 12).half())),
    ("raw sums of another kind", TypeError, "fine", lambda: raw(fine=zeros(34, 12).bfloat16())),
    ("raw sums rank", ValueError, "fine", lambda: raw(fine=zeros(34 * 12))),
    ("raw sums strided", ValueError, "fine", lambda: raw(fine=zeros(34, 24)[:, ::2])),
    ("raw fine missing", ValueError, "coarse", lambda: raw(fine=None, coarse=zeros(11, 12))),
    ("raw no columns", ValueError, "column", lambda: raw(fine=zeros(34, 0), coarse=zeros(10, 0), queries=zeros(4, 0))),
    ("raw column", ValueError, "column", lambda: raw(column=1)),
    ("raw column negative", ValueError, "column", lambda: raw(column=-1)),
    ("raw column huge", ValueError, "column", lambda: raw(column=2**63 - 1)),
    ("raw columns differ", ValueError, "coarse", lambda: raw(fine=zeros(34, 5), queries=zeros(4, 5))),
    ("raw too many columns", ValueError, "column", lambda: raw(fine=zeros(34, 13))),
    ("raw patch none", ValueError, "patch", lambda: raw(patch=None)),
    ("raw patch short", ValueError, "patch", lambda: raw(patch=vectors(2))),
    ("raw patch long", ValueError, "patch", lambda: raw(patch=vectors(4))),
    ("raw patch tensor", TypeError, "patch", lambda: raw(patch=zeros(3, 12))),
    ("raw patch fleeting", TypeError, "patch", lambda: raw(patch=Tensors())),
    ("raw patch with none", ValueError, "patch", lambda: raw(patch=[zeros(12), None, zeros(12)])),
    ("raw patch extent", ValueError, "patch", lambda: raw(patch=[zeros(12), zeros(12), zeros(11)])),
    ("raw query none", ValueError, "query", lambda: raw(query=None)),
    ("raw one tag", ValueError, "start", lambda: raw(end=None)),
    ("raw first", ValueError, "first", lambda: raw(first=torch.tensor([0, 20]))),
    ("raw no first", ValueError, "out", lambda: raw(first=None, out=zeros(43, 12))),
    ("raw out reversed", ValueError, "strides", lambda: raw(out=np.zeros((42, 12), np.float32)[::-1])),
    ("raw out narrow overlaps", ValueError, "out", lambda: raw(**thin(zeros(1).expand(42, 1)))),
    ("raw isa", ValueError, "isa", lambda: raw(isa="mmx")),
    ("raw threads", ValueError, "threads", lambda: raw(threads=2**20)),
    *[(f"backward {name} text", TypeError, name, lambda name=name: back(**{name: "x"})) for name in
      TENSORS],
    *[(f"backward {name} fake", ValueError, name, lambda name=name: back(**{name: fake(BACKWARD[name])})) for name in
      TENSORS],
    *[(f"backward {name} extent", ValueError, name, lambda name=name: back(**{name: BACKWARD[name][1:]})) for name in
      ("kept", "stats", "patch_weight", "query_weight", "fine", "coarse", "queries", "query_sums")],
    *[(f"backward {name} dtype", TypeError, name, lambda name=name: back(**{name: BACKWARD[name].double()})) for name in
      TENSORS],
    *[(f"backward {name} none", ValueError, name, lambda name=name: back(**{name: None})) for name in
      ("kept", "stats", "patch_weight", "query_weight", "patch_sums", "query_sums")],
    ("backward grad strided", ValueError, "grad", lambda: back(grad=zeros(2, 21, 24)[..., ::2])),
    ("backward grad rank", ValueError, "grad", lambda: back(grad=zeros(42, 12))),
    ("backward grad tokens", ValueError, "grad", lambda: back(tags=False)),
    ("backward no chunks", ValueError, "patch_sums", lambda: back(patch_sums=zeros(0, 3, 12))),
    ("backward sums scalar", ValueError, "patch_sums", lambda: back(patch_sums=torch.tensor(1.0))),
    ("backward repeat", ValueError, "repeat", lambda: back(coarse=None)),
    ("backward grid", ValueError, "grid", lambda: back(grid=2**40)),
    ("backward queries", ValueError, "queries", lambda: back(query_count=-1)),
    *[(f"norm {name} text", TypeError, name, lambda name=name: raw_norm(**{name: "x"})) for name in LAYER_NORM
      if name not in ("isa", "threads")],
    *[(f"norm {name} none", (TypeError, ValueError), name, lambda name=name: raw_norm(**{name: None})) for name in
      ("x", "weight", "bias", "out")],
    *[(f"norm {name} fake", ValueError, name, lambda name=name: raw_norm(**{name: fake(LAYER_NORM[name])})) for name in
      ("x", "weight", "bias", "out")],
    ("norm x shape", ValueError, "x", lambda: raw_norm(x=zeros(2, 4, 8))),
    ("norm rank", ValueError, "out", lambda: raw_norm(out=zeros(10, 8))),
    ("norm groups overlap", ValueError, "out", lambda: raw_norm(out=torch.as_strided(OUT, (2, 5, 8), (39, 8, 1)))),
    ("norm rows overlap", ValueError, "out", lambda: raw_norm(out=torch.as_strided(OUT, (2, 5, 8), (80, 7, 1)))),
    ("norm one value overlaps", ValueError, "out", lambda: raw_norm(
        x=zeros(1, 5, 1), weight=zeros(1), bias=zeros(1), out=zeros(1, 1, 1).expand(1, 5, 1))),
    ("norm threads", ValueError, "threads", lambda: raw_norm(threads=0)),
    ("norm isa", ValueError, "isa", lambda: raw_norm(isa="")),
]  # fmt: skip


def thin(out: Tensor) -> dict[str, Any]:
    """The arguments of the compiled forward for a model width of one."""
    names = ("fine", "coarse", "queries")
    of_one = {name: FORWARD[name][:, :1].contiguous() for name in names} | {"start": zeros(1), "end": zeros(1)}
    return of_one | {"patch": [zeros(1)] * 3, "query": [zeros(1)] * 3, "kept": None, "stats": None, "out": out}


@pytest.mark.parametrize(("error", "message", "bad"), [case[1:] for case in BAD_CALLS], ids=[c[0] for c in BAD_CALLS])
@pytest.mark.usefixtures("short_tensors")
def test_bad_call(error: type[Exception], message: str, bad: Any) -> None:
    with pytest.raises(error, match=message):
        bad()


@pytest.mark.usefixtures("short_tensors")
def test_the_good_calls_are_good() -> None:
    """What the bad calls change one thing of."""
    assert call().shape == (2, 21, 12)
    assert call(out=OUT, first=torch.tensor([0, 21])) is OUT
    assert norm().shape == (3, 8)
    raw()
    raw(**thin(zeros(42, 1)))
    back()
    raw_norm()


def test_nothing_is_written_when_an_argument_is_bad() -> None:
    output = Guarded((42, 12), torch.float32, fill=7.0)
    for bad in ({"first": torch.tensor([0, 20])}, {"stats": zeros(2, 19, 3)}, {"end": zeros(13)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            raw(**bad, out=output.tensor)  # type: ignore[arg-type]
    assert (output.check() == 7.0).all()


@pytest.fixture
def short_tensors() -> Iterator[None]:
    """pybind11 prints every argument of a call whose types do not match."""
    torch.set_printoptions(threshold=1, edgeitems=1)
    yield
    torch.set_printoptions(profile="default")


NUMBERS = [*range(-1, 9), 16, 19, 21, 2**12, 2**20, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), None, "x"]


def variants(one: Tensor) -> list[Any]:
    """What a call may be given for a tensor, right and mostly wrong."""
    ways: list[Any] = [
        lambda: one[1:], lambda: one[:0], lambda: one[..., :1], lambda: one[None], lambda: one.mT,
        lambda: one.flatten(), lambda: one.double(), lambda: one.half(), lambda: one.bfloat16(), lambda: one.long(),
        lambda: one[::2], lambda: one[..., ::2], lambda: one.expand(3, *one.shape), lambda: one[:1].expand(one.shape),
        lambda: fake(one), lambda: fake(one)[1:], lambda: one.to("meta"), lambda: one.to_sparse(),
        lambda: one.clone().requires_grad_(), lambda: one.numpy(), lambda: None, lambda: 3, lambda: "x",
        lambda: [one], lambda: one, lambda: one.flip(0), lambda: torch.full_like(one, 2**40),
    ]  # fmt: skip
    made = []
    for way in ways:
        with contextlib.suppress(TypeError, ValueError, RuntimeError, IndexError):
            made.append(way())
    return made


def changed(draw: random.Random, value: Any, pool: list[list[Any]]) -> Any:
    """Something that came from `value`, or from a pool of variants of tensors, but is seldom right."""
    if isinstance(value, Tensor):
        return draw.choice(draw.choice(pool))
    if isinstance(value, list):
        one = draw.choice(draw.choice(pool))
        return draw.choice([value[:2], value * 2, [*value[:2], one], [one, *value[1:]], None, tuple(value)])
    return draw.choice(NUMBERS)


@pytest.mark.usefixtures("short_tensors")
@pytest.mark.parametrize(("name", "good", "written", "count"), [
    ("fusion", FORWARD, ("out", "kept", "stats"), 5000),
    ("fusion_backward", BACKWARD, ("fine", "coarse", "queries", "patch_sums", "query_sums"), 3000),
    ("layer_norm", LAYER_NORM, ("out",), 2000),
])  # fmt: skip
def test_drawn_calls_are_answered_or_refused(
    name: str, good: dict[str, Any], written: tuple[str, ...], count: int
) -> None:
    """Ten thousand calls of the compiled functions with one to four arguments changed: an answer or a Python exception,
    never a crash, and no write outside of a tensor that was given to be written."""
    draw = random.Random(0)
    outputs = {key: Guarded(good[key].shape, torch.float32, fill=0.0) for key in written}
    read = {key: value.clone() for key, value in good.items() if isinstance(value, Tensor) and key not in written}
    good = good | read | {key: output.tensor for key, output in outputs.items()}
    before = {key: value.clone() for key, value in read.items()}
    inputs, made = ([variants(one) for one in tensors] for tensors in (read.values(), (good[key] for key in written)))
    variants_of = dict(zip((*read, *written), (*inputs, *made), strict=True))
    accepted = refused = 0
    for _ in range(count):
        given = dict(good)
        for key in draw.sample(list(good), draw.choice([0, 1, 1, 1, 2, 4])):
            own = variants_of[key] if draw.random() < 0.5 and key in variants_of else None
            given[key] = changed(draw, good[key], [own] if own else made if key in written else inputs)
        try:
            run(name, given)
            accepted += 1
        except (TypeError, ValueError):
            refused += 1
    print(f"{name}: tried {count}, accepted {accepted}, refused {refused}, other 0")
    assert accepted > count // 10
    assert refused > count // 4
    for key, output in outputs.items():
        output.tensor.zero_()
        output.check(key)
    assert all(torch.equal(value, before[key]) for key, value in read.items()), "what is read was written"


@pytest.mark.skipif(build_info()["cuda"] is not None, reason="this build has CUDA kernels")
@pytest.mark.gpu
def test_cuda_tensors_need_a_cuda_build() -> None:
    inputs = GOOD.map(Tensor.cuda)
    with pytest.raises(RuntimeError, match="built without CUDA"):
        inputs.fusion()
