"""The room fusion against float64: forward and gradients in every dtype and way to compute, and what it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import Guarded, assert_close, assert_repeatable
from fusion_cases import CASES, DTYPES, Case, Inputs, Results, assert_all_close, draw, reference, results, whole_numbers
from torch import Tensor
from torch.testing._internal.optests.generate_tests import DEFAULT_TEST_UTILS

from sphinx_fast.ops import Projection, fusion
from sphinx_fast.ops import _fusion_products as products

# float32; half precision widened, as where the processor does not compute with it; and as where it does.
WAYS = [(torch.float32, True), *[(dtype, native) for dtype in DTYPES[1:] for native in (False, True)]]
SOME = Case(3, 4, (1, 2, 1), (5, 6, 7), 97, 3, True)


def compute_with_half(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(products, "computes_with", lambda dtype: native or dtype == torch.float32)


def exactly(inputs: Inputs, eps: float = 1e-5) -> Tensor:
    return reference(inputs.map(Tensor.double), eps)


# --- against float64 --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_and_gradients(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = [draw(case, dtype, seed=seed) for seed in range(case.draws(dtype))]
    plain: list[Results] = []
    exact: list[Results] = []
    grads = []
    for inputs in draws:
        leaves = inputs.leaves(), inputs.leaves(torch.float64)
        tokens = [reference(one) for one in leaves]
        grads.append(torch.randn(tokens[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype))
        for made, one, of in zip((plain, exact), tokens, leaves, strict=True):
            made.append(results(one, of, grads[-1]))
    for native in {True, dtype == torch.float32}:
        compute_with_half(monkeypatch, native)
        copies = [inputs.leaves() for inputs in draws]
        ours = [results(copy.fusion(), copy, grad) for copy, grad in zip(copies, grads, strict=True)]
        assert_all_close(ours, plain, exact)
        output = Guarded(ours[0]["tokens"].flatten(0, 1).shape, dtype)
        assert draws[0].fusion(out=output.tensor) is output.tensor
        made_in_place = output.check().view_as(ours[0]["tokens"])
        assert torch.equal(made_in_place, ours[0]["tokens"]), "with gradients wanted and without"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_an_expanded_gradient(dtype: torch.dtype) -> None:
    """As `tokens.mean()` sends it back: no memory of its own."""
    inputs = draw(SOME, dtype)
    ours, plain, exact = inputs.leaves(), inputs.leaves(), inputs.leaves(torch.float64)
    row = torch.randn(97, generator=torch.Generator().manual_seed(1)).to(dtype)
    pairs = ((ours.fusion(), ours), (reference(plain), plain), (reference(exact), exact))
    assert_all_close(*([results(tokens, of, row.expand(tokens.shape))] for tokens, of in pairs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.3, 10.0])
def test_eps_matters(eps: float, dtype: torch.dtype) -> None:
    inputs = draw(SOME, dtype)
    plain, exact = reference(inputs, eps), exactly(inputs, eps)
    assert_close(inputs.fusion(eps=eps), plain, exact)
    if eps >= 0.3:
        with pytest.raises(AssertionError):
            assert_close(inputs.fusion(), plain, exact)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_no_variance_are_the_norm_bias(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_with_half(monkeypatch, native)
    inputs = draw(SOME, dtype)
    same = inputs.patch._replace(weight=torch.zeros_like(inputs.patch.weight), bias=torch.full((97,), 3.0, dtype=dtype))
    tokens = inputs._replace(patch=same).fusion()
    assert torch.equal(tokens[:, 4:-1], same.norm_bias.expand(3, 17, 97))
    if dtype == torch.float32:  # 97 equal values have a mean that is one of them; without eps that is 0 / 0
        assert inputs._replace(patch=same).fusion(eps=0.0)[:, 4:-1].isnan().all()


@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_a_large_mean_does_not_cancel(offset: float) -> None:
    """float32 keeps 7 digits: mean(y^2) - mean(y)^2 would lose the variance of these rows."""
    inputs = draw(SOME)
    shifted = inputs._replace(patch=inputs.patch._replace(bias=inputs.patch.bias + offset))
    assert_close(shifted.fusion(), reference(shifted), exactly(shifted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_value_that_is_not_finite_stays_in_its_row(value: float, dtype: torch.dtype) -> None:
    clean, bad = draw(SOME, dtype), draw(SOME, dtype)
    bad.features[0][1, 7, 2] = value  # fine: patch 6 of view 1
    bad.features[1][2, 4, 0] = value  # coarse: the last four patches of view 2
    assert bad.queries is not None
    bad.queries[0, 1, 3] = value
    touched = {(1, 4 + 7), (0, 1 + 1), *((2, 4 + 1 + patch) for patch in (10, 11, 14, 15))}
    made, expected = bad.fusion(), clean.fusion()
    assert set(map(tuple, made.isnan().any(-1).nonzero().tolist())) == touched
    whole = ~made.isnan().any(-1)
    assert torch.equal(made[whole], expected[whole])


# --- where the tokens go ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [(0, 22, 44), (2, 24, 47), (1, 40, 100)])
def test_views_start_at_first_and_nothing_else_is_written(first: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs, tokens = draw(SOME, dtype), 3 + 17 + 2
    expected = inputs.fusion()
    output = Guarded((first[-1] + tokens + 3, 97), dtype, fill=7.0)
    inputs.fusion(out=output.tensor, first=torch.tensor(first))
    rest = torch.ones(len(output.tensor), dtype=torch.bool)
    for view, row in enumerate(first):
        assert torch.equal(output.tensor[row : row + tokens], expected[view])
        rest[row : row + tokens] = False
    assert (output.check()[rest] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SOME, Case(2, 2, (1,), (4,), 1, 1), Case(2, 2, (1, 2), (4, 3), 640)], ids=str)
def test_rows_of_a_wider_buffer(case: Case, dtype: torch.dtype) -> None:
    inputs = draw(case, dtype)
    expected = inputs.fusion().flatten(0, 1)
    buffer = Guarded((len(expected), case.width + 9), dtype, fill=7.0)
    inputs.fusion(out=buffer.tensor[:, 4 : 4 + case.width])
    assert torch.equal(buffer.tensor[:, 4 : 4 + case.width], expected)
    assert (buffer.check()[:, :4] == 7.0).all()
    assert (buffer.tensor[:, 4 + case.width :] == 7.0).all()


@pytest.mark.parametrize(("dtype", "native"), WAYS, ids=str)
def test_no_views(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_with_half(monkeypatch, native)
    inputs = draw(SOME, dtype)
    empty = inputs._replace(features=[feature[:0] for feature in inputs.features], queries=inputs.queries[:0])  # type: ignore[index]
    assert empty.fusion().shape == (0, 22, 97)
    output = Guarded((5, 97), dtype, fill=7.0)
    empty.fusion(out=output.tensor, first=torch.zeros(0, dtype=torch.int64))
    assert (output.check() == 7.0).all()
    ours = empty.leaves()
    for name, result in results(ours.fusion(), ours, torch.zeros(0, 22, 97)).items():
        assert not result.any(), name


# --- the same bits ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_equal(dtype: torch.dtype) -> None:
    inputs = draw(Case(2, 2, (1, 2), (9, 20), 97, 3, True), dtype)
    leaves = inputs.leaves()
    grad = torch.randn(2, 10, 97)
    assert_repeatable(lambda: torch.cat([one.flatten() for one in results(leaves.fusion(), leaves, grad).values()]))


EXACT = Case(3, 8, (1, 4, 1), (9, 7, 11), 193, 3, True, "both")


@pytest.mark.parametrize(("dtype", "native"), WAYS, ids=str)
def test_blocks_threads_and_other_views_leave_the_bits(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the products are exact nothing else may show: no block of columns, no thread, no other view, no slice."""
    compute_with_half(monkeypatch, native)
    inputs = whole_numbers(EXACT, dtype)
    expected = inputs.fusion()
    assert expected.isfinite().all()
    threads = torch.get_num_threads()
    try:
        for columns in (1, 7, 64, 100, 192, 193):
            monkeypatch.setattr(products, "_columns", lambda *_, columns=columns: columns)
            torch.set_num_threads(1 + columns % 3)
            output = Guarded(expected.flatten(0, 1).shape, dtype)
            inputs.fusion(out=output.tensor)
            assert torch.equal(output.check().view_as(expected), expected), columns
        monkeypatch.undo()
        compute_with_half(monkeypatch, native)
        monkeypatch.setattr(products, "_SLICE", 4)
        assert torch.equal(inputs.fusion(), expected)
    finally:
        torch.set_num_threads(threads)
    for view in range(3):
        part = slice(view, view + 1)
        one = inputs._replace(features=[f[part] for f in inputs.features], queries=inputs.queries[part])  # type: ignore[index]
        assert torch.equal(one.fusion()[0], expected[view])


@pytest.mark.parametrize(("dtype", "native"), WAYS, ids=str)
@pytest.mark.parametrize("columns", [40, 97])
def test_blocks_of_columns_against_float64(
    columns: int, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_with_half(monkeypatch, native)
    monkeypatch.setattr(products, "_columns", lambda *_: columns)
    monkeypatch.setattr(products, "_SLICE", 5)
    inputs = draw(SOME, dtype)
    assert_close(inputs.fusion(), reference(inputs), exactly(inputs))


# --- what is computed and what it takes -------------------------------------------------------------------------------
def test_only_wanted_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[Any] = []
    matmul = products._matmul

    def counted(a: Tensor, b: Tensor) -> Tensor:
        shapes.append((a.shape, b.shape))
        return matmul(a, b)

    monkeypatch.setattr(products, "_matmul", counted)
    inputs = draw(SOME)
    assert inputs.queries is not None and inputs.query is not None
    parameters = [*inputs.patch, *inputs.query, *inputs.tags]  # type: ignore[misc]
    for tensor in parameters:
        tensor.requires_grad_()
    inputs.fusion().sum().backward()
    assert len(shapes) == 4  # the columns of patch.weight for three encoders, and query.weight
    assert all(tensor.grad is not None for tensor in parameters)
    assert all(tensor.grad is None for tensor in (*inputs.features, inputs.queries))

    for wanted, count in (((1,), 5), ((0, 2), 6), ((0, 1, 2, 3), 8)):
        shapes.clear()
        given = [*inputs.features, inputs.queries]
        for index, tensor in enumerate(given):
            tensor.requires_grad_(index in wanted).grad = None
        inputs.fusion().sum().backward()
        assert len(shapes) == count
        assert [index for index, tensor in enumerate(given) if tensor.grad is not None] == list(wanted)

    shapes.clear()
    frozen = inputs.map(Tensor.detach)
    bias = frozen.patch.bias.requires_grad_()
    frozen.fusion().sum().backward()
    assert bias.grad is not None
    assert all(tensor.grad is None for tensor in frozen.named().values() if tensor is not bias)


def test_no_second_derivative_comes_out_silently_wrong() -> None:
    inputs = draw(SOME).leaves()
    (gradient,) = torch.autograd.grad(inputs.fusion().square().sum(), [inputs.features[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_what_changed_since_is_not_differentiated() -> None:
    inputs = draw(SOME).leaves()
    tokens = inputs.fusion()
    with torch.no_grad():
        inputs.patch.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        tokens.sum().backward()


def peak_memory(call: Any) -> int:
    """Bytes that torch allocates beside what there is, at the most at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(("dtype", "native"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_the_forward_takes_no_more_than_its_output_again(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five views of 291 tokens for D = 4096. The wide concatenated features and the sums of all columns are more."""
    if not native:
        compute_with_half(monkeypatch, native)
    inputs = draw(Case(5, 16, (1, 4, 1), (64, 96, 32), 4096, 32, True), dtype)
    out = torch.empty(5 * 291, 4096, dtype=dtype)
    if native and dtype == torch.bfloat16:  # the products themselves are of no interest here, and slow where emulated
        compute_with_half(monkeypatch, native)
        monkeypatch.setattr(products, "_add_product", lambda *_: None)
    size = out.numel() * out.element_size()

    def call() -> None:
        inputs.fusion(out=out)

    call()
    assert 0 < peak_memory(call) <= size
    monkeypatch.setattr(products, "_columns", lambda *_: 4096)
    whole = 4 if not native else out.element_size()
    assert peak_memory(call) >= 5 * (257 + 17 + 32) * 4096 * whole > size  # and it would be seen


def test_blocks_are_no_larger_than_the_tokens() -> None:
    """For every layout: all memory beside the tokens, or the least there may be."""
    for views in (1, 2, 5, 10, 33, 64):
        for grid, repeat in ((1, 1), (4, 2), (6, 3), (16, 1), (16, 4), (32, 2)):
            for width in (1, 97, 640, 2048, 4096, 5120, 8192):
                for token, sum_size, widened in ((4, 4, False), (2, 4, True), (2, 2, False)):
                    shape = products.Shape(views, 32, grid, repeat, width, True, (False, repeat > 1))
                    columns = products._columns(shape, token, sum_size, widened)
                    rows = [count or 0 for count in shape.sum_rows]
                    scratch = 4 * products._SLICE * (max(rows) + columns) if widened else 0
                    limit = max(views * shape.tokens * width * token, products._LEAST)
                    assert 0 < columns <= width
                    assert columns <= 4 * products._BLOCK or sum(rows) * columns * sum_size + scratch <= limit


# --- as a torch op ----------------------------------------------------------------------------------------------------
STRIDED = Case(1, 2, (2, 1), (3, 5), 8, 2, False, "both")


@pytest.mark.parametrize(("case", "tests"), [(SOME, DEFAULT_TEST_UTILS), (STRIDED, ("test_faketensor",))], ids=str)
def test_opcheck(case: Case, tests: tuple[str, ...]) -> None:
    inputs = draw(case)
    ops: Any = torch.ops.sphinx_fast
    given = (inputs.features, inputs.queries, list(inputs.patch), list(inputs.query or ()))
    tags = [tag.flatten() for tag in inputs.tags or ()]
    shape = products.checked_shape(*given, tags)
    out = torch.empty(case.views * shape.tokens, case.width)
    kept, stats = torch.empty(case.views, shape.projected, case.width), torch.empty(case.views, shape.projected, 2)
    first = torch.arange(case.views) * shape.tokens
    ops.fusion(*given, tags, 1e-5, None, out, kept, stats)
    rest = (first, out, kept, stats) if tags else (None, out, None, None)
    torch.library.opcheck(ops.fusion.default, (*given, tags, 1e-5, *rest), test_utils=tests)
    grad = torch.randn(case.views, shape.tokens, case.width)
    wanted = [index > 0 for index in range(len(inputs.features) + (inputs.queries is not None))]
    arguments = (grad, *given, kept, stats, len(tags), wanted)
    torch.library.opcheck(ops.fusion_backward.default, arguments, test_utils=tests)


def test_compiles_without_a_graph_break() -> None:
    inputs = draw(SOME)

    def inference(features: list[Tensor], out: Tensor, first: Tensor) -> Tensor:
        made = inputs._replace(features=features)
        return made.fusion() + made.fusion(out=out, first=first)[3:69].view(3, 22, 97)

    first = torch.tensor([3, 25, 47])
    compiled = torch.compile(inference, fullgraph=True, backend="aot_eager")
    outs = torch.zeros(70, 97), torch.zeros(70, 97)
    assert torch.equal(compiled(inputs.features, outs[0], first), inference(inputs.features, outs[1], first))
    assert torch.equal(*outs)

    def training(features: list[Tensor], patch: Projection, rest: dict[str, Any]) -> Tensor:
        return fusion(features, patch, **rest).square()

    compiled_training = torch.compile(training, fullgraph=True, backend="aot_eager")
    eager, traced = inputs.leaves(), inputs.leaves()
    calls = (compiled_training, traced), (training, eager)
    made, expected = (function(of.features, of.patch, of.arguments()) for function, of in calls)
    grad = torch.randn(made.shape)
    wanted = results(expected, eager, grad)
    for name, result in results(made, traced, grad).items():
        assert torch.equal(result, wanted[name]), name
