"""How far two samples of points lie apart: by pairs, by their means, by a kernel, and by the theorem's L1 distance.

Nothing here knows what the points are; `evaluation.gap` compares CLAP's audio embeddings with its text embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import GroupKFold
from sklearn.svm import SVC

FOLDS = 5
# Weak enough to separate a handful of points; the kernel's width does the smoothing.
SVM_COST = 10.0


@dataclass(frozen=True)
class Discrepancy:
    """An estimate from below of the L1 distance between two densities; see [`l1_discrepancy`].

    Attributes:
        l1 (`float`): in [0, 2].
        error (`float`): its standard error.
        balanced_accuracy (`float`): of the classifier on points that it had not seen.
    """

    l1: float
    error: float
    balanced_accuracy: float


def pair_distances(audio: torch.Tensor, text: torch.Tensor) -> tuple[float, float]:
    """Mean cosine and mean Euclidean distance of `(pairs, dim)` embeddings that belong together row by row."""
    audio, text = _checked(audio, text, paired=True, least=1)
    return F.cosine_similarity(audio, text).mean().item(), (audio - text).norm(dim=-1).mean().item()


def distance_between_means(a: torch.Tensor, b: torch.Tensor, paired: bool = False) -> float:
    """Euclidean distance between the means of two distributions, from samples `(n, dim)` and `(m, dim)`.

    The means of two small samples lie apart even where the distributions are one. So this is the root of the unbiased
    estimate of the squared distance, which leaves products of a point with itself out, and 0 where that is negative.

    Args:
        paired (`bool`): row i of both belongs together; products of the two are left out as well.
    """
    a, b = _checked(a, b, paired)
    return max(0.0, _u_statistic(a @ a.T, b @ b.T, a @ b.T, paired)) ** 0.5


def median_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The median heuristic for a Gaussian kernel's width: the median distance between different points of both samples.

    Raises:
        ValueError: all points are the same.
    """
    distances = torch.pdist(torch.cat(_checked(a, b)))
    distances = distances[distances > 0]
    if not len(distances):
        raise ValueError("All points are the same; there is no distance to set a kernel's width by.")
    return distances.median().item()


def mmd2(a: torch.Tensor, b: torch.Tensor, bandwidth: float | None = None, paired: bool = False) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al., 2012, Lemma 6) of `(n, dim)` and `(m, dim)`.

    The kernel is Gaussian, `exp(-d^2 / (2 bandwidth^2))`. Of equal distributions it is 0 on average, so that it can
    come out a little below; the largest value is 2. It does not saturate where the L1 distance has long reached 2, but
    depends on the bandwidth: compare only values of one bandwidth.

    Args:
        bandwidth (`float`, *optional*): by default `median_distance(a, b)`.
        paired (`bool`): as for [`distance_between_means`].
    """
    a, b = _checked(a, b, paired)
    width = median_distance(a, b) if bandwidth is None else bandwidth

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.exp(-torch.cdist(x, y).square() / (2 * width**2))

    return _u_statistic(kernel(a, a), kernel(b, b), kernel(a, b), paired)


def l1_discrepancy(
    a: torch.Tensor,
    b: torch.Tensor,
    a_groups: Sequence | None = None,
    b_groups: Sequence | None = None,
    bandwidth: float | None = None,
) -> Discrepancy:
    """The theorem's L1 distance between the densities of two samples `(n, dim)` and `(m, dim)`, from below.

    Histograms are of no use in hundreds of dimensions. But of two densities p and q the best possible classifier has
    the balanced accuracy A with `|p - q|_1 = 2 (2 A - 1)`, and every other a smaller one. So a support vector machine
    with a Gaussian kernel, which sees differences in place and in spread, is trained and asked in cross-validation, and
    its balanced accuracy stands for A.

    What to make of it:
        It is a lower bound on average, and the looser the fewer points there are: six points of each kind rarely show a
        small difference. Where the distributions are one, it is 0 but for chance; single folds then lean below 1/2, and
        what comes out negative is told as 0.
        In high dimensions almost any two distributions are nearly disjoint, so true values crowd at 2. See
        [`distance_between_means`] and [`mmd2`] for how much of the way has been gone.
        The largest of many such estimates leans upwards, as any maximum of noisy numbers does.

    Args:
        a_groups, b_groups (sequences of length `n` and `m`, *optional*):
            Rows of one group, such as repeats of one text, stay in one fold. By default each row is its own. Groups
            that only the data's maker knows, such as cuts from one recording, are told apart by nobody.
        bandwidth (`float`, *optional*): of the kernel; by default `median_distance(a, b)`.

    Raises:
        ValueError: a side has fewer than two groups.
    """
    a, b = _checked(a, b)
    samples = (a.numpy(), b.numpy())
    groups = [
        np.unique(np.arange(len(sample)) if own is None else np.asarray(own), return_inverse=True)[1]
        for sample, own in zip(samples, (a_groups, b_groups), strict=True)
    ]
    counts = [len(np.unique(own)) for own in groups]
    if min(counts) < 2:
        raise ValueError(f"The samples have {counts[0]} and {counts[1]} groups, expected at least 2 of each.")
    width = median_distance(a, b) if bandwidth is None else bandwidth
    folds = min(FOLDS, *counts)
    assigned = [_folds(own, folds) for own in groups]
    right: list[list[np.ndarray]] = [[], []]
    for fold in range(folds):
        seen = [sample[own != fold] for sample, own in zip(samples, assigned, strict=True)]
        machine = SVC(C=SVM_COST, gamma=1 / (2 * width**2), class_weight="balanced")
        machine.fit(np.concatenate(seen), np.repeat([0, 1], [len(rows) for rows in seen]))
        for side in (0, 1):
            right[side].append(machine.predict(samples[side][assigned[side] == fold]) == side)
    hits = [np.concatenate(own) for own in right]
    accuracy = float(np.mean([own.mean() for own in hits]))
    # One success and one failure more: a handful of points told apart without a mistake is no certainty. Repeats of one
    # point are no evidence of their own, so groups are counted.
    shares = [(own.mean() * count + 1) / (count + 2) for own, count in zip(hits, counts, strict=True)]
    variance = sum(share * (1 - share) / (count + 2) for share, count in zip(shares, counts, strict=True)) / 4
    return Discrepancy(max(0.0, 2 * (2 * accuracy - 1)), 4 * float(variance) ** 0.5, accuracy)


def _checked(
    a: torch.Tensor, b: torch.Tensor, paired: bool = False, least: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float64, or a `ValueError`."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or (paired and len(a) != len(b)):
        points = "the same (pairs, dim)" if paired else "(points, dim)"
        raise ValueError(f"The samples have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected {points}.")
    if min(len(a), len(b)) < least:
        raise ValueError(f"The samples have {len(a)} and {len(b)} points, expected at least {least} of each.")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("The samples hold NaN or infinite values.")
    return a.double(), b.double()


def _u_statistic(aa: torch.Tensor, bb: torch.Tensor, ab: torch.Tensor, paired: bool) -> float:
    """E k(a, a') + E k(b, b') - 2 E k(a, b), over different points."""

    def off_diagonal_mean(kernel: torch.Tensor) -> torch.Tensor:
        size = len(kernel)
        return (kernel.sum() - kernel.trace()) / (size * (size - 1))

    cross = off_diagonal_mean(ab) if paired else ab.mean()
    return (off_diagonal_mean(aa) + off_diagonal_mean(bb) - 2 * cross).item()


def _folds(groups: np.ndarray, folds: int) -> np.ndarray:
    """The fold of each row, by its group."""
    assigned = np.empty(len(groups), dtype=int)
    for fold, (_, rows) in enumerate(GroupKFold(folds).split(groups, groups=groups)):
        assigned[rows] = fold
    return assigned


__all__ = [
    "FOLDS",
    "SVM_COST",
    "Discrepancy",
    "distance_between_means",
    "l1_discrepancy",
    "median_distance",
    "mmd2",
    "pair_distances",
]
