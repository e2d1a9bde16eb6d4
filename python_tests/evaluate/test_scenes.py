"""The embedded model's figures on a sample, against the same model that sees grey and a guess; the command."""

import json
from itertools import islice

import pytest
import torch

from sphinx_fast.data.scene_questions import examples
from sphinx_fast.evaluate.scenes import evaluate, evaluate_task, main, print_figures
from sphinx_fast.infer import EMBEDDED_MODEL
from sphinx_fast.model import SphinxForConditionalGeneration, SphinxProcessor


@pytest.fixture(scope="module")
def embedded():
    model = SphinxForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    return model, SphinxProcessor.from_pretrained(EMBEDDED_MODEL)


@pytest.mark.parametrize(("task", "main_figure"), [("vqa", "accuracy"), ("refer", "Acc@0.5")])
def test_seeing_is_better_than_grey_and_guess(embedded, task, main_figure):
    row = evaluate(*embedded, 32, (task,))[task][main_figure]
    assert list(row) == ["seeing", "grey", "guess"] and {figure["n"] for figure in row.values()} == {32}
    for other in ("grey", "guess"):
        assert row["seeing"]["value"] - row[other]["value"] > row["seeing"]["error"] + row[other]["error"]


def test_tasks_together_are_tasks_alone(embedded):
    both = evaluate(*embedded, 6, ("vqa", "refer"), blind=False)
    for task in both:
        items = list(islice(examples(task, split="test"), 6))
        assert {name: row["seeing"] for name, row in both[task].items()} == evaluate_task(*embedded, items)
        assert all(list(row) == ["seeing"] for row in both[task].values())


def test_a_blind_task_is_the_grey_column(embedded):
    both = evaluate(*embedded, 6, ("vqa",))
    items = list(islice(examples("vqa", split="test"), 6))
    assert {name: row["grey"] for name, row in both["vqa"].items()} == evaluate_task(*embedded, items, blind=True)


def test_command_line_writes_figures(tmp_path, capsys):
    out = tmp_path / "figures.json"
    main(
        [
            "--model",
            str(EMBEDDED_MODEL),
            "--scenes",
            "2",
            "--tasks",
            "vqa",
            "pope",
            "--domain",
            "both",
            "--out",
            str(out),
        ]
    )
    written = json.loads(out.read_text())
    assert written["cpu"] and written["scenes"] == 2 and written["split"] == "test"
    assert set(written["figures"]) == {"clean", "textured"} and set(written["figures"]["clean"]) == {"vqa", "pope"}
    assert set(written["figures"]["clean"]["pope"]["accuracy"]["guess"]) == {"value", "error", "n"}
    assert "test, textured" in capsys.readouterr().out


def test_unseen_takes_its_own_tasks(tmp_path, capsys):
    out = tmp_path / "figures.json"
    main(["--model", str(EMBEDDED_MODEL), "--scenes", "2", "--split", "unseen", "--seeing-only", "--out", str(out)])
    assert set(json.loads(out.read_text())["figures"]["clean"]) == {"vqa", "refer", "region_description"}
    for wrong in (["--split", "unseen", "--tasks", "read"], ["--scenes", "0"], ["--split", "train"]):
        with pytest.raises(SystemExit):
            main(["--model", str(EMBEDDED_MODEL), *wrong])
    assert "got read" in capsys.readouterr().err


def test_a_line_per_figure_with_all_beside_it(capsys):
    seeing, grey = {"value": 0.5, "error": 0.02, "n": 7}, {"value": 0.1, "error": 0.01, "n": 7}
    print_figures({"refer": {"Acc@0.5": {"seeing": seeing, "grey": grey}, "Acc@0.75": {"seeing": grey, "grey": grey}}})
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "figure", "seeing", "grey", "n"]
    assert first.split() == ["refer", "Acc@0.5", "0.500", "±", "0.020", "0.100", "±", "0.010", "7"]
    assert second.split()[1] == "Acc@0.75"
