"""A tiny model folder and data of every kind that tests of training share."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw
from tiny import GOLDEN, tiny_config, tiny_model

from sphinx_fast.model.processor import SphinxProcessor
from sphinx_fast.model.tokenizer import SphinxTokenizer

ROWS = 24


def tiny_processor() -> SphinxProcessor:
    """Of `tiny_config`, with the golden tokenizer of 400 pieces."""
    tokenizer = SphinxTokenizer.from_sentencepiece(GOLDEN / "llama_ens" / "tokenizer.model")
    return SphinxProcessor.from_config(tiny_config(), tokenizer)


@functools.cache
def start_folder() -> Path:
    """A model folder of random weights: 5 views, 110 visual positions, two layers."""
    folder = Path(tempfile.mkdtemp(prefix="sphinx-fast-test-")) / "start"
    model = tiny_model()
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@functools.cache
def data_folder() -> Path:
    """pictures/*.png, captions.jsonl (one answer, no question), talk.jsonl (turns), plain.jsonl (text only),
    corpus.txt."""
    folder = Path(tempfile.mkdtemp(prefix="sphinx-fast-test-")) / "data"
    (folder / "pictures").mkdir(parents=True)
    captions, talks = [], []
    for seed in range(ROWS):
        name = f"pictures/{seed}.png"
        asked = _draw(folder / name, Random(seed))[: 1 + seed % 3]
        captions.append(_row(name, [("", f"a drawing of {asked[0][1]} number {seed}")]))
        talks.append(_row(name, asked))
    plain = [_row(None, [(f"what is {n} and {n}?", str(2 * n)), ("sure?", "yes")]) for n in range(ROWS // 2)]
    for file, rows in (("captions", captions), ("talk", talks), ("plain", plain)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "saw",
        "the",
        "dog",
        "run",
        "far",
        "away",
        "from",
        "its",
        "house",
    ]
    documents = [" ".join(Random(n).choices(words, k=20 + 7 * n % 50)) for n in range(60)]
    (folder / "corpus.txt").write_text("\f".join(documents))
    return folder


def _draw(path: Path, rng: Random) -> list[tuple[str, str]]:
    """A rectangle on a ground, and turns about it. Drawn here, so that the golden losses depend on nothing else."""
    ground, ink = rng.sample(["red", "green", "blue", "yellow", "black", "white"], 2)
    width, height = rng.randint(90, 220), rng.randint(90, 220)
    x, y = rng.randint(5, width // 2), rng.randint(5, height // 2)
    box = (x, y, x + width // 3, y + height // 3)
    picture = Image.new("RGB", (width, height), ground)
    ImageDraw.Draw(picture).rectangle(box, fill=ink)
    picture.save(path)
    said = ",".join(f"{v / max(width, height):.2f}" for v in box)
    return [("what color is the box?", ink), ("where is it?", f"[{said}]"), ("what is behind it?", f"all is {ground}")]


def _row(picture: str | None, turns: list[tuple[str, str]]) -> dict[str, Any]:
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {**({"image": picture} if picture else {}), "conversations": said}


def stage1(out: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a small run of the first stage."""
    return {
        "model": str(start_folder()),
        "out": str(out),
        "data": [{"path": str(data_folder() / "captions.jsonl")}],
        "text": [str(data_folder() / "corpus.txt")],
        "pairs": 4,
        "text_tokens": 96,
        "text_length": 48,
        "max_length": 160,
        "steps": 20,
        "optimizer": {"rate": 2e-3, "min_rate": 2e-4, "warmup_steps": 3},
        "workers": 0,
        "report": None,
        "device": "cpu",
        **changes,
    }


def stage2(out: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a small run of the second stage."""
    return {
        "model": str(start_folder()),
        "out": str(out),
        "data": [{"path": str(data_folder() / "talk.jsonl")}, {"path": str(data_folder() / "plain.jsonl")}],
        "batch": 5,
        "max_length": 700,
        "steps": 20,
        "optimizer": {"rate": 2e-3, "min_rate": 0.0, "warmup_steps": 3},
        "workers": 0,
        "report": None,
        "device": "cpu",
        **changes,
    }
