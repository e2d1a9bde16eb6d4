"""Text <-> boxes, points, masks: the paper's prompts, what the model writes in brackets, and drawing it."""

from sphinx_fast.tasks import prompts
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
from sphinx_fast.tasks.draw import draw_answer, draw_boxes, draw_regions
from sphinx_fast.tasks.prompts import PROMPTS, Prompt

__all__ = [
    "PROMPTS",
    "Box",
    "Point",
    "Prompt",
    "Region",
    "draw_answer",
    "draw_boxes",
    "draw_regions",
    "first_box",
    "format_boxes",
    "format_region",
    "iou",
    "parse_boxes",
    "parse_key_points",
    "parse_points",
    "parse_regions",
    "prompts",
]
