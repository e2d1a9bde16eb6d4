"""Figures against values worked out by hand and against slow definitions."""

from itertools import product

import numpy as np
import pytest

from sphinx_fast.evaluate.metrics import (
    auroc,
    average_precision,
    balanced_accuracy,
    matched,
    mean_figure,
    pope_reading,
    pope_scores,
    resampled_figure,
)


def test_the_error_of_a_mean_is_binomial_and_never_nothing() -> None:
    figure = mean_figure([1.0] * 30 + [0.0] * 70)
    assert figure["value"] == pytest.approx(0.3) and figure["n"] == 100
    assert figure["error"] == pytest.approx((31 / 102 * 71 / 102 / 102) ** 0.5)
    assert mean_figure([1.0] * 8)["error"] == pytest.approx((9 / 10 * 1 / 10 / 10) ** 0.5)
    assert mean_figure([0.5] * 100)["error"] < figure["error"]  # grades between 0 and 1 vary less
    with pytest.raises(ValueError, match="no grades"):
        mean_figure([])


def test_about_two_errors_hold_the_truth_nineteen_times_of_twenty() -> None:
    rng = np.random.default_rng(0)
    figures = [mean_figure((rng.random(200) < 0.8).astype(float)) for _ in range(400)]
    inside = np.mean([abs(f["value"] - 0.8) <= 1.96 * f["error"] for f in figures])
    assert 0.92 < inside < 0.98


def test_resampled_error_is_that_of_the_mean_and_grows_where_pictures_hold_several() -> None:
    grades = np.random.default_rng(1).random(300)
    alone = resampled_figure(lambda w: float((w * grades).sum() / w.sum()), 300, 300)
    assert alone["value"] == pytest.approx(grades.mean())
    assert alone["error"] == pytest.approx(grades.std() / 300**0.5, rel=0.25)
    picture = np.arange(300) // 10  # ten copies of thirty grades know no more than thirty
    ten = resampled_figure(lambda w: float((w[picture] * grades[picture]).sum() / w[picture].sum()), 30, 300)
    assert ten["error"] > 2 * alone["error"]
    again = resampled_figure(lambda w: float((w * grades).sum() / w.sum()), 300, 300)
    assert again == alone  # the same resamples each time
    assert resampled_figure(lambda w: 1.0, 8, 8)["error"] == pytest.approx(0.1)


def brute_auroc(scores: list[float], positive: list[bool]) -> float:
    pairs = [(a, b) for (a, up), (b, down) in product(zip(scores, positive, strict=True), repeat=2) if up and not down]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    assert auroc([0.9, 0.8, 0.2, 0.1], [True, True, False, False]) == 1.0
    assert auroc([0.1, 0.9], [True, False]) == 0.0
    assert auroc([0.5, 0.5, 0.5], [True, False, True]) == 0.5
    assert auroc([3, 1, 2], [True, True, False]) == 0.5
    rng = np.random.default_rng(2)
    for n in (2, 3, 17, 60):
        scores, positive = rng.integers(0, 7, n).tolist(), (rng.random(n) < 0.4).tolist()
        positive[:2] = [True, False]
        assert auroc(scores, positive) == pytest.approx(brute_auroc(scores, positive))
        weights = rng.integers(1, 4, n)
        often = np.repeat(np.arange(n), weights)
        wanted = brute_auroc([scores[k] for k in often], [positive[k] for k in often])
        assert auroc(scores, positive, weights) == pytest.approx(wanted)
    assert np.isnan(auroc([1.0, 2.0], [True, True]))


def test_average_precision_by_hand() -> None:
    # right, wrong, right of 4 wanted: precision 1 up to recall 1/4, then 2/3 up to 1/2, then 0; 101 recalls
    assert average_precision([0.9, 0.8, 0.7], [True, False, True], 4) == pytest.approx((26 + 25 * 2 / 3) / 101)
    assert average_precision([0.7, 0.8, 0.9], [True, False, True], 4) == pytest.approx((26 + 25 * 2 / 3) / 101)
    assert average_precision([0.7, 0.8, 0.9], [True, True, False], 2) == pytest.approx(2 / 3)  # the surest is wrong
    assert average_precision([0.5, 0.5], [True, True], 2) == 1.0
    assert average_precision([0.5, 0.5], [False, True], 1) == average_precision([0.5, 0.5], [True, False], 1) == 0.5
    assert average_precision([], [], 3) == 0.0 and average_precision([0.4], [False], 3) == 0.0
    assert np.isnan(average_precision([0.5], [False], 0))


def slow_average_precision(confidences: np.ndarray, hits: np.ndarray, wanted: int) -> float:
    points = [
        (hits[confidences >= t].sum() / wanted, hits[confidences >= t].sum() / (confidences >= t).sum())
        for t in confidences
    ]
    return float(np.mean([max((p for r, p in points if r >= k / 100 - 1e-12), default=0.0) for k in range(101)]))


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_average_precision_is_its_definition(n: int) -> None:
    rng = np.random.default_rng(n)
    confidences, hits, weights = rng.integers(0, 20, n) / 20, rng.random(n) < 0.6, rng.integers(1, 4, n)
    wanted = int(hits.sum()) + 3
    assert average_precision(confidences, hits, wanted) == pytest.approx(
        slow_average_precision(confidences, hits, wanted)
    )
    often = np.repeat(np.arange(n), weights)
    assert average_precision(confidences, hits, 3 * wanted, weights) == pytest.approx(
        slow_average_precision(confidences[often], hits[often], 3 * wanted)
    )


def test_matching_takes_the_best_free_truth() -> None:
    overlap = np.array([[0.6, 0.9], [0.2, 0.8], [0.7, 0.1], [0.55, 0.0]])
    assert matched(overlap, 0.5) == [True, False, True, False]  # the second's truth and the fourth's are taken
    assert matched(np.zeros((2, 0)), 0.5) == [False, False] and matched(np.zeros((0, 3)), 0.5) == []
    assert matched(np.array([[0.5]]), 0.5) == [True]


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("no", False),
        ("No, there is none.", False),
        ("There is not one.", False),
        ("Yes", True),
        ("Yes. There is no doubt.", True),  # only the first sentence is read
        ("nothing", True),
        ("", True),
        ("NO", True),
    ],
)
def test_pope_reads_as_its_script(answer: str, yes: bool) -> None:
    assert pope_reading(answer) is yes


def test_pope_scores_by_hand() -> None:
    said, truth = [True] * 3 + [False] * 3, [True, True, False, True, False, False]
    scores = pope_scores(said, truth)
    assert scores == pytest.approx({"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3, "yes": 0.5})
    never = pope_scores([False] * 4, [True, False, True, False])
    assert never == {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "F1": 0.0, "yes": 0.0}
    only_first = pope_scores(said, truth, np.array([1, 0, 0, 0, 0, 1]))
    assert only_first["accuracy"] == only_first["F1"] == 1.0 and only_first["yes"] == 0.5


def test_balanced_accuracy_of_a_constant_is_a_half() -> None:
    truth = np.array([True] * 9 + [False])
    assert balanced_accuracy(np.ones(10), truth) == balanced_accuracy(np.zeros(10), truth) == 0.5
    assert balanced_accuracy(truth.astype(int), truth) == 1.0 and balanced_accuracy(~truth * 1, truth) == 0.0
    assert balanced_accuracy(np.full(10, -1), truth) == 0.0  # neither yes nor no
