"""What training sees is what the image processor makes."""

import numpy as np
import torch

from sphinx_fast.data.scene_drawing import COLOURS, SHAPES
from sphinx_fast.data.scenes import scene
from sphinx_fast.model.image_processor import SphinxImageProcessorReference
from sphinx_fast.train.scene_pool import WHOLE_CLASSES, WINDOWS, cut_views, padded_square, whole_labels


def test_views_equal_the_image_processor():
    pictures = [scene(seed).picture for seed in range(4)]
    expected = SphinxImageProcessorReference(192, 96)(pictures)["pixel_values"]
    squares = torch.from_numpy(np.stack([padded_square(picture, 192) for picture in pictures]))
    torch.testing.assert_close(cut_views(squares, 96).flatten(0, 1), expected, rtol=0, atol=1e-6)


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
