"""Mean average precision over classes, FSD50K's metric."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import average_precision_score

from evaluation.metrics.scores import Scores, check_pairs, mean


def mean_average_precision(predictions: Sequence[Sequence[float]], references: Sequence[Sequence[int]]) -> Scores:
    """The mean over the classes of the area under precision and recall, each class alike (macro).

    A class that no sample has knows no precision. It is left out of the mean and named in the details.

    Args:
        predictions: a score for each class, the higher the surer, `(samples, classes)`. Samples of equal score come at
            once, so the order of samples does not matter.
        references: 1 where a sample has the class, else 0, `(samples, classes)`.

    Returns:
        No sentences. `details`: `classes`, the average precision of each class, `None` of one that no sample has, and
        `classes_without_samples`, their places.

    Raises:
        ValueError: two shapes, no samples, a score that is no number, a reference other than 0 and 1, or no class that
            any sample has.
    """
    check_pairs(predictions, references)
    scores, truth = _matrix("predictions", predictions), _matrix("references", references)
    if scores.shape != truth.shape:
        raise ValueError(
            f"predictions are (samples, classes) = {scores.shape} but references are {truth.shape}; they must match."
        )
    if not np.isfinite(scores).all():
        sample, place = np.argwhere(~np.isfinite(scores))[0].tolist()
        raise ValueError(f"predictions[{sample}][{place}] is {scores[sample, place]}, expected a finite number.")
    if not np.isin(truth, (0, 1)).all():
        sample, place = np.argwhere(~np.isin(truth, (0, 1)))[0].tolist()
        raise ValueError(f"references[{sample}][{place}] is {truth[sample, place]}, expected 0 or 1.")
    classes = [
        float(average_precision_score(truth[:, place], scores[:, place])) if truth[:, place].any() else None
        for place in range(truth.shape[1])
    ]
    known = [value for value in classes if value is not None]
    if not known:
        raise ValueError("No sample has any class; there is nothing to score.")
    empty = [place for place, value in enumerate(classes) if value is None]
    return Scores("mean_average_precision", mean(known), (), {"classes": classes, "classes_without_samples": empty})


def _matrix(name: str, rows: Sequence[Sequence[float]]) -> np.ndarray:
    widths = {len(row) for row in rows}
    if len(widths) != 1:
        raise ValueError(
            f"The rows of {name} have {min(widths)} to {max(widths)} entries, expected one for each class."
        )
    return np.asarray(rows, dtype=np.float64)
