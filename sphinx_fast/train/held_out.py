"""The loss on rows that nothing is learned from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sphinx_fast.data.record import BadRowError, Source
from sphinx_fast.data.sources import open_source
from sphinx_fast.train.batches import Batch, MakePiece, Records, Steps
from sphinx_fast.train.learner import Learner, see
from sphinx_fast.train.machine import Machine
from sphinx_fast.train.order import Mixture
from sphinx_fast.train.packing import nothing
from sphinx_fast.train.pieces import IGNORED, PieceMaker


def some_rows(source: Source, rows: int, make: MakePiece) -> Records:
    """A stream whose first step is `rows` rows of a set, always the same ones."""
    return Records([source], Mixture([len(source)]), min(rows, len(source)), make)


@torch.no_grad()
def mean_loss(model: Any, learner: Learner, machine: Machine, batch: Batch) -> float:
    """Weighted mean cross-entropy over the targets of a batch, on all processes; NaN where there are none."""
    sums = torch.zeros(2, device=machine.device)
    for index in range(batch.rounds):
        row = (batch.rows[index] if index < len(batch.rows) else nothing()).to(machine.device)
        weights = row.weights[row.targets != IGNORED]
        total, *_ = learner(row, see(model, row.pixel_values), weights)
        sums += torch.stack([total.float(), weights.sum()])
    sums = machine.summed(sums)
    return float(sums[0] / sums[1])


def held_out_losses(
    model: Any, processor: Any, files: Mapping[str, Path], *, rows: int = 256, max_length: int = 4096
) -> dict[str, float]:
    """{name: mean loss} of a loaded model on JSON or JSON lines of conversations, as it would be trained on them.

    A file whose first row asks nothing holds captions: they are seen as in stage 1, by their global view alone.

    Raises:
        ValueError: a file that cannot be used, or none of whose rows can.
    """
    learner = Learner(model).eval()
    machine = Machine(model.device, 0, 1, model.dtype, shard=False)
    losses = {}
    for name, path in files.items():
        source = open_source("llava", path)
        captions = _are_captions(source)
        with _views(model, processor, single=captions):
            maker = PieceMaker(processor, max_length)
            stream = some_rows(source, rows, maker.caption if captions else maker.conversation)
            batch = Steps([stream], processor.image_processor, max_length)[0]
            if not batch.rows:
                raise ValueError(f"{path}: no row can be used; {'; '.join(batch.messages)}")
            losses[name] = mean_loss(model, learner, machine, batch)
    return losses


def _are_captions(source: Source) -> bool:
    for index in range(len(source)):
        try:
            return not any(question for question, _ in source[index].turns)
        except BadRowError:
            continue
    raise ValueError(f"{source.name}: no row can be used")


@contextmanager
def _views(model: Any, processor: Any, *, single: bool) -> Iterator[None]:
    """Everything sees the global view alone, for a while."""
    places = (model.config.vision_config, model.model.vision_tower.config, processor.image_processor)
    before = [place.picture_size for place in places]
    try:
        for place in places if single else ():
            place.picture_size = model.config.vision_config.view_size
        yield
    finally:
        for place, size in zip(places, before, strict=True):
            place.picture_size = size
