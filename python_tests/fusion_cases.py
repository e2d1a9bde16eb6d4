"""What the tests of the room fusion share: shapes, drawn inputs, and the formula in plain torch.

Inputs are drawn so that no row's values lie close together: a row of small variance magnifies the rounding of its sums,
ours and torch's alike, and the ratio of two such errors says nothing. Rows that do are tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from close import assert_close
from torch import Tensor

from sphinx_fast.ops import Projection, fusion

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Case(NamedTuple):
    views: int
    grid: int
    ratios: tuple[int, ...]  # of the grid to each encoder's map; 1 is fine
    channels: tuple[int, ...]
    width: int
    queries: int = 0
    tags: bool = False
    layout: str = "plain"  # slices: features of one buffer; transposed: weights; both

    def draws(self, dtype: torch.dtype) -> int:
        """How many to judge together. Where a vector has few values, each the sum of many, its largest error is chance,
        ours as torch's; in half precision the rounding of the result outweighs that."""
        return 1 if dtype != torch.float32 else 8 if self.width < 64 else 3 if self.width < 128 else 1

    def __str__(self) -> str:
        ratios = "".join(map(str, self.ratios))
        return f"{self.views}x{self.grid}^2-{ratios}-D{self.width}-Q{self.queries}-{self.tags:d}-{self.layout}"


CASES = [
    Case(1, 1, (1,), (1,), 1),
    Case(2, 1, (1, 1), (3, 2), 3, 1, True),
    Case(7, 1, (1,), (5,), 8, 0, True),
    Case(3, 2, (2, 1), (4, 3), 8, 0, True),
    Case(5, 2, (1, 2), (7, 5), 31, 2),
    Case(1, 2, (1, 2, 1), (6, 4, 9), 97, 7, True, "slices"),
    Case(7, 4, (1, 2, 1), (8, 16, 3), 64, 3, True),
    Case(1, 4, (4, 1), (5, 9), 97),
    Case(2, 4, (1,), (17,), 31, 5, True, "transposed"),
    Case(3, 4, (2, 2, 1), (5, 6, 7), 8, 2, False, "both"),
    Case(2, 4, (1, 4, 4), (9, 8, 7), 64, 0, True),
    Case(1, 4, (1, 1), (2, 3), 1, 4, True),
    Case(2, 4, (2, 1), (3, 3), 3, 0, False, "slices"),
    Case(3, 6, (1, 3, 1), (6, 7, 8), 31, 1),
    Case(5, 6, (2, 2, 1), (11, 5, 13), 64, 0, True, "slices"),
    Case(1, 6, (3, 1, 3), (8, 8, 8), 97, 2, True),
    Case(2, 6, (1, 6), (9, 4), 8),
    Case(7, 6, (2, 1), (4, 4), 3, 3, True),
    Case(2, 8, (1, 2, 1), (16, 30, 7), 97, 5, True),
    Case(1, 8, (4, 1, 1), (32, 16, 8), 31, 0, True, "both"),
    Case(3, 8, (1, 1, 1), (12, 16, 20), 64, 8, False, "slices"),
    Case(2, 8, (1, 1, 4), (16, 16, 16), 640, 2, True),
    Case(5, 8, (1,), (40,), 8, 6, True),
    Case(1, 16, (1, 4), (12, 20), 64, 3),
    Case(2, 16, (1, 2, 1), (24, 40, 16), 97, 32, True, "slices"),
    Case(1, 16, (2, 1, 2), (8, 8, 8), 31, 0, True, "transposed"),
    Case(3, 16, (1,), (16,), 3, 1),
    Case(1, 16, (1, 2, 1), (12, 24, 16), 640, 5, True, "both"),
    # No narrower: on some processors MKL adds up a product of 8 columns one term after the other, here 4,096.
    Case(1, 8, (1, 2, 1), (16, 32, 16), 4096, 3, True),
]


class Inputs(NamedTuple):
    features: list[Tensor]
    patch: Projection
    queries: Tensor | None
    query: Projection | None
    tags: tuple[Tensor, Tensor] | None

    def named(self) -> dict[str, Tensor]:
        """Every tensor, in the order of `ops.fusion`'s arguments."""
        named = {f"features[{index}]": tensor for index, tensor in enumerate(self.features)}
        named |= {f"patch.{name}": tensor for name, tensor in self.patch._asdict().items()}
        if self.queries is not None and self.query is not None:
            named |= {"queries": self.queries}
            named |= {f"query.{name}": tensor for name, tensor in self.query._asdict().items()}
        if self.tags is not None:
            named |= {"tags[0]": self.tags[0], "tags[1]": self.tags[1]}
        return named

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(
            [change(feature) for feature in self.features],
            Projection(*(change(tensor) for tensor in self.patch)),
            None if self.queries is None else change(self.queries),
            None if self.query is None else Projection(*(change(tensor) for tensor in self.query)),
            None if self.tags is None else (change(self.tags[0]), change(self.tags[1])),
        )

    def leaves(self, dtype: torch.dtype | None = None) -> Inputs:
        """The same values and strides, wanting gradients; in another dtype if asked."""
        return self.map(lambda tensor: tensor.detach().to(dtype or tensor.dtype).requires_grad_())

    def arguments(self) -> dict[str, Any]:
        return {"queries": self.queries, "query": self.query, "tags": self.tags}

    def fusion(self, **rest: Any) -> Tensor:
        return fusion(self.features, self.patch, **self.arguments(), **rest)


def spread(width: int, generator: torch.Generator | None = None) -> Tensor:
    """`width` values in random order, the further apart the fewer they are. As a bias they keep variances up."""
    most = 2 + 12 / width
    return torch.linspace(-most, most, width)[torch.randperm(width, generator=generator)]


def projection(width: int, channels: int, generator: torch.Generator, transposed: bool = False) -> Projection:
    weight = torch.randn(channels, width, generator=generator) / channels**0.5
    weight = weight.T if transposed else weight.T.contiguous()
    norm_weight, norm_bias = torch.randn(2, width, generator=generator)
    return Projection(weight, spread(width, generator), norm_weight.clone(), norm_bias.clone())


def draw(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    rows = [1 + (case.grid // ratio) ** 2 for ratio in case.ratios]
    features = []
    for count, channels in zip(rows, case.channels, strict=True):
        if case.layout in ("slices", "both"):  # from column 3 of a wider buffer, of which nobody else has written a row
            features.append(torch.randn(case.views, count, channels + 8, generator=generator)[..., 3 : 3 + channels])
        else:
            features.append(torch.randn(case.views, count, channels, generator=generator))
    transposed = case.layout in ("transposed", "both")
    inputs = Inputs(
        features,
        projection(case.width, sum(case.channels), generator, transposed),
        torch.randn(case.views, case.queries, 11, generator=generator) if case.queries else None,
        projection(case.width, 11, generator, transposed) if case.queries else None,
        # Learned parameters are [1, 1, D].
        tuple(torch.randn(2, 1, 1, case.width, generator=generator)) if case.tags else None,  # type: ignore[arg-type]
    )
    return inputs.map(lambda tensor: placed(tensor, dtype, device))


def placed(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """A conversion keeps the strides of dense tensors only; a slice's are made again."""
    if tensor.is_contiguous() or tensor.dim() == 2:
        return tensor.to(device, dtype)
    wider = torch.zeros(*tensor.shape[:-1], tensor.stride(-2), dtype=dtype, device=device)
    return wider[..., 3 : 3 + tensor.shape[-1]].copy_(tensor)


def reference(inputs: Inputs, eps: float = 1e-5) -> Tensor:
    """The formula of `ops.fusion`'s docstring, in the inputs' dtype."""
    sides = [round((feature.shape[1] - 1) ** 0.5) for feature in inputs.features]
    whole = []
    for feature, side in zip(inputs.features, sides, strict=True):
        ratio = max(sides) // side
        rows = feature[:, 1:].unflatten(1, (side, side)).repeat_interleave(ratio, 1).repeat_interleave(ratio, 2)
        whole.append(torch.cat([feature[:, :1], rows.flatten(1, 2)], 1))

    def project(x: Tensor, of: Projection) -> Tensor:
        return F.layer_norm(F.linear(x, of.weight, of.bias), of.bias.shape, of.norm_weight, of.norm_bias, eps)

    parts = [project(torch.cat(whole, -1), inputs.patch)]
    if inputs.queries is not None and inputs.query is not None:
        parts.insert(0, project(inputs.queries, inputs.query))
    if inputs.tags is not None:
        start, end = (tag.expand(parts[0].shape[0], 1, -1) for tag in inputs.tags)
        parts = [start, *parts, end]
    return torch.cat(parts, 1)


def whole_numbers(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Features and weights of -1, 0 and 1: the products are exact in every order, so that bits may be compared."""

    def ternary(tensor: Tensor) -> Tensor:
        return (tensor.float() * 1.5).round().clamp(-1, 1).to(tensor.dtype)

    inputs = draw(case, dtype, seed=seed)
    query = None if inputs.query is None else inputs.query._replace(weight=ternary(inputs.query.weight))
    return inputs._replace(
        features=[ternary(feature) for feature in inputs.features],
        patch=inputs.patch._replace(weight=ternary(inputs.patch.weight)),
        queries=None if inputs.queries is None else ternary(inputs.queries),
        query=query,
    )


Results = Mapping[str, Tensor]


def results(tokens: Tensor, inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """The tokens, and the gradients of every input and parameter by name."""
    named = inputs.named()
    gradients = torch.autograd.grad(tokens, list(named.values()), grad.to(tokens.dtype))
    return {"tokens": tokens.detach(), **{f"gradient of {n}": g for n, g in zip(named, gradients, strict=True)}}


def assert_all_close(actual: Sequence[Results], plain: Sequence[Results], exact: Sequence[Results]) -> None:
    """`assert_close` of every result by name, over several draws at once."""
    for name in exact[0]:
        ours, theirs, wanted = (torch.stack([one[name] for one in draws]) for draws in (actual, plain, exact))
        assert_close(ours, theirs, wanted, name)
