"""`sphinx-fast train --dry-run`: what a run would be."""

from __future__ import annotations

import torch
from transformers import AutoProcessor

from sphinx_fast.infer.loading import SINGLE_VIEW, check_folder, parse_dtype, with_picture_size
from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.train.batches import Steps
from sphinx_fast.train.estimate import estimate
from sphinx_fast.train.settings import Settings, Stage1
from sphinx_fast.train.streams import Length, check_texts, named, open_sources, record_stream


def dry_run(settings: Settings, world: int) -> str:
    """What the run would be on `world` processes: parameters, memory, steps, and its first step as it is packed.

    Data is opened and the first step read, so what is wrong there is said here. No weight is loaded.
    """
    check_folder(settings.model)
    config = SphinxConfig.from_pretrained(settings.model)
    config = with_picture_size(config, SINGLE_VIEW if isinstance(settings, Stage1) else settings.picture_size)
    processor = AutoProcessor.from_pretrained(settings.model)
    processor.image_processor.picture_size = config.vision_config.picture_size
    fast = torch.float32 if settings.device == "cpu" else torch.bfloat16
    dtype = fast if settings.scale.dtype == "auto" else parse_dtype(settings.scale.dtype)
    lines = [str(estimate(config, settings, world=world, dtype=dtype))]
    data = open_sources(settings.data)  # type: ignore[attr-defined]
    named(open_sources(settings.eval_data))
    check_texts(settings)
    for source, ratio in data:
        lines.append(f"data        {source.name}: {len(source):,} rows, ratio {ratio:g}")
    if data:
        stream = record_stream(settings, data, processor)
        length = Length.of(settings, len(stream.mixture), stream.per_step)
        batch = Steps([stream], processor.image_processor, settings.max_length, seed=settings.seed)[0]
        tokens = sum(len(row) for row in batch.rows)
        fill = tokens / max(1, len(batch.rows) * settings.max_length)
        lines.append(
            f"first step  {batch.read:,} conversations in {len(batch.rows):,} rows of {settings.max_length:,} positions"
            f", {tokens:,} tokens, {fill:.0%} full" + "".join(f"\n            {message}" for message in batch.messages)
        )
    else:
        length = Length(settings.steps or 0, 0.0)
    epochs = f", {length.steps / length.steps_per_epoch:.2f} epochs" if data else ""
    lines.append(f"steps       {length.steps:,}{epochs}; {world} process{'es' if world > 1 else ''}")
    return "\n".join(lines)
