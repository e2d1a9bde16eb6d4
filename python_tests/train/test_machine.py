"""Two gloo processes compute what one does with the same global batch; a run goes on with another number of them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch import multiprocessing
from training_data import stage1, stage2, tiny_processor

from sphinx_fast.train import checkpoint
from sphinx_fast.train.settings import make_settings
from sphinx_fast.train.training import Training

STAGES = {"stage1": stage1, "stage2": stage2}


Job = tuple[str, dict[str, Any], int | None]  # stage, settings, the step to stop before


def train(stage: str, settings: dict[str, Any], until: int | None = None) -> None:
    Training(make_settings(stage, settings), progress=False).run(until)


def process(rank: int, port: int, jobs: list[Job]) -> None:
    """One of the two that torchrun would start, for several runs."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    try:
        for job in jobs:
            train(*job)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Losses, gradient norms and weights up to the order in which floats were added."""
    for a, b in zip(log(ours), log(theirs), strict=True):
        for name in (key for key in b if key.endswith("loss") or key in ("rate", "gradient_norm", "step")):
            assert math.isclose(a[name], b[name], rel_tol=2e-4), (a["step"], name, a[name], b[name])
    from safetensors.torch import load_file

    weights, expected = (load_file(out / "model/model.safetensors") for out in (ours, theirs))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        # Adam turns a rounding error of a gradient near zero into a step of the learning rate at most.
        assert (weights[name] - value).abs().max() < 2e-3, name
        assert (weights[name] - value).abs().mean() < 2e-5, name


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "stage1": ("stage1", {"pairs": 5}),
    "stage2": ("stage2", {"batch": 7}),
    "checkpointed": ("stage2", {"scale": {"checkpoint": True}}),
    "adapters": ("stage2", {"lora": {"rank": 4}}),
    "replicated": ("stage2", {"scale": {"shard": False}}),
}


def tied_folder(folder: Path) -> str:
    """A start folder whose head is its table of embeddings."""
    tiny_model(tiny_config(text={"tie_word_embeddings": True})).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


HALF = {"steps": 6, "save_every": 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that two processes have to do, in one pair of processes: starting them takes longest."""
    folder = tmp_path_factory.mktemp("runs")
    jobs: list[Job] = [
        (stage, STAGES[stage](folder / f"{name}-2", steps=4, **changes), None)
        for name, (stage, changes) in CASES.items()
    ]
    train("stage2", stage2(folder / "1-then-2", **HALF), 4)
    jobs += [("stage2", stage2(folder / "1-then-2", **HALF), None), ("stage2", stage2(folder / "2-then-1", **HALF), 4)]
    multiprocessing.spawn(process, (20_000 + os.getpid() % 20_000, jobs), nprocs=2)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name: str, runs: Path, tmp_path: Path) -> None:
    """With FSDP2, and with every process holding all. Text-only rows and odd numbers of rows are among them."""
    stage, changes = CASES[name]
    train(stage, STAGES[stage](tmp_path / "1", steps=4, **changes))
    assert_same_run(runs / f"{name}-2", tmp_path / "1")


def test_tied_embeddings_on_two_processes(tmp_path: Path) -> None:
    start = tied_folder(tmp_path / "start")
    jobs: list[Job] = [("stage2", stage2(tmp_path / "2", steps=4, model=start), None)]
    multiprocessing.spawn(process, (20_000 + (os.getpid() + 7) % 20_000, jobs), nprocs=2)
    train("stage2", stage2(tmp_path / "1", steps=4, model=start))
    assert_same_run(tmp_path / "2", tmp_path / "1")


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number(first: int, then: int, runs: Path, tmp_path: Path) -> None:
    run = runs / f"{first}-then-{then}"
    saved = checkpoint.folders(run)
    assert len(list(saved[0].glob("trained-*"))) == first and saved[0].name == "step-00000003"
    if then == 1:
        train("stage2", stage2(run, **HALF))
    train("stage2", stage2(tmp_path / "straight", **HALF))
    assert_same_run(run, tmp_path / "straight")
