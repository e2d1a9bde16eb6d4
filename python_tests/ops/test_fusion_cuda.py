"""The room fusion on a GPU: by the rule of the CPU half, on the caller's stream, replayed from a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import Guarded, assert_close, assert_repeatable
from fusion_cases import CASES, DTYPES, Case, assert_all_close, draw, reference, results
from fusion_sums import EPS, LAYOUTS, Layout, draw_sums
from torch import Tensor

from sphinx_fast.ops import _fusion_products, extension, layer_norm

pytestmark = pytest.mark.gpu

REAL = Case(5, 16, (1, 4, 1), (1024, 3072, 1536), 4096, 32, True)
PAIRS = [(torch.float32, torch.float32), *[(dtype, torch.float32) for dtype in DTYPES[1:]]]


@pytest.mark.parametrize("own_gemm", [False, True], ids=["cublas", "ours"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, REAL._replace(views=1), REAL], ids=str)
def test_tokens_and_gradients(case: Case, dtype: torch.dtype, own_gemm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Yardstick and oracle on the GPU too: on a CPU the real sizes take minutes."""
    monkeypatch.setattr(_fusion_products, "own_gemm", own_gemm)
    draws = [draw(case, dtype, "cuda", seed) for seed in range(case.draws(dtype))]
    ours, plain, exact = [], [], []
    for inputs in draws:
        of = inputs.leaves(torch.float64)
        tokens = reference(of)
        grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
        exact.append(results(tokens, of, grad))
        of = inputs.leaves()
        plain.append(results(reference(of), of, grad))
        of = inputs.leaves()
        ours.append(results(of.fusion(), of, grad))
    assert_all_close(ours, plain, exact)
    output = Guarded(ours[0]["tokens"].flatten(0, 1).shape, dtype, "cuda")
    draws[0].fusion(out=output.tensor)
    assert torch.equal(output.check().view_as(ours[0]["tokens"]), ours[0]["tokens"])


@pytest.mark.parametrize(("dtype", "sums"), PAIRS, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(2, 32, 16, 4, True, 4096, "both")], ids=str)
def test_the_kernels(layout: Layout, dtype: torch.dtype, sums: torch.dtype) -> None:
    given = draw_sums(layout, dtype, sums).to("cuda")
    start, end = given.tags or (None, None)
    sizes: dict[str, Any] = {"query_count": layout.queries, "grid": layout.grid, "repeat": layout.repeat}
    how: dict[str, Any] = {"isa": None, "threads": 1}

    def forward(_: Any, out: Tensor, kept: Tensor | None, stats: Tensor | None) -> None:
        extension().fusion(
            given.fine, given.coarse, given.queries, out, views=layout.views, **sizes, column=0, patch=given.patch,
            query=given.query, start=start, end=end, eps=EPS, first=None, kept=kept, stats=stats, **how,
        )  # fmt: skip

    def backward(_: Any, kept: Tensor, stats: Tensor, **out: Tensor | None) -> None:
        weights = {"patch_weight": given.patch[1], "query_weight": given.query and given.query[1]}
        extension().fusion_backward(given.grad, kept, stats, **sizes, tags=layout.tags, **weights, **out, **how)

    given.check_forward(forward)
    for chunks in (3, 264):
        given.check_backward(backward, chunks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 97, 768, 1024, 1536, 4095, 4096])
def test_layer_norm(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    shapes = (5, 257, width), (width,), (width,)
    x, weight, bias = (torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes)
    exact = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), EPS)
    plain = F.layer_norm(x, (width,), weight, bias, EPS)
    wide = Guarded((5, 258, width + 8), dtype, "cuda", fill=7.0)
    part = wide.tensor[:, 1:, 3 : 3 + width]
    if width > 1:  # of one value nothing is left, and every rounding of it is an error
        assert_close(layer_norm(x, weight, bias, EPS, out=part).contiguous(), plain, exact)
    else:
        assert torch.equal(layer_norm(x, weight, bias, EPS, out=part), bias.expand(x.shape))
    made = part.clone()
    part.fill_(7.0)
    assert (wide.check() == 7.0).all()
    assert torch.equal(layer_norm(x, weight, bias, EPS, out=x), made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_lies_on_the_device(dtype: torch.dtype) -> None:
    """Nobody waits for it: a view that would leave `out` is not written."""
    inputs = draw(Case(5, 4, (1, 2), (5, 6), 96, 3, True), dtype, "cuda")
    expected = inputs.fusion()
    output = Guarded((80, 96), dtype, "cuda", fill=7.0)
    first = torch.tensor([-1, 2, 59, 30, 2**62], device="cuda")
    assert inputs.fusion(out=output.tensor, first=first) is output.tensor
    rest = torch.ones(80, dtype=torch.bool)
    for view, row in ((1, 2), (3, 30)):
        assert torch.equal(output.tensor[row : row + 22], expected[view])
        rest[row : row + 22] = False
    assert (output.check()[rest.cuda()] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_equal(dtype: torch.dtype) -> None:
    inputs = draw(Case(2, 8, (1, 2, 1), (64, 96, 64), 640, 32, True), dtype, "cuda").leaves()
    grad = torch.randn(2, 99, 640, device="cuda")
    assert_repeatable(lambda: torch.cat([one.flatten() for one in results(inputs.fusion(), inputs, grad).values()]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_view_does_not_depend_on_the_others_in_its_rows(dtype: torch.dtype) -> None:
    """In a batch of the same size: products of another may round differently."""
    inputs = draw(Case(4, 8, (1, 2), (32, 48), 320, 4, True), dtype, "cuda")
    for tensor in (*inputs.features, inputs.queries):
        assert tensor is not None
        tensor[3] = tensor[0]
    expected = inputs.fusion()
    for tensor in (*inputs.features, inputs.queries):
        assert tensor is not None
        tensor[1:3] = torch.nan
    made = inputs.fusion()
    assert torch.equal(made[0], expected[0])
    assert torch.equal(made[3], expected[3])
    assert made[1:3, 1:-1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_replays_on_new_features(dtype: torch.dtype) -> None:
    case = Case(5, 16, (1, 4, 1), (64, 96, 32), 640, 32, True)
    inputs, new = draw(case, dtype, "cuda"), draw(case, dtype, "cuda", seed=1)
    tokens = 291
    out = torch.zeros(5 * tokens + 9, 640, dtype=dtype, device="cuda")
    first = torch.arange(5, device="cuda") * tokens
    inputs.fusion(out=out, first=first)  # once outside: loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.fusion(out=out, first=first)
    for old, tensor in zip((*inputs.features, inputs.queries), (*new.features, new.queries), strict=True):
        assert old is not None and tensor is not None
        old.copy_(tensor)
    first.add_(9)
    out.fill_(7.0)
    graph.replay()
    expected = inputs.fusion().flatten(0, 1)
    assert torch.equal(out[9:], expected)
    assert (out[:9] == 7.0).all()


def test_everything_runs_on_the_callers_stream() -> None:
    """The features come into being on the same stream, behind a long wait: a call on another one would not see them."""
    source = draw(Case(5, 16, (1, 4, 1), (64, 96, 32), 640, 32, True))
    expected = source.map(Tensor.cuda).fusion()
    weights = torch.randn(640).cuda(), torch.randn(640).cuda()
    normed = layer_norm(expected, *weights, EPS)
    inputs = source.map(lambda tensor: torch.zeros_like(tensor, device="cuda"))
    pinned = [tensor.pin_memory() for tensor in source.named().values()]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for tensor, value in zip(inputs.named().values(), pinned, strict=True):
            tensor.copy_(value, non_blocking=True)
        made = inputs.fusion()
        then = layer_norm(made, *weights, EPS)
    stream.synchronize()
    assert torch.equal(made, expected)
    assert torch.equal(then, normed)


def test_devices_are_not_mixed() -> None:
    inputs = draw(Case(2, 4, (1, 2), (5, 3), 12, 2, True), device="cuda")
    for wrong in (
        {"out": torch.zeros(42, 12)},
        {"out": torch.zeros(42, 12, device="cuda"), "first": torch.tensor([0, 21])},
    ):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            inputs.fusion(**wrong)
    with pytest.raises(ValueError, match=r"patch\.bias"):
        inputs._replace(patch=inputs.patch._replace(bias=inputs.patch.bias.cpu())).fusion()
