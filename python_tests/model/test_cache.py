"""Places for keys and values: who gets which, what is given away first, and that growing forgets nothing."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from sphinx_fast.model import cache
from sphinx_fast.model.cache import Pool, Slot

CPU = torch.device("cpu")
HEADS, WIDE, NARROW = 2, 4, 3  # of keys, of values: the pool must not take one for the other


def pool(most: int = 8, capacity: int = 4, worth: float = math.inf) -> Pool:
    return Pool(most, capacity, CPU, worth)


def drawn(length: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, length, width, generator=generator).to(dtype)


def fill(places: Pool, slot: Slot, start: int, length: int, seed: int, layers: Sequence[int] = (0, 3)) -> None:
    for layer in layers:
        places.write(layer, slot, start, drawn(length, WIDE, seed + layer), drawn(length, NARROW, seed + 50 + layer))
    places.set_length(slot, start + length)


def holds(places: Pool, slot: Slot, start: int, length: int, seed: int, layers: Sequence[int] = (0, 3)) -> bool:
    same = slot.length >= start + length and int(places.lengths[slot.index]) == slot.length
    for layer in layers:
        key, value = places.read(layer, slot, start + length)
        same &= torch.equal(key[:, start:], drawn(length, WIDE, seed + layer))
        same &= torch.equal(value[:, start:], drawn(length, NARROW, seed + 50 + layer))
    return same


def taken(places: Pool) -> Slot:
    slot = places.take()
    assert slot is not None
    return slot


def test_a_slot_is_given_held_to_one_only() -> None:
    places = pool(most=5)
    slots = [taken(places) for _ in range(5)]
    assert sorted(slot.index for slot in slots) == list(range(5)) and all(slot.holders for slot in slots)
    assert places.take() is None and places.slots == 5
    assert all(slot.intact for slot in slots)


def test_a_slot_nobody_refers_to_is_free_even_if_it_was_held() -> None:
    places = pool(most=2)
    first, second = taken(places), taken(places)
    first_index = first.index
    del first
    third = taken(places)
    assert third.index == first_index and third.length == 0 and third.key is None and third.ids == ()
    assert second.intact and places.take() is None


def test_free_places_come_before_growing_and_growing_before_giving_away() -> None:
    places = pool(most=4)
    slots = [taken(places), taken(places)]
    slots[0].release()
    slots.append(taken(places))  # grows, as far as that is worth it
    assert places.slots == 4 and slots[0].intact
    dead = slots.pop(1).index
    new = taken(places)
    last = taken(places)
    assert new.index == dead and last.index == 3
    assert slots[0].intact, "there were places that nobody kept"
    again = taken(places)
    assert again.index == slots[0].index and not slots[0].intact
    assert places.take() is None and all(slot.intact for slot in (again, slots[1], new, last))


def test_the_least_recently_held_is_given_away_first() -> None:
    places = pool(most=4)
    slots = [taken(places) for _ in range(4)]
    for slot in slots:
        slot.release()
    slots[0].hold().release()
    slots[2].hold()  # and stays held
    given = [taken(places) for _ in range(3)]
    assert [slot.index for slot in given] == [slots[1].index, slots[3].index, slots[0].index]
    assert places.take() is None
    assert [slot.intact for slot in slots] == [False, False, True, False]
    slots[2].release()
    assert taken(places).index == slots[2].index


def test_holding_twice_needs_releasing_twice() -> None:
    places = pool(most=1)
    slot = taken(places)
    slot.hold()
    slot.release()
    assert slot.holders and places.take() is None
    slot.release()
    assert not slot.holders and places.take() is not None and not slot.intact


def test_what_is_kept_may_be_worth_growing_or_not() -> None:
    """Beyond `worth` bytes places are given away rather than added; while all are held, they are added all the same."""
    slot_bytes = 2 * HEADS * 4 * (WIDE + NARROW) * 4  # layers, heads, positions, fp32
    places = pool(most=64, worth=2 * slot_bytes)
    kept = [taken(places)]
    fill(places, kept[0], 0, 4, seed=1)
    assert kept[0].nbytes == places.slot_bytes == slot_bytes
    kept[0].release()
    for number in (2, 3):
        kept.append(slot := taken(places))
        fill(places, slot, 0, 4, seed=100 * number)
        slot.release()
    assert places.slots == 2 and [slot.intact for slot in kept] == [False, True, True]
    held = [taken(places) for _ in range(5)]
    assert places.slots >= 5 and len({slot.index for slot in held}) == 5
    assert not any(slot.intact for slot in kept)


def test_growing_keeps_contents_lengths_and_holders() -> None:
    places = pool(most=100, capacity=5)
    slots = []
    for number in range(9):
        slots.append(slot := taken(places))
        fill(places, slot, 0, 1 + number % 5, seed=1000 * number)
    before = places.generation
    places.reserve(6)
    assert places.generation == before + 1 and places.capacity == 64
    fill(places, slots[3], 4, 60, seed=77)
    places.reserve(64)
    assert places.generation == before + 1, "there was room"
    places.reserve(65)
    assert places.capacity == 128
    for number, slot in enumerate(slots):
        assert holds(places, slot, 0, 4 if number == 3 else 1 + number % 5, seed=1000 * number)
    assert holds(places, slots[3], 4, 60, seed=77)
    assert places.lengths.dtype == torch.int32 and len(places.lengths) == places.slots


@pytest.mark.parametrize("wanted", [1, 63, 64, 65, 127, 128, 129, 1000, 1455])
def test_reserve_makes_room_and_no_more_than_twice(wanted: int) -> None:
    places = pool(capacity=64)
    places.reserve(wanted)
    assert max(64, wanted) <= places.capacity <= max(64, 2 * wanted) and places.capacity % 64 == 0


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_pool_learns_dtype_and_shape_and_is_written_in_and_out_of_inference(
    dtype: torch.dtype, inference: bool
) -> None:
    with torch.inference_mode(inference):
        places = pool()
        assert places.slot_bytes == 0 and places.layer(0) is None
        slot = taken(places)
        places.write(0, slot, 1, drawn(2, WIDE, 1, dtype), drawn(2, NARROW, 2, dtype))
        places.set_length(slot, 3)
        places.reserve(5)
        taken(places)
    for _ in range(2):
        places.write(0, slot, 1, drawn(2, WIDE, 1, dtype), drawn(2, NARROW, 2, dtype))
        places.set_length(slot, 3)
    layer = places.layer(0)
    assert layer is not None and layer.key.dtype == layer.value.dtype == dtype
    assert layer.key.shape == (places.slots, HEADS, places.capacity, WIDE)
    assert layer.value.shape == (places.slots, HEADS, places.capacity, NARROW)
    assert layer.lengths is places.lengths and not places.lengths.is_inference() and not layer.key.is_inference()
    assert torch.equal(places.read(0, slot, 3)[0][:, 1:], drawn(2, WIDE, 1, dtype))


class Memory:
    """An allocator that has only so many bytes, or fails at one call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most, self.calls, self.fails_at = math.inf, 0, -1
        self._real = cache._memory
        monkeypatch.setattr(cache, "_memory", self)

    def __call__(self, shape: Sequence[int], like: Tensor) -> Tensor:
        self.calls += 1
        if math.prod(shape) * like.element_size() > self.most or self.calls == self.fails_at:
            raise torch.OutOfMemoryError("no memory")
        # What is not written must not be taken for something.
        return self._real(shape, like).fill_(math.nan)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


@pytest.mark.parametrize("tensor", [1, 2, 3, 4])
@pytest.mark.parametrize("grows", ["slots", "positions"])
def test_without_memory_nothing_changes(memory: Memory, grows: str, tensor: int) -> None:
    """Whichever of the tensors finds none."""
    places = pool(most=100)
    slots = [taken(places) for _ in range(2)]
    for number, slot in enumerate(slots):
        fill(places, slot, 0, 3, seed=10 * number)
    before = places.slots, places.capacity, places.generation, places.lengths, places.slot_bytes
    if grows == "positions":
        memory.fails_at = memory.calls + tensor
        with pytest.raises(torch.OutOfMemoryError):
            places.reserve(5)
    else:
        memory.most = 0
        assert places.take() is None
    after = places.slots, places.capacity, places.generation, places.lengths, places.slot_bytes
    assert before[:3] == after[:3] and before[3] is after[3] and before[4] == after[4]
    assert all(holds(places, slot, 0, 3, seed=10 * number) for number, slot in enumerate(slots))
    memory.most, memory.fails_at = math.inf, -1
    places.reserve(5)
    assert taken(places).index == 2 and all(holds(places, slot, 0, 3, seed=10 * n) for n, slot in enumerate(slots))


def test_where_memory_is_short_positions_grow_by_what_is_needed(memory: Memory) -> None:
    places = Pool(2, 60, CPU)
    slot = taken(places)
    fill(places, slot, 0, 60, seed=1)
    memory.most = HEADS * 64 * WIDE * 4
    places.reserve(61)
    assert places.capacity == 64 and holds(places, slot, 0, 60, seed=1)
    memory.most = math.inf
    places.reserve(65)
    assert places.capacity == 128


def test_where_memory_is_short_places_come_one_by_one_and_then_kept_ones_are_given_away(memory: Memory) -> None:
    places = pool(most=100)
    slots = [taken(places) for _ in range(4)]
    for number, slot in enumerate(slots):
        fill(places, slot, 0, 4, seed=10 * number)
    memory.most = 6 * HEADS * 4 * WIDE * 4  # bytes of keys of six
    slots += [taken(places), taken(places)]
    assert places.slots == 6 and places.take() is None
    slots[1].release()
    assert taken(places).index == slots[1].index and not slots[1].intact
    assert all(holds(places, slots[number], 0, 4, seed=10 * number) for number in (0, 2, 3))


@dataclass
class Tenant:
    """A slot and what it should be."""

    slot: Slot
    when: int  # it was last held
    holds: int = 1
    writes: list[tuple[int, int, int]] = field(default_factory=list)  # start, length and seed, one behind the other


class Life:
    """A pool beside what a pool should do, in plain Python."""

    def __init__(self, chance: random.Random, memory: Memory, counts: dict[str, int]) -> None:
        self.chance, self.memory, self.counts = chance, memory, counts
        self.most, self.worth = chance.choice([(1, math.inf), (7, math.inf), (20, math.inf), (20, 9000.0), (20, 0.0)])
        self.bytes = chance.choice([math.inf, math.inf, 3000])
        self.pool = Pool(self.most, chance.choice([1, 3, 8]), CPU, self.worth)
        self.tenants: list[Tenant] = []
        self.clock = 0

    def some(self, held: bool | None = None) -> Tenant | None:
        fitting = [one for one in self.tenants if one.slot.intact and held in (None, one.holds > 0)]
        return self.chance.choice(fitting) if fitting else None

    def operate(self) -> None:
        self.clock += 1
        works = [self.take, self.release, self.hold, self.drop, self.write, self.reserve]
        work = self.chance.choices(works, [5, 4, 2, 2, 6, 1])[0]
        self.memory.most = self.bytes if work in (self.take, self.reserve) else math.inf
        work()
        intact = [one.slot.index for one in self.tenants if one.slot.intact]
        assert len(set(intact)) == len(intact) <= self.pool.slots <= self.most
        assert all(one.slot.holders == one.holds for one in self.tenants)

    def take(self) -> None:
        """Free places first, then new ones as far as they are worth it, then the one that was held longest ago."""
        places, before = self.pool, self.pool.slots
        intact = [one for one in self.tenants if one.slot.intact]
        idle = [one for one in intact if not one.holds]
        worth_it = (before + 1) * places.slot_bytes <= self.worth
        slot = places.take()
        lost = [one for one in intact if not one.slot.intact]
        may_grow = before < self.most and self.bytes == math.inf  # else it depends
        if slot is None:
            assert len(intact) == before and not idle and not may_grow
            self.counts["full"] += 1
            return
        assert slot.holders and slot.intact and (slot.length, slot.key, slot.ids) == (0, None, ())
        if len(intact) < before:
            assert not lost and places.slots == before
        elif lost:
            assert not (worth_it and may_grow)
            assert lost == [min(idle, key=lambda one: one.when)] and lost[0].slot.index == slot.index
            self.counts["reclaimed"] += 1
        else:
            assert before < places.slots <= max(1, 2 * before) and (worth_it or not idle)
            self.counts["grown"] += 1
        self.counts["taken"] += 1
        self.tenants.append(Tenant(slot, self.clock))

    def release(self) -> None:
        if one := self.some(held=True):
            one.slot.release()
            one.holds -= 1

    def hold(self) -> None:
        if one := self.some():
            assert one.slot.hold() is one.slot
            one.holds, one.when = one.holds + 1, self.clock

    def drop(self) -> None:
        if one := self.some():
            self.tenants.remove(one)
            self.counts["dropped"] += 1

    def write(self) -> None:
        """Behind what is there, or over its end."""
        if one := self.some(held=True):
            if one.writes and self.chance.random() < 0.3:
                one.writes.pop()
            start = sum(length for _, length, _ in one.writes)
            one.writes.append((start, self.chance.randint(1, 5), 1000 * self.clock))
            self.pool.reserve(start + one.writes[-1][1])
            fill(self.pool, one.slot, *one.writes[-1])

    def reserve(self) -> None:
        wanted, before = self.chance.randint(1, 2 * self.pool.capacity + 1), self.pool.capacity
        if wanted > 300:  # it never shrinks
            return
        try:
            self.pool.reserve(wanted)
            assert self.pool.capacity >= wanted
        except torch.OutOfMemoryError:
            assert self.pool.capacity == before < wanted
            self.counts["short of memory"] += 1

    def check(self) -> None:
        for one in self.tenants:
            assert not one.slot.intact or all(holds(self.pool, one.slot, *write) for write in one.writes)


def test_a_drawn_life_of_a_pool(memory: Memory) -> None:
    """Thousands of operations: nobody's keys and lengths are ever another's."""
    chance = random.Random(5)
    counts = dict.fromkeys(("taken", "full", "reclaimed", "dropped", "grown", "short of memory"), 0)
    for _ in range(20):
        life = Life(chance, memory, counts)
        for operation in range(250):
            life.operate()
            if operation % 10 == 0:
                life.check()
    assert min(counts.values()) > 0, counts
    print(", ".join(f"{count} {what}" for what, count in counts.items()))


def test_a_pool_keeps_no_slot_alive() -> None:
    places = pool()
    gc.disable()
    try:
        for _ in range(50):
            fill(places, taken(places), 0, 2, seed=1)
        assert places.slots == 1
    finally:
        gc.enable()
