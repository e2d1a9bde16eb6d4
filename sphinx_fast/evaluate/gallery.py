"""Twenty held-out pictures with question, answer, truth and drawing, right or wrong: docs/gallery.md.

    python -m sphinx_fast.evaluate.gallery --model FOLDER --out docs

Nothing is chosen: of each task the first scene of the test split that has it, clean and textured ones in turn, no scene
twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from sphinx_fast.data.scene_grading import grade
from sphinx_fast.data.scenes import DOMAINS, Scene, scene
from sphinx_fast.evaluate.items import LENGTHS, Item, walk
from sphinx_fast.infer import EMBEDDED_MODEL, Sphinx
from sphinx_fast.tasks.draw import draw_answer

PICTURES = 20
SCALE = 2  # of the pictures: the model sees the same padded square, people see more
HEAD = """# What sphinx-mini answers

{right} of {count} answers are right. Nothing was chosen: of each task the first held-out scenes that have it, clean and
textured ones in turn. What the answer names is drawn; pictures without a box are as they were shown.

    python -m sphinx_fast.evaluate.gallery --model FOLDER --out docs
"""


def rows(count: int = PICTURES, tasks: Sequence[str] = tuple(LENGTHS)) -> Iterator[tuple[Scene, Item]]:
    """(scene, what is asked about it): a task after the other, again from the first after the last."""
    used = set[tuple[str, int]]()
    for number in range(count):
        task, domain = tasks[number % len(tasks)], list(DOMAINS)[number % len(DOMAINS)]
        for s, items in walk((task,), count + 1, domain=domain):
            if (domain, s.seed) not in used:
                used.add((domain, s.seed))
                yield scene(s.seed, split=s.split, domain=domain, scale=SCALE), items[0]
                break


def section(number: int, sphinx: Sphinx, s: Scene, item: Item, folder: Path) -> tuple[str, bool]:
    """The part of the page about one picture, which is written into the folder; and whether the answer is right."""
    picture = Image.fromarray(s.picture)
    prompt, truth = item.question.prompt, item.question.answer
    answer = sphinx.ask(picture, prompt, max_new_tokens=LENGTHS[item.task], temperature=0.0).strip()
    score = grade(item.question, answer)
    name = f"{number:02}-{item.task}.png"
    shown = draw_answer(picture, answer) if "[" in answer else picture
    shown.save(folder / name, optimize=True)
    asked = prompt.replace("\n", "<br>")
    verdict = "right" if score == 1 else f"{score:.2f} of 1" if score else "wrong"
    lines = [
        f"## {number}. {item.task.replace('_', ' ')}: {verdict}",
        f"![]({folder.name}/{name})",
        f"| asked | {asked} |\n|---|---|\n| said | {answer or '(nothing)'} |\n| true | {truth} |",
        f"Scene {s.seed} of the test split, {s.domain}.",
    ]
    return "\n\n".join(lines) + "\n", score == 1


def write(sphinx: Sphinx, out: Path, count: int = PICTURES) -> None:
    """gallery.md and the folder gallery/ in `out`."""
    folder = out / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    made = [section(n, sphinx, s, item, folder) for n, (s, item) in enumerate(rows(count), 1)]
    head = HEAD.format(right=sum(right for _, right in made), count=count)
    (out / "gallery.md").write_text("\n".join([head, *(text for text, _ in made)]), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sphinx_fast.evaluate.gallery", description=__doc__)
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL, help="a model folder")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--count", type=int, default=PICTURES)
    options = parser.parse_args(arguments)
    write(Sphinx.from_pretrained(options.model), options.out, options.count)


if __name__ == "__main__":
    main()
