"""Labels per patch against the slow definition, one patch at a time."""

from itertools import groupby

import numpy as np
import pytest

from sphinx_fast.data.scene_drawing import COLOURS, JOINTS, SHAPES
from sphinx_fast.data.scene_targets import CLASSES, CROPS, THINGS, WHOLE, dense_targets
from sphinx_fast.data.scenes import KINDS, LETTERS, TEXTS, SceneObject, SceneText, scene

SCENES = [scene(seed, kind=kind) for kind in KINDS for seed in range(5)]
WINDOWS = (WHOLE, *CROPS, (0.2, 0.3, 0.7, 0.9))


@pytest.mark.parametrize("grid", [5, 8, 16])
def test_owner_is_the_box_over_the_middle(grid: int) -> None:
    for s in SCENES:
        for x0, y0, x1, y1 in WINDOWS:
            targets = dense_targets(s, grid, (x0, y0, x1, y1))
            for row in range(grid):
                for column in range(grid):
                    x, y = x0 + (column + 0.5) / grid * (x1 - x0), y0 + (row + 0.5) / grid * (y1 - y0)
                    owner = targets["object"][row, column]
                    over = [
                        k
                        for k, t in enumerate(s.things, 1)
                        for b in [s.square_box(t.box)]
                        if b[0] <= x < b[2] and b[1] <= y < b[3]
                    ]
                    if owner == 0:
                        assert not over
                    elif owner not in over:  # the patch holds the middle of its owner
                        b = s.square_box(s.things[owner - 1].box)
                        mx, my = (b[0] + b[2]) / 2, (b[1] + b[3]) / 2
                        assert abs(mx - x) * 2 * grid <= (x1 - x0) + 1e-9
                        assert abs(my - y) * 2 * grid <= (y1 - y0) + 1e-9


@pytest.mark.parametrize("region", ["box", "ink"])
def test_labels_and_boxes_are_those_of_the_owner(region: str) -> None:
    for s in SCENES:
        for window in WINDOWS:
            t = dense_targets(s, 16, window, region=region)
            origin, extent = np.array(window[:2] * 2), np.array([window[2] - window[0], window[3] - window[1]] * 2)
            for row, column in np.argwhere(t["object"]):
                thing, at = s.things[t["object"][row, column] - 1], (row, column)
                assert np.allclose(t["box"][at] * extent + origin, s.square_box(thing.box), atol=1e-5)
                if isinstance(thing, SceneObject):
                    assert THINGS[t["thing"][at]] == "shape"
                    assert SHAPES[t["shape"][at] - 1] == thing.shape
                    assert list(COLOURS)[t["colour"][at] - 1] == thing.colour
                elif isinstance(thing, SceneText):
                    assert THINGS[t["thing"][at]] == "text" and TEXTS[t["text"][at] - 1] == thing.text
                    assert LETTERS[t["letter"][at] - 1] in thing.text
            for name, top in CLASSES.items():
                assert t[name].min() >= 0 and t[name].max() <= top
            assert not t["box"][t["object"] == 0].any() and not t["thing"][t["object"] == 0].any()


def test_letters_read_along_a_word_spell_it() -> None:
    for s in SCENES:
        t = dense_targets(s, 200)
        assert bool(t["letter"].any()) == bool(s.texts)
        for text in s.texts:
            assert text.edges[0] == text.box[0] and text.edges[-1] == pytest.approx(text.box[2])
            x0, y0, x1, y1 = s.square_box(text.box)
            along = t["letter"][int((y0 + y1) / 2 * 200), round(x0 * 200) : round(x1 * 200)]
            read = "".join(LETTERS[k - 1] for k in along if k)
            assert [letter for letter, _ in groupby(read)] == [letter for letter, _ in groupby(text.text)]


def test_a_letter_stands_where_its_ink_is() -> None:
    """Between the letters of a number of two there is a column without ink, near their edge."""
    found = 0
    for seed in range(120):
        s = scene(seed, kind="text", scale=3)
        for text in s.texts:
            if len(text.text) == 2 and text.text.isdigit():
                x1, y1, x2, y2 = text.box
                ink = (s.ids[y1:y2, x1:x2] == 1 + s.things.index(text)).any(0)
                empty = np.flatnonzero(~ink)
                gap = empty[np.argmin(np.abs(empty - (text.edges[1] - x1)))] if len(empty) else None
                if gap is not None:
                    found += 1
                    assert abs(gap - (text.edges[1] - x1)) < 0.12 * (x2 - x1)
    assert found > 20


def test_ink_reads_the_middle_pixel() -> None:
    for s in SCENES:
        owner, grid = dense_targets(s, 11, region="ink")["object"], 11
        square = np.zeros((s.side, s.side), np.uint8)
        h, w = s.ids.shape
        square[s.offset[1] : s.offset[1] + h, s.offset[0] : s.offset[0] + w] = s.ids
        for row in range(grid):
            for column in range(grid):
                y, x = int((row + 0.5) / grid * s.side), int((column + 0.5) / grid * s.side)
                assert owner[row, column] == square[y, x]


def test_every_thing_owns_a_patch() -> None:
    for s in SCENES:
        for grid in (7, 8, 16):
            assert set(np.unique(dense_targets(s, grid)["object"])) - {0} == set(range(1, len(s.things) + 1))


def test_joints_fall_into_their_patch() -> None:
    seen = set()
    for s in SCENES:
        t = dense_targets(s, 16)
        for row, column in np.argwhere(t["joint"]):
            name = JOINTS[t["joint"][row, column] - 1]
            x, y = t["joint_point"][row, column]
            assert (int(y * 16), int(x * 16)) == (row, column)
            assert any(np.allclose(s.square_point(*p.joints[name]), (x, y), atol=1e-6) for p in s.people)
            seen.add(name)
    assert seen == set(JOINTS)


@pytest.mark.parametrize("bad", [{"grid": 0}, {"region": "mask"}, {"window": (0.5, 0.0, 0.5, 1.0)}])
def test_bad_arguments(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        dense_targets(SCENES[0], **{"grid": 8, **bad})
