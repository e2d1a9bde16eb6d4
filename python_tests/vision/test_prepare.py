"""Weights laid side by side: nothing else notices, and nothing that happens to weights goes unnoticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_tower_close, tiny_config, tiny_model, tiny_tower, tiny_views
from torch import nn
from transformers import AutoModelForImageTextToText

from sphinx_fast.vision import VisionTower
from sphinx_fast.vision.prepare import Linear, beside


def prepared() -> VisionTower:
    tower = tiny_tower(tiny_config().vision_config)
    with torch.no_grad():
        tower(tiny_views(2, 32))
    return tower


def layers_of(tower: VisionTower) -> dict[str, tuple[nn.Linear, ...]]:
    """Layers that share their input, by the module they are in."""
    found: dict[str, list[Any]] = {}
    for name, module in tower.named_modules():
        parent, _, own = name.rpartition(".")
        if own in ("q_proj", "k_proj", "v_proj", "query", "key", "value"):
            found.setdefault(parent, []).append(module)
    return {name: tuple(modules) for name, modules in found.items()}


def share(parts: tuple[nn.Linear, ...]) -> bool:
    return len({part.weight.untyped_storage().data_ptr() for part in parts}) == 1


def check(tower: VisionTower) -> None:
    """What the tower computes is what its modules say now."""
    assert_tower_close(tower, tiny_views(2, 32))


def test_the_first_call_lays_the_weights_once() -> None:
    plain = tiny_tower(tiny_config().vision_config)
    assert not any(share(parts) for parts in layers_of(plain).values())
    tower = prepared()
    groups = layers_of(tower)
    cross = [name for name in groups if "crossattention" in name]
    assert cross and sum("self_attn" in name for name in groups) == 2
    for name, parts in groups.items():
        assert share(parts[-2:] if name in cross else parts), name
    where = {name: p.data_ptr() for name, p in tower.named_parameters()}
    check(tower)
    assert where == {name: p.data_ptr() for name, p in tower.named_parameters()}, "moved once, not in every call"
    for (name, ours), (_, theirs) in zip(tower.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.is_contiguous(), name
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in tower.parameters()}
    assert sum(memory.values()) == sum(p.nbytes for p in tower.parameters()), "there is no second copy"


def first(tower: VisionTower) -> nn.Linear:
    return next(iter(layers_of(tower).values()))[0]


@torch.no_grad()
def by_assignment(tower: VisionTower) -> None:
    tower.load_state_dict({name: t * 1.1 for name, t in tower.state_dict().items()}, assign=True)


@torch.no_grad()
def by_replacing_a_layer(tower: VisionTower) -> None:
    for parts in layers_of(tower).values():
        parts[0].weight = nn.Parameter(parts[0].weight * -1.0)


@torch.no_grad()
def by_data(tower: VisionTower) -> None:
    for parts in layers_of(tower).values():
        parts[-1].weight.data = parts[-1].weight.data * 1.5
        parts[-1].bias.data = parts[-1].bias.data + 0.5


CHANGES: dict[str, Callable[[VisionTower], Any]] = {
    "in place": lambda tower: [p.data.mul_(1.1) for p in tower.parameters()],
    "load_state_dict": lambda tower: tower.load_state_dict({n: t * 1.1 for n, t in tower.state_dict().items()}),
    "assign": by_assignment,
    "a new parameter": by_replacing_a_layer,
    "new data": by_data,
    "bfloat16": lambda tower: tower.to(torch.bfloat16),
    "float16": lambda tower: tower.half(),
    "there and back": lambda tower: tower.bfloat16().float(),
    "transposed and back": lambda tower: setattr(
        first(tower).weight, "data", first(tower).weight.data.t().contiguous().t()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_is_seen(change: str) -> None:
    tower = prepared()
    with torch.no_grad():
        before = tower(tiny_views(2, 32)).patches
    CHANGES[change](tower)
    check(tower)
    check(tower)
    with torch.no_grad():
        moved = (tower(tiny_views(2, 32)).patches.float() - before.float()).abs().max()
    assert moved > 1e-5 or change in ("there and back", "transposed and back")


@torch.no_grad()
def test_the_first_call_may_be_in_inference_mode() -> None:
    tower = tiny_tower(tiny_config().vision_config)
    with torch.inference_mode():
        tower(tiny_views(2, 32))
    assert share(next(iter(layers_of(tower).values())))
    check(tower)
    with torch.enable_grad():
        tower(tiny_views(2, 32)).patches.sum().backward()
    assert first(tower).weight.grad is not None


@torch.no_grad()
def test_a_copy_is_a_copy() -> None:
    tower = prepared()
    other = copy.deepcopy(tower)
    before = tower(tiny_views(2, 32)).patches
    for parameter in other.parameters():
        parameter.mul_(0.5)
    check(other)
    assert torch.equal(tower(tiny_views(2, 32)).patches, before)


@pytest.mark.parametrize("shards", ["5GB", "50KB"])
@torch.no_grad()
def test_save_and_load(tmp_path: Path, shards: str) -> None:
    model, fresh = tiny_model(), tiny_model()
    seen = tiny_views(5, 32)
    model.model.vision_tower(seen)
    assert share(next(iter(layers_of(model.model.vision_tower).values())))
    model.save_pretrained(tmp_path / "prepared", max_shard_size=shards)
    fresh.save_pretrained(tmp_path / "fresh", max_shard_size=shards)
    files = sorted(file.name for file in (tmp_path / "fresh").glob("*.safetensors"))
    saved, expected = (
        {name: t for file in files for name, t in load_file(tmp_path / folder / file).items()}
        for folder in ("prepared", "fresh")
    )
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "prepared").eval()
    for _ in range(2):
        assert torch.equal(again.model.vision_tower(seen).patches, model.model.vision_tower(seen).patches)
    check(again.model.vision_tower)


@torch.no_grad()
def test_plain_files_of_the_state(tmp_path: Path) -> None:
    tower = prepared()
    save_file(tower.state_dict(), tmp_path / "tower.safetensors")
    torch.save(tower.state_dict(), tmp_path / "tower.pt")
    for state in (load_file(tmp_path / "tower.safetensors"), torch.load(tmp_path / "tower.pt", weights_only=True)):
        other = VisionTower(tiny_config().vision_config).eval()
        other(tiny_views(2, 32))
        other.load_state_dict(state)
        assert torch.equal(other(tiny_views(2, 32)).patches, tower(tiny_views(2, 32)).patches)


@torch.no_grad()
def test_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = tiny_model()
    expected = model.model.vision_tower(tiny_views(5, 32)).patches
    model.save_pretrained(tmp_path)
    options: Any = {"offload_folder": tmp_path / "offload"}
    rest = {"model.fusion": "cpu", "model.language_model": "cpu", "lm_head": "cpu"}
    encoders = {f"model.vision_tower.{name}": "cpu" for name in ("clip", "convnext", "dinov2", "qformer")}
    one_away = {**rest, **encoders, "model.vision_tower.dinov2": "disk"}
    for device_map in ("auto", {"": "cpu"}, {**rest, "model.vision_tower": "disk"}, one_away):
        mapped = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=device_map, **options).eval()
        for _ in range(2):
            torch.testing.assert_close(mapped.model.vision_tower(tiny_views(5, 32)).patches, expected)


def test_adapters_on_encoders() -> None:
    peft = pytest.importorskip("peft")
    tower = prepared()
    with torch.no_grad():
        before = tower(tiny_views(2, 32)).patches
    config = peft.LoraConfig(r=2, target_modules=r"clip.*q_proj|dinov2.*v_proj", init_lora_weights=False)
    adapted = peft.get_peft_model(tower, config)
    check(tower)
    with torch.no_grad():
        assert not torch.allclose(tower(tiny_views(2, 32)).patches, before, atol=1e-3)
    adapted.merge_and_unload()
    check(tower)


def linears(count: int) -> list[nn.Linear]:
    return [nn.Linear(6, 4 + index) for index in range(count)]


def as_parts(layers: list[nn.Linear]) -> list[Linear]:
    return [Linear(layer.weight, layer.bias) for layer in layers]


def test_layers_of_any_width_are_joined() -> None:
    layers = linears(3)
    x = torch.randn(5, 6)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    (joined,) = beside(*as_parts(layers))
    assert joined.weight.shape == (15, 6) and joined.bias is not None
    torch.testing.assert_close(nn.functional.linear(x, *joined), expected)
    assert joined.weight.data_ptr() == layers[0].weight.data_ptr()
    (again,) = beside(*as_parts(layers))
    assert again.weight.data_ptr() == joined.weight.data_ptr() and not again.weight.requires_grad


def flat(layers: list[nn.Linear]) -> None:
    """As sharded training does: all parameters are views of one buffer, in another order."""
    buffer = torch.cat([layer.weight.detach().flatten() for layer in reversed(layers)])
    at = 0
    for layer in reversed(layers):
        count = layer.weight.numel()
        layer.weight.data = buffer[at : at + count].view_as(layer.weight)
        at += count


UNMOVED: dict[str, Callable[[list[nn.Linear]], Any]] = {
    "views of another's buffer": flat,
    "shared with another process": lambda layers: layers[1].weight.data.share_memory_(),
    "another dtype": lambda layers: layers[1].double(),
    "another layout": lambda layers: setattr(layers[2].weight, "data", layers[2].weight.data.t().contiguous().t()),
    "no weights yet": lambda layers: [layer.to("meta") for layer in layers],
    "another type": lambda layers: setattr(layers[0], "weight", nn.Parameter(torch.Tensor._make_subclass(
        type("Packed", (torch.Tensor,), {}), layers[0].weight.data))),
}  # fmt: skip


@pytest.mark.parametrize("case", UNMOVED)
def test_weights_of_somebody_else_stay_where_they_are(case: str) -> None:
    layers = linears(3)
    UNMOVED[case](layers)
    parts = as_parts(layers)
    where = [part.weight.data_ptr() for part in parts]
    assert [part is other for part, other in zip(beside(*parts), parts, strict=True)] == [True] * 3
    assert where == [layer.weight.data_ptr() for layer in layers]
