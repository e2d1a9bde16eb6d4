"""Settings -> the parts of a run: data, model, optimizer, laid over the machine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphinx_fast.data.record import Source
from sphinx_fast.data.rows import files
from sphinx_fast.data.sources import open_source, read_meta
from sphinx_fast.data.tables import documents
from sphinx_fast.infer.loading import SINGLE_VIEW, load
from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.train import export
from sphinx_fast.train.batches import Batch, MakePiece, Records, Steps, Texts
from sphinx_fast.train.checkpoint import from_first
from sphinx_fast.train.flops import Flops
from sphinx_fast.train.held_out import mean_loss, some_rows
from sphinx_fast.train.learner import Learner, choose_parts, decay_groups, enable_checkpoints, see
from sphinx_fast.train.loss import SoftLabels
from sphinx_fast.train.machine import Machine
from sphinx_fast.train.order import Mixture
from sphinx_fast.train.packing import Row
from sphinx_fast.train.pieces import PieceMaker
from sphinx_fast.train.pointer import BoxFinder, coordinate_ids
from sphinx_fast.train.schedule import Schedule
from sphinx_fast.train.settings import DataSettings, Settings, Stage1, Stage2
from sphinx_fast.train.text import TokenFile, fingerprint, write_tokens
from sphinx_fast.vision.tower import VisionFeatures


@dataclass(frozen=True)
class Length:
    """Of a run, in steps; an epoch is of the conversations or pairs."""

    steps: int
    steps_per_epoch: float

    @classmethod
    def of(cls, settings: Settings, rows: int, per_step: int) -> Length:
        per_epoch = rows / per_step if per_step else float(settings.steps or 1)
        return cls(settings.steps or max(1, math.ceil((settings.epochs or 1.0) * per_epoch)), per_epoch)


@dataclass
class Parts:
    """What `build` made.

    kinds, kind_weights  means that the loss is the weighted sum of
    data_mark            what decides the data's order: a resumed run must have the same
    """

    settings: Settings
    machine: Machine
    model: Any
    processor: Any
    learner: Learner
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    length: Length
    batches: Steps
    evaluations: dict[str, Steps]
    flops: Flops
    kinds: tuple[str, ...]
    kind_weights: Tensor
    data_mark: str

    @property
    def points(self) -> bool:
        """Whether attention is taught to point; that is the last kind then."""
        return self.kinds[-1] == "pointer"

    def see(self, row: Row) -> VisionFeatures | None:
        """What the frozen encoders see of a row's pictures."""
        return see(self.model, row.pixel_values)

    def work(self, batch: Batch) -> dict[str, float]:
        """What a step took, over all processes (the others' rows are like ours)."""
        flops, language = self.flops.step(batch.rows)
        pictures = sum(0 if row.pixel_values is None else len(row.pixel_values) for row in batch.rows)
        pictures /= self.model.config.vision_config.num_views
        world = self.machine.world
        return {
            "tokens": world * float(sum(len(row) for row in batch.rows)),
            "pictures": world * pictures,
            "flops": flops,
            "language_flops": language,
        }

    def held_out(self) -> dict[str, float]:
        """Mean loss on each evaluation set."""
        self.learner.eval()
        losses = {
            name: mean_loss(self.model, self.learner, self.machine, steps[0])
            for name, steps in self.evaluations.items()
        }
        self.learner.train()
        return losses

    def export(self, target: Path) -> Path:
        """The trained model as a folder that `Sphinx.from_pretrained` and transformers load."""
        return export.write(target, self)


def build(settings: Settings, *, progress: bool = True) -> Parts:
    """Everything a run needs. Data is opened first: what is wrong there should not wait for the weights.

    Raises:
        ValueError: one line about the data set, file or setting that cannot be used.
    """
    machine = Machine.of(settings)
    sources = open_sources(settings.data)  # type: ignore[attr-defined]
    evaluated = _named(open_sources(settings.eval_data))
    model, processor = _model(settings, machine)
    soft = soft_labels(settings, processor, model.lm_head.weight.shape[0])
    torch.manual_seed(settings.seed)  # adapters begin with random numbers
    names = choose_parts(model, settings.train, settings.lora)
    learner = Learner(model, soft.to(machine.device) if soft else None)
    if settings.scale.checkpoint:
        enable_checkpoints(learner.language_model)
    flops = Flops.of(model)
    machine.lay_out(learner, compiled=settings.scale.compile)
    everything = dict(model.named_parameters())
    parameters = {name: everything[name] for name in names}
    streams, kinds, weights = _streams(settings, machine, sources, processor, progress)
    rows = len(streams[0].mixture) if isinstance(streams[0], Records) else 0
    length = Length.of(settings, rows, streams[0].per_step if rows else 0)
    steps = _steps(streams, settings, machine, processor)
    make = streams[0].make if isinstance(streams[0], Records) else _maker(settings, processor)
    evaluations = {
        name: _steps([some_rows(source, settings.eval_rows, make)], settings, machine, processor)
        for name, source in evaluated.items()
    }
    optimizer = settings.optimizer
    return Parts(
        settings=settings,
        machine=machine,
        model=model,
        processor=processor,
        learner=learner,
        parameters=parameters,
        optimizer=torch.optim.AdamW(
            decay_groups(list(parameters.items()), optimizer.weight_decay),
            lr=optimizer.rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        ),
        schedule=Schedule.of(optimizer, length.steps, length.steps_per_epoch),
        length=length,
        batches=steps,
        evaluations=evaluations,
        flops=flops,
        kinds=kinds,
        kind_weights=torch.tensor(weights, device=machine.device),
        data_mark=_mark(settings, streams),
    )


def open_sources(data: Sequence[DataSettings]) -> list[tuple[Source, float]]:
    """The data sets of a run and their ratios. Type `meta` is a released list of data sets."""
    opened: list[tuple[Source, float]] = []
    for entry in data:
        if entry.type == "meta":
            opened += [(listed.open(), listed.ratio * entry.ratio) for listed in read_meta(entry.path)]
        else:
            opened.append((open_source(entry.type, entry.path, root=entry.root, **entry.options), entry.ratio))
    return opened


def _named(data: Sequence[tuple[Source, float]]) -> dict[str, Source]:
    """Evaluation sets by name; of several files of one name, each but the first with a number."""
    named: dict[str, Source] = {}
    for source, _ in data:
        if not len(source):
            raise ValueError(f"eval_data: {source.name}: no rows")
        names = (source.name, *(f"{source.name}-{number}" for number in range(2, len(data) + 1)))
        named[next(name for name in names if name not in named)] = source
    return named


def _model(settings: Settings, machine: Machine) -> tuple[Any, Any]:
    """The model to start from, and its processor, which cuts the views that this run sees.

    The encoders are frozen, so they take the dtype of the computation; what learns stays in fp32.
    """
    device = torch.device("cpu") if machine.shard else machine.device  # sharding brings its part to the device
    stored = SphinxConfig.from_pretrained(settings.model).dtype
    learns = machine.dtype if settings.lora is not None else torch.float32
    if machine.shard and isinstance(stored, torch.dtype):
        learns = stored  # fp32 comes block by block, as they are cut up
    size = settings.picture_size
    loaded = load(
        settings.model,
        device=device,
        dtype=learns,
        variant=None,
        quantize=settings.quantize,
        picture_size=SINGLE_VIEW if isinstance(settings, Stage1) else size,
    )
    model, processor = loaded.model, loaded.processor
    model.model.vision_tower.to(machine.device, machine.dtype)
    if settings.lora is not None:
        model.model.fusion.float()
    processor.image_processor.transform = settings.transform
    processor.image_processor.max_pixels = settings.max_pixels
    return model, processor


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
) -> tuple[list[Records | Texts], tuple[str, ...], tuple[float, ...]]:
    """What a step reads, the kinds of loss there are, and their weights."""
    stream = record_stream(settings, data, processor) if data else None
    if isinstance(settings, Stage2):
        assert stream is not None
        if not settings.pointer_weight:
            return [stream], ("answer",), (1.0,)
        return [stream], ("answer", "pointer"), (1.0, settings.pointer_weight)
    assert isinstance(settings, Stage1)
    streams: list[Records | Texts] = []
    kinds: list[tuple[str, float]] = []
    if stream is not None:
        streams.append(stream)
        kinds.append(("caption", settings.caption_weight))
    if settings.text_tokens:
        file = token_file(settings, machine, processor.tokenizer, progress)
        per_step = settings.text_tokens // settings.text_length
        streams.append(Texts(file, per_step, processor.tokenizer.bos_token_id, settings.seed, len(kinds)))
        kinds.append(("text", settings.text_weight))
    return streams, tuple(name for name, _ in kinds), tuple(weight for _, weight in kinds)


def token_file(settings: Stage1, machine: Machine, tokenizer: Any, progress: bool) -> TokenFile:
    """The corpus of stage 1, tokenised by the first process into the run's folder unless it was before."""
    path = Path(settings.out) / "text.tokens"
    paths = files(list(settings.text))
    if machine.first:
        mark = fingerprint(paths, tokenizer, settings.text_column)
        write_tokens(documents(paths, settings.text_column), tokenizer, path, mark, progress=progress)
    from_first(None)  # until it is there
    return TokenFile(path, settings.text_length)


def _steps(streams: Sequence[Records | Texts], settings: Settings, machine: Machine, processor: Any) -> Steps:
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
    digest.update(repr((settings.seed, settings.max_length)).encode())
    for stream in streams:
        what = stream.mixture.lengths + stream.mixture.counts if isinstance(stream, Records) else [len(stream.file)]
        digest.update(repr((type(stream).__name__, stream.per_step, what)).encode())
    return digest.hexdigest()


def soft_labels(settings: Settings, processor: Any, vocabulary: int) -> SoftLabels | None:
    """Labels of coordinates that spread over their neighbours.

    Raises:
        ValueError: in this tokenizer a coordinate is more than one token.
    """
    softness = settings.coordinate_softness if isinstance(settings, Stage2) else 0.0
    if not softness:
        return None
    ids = coordinate_ids(processor.tokenizer)
    if ids is None:
        raise ValueError("coordinate_softness: this tokenizer writes 0.37 as several tokens")
    return SoftLabels(torch.tensor(ids), vocabulary, softness)
