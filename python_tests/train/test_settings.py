"""Settings of a run: the paper's numbers by default, every wrong key and value said before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sphinx_fast.cli import main
from sphinx_fast.train import settings as module
from sphinx_fast.train.settings import Stage1, Stage2, make_settings, read_settings

START: dict[str, Any] = {"model": "m", "out": "o"}
ONE = {**START, "data": [{"path": "a.jsonl"}], "text": ["t.txt"]}
TWO = {**START, "data": [{"path": "a.jsonl"}]}


def test_stage_one_is_the_papers() -> None:
    made = make_settings("stage1", ONE)
    assert isinstance(made, Stage1)
    assert (made.pairs, made.text_tokens, made.steps) == (640, 65_536, 180_000)
    optimizer = made.optimizer
    assert (optimizer.rate, optimizer.min_rate, optimizer.warmup_steps) == (5e-5, 5e-6, 2000)
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.95), 0.1)
    assert made.train == ("language_model", "fusion")


def test_stage_two_is_the_papers() -> None:
    made = make_settings("stage2", TWO)
    assert isinstance(made, Stage2)
    assert (made.batch, made.max_length, made.epochs, made.steps) == (128, 3072, 1.0, None)
    optimizer = made.optimizer
    assert (optimizer.rate, optimizer.min_rate, optimizer.warmup_epochs, optimizer.weight_decay) == (2e-5, 0, 0.03, 0.1)
    released = make_settings("stage2", {**TWO, "preset": "released", "optimizer": {"warmup_steps": 3}})
    assert (released.optimizer.warmup_steps, released.optimizer.warmup_epochs) == (3, None)
    released = make_settings("stage2", {**TWO, "preset": "released"})
    assert released.optimizer.weight_decay == 0.0
    assert released.optimizer.warmup_epochs == 0.03


def test_groups_keep_their_other_defaults() -> None:
    made = make_settings("stage2", {**TWO, "optimizer": {"rate": 1e-4, "warmup_steps": 7}, "steps": 5})
    assert (made.optimizer.rate, made.optimizer.warmup_steps, made.optimizer.warmup_epochs) == (1e-4, 7, None)
    assert (made.optimizer.clip, made.steps, made.epochs) == (8.0, 5, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modle": 1}, "unknown key modle; did you mean model?"),
        ({"optimizer": {"rat": 1}}, "unknown key optimizer.rat; did you mean optimizer.rate?"),
        ({"data": [{"path": "a", "ratoi": 1}]}, "unknown key data.0.ratoi; did you mean data.0.ratio?"),
        ({"scale": {"compile": "yes please"}}, "scale.compile: expected bool, got 'yes please'"),
        ({"batch": 1.5}, "batch: expected int, got 1.5"),
        ({"batch": True}, "batch: expected int, got True"),
        ({"optimizer": 3}, "optimizer: expected a table, got 3"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas: expected 2 values, got 1"),
        ({"train": ["encoders"]}, "train: expected some of language_model, fusion"),
        ({"steps": 3, "epochs": 1}, "give steps or epochs, one of them"),
        ({"quantize": "nf4"}, "quantised weights do not train; add lora"),
        ({"quantize": "int4", "lora": {}}, "int4 weights have no gradient"),
        ({"optimizer": {"rate": 1e-5, "min_rate": 1e-4}}, "expected 0 <= min_rate <= rate"),
        ({"data": []}, "at least one data set"),
        ({"data": [{"path": "a", "ratio": 0}]}, "ratio: expected more than 0"),
        ({"preset": "mine"}, "preset: expected one of paper, released"),
        ({"report": "mail"}, "report: expected"),
        ({"max_length": 3}, "max_length"),
        ({"data": [{"path": "a", "ratio": "inf"}]}, "ratio: expected more than 0"),
        ({"epochs": "inf"}, "epochs: expected more than 0"),
        ({"steps": 0}, "steps: expected more than 0"),
        ({"optimizer": {"rate": 1.0, "min_rate": 0.0, "warmup_steps": -1}}, "warm-up below 0"),
        ({"lora": {}, "train": ["fusion"]}, "lora: the language model does not learn"),
        ({"transform": "squeeze"}, "transform: expected one of padded_resize"),
        ({"eval_rows": 0}, "eval_rows and workers"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="settings: ") as caught:
        make_settings("stage2", {**TWO, **change})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": []}, "data and pairs: both or neither"),
        ({"pairs": 0}, "data and pairs"),
        ({"text": []}, "text and text_tokens: both or neither"),
        ({"text_tokens": 100, "text_length": 64}, "multiple of text_length"),
        ({"text_length": 4096, "text_tokens": 4096}, "at most max_length"),
        ({"batch": 3}, "unknown key batch"),
        ({"text_length": 0}, "text_length: expected at least 1"),
        ({"text": [], "text_tokens": -64}, "expected at least 0"),
    ],
)
def test_what_is_wrong_in_stage_one(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_settings("stage1", {**ONE, **change})


def test_a_missing_key() -> None:
    with pytest.raises(ValueError, match="settings: out is missing"):
        make_settings("stage2", {"model": "m", "data": [{"path": "a"}]})


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: m\nout: o\ndata:\n- path: a\n- path: b\noptimizer: {rate: 5e-5}\n")
    changes = ["data.1.ratio=0.5", "optimizer.rate=1e-4", "lora.rank=4", "scale.checkpoint=true", "steps=9"]
    made = read_settings("stage2", file, changes)
    assert isinstance(made, Stage2)
    assert [entry.ratio for entry in made.data] == [1.0, 0.5]
    assert (made.optimizer.rate, made.steps, made.scale.checkpoint) == (1e-4, 9, True)
    assert made.lora is not None and made.lora.rank == 4
    file.write_text(file.read_text() + "epochs: 2\n")
    assert read_settings("stage2", file, ["steps=9"]).epochs is None, "the command line decides"
    assert read_settings("stage2", file).epochs == 2
    for wrong in ("data.2.ratio=1", "steps", "out.x=1", "data.1.ratio=[", "steps=many"):
        with pytest.raises(ValueError):
            read_settings("stage2", file, [wrong])


@pytest.mark.parametrize("text", ["- a\n", "a: [", "\x00", "model: !!python/object/apply:os.system ['true']"])
def test_a_file_that_is_no_settings(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_settings("stage2", file)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_fails_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"model: nowhere\nout: {tmp_path}/run\ndata: [{{path: nowhere}}]\nbacth: 3\n")
    assert main(["train", "stage2", str(file)]) == 1
    said = capsys.readouterr().err
    assert said == f"sphinx-fast: {file}: unknown key bacth; did you mean batch?\n"
    assert not (tmp_path / "run").exists()


def test_every_key_is_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    groups = (Stage1, Stage2, module.DataSettings, module.OptimizerSettings, module.LoraSettings, module.ScaleSettings)
    names = {field.name for group in groups for field in dataclasses.fields(group)} | {"preset"}
    assert not sorted(name for name in names if f"`{name}`" not in text)
