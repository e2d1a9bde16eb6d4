"""The room fusion from the sums on, without the matrix products: what its loops and kernels are given and must answer.

A test fills in how they are called: the compiled extension, the CUDA kernels on the host, or on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from close import Guarded, assert_close
from fusion_cases import spread
from torch import Tensor

EPS = 1e-5


class Layout(NamedTuple):
    views: int
    queries: int
    grid: int
    repeat: int
    tags: bool
    width: int
    parts: str = "fine"  # fine, coarse or both

    def __str__(self) -> str:
        return f"{self.views}x{self.grid}^2r{self.repeat}-D{self.width}-Q{self.queries}-{self.tags:d}-{self.parts}"

    @property
    def patch_rows(self) -> int:
        return 1 + self.grid**2

    @property
    def coarse_rows(self) -> int:
        return 1 + (self.grid // self.repeat) ** 2

    @property
    def projected(self) -> int:
        return self.queries + self.patch_rows

    @property
    def tokens(self) -> int:
        return self.projected + 2 * self.tags

    def repeated(self, coarse: Tensor) -> Tensor:
        """[views * coarse rows, D] -> [views, patch rows, D]"""
        side = self.grid // self.repeat
        rows = coarse.view(self.views, self.coarse_rows, self.width)
        patches = rows[:, 1:].unflatten(1, (side, side))
        patches = patches.repeat_interleave(self.repeat, 1).repeat_interleave(self.repeat, 2)
        return torch.cat([rows[:, :1], patches.flatten(1, 2)], 1)


LAYOUTS = [
    Layout(1, 0, 1, 1, False, 1),
    Layout(3, 2, 1, 1, True, 5, "both"),
    Layout(2, 1, 2, 2, True, 8, "coarse"),
    Layout(2, 3, 4, 2, True, 31, "both"),
    Layout(1, 0, 4, 4, True, 64, "both"),
    Layout(5, 1, 2, 1, False, 97),
    Layout(2, 0, 6, 3, False, 33, "coarse"),
    Layout(1, 4, 6, 2, True, 640, "both"),
    Layout(3, 2, 4, 1, True, 127, "both"),
]


class Outputs(NamedTuple):
    """Guarded tensors; None where there is nothing to write."""

    named: dict[str, Guarded | None]

    def tensors(self) -> dict[str, Any]:
        return {name: None if one is None else one.tensor for name, one in self.named.items()}

    def check(self) -> dict[str, Any]:
        return {name: None if one is None else one.check(name) for name, one in self.named.items()}


@dataclass
class Sums:
    layout: Layout
    dtype: torch.dtype  # of the tokens
    sums: torch.dtype
    fine: Tensor | None
    coarse: Tensor | None
    queries: Tensor | None
    patch: list[Tensor]  # bias, norm weight, norm bias
    query: list[Tensor] | None
    tags: tuple[Tensor, Tensor] | None
    grad: Tensor

    def to(self, device: str) -> Sums:
        def move(value: Any) -> Any:
            if isinstance(value, (list, tuple)) and not isinstance(value, Layout):
                return type(value)(move(one) for one in value)
            return value.to(device) if isinstance(value, Tensor) else value

        return replace(self, **{name: move(value) for name, value in vars(self).items()})

    def view(self, index: int) -> Sums:
        """View `index` alone."""

        def part(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else rows.chunk(self.layout.views)[index].contiguous()

        one: dict[str, Any] = {name: part(getattr(self, name)) for name in ("fine", "coarse", "queries", "grad")}
        return replace(self, layout=self.layout._replace(views=1), **one)

    # --- what is expected -------------------------------------------------------------------------------------------
    def before_norm(self, compute: torch.dtype) -> Tensor:
        """Sums and biases, [views, projected, D]: `compute`d, fine and coarse first."""
        layout = self.layout
        rows = torch.zeros(layout.views, layout.patch_rows, layout.width, dtype=compute, device=self.grad.device)
        if self.fine is not None:
            rows = self.fine.to(compute).view_as(rows)
        if self.coarse is not None:
            coarse = layout.repeated(self.coarse.to(compute))
            rows = coarse if self.fine is None else rows + coarse
        rows = rows + self.patch[0].to(compute)
        if self.queries is not None and self.query is not None:
            queries = self.queries.to(compute).view(layout.views, layout.queries, -1) + self.query[0].to(compute)
            rows = torch.cat([queries, rows], 1)
        return rows

    def kept(self) -> Tensor:
        """Bit for bit: three roundings, in this order."""
        return self.before_norm(torch.float32).to(self.dtype)

    def norms(self, y: Tensor) -> Tensor:
        """LayerNorm of [views, projected, D] rows, by each kind's weights, in y's dtype."""
        count = self.layout.queries

        def norm(rows: Tensor, vectors: list[Tensor]) -> Tensor:
            weight, shift = (one.to(y.dtype) for one in vectors[1:])
            return F.layer_norm(rows, (self.layout.width,), weight, shift, EPS)

        parts = [norm(y[:, count:], self.patch)]
        if self.query is not None:
            parts.insert(0, norm(y[:, :count], self.query))
        return torch.cat(parts, 1)

    def tagged(self, rows: Tensor) -> Tensor:
        if self.tags is None:
            return rows
        start, end = (tag.to(rows.dtype).expand(len(rows), 1, -1) for tag in self.tags)
        return torch.cat([start, rows, end], 1)

    def stats(self, y: Tensor) -> Tensor:
        return torch.stack([y.mean(-1), (y.var(-1, correction=0) + EPS).rsqrt()], -1)

    # --- forward ----------------------------------------------------------------------------------------------------
    def forward_outputs(self, keep: bool = True) -> Outputs:
        layout, device = self.layout, str(self.grad.device)
        return Outputs({
            "out": Guarded((layout.views * layout.tokens, layout.width), self.dtype, device),
            "kept": Guarded((layout.views, layout.projected, layout.width), self.dtype, device) if keep else None,
            "stats": Guarded((layout.views, layout.projected, 2), torch.float32, device) if keep else None,
        })  # fmt: skip

    def check_forward(self, call: Callable[..., None]) -> None:
        """`call` with outputs to keep and without: everything written, right, and nothing else."""
        outputs = self.forward_outputs()
        call(self, **outputs.tensors())
        made = outputs.check()
        y = self.kept()
        assert torch.equal(made["kept"], y), "kept"
        mean, rstd = made["stats"].double().split(1, -1)  # right when what they make of the rows is
        exact = F.layer_norm(y.double(), y.shape[-1:], eps=EPS)
        plain = F.layer_norm(y.float(), y.shape[-1:], eps=EPS)
        assert_close(((y.double() - mean) * rstd).float(), plain, exact, "stats")
        exact = self.tagged(self.norms(self.before_norm(torch.float64)))
        assert_close(made["out"].view_as(exact), self.tagged(self.norms(y)), exact, "tokens")
        alone = self.forward_outputs(keep=False)
        call(self, **alone.tensors())
        assert torch.equal(alone.check()["out"], made["out"]), "without what the gradient needs"

    # --- backward ---------------------------------------------------------------------------------------------------
    def backward_outputs(self, chunks: int) -> Outputs:
        layout, device = self.layout, str(self.grad.device)

        def like(tensor: Tensor | None) -> Guarded | None:
            return None if tensor is None else Guarded(tensor.shape, self.sums, device)

        def column_sums() -> Guarded:
            return Guarded((chunks, 3, layout.width), torch.float32, device)

        return Outputs({
            "fine": like(self.fine), "coarse": like(self.coarse), "queries": like(self.queries),
            "patch_sums": column_sums(), "query_sums": column_sums() if self.query else None,
        })  # fmt: skip

    def gradients(self, compute: torch.dtype) -> dict[str, Tensor]:
        """What backward makes of the kept rows and the gradient of the tokens, by torch in `compute`."""
        layout, count = self.layout, self.layout.queries
        kinds = {"patch": slice(count, None), **({"query": slice(0, count)} if self.query else {})}
        made: dict[str, Tensor] = {}
        grad = self.grad.to(compute)[:, int(layout.tags) :][:, : layout.projected]
        for kind, rows in kinds.items():
            y = self.kept().to(compute)[:, rows].requires_grad_()
            weight, shift = (one.to(compute).requires_grad_() for one in getattr(self, kind)[1:])
            tokens = F.layer_norm(y, (layout.width,), weight, shift, EPS)
            of_y, of_weight, of_shift = torch.autograd.grad(tokens, (y, weight, shift), grad[:, rows])
            made[f"{kind}_sums"] = torch.stack([of_weight, of_shift, of_y.sum((0, 1))])
            made["queries" if kind == "query" else "fine"] = of_y.flatten(0, 1)
        coarse = torch.zeros(layout.views * layout.coarse_rows, layout.width, dtype=compute).to(grad).requires_grad_()
        repeated = layout.repeated(coarse)
        (made["coarse"],) = torch.autograd.grad(repeated, coarse, made["fine"].view_as(repeated))
        return made

    def check_backward(self, call: Callable[..., None], chunks: int) -> None:
        outputs = self.backward_outputs(chunks)
        kept = self.kept()
        call(self, kept, self.stats(kept.float()), **outputs.tensors())
        plain, exact = self.gradients(torch.float32), self.gradients(torch.float64)
        for name, made in outputs.check().items():
            if made is not None:
                total = made.sum(0) if name.endswith("_sums") else made
                assert_close(total, plain[name].to(total.dtype), exact[name], f"gradient of {name}")


def draw_sums(layout: Layout, dtype: torch.dtype, sums: torch.dtype, seed: int = 0) -> Sums:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(of)

    width, views = layout.width, layout.views

    def vectors() -> list[Tensor]:
        return [spread(width, generator).to(dtype), randn(width), randn(width)]

    return Sums(
        layout,
        dtype,
        sums,
        fine=None if layout.parts == "coarse" else randn(views * layout.patch_rows, width, of=sums),
        coarse=None if layout.parts == "fine" else randn(views * layout.coarse_rows, width, of=sums),
        queries=randn(views * layout.queries, width, of=sums) if layout.queries else None,
        patch=vectors(),
        query=vectors() if layout.queries else None,
        tags=(randn(width), randn(width)) if layout.tags else None,
        grad=randn(views, layout.tokens, width),
    )
