"""Figures of a model on held-out scenes, beside the same model shown a grey picture and a guess from the question.

python -m sphinx_fast.evaluate.scenes --model FOLDER --scenes 1000
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from sphinx_fast.data.scene_questions import Question
from sphinx_fast.data.scenes import DOMAINS, Scene
from sphinx_fast.evaluate.ask import Answerer, Asked, Said, answers, grey
from sphinx_fast.evaluate.figures import Figures, figures_of
from sphinx_fast.evaluate.guess import Guess
from sphinx_fast.evaluate.items import LENGTHS, MAIN_TASKS, UNSEEN_TASKS, Item, walk
from sphinx_fast.evaluate.metrics import Figure
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration

__all__ = ["LENGTHS", "MAIN_TASKS", "answers", "evaluate", "evaluate_task", "grey", "machine", "print_figures"]

SPLITS = ("test", "unseen")
AT_ONCE = 32  # scenes whose questions are asked together
GUESS_FROM = 5  # training scenes a guess has read for each scene it is asked about
Compared = dict[str, dict[str, Figure]]  # figure -> "seeing", "grey", "guess" -> its value


def evaluate_task(
    model: SphinxForConditionalGeneration,
    processor: SphinxProcessor,
    items: Sequence[tuple[Scene, Question]],
    *,
    blind: bool = False,
    batch: int = 32,
) -> Figures:
    """Figures over (scene, question) items of one task, `data.examples` for instance."""
    answerer, said = Answerer(model, processor), list[Said]()
    task = items[0][1].task
    for at in tqdm(range(0, len(items), batch), desc=f"{task}{' blind' if blind else ''}", mininterval=5):
        asked = [(s.picture, task, q.prompt) for s, q in items[at : at + batch]]
        said += answerer.blind(asked) if blind else answerer.seeing(asked)
    return figures_of(task, [Item(task, q, s.seed) for s, q in items], said)


def _asked(part: Iterable[tuple[Scene, list[Item]]]) -> tuple[list[Item], list[Asked]]:
    """Items about some scenes, those about one side by side, and what is put to a model."""
    pairs = [(s, item) for s, items in part for item in items]
    return [item for _, item in pairs], [(s.picture, item.task, item.question.prompt) for s, item in pairs]


def evaluate(
    model: SphinxForConditionalGeneration,
    processor: SphinxProcessor,
    scenes: int = 1000,
    tasks: Sequence[str] = MAIN_TASKS,
    *,
    blind: bool = True,
    split: str = "test",
    domain: str = "clean",
) -> dict[str, Compared]:
    """`{"vqa": {"accuracy": {"seeing": {"value": .., "error": .., "n": ..}, "grey": .., "guess": ..}, ..}, ..}`

    on `scenes` held-out scenes per task. Each scene is drawn once and asked for all tasks; only the answers are kept.

    Args:
        blind: also a grey picture and the guess.
        split: "test", or "unseen": about combinations of shape and colour that training never showed.
        domain: "clean" or "textured"; the guess has read "clean" ones, whose questions are the same.
    """
    answerer, walked = Answerer(model, processor), walk(tasks, scenes, split=split, domain=domain)
    items: dict[str, list[Item]] = defaultdict(list)
    said: dict[str, dict[str, list[Said]]] = defaultdict(lambda: defaultdict(list))  # who -> task -> answers
    with tqdm(total=scenes * len(tasks), desc=f"{split} {domain}", mininterval=5) as bar:
        while part := list(itertools.islice(walked, AT_ONCE)):
            about, asked = _asked(part)
            replies = {"seeing": answerer.seeing(asked)} | ({"grey": answerer.blind(asked)} if blind else {})
            for who, answered in replies.items():
                for item, answer in zip(about, answered, strict=True):
                    said[who][item.task].append(answer)
            for item in about:
                items[item.task].append(item)
            bar.update(sum(len({item.task for item in found}) for _, found in part))
    if blind:
        guess = Guess(GUESS_FROM * scenes)
        for task in tasks:
            said["guess"][task] = [Said(guess(item.question.task, item.question.prompt)) for item in items[task]]
    return {task: _beside({who: figures_of(task, items[task], by[task]) for who, by in said.items()}) for task in tasks}


def _beside(of: dict[str, Figures]) -> Compared:
    """Who -> figure -> value, turned into figure -> who -> value."""
    return {name: {who: figures[name] for who, figures in of.items()} for name in of["seeing"]}


def print_figures(figures: dict[str, Compared]) -> None:
    """A line per figure: seeing, grey and guess with their standard errors, and of how many questions."""
    who = list(dict.fromkeys(who for task in figures.values() for row in task.values() for who in row))
    print(f"{'task':20} {'figure':26} " + " ".join(f"{name:>15}" for name in who) + f" {'n':>6}")
    for task, compared in figures.items():
        for name, row in compared.items():
            cells = " ".join(f"{figure['value']:7.3f} ± {figure['error']:.3f}" for figure in row.values())
            print(f"{task:20} {name:26} {cells} {row['seeing']['n']:6}")


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
    parser.add_argument("--scenes", type=int, default=1000, help="held-out scenes per task")
    parser.add_argument("--tasks", nargs="+", choices=sorted(LENGTHS), help="default: all that the split has")
    parser.add_argument("--domain", choices=(*DOMAINS, "both"), default="clean")
    parser.add_argument("--split", choices=SPLITS, default="test", help="unseen: combinations training never showed")
    parser.add_argument("--seeing-only", action="store_true", help="leave out the grey picture and the guess")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    tasks = options.tasks or (UNSEEN_TASKS if options.split == "unseen" else tuple(LENGTHS))
    if options.scenes < 1:
        parser.error(f"--scenes: expected at least 1, got {options.scenes}")
    if options.split == "unseen" and (wrong := set(tasks) - set(UNSEEN_TASKS)):
        parser.error(f"--split unseen has the tasks {', '.join(UNSEEN_TASKS)}, got {sorted(wrong)[0]}")
    model = SphinxForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    processor = SphinxProcessor.from_pretrained(options.model)
    figures = {}
    for domain in DOMAINS if options.domain == "both" else (options.domain,):
        figures[domain] = evaluate(
            model,
            processor,
            options.scenes,
            tasks,
            blind=not options.seeing_only,
            split=options.split,
            domain=domain,
        )
        print(f"{options.split}, {domain}")
        print_figures(figures[domain])
    if options.out:
        record = {"scenes": options.scenes, "split": options.split, **machine(), "figures": figures}
        options.out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
