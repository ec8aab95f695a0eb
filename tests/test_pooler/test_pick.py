from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import RandomPooler, StridedPooler, UniformPooler
from tests.tiny import token_set


def rows_of(tokens, kept):
    return tokens.features_SD[torch.tensor(kept)]


@pytest.mark.parametrize(("grid", "stride", "offset"), [((5, 4), 2, 0), ((5, 4), 2, 1), ((6, 7), 3, 1), ((3, 3), 3, 2)])
def test_strided_is_what_a_loop_over_rows_and_columns_keeps(grid, stride, offset):
    tokens = token_set((2, 1), grid)
    kept = [
        frame * grid[0] * grid[1] + row * grid[1] + column
        for frame in range(3)
        for row in range(grid[0])
        for column in range(grid[1])
        if row % stride == offset and column % stride == offset
    ]
    pooler = StridedPooler(stride, offset)
    pooled = pooler(tokens)
    assert torch.equal(pooled.features_SD, rows_of(tokens, kept))
    assert torch.equal(pooled.coordinate_S3, tokens.coordinate_S3[kept])
    assert pooled.num_tokens == 3 * pooler.tokens_per_frame(grid) and pooled.as_grid().shape[0] == 3
    assert (pooled.source_map.pooled_of_source_S >= 0).nonzero().flatten().tolist() == kept


def test_the_middle_of_three_is_interpolation_without_antialias():
    tokens = token_set((1,), (27, 27))
    picked = tokens.as_grid()[:, [4, 13, 22]][:, :, [4, 13, 22]]
    assert torch.equal(StridedPooler(9, 4)(tokens).as_grid(), picked)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 12])
def test_uniform_stands_in_the_middle_of_equal_stretches(count):
    tokens = token_set((2, 1), (3, 4))
    kept = [12 * frame + int((number + 0.5) * 12 / count) for frame in range(3) for number in range(count)]
    assert torch.equal(UniformPooler(count)(tokens).features_SD, rows_of(tokens, kept))


@pytest.mark.parametrize("make", [UniformPooler, RandomPooler])
def test_frames_with_fewer_tokens_keep_them_all(make):
    tokens = token_set((2, 1), (3, 4))
    ragged = replace(tokens, frame_offsets=torch.tensor([0, 2, 33, 36]), grid=None)
    pooled = make(4).eval()(ragged)
    pooled.validate()
    assert pooled.frame_offsets.tolist() == [0, 2, 6, 9]
    assert torch.equal(pooled.features_SD[:2], tokens.features_SD[:2])
    assert torch.equal(pooled.features_SD[6:], tokens.features_SD[33:])


def kept_by(pooler, frames=(2, 2)):
    table_S = pooler(token_set(frames, (3, 4))).source_map.pooled_of_source_S
    return (table_S >= 0).nonzero().flatten().view(sum(frames), -1) - 12 * torch.arange(sum(frames))[:, None]


def test_random_keeps_the_same_in_evaluation_whatever_the_visual():
    pooler = RandomPooler(5).eval()
    kept_FK = kept_by(pooler)
    assert torch.equal(kept_FK, kept_by(pooler))
    assert torch.equal(kept_FK[:2], kept_FK[2:]) and not torch.equal(kept_FK[0], kept_FK[1])
    assert not torch.equal(kept_FK, kept_by(RandomPooler(5, seed=1).eval()))


def test_random_draws_anew_in_training_and_every_place_is_as_likely():
    pooler = RandomPooler(3).train()
    counts_N = torch.zeros(12)
    for _ in range(250):
        counts_N += torch.bincount(kept_by(pooler).flatten(), minlength=12)
    # 1000 draws of 3 out of 12: 250 each, standard deviation 13.7; the seed is fixed
    assert (counts_N - 250).abs().max() < 55


def test_a_resumed_run_draws_what_the_uninterrupted_one_would_have():
    whole, resumed = RandomPooler(5).train(), RandomPooler(5).train()
    drawn = [kept_by(whole) for _ in range(2)]
    assert not torch.equal(*drawn)
    state = whole.state_dict()
    whole.eval()
    kept_by(whole)  # validation in between moves nothing on
    resumed.load_state_dict(state)
    assert torch.equal(kept_by(resumed), kept_by(whole.train()))


def test_random_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    kept_by(RandomPooler(5).train())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("make", [UniformPooler, RandomPooler])
@pytest.mark.parametrize("count", [0, 13, -1])
def test_budgets_out_of_range_are_refused(make, count):
    with pytest.raises(UserError, match=rf"{make.__name__}: pooler.num_tokens is {count}, .* 3x4 .* must be 1 to 12"):
        make(count).tokens_per_frame((3, 4))


@pytest.mark.parametrize(
    ("stride", "offset", "message"),
    [
        (0, 0, "pooler.stride is 0, .* must be 1 to 3"),
        (4, 0, "pooler.stride is 4"),
        (2, 2, "pooler.offset is 2; .* to 1"),
    ],
)
def test_strides_out_of_range_are_refused(stride, offset, message):
    with pytest.raises(UserError, match=message):
        StridedPooler(stride, offset).tokens_per_frame((3, 4))


def test_strides_need_a_grid():
    with pytest.raises(UserError, match="StridedPooler needs a regular grid"):
        StridedPooler(2)(UniformPooler(3)(token_set()))
