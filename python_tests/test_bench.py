"""The benchmarks run, and their peers do the same work as ours."""

from __future__ import annotations

import bench_tower
import bench_views
import pytest
import torch
from bench_loading import drawn_picture, jpeg, processors
from tiny import tiny_config

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
