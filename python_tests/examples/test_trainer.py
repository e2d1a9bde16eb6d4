"""Fine-tuning with transformers' Trainer learns what our own run would: the same loss on the same rows."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_data import data_folder, start_folder

from examples import finetune_with_trainer as example
from sphinx_fast import Sphinx, SphinxForConditionalGeneration
from sphinx_fast.data.sources import open_source
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.train.learner import Learner, see
from sphinx_fast.train.packing import make_row
from sphinx_fast.train.pieces import IGNORED, PieceMaker

pytestmark = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")


def words(out: Path, file: str = "talk", **options: Any) -> list[str]:
    given: dict[str, Any] = {
        "model": start_folder(),
        "data": data_folder() / f"{file}.jsonl",
        "output_dir": out,
        "max_length": 700,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def learners_loss(model: Any, processor: Any, source: Any, rows: range) -> tuple[float, int]:
    """The mean of our own loss on rows, as one packed row, and how many targets they have."""
    maker = PieceMaker(processor, 700)
    pieces = [maker.conversation(source[index]) for index in rows]
    dataset = example.Conversations(source, processor, 700)
    views = [dataset[index]["pixel_values"] for index in rows if "pixel_values" in dataset[index]]
    row = make_row(pieces, torch.cat(views) if views else None)
    count = int((row.targets != IGNORED).sum())
    with torch.no_grad():
        loss, *_ = Learner(model).eval()(row, see(model, row.pixel_values), torch.full((count,), 1 / count))
    return float(loss), count


def loaded() -> tuple[Any, Any]:
    model = SphinxForConditionalGeneration.from_pretrained(start_folder(), dtype=torch.float32).eval()
    return model, SphinxProcessor.from_pretrained(start_folder())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_trains_with_our_loss(accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    plain = example.make_trainer
    monkeypatch.setattr(example, "make_trainer", lambda *given: made.append(plain(*given)) or made[-1])
    example.main(words(tmp_path / "out", gradient_accumulation_steps=accumulate))
    losses = [entry["loss"] for entry in made[0].state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    before, processor = loaded()
    source = open_source("llava", data_folder() / "talk.jsonl")
    ours, _ = learners_loss(before, processor, source, range(4 * accumulate))
    assert math.isclose(losses[0], ours, rel_tol=1e-4), "Trainer rounds what it logs"  # and the step's mean is one mean
    after = Sphinx.from_pretrained(tmp_path / "out", device="cpu").model.state_dict()
    moved = {name for name, weight in before.state_dict().items() if not torch.equal(weight, after[name])}
    assert not {name for name in moved if "vision_tower" in name}
    assert {"lm_head.weight", "model.fusion.view_start"} <= moved


@pytest.mark.parametrize("file", ["talk", "plain"])
def test_a_padded_batch_is_a_packed_row(file: str) -> None:
    """To fp32 rounding, with pictures and without, whatever else is in the batch."""
    model, processor = loaded()
    source = open_source("llava", data_folder() / f"{file}.jsonl")
    dataset = example.Conversations(source, processor, 700)
    batch = example.Collator(0)([dataset[index] for index in range(5)])
    assert batch["attention_mask"].sum(1).unique().numel() > 1 or file == "plain", "some rows are padded"
    assert ("pixel_values" in batch) == (file == "talk")
    with torch.no_grad():
        loss = float(model(**batch).loss)
    ours, count = learners_loss(model, processor, source, range(5))
    assert int((batch["labels"] != IGNORED).sum()) == count
    assert math.isclose(loss, ours, rel_tol=1e-5)


def test_rows_that_cannot_be_used_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, processor = loaded()
    file = tmp_path / "talk.jsonl"
    good = (data_folder() / "plain.jsonl").read_text().splitlines()[0]
    file.write_text('{"image": "nowhere.png", "conversations": []}\n' + good + "\n")
    dataset = example.Conversations(open_source("llava", file), processor, 700)
    assert torch.equal(dataset[0]["input_ids"], dataset[1]["input_ids"])
    assert "row skipped" in caplog.text
    file.write_text("no JSON\n")
    with pytest.raises(ValueError, match="no row can be used"):
        example.Conversations(open_source("llava", file), processor, 700)[0]


def test_a_configuration_of_deepspeed_reaches_trainer(tmp_path: Path) -> None:
    """Trainer itself refuses it where DeepSpeed is not installed, which shows that it was handed on."""
    if importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("DeepSpeed is here")
    config = tmp_path / "zero2.json"
    config.write_text('{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}')
    with pytest.raises(ImportError, match=r"(?i)deepspeed"):
        example.main(words(tmp_path / "out", deepspeed=config))
