"""Settings -> what a run reads: data sets, a corpus, the steps over them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sphinx_fast.data.record import Source
from sphinx_fast.data.rows import files
from sphinx_fast.data.sources import open_source, read_meta
from sphinx_fast.data.tables import documents
from sphinx_fast.train.batches import MakePiece, Records, Steps, Texts
from sphinx_fast.train.held_out import some_rows
from sphinx_fast.train.machine import Machine
from sphinx_fast.train.order import Mixture
from sphinx_fast.train.pieces import PieceMaker
from sphinx_fast.train.pointer import BoxFinder
from sphinx_fast.train.settings import DataSettings, Settings, Stage1, Stage2
from sphinx_fast.train.text import TokenFile, await_tokens, fingerprint, write_tokens


@dataclass(frozen=True)
class Length:
    """Of a run, in steps; an epoch is of the conversations or pairs."""

    steps: int
    steps_per_epoch: float

    @classmethod
    def of(cls, settings: Settings, rows: int, per_step: int) -> Length:
        per_epoch = rows / per_step if per_step else float(settings.steps or 1)
        return cls(settings.steps or max(1, math.ceil((settings.epochs or 1.0) * per_epoch)), per_epoch)


class Reading(NamedTuple):
    """What `read` made.

    kinds  name of each mean that the loss is a sum of, and its weight
    mark   what decides the order of rows: a resumed run must have the same
    """

    steps: Steps
    evaluations: dict[str, Steps]
    length: Length
    kinds: dict[str, float]
    mark: str


def read(
    settings: Settings,
    machine: Machine,
    data: Sequence[tuple[Source, float]],
    evaluated: dict[str, Source],
    processor: Any,
    *,
    progress: bool,
) -> Reading:
    """The steps of a run over data sets that were opened, and one step over each evaluation set."""
    streams, kinds = _streams(settings, machine, data, processor, progress)
    make, first = _maker(settings, processor), streams[0]
    held_out = {name: some_rows(source, settings.eval_rows, make) for name, source in evaluated.items()}
    rows = (len(first.mixture), first.per_step) if isinstance(first, Records) else (0, 0)
    return Reading(
        steps=_steps(streams, settings, machine, processor),
        evaluations={name: _steps([stream], settings, machine, processor) for name, stream in held_out.items()},
        length=Length.of(settings, *rows),
        kinds=kinds,
        mark=_mark(settings, streams),
    )


def open_sources(data: Sequence[DataSettings]) -> list[tuple[Source, float]]:
    """The data sets of a run and their ratios. Type `meta` is a released list of data sets."""
    opened: list[tuple[Source, float]] = []
    for entry in data:
        if entry.type == "meta":
            listed = read_meta(entry.path)
            opened += [(one.open(), one.ratio * (one.prob or 1.0) * entry.ratio) for one in listed]
        else:
            opened.append((open_source(entry.type, entry.path, root=entry.root, **entry.options), entry.ratio))
    return opened


def check_texts(settings: Settings) -> None:
    """Refuse a corpus that is not there, before anything is loaded."""
    if isinstance(settings, Stage1) and settings.text_tokens:
        files(list(settings.text))


def named(data: Sequence[tuple[Source, float]]) -> dict[str, Source]:
    """Evaluation sets by name; of several files of one name, each but the first with a number."""
    named: dict[str, Source] = {}
    for source, _ in data:
        if not len(source):
            raise ValueError(f"eval_data: {source.name}: no rows")
        names = (source.name, *(f"{source.name}-{number}" for number in range(2, len(data) + 1)))
        named[next(name for name in names if name not in named)] = source
    return named


def _maker(settings: Settings, processor: Any) -> MakePiece:
    """How a record becomes a piece in this stage."""
    if isinstance(settings, Stage2):
        return PieceMaker(processor, settings.max_length, settings.independent_turns).conversation
    return PieceMaker(processor, settings.max_length).caption


def record_stream(settings: Settings, data: Sequence[tuple[Source, float]], processor: Any) -> Records:
    """The conversations, or pairs, of every step."""
    sources = [source for source, _ in data]
    mixture = Mixture([len(source) for source in sources], [ratio for _, ratio in data], settings.seed)
    if not len(mixture):
        raise ValueError(f"data: {', '.join(source.name for source in sources)}: no rows")
    per_step = settings.pairs if isinstance(settings, Stage1) else settings.batch  # type: ignore[attr-defined]
    return Records(sources, mixture, per_step, _maker(settings, processor))


def _streams(
    settings: Settings, machine: Machine, data: Sequence[tuple[Source, float]], processor: Any, progress: bool
) -> tuple[list[Records | Texts], dict[str, float]]:
    """What a step reads, and the kinds of loss there are with their weights."""
    stream = record_stream(settings, data, processor) if data else None
    if isinstance(settings, Stage2):
        assert stream is not None
        pointer = {"pointer": settings.pointer_weight} if settings.pointer_weight else {}
        return [stream], {"answer": 1.0, **pointer}
    assert isinstance(settings, Stage1)
    streams: list[Records | Texts] = []
    kinds: dict[str, float] = {}
    if stream is not None:
        streams.append(stream)
        kinds["caption"] = settings.caption_weight
    if settings.text_tokens:
        file = token_file(settings, machine, processor.tokenizer, progress)
        per_step = settings.text_tokens // settings.text_length
        streams.append(Texts(file, per_step, processor.tokenizer, settings.seed, len(kinds)))
        kinds["text"] = settings.text_weight
    return streams, kinds


def token_file(settings: Stage1, machine: Machine, tokenizer: Any, progress: bool) -> TokenFile:
    """The corpus of stage 1, tokenised by the first process into the run's folder unless it was before."""
    path = Path(settings.out) / "text.tokens"
    paths = files(list(settings.text))
    mark = fingerprint(paths, tokenizer, settings.text_column)
    if machine.first:
        write_tokens(documents(paths, settings.text_column), tokenizer, path, mark, progress=progress)
    await_tokens(path, mark)
    return TokenFile(path, settings.text_length)


def _steps(streams: Sequence[Records | Texts], settings: Settings, machine: Machine, processor: Any) -> Steps:
    """Numbered steps over streams, for this process."""
    points = isinstance(settings, Stage2) and settings.pointer_weight
    return Steps(
        streams,
        processor.image_processor,
        settings.max_length,
        seed=settings.seed,
        rank=machine.rank,
        world=machine.world,
        finder=BoxFinder(processor.tokenizer) if points else None,
    )


def _mark(settings: Settings, streams: Sequence[Records | Texts]) -> str:
    """A digest of what decides which rows a step reads and how they are packed."""
    digest = hashlib.sha256()
    views, turns = (settings.picture_size, settings.transform), getattr(settings, "independent_turns", False)
    digest.update(repr((settings.seed, settings.max_length, views, turns)).encode())
    for stream in streams:
        what = stream.mixture.lengths + stream.mixture.counts if isinstance(stream, Records) else [len(stream.file)]
        digest.update(repr((type(stream).__name__, stream.per_step, what)).encode())
    return digest.hexdigest()
