"""Keys and values of many sequences side by side, as the room attention reads them.

Two pools serve an engine: one of prefixes, which questions share, and one of suffixes, one for each question. A pool
is one tensor a layer for keys and one for values, [slots, K, capacity, D]. It learns the shapes from the first keys
that come, and grows by copying when slots or positions run out.

Names of shapes: K heads of keys, D head_dim.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Hashable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from sphinx_fast.ops import KeyValues

_CLOCK = itertools.count()


class Slot:
    """The place of one sequence in a pool, until the pool needs it for another.

    Who wants to keep the sequence keeps the slot: a slot nobody refers to is free. `hold` and `release` go around
    computing with it; a slot that nobody holds may be given to another sequence, and is not `intact` from then on.

    Attributes:
        index: in the pool.
        length: positions whose keys and values are there.
        key: what they depend on beside the ids; equal keys and ids mean equal keys and values.
        ids: token ids of these positions, where the owner wants to find them again.
        taken: it was given to another sequence.
        holders: how many compute with it.
        last_used: larger than that of slots that were last held before.
    """

    def __init__(self, pool: Pool, index: int) -> None:
        self._pool, self.index = weakref.ref(pool), index  # who keeps a slot of an engine that is gone keeps no memory
        self.length = 0
        self.key: Hashable = None
        self.ids: Sequence[int] = ()
        self.taken = False
        self.holders = 0
        self.last_used = next(_CLOCK)

    def hold(self) -> Slot:
        """Nobody else gets this place until `release`."""
        self.holders += 1
        self.last_used = next(_CLOCK)
        return self

    def release(self) -> None:
        """The inverse of `hold`."""
        self.holders -= 1

    @property
    def pool(self) -> Pool:
        """Where it lies."""
        pool = self._pool()
        assert pool is not None
        return pool

    @property
    def intact(self) -> bool:
        """Whether its sequence is still there."""
        return not self.taken and self._pool() is not None

    @property
    def nbytes(self) -> int:
        """Memory of one slot."""
        return self.pool.slot_bytes


class Pool:
    """Slots for the keys and values of sequences, of all layers.

    Args:
        most: slots there may be.
        capacity: positions of a slot to begin with.
        device: of `lengths`. Keys and values lie where the layers put them.
        worth: bytes up to which the pool grows rather than give away sequences that are kept but not held.
    """

    def __init__(self, most: int, capacity: int, device: torch.device, worth: float = math.inf) -> None:
        self.most, self.capacity, self.device, self.worth = most, capacity, device, worth
        self.slots = 0
        self.lengths = torch.zeros(0, dtype=torch.int32, device=device)
        self.generation = 0  # grows when tensors are replaced: recordings of older ones are void
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._owners: list[weakref.ref[Slot] | None] = []

    @property
    def slot_bytes(self) -> int:
        """Memory of one slot; 0 until the first keys came."""
        return sum(tensor.nbytes for layer in self._layers.values() for tensor in layer) // max(1, self.slots)

    def take(self) -> Slot | None:
        """A place for a new sequence, held; None: all are held and there may be no more."""
        owners = [None if owner is None else owner() for owner in self._owners]
        index = next((i for i, owner in enumerate(owners) if owner is None), None)
        if index is None and (self.slots + 1) * self.slot_bytes <= self.worth and self._grow_slots():
            index = len(owners)
        if index is None:
            idle = [owner for owner in owners if owner is not None and not owner.holders]
            if idle:
                oldest = min(idle, key=lambda slot: slot.last_used)
                oldest.taken, index = True, oldest.index
            elif self._grow_slots():
                index = len(owners)
        if index is None:
            return None
        slot = Slot(self, index)
        self._owners[index] = weakref.ref(slot)
        return slot.hold()

    def reserve(self, positions: int) -> None:
        """Room for that many positions in every slot.

        Raises:
            torch.OutOfMemoryError: there is none; nothing has changed.
        """
        if positions > self.capacity:
            enough = -(-positions // 64) * 64
            if 2 * self.capacity > enough:  # doubling copies every position at most twice in the long run
                with suppress(torch.OutOfMemoryError):
                    return self._resize(self.slots, 2 * self.capacity)
            self._resize(self.slots, enough)

    def set_length(self, slot: Slot, length: int) -> None:
        """How many positions of a slot are valid, on the device too."""
        slot.length = length
        self.lengths[slot.index] = length

    def layer(self, index: int, *like: Tensor) -> KeyValues | None:
        """A layer's keys, values and lengths; made like these [.., K, n, D] where there are none yet, else None."""
        found = self._layers.get(index)
        if found is None:
            if not like:
                return None
            key, value = (
                _memory((self.slots, tensor.shape[-3], self.capacity, tensor.shape[-1]), tensor) for tensor in like
            )
            found = self._layers[index] = (key, value)
        return KeyValues(*found, self.lengths)

    def write(self, index: int, slot: Slot, start: int, key: Tensor, value: Tensor) -> None:
        """Keys and values [K, n, D] of positions `start` and on."""
        layer = self.layer(index, key, value)
        assert layer is not None
        for held, new in ((layer.key, key), (layer.value, value)):
            held[slot.index, :, start : start + new.shape[1]] = new

    def read(self, index: int, slot: Slot, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [K, length, D] of a slot's first positions, views of the pool."""
        key, value = self._layers[index]
        return key[slot.index, :, :length], value[slot.index, :, :length]

    def _grow_slots(self) -> bool:
        """Twice as many slots, but no more bytes than they are worth; or one more, also where memory is short."""
        paid = self.worth // self.slot_bytes if self.slot_bytes else math.inf
        for slots in (int(min(self.most, max(1, 2 * self.slots), paid)), self.slots + 1):
            if self.slots < slots <= self.most:
                try:
                    self._resize(slots, self.capacity)
                    return True
                except torch.OutOfMemoryError:
                    if self.slots == 0:
                        raise
        return False

    def _resize(self, slots: int, capacity: int) -> None:
        grown = {}
        for index, layer in self._layers.items():
            key, value = (_memory((slots, old.shape[1], capacity, old.shape[3]), old) for old in layer)
            grown[index] = (key, value)
        for index, (key, value) in self._layers.items():
            for new, old in zip(grown[index], (key, value), strict=True):
                new[: self.slots, :, : self.capacity] = old
        with torch.inference_mode(False):
            lengths = torch.zeros(slots, dtype=torch.int32, device=self.device)
        lengths[: self.slots] = self.lengths
        self._owners += [None] * (slots - self.slots)
        self._layers, self.lengths, self.slots, self.capacity = grown, lengths, slots, capacity
        self.generation += 1


def _memory(shape: Sequence[int], like: Tensor) -> Tensor:
    with torch.inference_mode(False):  # written to in many calls, also by those who do not infer
        return torch.empty(shape, dtype=like.dtype, device=like.device)
