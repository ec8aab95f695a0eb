import io
from pathlib import Path

import matplotlib.image
import pytest

from lightning_crosslmm.report.arms import Arm, group_runs
from lightning_crosslmm.report.figures import draw_learning, draw_pareto, mean_curve, pareto_front, spread
from lightning_crosslmm.report.measures import FLOPS, TIME
from lightning_crosslmm.report.runs import read_runs
from tests.sweeps import cost_of, named, write_run


def sweep(folder: Path, count: int = 3) -> list[Arm]:
    for number in range(count):
        for seed in (0, 1):
            pooler, value = f"p{number:02}", 0.3 + 0.02 * number + 0.01 * seed
            write_run(
                folder / named(pooler, "v2v", seed),
                pooler=pooler,
                fusion="v2v",
                seed=seed,
                metrics={"val/accuracy": value},
                curve=[(10, value / 2), (20, value)],
                cost=cost_of(9, 1e6 * (1 + number % 3)),
            )
    return group_runs(read_runs(folder))[0]


def test_the_front_is_those_that_none_beats() -> None:
    points = [(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9), (1, 0.3), (5, 0.95)]
    assert pareto_front(points) == [(1, 0.5), (2, 0.7), (3, 0.9), (5, 0.95)]


@pytest.mark.parametrize(
    ("places", "moved"),
    [
        ([0.0, 20.0], [0.0, 20.0]),
        ([0.0, 2.0], [-4.0, 6.0]),
        ([0.0, 0.0, 0.0], [-10.0, 0.0, 10.0]),
        ([0.0, 9.0, 10.0, 50.0], [-11 / 3, 19 / 3, 49 / 3, 50.0]),
    ],
)
def test_labels_move_apart_as_little_as_it_takes(places: list[float], moved: list[float]) -> None:
    assert spread(places, 10.0) == pytest.approx(moved)


def test_pictures_are_drawn_and_always_the_same(tmp_path: Path) -> None:
    arms = sweep(tmp_path)
    for draw in (lambda: draw_pareto(arms, "val/accuracy", FLOPS), lambda: draw_learning(arms, "val/accuracy")):
        png = draw()
        assert matplotlib.image.imread(io.BytesIO(png))[..., :3].std() > 0.05 and draw() == png


def test_many_arms_get_room(tmp_path: Path) -> None:
    arms = sweep(tmp_path, 30)
    few, many = (
        matplotlib.image.imread(io.BytesIO(draw_learning(some, "val/accuracy"))) for some in (arms[:2], arms[:9])
    )
    assert many.shape[0] > 2 * few.shape[0]
    few, many = (
        matplotlib.image.imread(io.BytesIO(draw_pareto(some, "val/accuracy", FLOPS))) for some in (arms[:4], arms)
    )
    assert many.shape[1] > few.shape[1] + 100  # a second column of names


def test_places_without_an_arm_stay_empty(tmp_path: Path) -> None:
    drawn = matplotlib.image.imread(io.BytesIO(draw_learning(sweep(tmp_path, 5), "val/accuracy")))[..., :3]
    height, width = drawn.shape[:2]
    lower = drawn[int(0.65 * height) : int(0.85 * height)]  # of four panels a row, the fifth is alone there
    assert (lower[:, : int(0.3 * width)] < 1).any() and (lower[:, int(0.32 * width) :] == 1).all()


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    arms = sweep(tmp_path)
    assert draw_pareto(arms, "val/accuracy", TIME) is None and draw_pareto(arms[:1], "val/accuracy", FLOPS) is None
    assert draw_learning(arms, "test/accuracy") is None


def test_a_curve_is_the_mean_over_seeds(tmp_path: Path) -> None:
    arm = sweep(tmp_path)[0]
    expected = [(10, 0.1525, 0.15, 0.155), (20, 0.305, 0.3, 0.31)]
    assert mean_curve(arm, "val/accuracy") == [pytest.approx(point) for point in expected]
