"""Text <-> boxes, points, masks: the paper's prompts, what the model writes in brackets, and drawing it."""

from sphinx_fast.tasks.boxes import (
    Box,
    Point,
    Region,
    first_box,
    format_boxes,
    format_region,
    iou,
    parse_boxes,
    parse_key_points,
    parse_points,
    parse_regions,
)
from sphinx_fast.tasks.prompts import PROMPTS, Prompt

__all__ = [
    "PROMPTS",
    "Box",
    "Point",
    "Prompt",
    "Region",
    "first_box",
    "format_boxes",
    "format_region",
    "iou",
    "parse_boxes",
    "parse_key_points",
    "parse_points",
    "parse_regions",
]
