import pytest

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import AveragePooler, Pooler, Stage, check_grid
from tests.tiny import token_set


def test_the_stage_is_checked():
    assert AveragePooler(1, stage="after_projector").stage is Stage.AFTER_PROJECTOR
    with pytest.raises(UserError, match="pooler.stage is 'after_projektor'; .* did you mean 'after_projector'"):
        AveragePooler(1, stage="after_projektor")


@pytest.mark.parametrize(("rows", "columns"), [(0, 1), (4, 1), (1, 0), (1, 6), (-1, 1)])
def test_a_grid_the_encoder_cannot_fill_is_refused(rows, columns):
    with pytest.raises(UserError, match=rf"P asks for a grid of {rows}x{columns} .* 3x5; pooler.rows must be 1 to 3"):
        check_grid("P", rows, columns, (3, 5))


def test_bounds_are_allowed():
    check_grid("P", 1, 1, (3, 5))
    check_grid("P", 3, 5, (3, 5))


def test_a_pooler_of_your_own_must_say_what_it_does():
    class Mine(Pooler):
        pass

    with pytest.raises(NotImplementedError, match="Mine must say tokens_per_frame"):
        Mine().tokens_per_frame((2, 2))
    with pytest.raises(NotImplementedError, match="Mine must define forward"):
        Mine()(token_set())
