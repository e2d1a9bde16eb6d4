"""Four claims of the paper at the size of sphinx-mini, three seeds each.

    python -m sphinx_fast.train.mini.claims --work sphinx-mini.work --out docs        # or: make claims

Every run is a short `train stage1` or `train stage2` from what the recipe left in WORK (its encoders, its start, its
mixture), one process of one thread, two at once; its figures are WORK/claims/<claim>/<seed>/<variant>.json, and a run
whose file is there is skipped. claims_report.py makes tables and plots of them. The variants of a claim differ in one
thing: seeds, data and steps are the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file

from sphinx_fast.data.scene_grading import grade
from sphinx_fast.data.scene_questions import questions
from sphinx_fast.data.scenes import DOMAINS, Scene, scene
from sphinx_fast.evaluate.ask import Answerer
from sphinx_fast.evaluate.figures import by_size
from sphinx_fast.evaluate.items import Item
from sphinx_fast.evaluate.scenes import machine
from sphinx_fast.model.presets import preset
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.model.tokenizer import SphinxTokenizer
from sphinx_fast.train.held_out import held_out_losses
from sphinx_fast.train.mini.claims_report import write_report
from sphinx_fast.train.mini.encoders import ENCODERS
from sphinx_fast.train.mini.language import start_language_model
from sphinx_fast.train.mini.recipe import STAGE1, STAGE2, in_processes
from sphinx_fast.train.mini.texts import write_texts
from sphinx_fast.train.settings import read_settings
from sphinx_fast.train.training import Training
from sphinx_fast.weights.files import new_folder
from sphinx_fast.weights.sweep import sweep

SEEDS = (0, 1, 2)
BETAS = tuple(k / 10 for k in range(11))
TEXTS = 60_000  # documents, none of which comes twice
SMALL: dict[str, Any] = {"shrink": 0.5, "scale": 2}  # half as large, drawn with twice the pixels
VIEWS = {"one view": "picture_size=96", "five views": "picture_size=192"}
Figures = Mapping[str, Any]


class Size(NamedTuple):
    """Of a run: steps, and held-out captions of each domain, or questions of each task, that it is measured on."""

    steps: int
    rows: int

    def times(self, share: float) -> Size:
        return Size(max(2, round(share * self.steps)), max(4, round(share * self.rows)))


def train(stage: str, model: Path, out: Path, seed: int, changes: Sequence[str]) -> list[dict[str, float]]:
    """One run in this process; returns the lines of its log."""
    path = STAGE1 if stage == "stage1" else STAGE2
    fixed = (f"model={model}", f"out={out}", f"seed={seed}", "save_every=1000000")
    Training(read_settings(stage, path, (*fixed, *changes)), progress=False).run()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line]


def captions(folder: Path, domain: str, rows: int) -> Path:
    """JSON lines of held-out captions of a domain, and their pictures, unless they are there."""
    folder = folder / domain
    if not folder.exists():
        with new_folder(folder) as part:
            lines = []
            for seed in range(rows):
                drawn = scene(seed, split="validation", domain=domain)
                caption = next((q for q in questions(drawn, Random(seed)) if q.task == "caption"), None)
                if caption is not None:
                    Image.fromarray(drawn.picture).save(part / f"{seed}.png")
                    turn = {"from": "gpt", "value": caption.answer}
                    row = {"image": f"{seed}.png", "conversations": [{"from": "human", "value": ""}, turn]}
                    lines.append(json.dumps(row))
            (part / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "captions.jsonl"


def held_out(work: Path, rows: int) -> dict[str, Path]:
    return {domain: captions(work / "claims" / f"held-out-{rows}", domain, rows) for domain in DOMAINS}


def _loaded(folder: Path) -> tuple[Any, Any]:
    model = SphinxForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, SphinxProcessor.from_pretrained(folder)


# --- a run of each claim; all take (work, folder of the run, variant, seed, size) -----------------------------------
def small_objects(work: Path, out: Path, variant: str, seed: int, size: Size) -> Figures:
    """Stage 2 with the global view alone or with all five, on questions about things half as large as the encoders
    were taught; accuracy against the size of what is asked about."""
    drawn = {"count": 60000, "start": 300_000, "kinds": {"shapes": 1.0}, "tasks": ["vqa"], **SMALL}
    data = json.dumps([{"type": "scenes", "options": {**drawn, "domain": domain}} for domain in DOMAINS])
    train("stage2", work / "mixed", out, seed, (VIEWS[variant], f"data={data}", f"steps={size.steps}"))
    model, processor = _loaded(out / "model")
    asked: dict[str, list[tuple[Scene, Item]]] = {"colour": [], "shape": []}
    for number in range(size.rows):
        s = scene(number, split="validation", kind="shapes", **SMALL)
        for question in questions(s, Random(number)):
            if question.task == "vqa" and question.kind in asked:
                asked[question.kind].append((s, Item("vqa", question, number)))
    figures = {}
    for kind, pairs in asked.items():
        said = Answerer(model, processor).seeing([(s.picture, "vqa", item.question.prompt) for s, item in pairs])
        grades = [grade(item.question, answer.text) for (_, item), answer in zip(pairs, said, strict=True)]
        figures[kind] = by_size([item for _, item in pairs], grades, (0.0, 0.09, 0.11, 0.16, 1.0))
    return figures


def joint_text(work: Path, out: Path, variant: str, seed: int, size: Size) -> Figures:
    """A language model that has read learns captions, with its text beside them or without; its loss on new text.

    The text is read, and its loss logged, in both; its weight decides whether it teaches. No document comes twice.
    """
    texts = work / "claims" / "texts.txt"
    read = work / "claims" / "text" / str(seed) / "read"
    shared = (f"text=[{texts}]", f"seed={seed}")
    if not (read / "model").exists():
        alone = ("pairs=0", "data=[]", "text_tokens=2048", f"steps={size.steps}", "text_weight=1.0")
        train("stage1", work / "start", read, seed, (*shared, *alone))
    weight = {"with text": 1.0, "captions alone": 0.0}[variant]
    log = train(
        "stage1", read / "model", out, seed + 100, (*shared, "pairs=16", f"steps={size.steps}", f"text_weight={weight}")
    )
    return {name: [line[f"{name}_loss"] for line in log] for name in ("text", "caption")}


def mixing(work: Path, out: Path, variant: str, seed: int, size: Size) -> Figures:
    """Stage 1 on the real domain, then from its result on the synthetic one, and the loss of every mixture on both."""
    real, synthetic = out / "real", out / "synthetic"
    shared = (f"text=[{work / 'claims' / 'texts.txt'}]", "pairs=16", f"steps={size.steps}")
    train("stage1", work / "start", real, seed, shared)
    train("stage1", real / "model", synthetic, seed + 100, (*shared, "data.0.options.domain=clean"))
    processor, files = SphinxProcessor.from_pretrained(real / "model"), held_out(work, size.rows)

    def losses(model: Any) -> dict[str, float]:
        return held_out_losses(model, processor, files, rows=size.rows)

    points = sweep((real / "model", synthetic / "model"), BETAS, losses, parts="trained", device="cpu")
    return {domain: [point.losses[domain] for point in points] for domain in DOMAINS}


def encoders(work: Path, out: Path, variant: str, seed: int, size: Size) -> Figures:
    """Stage 1 on both domains behind one encoder or all four, a fusion and a language model that know nothing."""
    start = out / "start"
    if not start.exists():
        tower = {} if variant == "all four" else {f"{name}_config": None for name in _without(variant)}
        torch.manual_seed(seed)
        model = SphinxForConditionalGeneration(preset("sphinx-mini", vision=tower))
        for name in ENCODERS if variant == "all four" else (variant,):
            getattr(model.model.vision_tower, name).load_state_dict(load_file(work / f"{name}.safetensors"))
        tokenizer = SphinxTokenizer.from_sentencepiece(work / "tokenizer.model")
        start_language_model(model, tokenizer)
        with new_folder(start) as folder:
            model.save_pretrained(folder)
            SphinxProcessor.from_config(model.config, tokenizer).save_pretrained(folder)
    both = json.dumps([
        {"type": "scenes", "options": {"count": 30000, "start": 100000, "domain": domain, "captions": True}}
        for domain in DOMAINS
    ])  # fmt: skip
    changes = (f"data={both}", "text=[]", "text_tokens=0", "pairs=16", f"steps={size.steps}")
    train("stage1", start, out, seed, changes)
    model, processor = _loaded(out / "model")
    return held_out_losses(model, processor, held_out(work, size.rows), rows=size.rows)


def _without(variant: str) -> list[str]:
    """Configurations of the encoders that a tower of one leaves out."""
    others = [name for name in ENCODERS if name != variant]
    return [*others, "qformer_vision"] if "qformer" in others else others


RUNS: dict[str, tuple[Callable[..., Figures], tuple[str, ...], Size]] = {  # claim: run, variants, size
    "views": (small_objects, tuple(VIEWS), Size(400, 600)),
    "text": (joint_text, ("with text", "captions alone"), Size(150, 0)),
    "mixing": (mixing, ("both",), Size(200, 256)),
    "encoders": (encoders, ("all four", "clip", "convnext", "dinov2"), Size(300, 256)),
}


def one_run(work: Path, claim: str, variant: str, seed: int, share: float) -> None:
    """One variant of a claim with one seed, unless its figures are there; only they stay."""
    torch.set_num_threads(1)
    function, _, size = RUNS[claim]
    folder = work / "claims" / claim / str(seed)
    target, out = folder / f"{variant}.json", folder / variant
    if target.exists():
        return
    figures = function(work, out, variant, seed, size.times(share))
    part = target.with_suffix(".part")
    part.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    part.rename(target)
    shutil.rmtree(out)


def all_runs(work: Path, claims: Sequence[str], seeds: Sequence[int], share: float, processes: int) -> None:
    """Every run that is missing, two at once."""
    for claim in claims:  # once, before the processes
        held_out(work, RUNS[claim][2].times(share).rows)
    write_texts(work / "claims" / "texts.txt", max(200, round(share * TEXTS)), first=1_000_000)
    rows = []
    for claim in claims:
        _, variants, _ = RUNS[claim]
        # those of joint text share what they read first: one after the other
        parts = [variants] if claim == "text" else [(variant,) for variant in variants]
        rows += [(work, claim, part, seed, share) for seed in seeds for part in parts]
    in_processes(_runs_of_a_seed, rows, processes)


def _runs_of_a_seed(work: Path, claim: str, variants: Sequence[str], seed: int, share: float) -> None:
    for variant in variants:
        one_run(work, claim, variant, seed, share)


def figures_of_runs(work: Path) -> dict[str, dict[str, dict[int, Figures]]]:
    """What there is so far: {claim: {variant: {seed: figures}}}."""
    found: dict[str, dict[str, dict[int, Figures]]] = {}
    for claim, (_, variants, _) in RUNS.items():
        for variant in variants:
            files = sorted((work / "claims" / claim).glob(f"*/{variant}.json"))
            if files:
                figures = {int(file.parent.name): json.loads(file.read_text(encoding="utf-8")) for file in files}
                found.setdefault(claim, {})[variant] = figures
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sphinx_fast.train.mini.claims", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("sphinx-mini.work"), help="what the recipe left")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of results.md and its plots")
    parser.add_argument("--claims", nargs="+", choices=tuple(RUNS), default=tuple(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, to see that it runs")
    parser.add_argument("--processes", type=int, default=2, help="one thread each; 0: everything in this process")
    options = parser.parse_args(arguments)
    all_runs(options.work, options.claims, options.seeds, options.share, options.processes)
    write_report(figures_of_runs(options.work), options.out, dict(machine()), BETAS)


if __name__ == "__main__":
    main()
