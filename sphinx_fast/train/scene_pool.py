"""A pool of drawn scenes on disk: the padded squares and their labels, drawn once by all cores, read by every step.

Plain .npy files, so that several processes map the same pages:
    squares  uint8   [N, s, s, 3]      the padded, resized picture, exactly as the image processor makes it
    labels   int16   [N, V, P, 7]      per patch: thing, shape, colour, size, text, defect, joint (0: nothing)
    boxes    float16 [N, V, P, 6]      per patch: box of its owner and joint point, in the view's frame
    wholes   int16   [N, V, W]         per view: counts and kinds (see `WHOLE_CLASSES`)
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sphinx_fast import ops
from sphinx_fast.data.scene_drawing import BACKGROUNDS, COLOURS, DEFECTS, SHAPES, TEXTURES
from sphinx_fast.data.scene_targets import CLASSES, CROPS, WHOLE, dense_targets
from sphinx_fast.data.scenes import TEXTS, Scene, SquareBox, Thing, scene
from sphinx_fast.model.config import SphinxVisionConfig

LABELS = ("thing", "shape", "colour", "size", "text", "defect", "joint")
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


def cut_views(squares: Tensor, view_size: int) -> Tensor:
    """uint8 [B, s, s, 3] -> CLIP-normalised fp32 views [B, V, 3, view_size, view_size], global view first.

    What `SphinxImageProcessor` makes of the pictures that these squares were made from.
    """
    views = ops.views(list(squares), picture_size=squares.shape[1], view_size=view_size)
    return views.unflatten(0, (len(squares), -1))


def whole_labels(drawn: Scene, window: SquareBox) -> np.ndarray:
    """Counts and kinds of the things whose middle lies in the window, int16 in the order of `WHOLE_CLASSES`."""
    x0, y0, x1, y1 = window

    def inside(thing: Thing) -> bool:
        box = drawn.square_box(thing.box)
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        return x0 <= x < x1 and y0 <= y < y1

    objects = [o for o in drawn.objects if inside(o)]
    texts = [t for t in drawn.texts if inside(t)]
    shapes = [sum(o.shape == shape for o in objects) for shape in SHAPES]
    colours = [sum(o.colour == colour for o in objects) for colour in COLOURS]
    pairs = [sum(o.shape == s and o.colour == c for o in objects) for c in COLOURS for s in SHAPES]
    text = 1 + TEXTS.index(texts[0].text) if len(texts) == 1 else 0
    defect = 1 + DEFECTS.index(drawn.defect.kind) if drawn.defect and inside(drawn.defect) else 0
    kinds = [
        min(len(objects), 6),
        min(sum(inside(p) for p in drawn.people), 2),
        min(len(texts), 3),
        GROUNDS.index(drawn.background),
        text,
        defect,
    ]
    counts = [min(n, COUNTED - 1) for n in shapes + colours]
    return np.array(counts + kinds + [min(n, 2) for n in pairs], np.int16)


def _draw(first: int, count: int, picture_size: int, grid: int) -> tuple[np.ndarray, ...]:
    """The four arrays of `count` scenes from seed `first`."""
    squares, labels, boxes, wholes = [], [], [], []
    for seed in range(first, first + count):
        drawn = scene(seed, split="train")
        squares.append(ops.canvas(torch.from_numpy(drawn.picture), picture_size).numpy())
        targets = [dense_targets(drawn, grid, window) for window in WINDOWS]
        labels.append([[t[name].reshape(-1) for name in LABELS] for t in targets])
        boxes.append([np.concatenate([t["box"], t["joint_point"]], -1).reshape(-1, 6) for t in targets])
        wholes.append([whole_labels(drawn, window) for window in WINDOWS])
    label_array = np.array(labels, np.int16).transpose(0, 1, 3, 2)
    return np.stack(squares), label_array, np.array(boxes, np.float16), np.array(wholes, np.int16)


NAMES = ("squares", "labels", "boxes", "wholes")


def draw_pool(folder: Path, scenes: int, vision: SphinxVisionConfig, first: int = 0, workers: int = 2) -> None:
    """Write the pool of seeds first .. first + scenes - 1 into `folder`, unless it is there already."""
    if (folder / "wholes.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(first, first + scenes, CHUNK)
    counts = [min(CHUNK, first + scenes - start) for start in starts]
    files: list[np.memmap] = []
    at = 0
    with ExitStack() as stack:
        if workers:
            context = multiprocessing.get_context("spawn")
            draw: Any = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context)).map
        else:
            draw = map
        bar = stack.enter_context(tqdm(total=scenes, desc="draw scenes"))
        sizes = [vision.picture_size] * len(counts), [vision.grid_size] * len(counts)
        for arrays in draw(_draw, starts, counts, *sizes):
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
