"""sphinx-mini from nothing in twenty minutes must see: `make endurance`, or

    python python_tests/endurance/mini.py [--seed 0] [--out FOLDER]

The whole recipe with few steps, on shapes and short questions alone. Its answers about held-out scenes, all and those
for a colour and for a shape, must be better than those of the same model shown a grey picture and than the best guess
from the question alone, by more than three standard errors of both. The exit status is 1 if not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from sphinx_fast.evaluate.scenes import evaluate
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.train.mini.recipe import QUICK, train

ERRORS = 3.0
CHECKED = ("accuracy", "accuracy colour", "accuracy shape")


def blind(figures: dict[str, Any]) -> list[str]:
    """The figures in which seeing is not clearly better than not seeing."""
    found = []
    for name in CHECKED:
        seeing, *others = (figures[name][who] for who in ("seeing", "grey", "guess"))
        for other in others:
            margin = ERRORS * (seeing["error"] ** 2 + other["error"] ** 2) ** 0.5
            if seeing["value"] <= other["value"] + margin:
                found.append(f"{name}: {seeing['value']:.3f} against {other['value']:.3f}, margin {margin:.3f}")
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the model here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder) / "mini"
        train(out, QUICK, options.seed)
        model: Any = SphinxForConditionalGeneration.from_pretrained(out).float().eval()
        figures = evaluate(model, SphinxProcessor.from_pretrained(out), QUICK.evaluated, ("vqa",))["vqa"]
    said = {name: {who: round(v["value"], 3) for who, v in figures[name].items()} for name in CHECKED}
    print(json.dumps({"seed": options.seed, "scenes": QUICK.evaluated, **said}))
    found = blind(figures)
    if found:
        sys.exit("blind: " + "; ".join(found))


if __name__ == "__main__":
    main()
