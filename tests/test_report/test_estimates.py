import math

import pytest

from lightning_crosslmm.report.estimates import Estimate, estimate, paired_difference, t_quantile


@pytest.mark.parametrize(
    ("degrees", "printed"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)],
)
def test_quantiles_are_those_of_printed_tables(degrees: int, printed: float) -> None:
    assert t_quantile(degrees) == pytest.approx(printed, abs=5e-4)


def test_quantiles_of_one_and_two_degrees_have_closed_forms() -> None:
    assert t_quantile(1) == pytest.approx(math.tan(0.95 * math.pi / 2), rel=1e-12)
    assert t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)


def test_an_interval_by_hand() -> None:
    found = estimate([0.4, 0.5, 0.6])  # s = 0.1, t = 4.3027
    assert found == Estimate(pytest.approx(0.5), pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5), 3)
    assert (found.low, found.high) == (found.mean - found.half_width, found.mean + found.half_width)


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert estimate([0.7]) == Estimate(0.7, None, 1)
    assert estimate([0.7]).low is None and estimate([0.7]).high is None
    assert estimate([]) is None


def test_differences_are_paired_over_shared_seeds() -> None:
    # seeds differ by far more than the arms do, which the pairs do not show
    found = paired_difference({0: 0.20, 1: 0.52, 2: 0.91, 7: 0.0}, {0: 0.10, 1: 0.40, 2: 0.83, 9: 1.0})
    assert found == Estimate(pytest.approx(0.1), pytest.approx(4.30265 * 0.02 / math.sqrt(3), rel=1e-5), 3)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
