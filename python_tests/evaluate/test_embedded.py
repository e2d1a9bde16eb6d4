"""The embedded model gives the figures that are written down for it, within their errors."""

import json
import math
from pathlib import Path

import pytest
import torch

from sphinx_fast.evaluate.scenes import evaluate
from sphinx_fast.infer import EMBEDDED_MODEL
from sphinx_fast.model import SphinxForConditionalGeneration, SphinxProcessor

RECORD = json.loads((Path(__file__).parents[2] / "bench" / "results" / "mini.json").read_text())
SAMPLE = 64  # of the scenes that the record is of
MAIN = {
    "vqa": "accuracy",
    "pope": "accuracy",
    "refer": "Acc@0.5",
    "read": "accuracy",
    "options": "accuracy",
    "relation": "accuracy",
}
LEAST = {"vqa": 0.80, "pope": 0.90, "refer": 0.50}  # what the model must reach


@pytest.fixture(scope="module")
def embedded():
    model = SphinxForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    return model, SphinxProcessor.from_pretrained(EMBEDDED_MODEL)


@pytest.mark.parametrize("domain", ["clean", "textured"])
def test_the_shipped_file_gives_its_figures(embedded, domain):
    found = evaluate(*embedded, SAMPLE, tuple(MAIN), blind=False, domain=domain)
    for task, name in MAIN.items():
        here, written = found[task][name]["seeing"], RECORD["figures"][domain][task][name]["seeing"]
        error = math.hypot(here["error"], written["error"])
        assert abs(here["value"] - written["value"]) <= 3 * error, (task, here, written)


def test_the_record_is_of_a_thousand_scenes_and_good_enough():
    assert RECORD["scenes"] >= 1000
    figures = RECORD["figures"]["clean"]
    for task, least in LEAST.items():
        row = figures[task][MAIN[task]]
        assert row["seeing"]["value"] >= max(least, row["grey"]["value"] + 0.3, row["guess"]["value"] + 0.3), task
