"""Figures from grades: means, AUROC, average precision, POPE's scores, each with its standard error and n.

Pure functions of numbers; what an answer is worth is `data/scene_grading.py`, which figure a task has `figures.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np

RESAMPLES = 100  # of the pictures, for the error of a figure that is no mean


class Figure(TypedDict):
    """A figure, its standard error (95 % of the time within 1.96 of them), and of how many questions it is."""

    value: float
    error: float
    n: int


def mean_figure(grades: Sequence[float]) -> Figure:
    """Mean of grades in [0, 1].

    error = sqrt(v / (n + 2)), v the variance of the n grades with one 0 and one 1 added to them, in the manner of
    Agresti and Coull (The American Statistician 52, 1998), so that ten right of ten are not certain.
    """
    if not len(grades):
        raise ValueError("mean of no grades")
    error = float(np.sqrt(np.var([*grades, 0.0, 1.0]) / (len(grades) + 2)))
    return {"value": float(np.mean(grades)), "error": error, "n": len(grades)}


def resampled_figure(statistic: Callable[[np.ndarray], float], pictures: int, n: int) -> Figure:
    """`statistic(weights)` with a weight of one for each of `pictures`, its error by the bootstrap over pictures.

    Questions about one picture stay together. NaN (a resample without a positive) is left out. As for `mean_figure` the
    error is never below 1 / (n + 2). The resamples are the same ones each time.
    """
    rng = np.random.default_rng(0)
    draws = rng.multinomial(pictures, np.full(pictures, 1 / pictures), size=RESAMPLES)
    values = np.array([statistic(draw) for draw in draws])
    values = values[~np.isnan(values)]
    error = max(float(values.std(ddof=1)) if len(values) > 1 else 0.0, 1 / (n + 2))
    return {"value": float(statistic(np.ones(pictures, int))), "error": error, "n": n}


def _weights(weights: np.ndarray | None, like: np.ndarray) -> np.ndarray:
    return np.ones(len(like)) if weights is None else np.asarray(weights, float)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def auroc(
    scores: Sequence[float] | np.ndarray, positive: Sequence[bool] | np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Area under the ROC curve: P(score of a positive > of a negative) + P(equal) / 2, the Mann-Whitney statistic.

    NaN without a positive or a negative. A weight says how often an example counts.
    """
    is_positive = np.asarray(positive, bool)
    w = _weights(weights, is_positive)
    _, place = np.unique(np.asarray(scores, float), return_inverse=True)
    ups = np.bincount(place, w * is_positive)
    downs = np.bincount(place, w * ~is_positive)
    below = np.cumsum(downs) - downs
    return _ratio(float((ups * (below + downs / 2)).sum()), float(ups.sum() * downs.sum()))


def average_precision(
    confidences: Sequence[float] | np.ndarray,
    hits: Sequence[bool] | np.ndarray,
    wanted: float,
    weights: np.ndarray | None = None,
) -> float:
    """Average precision of one category as COCO computes it (pycocotools, `COCOeval.accumulate`).

        AP = mean over r in {0, 0.01, .., 1} of max {precision at a recall >= r}

    hits say which detections met a truth of their own, `wanted` counts the truths; NaN without one. Detections of equal
    confidence are taken together, so that their order decides nothing.
    """
    if wanted <= 0:
        return float("nan")
    confidence, hit = np.asarray(confidences, float), np.asarray(hits, bool)
    if not len(confidence):
        return 0.0
    order = np.argsort(-confidence, kind="stable")
    confidence, hit, w = confidence[order], hit[order], _weights(weights, hit)[order]
    last = np.append(confidence[1:] != confidence[:-1], True)
    right, said = np.cumsum(w * hit)[last], np.cumsum(w)[last]
    precision = right / np.maximum(said, 1e-9)
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)  # 0 at recalls that are not reached
    return float(best[np.searchsorted(right / wanted + 1e-9, np.linspace(0, 1, 101))].mean())


def matched(overlaps: np.ndarray, least: float) -> list[bool]:
    """COCO's matching in one picture: which detections met a truth.

    overlaps [detections, truths], the most confident detection first: each takes the free truth that it overlaps most,
    if by `least` at least.
    """
    free = np.array(overlaps, float)
    hits = []
    for row in range(len(free)):
        best = int(free[row].argmax()) if free.shape[1] else -1
        hits.append(best >= 0 and bool(free[row, best] >= least))
        if hits[-1]:
            free[:, best] = -1.0
    return hits


def pope_reading(answer: str) -> bool:
    """Whether POPE's own script (Li et al. 2023, arXiv 2305.10355, `evaluate.py`) reads the answer as yes.

    Of the text before the first full stop, without commas: no where one of its words is "No", "not" or "no", else yes,
    whatever it says.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def pope_scores(
    said: Sequence[bool] | np.ndarray, truth: Sequence[bool] | np.ndarray, weights: np.ndarray | None = None
) -> dict[str, float]:
    """Accuracy, precision, recall, F1 (yes is the positive) and the share of yes among the answers, as POPE reports.

    Precision is 0 where yes is never said. NaN for what has nothing to be measured on.
    """
    yes, right = np.asarray(said, bool), np.asarray(truth, bool)
    w = _weights(weights, yes)
    both, answers, truths, total = ((w * chosen).sum() for chosen in (yes & right, yes, right, np.ones(len(yes), bool)))
    return {
        "accuracy": _ratio((w * (yes == right)).sum(), total),
        "precision": float(both / answers) if answers else 0.0,
        "recall": _ratio(both, truths),
        "F1": _ratio(2 * both, answers + truths),
        "yes": _ratio(answers, total),
    }


def balanced_accuracy(said: np.ndarray, truth: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean of the shares of positives and of negatives that were recognised; 0.5 for a constant answer.

    `said` holds 1 for yes, 0 for no, and anything else for an answer that is neither: wrong.
    """
    w, right = _weights(weights, truth), said == truth
    return (
        _ratio((w * right * truth).sum(), (w * truth).sum()) + _ratio((w * right * ~truth).sum(), (w * ~truth).sum())
    ) / 2
