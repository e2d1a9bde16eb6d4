"""Wrong arguments to the room views: a TypeError or ValueError that names the argument, nothing written, no crash."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from close import Guarded
from torch._subclasses.fake_tensor import FakeTensorMode

from sphinx_fast.image.geometry import padded_resize
from sphinx_fast.ops import EncoderViews, build_info, canvas, encoder_views, extension, views

PICTURE = torch.zeros(6, 5, 3, dtype=torch.uint8)
FAKE = FakeTensorMode().from_tensor(PICTURE)
FLOATS = torch.zeros(5, 3, 8, 8)
SIZES = {"picture_size": 16, "view_size": 8}


NUMBERS = padded_resize(6, 5, 16).numbers()


def raw_views(pictures: Any = (PICTURE,), out: Any = FLOATS, **changes: Any) -> None:
    """The compiled function itself, past the wrapper's checks."""
    absent = dict.fromkeys(("dinov2", "convnext", "canvas", "isa"))
    arguments = {"geometry": NUMBERS, **SIZES, **absent, "threads": 1} | changes
    extension().views(pictures, out=out, **arguments)


def raw_canvas(picture: Any = PICTURE, made: Any = None, **changes: Any) -> None:
    made = torch.zeros(1, 16, 16, 3, dtype=torch.uint8) if made is None else made
    raw_views([picture], None, canvas=made, **changes)


def placed(**changes: Any) -> list[int]:
    """The numbers of a geometry of PICTURE with something wrong in it."""
    return padded_resize(6, 5, 16)._replace(**changes).numbers()


NARROW = torch.zeros(5, 3, 8, 16)[..., ::2]
BAD_CALLS: list[tuple[str, type[Exception], str | None, Any]] = [
    # the wrapper
    ("one tensor", TypeError, "pictures", lambda: views(PICTURE, **SIZES)),  # type: ignore[arg-type]
    ("array", TypeError, "pictures", lambda: views([np.zeros((4, 4, 3), np.uint8)], **SIZES)),  # type: ignore[list-item]
    ("none", TypeError, "pictures", lambda: views([None], **SIZES)),  # type: ignore[list-item]
    ("string", TypeError, "pictures", lambda: views("picture", **SIZES)),  # type: ignore[arg-type]
    ("grey", ValueError, r"pictures\[0\]", lambda: views([PICTURE[..., 0]], **SIZES)),
    ("alpha", ValueError, r"pictures\[1\]", lambda: views([PICTURE, torch.zeros(4, 4, 4, dtype=torch.uint8)], **SIZES)),
    ("batched", ValueError, r"pictures\[0\]", lambda: views([PICTURE[None]], **SIZES)),
    ("float", TypeError, "uint8", lambda: views([PICTURE.float()], **SIZES)),
    ("int64", TypeError, "uint8", lambda: views([PICTURE.long()], **SIZES)),
    ("bool", TypeError, "uint8", lambda: views([PICTURE.bool()], **SIZES)),
    ("no rows", ValueError, "height and width", lambda: views([PICTURE[:0]], **SIZES)),
    ("no columns", ValueError, "height and width", lambda: views([PICTURE[:, :0]], **SIZES)),
    ("no channels", ValueError, r"pictures\[0\]", lambda: views([PICTURE[..., :0]], **SIZES)),
    ("too long", ValueError, "height and width", lambda: views([PICTURE[:1].expand(2**21, 5, 3)], **SIZES)),
    ("meta", ValueError, "device", lambda: views([PICTURE.to("meta")], **SIZES, out=FLOATS)),
    ("sparse", Exception, None, lambda: views([PICTURE.to_sparse()], **SIZES)),
    ("not a multiple", ValueError, "multiple", lambda: views([PICTURE], picture_size=17, view_size=8)),
    ("view 0", ValueError, "multiple", lambda: views([PICTURE], picture_size=16, view_size=0)),
    ("view negative", ValueError, "multiple", lambda: views([PICTURE], picture_size=16, view_size=-8)),
    ("picture 0", ValueError, "multiple", lambda: views([PICTURE], picture_size=0, view_size=8)),
    ("view above", ValueError, "multiple", lambda: views([PICTURE], picture_size=8, view_size=16)),
    ("float64", TypeError, "dtype", lambda: views([PICTURE], **SIZES, dtype=torch.float64)),
    ("complex", TypeError, "dtype", lambda: views([PICTURE], **SIZES, dtype=torch.complex64)),
    ("uint8 views", TypeError, "dtype", lambda: views([PICTURE], **SIZES, dtype=torch.uint8)),
    ("out dtype", TypeError, "out", lambda: views([PICTURE], **SIZES, dtype=torch.float16, out=FLOATS)),
    ("out float64", TypeError, "out", lambda: views([PICTURE], **SIZES, out=FLOATS.double())),
    ("out shape", ValueError, "out", lambda: views([PICTURE], **SIZES, out=FLOATS[:4])),
    ("out strides", ValueError, "contiguous", lambda: views([PICTURE], **SIZES, out=NARROW)),
    ("out grad", ValueError, "requires_grad", lambda: views([PICTURE], **SIZES, out=FLOATS.clone().requires_grad_())),
    ("out negative", ValueError, "negated", lambda: views([PICTURE], **SIZES, out=torch._neg_view(FLOATS))),
    ("picture negative", ValueError, "negated", lambda: views([torch._neg_view(PICTURE)], **SIZES)),
    (
        "dinov2 shape",
        ValueError,
        "dinov2",
        lambda: encoder_views([PICTURE], **SIZES, out=EncoderViews(FLOATS, FLOATS[:1], FLOATS)),
    ),
    (
        "convnext size",
        ValueError,
        "convnext",
        lambda: encoder_views([PICTURE], **SIZES, out=EncoderViews(FLOATS, FLOATS, FLOATS)),
    ),
    ("convnext negative", Exception, None, lambda: encoder_views([PICTURE], **SIZES, convnext_size=-1)),
    ("canvas 0", ValueError, "size", lambda: canvas(PICTURE, 0)),
    ("canvas out", TypeError, "out", lambda: canvas(PICTURE, 8, out=torch.zeros(8, 8, 3))),
    # the compiled functions
    ("raw none", TypeError, r"pictures\[0\]", lambda: raw_views([None])),
    ("raw number", TypeError, r"pictures\[0\]", lambda: raw_views([7])),
    ("raw not a sequence", TypeError, None, lambda: raw_views(7)),
    ("raw fake", ValueError, r"pictures\[0\]: expected memory", lambda: raw_views([FAKE])),
    ("raw meta", TypeError, r"pictures\[0\]: .* borrowed: \w+", lambda: raw_views([PICTURE.to("meta")])),
    ("raw sparse", TypeError, r"pictures\[0\]: .* borrowed: \w+", lambda: raw_views([PICTURE.to_sparse()])),
    ("raw out none", ValueError, "out", lambda: raw_views(out=None)),
    ("raw out fake", ValueError, "out: expected memory", lambda: raw_views(out=FakeTensorMode().from_tensor(FLOATS))),
    ("raw out int", TypeError, "out", lambda: raw_views(out=FLOATS.int())),
    ("raw out rank", ValueError, "out", lambda: raw_views(out=FLOATS[0])),
    ("raw out count", ValueError, "out", lambda: raw_views([PICTURE, PICTURE], geometry=NUMBERS * 2)),
    ("raw sizes", ValueError, "picture_size", lambda: raw_views(picture_size=15)),
    ("raw huge size", ValueError, "picture_size", lambda: raw_views(picture_size=2**40)),
    ("raw overflow", TypeError, None, lambda: raw_views(picture_size=2**70)),
    ("raw view 0", ValueError, "view_size", lambda: raw_views(view_size=0)),
    ("raw threads", ValueError, "threads", lambda: raw_views(threads=0)),
    ("raw dinov2", TypeError, "dinov2", lambda: raw_views(dinov2=FLOATS.half())),
    ("raw dinov2 shape", ValueError, "dinov2", lambda: raw_views(dinov2=FLOATS[..., :7])),
    ("raw convnext oblong", ValueError, "convnext", lambda: raw_views(convnext=torch.zeros(5, 3, 8, 9))),
    ("raw convnext empty", ValueError, "convnext", lambda: raw_views(convnext=torch.zeros(5, 3, 0, 0))),
    ("raw 5 arguments", TypeError, None, lambda: extension().views([PICTURE], NUMBERS, 16, 8, 1)),
    ("raw nothing wanted", ValueError, "out", lambda: raw_views(out=None)),
    ("raw canvas shape", ValueError, "canvas", lambda: raw_canvas(made=torch.zeros(1, 16, 9, 3, dtype=torch.uint8))),
    ("raw canvas dtype", TypeError, "canvas", lambda: raw_canvas(made=torch.zeros(1, 16, 16, 3))),
    ("raw canvas grey", ValueError, r"pictures\[0\]", lambda: raw_canvas(PICTURE[..., :1])),
    ("raw reversed", ValueError, "strides", lambda: raw_canvas(np.zeros((6, 5, 3), np.uint8)[::-1])),
    ("raw rank 9", ValueError, "dimensions", lambda: raw_canvas(torch.zeros([1] * 9, dtype=torch.uint8))),
    ("raw isa", ValueError, "isa", lambda: raw_views(isa="mmx")),
    # geometries
    ("two for one", ValueError, "geometries", lambda: views([PICTURE], **SIZES, geometries=[])),
    ("raw numbers short", ValueError, "geometry", lambda: raw_views(geometry=NUMBERS[:-1])),
    ("raw numbers long", ValueError, "geometry", lambda: raw_views(geometry=NUMBERS * 2)),
    ("raw numbers text", TypeError, None, lambda: raw_views(geometry="padded")),
    ("region left of it", ValueError, "region", lambda: raw_views(geometry=placed(region=(-1, 0)))),
    ("region past it", ValueError, "region", lambda: raw_views(geometry=placed(region=(0, 1)))),
    ("region too large", ValueError, "region", lambda: raw_views(geometry=placed(extent=(7, 5)))),
    ("region empty", ValueError, "region", lambda: raw_views(geometry=placed(extent=(0, 5)))),
    ("region overflow", ValueError, "region", lambda: raw_views(geometry=placed(region=(2**63 - 1, 0)))),
    ("plane small", ValueError, "plane", lambda: raw_views(geometry=placed(plane=(5, 5), offset=(0, 0)))),
    ("plane huge", ValueError, "plane", lambda: raw_views(geometry=placed(plane=(2**40, 5)))),
    ("offset", ValueError, "plane", lambda: raw_views(geometry=placed(offset=(0, 2)))),
    ("offset negative", ValueError, "plane", lambda: raw_views(geometry=placed(offset=(0, -1)))),
    ("resized small", ValueError, "resized", lambda: raw_views(geometry=placed(resized=(15, 16)))),
    ("resized huge", ValueError, "resized", lambda: raw_views(geometry=placed(resized=(2**40, 16)))),
    ("origin", ValueError, "resized", lambda: raw_views(geometry=placed(origin=(1, 0)))),
    ("origin negative", ValueError, "resized", lambda: raw_views(geometry=placed(origin=(0, -1)))),
    ("padding, columns first", ValueError, "padding", lambda: raw_views(geometry=[*NUMBERS[:-1], 1])),
]


@pytest.mark.parametrize(("error", "message", "call"), [case[1:] for case in BAD_CALLS], ids=[c[0] for c in BAD_CALLS])
def test_bad_call(error: type[Exception], message: str | None, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_written_when_a_later_picture_is_bad() -> None:
    output = Guarded((10, 3, 8, 8), torch.float32, fill=7.0)
    with pytest.raises(TypeError, match=r"pictures\[1\]"):
        views([PICTURE, PICTURE.float()], **SIZES, out=output.tensor)
    assert torch.equal(output.check(), torch.full_like(output.tensor, 7.0))


@pytest.fixture
def short_tensors() -> Iterator[None]:
    """pybind11 prints every argument of a call whose types do not match."""
    torch.set_printoptions(threshold=1, edgeitems=1)
    yield
    torch.set_printoptions(profile="default")


@pytest.mark.usefixtures("short_tensors")
def test_drawn_calls_are_answered_or_refused() -> None:
    """A thousand calls of random arguments, most of them wrong: an answer or a Python exception, never a crash."""
    draw = random.Random(0)
    tensors = [
        *[
            PICTURE,
            PICTURE[:0],
            PICTURE.float(),
            PICTURE[..., 0],
            PICTURE.transpose(0, 1),
            FAKE,
            None,
            3,
            "x",
            [PICTURE],
        ],
        *[
            FLOATS,
            FLOATS.half(),
            FLOATS[:1],
            NARROW,
            torch.zeros(0),
            torch.zeros(5, 3, 9, 9),
            np.zeros((3, 3, 3), np.uint8),
        ],
    ]
    numbers = [-(2**63), -1, 0, 1, 2, 8, 15, 16, 17, 2**14, 2**31, 2**63 - 1, 2.5, None]
    accepted = refused = 0
    for _ in range(1000):
        # Half of the arguments are right, so that the wrong ones are met at every depth.
        def pick(right: Any, others: list[Any]) -> Any:
            return right if draw.random() < 0.75 else draw.choice(others)

        pictures = pick([PICTURE], [[draw.choice(tensors) for _ in range(draw.randrange(3))], draw.choice(tensors)])
        changes = {
            "picture_size": pick(16, numbers),
            "view_size": pick(8, numbers),
            "threads": pick(1, numbers[:8]),
            "dinov2": pick(None, tensors),
            "convnext": pick(None, tensors),
            "canvas": pick(None, tensors),
            "geometry": pick(NUMBERS, [NUMBERS * 2, [], [draw.choice([-1, 0, 1, 5, 6, 16, 2**62]) for _ in range(13)]]),
        }
        try:
            raw_views(pictures, pick(FLOATS, tensors), **changes)
            accepted += 1
        except (TypeError, ValueError, RuntimeError):
            refused += 1
    print(f"tried 1000, accepted {accepted}, refused {refused}, other 0")
    assert accepted > 50
    assert refused > 250


@pytest.mark.skipif(build_info()["cuda"] is not None, reason="this build has CUDA kernels")
@pytest.mark.gpu
def test_cuda_tensors_need_a_cuda_build() -> None:
    with pytest.raises(RuntimeError, match="built without CUDA"):
        views([PICTURE.cuda()], **SIZES)
