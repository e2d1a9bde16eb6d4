"""On a GPU: bf16 over fp32 weights, sharded over itself; compiled blocks; flash-attn where it is installed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_data import stage1, stage2

from sphinx_fast.train.packing import Packed, flash_attn_varlen_func
from sphinx_fast.train.settings import make_settings
from sphinx_fast.train.training import Training

STAGES = {"stage1": stage1, "stage2": stage2}


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def losses(stage: str, out: Path, steps: int = 6, **changes: Any) -> list[float]:
    run = Training(make_settings(stage, STAGES[stage](out, steps=steps, **changes)), progress=False)
    run.learner.train()
    return [run.update(run.parts.reading.steps[step])["loss"] for step in range(steps)]


def assert_half_precision(ours: list[float], exact: list[float]) -> None:
    """Losses of bf16 computation are those of fp32 within 2 %, and fall as they do."""
    assert all(math.isclose(a, b, rel_tol=0.02) for a, b in zip(ours, exact, strict=True)), (ours, exact)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_over_fp32_weights_on_a_cpu(stage: str, tmp_path: Path) -> None:
    """The same path that a single GPU takes: FSDP2 over one process."""
    half = losses(stage, tmp_path / "half", scale={"dtype": "bfloat16"})
    assert_half_precision(half, losses(stage, tmp_path / "whole"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("scale", [{}, {"checkpoint": True}, {"compile": True}], ids=["plain", "checkpoint", "compile"])
@pytest.mark.gpu
def test_a_gpu_learns_what_a_cpu_does(stage: str, scale: dict[str, bool], tmp_path: Path) -> None:
    ours = losses(stage, tmp_path / "gpu", device="cuda", scale=scale)
    assert_half_precision(ours, losses(stage, tmp_path / "cpu"))


@pytest.mark.gpu
def test_weights_stay_in_fp32(tmp_path: Path) -> None:
    run = Training(make_settings("stage2", stage2(tmp_path, device="cuda")), progress=False)
    run.update(run.parts.reading.steps[0])
    assert {parameter.dtype for parameter in run.parameters.values()} == {torch.float32}
    assert {p.dtype for p in run.parts.model.model.vision_tower.parameters()} == {torch.bfloat16}


@pytest.mark.gpu
def test_a_run_resumes_on_a_gpu(tmp_path: Path) -> None:
    settings = stage2(tmp_path / "run", device="cuda", steps=6, save_every=2)
    Training(make_settings("stage2", settings), progress=False).run(until=3)
    again = Training(make_settings("stage2", settings), progress=False)
    assert again.resume() and again.step == 2
    folder = again.run()
    assert folder is not None and (folder / "model.safetensors").is_file()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_adapters_on_quantised_weights(method: str, tmp_path: Path) -> None:
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
    changes = {"quantize": method, "lora": {"rank": 4}, "scale": {"checkpoint": True}}
    run = Training(make_settings("stage2", stage2(tmp_path / "run", device="cuda", steps=8, **changes)), progress=False)
    assert {parameter.dtype for parameter in run.parameters.values()} == {torch.float32}
    assert run.run() == tmp_path / "run/adapter" and run.skipped == 0
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    lines = [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines[-1] < lines[0] - 0.1


@pytest.mark.gpu
@pytest.mark.skipif(flash_attn_varlen_func is None, reason="flash-attn is not installed")
def test_flash_attn_is_a_call_per_piece() -> None:
    lengths = [(5,), (130,), (1,), (64,)]
    total = sum(map(sum, lengths))
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, total, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]
    positions = torch.zeros(total, device="cuda")
    fast = Packed(lengths, positions).attend(0, *tensors, None)
    slow = Packed(lengths, positions)
    slow.plain = False
    torch.testing.assert_close(fast, slow.attend(0, *tensors, None), rtol=2e-2, atol=2e-2)


def test_compiled_blocks(tmp_path: Path) -> None:
    """On a CPU the compiler is g++; the losses are those of plain blocks."""
    compiled = losses("stage2", tmp_path / "compiled", 2, scale={"compile": True})
    plain = losses("stage2", tmp_path / "plain", 2)
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(compiled, plain, strict=True))
