"""Figures of a model on held-out scenes: the whole path, processor and `generate`, beside a grey picture.

python -m sphinx_fast.evaluate.scenes --model FOLDER --scenes 500
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sphinx_fast.data.scene_grading import grade
from sphinx_fast.data.scene_questions import Question, examples
from sphinx_fast.data.scenes import Scene
from sphinx_fast.model.config import PAD_COLOR
from sphinx_fast.model.conversation import conversation_prompt, cut_at_stop
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration

LENGTHS = {  # new tokens an answer may take
    "vqa": 6,
    "read": 6,
    "refer": 14,
    "region_description": 8,
    "relation": 6,
    "caption": 48,
    "defect": 20,
    "detect_category": 60,
    "detect_all": 90,
    "text_boxes": 60,
    "key_points": 90,
    "grounded_caption": 150,
}
MAIN_TASKS = ("vqa", "refer")


@torch.inference_mode()
def answers(
    model: SphinxForConditionalGeneration,
    processor: SphinxProcessor,
    pictures: Sequence[np.ndarray],
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to one question per picture, as one batch."""
    texts = [conversation_prompt([(prompt, None)]) for prompt in prompts]
    inputs = processor(images=list(pictures), text=texts, padding=True, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[misc]
    new = output[:, inputs["input_ids"].shape[1] :]
    return [cut_at_stop(text)[0].strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def grey(picture: np.ndarray) -> np.ndarray:
    """What a blind model sees: the colour of the padding, everywhere."""
    return np.broadcast_to(np.array(PAD_COLOR, np.uint8), picture.shape).copy()


def evaluate_task(
    model: SphinxForConditionalGeneration,
    processor: SphinxProcessor,
    items: Sequence[tuple[Scene, Question]],
    *,
    blind: bool = False,
    batch: int = 32,
) -> dict[str, float]:
    """Mean grade over (scene, question) items, in all ("score") and per kind of question."""
    grades: dict[str, list[float]] = {}
    task = items[0][1].task
    for at in tqdm(range(0, len(items), batch), desc=f"{task}{' blind' if blind else ''}", mininterval=5):
        part = items[at : at + batch]
        pictures = [grey(s.picture) if blind else s.picture for s, _ in part]
        said = answers(model, processor, pictures, [q.prompt for _, q in part], LENGTHS[task])
        for (_, question), answer in zip(part, said, strict=True):
            grades.setdefault(question.kind, []).append(grade(question, answer))
    figures = {"score": float(np.mean([g for kind in grades.values() for g in kind]))}
    return figures | {kind: float(np.mean(values)) for kind, values in sorted(grades.items())}


def evaluate(
    model: SphinxForConditionalGeneration,
    processor: SphinxProcessor,
    scenes: int = 500,
    tasks: Sequence[str] = MAIN_TASKS,
    *,
    blind: bool = True,
    split: str = "test",
) -> dict[str, dict[str, dict[str, float]]]:
    """`{"vqa": {"seeing": {"score": ..}, "blind": {..}}, ..}` on `scenes` held-out scenes per task."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for task in tasks:
        items = list(itertools.islice(examples(task, split=split), scenes))
        figures[task] = {"seeing": evaluate_task(model, processor, items)}
        if blind:
            figures[task]["blind"] = evaluate_task(model, processor, items, blind=True)
    return figures


def print_figures(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    """A line per task: the score beside the blind one, then the kinds of question."""
    for task, result in figures.items():
        blind = f"   blind {result['blind']['score']:.3f}" if "blind" in result else ""
        kinds = " ".join(f"{kind} {value:.2f}" for kind, value in result["seeing"].items() if kind != "score")
        print(f"{task:20} {result['seeing']['score']:.3f}{blind}   ({kinds})")


def machine() -> dict[str, str | int | None]:
    """What a figure was measured on: processor, cores, date, command, commit of the checkout."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu
        )
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = " ".join(["python", "-m", "sphinx_fast.evaluate.scenes", *sys.argv[1:]])
    return {"cpu": cpu, "cores": os.cpu_count(), "date": date, "command": command, "commit": checkout_commit()}


def checkout_commit() -> str | None:
    """The commit of the checkout this package runs from, read from .git; None for an installed package."""
    git = Path(__file__).resolve().parents[2] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:7]
        reference = git / head.removeprefix("ref: ")
        if reference.is_file():
            return reference.read_text()[:7]
        packed = (line.split() for line in (git / "packed-refs").read_text().splitlines())
        return next((line[0][:7] for line in packed if line[-1] == head.removeprefix("ref: ")), None)
    except OSError:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sphinx_fast.evaluate.scenes", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a model folder")
    parser.add_argument("--scenes", type=int, default=500, help="held-out scenes per task")
    parser.add_argument("--tasks", nargs="+", choices=sorted(LENGTHS), default=list(MAIN_TASKS))
    parser.add_argument("--seeing-only", action="store_true", help="leave the grey pictures out")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    model = SphinxForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    processor = SphinxProcessor.from_pretrained(options.model)
    figures = evaluate(model, processor, options.scenes, options.tasks, blind=not options.seeing_only)
    print_figures(figures)
    if options.out:
        options.out.write_text(json.dumps({"scenes": options.scenes, **machine(), "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
