"""Labels per patch for training vision encoders on scenes."""

import numpy as np

from sphinx_fast.data.scene_drawing import COLOURS, DEFECTS, JOINTS, SHAPES
from sphinx_fast.data.scenes import LETTERS, TEXTS, Scene, SceneDefect, SceneObject, SceneText

THINGS = ("background", "shape", "text", "person", "defect")
SIZE_NAMES = ("none", "small", "large")
CLASSES = {  # labels run from 0 (nothing) to these numbers
    "thing": len(THINGS) - 1,
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZE_NAMES) - 1,
    "text": len(TEXTS),
    "letter": len(LETTERS),
    "joint": len(JOINTS),
    "defect": len(DEFECTS),
}
_SHAPE = {name: k for k, name in enumerate(SHAPES, 1)}
_COLOUR = {name: k for k, name in enumerate(COLOURS, 1)}
_TEXT = {name: k for k, name in enumerate(TEXTS, 1)}
_DEFECT = {name: k for k, name in enumerate(DEFECTS, 1)}
WHOLE = (0.0, 0.0, 1.0, 1.0)
CROPS = (
    (0.0, 0.0, 0.5, 0.5),
    (0.5, 0.0, 1.0, 0.5),
    (0.0, 0.5, 0.5, 1.0),
    (0.5, 0.5, 1.0, 1.0),
)  # row-major, as the views
_COLUMNS = ("thing", "shape", "colour", "size", "text", "defect")


def _labels(scene: Scene) -> np.ndarray:
    """int64 [1 + things, columns]: row 0 is the background."""
    rows = [(0,) * len(_COLUMNS)]
    for t in scene.things:
        if isinstance(t, SceneObject):
            rows.append((1, _SHAPE[t.shape], _COLOUR[t.colour], SIZE_NAMES.index(t.size), 0, 0))
        elif isinstance(t, SceneText):
            rows.append((2, 0, 0, 0, _TEXT[t.text], 0))
        elif isinstance(t, SceneDefect):
            rows.append((4, 0, 0, 0, 0, _DEFECT[t.kind]))
        else:
            rows.append((3, 0, 0, 0, 0, 0))
    return np.array(rows, np.int64)


def dense_targets(
    scene: Scene, grid: int, window: tuple[float, float, float, float] = WHOLE, *, region: str = "box"
) -> dict[str, np.ndarray]:
    """Labels of grid x grid patches of a window of the padded square.

    window  x0, y0, x1, y1 in [0, 1] of the padded square: WHOLE, or one of CROPS
    region  "box": a thing owns the patches whose middle lies in its box, and always the patch its own middle lies in;
            "ink": a thing owns the patches whose middle pixel it painted

    Returns, with G = grid, row-major:
        object       int64 [G, G]  0, or 1 + the index into scene.things
        thing, shape, colour, size, text, defect
                     int64 [G, G]  0, or 1 + the index into THINGS[1:], SHAPES, COLOURS, SIZE_NAMES[1:], TEXTS, DEFECTS
        letter       int64 [G, G]  0, or 1 + the index into LETTERS of what a text shows in the column of the middle
        joint        int64 [G, G]  0, or 1 + the index into JOINTS of a joint inside the patch
        box          float32 [G, G, 4]  x1, y1, x2, y2 of the owner in the window's frame: [0, 1] inside the window,
                     beyond it where the window cuts the thing; 0 without an owner
        joint_point  float32 [G, G, 2]  x, y of the joint, same frame; 0 without one
    """
    if grid < 1 or region not in ("box", "ink"):
        raise ValueError(f'grid must be >= 1 and region "box" or "ink", got grid={grid}, region={region!r}')
    x0, y0, x1, y1 = window
    if not (x1 > x0 and y1 > y0):
        raise ValueError(f"window must be x0 < x1, y0 < y1, got {window}")
    origin, extent = np.array((x0, y0) * 2), np.array((x1 - x0, y1 - y0) * 2)
    boxes = np.zeros((1 + len(scene.things), 4))
    for k, thing in enumerate(scene.things, 1):
        boxes[k] = scene.square_box(thing.box)
    boxes[1:] = (boxes[1:] - origin) / extent
    owner = _ink_owner(scene, grid, window) if region == "ink" else _box_owner(boxes, grid)
    labels = _labels(scene)[owner]
    targets = {name: labels[..., k] for k, name in enumerate(_COLUMNS)}
    targets["object"] = owner
    targets["box"] = boxes[owner].astype(np.float32)
    targets["letter"] = _letters(scene, owner, x0, x1)
    targets["joint"], targets["joint_point"] = _joints(scene, grid, origin[:2], extent[:2])
    return targets


def _box_owner(boxes: np.ndarray, grid: int) -> np.ndarray:
    """int64 [G, G]: whose box holds the middle of the patch. boxes [1 + things, 4] in the window's frame."""
    owner = np.zeros((grid, grid), np.int64)
    first = (
        np.ceil(boxes * grid - 0.5).astype(np.int64).clip(0, grid)
    )  # first patch whose middle is not left of the edge
    for k in range(1, len(boxes)):
        ax, ay, bx, by = first[k]
        owner[ay:by, ax:bx] = k
    middles = (boxes[1:, :2] + boxes[1:, 2:]) / 2
    for k, (x, y) in enumerate(middles, 1):
        if 0 <= x < 1 and 0 <= y < 1:
            owner[int(y * grid), int(x * grid)] = k
    return owner


def _ink_owner(scene: Scene, grid: int, window: tuple[float, float, float, float]) -> np.ndarray:
    """int64 [G, G]: the id of the pixel in the middle of the patch; 0 in the padding."""
    x0, y0, x1, y1 = window
    middles = (np.arange(grid) + 0.5) / grid
    xs = np.floor((x0 + middles * (x1 - x0)) * scene.side).astype(np.int64) - scene.offset[0]
    ys = np.floor((y0 + middles * (y1 - y0)) * scene.side).astype(np.int64) - scene.offset[1]
    h, w = scene.ids.shape
    inside = ((ys >= 0) & (ys < h))[:, None] & ((xs >= 0) & (xs < w))[None, :]
    return np.where(inside, scene.ids[np.ix_(ys.clip(0, h - 1), xs.clip(0, w - 1))], 0).astype(np.int64)


def _letters(scene: Scene, owner: np.ndarray, x0: float, x1: float) -> np.ndarray:
    """Labels [G, G] of owners [G, G] in the columns x0 .. x1 of the padded square."""
    label, grid = np.zeros_like(owner), len(owner)
    for k, text in enumerate(scene.things, 1):
        if isinstance(text, SceneText):
            rows, columns = np.nonzero(owner == k)
            at = (x0 + (columns + 0.5) / grid * (x1 - x0)) * scene.side - scene.offset[0]
            letters = np.searchsorted(text.edges, at, side="right").clip(1, len(text.text)) - 1
            label[rows, columns] = [1 + LETTERS.index(text.text[letter]) for letter in letters]
    return label


def _joints(scene: Scene, grid: int, origin: np.ndarray, extent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joint labels [G, G] and points [G, G, 2]; where two joints share a patch the later of JOINTS stands."""
    label, point = np.zeros((grid, grid), np.int64), np.zeros((grid, grid, 2), np.float32)
    for person in scene.people:
        for k, name in enumerate(JOINTS, 1):
            x, y = (np.array(scene.square_point(*person.joints[name])) - origin) / extent
            if 0 <= x < 1 and 0 <= y < 1:
                label[int(y * grid), int(x * grid)] = k
                point[int(y * grid), int(x * grid)] = x, y
    return label, point
