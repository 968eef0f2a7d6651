"""How far two samples lie apart: every estimator on data whose answer is known."""

import math

import pytest
import torch

from evaluation.two_samples import distance_between_means, l1_discrepancy, median_distance, mmd2, pair_distances


def normal(points: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(points, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- Pairs and means ---------------------------------------------------------------------------------------------------


def test_cosine_and_distance_of_pairs():
    angles = torch.tensor([0.2, 0.6])
    audio = torch.tensor([[1.0, 0.0]]).expand(2, 2)
    text = torch.stack([angles.cos(), angles.sin()], dim=1)
    cosine, distance = pair_distances(audio, text)
    assert cosine == pytest.approx((math.cos(0.2) + math.cos(0.6)) / 2)
    assert distance == pytest.approx(math.sin(0.1) + math.sin(0.3))  # chords: 2 sin(angle / 2) each
    assert pair_distances(audio[:1], text[:1])[1] == pytest.approx(2 * math.sin(0.1))


def test_a_known_shift_is_the_distance_between_means():
    points, shift = normal(12, 40), torch.zeros(40)
    shift[3], shift[7] = 0.3, -0.4
    assert distance_between_means(points, points + shift, paired=True) == pytest.approx(0.5)
    assert distance_between_means(normal(4000, 40, 1), normal(4000, 40, 2) + shift) == pytest.approx(0.5, abs=0.05)


def test_small_samples_of_one_distribution_are_not_taken_apart():
    naive, corrected = [], []
    for seed in range(0, 40, 2):
        a, b = normal(8, 100, seed), normal(8, 100, seed + 1)
        naive.append((a.mean(0) - b.mean(0)).norm().item())
        corrected.append(distance_between_means(a, b) ** 2)
    assert min(naive) > 4
    assert sum(corrected) / len(corrected) < 2  # of squares about 25 by the naive means


@pytest.mark.parametrize("function", [distance_between_means, mmd2, l1_discrepancy, median_distance])
def test_unusable_samples_are_refused(function):
    with pytest.raises(ValueError, match=r"shapes \(3, 4\) and \(3, 5\)"):
        function(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(ValueError, match="1 and 3 points, expected at least 2"):
        function(torch.ones(1, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="NaN or infinite"):
        function(torch.full((3, 4), torch.inf), torch.ones(3, 4))


def test_pairs_must_be_as_many_on_both_sides():
    for function in (distance_between_means, mmd2):
        with pytest.raises(ValueError, match="expected the same"):
            function(torch.ones(3, 4), torch.ones(5, 4), paired=True)
    with pytest.raises(ValueError, match="expected the same"):
        pair_distances(torch.ones(3, 4), torch.ones(5, 4))


# -- MMD ---------------------------------------------------------------------------------------------------------------


def test_median_distance_leaves_repeats_out():
    points = torch.tensor([[0.0], [0.0], [1.0], [3.0]])
    # Different points lie 1, 3, 1, 3 and 2 apart.
    assert median_distance(points[:2], points[2:]) == 2
    with pytest.raises(ValueError, match="All points are the same"):
        median_distance(torch.ones(2, 3), torch.ones(2, 3))


def test_mmd_by_hand():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])

    def kernel(distance):
        return math.exp(-(distance**2) / (2 * 1.5**2))

    cross = (kernel(1) + kernel(5) + kernel(1) + kernel(3)) / 4
    assert mmd2(a, b, bandwidth=1.5) == pytest.approx(kernel(2) + kernel(4) - 2 * cross)
    others = (kernel(5) + kernel(1)) / 2  # without row i of one against row i of the other
    assert mmd2(a, b, bandwidth=1.5, paired=True) == pytest.approx(kernel(2) + kernel(4) - 2 * others)


def test_mmd_of_one_distribution_is_0_on_average_and_grows_with_the_shift():
    equal = [mmd2(normal(30, 20, seed), normal(30, 20, seed + 1)) for seed in range(0, 40, 2)]
    assert abs(sum(equal) / len(equal)) < 3e-3
    assert min(equal) < 0 < max(equal)
    a, b = normal(100, 20, 1), normal(100, 20, 2)
    values = [mmd2(a, b + shift, bandwidth=6.0) for shift in (0.0, 0.3, 1.0, 9.0)]
    assert values == sorted(values) and values[-1] > 1
    assert mmd2(a * 1e-3, b * 1e-3 + 9, bandwidth=1.0) == pytest.approx(2, abs=1e-3)


# -- L1 ----------------------------------------------------------------------------------------------------------------


def test_equal_distributions_have_no_discrepancy():
    for seed in (0, 2, 4):
        found = l1_discrepancy(normal(200, 50, seed), normal(200, 50, seed + 1))
        assert found.l1 < 3 * found.error
        assert 0.4 < found.balanced_accuracy < 0.6


def test_separated_distributions_have_the_largest():
    found = l1_discrepancy(normal(20, 50), normal(14, 50, 1) + 3)
    assert (found.l1, found.balanced_accuracy) == (2, 1)
    assert found.error > 0  # twenty points are no certainty


def test_a_known_discrepancy_is_met_from_below():
    # N(0, 1) and N(shift, 1) in one of three dimensions: |p - q|_1 = 2 (2 Phi(shift / 2) - 1) = 2 erf(shift / sqrt 8).
    for shift in (0.8, 2.0):
        truth = 2 * math.erf(shift / 8**0.5)
        moved = normal(800, 3, 1) + torch.tensor([shift, 0, 0])
        found = l1_discrepancy(normal(800, 3), moved)
        assert found.l1 == pytest.approx(truth, abs=3 * found.error)
        assert found.error < 0.1
    # The error shrinks with the root of the number of points.
    fewer = l1_discrepancy(normal(50, 3), moved[:50])
    assert fewer.error == pytest.approx(4 * found.error, rel=0.35)


def test_a_difference_in_spread_alone_is_seen():
    # Equal means: no straight line tells these apart, and training noise is such a difference.
    found = l1_discrepancy(normal(100, 50), 2 * normal(100, 50, 1))
    assert found.l1 > 1.8


def test_unequal_sizes_do_not_count():
    found = l1_discrepancy(normal(300, 20), normal(30, 20, 1))
    assert found.l1 < 0.7  # always guessing the larger side is right on 300 of 330


def test_repeats_of_one_text_do_not_leak_between_folds():
    a, b = (normal(10, 50, seed).repeat_interleave(20, dim=0) for seed in (0, 1))
    assert l1_discrepancy(a, b).l1 == 2  # remembered
    names = [f"text {row // 20}" for row in range(200)]
    grouped = l1_discrepancy(a, b, names, names)
    assert grouped.l1 < 1
    assert grouped.error > 0.3  # ten points of each, not two hundred
    with pytest.raises(ValueError, match="200 and 1 groups"):
        l1_discrepancy(a, b, b_groups=["one"] * 200)
