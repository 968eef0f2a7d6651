"""Accuracy, yes or no, and mean average precision."""

import math
import random

import numpy as np
import pytest

from evaluation.metrics.accuracy import accuracy
from evaluation.metrics.binary_accuracy import RULE, binary_accuracy, yes_or_no
from evaluation.metrics.mean_average_precision import mean_average_precision


def test_accuracy_is_the_share_of_equal_labels():
    scores = accuracy(["dog", "cat", "Dog", "dog bark", ""], ["dog", "dog", "dog", "dog", ""])
    assert scores.as_dict() == {"accuracy": 0.4, "sentences": [1.0, 0.0, 0.0, 0.0, 1.0]}


def test_accuracy_of_one():
    assert accuracy(["dog"], ["dog"]).score == 1.0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("yes", "yes"),
        ("No", "no"),
        (" YES!", "yes"),
        ("no.", "no"),
        ("Yes, there is no dog.", "yes"),
        ("No, yes is wrong.", "no"),
        ("There is no dog.", "no"),
        ("The answer is yes.", "yes"),
        ("I cannot say yes or no.", None),
        ("Nothing", None),
        ("yesterday", None),
        ("not", None),
        ("y", None),
        ("", None),
        ("...", None),
    ],
)
def test_what_an_answer_says(answer, said):
    assert yes_or_no(answer) == said


def test_binary_accuracy_counts_the_undecided_as_wrong():
    scores = binary_accuracy(["Yes.", "no", "maybe", "yes and no", "No"], ["yes", "yes", "yes", "no", "no"])
    # "yes and no" begins with yes.
    assert scores.sentences == (1.0, 0.0, 0.0, 0.0, 1.0)
    assert scores.score == 0.4
    assert scores.details == {"rule": RULE, "undecided": 1}


@pytest.mark.parametrize("reference", ["Yes", "maybe", "", "true"])
def test_binary_accuracy_knows_two_references(reference):
    with pytest.raises(ValueError, match=rf"references\[1\] is '{reference}', expected 'yes' or 'no'"):
        binary_accuracy(["yes", "no"], ["yes", reference])


@pytest.mark.parametrize("metric", [accuracy, binary_accuracy])
@pytest.mark.parametrize(
    ("predictions", "references", "complaint"),
    [
        ([], [], "Got no predictions"),
        (["yes"], [], "Got 1 predictions but 0 references"),
        ("yes", ["yes"], "predictions is the one string 'yes'"),
        (["yes", 1], ["yes", "no"], r"predictions\[1\] is 1 \(int\), expected a string"),
        (["yes"], [None], r"references\[0\] is None \(NoneType\), expected a string"),
    ],
)
def test_labels_that_cannot_be_scored_are_refused(metric, predictions, references, complaint):
    with pytest.raises(ValueError, match=complaint):
        metric(predictions, references)


def test_average_precision_by_hand():
    # The first class is found at ranks 1 and 3: (1/1 + 2/3) / 2. The second at rank 2 of the order 0, 2, 1: 1/2.
    scores = mean_average_precision([[0.9, 0.8], [0.8, 0.1], [0.7, 0.3]], [[1, 0], [0, 0], [1, 1]])
    assert scores.details["classes"] == pytest.approx([5 / 6, 1 / 2], abs=1e-12)
    assert scores.score == pytest.approx(2 / 3, abs=1e-12)
    assert scores.sentences == ()


def average_precision(scores, truth):
    """From the definition: the precision at the rank of each sample of the class, samples of equal score at once."""
    found = []
    for score, is_of_class in zip(scores, truth, strict=True):
        if is_of_class:
            at_once = [other_truth for other, other_truth in zip(scores, truth, strict=True) if other >= score]
            found.append(sum(at_once) / len(at_once))
    return sum(found) / len(found)


def test_mean_average_precision_from_the_definition():
    rng = random.Random(0)
    truth = [[int(rng.random() < 0.3) for _ in range(6)] for _ in range(40)]
    scores = [[rng.choice([0.0, 0.25, 0.5]) + label * rng.random() for label in row] for row in truth]
    expected = [average_precision([row[place] for row in scores], [row[place] for row in truth]) for place in range(6)]
    found = mean_average_precision(scores, truth)
    assert found.details["classes"] == pytest.approx(expected, abs=1e-12)
    assert found.score == pytest.approx(sum(expected) / 6, abs=1e-12)


def test_equal_scores_do_not_depend_on_the_order_of_samples():
    truth = [[1], [0], [1], [0]]
    for order in ([0, 1, 2, 3], [1, 3, 0, 2]):
        found = mean_average_precision([[0.5]] * 4, [truth[place] for place in order])
        assert found.score == pytest.approx(0.5)


def test_a_class_of_no_sample_is_named_and_not_counted():
    scores = mean_average_precision([[0.9, 0.5, 0.1], [0.1, 0.6, 0.2]], [[1, 0, 0], [0, 0, 1]])
    assert scores.details == {"classes": [1.0, None, 1.0], "classes_without_samples": [1]}
    assert scores.score == 1.0


def test_arrays_are_taken_as_well():
    assert mean_average_precision(np.eye(3), np.eye(3, dtype=bool)).score == 1.0


@pytest.mark.parametrize(
    ("predictions", "references", "complaint"),
    [
        ([], [], "Got no predictions"),
        ([[0.1]], [[1], [0]], "Got 1 predictions but 2 references"),
        ([[0.1, 0.2], [0.3]], [[1, 0], [0, 1]], "rows of predictions have 1 to 2 entries"),
        ([[0.1, 0.2]], [[1]], r"predictions are \(samples, classes\) = \(1, 2\) but references are \(1, 1\)"),
        ([[0.1, math.nan]], [[1, 0]], r"predictions\[0\]\[1\] is nan, expected a finite number"),
        ([[0.1, 0.2]], [[1, 2]], r"references\[0\]\[1\] is 2.0, expected 0 or 1"),
        ([[0.1, 0.2]], [[0, 0]], "No sample has any class"),
    ],
)
def test_scores_of_classes_that_cannot_be_scored_are_refused(predictions, references, complaint):
    with pytest.raises(ValueError, match=complaint):
        mean_average_precision(predictions, references)
