"""Accuracy of labels."""

from collections.abc import Sequence

from evaluation.metrics.scores import Scores, check_pairs, check_strings, mean


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """The share of labels that equal their reference, letter by letter.

    How an answer becomes a label is the benchmark's affair.

    Args:
        predictions: one label a sample.
        references: the right one.

    Raises:
        ValueError: other than one reference a prediction, no samples, or a label that is no string.
    """
    check_pairs(predictions, references)
    check_strings("predictions", predictions)
    check_strings("references", references)
    right = tuple(float(own == other) for own, other in zip(predictions, references, strict=True))
    return Scores("accuracy", mean(right), right)
