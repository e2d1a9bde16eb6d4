"""Answers -> the figures of a task.

vqa, read, relation, region_description    accuracy, in all and by kind; vqa also by size, see `by_size`
option_letter, options, unanswerable,      accuracy, in all and by kind
ocr_vqa, classify
pope                                       accuracy, precision, recall, F1, share of yes; negatives by setting
refer                                      Acc@0.5 and Acc@0.75 (the first box), in all and by kind; by size
detect_all                                 AP50 over categories, F1
detect_category, text_boxes                F1 at IoU 0.5 (and the right name or word), mean over pictures
key_points                                 PCK at 0.05 and 0.1 of the longer side of the person's box
caption, detailed_caption                  F1 of words
grounded_caption                           F1 of boxes at IoU 0.5 with their phrase
defect                                     AUROC of p(yes), balanced accuracy, share of defects found at IoU 0.5

A reading that fails is wrong, never a lucky guess; only POPE's own reading of yes and no has no third case.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sphinx_fast.data.scene_grading import IOU, grade, joints_near, plain_words
from sphinx_fast.evaluate.ask import Said
from sphinx_fast.evaluate.items import Item
from sphinx_fast.evaluate.metrics import (
    Figure,
    auroc,
    average_precision,
    balanced_accuracy,
    matched,
    mean_figure,
    pope_reading,
    pope_scores,
    resampled_figure,
)
from sphinx_fast.tasks.boxes import Box, first_box, iou, parse_regions

SIZES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 1.0)
Figures = dict[str, Figure]
_F1 = ("detect_all", "detect_category", "text_boxes", "caption", "detailed_caption", "grounded_caption")


class SizeRow(Figure):
    """A figure of the things whose longer side is at least `low` and below `high`, parts of the square's side."""

    low: float
    high: float


def by_size(items: Sequence[Item], grades: Sequence[float], edges: Sequence[float] = SIZES) -> list[SizeRow]:
    """Mean grade of the questions about one thing against its size; bins that hold none are left out.

    The size is the longer side of the thing's box as a fraction of the padded square's side.
    """
    found: dict[int, list[float]] = defaultdict(list)
    for item, value in zip(items, grades, strict=True):
        if len(item.question.boxes) == 1:
            x1, y1, x2, y2 = item.question.boxes[0]
            found[int(np.searchsorted(edges, max(x2 - x1, y2 - y1), side="right")) - 1].append(value)
    bins = range(len(edges) - 1)
    return [{"low": edges[k], "high": edges[k + 1], **mean_figure(found[k])} for k in bins if k in found]


def _by_kind(name: str, items: Sequence[Item], grades: Sequence[float]) -> Figures:
    """The mean, and that of each kind of question."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for item, value in zip(items, grades, strict=True):
        kinds[item.question.kind].append(value)
    return {name: mean_figure(grades)} | {f"{name} {kind}": mean_figure(kinds[kind]) for kind in sorted(kinds)}


def _sizes(name: str, items: Sequence[Item], grades: Sequence[float]) -> Figures:
    return {
        f"{name} size {row['low']:.2f}-{row['high']:.2f}": {"value": row["value"], "error": row["error"], "n": row["n"]}
        for row in by_size(items, grades)
    }


def _grades(items: Sequence[Item], said: Sequence[Said]) -> list[float]:
    return [grade(item.question, answer.text) for item, answer in zip(items, said, strict=True)]


def _vqa(items: Sequence[Item], said: Sequence[Said]) -> Figures:
    grades = _grades(items, said)
    named = [k for k, item in enumerate(items) if item.question.kind in ("colour", "shape")]
    sizes = _sizes("accuracy", [items[k] for k in named], [grades[k] for k in named])
    return _by_kind("accuracy", items, grades) | sizes


def _refer(items: Sequence[Item], said: Sequence[Said]) -> Figures:
    overlap = []
    for item, answer in zip(items, said, strict=True):
        box = first_box(answer.text)
        overlap.append(iou(box, Box(*item.question.boxes[0])) if box else 0.0)
    half, most = ([float(v >= least) for v in overlap] for least in (IOU, 0.75))
    return _by_kind("Acc@0.5", items, half) | _by_kind("Acc@0.75", items, most) | _sizes("Acc@0.5", items, half)


def _key_points(items: Sequence[Item], said: Sequence[Said]) -> Figures:
    return {
        f"PCK@{reach:g}": mean_figure(
            [joints_near(a.text, i.question, reach) for i, a in zip(items, said, strict=True)]
        )
        for reach in (0.05, 0.1)
    }


def _pictures(items: Sequence[Item]) -> np.ndarray:
    """Of each item the number of its picture, 0, 1, ..."""
    return np.unique([item.seed for item in items], return_inverse=True)[1]


def _resampled(items: Sequence[Item], statistic: Callable[[np.ndarray], float]) -> Figure:
    """`statistic` of weights per item; the error by resampling pictures."""
    picture = _pictures(items)
    return resampled_figure(lambda weights: statistic(weights[picture]), int(picture.max()) + 1, len(items))


def _pope(items: Sequence[Item], said: Sequence[Said]) -> Figures:
    figures: Figures = {}
    for setting in ("", "random", "adversarial"):
        chosen = [k for k, item in enumerate(items) if setting in ("", item.setting)]
        if chosen:
            some = [items[k] for k in chosen]
            yes = np.array([pope_reading(said[k].text) for k in chosen])
            right = np.array([item.question.answer == "yes" for item in some])
            for name in ("accuracy", "precision", "recall", "F1", "yes"):
                figures[f"{name} {setting}".strip()] = _resampled(
                    some,
                    lambda w, n=name, y=yes, r=right: pope_scores(y, r, w)[n],  # type: ignore[misc]
                )
    return figures


def _defect(items: Sequence[Item], said: Sequence[Said]) -> Figures:
    has = np.array([bool(item.question.boxes) for item in items])
    figures: Figures = {}
    if has.any() and not has.all():
        yes = [answer.yes for answer in said]
        first = [plain_words(answer.text)[:1] for answer in said]
        read = np.array([1 if word == ["yes"] else 0 if word == ["no"] else -1 for word in first])
        figures["AUROC"] = _resampled(items, lambda w: auroc(yes, has, w))
        figures["balanced accuracy"] = _resampled(items, lambda w: balanced_accuracy(read, has, w))
    grades = [value for value, there in zip(_grades(items, said), has, strict=True) if there]
    return figures | ({"located@0.5": mean_figure(grades)} if grades else {})


def _plain(name: str) -> str:
    return " ".join(plain_words(name))


def _detections(item: Item, answer: Said) -> dict[str, list[tuple[float, Box]]]:
    """Category -> (confidence, box), the most confident first."""
    boxes = [(_plain(region.name), box) for region in parse_regions(answer.text) for box in region.boxes]
    confidences = answer.boxes or (1.0,) * len(boxes)
    found: dict[str, list[tuple[float, Box]]] = defaultdict(list)
    for (name, box), confidence in zip(boxes, confidences, strict=True):
        found[name].append((confidence, box))
    return {name: sorted(detections, key=lambda d: -d[0]) for name, detections in found.items()}


def _ap50(items: Sequence[Item], said: Sequence[Said]) -> Figure:
    """Average precision at IoU 0.5, the mean over categories ("red circle", "person") that occur, as COCO does it.

    A model that writes its boxes has no scores: a box's confidence is that of its tokens (`ask.box_confidences`). As an
    answer holds no box twice at different confidences, the curve ends at the recall of what was said. Names that occur
    in no picture count for no category, as COCO has none for them.
    """
    picture = _pictures(items)
    wanted: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(int(picture.max()) + 1))
    found: dict[str, list[tuple[float, bool, int]]] = defaultdict(list)
    for k, item, answer in zip(picture, items, said, strict=True):
        truths: dict[str, list[Box]] = defaultdict(list)
        for name, box in zip(item.question.names, item.question.boxes, strict=True):
            truths[_plain(name)].append(Box(*box))
            wanted[_plain(name)][k] += 1
        for name, detections in _detections(item, answer).items():
            overlap = np.array([[iou(box, truth) for truth in truths[name]] for _, box in detections])
            hits = matched(overlap.reshape(len(detections), -1), IOU)
            found[name] += [(confidence, hit, k) for (confidence, _), hit in zip(detections, hits, strict=True)]
    columns = {name: [np.array(column) for column in zip(*found[name], strict=True)] for name in wanted if found[name]}
    nothing = [np.empty(0), np.empty(0, bool), np.empty(0, int)]

    def statistic(weights: np.ndarray) -> float:
        values = []
        for name, counts in wanted.items():
            confidence, hit, k = columns.get(name, nothing)
            values.append(average_precision(confidence, hit, float(weights @ counts), weights[k]))
        return float(np.nanmean(values))

    return resampled_figure(statistic, int(picture.max()) + 1, len(items))


def figures_of(task: str, items: Sequence[Item], said: Sequence[Said]) -> Figures:
    """The figures of a task, the main one first. `n` counts questions.

    Raises:
        ValueError: no items, or of another number than there are answers.
    """
    if not items:
        raise ValueError(f"{task}: no questions")
    special: Mapping[str, Callable[[Sequence[Item], Sequence[Said]], Figures]]
    special = {"vqa": _vqa, "refer": _refer, "pope": _pope, "defect": _defect, "key_points": _key_points}
    if task in special:
        return special[task](items, said)
    grades = _grades(items, said)
    if task in _F1:
        main = {"AP50": _ap50(items, said)} if task == "detect_all" else {}
        return main | {"F1": mean_figure(grades)}
    return _by_kind("accuracy", items, grades)
