"""Configurations: the paper's counts, round trips, and clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import VISION, tiny_config
from transformers import AutoConfig

from sphinx_fast import SphinxConfig, SphinxVisionConfig, preset

COUNTS = [
    ("sphinx", 1, 289, 291),
    ("sphinx-1k", 5, 1445, 1455),
    ("sphinx-2k", 10, 2890, 2910),
    ("sphinx-tiny", 1, 257, 259),
    ("sphinx-tiny-1k", 5, 1285, 1295),
]


@pytest.mark.parametrize(("name", "views", "bare", "tagged"), COUNTS)
def test_presets_take_the_positions_of_paper_and_checkpoints(name: str, views: int, bare: int, tagged: int) -> None:
    vision = preset(name).vision_config
    assert (vision.num_views, vision.tokens_per_picture) == (views, tagged)
    assert preset(name, vision={"view_tags": False}).vision_config.tokens_per_picture == bare
    assert vision.patch_channels == (4608 if "tiny" in name else 5632)


def test_mini_is_the_real_architecture() -> None:
    vision = preset("sphinx-mini").vision_config
    assert vision.num_views == 5
    assert all(getattr(vision, name) is not None for name in vision.sub_configs)


def test_round_trip_through_json(tmp_path: Path) -> None:
    config = tiny_config(vision={"view_tags": False}, text={"num_hidden_layers": 3})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, SphinxConfig)
    assert again.to_json_string() == config.to_json_string()
    assert again.vision_config.clip_config.hidden_size == 16
    assert again.vision_config.tokens_per_view == config.vision_config.tokens_per_view
    assert again.text_config.num_hidden_layers == 3


def test_absent_encoders_stay_absent(tmp_path: Path) -> None:
    config = tiny_config(vision={"clip_config": None, "qformer_config": None, "qformer_vision_config": None})
    config.save_pretrained(tmp_path)
    vision = AutoConfig.from_pretrained(tmp_path).vision_config
    assert vision.clip_config is None and vision.qformer_config is None
    assert vision.patch_channels == 20 + 24


BAD: list[tuple[dict[str, Any], str]] = [
    ({"picture_size": 100}, "picture_size 100 is not a multiple of view_size 32"),
    ({"view_size": 0}, "not a multiple"),
    ({"qformer_vision_config": None}, "together or not at all"),
    ({"clip_config": None, "convnext_config": None, "dinov2_config": None}, "at least one patch encoder"),
    ({"grid_size": 5}, "clip_config: image_size 32"),
    ({"convnext_size": 96}, "does not repeat evenly"),
    ({"convnext_size": 60}, "does not repeat evenly"),
    ({"dinov2_size": 64}, "dinov2_config: image_size 32"),
    ({"qformer_vision_config": {**VISION["qformer_vision_config"], "image_size": 64}}, "is not view_size"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_impossible_vision_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SphinxVisionConfig(**{**VISION, **change})


def test_unknown_preset_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'sphinx-3k'; there are sphinx, sphinx-1k"):
        preset("sphinx-3k")
