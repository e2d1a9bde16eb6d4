"""What a run is said to need is what a really built one holds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_data import stage2, start_folder

from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.model.presets import preset
from sphinx_fast.train import estimate as module
from sphinx_fast.train.batches import batches
from sphinx_fast.train.estimate import estimate
from sphinx_fast.train.settings import make_settings
from sphinx_fast.train.training import Training

LORA = {"rank": 2}


def held(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": ["fusion"]},
        {"train": ["language_model"]},
        {"lora": LORA},
        {"lora": LORA, "train": ["language_model"]},
    ],
    ids=str,
)
def test_a_built_run_holds_it(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = make_settings("stage2", stage2(tmp_path / "run", **changes))
    run = Training(settings, progress=False)
    said = estimate(SphinxConfig.from_pretrained(start_folder()), settings, world=1, dtype=run.machine.dtype)
    gradients: list[Tensor] = []
    for parameter in run.parameters.values():
        parameter.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad))
    run.update(next(iter(batches(run.parts.reading.steps, 0, 1, 0))))
    assert said.weights == held(run.parts.model.parameters())
    assert sum(said.learning.values()) == sum(p.numel() for p in run.parameters.values())
    moments = [t for state in run.optimizer.state.values() for name, t in state.items() if name != "step"]
    assert said.moments == held(moments)
    largest = {id(p): p.numel() * p.element_size() for p in run.parameters.values()}
    assert said.gradients == sum(largest.values()), "a gradient for each weight that learns, of its dtype"
    assert gradients and all(gradient.dtype == torch.float32 for gradient in gradients)


def test_half_precision_rests_under_adapters(tmp_path: Path) -> None:
    settings = make_settings("stage2", stage2(tmp_path / "run", lora=LORA, scale={"dtype": "bfloat16"}))
    run = Training(settings, progress=False)
    said = estimate(SphinxConfig.from_pretrained(start_folder()), settings, world=1, dtype=torch.bfloat16)
    assert said.weights == held(run.parts.model.parameters())


@functools.cache
def config(name: str) -> SphinxConfig:
    return preset(name)


@pytest.fixture(scope="module", autouse=True)
def shapes_once() -> Iterator[None]:
    """The shapes of a large model take seconds, and are the same for any settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "on_disk_shapes", functools.cache(module.on_disk_shapes))
        patch.setattr(SphinxConfig, "__hash__", object.__hash__)
        yield


def of(world: int = 1, name: str = "sphinx", **changes: Any) -> Any:
    content = {"model": "m", "out": "o", "data": [{"path": "p"}], **changes}
    return estimate(config(name), make_settings("stage2", content), world=world, dtype=torch.bfloat16)


def test_by_hand() -> None:
    """13B: master weights, gradients and moments of 4 + 4 + 8 bytes lie in parts; 2-byte encoders lie everywhere."""
    one, eight = of(), of(8)
    learned, encoders = sum(one.learning.values()), one.frozen["encoders"]
    assert 13.0e9 < learned < 13.1e9 and 3.3e9 < encoders < 3.4e9
    assert (one.weights, one.gradients, one.moments) == (4 * learned + 2 * encoders, 4 * learned, 8 * learned)
    assert abs(eight.total - eight.activations - (2 * learned + 2 * encoders)) < 8
    assert of(8, scale={"shard": False}).gradients == one.gradients
    # 34 bytes per token and width of a block (Korthikanti et al.); with checkpoints the 2-byte borders and one block.
    block = 34 * 3072 * 5120
    assert one.activations == 40 * block
    assert of(scale={"checkpoint": True}).activations == 40 * 2 * 3072 * 5120 + block


def test_what_is_frozen_beside_what_learns() -> None:
    """The learner is laid out in fp32 whole; under adapters the language model rests in bf16, or in four bits."""
    fusion = of(train=["fusion"])
    language = fusion.frozen["language_model"]
    assert fusion.weights == 4 * (language + fusion.learning["fusion"]) + 2 * fusion.frozen["encoders"]
    lora, four = of(8, lora={}), of(8, lora={}, quantize="nf4")
    assert lora == of(1, lora={}), "adapters are not sharded"
    assert lora.weights == 2 * (language + lora.frozen["encoders"]) + 4 * sum(lora.learning.values())
    tables = 2 * 32_000 * 5120  # embedding and head stay
    assert abs(lora.weights - four.weights - (2 - 0.5625) * (language - tables)) < 2e6
