"""The room attention: one decoding step of one layer over visual prefixes, beside what others run for it.

    python bench/bench_attention.py [--device cuda] [--threads 2] [--save]    # a line per shape and dtype
    pytest bench/bench_attention.py --benchmark-only                          # the same calls under pytest-benchmark

32 heads of 128, a new token for every question: rotated, appended, attended to with the prefix of its picture and its
own suffix. The keys and values of 32 layers are rotated (as many as 2 GiB hold), as in a real step, so that no cache
holds them; `resident` uses one layer again and again. Peers get keys that are rotated and appended already:
    sdpa         torch's scaled_dot_product_attention on a cache for each question, prefix and suffix
    rows         one call of it for all questions of a picture as rows on its prefix, without suffixes
    flash, cudnn, flex, flash-attn, flashinfer    (GPU) backends of sdpa, compiled flex_attention, the kvcache calls
                 of flash-attn and FlashInfer where they are installed
The percentage is of the rate at which two buffers are read; to be read are each prefix and each suffix once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from common import Call, Line, arguments, measure, read_ceiling, save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sphinx_fast.ops import KeyValues, Rope, attention, attention_workspace

HEADS, HEAD_DIM, LAYERS, BYTES = 32, 128, 32, 2 << 30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    questions: int
    pictures: int  # the questions are spread evenly
    prefix: int
    suffix: int = 16  # tokens each question holds already
    resident: bool = False

    def __str__(self) -> str:
        shared = "separate" if self.pictures == self.questions else f"on {self.pictures}"
        return f"{self.questions} {shared}, {self.prefix} + {self.suffix}" + (" resident" if self.resident else "")


CPU_CASES = [
    *(
        Case(questions, pictures, 1455)
        for questions, pictures in ((1, 1), (8, 8), (2, 1), (4, 1), (8, 1), (16, 1), (32, 1))
    ),
    *(Case(questions, pictures, 2910) for questions, pictures in ((1, 1), (8, 8), (8, 1), (32, 1))),
    *(Case(questions, 1, 1455, suffix) for questions in (8, 32) for suffix in (0, 64)),
    *(Case(questions, 1, 1455, 16, True) for questions in (1, 8, 32)),
]
GPU_CASES = [
    *(
        Case(questions, pictures, prefix)
        for prefix in (291, 1455, 2910)
        for questions in (1, 2, 4, 5, 8, 16, 32, 64)
        for pictures in sorted({1, questions})
    ),
    Case(1, 1, 1455, 16, True),
    Case(16, 4, 1455),
]


class Layer(NamedTuple):
    """Caches of every question [R, H, S + T + 1, D], and their parts as the kernel takes them."""

    key: Tensor
    value: Tensor
    prefix: KeyValues
    suffix: KeyValues

    def clone(self) -> Layer:
        prefix, suffix = (KeyValues(cache.key.clone(), cache.value.clone(), cache.lengths) for cache in self[2:])
        return Layer(self.key.clone(), self.value.clone(), prefix, suffix)


class Inputs:
    """Tensors of a case; `next` goes from layer to layer."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        self.case, self.each = case, case.questions // case.pictures
        size = torch.finfo(dtype).bits // 8 * HEADS * HEAD_DIM * 2
        positions = case.questions * (case.prefix + case.suffix + 1)
        layers = 1 if case.resident else max(2, min(LAYERS, BYTES // (positions * size)))
        first = self._layer(dtype, device)
        self.layers = [first, *(first.clone() for _ in range(layers - 1))]
        self.turn = itertools.cycle(self.layers)
        shape = (case.questions, HEADS, HEAD_DIM)
        self.query, self.key, self.value = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        angles = torch.outer(torch.arange(case.prefix + case.suffix + 1.0), 10000 ** -(torch.arange(64.0) / 64))
        self.rope = Rope(angles.cos().to(device), angles.sin().to(device))
        self.pictures = torch.arange(case.pictures, dtype=torch.int32).repeat_interleave(self.each).to(device)
        self.out = torch.empty_like(self.query)
        workspace = (*shape, HEADS, case.prefix, case.suffix + 1)
        self.workspace = attention_workspace(*workspace, device=torch.device(device)) if device == "cuda" else None
        own = (case.prefix + case.suffix) if self.each == 1 else case.suffix
        read = case.questions * own + (0 if self.each == 1 else case.pictures * case.prefix)
        self.bytes = float(read * size)

    def _layer(self, dtype: torch.dtype, device: str) -> Layer:
        """A question's suffix follows its prefix in its cache; a shared prefix is that of the picture's first."""
        case = self.case
        shape = (case.questions, HEADS, case.prefix + case.suffix + 1, HEAD_DIM)
        key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        prefixes = KeyValues(*(cache[:: self.each, :, : case.prefix].contiguous() for cache in (key, value)))
        held = torch.full((case.questions,), case.suffix, dtype=torch.int32, device=device)
        suffixes = KeyValues(*(cache[:, :, case.prefix :].contiguous() for cache in (key, value)), held)
        return Layer(key, value, prefixes, suffixes)

    def ours(self) -> Tensor:
        layer = next(self.turn)
        return attention(
            self.query,
            prefix=layer.prefix,
            suffix=layer.suffix,
            key=self.key,
            value=self.value,
            pictures=self.pictures,
            rope=self.rope,
            out=self.out,
            workspace=self.workspace,
        )

    def sdpa(self) -> Tensor:
        layer = next(self.turn)
        return F.scaled_dot_product_attention(self.query[:, :, None], layer.key, layer.value)

    def rows(self) -> Tensor:
        prefix = next(self.turn).prefix
        query = self.query.view(self.case.pictures, self.each, HEADS, HEAD_DIM).transpose(1, 2)
        return F.scaled_dot_product_attention(query, prefix.key, prefix.value)


def with_backend(call: Call, backend: SDPBackend) -> Call:
    def run() -> object:
        with sdpa_kernel(backend):
            return call()

    return run


def gpu_peers(given: Inputs) -> Iterator[tuple[str, Call]]:
    """Those that run here for these shapes."""
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        yield name, with_backend(given.sdpa, backend)
        yield f"{name} rows", with_backend(given.rows, backend)
    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(flex_attention, dynamic=False)

    def run_flex() -> object:
        layer = next(given.turn)
        return flex(given.query[:, :, None], layer.key, layer.value)

    yield "flex", run_flex
    yield from _kvcache_calls(given)


def _kvcache_calls(given: Inputs) -> Iterator[tuple[str, Call]]:
    flat = [
        (layer.key.transpose(1, 2).contiguous(), layer.value.transpose(1, 2).contiguous()) for layer in given.layers
    ]
    turn, length = itertools.cycle(flat), given.case.prefix + given.case.suffix
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        pass
    else:
        new = given.key[:, None], given.value[:, None]
        query = given.query[:, None]

        def run_flash_attn() -> object:
            return flash_attn_with_kvcache(query, *next(turn), *new, cache_seqlens=length)

        yield "flash-attn", run_flash_attn
    try:
        import flashinfer
    except ImportError:
        return
    if given.case.questions == 1:
        yield (
            "flashinfer",
            lambda: flashinfer.single_decode_with_kv_cache(given.query[0], *(cache[0] for cache in next(turn))),
        )


def runs(call: Callable[[], object]) -> bool:
    try:
        call()
    except (RuntimeError, ValueError, TypeError):  # a backend without a kernel for these tensors
        return False
    return True


@pytest.mark.parametrize("name", ["ours", "sdpa", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [Case(1, 1, 1455), Case(8, 1, 1455)], ids=str)
def test_attention(benchmark: Any, case: Case, dtype: str, name: str) -> None:
    benchmark.group = f"attention {case} {dtype}"
    given = Inputs(case, DTYPES[dtype], "cpu")
    with torch.inference_mode():
        benchmark(getattr(given, name))


@torch.inference_mode()
def main() -> None:
    chosen = arguments(__doc__ or "")
    ceiling = read_ceiling(chosen.device)
    print(f"reads: {ceiling:.1f} GB/s")
    lines: list[Line] = []
    for name, dtype in DTYPES.items():
        for case in GPU_CASES if chosen.device == "cuda" else CPU_CASES:
            given = Inputs(case, dtype, chosen.device)
            peers = {"sdpa": given.sdpa, "rows": given.rows}
            if chosen.device == "cuda":
                peers |= {peer: call for peer, call in gpu_peers(given) if runs(call)}
            if case.pictures == case.questions:
                del peers["rows"]
            lines.append(
                measure("attention", f"{case} {name}", given.ours, peers, given.bytes, ceiling, chosen, "reads")
            )
    save(lines, chosen)


if __name__ == "__main__":
    main()
