"""Draws the example pictures and writes questions.json beside them: scenes of the test split, never trained on,
chosen among those that the embedded model answers rightly. docs/gallery.md has some that were not chosen.

    python examples/pictures/draw.py [FOLDER]

questions.json is a list of {picture, task, kind, question, expected, boxes, seed}: `question` is the whole prompt,
`boxes` are the right ones in the padded square, [0, 1].
"""

import json
import sys
from pathlib import Path
from random import Random

from PIL import Image

from sphinx_fast.data import Question, Scene, questions, scene

SCALE = 2
PICTURES = {  # name: seed, and what is asked: (task, words of the question)
    "shapes": (
        315,
        [
            ("vqa", "How many crosses"),
            ("detect_category", "crosses"),
            ("vqa", "What color is the heart"),
            ("vqa", "Is there a purple diamond"),
        ],
    ),
    "word": (102, [("read", "What word"), ("text_boxes", "")]),
    "refer": (
        39,
        [
            ("refer", "orange ring"),
            ("vqa", "What shape is the orange object"),
            ("relation", ""),
            ("region_description", ""),
        ],
    ),
    "detect": (348, [("detect_all", ""), ("grounded_caption", "")]),
    "person": (159, [("key_points", ""), ("caption", "Provide a one-sentence caption")]),
    "defect": (17, [("defect", "")]),
}


def find(drawn: Scene, task: str, words: str) -> Question:
    """The first question of the task with these words in its prompt, over the generator's seeds."""
    for seed in range(1000):
        for question in questions(drawn, Random(seed)):
            if question.task == task and words in question.prompt:
                return question
    raise ValueError(f"no {task} question of the scene {drawn.seed} has the words {words!r}")


def main(folder: Path) -> None:
    rows = []
    for name, (seed, wanted) in PICTURES.items():
        drawn = scene(seed, split="test", scale=SCALE)
        Image.fromarray(drawn.picture).save(folder / f"{name}.png", optimize=True)
        for task, words in wanted:
            question = find(drawn, task, words)
            rows.append(
                {
                    "picture": f"{name}.png",
                    "task": task,
                    "kind": question.kind,
                    "question": question.prompt,
                    "expected": question.answer,
                    "boxes": [[round(v, 4) for v in box] for box in question.boxes],
                    "seed": seed,
                }
            )
    lines = ",\n ".join(json.dumps(row) for row in rows)
    (folder / "questions.json").write_text(f"[\n {lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
