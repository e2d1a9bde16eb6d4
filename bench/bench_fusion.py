"""The room fusion: encoder features -> visual tokens, beside what others run for it.

    python bench/bench_fusion.py [--device cuda] [--threads 2] [--save]     # a line per shape and dtype
    pytest bench/bench_fusion.py --benchmark-only                           # the same calls under pytest-benchmark

Full widths: CLIP 1024, ConvNeXt 3072 on a map of 8 x 8, DINOv2 1536 on 16 x 16, 32 queries of 768, D = 4096. Peers:
    reference    the released way: repeat the map, torch.cat, Linear, LayerNorm, cat with queries and tags
    split        the same split as ours in plain torch: three products, the map's repeated after its product
    our gemm     (GPU) ours with the products in our own kernel instead of cuBLAS
    compiled     (GPU) the two above through torch.compile
    products     the products of the real arithmetic alone, in the dtype we compute them in: the roof
Ours writes straight into the tokens. `share` is the roof's time over ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from common import Call, Line, arguments, measure, save
from torch import Tensor

from sphinx_fast.ops import Projection, _fusion_products, fusion
from sphinx_fast.ops._fusion_products import sums_dtype

CHANNELS = (1024, 3072, 1536)
GRID, MAP, QUERIES, QUERY_CHANNELS, WIDTH = 16, 8, 32, 768, 4096
VIEWS = (1, 5, 10)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Inputs(NamedTuple):
    features: list[Tensor]  # [N, 257, 1024], [N, 65, 3072], [N, 257, 1536]
    queries: Tensor
    patch: Projection
    query: Projection
    tags: tuple[Tensor, Tensor]


def inputs(views: int, dtype: torch.dtype, device: str, width: int = WIDTH) -> Inputs:
    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    rows = (1 + GRID**2, 1 + MAP**2, 1 + GRID**2)
    dense = random(views, rows[0], CHANNELS[0] + CHANNELS[2])  # as the tower leaves them: slices of one buffer
    features = [dense[..., : CHANNELS[0]], random(views, rows[1], CHANNELS[1]), dense[..., CHANNELS[0] :]]

    def projection(channels: int) -> Projection:
        return Projection(random(width, channels, scale=channels**-0.5), random(width), random(width), random(width))

    return Inputs(
        features,
        random(views, QUERIES, QUERY_CHANNELS),
        projection(sum(CHANNELS)),
        projection(QUERY_CHANNELS),
        (random(width), random(width)),
    )


def ours(given: Inputs, out: Tensor | None = None) -> Tensor:
    return fusion(given.features, given.patch, queries=given.queries, query=given.query, tags=given.tags, out=out)


def with_our_gemm(given: Inputs, out: Tensor) -> Tensor:
    _fusion_products.own_gemm = True
    try:
        return ours(given, out)
    finally:
        _fusion_products.own_gemm = False


def repeated(rows: Tensor) -> Tensor:
    """[N, 1 + 64, C] -> [N, 1 + 256, C]."""
    ratio = GRID // MAP
    whole = rows[:, 1:].unflatten(1, (MAP, MAP)).repeat_interleave(ratio, 1).repeat_interleave(ratio, 2)
    return torch.cat([rows[:, :1], whole.flatten(1, 2)], 1)


def with_queries_and_tags(given: Inputs, tokens: Tensor) -> Tensor:
    count, query, width = tokens.shape[0], given.query, tokens.shape[-1]
    queries = F.layer_norm(F.linear(given.queries, query.weight, query.bias), (width,), *query[2:])
    start, end = (tag.expand(count, 1, -1) for tag in given.tags)
    return torch.cat([start, queries, tokens, end], 1)


def reference(given: Inputs) -> Tensor:
    clip, convnext, dinov2 = given.features
    x = torch.cat([clip, repeated(convnext), dinov2], -1)
    weight, bias, *norm = given.patch
    return with_queries_and_tags(given, F.layer_norm(F.linear(x, weight, bias), (bias.shape[0],), *norm))


def split(given: Inputs) -> Tensor:
    clip, convnext, dinov2 = given.features
    weight, bias, *norm = given.patch
    parts = weight.split(CHANNELS, 1)
    sums = F.linear(clip, parts[0], bias) + F.linear(dinov2, parts[2]) + repeated(F.linear(convnext, parts[1]))
    return with_queries_and_tags(given, F.layer_norm(sums, (bias.shape[0],), *norm))


def products(given: Inputs) -> Call:
    """The matrix products alone, operands and results in place."""
    dtype = sums_dtype(given.queries) if given.queries.device.type == "cpu" else given.queries.dtype
    clip, convnext, dinov2 = (x.reshape(-1, x.shape[-1]).to(dtype) for x in given.features)
    queries = given.queries.flatten(0, 1).to(dtype)
    parts = [part.T for part in given.patch.weight.to(dtype).split(CHANNELS, 1)]
    of_query = given.query.weight.to(dtype).T
    fine, coarse, rest = (clip @ parts[0], convnext @ parts[1], queries @ of_query)

    def run() -> None:
        torch.mm(clip, parts[0], out=fine)
        fine.addmm_(dinov2, parts[2])
        torch.mm(convnext, parts[1], out=coarse)
        torch.mm(queries, of_query, out=rest)

    return run


def calls_of(views: int, dtype: torch.dtype, device: str, width: int = WIDTH) -> tuple[dict[str, Call], float]:
    """Ours (under the empty name), the peers, and the operations of the products."""
    given = inputs(views, dtype, device, width)
    out = ours(given).flatten(0, 1)
    calls: dict[str, Call] = {
        "": lambda: ours(given, out),
        "reference": lambda: reference(given),
        "split": lambda: split(given),
        "products": products(given),
    }
    if device == "cuda":
        calls["our gemm"] = lambda: with_our_gemm(given, out)
        for name, peer in (("reference", reference), ("split", split)):
            compiled = torch.compile(peer)
            calls[f"{name} compiled"] = lambda compiled=compiled: compiled(given)
    rows = sum(feature.shape[1] * feature.shape[2] for feature in given.features) + QUERIES * QUERY_CHANNELS
    return calls, 2.0 * views * rows * width


@pytest.mark.parametrize("name", ["", "reference", "split", "products"], ids=lambda n: n or "ours")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("views", VIEWS)
def test_fusion(benchmark: Any, views: int, dtype: str, name: str) -> None:
    benchmark.group = f"fusion {views} views {dtype}"
    with torch.inference_mode():
        benchmark(calls_of(views, DTYPES[dtype], "cpu")[0][name])


@torch.inference_mode()
def main() -> None:
    chosen = arguments(__doc__ or "")
    lines: list[Line] = []
    for name, dtype in DTYPES.items():
        for views in VIEWS:
            calls, operations = calls_of(views, dtype, chosen.device)
            lines.append(
                measure("fusion", f"{views} views {name}", calls.pop(""), calls, operations, "products", chosen)
            )
    save(lines, chosen)


if __name__ == "__main__":
    main()
