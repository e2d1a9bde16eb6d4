"""The gallery shows what was asked, said and true, and chooses nothing."""

from itertools import islice

from PIL import Image

from sphinx_fast.evaluate import gallery
from sphinx_fast.evaluate.items import LENGTHS
from sphinx_fast.infer import EMBEDDED_MODEL, Sphinx


def test_rows_are_the_first_scenes_of_every_task_none_twice():
    tasks = ("vqa", "refer", "defect")
    rows = list(gallery.rows(7, tasks))
    assert [item.task for _, item in rows] == [tasks[k % 3] for k in range(7)]
    assert [s.domain for s, _ in rows] == ["clean", "textured"] * 3 + ["clean"]
    assert len({(s.domain, s.seed) for s, _ in rows}) == 7 and {s.split for s, _ in rows} == {"test"}
    again = [(s.seed, item.question) for s, item in islice(gallery.rows(7, tasks), 3)]
    assert again == [(s.seed, item.question) for s, item in rows[:3]]
    assert len(LENGTHS) <= gallery.PICTURES


def test_the_page_has_a_picture_question_answer_and_truth_each(tmp_path):
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "99-old.png").write_bytes(b"")
    gallery.write(Sphinx.from_pretrained(EMBEDDED_MODEL), tmp_path, 4)
    page = (tmp_path / "gallery.md").read_text()
    pictures = sorted((tmp_path / "gallery").iterdir())
    assert len(pictures) == 4 and all(f"![](gallery/{path.name})" in page for path in pictures)
    for (s, item), path in zip(gallery.rows(4), pictures, strict=True):
        assert f"| true | {item.question.answer} |" in page
        assert Image.open(path).size == (s.picture.shape[1], s.picture.shape[0])
    right = sum(": right" in line for line in page.splitlines())
    assert f"{right} of 4 answers are right" in page
