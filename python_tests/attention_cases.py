"""What the tests of the room attention share: cases, drawn inputs, the formula in plain torch, how results are judged.

Beyond a slot's length every cache holds nan, so that whoever reads there is seen. Queries are drawn so that no position
gets most of a row's weight: such a row magnifies the rounding of its largest scores, ours and torch's alike, and the
ratio of two such errors says nothing. Rows that do are tests of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from close import GUARD, Guarded, assert_close
from torch import Tensor

from sphinx_fast.ops import KeyValues, Rope, attention, extension

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def bits(tensor: Tensor) -> Tensor:
    """What may be compared where nan stands."""
    return tensor.contiguous().view(BITS[tensor.dtype])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def indices(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


# --- the formula ------------------------------------------------------------------------------------------------------
class Results(NamedTuple):
    out: Tensor  # [R, H, D]
    lse: Tensor  # [R, H]
    keys: Tensor | None  # [R, K, D], rotated, as appended


def rotate(heads: Tensor, rope: Rope | None, position: int) -> Tensor:
    """[.., D] as Hugging Face's Llama does it, in the dtype of `heads`."""
    if rope is None:
        return heads
    cos, sin = (table[position].to(heads.dtype) for table in rope[:2])
    count = 2 * len(cos)
    turned, rest = heads[..., :count], heads[..., count:]
    if rope.interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
        return torch.cat([pairs.flatten(-2), rest], -1)
    first, second = turned.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def reference(
    query: Tensor,
    *,
    prefix: KeyValues | None = None,
    suffix: KeyValues | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    pictures: Tensor | None = None,
    questions: Tensor | None = None,
    positions: Tensor | None = None,
    rope: Rope | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Results:
    """The docstring's formula, row for row in `dtype`. Writes nothing."""
    rows, heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    exact = dtype if dtype == torch.float64 else torch.float32  # of the scores whose logarithm is wanted
    out, lse = torch.zeros(query.shape, dtype=dtype), torch.full((rows, heads), -math.inf, dtype=exact)
    appended = None if key is None else torch.zeros(key.shape, dtype=dtype)
    for r in range(rows):
        caches, lengths = [], []
        for cache, slots in ((prefix, pictures), (suffix, questions)):
            slot = r if slots is None else int(slots[r])
            if cache is None or slot < 0:
                caches.append(torch.zeros(2, 1 if cache is None else cache.key.shape[1], 0, head_dim, dtype=dtype))
                lengths.append(0)
                continue
            lengths.append(cache.key.shape[2] if cache.lengths is None else int(cache.lengths[slot]))
            caches.append(torch.stack([part[slot, :, : lengths[-1]].to(dtype) for part in cache[:2]]))
        position = sum(lengths) if positions is None else int(positions[r])
        kept = torch.ones(lengths[0], dtype=torch.bool) if mask is None else mask[r, : lengths[0]].bool()
        kept = F.pad(kept, (0, lengths[1] + (key is not None)), value=True)
        if key is not None and value is not None and appended is not None:
            appended[r] = rotate(key[r].to(dtype), rope, position)
            caches.append(torch.stack([appended[r], value[r].to(dtype)])[:, :, None])
        keys, values = torch.cat([cache for cache in caches if cache.shape[2]] or caches[:1], 2)[:, :, kept]
        if not len(keys[0]):
            continue
        turned = rotate(query[r].to(dtype), rope, position)
        out[r] = F.scaled_dot_product_attention(turned[:, None], keys, values, scale=scale, enable_gqa=True)[:, 0]
        of_group = keys.to(exact).repeat_interleave(heads // len(keys), 0)
        lse[r] = torch.logsumexp((turned.to(exact)[:, None] * scale @ of_group.mT)[:, 0], -1)
    return Results(out, lse, appended)


# --- what is asked ----------------------------------------------------------------------------------------------------
class Case(NamedTuple):
    """Lengths per slot, of the suffix before the new token; None: no such cache."""

    heads: int
    kv_heads: int
    head_dim: int
    prefix: tuple[int, ...] | None = None
    suffix: tuple[int, ...] | None = None
    pictures: tuple[int, ...] | None = None
    questions: tuple[int, ...] | None = None
    rope: str = ""  # halves, interleaved; with "partial": of a half of the head only
    mask: str = ""  # some, tiles, or a row of nothing
    layout: str = (
        "plain"  # fused: heads of wider buffers; pool: one for all layers' caches; transposed: positions first
    )
    appends: bool = True
    spare: int = 3  # positions that no slot of a cache uses; 0: none, and full caches may do without lengths
    scale: float | None = None
    positions: bool = False

    @property
    def rows(self) -> int:
        for slots in (self.questions, self.pictures, self.suffix, self.prefix):
            if slots is not None:
                return len(slots)
        raise AssertionError("neither prefix nor suffix")

    @property
    def draws(self) -> int:
        """How many to judge at once."""
        return max(1, 48 // max(1, self.rows * self.heads))

    def __str__(self) -> str:
        def text(slots: tuple[int, ...] | None) -> str:
            return "none" if slots is None else ".".join(map(str, slots)) if len(slots) < 6 else f"{len(slots)}of"

        parts = [f"{self.heads}x{self.kv_heads}x{self.head_dim}", text(self.prefix), text(self.suffix)]
        parts += [f"p{text(self.pictures)}"] if self.pictures is not None else []
        parts += [self.rope.replace(" ", "-"), self.mask, self.layout if self.layout != "plain" else ""]
        return "-".join(part for part in parts if part)


def together(results: Iterable[Results]) -> Results:
    """Judged at once. The largest error of few numbers is chance, ours as torch's."""
    outs, lses, keys = zip(*results, strict=True)
    return Results(torch.cat(outs), torch.cat(lses), None if keys[0] is None else torch.cat(keys))


class Cache:
    """Keys and values in one piece of memory with a guard on both sides."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        kv_heads: int,
        capacity: int,
        head_dim: int,
        layout: str,
        has_lengths: bool = True,
    ) -> None:
        self.layout, slots = layout, len(lengths)
        self.lengths = indices(lengths) if has_lengths else None
        self.shape = {
            "plain": (2, slots, kv_heads, capacity, head_dim),
            "fused": (slots, kv_heads, 2, capacity, head_dim),
            "pool": (slots, 3, 2, kv_heads, capacity, head_dim),  # of three layers this is the second
            "transposed": (2, slots, capacity, kv_heads, head_dim),
        }[layout]
        self.memory = torch.empty(0)

    def filled(self, lengths: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Cache:
        self.memory = torch.randn(math.prod(self.shape) + 2 * GUARD, generator=generator).to(dtype)
        for tensor in self.tensors()[:2]:
            for slot, length in enumerate(lengths):
                tensor[slot, :, length:] = math.nan
        return self

    def tensors(self) -> KeyValues:
        inner = self.memory[GUARD : len(self.memory) - GUARD].view(self.shape)
        both = {
            "plain": lambda: (inner[0], inner[1]),
            "fused": lambda: (inner[:, :, 0], inner[:, :, 1]),
            "pool": lambda: (inner[:, 1, 0], inner[:, 1, 1]),
            "transposed": lambda: (inner[0].transpose(1, 2), inner[1].transpose(1, 2)),
        }[self.layout]()
        return KeyValues(*both, self.lengths)

    def copy(self) -> Cache:
        made = object.__new__(Cache)
        made.__dict__ |= self.__dict__
        made.memory = self.memory.clone()
        return made


@dataclasses.dataclass
class Inputs:
    query: Tensor
    prefix: Cache | None
    suffix: Cache | None
    key: Tensor | None
    value: Tensor | None
    pictures: Tensor | None
    questions: Tensor | None
    positions: Tensor | None
    rope: Rope | None
    mask: Tensor | None
    scale: float | None

    def arguments(self) -> dict[str, Any]:
        """Of `ops.attention`, but the query."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "query"}
        return given | {name: cache and cache.tensors() for name, cache in self.caches().items()}

    def caches(self) -> dict[str, Cache | None]:
        return {"prefix": self.prefix, "suffix": self.suffix}

    def reference(self, dtype: torch.dtype = torch.float64) -> Results:
        return reference(self.query, **self.arguments(), dtype=dtype)

    def copy(self) -> Inputs:
        """With caches of its own."""
        return dataclasses.replace(
            self, prefix=self.prefix and self.prefix.copy(), suffix=self.suffix and self.suffix.copy()
        )

    def only(self, *rows: int) -> Inputs:
        """The same rows in another batch, with the same caches copied."""
        chosen = list(rows)
        pick: dict[str, Any] = {
            name: tensor if tensor is None else tensor[chosen]
            for name, tensor in self.arguments().items()
            if name in ("key", "value", "pictures", "questions", "positions", "mask")
        }
        for name, cache in (("pictures", self.prefix), ("questions", self.suffix)):
            if cache is not None and pick[name] is None:
                pick[name] = indices(chosen)
        return dataclasses.replace(self.copy(), query=self.query[chosen], **pick)

    def run(self, isa: str | None = None, threads: int | None = None, layout: str = "plain") -> Results:
        """Ours, in guarded memory, the caches copied and looked at afterwards. Without `isa`: through the op."""
        given, shape = self.copy(), self.query.shape
        wide = layout != "plain"
        out = Guarded(
            (shape[0], shape[1] + 2 * wide, shape[2] + 16 * wide), self.query.dtype, fill=7.0 if wide else None
        )
        mine = out.tensor[:, 1:-1, 8:-8] if wide else out.tensor
        lse = Guarded(shape[:2], torch.float32)
        if isa is None:
            assert attention(given.query, **given.arguments(), out=mine, lse=lse.tensor) is mine
        else:
            raw(given, out=mine, lse=lse.tensor, isa=isa, threads=threads or torch.get_num_threads())
        made = mine.clone()
        mine.fill_(7.0)
        assert not wide or (out.tensor == 7.0).all(), "out: memory around the rows was written"
        out.check("out")
        kept, lse.tensor[:] = lse.tensor.clone(), 0.0
        lse.check("lse")
        return Results(made, kept, self.appended_by(given))

    def appended_by(self, given: Inputs) -> Tensor | None:
        """The new keys, after asserting that they and the values are all that was written to the caches."""
        if self.prefix is not None and given.prefix is not None:
            assert same_bits(given.prefix.memory, self.prefix.memory), "the prefix was written"
        if self.suffix is None or given.suffix is None:
            return None
        expected, found = self.suffix.copy(), given.suffix.tensors()
        keys = None if self.key is None else torch.empty_like(self.key, memory_format=torch.contiguous_format)
        for r in range(len(self.query) if keys is not None else 0):
            slot = r if self.questions is None else int(self.questions[r])
            assert found.lengths is not None and keys is not None and self.value is not None
            at = slot, slice(None), int(found.lengths[slot])
            keys[r] = expected.tensors().key[at] = found.key[at]
            expected.tensors().value[at] = self.value[r]
        assert same_bits(given.suffix.memory, expected.memory), "the suffix beside the new positions was written"
        return keys


def raw(given: Inputs, out: Tensor, lse: Tensor | None = None, **rest: Any) -> None:
    """Through the compiled function."""
    extension().attention(given.query, **(flat(given.query, **given.arguments(), out=out, lse=lse) | rest))


def flat(
    query: Tensor,
    *,
    prefix: KeyValues | None,
    suffix: KeyValues | None,
    rope: Rope | None,
    mask: Tensor | None,
    scale: float | None,
    **rest: Any,
) -> dict[str, Any]:
    """The compiled function's arguments, but the query, from the op's."""
    cos, sin, interleaved = rope or (None, None, False)
    made: dict[str, Any] = {
        "cos": cos,
        "sin": sin,
        "interleaved": interleaved,
        "partial": None,
        "arrived": None,
        "isa": None,
    }
    for name, cache in (("prefix", prefix), ("suffix", suffix)):
        made |= zip((f"{name}_key", f"{name}_value", f"{name}_lengths"), cache or (None,) * 3, strict=True)
    made |= {"mask": None if mask is None else mask.view(torch.uint8), "threads": torch.get_num_threads()}
    return made | {"scale": query.shape[-1] ** -0.5 if scale is None else scale} | rest


def angles(case: Case, generator: torch.Generator) -> Rope | None:
    if not case.rope:
        return None
    half = case.head_dim // (4 if "partial" in case.rope else 2)
    longest = max(case.prefix or (0,)) + max(case.suffix or (0,)) + 9
    turns = torch.rand(longest, half, generator=generator) * 6
    return Rope(turns.cos(), turns.sin(), "interleaved" in case.rope)


def drawn_mask(case: Case, capacity: int, generator: torch.Generator) -> Tensor | None:
    if not case.mask:
        return None
    mask = torch.rand(case.rows, capacity + 5, generator=generator) < 0.6
    if case.mask == "tiles":
        mask[:, 40:135] = False  # nobody wants the second tile
        mask[1:, :64] = False  # only one wants some of the first
    if case.mask == "nothing":
        mask[case.rows // 2] = False
    return mask[:, 2 : 2 + capacity]


def draw(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    rows, count = case.rows, case.heads + 2 * case.kv_heads
    if case.layout == "fused":
        heads = torch.randn(rows, count * case.head_dim, generator=generator).to(dtype).view(rows, count, case.head_dim)
    elif case.layout == "transposed":
        heads = torch.randn(count, rows, case.head_dim + 8, generator=generator).to(dtype)[..., 3:-5].transpose(0, 1)
    else:
        heads = torch.randn(rows, count, case.head_dim, generator=generator).to(dtype)
    heads[:, : case.heads] *= 0.5
    query, key, value = heads.split([case.heads, case.kv_heads, case.kv_heads], 1)
    if case.layout == "plain":
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()

    def cache(lengths: tuple[int, ...] | None, room: int) -> Cache | None:
        if lengths is None:
            return None
        shape = case.kv_heads, max(lengths, default=0) + room, case.head_dim
        made = Cache(lengths, *shape, case.layout, has_lengths=room > 0 or len(set(lengths)) > 1)
        return made.filled(lengths, dtype, generator)

    prefix, suffix = cache(case.prefix, case.spare), cache(case.suffix, case.spare + case.appends)
    appends = case.appends and suffix is not None
    rope = angles(case, generator)
    positions = torch.randint(0, len(rope.cos), (rows,), generator=generator).int() if case.positions and rope else None
    return Inputs(
        query, prefix, suffix, key if appends else None, value if appends else None,
        None if case.pictures is None else indices(case.pictures),
        None if case.questions is None else indices(case.questions),
        positions, rope, drawn_mask(case, prefix.tensors().key.shape[2], generator) if prefix else None, case.scale,
    )  # fmt: skip


# --- how results are judged -------------------------------------------------------------------------------------------
def assert_results_close(made: Results, plain: Results, exact: Results, name: str = "") -> None:
    """By the rule of close.py. A row of nothing has an lse of -inf, and zeros."""
    nothing = exact.lse == -math.inf
    assert torch.equal(made.lse == -math.inf, nothing), f"{name}: which rows attend to nothing"
    assert not made.out[nothing].any(), f"{name}: a row of nothing gives zeros"
    assert_close(made.out, plain.out, exact.out, f"{name} out")
    ours, theirs, wanted = (one.lse.masked_fill(nothing, 0.0) for one in (made, plain, exact))
    assert_close(ours, theirs, wanted, f"{name} lse")
    if made.keys is not None and plain.keys is not None and exact.keys is not None:
        assert_close(made.keys, plain.keys, exact.keys, f"{name} appended keys")
