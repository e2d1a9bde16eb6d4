"""Settings -> the parts of a run: data, model, optimizer, laid over the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphinx_fast.infer.loading import SINGLE_VIEW, load
from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.train import export
from sphinx_fast.train.batches import Batch
from sphinx_fast.train.flops import Flops
from sphinx_fast.train.held_out import mean_loss
from sphinx_fast.train.learner import Learner, choose_parts, decay_groups, enable_checkpoints, see
from sphinx_fast.train.loss import SoftLabels
from sphinx_fast.train.machine import Machine
from sphinx_fast.train.packing import Row
from sphinx_fast.train.pointer import coordinate_ids
from sphinx_fast.train.schedule import Schedule
from sphinx_fast.train.settings import OptimizerSettings, Settings, Stage1, Stage2
from sphinx_fast.train.streams import Reading, check_texts, named, open_sources, read
from sphinx_fast.vision.tower import VisionFeatures


@dataclass
class Parts:
    """What `build` made. `kind_weights`: of `reading.kinds`, in order, where the loss is computed."""

    settings: Settings
    machine: Machine
    model: Any
    processor: Any
    learner: Learner
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    reading: Reading
    flops: Flops
    kind_weights: Tensor

    @property
    def points(self) -> bool:
        """Whether attention is taught to point; that is the last kind then."""
        return "pointer" in self.reading.kinds

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
            for name, steps in self.reading.evaluations.items()
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
    data = open_sources(settings.data)  # type: ignore[attr-defined]
    evaluated = named(open_sources(settings.eval_data))
    check_texts(settings)
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
    reading = read(settings, machine, data, evaluated, processor, progress=progress)
    return Parts(
        settings=settings,
        machine=machine,
        model=model,
        processor=processor,
        learner=learner,
        parameters=parameters,
        optimizer=_optimizer(settings.optimizer, parameters),
        schedule=Schedule.of(settings.optimizer, reading.length.steps, reading.length.steps_per_epoch),
        reading=reading,
        flops=flops,
        kind_weights=torch.tensor(list(reading.kinds.values()), device=machine.device),
    )


def _optimizer(settings: OptimizerSettings, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        decay_groups(list(parameters.items()), settings.weight_decay),
        lr=settings.rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


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
