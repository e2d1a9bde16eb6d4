"""The tower: views -> features of four encoders, beside the same modules run as others run them.

    python bench/bench_tower.py [--device cuda] [--threads 2] [--save]      # every encoder alone, then all together
    pytest bench/bench_tower.py --benchmark-only                            # the same calls under pytest-benchmark

Full widths and input sizes. On a CPU fp32 and fewer layers, so that it fits two cores: layers of an encoder are alike,
and DEPTHS says how many of each are run. On a GPU bf16 and all layers. Peers, on the same weights:
    view by view   the modules (transformers' and the plain ConvNeXt) in a row for a view, then for the next; torch.cat
    batched        the modules in a row on all views; ConvNeXt's map repeated to the grid, torch.cat
    products       the matrix products of the linear layers alone, operands in place: the roof
    graph          (GPU) ours as one CUDA graph, the encoders on parallel branches
    compiled       (GPU) ours through torch.compile
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import Call, Line, arguments, measure, save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sphinx_fast.model.config import SphinxVisionConfig
from sphinx_fast.ops import EncoderViews
from sphinx_fast.vision import VisionTower
from sphinx_fast.vision.clip import clip_features
from sphinx_fast.vision.convnext import convnext_features, repeat_to_grid
from sphinx_fast.vision.dinov2 import dinov2_features

VIEWS = (5, 1)
ENCODERS = ("clip", "convnext", "dinov2", "qformer")
DEPTHS: dict[str, Any] = {
    "clip_config": {"num_hidden_layers": 2},  # of 24
    "convnext_config": {"depths": (1, 1, 2, 1), "layer_scale_init": 0.1},  # of 3, 4, 30, 3
    "dinov2_config": {"num_hidden_layers": 2},  # of 40
    "qformer_vision_config": {"num_hidden_layers": 2},  # of 39
    "qformer_config": {"num_hidden_layers": 2},  # of 12
}


def tower_of(config: SphinxVisionConfig | None = None, device: str = "cpu") -> VisionTower:
    """The encoders at full width with random weights: as deep as released on a GPU, as DEPTHS says on a CPU."""
    torch.manual_seed(0)
    depths: dict[str, Any] = DEPTHS if device == "cpu" else {name: {} for name in DEPTHS}
    with torch.device(device):
        tower = VisionTower(config or SphinxVisionConfig(picture_size=448, **depths)).eval().requires_grad_(False)
    return tower.to(torch.bfloat16 if device == "cuda" else torch.float32)


def modules_of(tower: VisionTower) -> dict[str, Callable[[EncoderViews], Tensor]]:
    """Each encoder as its modules: inputs of N views -> [N, tokens, C], maps repeated to the grid."""
    positions = tower.config.grid_size**2
    return {
        "clip": lambda views: clip_features(tower.clip, views.clip),  # type: ignore[arg-type]
        "convnext": lambda views: repeat_to_grid(convnext_features(tower.convnext, views.convnext), positions),  # type: ignore[arg-type]
        "dinov2": lambda views: dinov2_features(tower.dinov2, views.dinov2),  # type: ignore[arg-type]
        "qformer": lambda views: tower.qformer(views.clip),  # type: ignore[misc]
    }


def in_a_row(tower: VisionTower, views: EncoderViews) -> tuple[Tensor, Tensor]:
    """(patches [N, 1 + P, C], queries) as the released code makes them."""
    run = modules_of(tower)
    return torch.cat([run[name](views) for name in ENCODERS[:3]], dim=-1), run["qformer"](views)


def one_by_one(views: EncoderViews) -> list[EncoderViews]:
    return [EncoderViews(*(part[i : i + 1] for part in views)) for i in range(len(views.clip))]


def products(module: nn.Module, run: Call) -> Call:
    """The products of every linear layer that `run` passes, with as many rows, out of one buffer into another."""
    seen: list[tuple[int, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, _: seen.append((args[0].shape[:-1].numel(), layer.weight)))
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    ]
    run()
    for hook in hooks:
        hook.remove()
    like = seen[0][1]
    source = torch.randn(max(rows * weight.shape[1] for rows, weight in seen), device=like.device).to(like.dtype)
    target = torch.empty(max(rows * weight.shape[0] for rows, weight in seen), device=like.device, dtype=like.dtype)

    def call() -> None:
        for rows, weight in seen:
            out, width = weight.shape
            torch.mm(source[: rows * width].view(rows, width), weight.t(), out=target[: rows * out].view(rows, out))

    return call


def calls_of(tower: VisionTower, name: str, count: int) -> tuple[dict[str, Call], float]:
    """Ours (under the empty name) and the peers for one encoder or "all", and the operations of one call."""
    size = tower.config.view_size
    pixels = torch.randn(count, 3, size, size, device=tower.device)
    views = tower.encoder_inputs(pixels)
    single = one_by_one(views)
    if name == "all":
        calls: dict[str, Call] = {
            "": lambda: tower(views),
            "view by view": lambda: [
                torch.cat(parts) for parts in zip(*(in_a_row(tower, v) for v in single), strict=True)
            ],
            "batched": lambda: in_a_row(tower, views),
        }
        whole: nn.Module = tower
    else:
        run, features = modules_of(tower)[name], tower.empty_features(count, tower.device)
        calls = {
            "": dict(zip(ENCODERS, tower.branches(views, features), strict=True))[name],
            "view by view": lambda: torch.cat([run(view) for view in single]),
            "batched": lambda: run(views),
        }
        whole = getattr(tower, name)
    with FlopCounterMode(display=False) as counter:
        calls["batched"]()
    calls["products"] = products(whole, calls["batched"])
    if tower.device.type == "cuda" and name == "all":
        graphs = tower_of(tower.config, "cuda").use_graphs()
        compiled = torch.compile(tower.forward)
        calls |= {"graph": lambda: graphs(views), "compiled": lambda: compiled(views)}
    return calls, counter.get_total_flops()


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    return tower_of()


@pytest.mark.parametrize("peer", ["", "view by view", "batched", "products"], ids=lambda n: n or "ours")
@pytest.mark.parametrize("name", [*ENCODERS, "all"])
@pytest.mark.parametrize("count", VIEWS)
def test_tower(benchmark: Any, tower: VisionTower, count: int, name: str, peer: str) -> None:
    benchmark.group = f"tower {name} {count} views"
    with torch.no_grad():
        benchmark.pedantic(calls_of(tower, name, count)[0][peer], rounds=5, warmup_rounds=1)


@torch.no_grad()
def main() -> None:
    chosen = arguments(__doc__ or "")
    tower = tower_of(device=chosen.device)
    depths = ", ".join(f"{name.removesuffix('_config')} {next(iter(d.values()))}" for name, d in DEPTHS.items())
    reduced = chosen.device == "cpu"
    print(f"{torch.get_num_threads()} threads; layers: {depths if reduced else 'all'}")
    lines: list[Line] = []
    for count in VIEWS if chosen.device == "cpu" else (1, 5, 10, 40):
        for name in (*ENCODERS, "all"):
            calls, operations = calls_of(tower, name, count)
            shape = f"{name}, {count} views{', reduced depth' * reduced}"
            lines.append(measure("tower", shape, calls.pop(""), calls, operations, "products", chosen))
    save(lines, chosen)


if __name__ == "__main__":
    main()
