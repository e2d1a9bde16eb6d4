"""The embedded model answers Table 1 questions about the example pictures; boxes are drawn into demo-output/.

    make demo            or            python examples/demo.py [FOLDER]

FOLDER: another model folder of yours. The pictures are scenes that no training has seen; what was expected stands
beside what was said, right or wrong.
"""

import json
import sys
from pathlib import Path

from PIL import Image

from sphinx_fast import Sphinx
from sphinx_fast.tasks.draw import draw_answer

PICTURES = Path(__file__).resolve().parent / "pictures"
OUTPUT = Path("demo-output")


def main(folder: str | None = None) -> None:
    """Ask every question of questions.json, print the answers, write the pictures with boxes or points."""
    sphinx = Sphinx.from_pretrained(folder) if folder else Sphinx.from_pretrained()
    OUTPUT.mkdir(exist_ok=True)
    for row in json.loads((PICTURES / "questions.json").read_text(encoding="utf-8")):
        picture = PICTURES / row["picture"]
        answer = sphinx.ask(picture, row["question"], max_new_tokens=160, temperature=0.0)
        print(f"{row['picture']}: {row['question'].splitlines()[0]}")
        print(f"    said      {answer}")
        print(f"    expected  {row['expected']}")
        if "[" in answer:
            path = OUTPUT / f"{picture.stem}-{row['task']}.png"
            draw_answer(Image.open(picture).convert("RGB"), answer).save(path)
            print(f"    drawn     {path}")
    print("The embedded model is a few million weights, trained by two cores on drawn scenes: see docs/mini.md.")


if __name__ == "__main__":
    main(*sys.argv[1:2])
