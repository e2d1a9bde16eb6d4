"""Scenes: the same for a seed, different between splits, with boxes that are the tight box of the ink."""

import time

import numpy as np
import pytest

from sphinx_fast.data import scene_drawing as drawing
from sphinx_fast.data.scenes import DOMAINS, KINDS, SIZES, SPLITS, Scene, scene, stream

SEEDS = range(100)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    drawn = [scene(seed) for seed in SEEDS] + [scene(seed, kind=kind) for kind in KINDS for seed in range(20)]
    drawn += [scene(seed, domain="textured") for seed in SEEDS]
    return drawn + [scene(seed, split="unseen", domain=domain) for seed in range(20) for domain in DOMAINS]


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def test_same_seed_same_scene() -> None:
    for seed in (0, 7, 123_456_789, 2**40):
        a, b = scene(seed), scene(seed)
        assert np.array_equal(a.picture, b.picture) and np.array_equal(a.ids, b.ids)
        assert a.things == b.things


def test_splits_are_different_streams() -> None:
    pictures = {
        scene(seed, split=split, domain=domain).picture.tobytes()
        for split in SPLITS
        for domain in DOMAINS
        for seed in range(60)
    }
    assert len(pictures) == 60 * len(SPLITS) * len(DOMAINS)


def test_pictures_are_rgb_of_several_shapes(scenes: list[Scene]) -> None:
    sizes = {s.picture.shape for s in scenes}
    assert all(s.picture.dtype == np.uint8 and s.picture.shape[2] == 3 for s in scenes)
    assert all(min(h, w) >= 90 and max(h, w) <= 224 for h, w, _ in sizes)
    assert any(h == w for h, w, _ in sizes) and any(h > w for h, w, _ in sizes) and any(h < w for h, w, _ in sizes)


def test_boxes_are_the_tight_boxes_of_the_ink(scenes: list[Scene]) -> None:
    for s in scenes:
        assert set(np.unique(s.ids)) <= set(range(len(s.things) + 1))
        for k, thing in enumerate(s.things, 1):
            assert tight_box(s.ids == k) == thing.box, (s.seed, s.kind, thing)


def test_ink_has_the_colour_that_is_named(scenes: list[Scene]) -> None:
    names, values = list(drawing.COLOURS), np.array(list(drawing.COLOURS.values()), float)
    for s in scenes:
        for k, thing in enumerate(s.objects, 1):
            mean = s.picture[s.ids == k].mean(0)
            assert names[np.abs(values - mean).sum(1).argmin()] == thing.colour


def test_things_do_not_touch(scenes: list[Scene]) -> None:
    for s in scenes:
        boxes = [t.box for t in s.things]
        for i, a in enumerate(boxes):
            for b in boxes[i + 1 :]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (s.seed, a, b)


def test_things_can_be_read_at_128_pixels(scenes: list[Scene]) -> None:
    for s in scenes:
        for o in s.objects:
            longer = max(o.box[2] - o.box[0], o.box[3] - o.box[1]) / s.side
            low, high = SIZES[o.size]
            assert low - 0.03 <= longer <= high + 0.02, (s.seed, o)
            assert min(o.box[2] - o.box[0], o.box[3] - o.box[1]) / s.side >= 0.12, (s.seed, o)
        assert all((t.box[3] - t.box[1]) / s.side >= 0.09 for t in s.texts)


def test_joints_lie_on_the_person(scenes: list[Scene]) -> None:
    people = [(s, k, p) for s in scenes for k, p in enumerate(s.things, 1) if p in s.people]
    assert people
    for s, k, person in people:
        assert tuple(person.joints) == drawing.JOINTS
        for name, (x, y) in person.joints.items():
            near = s.ids[max(0, int(y) - 2) : int(y) + 3, max(0, int(x) - 2) : int(x) + 3]
            assert (near == k).any(), (s.seed, name)


def test_padded_square(scenes: list[Scene]) -> None:
    for s in scenes:
        h, w = s.picture.shape[:2]
        side, (dx, dy) = max(h, w), s.offset
        assert (dx, dy) == ((side - w) // 2, (side - h) // 2)
        for t in s.things:
            box = s.square_box(t.box)
            assert all(0.0 <= v <= 1.0 for v in box)
            back = [v * side - o for v, o in zip(box, (dx, dy, dx, dy), strict=True)]
            assert np.allclose(back, t.box)


def test_scale_draws_the_same_layout_larger() -> None:
    for seed in range(40):
        a, b = scene(seed, split="test"), scene(seed, split="test", scale=3)
        assert b.picture.shape[0] == 3 * a.picture.shape[0]
        assert [t.name for t in a.things] == [t.name for t in b.things]
        for s, t in zip(a.things, b.things, strict=True):
            assert np.abs(np.array(s.box) - np.array(t.box) / 3).max() <= 3


def test_shrink_makes_shapes_smaller() -> None:
    def sides(shrink: float) -> list[float]:
        drawn = [scene(seed, kind="shapes", scale=4, shrink=shrink) for seed in range(20)]
        return [max(o.box[2] - o.box[0], o.box[3] - o.box[1]) / s.side for s in drawn for o in s.objects]

    whole, half = sides(1.0), sides(0.5)
    assert max(half) < 0.6 * max(whole) and min(half) < 0.6 * min(whole)
    assert len(half) >= len(whole), "more of them find room"


def test_a_textured_scene_is_the_same_at_every_scale() -> None:
    for seed in range(10):
        small, large = (scene(seed, domain="textured", scale=scale) for scale in (1, 2))
        assert [t.name for t in small.things] == [t.name for t in large.things]
        ground = (small.ids == 0) & (large.ids[::2, ::2] == 0) & (large.ids[1::2, 1::2] == 0)
        assert np.abs(small.picture.astype(int) - large.picture[::2, ::2])[ground].max() <= 1


def test_domains_differ_visibly() -> None:
    """The clean ground is quiet, the textured one rough; in both the ink stands out from it."""

    def roughness(s: Scene) -> float:
        right = np.abs(np.diff(s.picture.astype(int), axis=1)).mean(-1)
        return float(np.median(right[(s.ids[:, 1:] == 0) & (s.ids[:, :-1] == 0)]))

    clean, textured = ([scene(seed, domain=domain) for seed in range(60)] for domain in DOMAINS)
    clean = [s for s in clean if s.background != "noise" and s.kind != "defect"]
    assert max(map(roughness, clean)) < min(map(roughness, textured))
    for s in textured:
        if s.objects:
            light = s.picture[s.ids == 0].mean()
            assert all(np.abs(s.picture[s.ids == k].mean(0) - light).max() > 30 for k in range(1, 1 + len(s.objects)))


def test_held_out_combinations_are_drawn_in_unseen_alone() -> None:
    assert {s for s, _ in drawing.HELD_OUT} == set(drawing.SHAPES)
    assert {c for _, c in drawing.HELD_OUT} == set(drawing.COLOURS)
    for split in SPLITS:
        for domain in DOMAINS:
            for seed in range(150):
                found = {o.name for o in scene(seed, split=split, domain=domain).objects} & drawing.HELD_OUT_NAMES
                if split != "unseen":
                    assert not found
    shapes = [scene(seed, split="unseen", kind="shapes") for seed in range(100)]
    held_out = [{o.name for o in s.objects} & drawing.HELD_OUT_NAMES for s in shapes]
    assert np.mean([bool(found) for found in held_out]) > 0.97  # one may have found no room
    assert set().union(*held_out) == drawing.HELD_OUT_NAMES


def test_every_attribute_occurs() -> None:
    drawn = [scene(seed) for seed in range(300)]
    assert {o.shape for s in drawn for o in s.objects} == set(drawing.SHAPES)
    assert {o.colour for s in drawn for o in s.objects} == set(drawing.COLOURS)
    assert {s.defect.kind for s in drawn if s.defect} == set(drawing.DEFECTS)
    assert {s.kind for s in drawn} == set(KINDS)
    assert {len(s.objects) for s in drawn} == set(range(7))


@pytest.mark.parametrize(
    "bad",
    [{"split": "dev"}, {"domain": "oil"}, {"kind": "cats"}, {"seed": -1}, {"scale": 0}, {"scale": 99}, {"shrink": 0.1}],
)
def test_bad_arguments(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        scene(**{"seed": 0, **bad})


def test_stream_keeps_what_is_accepted() -> None:
    drawn = stream("validation", 5, lambda s: s.kind == "people")
    assert all(next(drawn).people for _ in range(5))


def test_speed() -> None:
    start = time.process_time()
    for seed in range(200):
        scene(seed)
    rate = 200 / (time.process_time() - start)
    print(f"{rate:.0f} scenes/s on one core")
    assert rate > 40  # several hundred on an idle core; the bound only catches a change of kind
