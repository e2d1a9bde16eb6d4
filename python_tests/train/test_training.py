"""Whole runs of both stages: the golden losses, resuming, harm, evaluation, the result."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model
from training_data import data_folder, stage1, stage2, start_folder, tiny_processor

from sphinx_fast import Sphinx
from sphinx_fast.train import checkpoint
from sphinx_fast.train import training as module
from sphinx_fast.train.settings import make_settings
from sphinx_fast.train.training import Training, TrainingStoppedError
from sphinx_fast.weights import quantize

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "training.json").read_text())
STAGES = {"stage1": stage1, "stage2": stage2}


def training(stage: str, out: Path, **changes: Any) -> Training:
    return Training(make_settings(stage, STAGES[stage](out, **changes)), progress=False)


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def fingerprint(run: Training) -> dict[str, Any]:
    """Parameters, moments, counts and the generator's state."""
    moments = {
        f"{key}.{name}": value.clone()
        for name, parameter in run.parameters.items()
        for key, value in run.optimizer.state[parameter].items()
    }
    weights = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    return {**weights, **moments, "rng": torch.random.get_rng_state(), "step": torch.tensor([run.step, run.read])}


@pytest.mark.parametrize("stage", STAGES)
def test_the_golden_losses(stage: str, tmp_path: Path) -> None:
    """20 steps are what they always were. Processors differ in the last bits of a sum; nothing else may."""
    training(stage, tmp_path / "run").run()
    for line, golden in zip(log(tmp_path / "run"), GOLDEN[stage], strict=True):
        assert line["step"] == golden["step"]
        for name, value in golden.items():
            assert math.isclose(line[name], value, rel_tol=1e-4, abs_tol=1e-9), (line["step"], name)
    assert GOLDEN[stage][-1]["loss"] < 0.8 * GOLDEN[stage][0]["loss"]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_is_straight(stage: str, tmp_path: Path) -> None:
    """Cut at five points, each time as a process that is gone: the same bits as never cut."""
    changes: dict[str, Any] = {"steps": 12, "save_every": 3}
    straight = training(stage, tmp_path / "straight", **changes)
    straight.run()
    for cut in (1, 3, 5, 9, 11):
        out = tmp_path / f"cut{cut}"
        first = training(stage, out, **changes)
        first.run(until=cut)  # nothing is saved at the cut itself: up to two steps are lost and done again
        torch.manual_seed(99)
        second = training(stage, out, **changes)
        second.run()
        ours, theirs = fingerprint(second), fingerprint(straight)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), cut
        keep = ("step", "loss", "rate", "gradient_norm")
        lines, expected = ([{k: line[k] for k in keep} for line in log(o)] for o in (out, tmp_path / "straight"))
        assert lines == expected, "the log has every step once"
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (out / "model" / name).read_bytes() == (tmp_path / "straight" / "model" / name).read_bytes()


def test_a_killed_save_and_a_damaged_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes: dict[str, Any] = {"steps": 9, "save_every": 2}
    out = tmp_path / "run"
    training("stage2", out, **changes).run(until=7)
    newest = sorted(out.glob("step-*"))[-1]
    assert newest.name == "step-00000006"
    (newest / "trained-00000-of-00001.safetensors").write_bytes(b"gone")
    (out / ".step-00000008.partial-1").mkdir()
    with caplog.at_level(logging.WARNING, logger="sphinx_fast"):
        again = training("stage2", out, **changes)
        assert again.resume() and again.step == 4
    assert "trained-00000-of-00001.safetensors: damaged" in caplog.text
    again.run()
    straight = training("stage2", tmp_path / "straight", **changes)
    straight.run()
    assert (out / "model/model.safetensors").read_bytes() == (
        tmp_path / "straight/model/model.safetensors"
    ).read_bytes()


def test_a_damaged_checkpoint_is_written_again(tmp_path: Path) -> None:
    """It is neither taken for the one of that step nor kept in place of a whole one."""
    changes: dict[str, Any] = {"steps": 9, "save_every": 2, "keep": 1}
    out = tmp_path / "run"
    training("stage2", out, **{**changes, "keep": 2}).run(until=6)
    (out / "step-00000006" / "state.json").write_text("{}")
    again = training("stage2", out, **changes)
    assert again.resume() and again.step == 4
    again.run(until=6)
    newest = checkpoint.newest(out)
    assert newest is not None and newest.name == "step-00000006"


def test_a_run_that_went_further(tmp_path: Path) -> None:
    out = tmp_path / "run"
    training("stage2", out, steps=3).run()
    with pytest.raises(ValueError, match="is of step 3, the run has 2; raise steps"):
        training("stage2", out, steps=2).run()
    again = training("stage2", out, steps=3)
    assert again.run() == out / "model", "done already: its result is written again"


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    training("stage2", out, steps=4, save_every=2).run(until=2)
    for changes in ({"seed": 1}, {"batch": 3}, {"max_length": 650}):
        with pytest.raises(ValueError, match="is of a run with another"):
            training("stage2", out, **{"steps": 4, **changes}).resume()


def test_the_encoders_never_learn(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = training("stage2", tmp_path / "run", steps=3)
    assert not any(name.startswith("model.vision_tower") for name in run.parameters)
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.parameters.values()}
    run.run()
    before, after = (load_file(folder / "model.safetensors") for folder in (start_folder(), tmp_path / "run/model"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not {name for name in changed if "vision_tower" in name}
    assert {"lm_head.weight", "model.fusion.view_start", "model.language_model.layers.1.mlp.up_proj.weight"} <= changed


def test_decay_spares_norms_biases_and_tags(tmp_path: Path) -> None:
    run = training("stage2", tmp_path / "run")
    names = {id(parameter): name for name, parameter in run.parameters.items()}
    spared = {names[id(p)] for g in run.optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert spared == {n for n in names.values() if "norm" in n or n.endswith(("bias", "view_start", "view_end"))}


@pytest.mark.parametrize("parts", [["fusion"], ["language_model"]])
def test_parts_that_learn(parts: list[str], tmp_path: Path) -> None:
    run = training("stage2", tmp_path / "run", train=parts, steps=2)
    inside = {name.startswith("model.fusion.") for name in run.parameters}
    assert inside == {parts == ["fusion"]}
    run.run()


# --- harm -------------------------------------------------------------------------------------------------------------
def spoil(monkeypatch: pytest.MonkeyPatch, where: str, run: Training, steps: set[int]) -> None:
    """Something that is not finite, in the given steps."""
    plain = run.update

    def update(batch: Any) -> dict[str, float]:
        if batch.step in steps:
            if where == "picture":
                row = next(row for row in batch.rows if row.pixel_values is not None)
                row.pixel_values[0, 0, 0, 0] = math.nan
            elif where == "label":
                batch.rows[0].weights[batch.rows[0].targets >= 0] = math.inf
            elif where == "gradient":
                name = "model.language_model.layers.0.mlp.up_proj.weight"
                handle = run.parameters[name].register_hook(lambda gradient: gradient * math.nan)
                result = plain(batch)
                handle.remove()
                return result
            elif where == "loss":
                forward = run.learner.forward
                monkeypatch.setattr(run.learner, "forward", lambda *a: (forward(*a)[0] * math.inf, *forward(*a)[1:]))
                result = plain(batch)
                monkeypatch.setattr(run.learner, "forward", forward)
                return result
        return plain(batch)

    monkeypatch.setattr(run, "update", update)


@pytest.mark.parametrize("where", ["picture", "label", "gradient", "loss"])
def test_what_is_not_finite_never_reaches_the_weights(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [{"path": str(data_folder() / "talk.jsonl")}]
    run = training("stage2", tmp_path / "run", steps=5, data=data)
    spoil(monkeypatch, where, run, {2, 3})
    before: list[dict[str, torch.Tensor]] = []
    one = run._one
    monkeypatch.setattr(run, "_one", lambda *a: (one(*a), before.append(weights_and_moments(run))))
    run.run()
    assert run.skipped == 2 and run.in_a_row == 0
    for name, value in before[1].items():
        assert torch.equal(value, before[2][name]) and torch.equal(value, before[3][name]), name
        assert before[4][name].isfinite().all()
    assert any(not torch.equal(before[3][name], before[4][name]) for name in before[3])
    said = capsys.readouterr().out + capsys.readouterr().err
    assert "step 2: not finite, no update; rows: talk.jsonl:" in said


def weights_and_moments(run: Training) -> dict[str, torch.Tensor]:
    state = fingerprint(run)
    return {name: value for name, value in state.items() if name not in ("rng", "step")}


def test_three_in_a_row_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training("stage2", tmp_path / "run", steps=9, save_every=2)
    spoil(monkeypatch, "label", run, {3, 4, 5, 6})
    with pytest.raises(TrainingStoppedError, match="3 updates in a row were not finite, the last with"):
        run.run()
    assert run.step == 6
    assert not (tmp_path / "run" / "model").exists()


def test_too_many_bad_rows_stop(tmp_path: Path) -> None:
    rows = (data_folder() / "plain.jsonl").read_text().splitlines() * 20
    rows[::8] = ["{"] * len(rows[::8])
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(
        TrainingStoppedError, match=r"11 of \d+ rows could not be used \(11 not readable\): more than 5 %"
    ):
        training("stage2", tmp_path / "run", data=[{"path": str(tmp_path / "rows.jsonl")}], steps=40).run()


def test_a_few_bad_rows_do_not_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = (data_folder() / "plain.jsonl").read_text().splitlines() * 5
    rows[3] = rows[30] = "{"
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    with caplog.at_level(logging.WARNING, logger="sphinx_fast"):
        run = training("stage2", tmp_path / "run", data=[{"path": str(tmp_path / "rows.jsonl")}], steps=None, epochs=1)
        run.run()
    assert run.step == 12 and run.read == 60 and dict(run.bad) == {"not readable": 2}
    assert "row skipped: rows.jsonl:4" in caplog.text
    assert json.loads((tmp_path / "run/step-00000012/state.json").read_text())["bad"] == {"not readable": 2}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training("stage2", tmp_path / "run", steps=8)
    plain = run.update

    def update(batch: Any) -> dict[str, float]:
        if batch.step == 4:
            os.kill(os.getpid(), number)
        return plain(batch)

    monkeypatch.setattr(run, "update", update)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    again = training("stage2", tmp_path / "run", steps=8)
    assert again.resume() and again.step == 5


# --- what a run leaves ------------------------------------------------------------------------------------------------
def test_held_out_data(tmp_path: Path) -> None:
    evaluated = [{"path": str(data_folder() / "plain.jsonl")}]
    run = training("stage2", tmp_path / "run", eval_data=evaluated, eval_every=3, eval_rows=8, steps=7)
    first = run.parts.held_out()
    assert first == run.parts.held_out(), "the same rows, and nothing is learned from them"
    run.run()
    lines = [line for line in log(tmp_path / "run") if "held_out/plain.jsonl" in line]
    assert [line["step"] for line in lines] == [2, 5, 6]
    assert lines[-1]["held_out/plain.jsonl"] < first["plain.jsonl"]


def test_the_result_answers(tmp_path: Path) -> None:
    folder = training("stage1", tmp_path / "run", steps=2).run()
    assert folder == tmp_path / "run" / "model"
    sphinx = Sphinx.from_pretrained(folder, device="cpu")
    assert sphinx.model.config.vision_config.num_views == 5, "stage 1 sees one view, its result all of them"
    assert isinstance(sphinx.ask(data_folder() / "pictures/0.png", "what?", max_new_tokens=3), str)


def test_stage_one_sees_one_view(tmp_path: Path) -> None:
    run = training("stage1", tmp_path / "run")
    batch = run.parts.reading.steps[0]
    views = sum(len(row.pixel_values) for row in batch.rows if row.pixel_values is not None)
    assert views == 4, "four pairs, one global view each"
    text = sum(int((row.kinds == 1).sum()) for row in batch.rows)
    assert text == 96, "and 96 tokens of text"
    assert list(run.parts.reading.kinds) == ["caption", "text"]


def test_both_losses_are_means_of_their_own(tmp_path: Path) -> None:
    """loss = caption_weight * mean over caption targets + text_weight * mean over text targets."""
    run = training("stage1", tmp_path / "run", caption_weight=2.0, text_weight=0.25, max_length=300)
    values = run.update(run.parts.reading.steps[0])
    assert math.isclose(values["loss"], 2 * values["caption_loss"] + 0.25 * values["text_loss"], rel_tol=1e-6)


def test_other_views(tmp_path: Path) -> None:
    run = training("stage2", tmp_path / "run", picture_size=32, steps=1)
    assert run.parts.reading.steps.image_processor.num_views == 1
    folder = run.run()
    assert folder is not None
    assert Sphinx.from_pretrained(folder, device="cpu").model.config.vision_config.num_views == 1


def test_adapters(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = training("stage2", tmp_path / "run", lora={"rank": 4}, steps=4)
    assert all("lora_" in name or name.startswith("model.fusion.") for name in run.parameters)
    run.run()
    adapter = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 7
    before, after = (load_file(f / "model.safetensors") for f in (start_folder(), tmp_path / "run/model"))
    assert before.keys() == after.keys(), "merged: the result is a model like any other"
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    ends = "base_model.model.layers.0.mlp.up_proj.lora_{}.weight"
    added = adapter[ends.format("B")] @ adapter[ends.format("A")] * (32 / 4)
    assert torch.allclose(after[name], before[name] + added, atol=1e-5) and added.any()
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_adapters_beside_half_precision(tmp_path: Path) -> None:
    """What a GPU does: the language model and the encoders in bf16, adapters and fusion in fp32."""
    run = training("stage2", tmp_path / "run", lora={"rank": 2}, scale={"dtype": "bfloat16"}, steps=3)
    assert {parameter.dtype for parameter in run.parameters.values()} == {torch.float32}
    assert run.parts.model.lm_head.weight.dtype == torch.bfloat16
    run.run()
    assert log(tmp_path / "run")[-1]["loss"] < 7


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_adapters_on_quantised_weights(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nf4 is refused without a GPU, but bitsandbytes computes on a CPU too: what is done there can be tested here."""
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
        monkeypatch.setattr(quantize, "check", lambda *_: None)
    changes: dict[str, Any] = {"quantize": method, "lora": {"rank": 4}, "scale": {"checkpoint": True}, "steps": 8}
    run = training("stage2", tmp_path / "run", save_every=3, **changes)
    resting = {n: p for n, p in run.parts.model.named_parameters() if n.endswith("proj.base_layer.weight")}
    assert len(resting) == 2 * 7 and all(quantize.is_quantized(p) and not p.requires_grad for p in resting.values())
    assert {p.dtype for p in run.parameters.values()} == {torch.float32}
    assert all("lora_" in name or name.startswith("model.fusion.") for name in run.parameters)
    before = {name: bits(parameter) for name, parameter in resting.items()}
    assert run.run() == tmp_path / "run/adapter" and not (tmp_path / "run/model").exists()
    assert all(torch.equal(bits(parameter), before[name]) for name, parameter in resting.items())
    assert log(tmp_path / "run")[-1]["loss"] < log(tmp_path / "run")[0]["loss"] - 0.1
    for name in ("adapter_model", "fusion"):
        assert all(value.isfinite().all() for value in load_file(tmp_path / f"run/adapter/{name}.safetensors").values())
    training("stage2", tmp_path / "cut", save_every=3, **changes).run(until=5)
    again = training("stage2", tmp_path / "cut", save_every=3, **changes)
    again.run()
    ours, theirs = weights_and_moments(again), weights_and_moments(run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def bits(parameter: torch.Tensor) -> torch.Tensor:
    """The integers of a quantised weight."""
    return (parameter.qdata if hasattr(parameter, "qdata") else parameter.data).clone()


def test_adapters_resume(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"lora": {"rank": 2, "dropout": 0.1}, "steps": 6, "save_every": 2}
    straight = training("stage2", tmp_path / "straight", **changes)
    straight.run()
    training("stage2", tmp_path / "cut", **changes).run(until=3)
    again = training("stage2", tmp_path / "cut", **changes)
    again.run()
    ours, theirs = fingerprint(again), fingerprint(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_recomputed_activations_are_the_same(tmp_path: Path) -> None:
    plain = training("stage2", tmp_path / "a", steps=2)
    again = training("stage2", tmp_path / "b", steps=2, scale={"checkpoint": True})
    for run in (plain, again):
        run.learner.train()
        for step in range(2):
            run.update(run.parts.reading.steps[step])
    assert all(torch.equal(p, again.parameters[name]) for name, p in plain.parameters.items())


def test_the_log(tmp_path: Path) -> None:
    training("stage2", tmp_path / "run", steps=2).run()
    line = log(tmp_path / "run")[-1]
    names = {"step", "loss", "rate", "gradient_norm", "seconds", "tokens_per_second", "pictures_per_second", "tflops"}
    assert names <= line.keys() and all(math.isfinite(value) for value in line.values())
    assert module.BAD_SHARE == 0.05


# --- other models -----------------------------------------------------------------------------------------------------
def folder_of(folder: Path, text: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """A model folder like `start_folder`, with another language model."""
    tiny_model(tiny_config(text=text)).to(dtype).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}


@pytest.mark.parametrize("text", [GPT2, {"model_type": "qwen2"}], ids=["gpt2", "qwen2"])
def test_other_language_models(text: dict[str, Any], tmp_path: Path) -> None:
    start = folder_of(tmp_path / "start", text)
    folder = training("stage2", tmp_path / "run", model=str(start), steps=2).run()
    assert folder is not None
    before, after = (load_file(where / "model.safetensors") for where in (start, folder))
    assert before.keys() == after.keys()


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_tied_embeddings(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    """One weight: trained once, saved once, and still one in the result."""
    start = folder_of(tmp_path / "start", {"tie_word_embeddings": True})
    run = training("stage2", tmp_path / "run", model=str(start), lora=lora, steps=2)
    tied = [name for name in run.parameters if "embed_tokens" in name or "lm_head" in name]
    assert tied == ([] if lora else ["model.language_model.embed_tokens.weight"])
    folder = run.run()
    assert folder is not None
    before, after = (load_file(where / "model.safetensors") for where in (start, folder))
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    model = Sphinx.from_pretrained(folder, device="cpu").model
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_what_does_not_learn_is_not_rounded(tmp_path: Path) -> None:
    """Adapters in bfloat16 on a float16 folder: nothing of it goes through bfloat16."""
    start = folder_of(tmp_path / "start", {}, torch.float16)
    changes: dict[str, Any] = {"model": str(start), "scale": {"dtype": "bfloat16"}, "lora": {"rank": 2}, "steps": 2}
    folder = training("stage2", tmp_path / "run", **changes).run()
    assert folder is not None
    before, after = (load_file(where / "model.safetensors") for where in (start, folder))
    adapted = {name for name in before if name.endswith("_proj.weight") and "language_model" in name}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert adapted < changed and {name.rsplit(".", 3)[0] for name in changed - adapted} <= {"model", "model.fusion"}
    adapter = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    ends = "base_model.model.layers.0.mlp.up_proj.lora_{}.weight"
    added = adapter[ends.format("B")] @ adapter[ends.format("A")] * (32 / 2)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(after[name], (before[name].float() + added).half()), "rounded once"


def test_evaluation_sets_are_told_apart(tmp_path: Path) -> None:
    """By number where files have one name; a set with no usable row has no loss, and one with no row is refused."""
    rows = (data_folder() / "plain.jsonl").read_text()
    paths = []
    for name, text in (("a", rows), ("b", "{\n{\n"), ("c", "\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "val.jsonl").write_text(text)
        paths.append({"path": str(tmp_path / name / "val.jsonl")})
    losses = training("stage2", tmp_path / "run", eval_data=paths[:2]).parts.held_out()
    assert list(losses) == ["val.jsonl", "val.jsonl-2"]
    assert losses["val.jsonl"] > 0 and math.isnan(losses["val.jsonl-2"])
    with pytest.raises(ValueError, match=r"eval_data: val\.jsonl: no rows"):
        training("stage2", tmp_path / "run", eval_data=paths)


def test_wandb_runs_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is the same one when it goes on, and another one than that in another folder of the same name."""
    begun: list[dict[str, Any]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None: ...

        def finish(self) -> None: ...

    fake = types.SimpleNamespace(init=lambda **given: (begun.append(given), Run())[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for out, until in (("a/run", 1), ("a/run", 2), ("b/run", 1)):
        training("stage2", tmp_path / out, steps=2, save_every=1, report="wandb").run(until=until)
    assert begun[0]["id"] == begun[1]["id"] != begun[2]["id"]
