"""The example pictures are the scenes they say they are, and their questions have right answers."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sphinx_fast.data import scene

FOLDER = Path(__file__).parents[2] / "examples" / "pictures"
ROWS = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))


def test_the_script_draws_what_is_there(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("draw_examples", FOLDER / "draw.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in FOLDER.iterdir() if p.suffix in (".png", ".json")}
    drawn = json.loads((tmp_path / "questions.json").read_text(encoding="utf-8"))
    for row, again in zip(ROWS, drawn, strict=True):
        loose = ("boxes", "expected", "question") if row["boxes"] else ()  # another FreeType may move a word by a pixel
        assert {k: v for k, v in row.items() if k not in loose} == {k: v for k, v in again.items() if k not in loose}
        assert np.allclose(row["boxes"], again["boxes"], atol=0.01)
    for path in FOLDER.glob("*.png"):
        old, new = (np.asarray(Image.open(f / path.name), np.int16) for f in (FOLDER, tmp_path))
        assert old.shape == new.shape and (np.abs(old - new) > 32).mean() < 0.005


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['picture']}-{row['kind']}")
def test_rows_fit_their_picture(row: dict) -> None:
    drawn = scene(row["seed"], split="test", scale=2)
    with Image.open(FOLDER / row["picture"]) as picture:
        assert picture.size == (drawn.picture.shape[1], drawn.picture.shape[0]) and 300 <= max(picture.size) <= 512
    assert set(map(tuple, row["boxes"])) <= {tuple(round(v, 4) for v in drawn.square_box(t.box)) for t in drawn.things}


def test_every_kind_of_example_is_there() -> None:
    tasks = {row["task"] for row in ROWS}
    assert {"vqa", "read", "text_boxes", "refer", "detect_all", "key_points", "defect", "caption"} <= tasks
