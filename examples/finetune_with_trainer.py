"""Fine-tuning with transformers' own Trainer, and so with all that Accelerate lays it over.

    python examples/finetune_with_trainer.py --model FOLDER --data talk.jsonl --root pictures --output_dir OUT
    accelerate launch examples/finetune_with_trainer.py ... --deepspeed CONFIG.json
    accelerate launch --config_file FSDP.yaml examples/finetune_with_trainer.py ...

Every option of TrainingArguments is one here. Rows are what `sphinx-fast train stage2` reads, tokens and labels what it
makes of them; it packs rows without padding, which Trainer does not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments

import sphinx_fast  # noqa: F401 - the Auto classes know SPHINX from here
from sphinx_fast.data.record import BadRowError, Source
from sphinx_fast.data.sources import open_source
from sphinx_fast.image.decode import PictureError, load_picture
from sphinx_fast.train.pieces import IGNORED, PieceMaker

logger = logging.getLogger(__name__)


@dataclass
class Options:
    """Besides TrainingArguments: the model folder, the data (docs/data.md), and positions of the longest row."""

    model: str
    data: str
    type: str = "llava"
    root: str | None = None
    max_length: int = 2048


class Conversations(Dataset[dict[str, torch.Tensor]]):
    """Rows of a source as tensors without padding. In place of a row that cannot be used stands the next that can."""

    def __init__(self, source: Source, processor: Any, max_length: int) -> None:
        self.source, self.image_processor = source, processor.image_processor
        self.maker = PieceMaker(processor, max_length)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        for number in range(len(self)):
            try:
                return self._row((index + number) % len(self))
            except (BadRowError, PictureError) as error:
                logger.warning("row skipped: %s", error)
        raise ValueError(f"{self.source.name}: no row can be used")

    def _row(self, index: int) -> dict[str, torch.Tensor]:
        piece = self.maker.conversation(self.source[index])
        labels = torch.full((len(piece),), IGNORED)
        labels[1:] = torch.from_numpy(piece.targets[:-1])  # a piece has targets where they are predicted
        row = {"input_ids": torch.from_numpy(piece.ids), "labels": labels}
        if piece.picture is not None:
            picture = load_picture(piece.picture, max_pixels=self.image_processor.max_pixels)
            row["pixel_values"] = self.image_processor.cut([picture])[0]
        return row


@dataclass
class Collator:
    """Rows -> one batch, padded on the right; the views of all pictures one after another."""

    pad: int

    def __call__(self, rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][number, :length] = row["input_ids"]
            batch["attention_mask"][number, :length] = 1
            batch["labels"][number, :length] = row["labels"]
        views = [row["pixel_values"] for row in rows if "pixel_values" in row]
        if views:
            batch["pixel_values"] = torch.cat(views)
            batch["num_image_patches"] = torch.tensor([len(view) for view in views])
        return batch


class FrozenEncoders(Trainer):
    """Trainer, but the encoders stay as they answer: it would switch on their dropout with everything else's."""

    def compute_loss(self, model: Any, *values: Any, **options: Any) -> Any:
        self.accelerator.unwrap_model(model).model.vision_tower.eval()
        return super().compute_loss(model, *values, **options)


def make_trainer(options: Options, arguments: TrainingArguments) -> Trainer:
    """The paper's stage 2 on one source: everything but the encoders learns."""
    arguments.remove_unused_columns = False  # Trainer would drop what it does not know: the pictures
    processor = AutoProcessor.from_pretrained(options.model)
    # Weights that learn are fp32: bf16 rounds updates of 2e-5 away. `--bf16` computes in it all the same.
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    rows = Conversations(open_source(options.type, options.data, root=options.root), processor, options.max_length)
    pad = processor.tokenizer.pad_token_id or 0
    return FrozenEncoders(
        model=model, args=arguments, train_dataset=rows, data_collator=Collator(pad), processing_class=processor
    )


def main(words: Sequence[str] | None = None) -> None:
    """Train and save a folder that `Sphinx.from_pretrained` loads."""
    parser = HfArgumentParser((Options, TrainingArguments))  # type: ignore[arg-type]
    parser.set_defaults(learning_rate=2e-5, lr_scheduler_type="cosine", warmup_steps=0.03, weight_decay=0.1)
    parser.set_defaults(adam_beta2=0.95, max_grad_norm=8.0, num_train_epochs=1.0)
    options, arguments = parser.parse_args_into_dataclasses(list(words) if words is not None else None)
    trainer = make_trainer(options, arguments)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
