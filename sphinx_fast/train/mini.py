"""sphinx-mini from nothing: tokenizer, encoders, fusion, language model, figures. One command, seeded, two cores.

    python -m sphinx_fast.train.mini --out FOLDER [--seed 0]

Every step leaves its result in FOLDER.work and is skipped when that is there: an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from tqdm import tqdm

from sphinx_fast.evaluate.scenes import LENGTHS, MAIN_TASKS, evaluate, machine, print_figures
from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.model.presets import preset
from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.model.tokenizer import SphinxTokenizer
from sphinx_fast.train.dense import ENCODERS, encoder_features, train_encoder
from sphinx_fast.train.mini_language import WORDS, Features, align_fusion, start_language_model, train_language
from sphinx_fast.train.mini_tokenizer import SPACE, pieces_of, write_tokenizer
from sphinx_fast.train.scene_pool import cut_views, draw_pool, light_scenes, load_pool
from sphinx_fast.vision import VisionTower


@dataclass(frozen=True)
class Recipe:
    """Sizes of a run. Steps are fixed numbers, not minutes, so that a seed means something."""

    scenes: int = 16_000  # drawn for the encoders
    encoder_steps: tuple[int, ...] = (2200, 1600, 1400, 700)  # in the order of ENCODERS
    encoder_rates: tuple[float, ...] = (8e-4, 1.5e-3, 8e-4, 8e-4)
    encoder_batch: int = 8  # pictures; two views of each
    featured: int = 4_000  # scenes whose features are kept for the language model
    align_steps: int = 400
    align_batch: int = 32
    align_rate: float = 3e-3
    language_steps: int = 4_000
    language_batch: int = 8
    language_rate: float = 1.5e-3
    text_length: int = 240
    tokenizer_scenes: int = 250
    evaluated: int = 500
    processes: int = 2  # one thread each; 0: everything in this process


SMOKE = Recipe(
    scenes=24, encoder_steps=(2, 2, 2, 2), encoder_batch=4, featured=8, align_steps=2, align_batch=4, language_steps=2,
    language_batch=4, tokenizer_scenes=2, evaluated=4, processes=0,
)  # fmt: skip


def train_tokenizer(work: Path, recipe: Recipe, config: SphinxConfig) -> SphinxTokenizer:
    """Learn the tokenizer, or read the one that is there."""
    path = work / "tokenizer.model"
    if not path.exists():
        write_tokenizer(path, config.text_config.vocab_size, recipe.tokenizer_scenes)
    return SphinxTokenizer.from_sentencepiece(path)


def dense_encoder(work: Path, name: str, recipe: Recipe, seed: int, position: int = 0) -> None:
    """Train one encoder and compute its features of the first scenes: `<name>.safetensors`, `<name>.npy`."""
    torch.set_num_threads(1)
    if (work / f"{name}.npy").exists():
        return
    torch.manual_seed(seed)
    pool = load_pool(work / "pool")
    tower = VisionTower._from_config(preset("sphinx-mini").vision_config)
    index = ENCODERS.index(name)
    losses = train_encoder(
        tower,
        name,
        pool,
        steps=recipe.encoder_steps[index],
        batch=recipe.encoder_batch,
        rate=recipe.encoder_rates[index],
        seed=seed,
        position=position,
    )
    save_file({k: v.contiguous() for k, v in getattr(tower, name).state_dict().items()}, work / f"{name}.safetensors")
    (work / f"{name}.json").write_text(json.dumps({k: round(v, 4) for k, v in losses.items()}))
    write_features(work, name, tower, pool, recipe.featured)


@torch.inference_mode()
def write_features(work: Path, name: str, tower: VisionTower, pool: dict[str, np.ndarray], count: int) -> None:
    """fp16 features of all views of the first `count` scenes: [N, V, tokens, C]."""
    features, size = encoder_features(tower, name), tower.config.view_size
    file: np.memmap | None = None
    part, chunk = work / f"{name}.part.npy", 20
    for at in tqdm(range(0, count, chunk), desc=f"features {name}", mininterval=5):
        views = cut_views(torch.from_numpy(np.array(pool["squares"][at : min(at + chunk, count)])), size)
        tokens = features(views.flatten(0, 1)).unflatten(0, views.shape[:2]).half().numpy()
        if file is None:
            file = np.lib.format.open_memmap(part, mode="w+", dtype=tokens.dtype, shape=(count, *tokens.shape[1:]))
        file[at : at + len(tokens)] = tokens
    if file is not None:
        file.flush()
    part.rename(work / f"{name}.npy")


def load_features(work: Path, count: int) -> Features:
    """The features of all encoders, memory-mapped."""
    arrays = {name: np.load(work / f"{name}.npy", mmap_mode="r")[:count] for name in ENCODERS}
    return Features([arrays["clip"], arrays["convnext"], arrays["dinov2"]], arrays["qformer"])


def language(work: Path, recipe: Recipe, seed: int, rank: int, world: int) -> None:
    """One of `world` processes that train fusion and language model together; the first writes the result."""
    torch.set_num_threads(1)
    if (work / "language.safetensors").exists():
        return
    if world > 1:
        meeting = f"file://{(work / 'meeting').absolute()}"
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    torch.manual_seed(seed)
    config = preset("sphinx-mini")
    tokenizer = train_tokenizer(work, recipe, config)
    model = SphinxForConditionalGeneration(config)
    start_language_model(model)
    features = load_features(work, recipe.featured)
    pieces = pieces_of(tokenizer)
    word_ids = {
        name: torch.tensor([pieces.piece_to_id(SPACE + word) for word in words]) for name, words in WORDS.items()
    }
    align_fusion(
        model, features, load_pool(work / "pool"), word_ids, steps=recipe.align_steps, batch=recipe.align_batch,
        rate=recipe.align_rate, seed=seed,
    )  # fmt: skip
    scenes = list(light_scenes(0, recipe.featured))
    train_language(
        model, tokenizer, features, scenes, steps=recipe.language_steps, batch=recipe.language_batch,
        rate=recipe.language_rate, text_length=recipe.text_length, seed=seed, rank=rank, world=world,
    )  # fmt: skip
    if rank == 0:
        tower = ("model.vision_tower.",)
        state = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith(tower)}
        save_file(state, work / "language.part.safetensors")
        (work / "language.part.safetensors").rename(work / "language.safetensors")
    if world > 1:
        distributed.barrier()
        distributed.destroy_process_group()


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


def assemble(work: Path, out: Path, recipe: Recipe) -> None:
    """Encoders and language model as one bf16 model folder with its tokenizer and processor; renamed when complete."""
    config = preset("sphinx-mini")
    model = SphinxForConditionalGeneration(config)
    model.load_state_dict(load_file(work / "language.safetensors"), strict=False)
    for name in ENCODERS:
        getattr(model.model.vision_tower, name).load_state_dict(load_file(work / f"{name}.safetensors"))
    model.generation_config.max_new_tokens = 160
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.bfloat16().save_pretrained(part)
    SphinxProcessor.from_config(config, train_tokenizer(work, recipe, config)).save_pretrained(part)
    if out.exists():
        shutil.rmtree(out)
    part.rename(out)


def train(out: Path, recipe: Recipe, seed: int) -> None:
    """All steps, then the model folder `out`."""
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    config = preset("sphinx-mini")
    train_tokenizer(work, recipe, config)
    draw_pool(work / "pool", recipe.scenes, config.vision_config, workers=recipe.processes)
    order = sorted(ENCODERS, key=lambda name: name != "convnext")  # the slowest first
    in_processes(dense_encoder, [(work, name, recipe, seed, k) for k, name in enumerate(order)], recipe.processes)
    world = max(1, recipe.processes)
    (work / "meeting").unlink(missing_ok=True)  # where the processes of an interrupted run met
    in_processes(language, [(work, recipe, seed, rank, world) for rank in range(world)], recipe.processes)
    assemble(work, out, recipe)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sphinx_fast.train.mini", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("sphinx-mini"), help="the model folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--all-tasks", action="store_true", help="evaluate every task, not only VQA and boxes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    recipe, start = (SMOKE if options.smoke else Recipe()), time.monotonic()
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


if __name__ == "__main__":
    main()
