"""What a step reads: the same for any number of processes and workers, without the rows that cannot be used."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from training_data import data_folder, tiny_processor

from sphinx_fast.data.sources import open_source
from sphinx_fast.train.batches import Batch, Records, Steps, batches, deal
from sphinx_fast.train.order import Mixture
from sphinx_fast.train.packing import Row
from sphinx_fast.train.pieces import PieceMaker

LENGTH = 500


def steps(path: Path, per_step: int = 6, **options: Any) -> Steps:
    source = open_source("llava", path)
    processor = tiny_processor()
    maker = PieceMaker(processor, LENGTH)
    stream = Records([source], Mixture([len(source)], seed=3), per_step, maker.conversation)
    return Steps([stream], processor.image_processor, LENGTH, seed=3, **options)


def same(a: Row, b: Row) -> bool:
    pixels = (a.pixel_values is None) == (b.pixel_values is None)
    if a.pixel_values is not None and b.pixel_values is not None:
        pixels = torch.equal(a.pixel_values, b.pixel_values)
    return pixels and a.names == b.names and torch.equal(a.input_ids, b.input_ids) and torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_rows_of_a_step_do_not_depend_on_the_processes(world: int) -> None:
    alone = steps(data_folder() / "talk.jsonl")[2]
    dealt = [steps(data_folder() / "talk.jsonl", rank=rank, world=world)[2] for rank in range(world)]
    rows = [row for batch in dealt for row in batch.rows]
    assert len(rows) == len(alone.rows)
    assert all(any(same(row, other) for other in alone.rows) for row in rows)
    assert {batch.rounds for batch in dealt} == {-(-len(rows) // world)}
    assert sum(batch.read for batch in dealt) == alone.read == 6


def test_every_row_once_an_epoch() -> None:
    data = steps(data_folder() / "talk.jsonl")
    names = Counter(name for step in range(4) for row in data[step].rows for name in row.names)
    assert len(names) == 24 and set(names.values()) == {1}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    data = steps(data_folder() / "talk.jsonl")
    there = list(batches(data, 1, 4, workers))
    for step, batch in zip(range(1, 4), there, strict=True):
        here = data[step]
        assert batch.step == step and len(batch.rows) == len(here.rows)
        assert all(same(a, b) for a, b in zip(batch.rows, here.rows, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_deal(world: int) -> None:
    sizes = [5, 9, 2, 7, 7, 1, 3, 8]
    hands = deal(sizes, world)
    assert sorted(k for hand in hands for k in hand) == list(range(8))
    counts = [len(hand) for hand in hands]
    assert max(counts) - min(counts) <= 1


def test_a_transform_that_draws_is_a_function_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    data = steps(data_folder() / "talk.jsonl")
    data.image_processor.transform = "random_resized_crop"
    state = torch.random.get_rng_state()
    first = data[1]
    assert torch.equal(torch.random.get_rng_state(), state), "the run's own generator is left alone"
    torch.rand(3)
    assert all(same(a, b) for a, b in zip(first.rows, data[1].rows, strict=True))
    there = [steps(data_folder() / "talk.jsonl", rank=rank, world=2) for rank in range(2)]
    rows = []
    for part in there:
        part.image_processor.transform = "random_resized_crop"
        rows += part[1].rows
    assert all(any(same(row, other) for other in first.rows) for row in rows)
    pixels = [batch.rows[0].pixel_values for batch in (data[0], data[4])]
    assert not torch.equal(pixels[0][:1], pixels[1][:1])


def spoiled(folder: Path, count: int, bad: int) -> tuple[Path, Counter[str]]:
    """`count` rows, `bad` of which are spoiled in twelve ways; and how many of each kind."""
    picture = next((data_folder() / "pictures").glob("*.png"))
    (folder / "cut.png").write_bytes(picture.read_bytes()[:200])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    good = {"image": str(picture), "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}

    def turns(*pairs: tuple[str, Any], image: Any = str(picture)) -> str:
        return json.dumps({"image": image, "conversations": [{"from": who, "value": text} for who, text in pairs]})

    wrong = [
        ("not readable", "{"),
        ("not readable", "\udcff"),
        ("fields", json.dumps([1, 2])),
        ("fields", json.dumps({"image": str(picture)})),
        ("fields", turns(("human", 3), ("gpt", "b"))),
        ("turns", turns(("human", "a"), ("human", "b"))),
        ("no answer", turns(("human", "a"), ("gpt", "  "))),
        ("picture marks", turns(("human", "<image><image>a"), ("gpt", "b"))),
        ("no picture", turns(("human", "a"), ("gpt", "b"), image="nowhere.png")),
        ("picture", turns(("human", "a"), ("gpt", "b"), image=str(folder / "cut.png"))),
        ("picture", turns(("human", "a"), ("gpt", "b"), image=str(folder / "text.png"))),
        ("too long", turns(("human", "many words " * 200), ("gpt", "b"))),
    ]
    every = count // bad
    kinds: Counter[str] = Counter()
    with (folder / "rows.jsonl").open("w", encoding="utf-8", errors="surrogateescape") as file:
        for row in range(count):
            number, rest = divmod(row, every)
            if rest == 7 % every and number < bad:
                kind, line = wrong[number % len(wrong)]
                kinds[kind] += 1
                file.write(line + "\n")
            else:
                file.write(json.dumps(good) + "\n")
    return folder / "rows.jsonl", kinds


@pytest.mark.parametrize("world", [1, 2])
def test_bad_rows_are_counted_by_kind(tmp_path: Path, world: int) -> None:
    path, kinds = spoiled(tmp_path, 2400, 24)
    data = [steps(path, per_step=100, rank=rank, world=world) for rank in range(world)]
    bad: Counter[str] = Counter()
    read = used = 0
    for part in data:
        for step in range(24):
            batch = part[step]
            bad += batch.bad
            read += batch.read
            used += sum(len(row.names) for row in batch.rows)
            assert all(str(tmp_path) in message or "rows.jsonl" in message for message in batch.messages)
    print(f"tried {read}, accepted {used}, refused {bad.total()}, other 0")
    assert (read, bad, used) == (2400, kinds, 2400 - 24)


def test_our_own_mistakes_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    data = steps(data_folder() / "talk.jsonl")

    def broken(record: Any, kind: int) -> Any:
        raise KeyError("a bug")

    data.streams[0].make = broken  # type: ignore[union-attr]
    with pytest.raises(KeyError, match="a bug"):
        data[0]


def test_a_row_of_nothing_but_bad_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    row = {"image": "text.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    batch: Batch = steps(tmp_path / "rows.jsonl", per_step=4)[0]
    assert batch.rows == [] and batch.rounds == 2 and batch.bad == Counter({"picture": 4})


def test_workers_outlive_an_interruption() -> None:
    """Ctrl-C reaches them too, and the step that they are read for is to be finished and saved."""
    there = batches(steps(data_folder() / "talk.jsonl"), 0, 12, 2)
    numbers = [next(there).step]
    numbers.append(next(there).step)  # both have begun: a batch came from each
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGINT)
    assert [*numbers, *(batch.step for batch in there)] == list(range(12))
