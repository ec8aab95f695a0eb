from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, interpolate

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import AveragePooler, BilinearPooler, MaxPooler
from lightning_crosslmm.tokens import Partition, Weighted
from tests.tiny import token_set

# one patch of fp32 noise summed in another order; 729 patches per cell at most
CLOSE = {"rtol": 0, "atol": 2e-6}


def as_pictures(tokens):
    return tokens.as_grid().permute(0, 3, 1, 2)


def averaged(pictures_FDHW, rows, columns):
    return adaptive_avg_pool2d(pictures_FDHW, (rows, columns))


def interpolated(pictures_FDHW, rows, columns, antialias=False):
    return interpolate(pictures_FDHW, size=(rows, columns), mode="bilinear", align_corners=False, antialias=antialias)


def smooth(pictures_FDHW, rows, columns):
    return interpolated(pictures_FDHW, rows, columns, antialias=True)


ARMS = {
    "average": (AveragePooler, averaged),
    "bilinear": (BilinearPooler, interpolated),
    "antialias": (lambda rows, columns=None: BilinearPooler(rows, columns, antialias=True), smooth),
}
arms = pytest.mark.parametrize("arm", list(ARMS))
shapes = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda grid: st.tuples(st.just(grid), st.integers(1, grid[0]), st.integers(1, grid[1]))
)


@arms
@given(shape=shapes)
@settings(max_examples=40)
def test_pooling_is_what_torch_does_to_pictures(arm, shape):
    grid, rows, columns = shape
    make, expected = ARMS[arm]
    tokens = token_set(frames_of_visual=(2, 1), grid=grid)
    pooled = make(rows, columns)(tokens)
    pooled.validate()
    assert pooled.grid == (rows, columns) and pooled.num_tokens == 3 * rows * columns
    torch.testing.assert_close(as_pictures(pooled), expected(as_pictures(tokens), rows, columns), **CLOSE)


@arms
@given(shape=shapes)
@settings(max_examples=40)
def test_the_source_map_pools_the_features_too(arm, shape):
    grid, rows, columns = shape
    tokens = token_set(frames_of_visual=(1, 2), grid=grid)
    pooled = ARMS[arm][0](rows, columns)(tokens)
    weights = pooled.source_map.weighted()
    torch.testing.assert_close(weights.apply(tokens.features_SD), pooled.features_SD, **CLOSE)
    ones_S1 = torch.ones(tokens.num_tokens, 1)
    torch.testing.assert_close(weights.apply(ones_S1), torch.ones(pooled.num_tokens, 1), **CLOSE)


@arms
@given(shape=shapes)
@settings(max_examples=20)
def test_mass_is_kept(arm, shape):
    grid, rows, columns = shape
    tokens = token_set(frames_of_visual=(2,), grid=grid)
    mass_S = ARMS[arm][0](rows, columns)(tokens).mass_S
    torch.testing.assert_close(mass_S.sum(), tokens.mass_S.sum(), rtol=1e-6, atol=0)


@arms
def test_a_budget_of_every_patch_changes_nothing(arm):
    tokens = token_set(grid=(3, 4))
    pooled = ARMS[arm][0](3, 4)(tokens)
    assert torch.equal(pooled.features_SD, tokens.features_SD)
    assert torch.equal(pooled.coordinate_S3, tokens.coordinate_S3)
    assert pooled.source_map.pooled_of_source_S.tolist() == list(range(36))


@arms
def test_reordering_frames_reorders_the_result(arm):
    tokens = token_set(frames_of_visual=(4,), grid=(3, 4))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = tokens.with_features(tokens.as_grid()[order].flatten(0, 2))
    pooler = ARMS[arm][0](2, 3)
    assert torch.equal(pooler(shuffled).as_grid(), pooler(tokens).as_grid()[order])


@arms
def test_gradients_are_those_of_torch(arm):
    make, expected = ARMS[arm]
    tokens = token_set(grid=(5, 4))
    features_SD = tokens.features_SD.clone().requires_grad_()
    push_SD = torch.randn(3 * 6, 5)
    make(2, 3)(tokens.with_features(features_SD)).features_SD.backward(push_SD)
    pictures_FDHW = as_pictures(tokens).clone().requires_grad_()
    expected(pictures_FDHW, 2, 3).permute(0, 2, 3, 1).reshape(-1, 5).backward(push_SD)
    torch.testing.assert_close(features_SD.grad, pictures_FDHW.grad.permute(0, 2, 3, 1).reshape(-1, 5), **CLOSE)


def test_interpolating_27_to_3_copies_three_patches_per_axis_and_averages_nothing():
    tokens = token_set(frames_of_visual=(1,), grid=(27, 27))
    pooled = BilinearPooler(3)(tokens)
    picked = tokens.as_grid()[:, [4, 13, 22]][:, :, [4, 13, 22]]
    assert torch.equal(pooled.as_grid(), picked)
    assert sorted(pooled.source_map.source_E.tolist()) == [27 * y + x for y in (4, 13, 22) for x in (4, 13, 22)]
    every = BilinearPooler(3, antialias=True)(tokens).source_map.source_E
    assert len(every.unique()) == 729


def test_windows_that_tile_are_a_partition_and_others_share_patches():
    tiled = AveragePooler(2)(token_set(frames_of_visual=(2,), grid=(4, 4))).source_map
    assert isinstance(tiled, Partition)
    assert tiled.pooled_of_source_S[:16].tolist() == [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2
    shared = AveragePooler(2)(token_set(frames_of_visual=(1,), grid=(5, 5))).source_map
    assert isinstance(shared, Weighted)
    assert (shared.source_E == 12).sum() == 4  # the middle patch belongs to every window


def test_poolers_chain_back_to_the_patches():
    tokens = token_set(frames_of_visual=(1, 2), grid=(6, 4))
    twice = BilinearPooler(2, 1)(AveragePooler(3, 4)(tokens))
    torch.testing.assert_close(twice.source_map.weighted().apply(tokens.features_SD), twice.features_SD, **CLOSE)


def test_cells_lie_in_the_middle_of_their_windows():
    pooled = AveragePooler(3, 1)(token_set(frames_of_visual=(1, 2), grid=(27, 4)))
    assert pooled.coordinate_S3[[0, 1, 2]].tolist() == [[0, 4, 1.5], [0, 13, 1.5], [0, 22, 1.5]]
    assert pooled.coordinate_S3[:, 0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert pooled.mass_S.tolist() == [36.0] * 9


def test_frames_of_any_visual_keep_their_boundaries():
    tokens = token_set(frames_of_visual=(2, 1, 3), sample_of_visual=[0, 0, 2])
    pooled = AveragePooler(1)(tokens)
    assert pooled.token_offsets_of_visual.tolist() == [0, 2, 3, 6]
    assert pooled.sample_of_visual.tolist() == [0, 0, 2] and torch.equal(pooled.frame_time_s_F, tokens.frame_time_s_F)


def test_columns_are_as_many_as_rows_unless_said():
    assert AveragePooler(3).tokens_per_frame((27, 27)) == 9
    assert AveragePooler(3, 2).tokens_per_frame((27, 27)) == 6


@arms
@pytest.mark.parametrize("rows", [0, 28])
def test_rows_out_of_range_are_refused(arm, rows):
    with pytest.raises(UserError, match=f"asks for a grid of {rows}x1 .* the encoder gives 27x27"):
        ARMS[arm][0](rows, 1).tokens_per_frame((27, 27))


def test_half_precision_stays_half():
    tokens = token_set()
    half = tokens.with_features(tokens.features_SD.bfloat16())
    assert AveragePooler(2)(half).features_SD.dtype == torch.bfloat16


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(UserError, match="AveragePooler needs a regular grid of tokens, and this set is no longer one"):
        AveragePooler(1)(replace(token_set(), grid=None))


@arms
def test_no_frames_give_no_tokens(arm):
    pooled = ARMS[arm][0](2)(token_set(frames_of_visual=(), grid=(3, 4)))
    pooled.validate()
    assert pooled.features_SD.shape == (0, 5)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (3, 2), (5, 4)])
def test_max_is_the_largest_of_each_window_and_lies_where_the_average_does(rows, columns):
    tokens = token_set(frames_of_visual=(2, 1), grid=(5, 4))
    pooled, averaged_too = MaxPooler(rows, columns)(tokens), AveragePooler(rows, columns)(tokens)
    pooled.validate()
    assert torch.equal(as_pictures(pooled), adaptive_max_pool2d(as_pictures(tokens), (rows, columns)))
    largest = [
        tokens.as_grid()[frame, y * 5 // rows : -(-(y + 1) * 5 // rows), x * 4 // columns : -(-(x + 1) * 4 // columns)]
        for frame in range(3)
        for y in range(rows)
        for x in range(columns)
    ]
    assert torch.equal(pooled.features_SD, torch.stack([window.flatten(0, 1).amax(dim=0) for window in largest]))
    assert torch.equal(pooled.mass_S, averaged_too.mass_S)
    assert torch.equal(pooled.coordinate_S3, averaged_too.coordinate_S3)


def triangle(size_in, size_out, wide):
    """Weights of one axis from the definition: a triangle around each sample point, cut off and renormalised."""
    scale, rows = size_in / size_out, []
    for cell in range(size_out):
        centre, reach = (cell + 0.5) * scale - 0.5, max(scale, 1.0) if wide else 1.0
        if not wide:
            centre = min(max(centre, 0.0), size_in - 1.0)
        row = [max(0.0, 1.0 - abs(place - centre) / reach) for place in range(size_in)]
        rows.append([weight / sum(row) for weight in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("grid", "rows", "columns"), [((5, 4), 2, 3), ((6, 9), 3, 3), ((7, 7), 7, 1)])
@pytest.mark.parametrize("wide", [False, True])
def test_bilinear_is_triangles_around_sample_points(grid, rows, columns, wide):
    tokens = token_set(frames_of_visual=(2,), grid=grid)
    rows_hH, columns_wW = triangle(grid[0], rows, wide), triangle(grid[1], columns, wide)
    expected = torch.einsum("hH,wW,FHWD->FhwD", rows_hH, columns_wW, tokens.as_grid().double())
    pooled = BilinearPooler(rows, columns, antialias=wide)(tokens)
    torch.testing.assert_close(pooled.as_grid(), expected.float(), **CLOSE)
