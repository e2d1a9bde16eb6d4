"""The embedded model's figures on a sample, against the same model that sees grey."""

from itertools import islice

import numpy as np
import pytest
import torch

from sphinx_fast.data.scene_questions import examples
from sphinx_fast.evaluate.scenes import answers, evaluate_task, grey, main, print_figures
from sphinx_fast.infer import EMBEDDED_MODEL, Sphinx
from sphinx_fast.model import SphinxForConditionalGeneration, SphinxProcessor


@pytest.fixture(scope="module")
def embedded():
    model = SphinxForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    return model, SphinxProcessor.from_pretrained(EMBEDDED_MODEL)


@pytest.mark.parametrize("task", ["vqa", "refer"])
def test_seeing_is_better_than_blind(embedded, task):
    items = list(islice(examples(task, split="validation"), 48))
    seeing, blind = (evaluate_task(*embedded, items, blind=blind)["score"] for blind in (False, True))
    assert seeing > blind


def test_batched_answers_are_the_answers_of_ask(embedded):
    items = list(islice(examples("vqa", split="validation"), 6))
    said = answers(*embedded, [s.picture for s, _ in items], [q.prompt for _, q in items], 6)
    sphinx = Sphinx(*embedded)
    assert said == [sphinx.ask(s.picture, q.prompt, max_new_tokens=6, temperature=0.0).strip() for s, q in items]


def test_grey_hides_everything():
    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    assert grey(picture).shape == picture.shape and len(np.unique(grey(picture).reshape(-1, 3), axis=0)) == 1


def test_command_line_writes_figures(tmp_path, capsys):
    out = tmp_path / "figures.json"
    main(["--model", str(EMBEDDED_MODEL), "--scenes", "3", "--tasks", "vqa", "--out", str(out)])
    assert "vqa" in capsys.readouterr().out and '"cpu"' in out.read_text()


def test_print_figures_names_blind(capsys):
    print_figures({"refer": {"seeing": {"score": 0.5, "shape": 0.5}, "blind": {"score": 0.1}}})
    assert "0.500   blind 0.100" in capsys.readouterr().out
