"""The whole run in small, and that it resumes."""

import json

import pytest
import torch

from sphinx_fast import Sphinx
from sphinx_fast.infer import EMBEDDED_MODEL
from sphinx_fast.model import SphinxForConditionalGeneration
from sphinx_fast.train.mini import recipe as mini
from sphinx_fast.train.settings import read_settings
from sphinx_fast.train.streams import open_sources


def test_smoke_run_gives_a_model_that_answers(smoke):
    figures = json.loads((smoke.with_name("model.work") / "figures.json").read_text())["figures"]
    assert set(figures) == {"vqa", "refer"} and set(figures["vqa"]["accuracy"]) == {"seeing", "grey", "guess"}
    sphinx = Sphinx.from_pretrained(smoke, dtype=torch.float32)
    assert isinstance(sphinx.ask(torch.zeros(64, 80, 3, dtype=torch.uint8), "What is this?", max_new_tokens=4), str)


def test_steps_are_skipped_when_their_result_is_there(smoke, monkeypatch):
    monkeypatch.setattr(mini, "train_encoder", None)
    monkeypatch.setattr(mini, "launch", None)
    monkeypatch.setattr(mini, "align_fusion", None)
    before = SphinxForConditionalGeneration.from_pretrained(smoke).state_dict()
    mini.train(smoke, mini.SMOKE, seed=0)
    after = SphinxForConditionalGeneration.from_pretrained(smoke).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("recipe", [mini.Recipe(), mini.QUICK, mini.SMOKE])
def test_changes_of_a_recipe_are_settings_that_exist(recipe, tmp_path):
    """And data that opens: a wrong name would end a run after half an hour."""
    text = tmp_path / "texts.txt"
    text.write_text("a\n")
    first = ("model=m", "out=o", f"text=[{text}]", *recipe.stage1)
    for stage, path, changes in (
        ("stage1", mini.STAGE1, first),
        ("stage1", mini.STAGE1, (*first, *recipe.synthetic)),
        ("stage2", mini.STAGE2, ("model=m", "out=o", *recipe.stage2)),
    ):
        for source, _ in open_sources(read_settings(stage, path, changes).data):
            assert source[0].turns


def test_embedded_model_is_small_and_bf16():
    files = list(EMBEDDED_MODEL.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 16_000_000
    assert {"config.json", "tokenizer.model", "README.md"} <= {file.name for file in EMBEDDED_MODEL.iterdir()}
    model = SphinxForConditionalGeneration.from_pretrained(EMBEDDED_MODEL)
    assert model.dtype == torch.bfloat16
    assert model.config.vision_config.num_views == 5
    tower = model.model.vision_tower
    assert all(encoder is not None for encoder in (tower.clip, tower.convnext, tower.dinov2, tower.qformer))
