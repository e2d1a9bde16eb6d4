"""sphinx-mini from nothing, the paper's way: encoders, `train stage1` on each of two domains, `mix`, `train stage2`.

    python -m sphinx_fast.train.mini --out FOLDER [--seed 0]

Every step leaves its result in FOLDER.work and is skipped when that is there: an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sphinx_fast.evaluate.scenes import LENGTHS, MAIN_TASKS, evaluate, machine, print_figures
from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.model.presets import preset
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.model.tokenizer import SphinxTokenizer
from sphinx_fast.train.launch import launch
from sphinx_fast.train.mini.encoders import ENCODERS, train_encoder
from sphinx_fast.train.mini.language import WORDS, align_fusion, start_language_model
from sphinx_fast.train.mini.pool import POOL_KINDS, draw_pool, load_pool
from sphinx_fast.train.mini.texts import write_texts
from sphinx_fast.train.mini.tokenizer import pieces_of, write_tokenizer
from sphinx_fast.train.settings import read_settings
from sphinx_fast.vision import VisionTower
from sphinx_fast.weights.files import new_folder
from sphinx_fast.weights.mix import mix

STAGE1, STAGE2 = (Path(__file__).with_name(f"stage{number}.yaml") for number in (1, 2))
ON_A_GPU = ("device=cuda", "workers=8", "scale.dtype=float32")  # so small a model waits for its pictures, not for sums


@dataclass(frozen=True)
class Recipe:
    """Sizes of a run. Steps are fixed numbers, not minutes, so that a seed means something."""

    scenes: int = 24_000  # drawn for the encoders
    kinds: Mapping[str, float] = field(default_factory=lambda: POOL_KINDS)  # of them
    encoder_steps: tuple[int, ...] = (5000, 7500, 3500, 2500)  # in the order of ENCODERS
    encoder_rates: tuple[float, ...] = (8e-4, 1.5e-3, 8e-4, 8e-4)
    encoder_batch: int = 8  # pictures; two views of each
    align_steps: int = 400
    align_batch: int = 32
    align_rate: float = 3e-3
    texts: int = 6000  # documents
    # settings in place of those in the YAML files
    stage1: tuple[str, ...] = ()
    synthetic: tuple[str, ...] = ("steps=200", "optimizer.rate=8e-4", "data.0.options.domain=clean")
    stage2: tuple[str, ...] = ()
    beta: float = 0.5  # of the real domain
    tokenizer_scenes: int = 250
    evaluated: int = 500
    device: str = "cpu"
    processes: int = 2  # on a CPU, one thread each; 0: everything in this process


# Shapes alone are learned soon, words are not (docs/mini.md): this one answers short questions and reads nothing.
QUICK = Recipe(
    scenes=5000, kinds={"shapes": 1.0}, encoder_steps=(700, 2500, 300, 200), align_steps=200, texts=600,
    stage1=("steps=60", "data.0.options.kinds={shapes: 1.0}"),
    synthetic=("steps=40", "optimizer.rate=8e-4", "data.0.options.domain=clean"),
    stage2=("steps=1400", *(f"data.{k}.options.{o}" for k in (0, 1) for o in ("kinds={shapes: 1.0}", "tasks=[vqa]"))),
    evaluated=2000,
)  # fmt: skip
SMOKE = Recipe(
    scenes=24, encoder_steps=(2, 2, 2, 2), encoder_batch=4, align_steps=2, align_batch=4,
    texts=40, stage1=("steps=2", "pairs=4"), synthetic=("steps=1", "data.0.options.domain=clean"),
    stage2=("steps=2", "batch=4"), tokenizer_scenes=2, evaluated=4, processes=0,
)  # fmt: skip


def train_tokenizer(work: Path, recipe: Recipe, config: SphinxConfig) -> SphinxTokenizer:
    """Learn the tokenizer, or read the one that is there."""
    path = work / "tokenizer.model"
    if not path.exists():
        write_tokenizer(path, config.text_config.vocab_size, recipe.tokenizer_scenes)
    return SphinxTokenizer.from_sentencepiece(path)


def dense_encoder(work: Path, name: str, recipe: Recipe, seed: int, position: int = 0) -> None:
    """Train one encoder: `<name>.safetensors`, and its losses."""
    torch.set_num_threads(1)
    if (work / f"{name}.safetensors").exists():
        return
    torch.manual_seed(seed)
    tower = VisionTower._from_config(preset("sphinx-mini").vision_config).to(recipe.device)
    index = ENCODERS.index(name)
    losses = train_encoder(
        tower,
        name,
        load_pool(work / "pool"),
        steps=recipe.encoder_steps[index],
        batch=recipe.encoder_batch,
        rate=recipe.encoder_rates[index],
        seed=seed,
        position=position,
    )
    (work / f"{name}.json").write_text(json.dumps({k: round(v, 4) for k, v in losses.items()}))
    state = {k: v.contiguous() for k, v in getattr(tower, name).state_dict().items()}
    save_file(state, work / f"{name}.part.safetensors")
    (work / f"{name}.part.safetensors").rename(work / f"{name}.safetensors")


def in_processes(function: Callable[..., None], rows: Sequence[tuple[Any, ...]], at_once: int) -> None:
    """Call `function` once per row of arguments, `at_once` processes at a time (0: here)."""
    for arguments in rows if at_once == 0 else ():
        function(*arguments)
    if at_once == 0:
        return
    context = multiprocessing.get_context("spawn")
    waiting, running = list(rows), list[Any]()
    while waiting or running:
        while waiting and len(running) < at_once:
            process = context.Process(target=function, args=waiting.pop(0))
            process.start()
            running.append(process)
        running[0].join(0.2)
        failed = [process for process in running if process.exitcode not in (None, 0)]
        if failed:
            for process in running:
                process.terminate()
            raise RuntimeError(f"{function.__name__} failed in a process (exit code {failed[0].exitcode})")
        running = [process for process in running if process.exitcode is None]


def start_folder(work: Path, recipe: Recipe, seed: int) -> None:
    """The trained encoders, a fusion aligned with words, a language model that knows nothing: `start`, in fp32."""
    if (work / "start").exists():
        return
    torch.manual_seed(seed)
    config = preset("sphinx-mini")
    tokenizer = train_tokenizer(work, recipe, config)
    model = SphinxForConditionalGeneration(config)
    for name in ENCODERS:
        getattr(model.model.vision_tower, name).load_state_dict(load_file(work / f"{name}.safetensors"))
    start_language_model(model, tokenizer)
    pieces = pieces_of(tokenizer)
    # a number of two digits by its first
    word_ids = {name: torch.tensor([pieces.encode(word)[0] for word in words]) for name, words in WORDS.items()}
    align_fusion(
        model, load_pool(work / "pool"), word_ids, steps=recipe.align_steps, batch=recipe.align_batch,
        rate=recipe.align_rate, seed=seed,
    )  # fmt: skip
    model.generation_config.max_new_tokens = 160
    with new_folder(work / "start") as folder:
        model.save_pretrained(folder)
        SphinxProcessor.from_config(config, tokenizer).save_pretrained(folder)


def run_stage(
    stage: str, path: Path, recipe: Recipe, seed: int, start: Path, out: Path, changes: Sequence[str]
) -> Path:
    """`sphinx-fast train STAGE PATH` from a folder; returns its result, which may be there already."""
    if not (out / "model").exists():
        here = (f"model={start}", f"out={out}", f"seed={seed}", *(() if recipe.device == "cpu" else ON_A_GPU))
        processes = max(1, recipe.processes) if recipe.device == "cpu" else 1
        launch(read_settings(stage, path, (*here, *changes)), processes)
    return out / "model"


def finish(trained: Path, out: Path) -> None:
    """The trained folder in bf16, the form that is shipped; renamed when complete."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model: Any = SphinxForConditionalGeneration.from_pretrained(trained).bfloat16()
    for config in (model.config.text_config, model.config.vision_config):  # of fp32, while it was trained
        for inner in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if inner is not None:
                inner.dtype = None
    with new_folder(part) as folder:
        model.save_pretrained(folder)
        SphinxProcessor.from_pretrained(trained).save_pretrained(folder)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def train(out: Path, recipe: Recipe, seed: int) -> None:
    """All steps, then the model folder `out`."""
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    config = preset("sphinx-mini")
    train_tokenizer(work, recipe, config)
    vision, tokenizer = config.vision_config, work / "tokenizer.model"
    draw_pool(work / "pool", recipe.scenes, vision, tokenizer, recipe.kinds, workers=recipe.processes)
    order = sorted(ENCODERS, key=lambda name: name != "convnext")  # the slowest first
    in_processes(dense_encoder, [(work, name, recipe, seed, k) for k, name in enumerate(order)], recipe.processes)
    start_folder(work, recipe, seed)
    write_texts(work / "texts.txt", recipe.texts)
    first = (f"text=[{work / 'texts.txt'}]", *recipe.stage1)
    real = run_stage("stage1", STAGE1, recipe, seed, work / "start", work / "real", first)
    changes = (*first, *recipe.synthetic)
    synthetic = run_stage("stage1", STAGE1, recipe, seed + 1, real, work / "synthetic", changes)
    if not (work / "mixed").exists():
        mix([real, synthetic], [recipe.beta, 1 - recipe.beta], work / "mixed", parts="trained")
    trained = run_stage("stage2", STAGE2, recipe, seed, work / "mixed", work / "stage2", recipe.stage2)
    finish(trained, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sphinx_fast.train.mini", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("sphinx-mini"), help="the model folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="twenty minutes: a model that knows shapes a little")
    size.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--all-tasks", action="store_true", help="evaluate every task, not only VQA and boxes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    chosen = SMOKE if options.smoke else QUICK if options.quick else Recipe()
    recipe, start = replace(chosen, device=options.device), time.monotonic()
    train(options.out, recipe, options.seed)
    minutes = (time.monotonic() - start) / 60
    model = SphinxForConditionalGeneration.from_pretrained(options.out, dtype=torch.float32).eval()
    processor = SphinxProcessor.from_pretrained(options.out)
    tasks = tuple(LENGTHS) if options.all_tasks else MAIN_TASKS
    figures = evaluate(model, processor, recipe.evaluated, tasks)
    print_figures(figures)
    record = {**machine(), "minutes": round(minutes, 1), "seed": options.seed, "scenes": recipe.evaluated}
    work = options.out.with_name(options.out.name + ".work")
    (work / "figures.json").write_text(json.dumps({**record, "figures": figures}, indent=1) + "\n")
