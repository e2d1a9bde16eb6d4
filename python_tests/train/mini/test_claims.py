"""The claims' runs in small, and their report against figures that are known."""

import json
import math

import pytest

from sphinx_fast.train.mini import claims, claims_report


@pytest.fixture(scope="module")
def work(smoke):
    return smoke.with_name("model.work")


def test_every_claim_runs_reports_and_is_not_run_again(work, tmp_path, monkeypatch):
    options = ["--work", str(work), "--out", str(tmp_path), "--seeds", "0", "--share", "0.005", "--processes", "0"]
    claims.main(options)
    found = claims.figures_of_runs(work)
    assert {claim: list(variants) for claim, variants in found.items()} == {
        claim: list(variants) for claim, (_, variants, _) in claims.RUNS.items()
    }
    losses = [value for seeds in found["encoders"].values() for value in seeds[0].values()]
    assert len(losses) == 8 and all(map(math.isfinite, losses))
    assert len(found["mixing"]["both"][0]["clean"]) == len(claims.BETAS)
    text = found["text"]["with text"][0]["text"]
    assert text[0] == found["text"]["captions alone"][0]["text"][0], "both begin with the same model and documents"
    page = (tmp_path / "results.md").read_text()
    assert all(heading in page for heading in ("small objects", "joint text", "Mixing", "Four encoders"))
    assert len(list(tmp_path.glob("results-*.svg"))) == 4
    left = [path for path in (work / "claims").rglob("model.safetensors") if path.parent.parent.name != "read"]
    assert not left, "only figures stay"
    monkeypatch.setattr(claims, "train", None)
    claims.main(options)


def seeds(*values):
    return dict(enumerate(values))


def test_the_report_has_means_spreads_and_the_least(tmp_path):
    rows = [{"low": 0.1, "high": 0.2, "n": 50, "value": value, "error": 0.1} for value in (0.2, 0.4)]
    large = {"low": 0.2, "high": 0.3, "n": 150, "value": 0.9, "error": 0.1}
    found = {
        "views": {
            name: seeds(*({"colour": [row, large], "shape": [row]} for row in rows))
            for name in ("one view", "five views")
        },
        "text": {
            name: seeds({"text": [1.0] * 40, "caption": [2.0] * 40}, {"text": [3.0] * 40, "caption": [2.0] * 40})
            for name in ("with text", "captions alone")
        },
        "mixing": {"both": seeds({"clean": [1.0, 0.5, 0.7], "textured": [0.2, 0.3, 0.9]})},
        "encoders": {
            "all four": seeds({"clean": 1.0, "textured": 1.5}),
            "clip": seeds({"clean": 2.0, "textured": 2.5}),
        },
    }
    about = {"cpu": "x", "cores": 2, "date": "2026-01-01", "commit": "abc"}
    claims_report.write_report(found, tmp_path, about, (0.0, 0.5, 1.0))
    page = (tmp_path / "results.md").read_text()
    assert "| 0.1 to 0.2 | 50 | 0.300 ± 0.141 | 0.300 ± 0.141 |" in page
    assert "| all | 200 | 0.750 ± 0.035 | 0.750 ± 0.035 |" in page and "| all | 50 | 0.300 ± 0.141 |" in page
    assert "| with text | 2.000 ± 1.414 | 2.000 ± 1.414 | 2.000 ± 0.000 |" in page
    assert "synthetic (clean) 0.5, real (textured) 0, mean 0.5" in page
    assert "| clip | 2.000 | 2.500 |" in page and "1 to 2 seeds" in page


def test_figures_of_runs_are_read_by_seed(tmp_path):
    for seed in (0, 2):
        folder = tmp_path / "claims" / "encoders" / str(seed)
        folder.mkdir(parents=True)
        (folder / "clip.json").write_text(json.dumps({"clean": seed}))
    assert claims.figures_of_runs(tmp_path) == {"encoders": {"clip": {0: {"clean": 0}, 2: {"clean": 2}}}}
