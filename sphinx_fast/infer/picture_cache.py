"""What a picture costs once, kept while it fits, for every later question about the same pixels: its visual tokens, and
the language model's keys and values over them (a `Slot` of model/cache.py).

A key is the content, the size, how the picture is cut, and the model. Content means decoded pixels: a path, the bytes
of a file, a PIL picture and an array of one picture meet, and a file that was overwritten does not. The price of a hit
is therefore decoding, hashing (BLAKE2b) and a look at where the weights lie, against encoders of 3.4 billion weights
that run over every view.

Tokens are handed out without a copy, to every caller the same tensor, so they are read-only by contract: who wants to
change them clones them. An entry that was written to all the same is noticed by its version counter and not handed out
again. Tokens are ready for the CUDA stream they were made on; who computes on another one waits for that first.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# A picture of sphinx-1k has 1,455 x 5,120 visual tokens in bf16, 14.9 MB, and a prefix of 1.2 GB in a 13B; one of
# sphinx-tiny-1k a prefix of 29 MB (weights/memory.py computes them). What is kept fills only as pictures come.
DEFAULT_BYTES = 2**30


class PictureKey(NamedTuple):
    """Which tokens: equal keys mean equal tokens. `mode` is the image processor's, `model` from `ModelIdentity`."""

    content: bytes
    size: tuple[int, int]  # [h, w]: the pixels of 2 x 8 and 4 x 4 can be the same bytes
    mode: Hashable
    model: int

    @classmethod
    def of(cls, picture: np.ndarray | Tensor, mode: Hashable, model: int) -> PictureKey:
        """The key of a uint8 picture [h, w, 3]. One on a GPU is copied to the host to be hashed."""
        pixels = picture.cpu().numpy() if isinstance(picture, Tensor) else picture
        # A cryptographic hash: pictures come from strangers, and none may be made to meet another's tokens.
        content = hashlib.blake2b(np.ascontiguousarray(pixels).reshape(-1).data, digest_size=32).digest()
        return cls(content, (picture.shape[0], picture.shape[1]), mode, model)


def _own(tensor: Tensor) -> Tensor:
    """A tensor to keep; copied where it would keep something larger alive (one picture of a batch) or has no version.

    Tensors of inference mode have none, and writing to one outside raises only after it was written. The copy is what
    a new picture pays: 15 MB beside the encoders.
    """
    if tensor.is_inference() or tensor.untyped_storage().nbytes() > tensor.nbytes:
        with torch.inference_mode(False), torch.no_grad():
            return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


class Entry(Protocol):
    """What a cache keeps."""

    @property
    def nbytes(self) -> int:
        """Memory it takes."""

    @property
    def intact(self) -> bool:
        """Whether it is still what it was when it was kept."""


@dataclass(frozen=True, eq=False)
class PictureEntry:
    """Visual tokens of a picture, [V, tokens_per_view, D]; `nbytes` is the memory they hold."""

    visual_tokens: Tensor
    nbytes: int = field(init=False)
    version: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "visual_tokens", _own(self.visual_tokens))
        object.__setattr__(self, "nbytes", self.visual_tokens.untyped_storage().nbytes())
        object.__setattr__(self, "version", self.visual_tokens._version)

    @property
    def intact(self) -> bool:
        """Nobody wrote to it (through `.data` or numpy it could not be seen)."""
        return self.version == self.visual_tokens._version


class PictureCacheStats(NamedTuple):
    """Counts since the cache was made, and what it holds now."""

    hits: int
    misses: int
    evictions: int
    bytes: int
    entries: int


class PictureCache:
    """Entries of at most `max_bytes` together; the least recently used go first. Threads and models may share one.

    Evicting lets go of an entry: its memory is free once no conversation uses it any more, a prefix's for the next one.

    Args:
        max_bytes: the bound; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 0:
            raise ValueError(f"picture_cache: expected a number of bytes, 0 or more, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self.cleared = 0  # how often: part of the keys of what others keep beside the cache
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, tuple[Entry, int]] = OrderedDict()  # the next to go first
        self._bytes = self._hits = self._misses = self._evictions = 0

    @classmethod
    def of(cls, cache: PictureCache | int) -> PictureCache:
        """A cache as it is; a number as a new one of that many bytes."""
        return cache if isinstance(cache, PictureCache) else cls(cache)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is an empty cache with the same bound."""
        return type(self), (self.max_bytes,)

    # Between a miss and its put no lock is held: threads that meet at a new picture all compute it, the last one's
    # entry stays, and each goes on with tokens of its own. Waiting for one another would cost more than it saves.
    def get(self, key: Hashable, missed: bool = True) -> Entry | None:
        """The entry, from now on the most recently used, or None. With `missed` that counts as a miss."""
        with self._lock:
            entry, nbytes = self._entries.get(key, (None, 0))
            if entry is not None and entry.intact:
                self._hits += 1
                self._entries.move_to_end(key)
                return entry
            if entry is not None:
                self._bytes -= nbytes
                del self._entries[key]
            self._misses += missed
            return None

    def put(self, key: Hashable, entry: Entry) -> None:
        """Keep an entry in place of one with the same key. One larger than the whole cache changes nothing."""
        nbytes = entry.nbytes  # now: a pool may grow, and its slots with it
        if nbytes > self.max_bytes:
            return
        with self._lock:
            self._bytes -= self._entries.pop(key, (None, 0))[1]
            while self._bytes + nbytes > self.max_bytes:
                _, (_, oldest) = self._entries.popitem(last=False)
                self._bytes -= oldest
                self._evictions += 1
            self._entries[key] = (entry, nbytes)
            self._bytes += nbytes

    def clear(self) -> None:
        """Let go of every entry. The counts go on."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0
            self.cleared += 1

    def stats(self) -> PictureCacheStats:
        """Counts and contents at one moment."""
        with self._lock:
            return PictureCacheStats(self._hits, self._misses, self._evictions, self._bytes, len(self._entries))


_NUMBERS = itertools.count(1)
_STEPS = itertools.count(1)
_last_step = 0


def _note_step(*_: Any) -> None:
    global _last_step
    _last_step = next(_STEPS)


@cache
def _watch_optimizers() -> None:
    """Fused optimizers write weights without raising their version counters, so any step of any optimizer counts."""
    register_optimizer_step_post_hook(_note_step)


class WeightsState(NamedTuple):
    """Where the tensors of some modules lie, and how often they were written to."""

    addresses: list[int]
    versions: list[int]


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a wrapper without memory of its own
        return id(tensor)


def weights_state(*modules: nn.Module) -> WeightsState | None:
    """What a change of weights changes, read from every parameter and buffer; None in training mode.

    Seen: load_state_dict, writes in place, optimizer steps, another dtype or device, exchanged modules and parameters.
    Not seen: writes through `.data`, to tensors made in inference mode or to weights that are offloaded, and changes
    of the configuration; `PictureCache.clear` is for those. It reads no data, so a GPU need not wait.
    """
    _watch_optimizers()
    tensors: list[Tensor | None] = []
    found: list[nn.Module | None] = [*modules]
    for module in found:  # grows on the way, faster than modules() and parameters()
        if module is None:
            continue
        if module.training:
            return None  # dropout draws: no two passes give the same tokens
        if module._modules:
            found.extend(module._modules.values())
        if module._parameters:
            tensors.extend(module._parameters.values())
        if module._buffers:
            tensors.extend(module._buffers.values())
    held = [tensor for tensor in tensors if tensor is not None]
    try:
        return WeightsState([*map(Tensor.data_ptr, held)], [_last_step, *map(attrgetter("_version"), held)])
    except RuntimeError:  # tensors of inference mode have no version
        versions = (0 if tensor.is_inference() else tensor._version for tensor in held)
        return WeightsState([*map(_address, held)], [_last_step, *versions])


class ModelIdentity:
    """Numbers for a model as it is now: none was given before, to this model with other weights or to another one.

    Old numbers never return, so entries of past weights and of models that are gone are not found again; they leave
    the cache as the least recently used, or with `clear`.
    """

    def __init__(self) -> None:
        self._last: tuple[WeightsState, int] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy belongs to another model."""
        return type(self), ()

    # `_last` is read once and replaced whole: state and number belong together, whatever other threads do.
    def current(self, *modules: nn.Module) -> int | None:
        """The number of these modules' weights, to be asked before they run; None in training mode."""
        state, last = weights_state(*modules), self._last
        if state is None:
            return None
        if last is None or last[0] != state:
            last = self._last = (state, next(_NUMBERS))
        return last[1]

    def after(self, number: int, *modules: nn.Module) -> None:
        """Let weights that ran under `number` keep it if they were only moved meanwhile.

        Encoders may lay weights side by side when they first run. Weights that were written to get the next number,
        and what was computed of them is not found again.
        """
        state, last = weights_state(*modules), self._last
        if state is not None and last is not None and last[1] == number and last[0].versions == state.versions:
            self._last = (state, number)
