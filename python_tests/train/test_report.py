"""What a run says: log.jsonl always, TensorBoard and wandb where they are, speeds of the last steps."""

from __future__ import annotations

import builtins
import importlib.util
import json
import logging
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from sphinx_fast.train import report as module
from sphinx_fast.train.report import RECENT, Report, forget

CPU = torch.device("cpu")
WORK = {"tokens": 1000.0, "pictures": 4.0, "flops": 2e12, "language_flops": 1e12}


def report(folder: Path, **changes: Any) -> Report:
    folder.mkdir(exist_ok=True)
    given: dict[str, Any] = {"start": 0, "steps": 9, "device": CPU, "peak": None, "kind": None, "speaks": True}
    return Report(folder, {"seed": 3}, progress=False, **{**given, **changes})


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- the log ----------------------------------------------------------------------------------------------------------
def test_a_line_per_step(tmp_path: Path) -> None:
    said = report(tmp_path / "run")
    said.step(0, {"loss": 1.5}, WORK)
    assert lines(tmp_path / "run")[0]["loss"] == 1.5, "it is there at once, not when the run ends"
    said.write(0, {"held_out/a": 0.123456789123})
    said.close()
    assert lines(tmp_path / "run")[1] == {"step": 0, "held_out/a": 0.12345679}


def test_only_the_first_process_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = report(tmp_path / "run", speaks=False, kind="tensorboard")
    said.step(0, {"loss": 1.5}, WORK)
    said.say("hello")
    said.close()
    assert list((tmp_path / "run").iterdir()) == [] and capsys.readouterr() == ("", "")


def test_forget(tmp_path: Path) -> None:
    """Steps that will be done again, lines that a kill cut off, and what is no line of the log."""
    log = tmp_path / "log.jsonl"
    forget(log, 0)
    assert not log.exists()
    kept = ['{"step": 0, "loss": 3.0}', '{"step": 1, "loss": 2.0}', '{"step": 1, "held_out/a": 2.5}']
    gone = ['{"step": 2, "loss": 1.0}', "{}", "[]", "7", '{"step": "x"}', '{"step": 1, "lo']
    log.write_text("\n".join([kept[0], *gone[:3], *kept[1:], *gone[3:]]))
    forget(log, 2)
    assert log.read_text().splitlines() == kept
    forget(log, 2)
    assert log.read_text().splitlines() == kept
    forget(log, 0)
    assert log.read_text() == ""


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    for start in (0, 2):
        said = report(tmp_path / "run", start=start)
        for step in range(start, 4):
            said.step(step, {"loss": float(start)}, WORK)
        said.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "run")] == [(0, 0), (1, 0), (2, 2), (3, 2)]


# --- speeds -----------------------------------------------------------------------------------------------------------
class Clock:
    """A clock that tests wind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


@pytest.mark.parametrize("peak", [None, 4e12])
def test_speeds_are_those_of_the_clock(peak: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    said = report(tmp_path / "run", peak=peak)
    for step, seconds in enumerate((1.0, 3.0)):
        clock.now += seconds
        said.step(step, {"loss": 1.0}, WORK)
    said.close()
    first, second = lines(tmp_path / "run")
    assert (first["seconds"], first["tokens_per_second"], first["pictures_per_second"]) == (1.0, 1000.0, 4.0)
    assert (second["seconds"], second["tokens_per_second"], second["tflops"]) == (3.0, 500.0, 1.0)
    assert first["memory_gib"] > 0 and all(map(math.isfinite, second.values()))
    assert (second.get("mfu"), second.get("language_mfu")) == ((0.25, 0.125) if peak else (None, None))


def test_speeds_forget_what_is_long_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step compiles and warms up: twenty steps later it no longer counts."""
    clock = Clock(monkeypatch)
    said = report(tmp_path / "run")
    for step in range(RECENT + 1):
        clock.now += 0.5 if step else 1000.0
        said.step(step, {"loss": 1.0}, WORK)
    said.close()
    speeds = [line["tokens_per_second"] for line in lines(tmp_path / "run")]
    assert speeds[0] == 1.0 and speeds[RECENT - 1] < 100 and speeds[RECENT] == 2000.0


def test_a_step_without_work(tmp_path: Path) -> None:
    said = report(tmp_path / "run", peak=4e12)
    said.step(0, {"loss": 1.0}, dict.fromkeys(WORK, 0.0))
    said.close()
    assert lines(tmp_path / "run")[0]["mfu"] == 0.0


# --- TensorBoard, wandb -----------------------------------------------------------------------------------------------
def missing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As if a package were not installed."""
    plain = builtins.__import__

    def without(wanted: str, *rest: Any) -> Any:
        if wanted.split(".")[0] == name or wanted == f"torch.utils.{name}":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return plain(wanted, *rest)

    monkeypatch.setattr(builtins, "__import__", without)


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    missing(monkeypatch, "tensorboard")
    with caplog.at_level(logging.WARNING, logger="sphinx_fast"):
        said = report(tmp_path / "run", kind="tensorboard")
        for step in range(2):
            said.step(step, {"loss": 1.0}, WORK)
        said.close()
    assert [record.message for record in caplog.records] == [
        "report: tensorboard is not installed; log.jsonl is written all the same"
    ]
    assert len(lines(tmp_path / "run")) == 2


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_writes_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = report(tmp_path / "run", kind="tensorboard")
    for step in (5, 6):
        said.step(step, {"loss": float(step)}, WORK)
    said.close()
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(5, 5.0), (6, 6.0)]
    assert "tokens_per_second" in events.Tags()["scalars"]


class FakeWandb(types.ModuleType):
    """What of wandb is used, remembered."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.given: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def init(self, **given: Any) -> FakeWandb:
        self.given = given
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_wandb_receives_values_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    said = report(tmp_path / "run", kind="wandb")
    for step in (3, 4):
        said.step(step, {"loss": float(step)}, WORK)
    assert not fake.finished
    said.close()
    assert fake.finished and (fake.given["name"], fake.given["config"]) == ("run", {"seed": 3})
    assert fake.given["resume"] == "allow" and fake.given["id"], "a resumed run goes on in its own curves"
    assert [(step, values["loss"]) for step, values in fake.logged] == [(3, 3.0), (4, 4.0)]
    assert [line["loss"] for line in lines(tmp_path / "run")] == [3.0, 4.0]


def test_wandb_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "wandb")
    with pytest.raises(ValueError, match="wandb is not installed: pip install wandb"):
        report(tmp_path / "run", kind="wandb")
