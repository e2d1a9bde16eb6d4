"""The loops of the room fusion on the CPU, called without the matrix products, in every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import Guarded, assert_close, assert_repeatable
from fusion_cases import DTYPES, spread
from fusion_sums import EPS, LAYOUTS, Layout, Sums, draw_sums
from torch import Tensor

from sphinx_fast.ops import extension, layer_norm

ISAS = extension().isas()
PAIRS = [(torch.float32, torch.float32), *[(dtype, sums) for dtype in DTYPES[1:] for sums in (torch.float32, dtype)]]


def run_forward(
    given: Sums,
    out: Tensor,
    kept: Tensor | None = None,
    stats: Tensor | None = None,
    blocks: tuple[int, ...] = (0,),
    first: Tensor | None = None,
    **rest: Any,
) -> None:
    """Through the compiled function; `blocks`: the first column of each."""
    start, end = given.tags or (None, None)
    layout = given.layout
    for begin, stop in zip(blocks, (*blocks[1:], layout.width), strict=True):
        parts = [None if part is None else part[:, begin:stop].contiguous() for part in
                 (given.fine, given.coarse, given.queries)]  # fmt: skip
        extension().fusion(
            *parts, out, views=layout.views, query_count=layout.queries, grid=layout.grid, repeat=layout.repeat,
            column=begin, patch=given.patch, query=given.query, start=start, end=end, eps=EPS, first=first,
            kept=kept, stats=stats, **({"isa": None, "threads": 1} | rest),
        )  # fmt: skip


def run_backward(given: Sums, kept: Tensor, stats: Tensor, **rest: Any) -> None:
    layout, how = given.layout, {"isa": None, "threads": 1} | rest
    extension().fusion_backward(
        given.grad, kept, stats, query_count=layout.queries, grid=layout.grid, repeat=layout.repeat, tags=layout.tags,
        patch_weight=given.patch[1], query_weight=given.query and given.query[1], **how,
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "sums"), PAIRS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows(layout: Layout, dtype: torch.dtype, sums: torch.dtype, isa: str) -> None:
    given = draw_sums(layout, dtype, sums)
    given.check_forward(lambda *args, **rest: run_forward(*args, **rest, isa=isa))
    given.check_backward(lambda *args, **rest: run_backward(*args, **rest, isa=isa, threads=2), 64)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("chunks", [1, 2, 7, 400])
def test_any_number_of_chunks(chunks: int, isa: str) -> None:
    for layout in LAYOUTS[-3:]:
        given = draw_sums(layout, torch.bfloat16, torch.float32)
        given.check_backward(lambda *args, **rest: run_backward(*args, **rest, isa=isa, threads=2), chunks)


@pytest.mark.parametrize("isa", ISAS)
def test_repeats_are_equal(isa: str) -> None:
    given = draw_sums(Layout(2, 1, 4, 2, True, 97, "both"), torch.bfloat16, torch.float32)

    def everything() -> Tensor:
        made = [*forward_of(given, isa=isa, threads=2), *backward_of(given, 3, isa=isa, threads=2)]
        return torch.cat([tensor.float().flatten() for tensor in made])

    assert_repeatable(everything)


WIDE = Layout(3, 5, 6, 2, True, 97, "both")


def forward_of(given: Sums, keep: bool = True, **rest: Any) -> list[Tensor]:
    outputs = given.forward_outputs(keep)
    run_forward(given, **outputs.tensors(), **rest)
    return list(outputs.check().values())


def backward_of(given: Sums, chunks: int = 64, **rest: Any) -> list[Tensor]:
    outputs, kept = given.backward_outputs(chunks), given.kept()
    run_backward(given, kept, given.stats(kept.float()), **rest, **outputs.tensors())
    return list(outputs.check().values())


def equal(made: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, wanted) for one, wanted in zip(made, expected, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "sums"), PAIRS, ids=str)
def test_threads_blocks_and_repeats_leave_the_bits(dtype: torch.dtype, sums: torch.dtype, isa: str) -> None:
    given = draw_sums(WIDE, dtype, sums)
    expected, back = forward_of(given, isa=isa), backward_of(given, isa=isa)
    for threads in (2, 3, 32):
        assert equal(forward_of(given, isa=isa, threads=threads), expected), threads
        assert equal(backward_of(given, isa=isa, threads=threads), back), threads
    for blocks in ((0, 96), (0, 1), (0, 64, 80), (0, 7, 8, 9, 50), tuple(range(97))):
        assert equal(forward_of(given, isa=isa, threads=2, blocks=blocks), expected), blocks
        in_place = forward_of(given, keep=False, isa=isa, threads=2, blocks=blocks)  # what is begun waits in `out`
        assert torch.equal(in_place[0], expected[0]), blocks


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_view_does_not_depend_on_the_others(dtype: torch.dtype, isa: str) -> None:
    given = draw_sums(WIDE, dtype, torch.float32)
    together, back = forward_of(given, isa=isa, threads=2), backward_of(given, isa=isa)
    for index in range(3):
        one = given.view(index)
        parts = [tensor.chunk(3)[index] for tensor in together]
        assert equal([made.view_as(part) for made, part in zip(forward_of(one, isa=isa), parts, strict=True)], parts)
        alone = backward_of(one, isa=isa)[:3]
        assert equal(alone, [tensor.chunk(3)[index] for tensor in back[:3]])


@pytest.mark.parametrize("isa", ISAS)
def test_a_gradient_that_is_not_finite_stays_in_its_row(isa: str) -> None:
    given = draw_sums(WIDE, torch.float32, torch.float32)
    outputs, kept = given.backward_outputs(64), given.kept()
    clean = backward_of(given, isa=isa)
    given.grad[1, 1 + 5 + 1 + 8, 50] = torch.nan  # view 1, patch (1, 2): the coarse patch (0, 1)
    given.grad[2, 1 + 3, 7] = torch.inf  # query 3
    run_backward(given, kept, given.stats(kept.float()), **outputs.tensors(), isa=isa)
    for name, row, expected in (("fine", 37 + 9, clean[0]), ("coarse", 10 + 2, clean[1]), ("queries", 13, clean[2])):
        made = outputs.tensors()[name]
        assert made.isnan().any(-1).nonzero().flatten().tolist() == [row], name
        assert torch.equal(made[torch.arange(len(made)) != row], expected[torch.arange(len(made)) != row])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_that_are_not_wanted(dtype: torch.dtype, isa: str) -> None:
    """Without `fine` or `queries` the rest is the same."""
    given = draw_sums(WIDE, dtype, torch.float32)
    expected = backward_of(given, isa=isa)
    kept = given.kept()
    for absent in ("fine", "queries"):
        outputs = given.backward_outputs(64)
        outputs.named[absent] = None
        run_backward(given, kept, given.stats(kept.float()), **outputs.tensors(), isa=isa)
        for name, wanted in zip(outputs.named, expected, strict=True):
            made = outputs.check()[name]
            assert made is None if name == absent else torch.equal(made, wanted), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first(dtype: torch.dtype, isa: str) -> None:
    given = draw_sums(WIDE, dtype, dtype)
    expected = forward_of(given, isa=isa)[0].view(3, WIDE.tokens, 97)
    for first in ([0, 44, 88], [1, 50, 95], [9, 53, 2000]):
        output = Guarded((first[-1] + WIDE.tokens + 1, 97), dtype, fill=7.0)
        run_forward(given, output.tensor, first=torch.tensor(first), isa=isa, threads=2)
        rest = torch.ones(len(output.tensor), dtype=torch.bool)
        for view, row in enumerate(first):
            assert torch.equal(output.tensor[row : row + WIDE.tokens], expected[view])
            rest[row : row + WIDE.tokens] = False
        assert (output.check()[rest] == 7.0).all()


# --- layer_norm -------------------------------------------------------------------------------------------------------
def raw_norm(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, **rest: Any) -> None:
    """Of one group of rows."""
    extension().layer_norm(x[None], weight, bias, EPS, out[None], **({"isa": None, "threads": 1} | rest))


def vectors(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(2, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    return weight.clone(), bias.clone()


def rows(count: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(count, width, generator=generator) + spread(width, generator)).to(dtype)


def close_to_torch(made: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> None:
    plain, exact = (
        F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
        for dtype in (x.dtype, torch.float64)
    )
    assert_close(made, plain, exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 8, 15, 16, 17, 31, 63, 64, 65, 127, 768, 1023, 4096])
def test_layer_norm(width: int, dtype: torch.dtype, isa: str) -> None:
    x, (weight, bias) = rows(37, width, dtype), vectors(width, dtype)
    output = Guarded(x.shape, dtype)
    raw_norm(x, weight, bias, output.tensor, isa=isa, threads=2)
    close_to_torch(output.check(), x, weight, bias)

    own = x.clone()
    raw_norm(own, weight, bias, own, isa=isa, threads=3)
    assert torch.equal(own, output.tensor), "in place"

    wide_x, wide = torch.full((37, width + 11), torch.nan, dtype=dtype), Guarded((37, width + 5), dtype, fill=7.0)
    wide_x[:, 6 : 6 + width] = x
    raw_norm(wide_x[:, 6 : 6 + width], weight, bias, wide.tensor[:, 2 : 2 + width], isa=isa)
    assert torch.equal(wide.check()[:, 2 : 2 + width], output.tensor), "slices"
    assert (wide.tensor[:, :2] == 7.0).all()
    assert (wide.tensor[:, 2 + width :] == 7.0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 3e4])
def test_layer_norm_of_rows_far_from_zero(offset: float, dtype: torch.dtype, isa: str) -> None:
    """The mean of such a row, rounded once, would be off by as much as its values are apart."""
    for width in (97, 1023, 4096):
        x, (weight, bias) = (rows(9, width, torch.float32) + offset).to(dtype), vectors(width, dtype)
        made = torch.empty_like(x)
        raw_norm(x, weight, bias, made, isa=isa)
        close_to_torch(made, x, weight, bias)


def shapes() -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    return [
        ("vector", lambda memory: memory[0, 0, :50]),
        ("one row", lambda memory: memory[:1, 0]),
        ("matrix", lambda memory: memory[:, 1]),
        ("tokens", lambda memory: memory),
        ("columns of tokens", lambda memory: memory[..., 5:60]),
        ("a token of each", lambda memory: memory[:, 2, 1:8]),
        ("four dimensions", lambda memory: memory.unflatten(1, (2, 3))[..., 1:]),
        ("nothing", lambda memory: memory[:0]),
        ("no tokens", lambda memory: memory[:, :0]),
        ("no width", lambda memory: memory[..., :0]),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", [one[1] for one in shapes()], ids=[one[0] for one in shapes()])
def test_layer_norm_of_any_shape(part: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    memory = rows(4 * 6, 70, dtype).view(4, 6, 70)
    x = part(memory.clone())
    weight, bias = vectors(x.shape[-1], dtype) if x.shape[-1] else (torch.ones(0, dtype=dtype),) * 2
    made = layer_norm(x, weight, bias, EPS)
    assert made.is_contiguous()
    close_to_torch(made, x, weight, bias)
    buffer = Guarded((4, 6, 70), dtype, fill=7.0)
    assert torch.equal(layer_norm(x, weight, bias, EPS, out=part(buffer.tensor)), made)
    mine = part(torch.zeros(4, 6, 70).add_(1)).sum().item()
    assert (buffer.check() != 7.0).sum() == mine, "nothing beside it"
    assert torch.equal(layer_norm(x, weight, bias, EPS, out=x), made)


def test_layer_norm_eps_and_gradients() -> None:
    x, (weight, bias) = rows(5, 33, torch.float32), vectors(33, torch.float32)
    for eps in (0.0, 1e-12, 0.5):
        close_to_torch(layer_norm(x, weight, bias, eps), x, weight, bias, eps)
    weight.requires_grad_()
    assert not layer_norm(x.requires_grad_(), weight, bias, EPS).requires_grad


@pytest.mark.parametrize("isa", ISAS)
def test_layer_norm_keeps_what_is_not_finite_in_its_row(isa: str) -> None:
    x, (weight, bias) = rows(6, 45, torch.float32), vectors(45, torch.float32)
    clean, made = torch.empty_like(x), torch.empty_like(x)
    raw_norm(x, weight, bias, clean, isa=isa)
    x[2, 3], x[4, 44] = torch.nan, torch.inf
    raw_norm(x, weight, bias, made, isa=isa)
    assert made[[2, 4]].isnan().all()
    assert torch.equal(made[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_layer_norm_as_a_torch_op() -> None:
    x, (weight, bias) = rows(5, 33, torch.float32), vectors(33, torch.float32)
    torch.library.opcheck(torch.ops.sphinx_fast.layer_norm.default, (x[None], weight, bias, EPS, torch.empty(1, 5, 33)))

    def call(x: Tensor) -> Tensor:
        wide = torch.zeros(1, 5, 40)
        layer_norm(x, weight, bias, EPS, out=wide[0, :, 3:36])
        return wide + layer_norm(x[None], weight, bias, EPS).sum()

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
