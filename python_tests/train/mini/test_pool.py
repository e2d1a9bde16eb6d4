"""What training sees is what the image processor makes."""

import torch

from sphinx_fast.data.scene_drawing import COLOURS, SHAPES
from sphinx_fast.data.scenes import scene
from sphinx_fast.model.image_processor import SphinxImageProcessorReference
from sphinx_fast.ops import canvas
from sphinx_fast.train.mini.pool import WHOLE_CLASSES, WINDOWS, cut_views, view_caption, whole_labels


def test_views_equal_the_image_processor():
    pictures = [scene(seed).picture for seed in range(4)]
    expected = SphinxImageProcessorReference(192, 96)(pictures)["pixel_values"]
    squares = torch.stack([canvas(torch.from_numpy(picture), 192) for picture in pictures])
    assert torch.equal(cut_views(squares, 96).flatten(0, 1), expected)


def test_whole_labels_count():
    drawn = scene(9, split="train", kind="shapes")
    labels = whole_labels(drawn, WINDOWS[0])
    assert len(labels) == len(WHOLE_CLASSES)
    assert all(0 <= label < classes for label, classes in zip(labels, WHOLE_CLASSES, strict=True))
    for k, shape in enumerate(SHAPES):
        assert labels[k] == min(4, sum(o.shape == shape for o in drawn.objects))
    assert labels[len(SHAPES) + len(COLOURS)] == len(drawn.objects)
    crops = [whole_labels(drawn, window)[len(SHAPES) + len(COLOURS)] for window in WINDOWS[1:]]
    assert sum(crops) == len(drawn.objects)


def test_captions_of_views_share_out_what_the_scene_holds():
    for seed in range(30):
        drawn = scene(seed, domain="textured")
        named = {thing.name for thing in drawn.things}
        whole, *crops = (view_caption(drawn, window) for window in WINDOWS)
        for name in named:
            shape = name.removeprefix("the ").split()[-1]
            assert shape[:4] in whole or shape == "person", (whole, name)
            assert any(shape[:4] in crop or "people" in crop for crop in crops)
        if not named:
            assert whole == f"a {drawn.background} surface"
