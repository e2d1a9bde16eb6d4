"""The benchmarks run, and their peers do the same work as ours."""

from __future__ import annotations

import argparse
import math

import bench_tower
import bench_train
import bench_views
import pytest
import torch
from bench_loading import drawn_picture, jpeg, processors
from tiny import TEXT, VISION, tiny_config

from sphinx_fast.ops import encoder_views


@pytest.mark.parametrize("size", [448, 672])
def test_pillow_peer_gives_the_same_tensors(size: int) -> None:
    picture = torch.randint(0, 256, (90, 130, 3), dtype=torch.uint8)
    ours = encoder_views([picture], picture_size=size, view_size=224)
    theirs = bench_views.pillow_views(picture.numpy(), size)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    near = bench_views.torch_views(picture, size)
    assert (ours.clip - near.clip).abs().max() < 0.2, "torch's resize is a few levels off, no more"


def test_every_call_of_the_views_benchmark_runs() -> None:
    calls, moved = bench_views.calls_of((2, 60, 80, 448), "cpu")
    assert {"", "pillow", "torch u8", "resize", "resize+write", "limit"} <= set(calls)
    for call in calls.values():
        call()
    assert moved == 2 * (60 * 80 * 3 + 5 * 3 * 4 * (2 * 224 * 224 + 256 * 256))


def test_every_processor_of_the_loading_benchmark_runs() -> None:
    picture = drawn_picture(60, 80, 0)
    assert len(jpeg(picture)) > 100
    for name, processor in processors().items():
        made = processor([picture], return_tensors="pt")["pixel_values"]
        assert made.shape[1] == 3, name


@pytest.mark.parametrize("name", [*bench_tower.ENCODERS, "all"])
@torch.no_grad()
def test_every_call_of_the_tower_benchmark_does_the_same_work(name: str) -> None:
    tower = bench_tower.tower_of(tiny_config().vision_config)
    calls, operations = bench_tower.calls_of(tower, name, 2)
    assert list(calls) == ["", "view by view", "batched", "products"] and operations > 1e5
    made = {peer: call() for peer, call in calls.items()}
    if name == "all":
        ours = (made[""].patches, made[""].queries)
        for peer in ("view by view", "batched"):
            for one, other in zip(ours, made[peer], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(made["view by view"], made["batched"], rtol=1e-4, atol=1e-5)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a few thousand weights; pictures and texts of several rows, so that packing changes their order."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    monkeypatch.setattr(bench_train, "LLAMA", {"cpu": {name: TEXT[name] for name in names}})
    monkeypatch.setattr(bench_train, "SMALL_VISION", VISION)
    monkeypatch.setattr(bench_train, "VOCABULARY", TEXT["vocab_size"])
    shapes = {"stage1": (1, 5, 2, 90, 130), "stage2": (5, 2, 2, 100, 520)}
    monkeypatch.setattr(bench_train, "SHAPES", {"cpu": shapes})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_step_of_training_is_that_of_a_padded_batch(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses, before an update and after one: so the gradients are the same too."""
    monkeypatch.setattr(bench_train, "optimizer_of", lambda named: torch.optim.SGD([p for _, p in named], lr=1.0))
    shape = bench_train.SHAPES["cpu"][stage]
    losses = []
    for ours in (True, False):
        model = bench_train.build("cpu", shape[0])  # seeded: twice the same
        pieces = bench_train.pieces_of(model, stage, shape)
        pixels = bench_train.pixels_of(model, pieces)
        rows = bench_train.rows_of(model, pieces, pixels, shape[4])
        assert len(rows) > 1 and len(pixels) == shape[0] * shape[1]
        step = bench_train.ours(model, rows) if ours else bench_train.padded(model, pieces, pixels)
        losses.append([step() for _ in range(3)])
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(*losses, strict=True)), losses
    assert losses[0][2] < losses[0][0] - 0.1, "and the updates count"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_every_call_of_the_training_benchmark_runs(stage: str) -> None:
    line = bench_train.stage_line(stage, argparse.Namespace(device="cpu", seconds=0.0), 1e9)
    assert set(line.ratio_to) == {"padded", "plain Llama"}
    assert all(math.isfinite(value) and value > 0 for value in (*line.ratio_to.values(), *line.figures.values()))


@pytest.mark.usefixtures("small")
def test_every_way_of_the_head_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphinx_fast.train.loss.CHUNK", 1000)  # several chunks
    calls = bench_train.head_calls(37, 16, 200, "cpu")
    ours = calls.pop("")()
    assert {"all logits"} <= calls.keys() and [tuple(g.shape) for g in ours] == [(37, 16), (200, 16)]
    for peer, call in calls.items():
        for one, other in zip(ours, call(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7, msg=lambda said, peer=peer: f"{peer}: {said}")
    line = bench_train.head_line(8, argparse.Namespace(device="cpu", seconds=0.0), 1e9)
    assert set(line.ratio_to) == set(calls)
