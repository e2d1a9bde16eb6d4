"""A pool of drawn scenes on disk: the padded squares and their labels, drawn once by all cores, read by every step.

Plain .npy files, so that several processes map the same pages:
    squares  uint8   [N, s, s, 3]      the padded, resized picture, exactly as the image processor makes it
    labels   int16   [N, V, P, 8]      per patch, in the order of LABELS (0: nothing)
    boxes    float16 [N, V, P, 6]      per patch: box of its owner and joint point, in the view's frame
    wholes   int16   [N, V, W]         per view: counts and kinds (see `WHOLE_CLASSES`)
    captions int16   [N, V, L]         per view: tokens of a caption of what it holds, 0 behind its end

Every other scene is a textured one.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from tqdm import tqdm

from sphinx_fast import ops
from sphinx_fast.data.scene_drawing import BACKGROUNDS, COLOURS, DEFECTS, SHAPES, TEXTURES
from sphinx_fast.data.scene_targets import CLASSES, CROPS, WHOLE, dense_targets
from sphinx_fast.data.scene_words import article, groups, joined
from sphinx_fast.data.scenes import TEXTS, Scene, SquareBox, Thing, scene
from sphinx_fast.model.config import SphinxVisionConfig

LABELS = ("thing", "shape", "colour", "size", "text", "letter", "defect", "joint")
GROUNDS = (*BACKGROUNDS, *TEXTURES)
COUNTED = 5  # a count is one of 0..4, the last standing for "4 or more"; the total goes to 6
# What a whole view is asked: the number of each shape, of each colour, of all shapes, people and texts, the ground,
# and for each (colour, shape) how many.
WHOLE_CLASSES = (
    (COUNTED,) * len(SHAPES)
    + (COUNTED,) * len(COLOURS)
    + (7, 3, 4, len(GROUNDS), CLASSES["text"] + 1, CLASSES["defect"] + 1)
    + (3,) * (len(SHAPES) * len(COLOURS))
)
WINDOWS = (WHOLE, *CROPS)
CHUNK = 250  # scenes a worker draws at a time
CAPTION = 24  # tokens of a view's caption that are kept
# How often each kind of scene is drawn here: at the frequencies of `scenes.KINDS` a batch holds the ink of three words
# out of 130, and no encoder ever begins to read.
POOL_KINDS = {"shapes": 0.40, "text": 0.35, "people": 0.15, "defect": 0.10}


def cut_views(squares: Tensor, view_size: int) -> Tensor:
    """uint8 [B, s, s, 3] -> CLIP-normalised fp32 views [B, V, 3, view_size, view_size], global view first.

    What `SphinxImageProcessor` makes of the pictures that these squares were made from.
    """
    views = ops.views(list(squares), picture_size=squares.shape[1], view_size=view_size)
    return views.unflatten(0, (len(squares), -1))


def _inside(drawn: Scene, thing: Thing, window: SquareBox) -> bool:
    """Whether the middle of a thing lies in a window."""
    x0, y0, x1, y1 = drawn.square_box(thing.box)
    return window[0] <= (x0 + x1) / 2 < window[2] and window[1] <= (y0 + y1) / 2 < window[3]


def whole_labels(drawn: Scene, window: SquareBox) -> np.ndarray:
    """Counts and kinds of the things whose middle lies in the window, int16 in the order of `WHOLE_CLASSES`."""
    objects = [o for o in drawn.objects if _inside(drawn, o, window)]
    texts = [t for t in drawn.texts if _inside(drawn, t, window)]
    shapes = [sum(o.shape == shape for o in objects) for shape in SHAPES]
    colours = [sum(o.colour == colour for o in objects) for colour in COLOURS]
    pairs = [sum(o.shape == s and o.colour == c for o in objects) for c in COLOURS for s in SHAPES]
    text = 1 + TEXTS.index(texts[0].text) if len(texts) == 1 else 0
    defect = 1 + DEFECTS.index(drawn.defect.kind) if drawn.defect and _inside(drawn, drawn.defect, window) else 0
    kinds = [
        min(len(objects), 6),
        min(sum(_inside(drawn, p, window) for p in drawn.people), 2),
        min(len(texts), 3),
        GROUNDS.index(drawn.background),
        text,
        defect,
    ]
    counts = [min(n, COUNTED - 1) for n in shapes + colours]
    return np.array(counts + kinds + [min(n, 2) for n in pairs], np.int16)


def view_caption(drawn: Scene, window: SquareBox) -> str:
    """`a red circle and two stars`: what has its middle in the window; the surface where there is nothing."""
    phrases = [phrase for phrase, _ in groups(drawn, [t for t in drawn.things if _inside(drawn, t, window)])]
    if drawn.defect and _inside(drawn, drawn.defect, window):
        phrases = [article(drawn.defect.name)]
    return joined(phrases) if phrases else f"a {drawn.background} surface"


def _tokens(tokenizer: SentencePieceProcessor, text: str) -> np.ndarray:
    row = np.zeros(CAPTION, np.int16)
    ids = tokenizer.encode(text)[:CAPTION]
    row[: len(ids)] = ids
    return row


def _draw(
    first: int, count: int, picture_size: int, grid: int, tokenizer: Path, kinds: Mapping[str, float]
) -> tuple[np.ndarray, ...]:
    """The five arrays of `count` scenes from seed `first`."""
    squares, labels, boxes, wholes, captions = [], [], [], [], []
    words = SentencePieceProcessor(model_file=str(tokenizer))
    for seed in range(first, first + count):
        kind = Random(seed).choices(list(kinds), list(kinds.values()))[0]
        drawn = scene(seed, split="train", kind=kind, domain=("clean", "textured")[seed % 2])
        squares.append(ops.canvas(torch.from_numpy(drawn.picture), picture_size).numpy())
        targets = [dense_targets(drawn, grid, window) for window in WINDOWS]
        labels.append([[t[name].reshape(-1) for name in LABELS] for t in targets])
        boxes.append([np.concatenate([t["box"], t["joint_point"]], -1).reshape(-1, 6) for t in targets])
        wholes.append([whole_labels(drawn, window) for window in WINDOWS])
        captions.append([_tokens(words, view_caption(drawn, window)) for window in WINDOWS])
    label_array = np.array(labels, np.int16).transpose(0, 1, 3, 2)
    return np.stack(squares), label_array, np.array(boxes, np.float16), np.array(wholes, np.int16), np.array(captions)


NAMES = ("squares", "labels", "boxes", "wholes", "captions")


def draw_pool(
    folder: Path,
    scenes: int,
    vision: SphinxVisionConfig,
    tokenizer: Path,
    kinds: Mapping[str, float] = POOL_KINDS,
    workers: int = 2,
) -> None:
    """Write the pool of seeds 0 .. scenes - 1 into `folder`, unless it is there already.

    tokenizer  SentencePiece's file, for the captions
    kinds      how often each kind of scene is drawn
    """
    if (folder / f"{NAMES[-1]}.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, scenes, CHUNK)
    counts = [min(CHUNK, scenes - start) for start in starts]
    files: list[np.memmap] = []
    at = 0
    with ExitStack() as stack:
        if workers:
            context = multiprocessing.get_context("spawn")
            draw: Any = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context)).map
        else:
            draw = map
        bar = stack.enter_context(tqdm(total=scenes, desc="draw scenes"))
        same = ([value] * len(counts) for value in (vision.picture_size, vision.grid_size, tokenizer, kinds))
        for arrays in draw(_draw, starts, counts, *same):
            if not files:
                files = [
                    np.lib.format.open_memmap(
                        folder / f"{name}.part.npy", mode="w+", dtype=array.dtype, shape=(scenes, *array.shape[1:])
                    )
                    for name, array in zip(NAMES, arrays, strict=True)
                ]
            for file, array in zip(files, arrays, strict=True):
                file[at : at + len(array)] = array
            at += len(arrays[0])
            bar.update(len(arrays[0]))
    for name, file in zip(NAMES, files, strict=True):
        file.flush()
        (folder / f"{name}.part.npy").rename(folder / f"{name}.npy")


def load_pool(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a pool, memory-mapped."""
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in NAMES}
