from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_crosslmm.tokens import Opaque, Partition, TokenSet, Weighted, compose, frame_in_visual, grid_coordinates
from tests.tiny import token_set


def dense(source_map):
    """The map as a (pooled, source) matrix, one entry after the other."""
    matrix = torch.zeros(source_map.num_pooled, source_map.num_sources, dtype=torch.float64)
    if isinstance(source_map, Partition):
        members = [(source_map.pooled_of_source_S == pooled).nonzero().flatten() for pooled in range(len(matrix))]
        for pooled, sources in enumerate(members):
            matrix[pooled, sources] = 1 / max(1, len(sources))
        return matrix
    entries = zip(source_map.pooled_E, source_map.source_E, source_map.weight_E, strict=True)
    for pooled, source, weight in entries:
        matrix[pooled, source] += weight
    return matrix


@st.composite
def partitions(draw, num_sources, num_pooled):
    table = draw(st.lists(st.integers(-1, num_pooled - 1), min_size=num_sources, max_size=num_sources))
    return Partition(torch.tensor(table, dtype=torch.int64), num_pooled)


@st.composite
def weighted_maps(draw, num_sources, num_pooled):
    pair = st.tuples(st.integers(0, num_pooled - 1), st.integers(0, num_sources - 1), st.floats(0.125, 1, width=16))
    entries = draw(st.lists(pair, max_size=12))
    pooled, source, weight = zip(*entries, strict=True) if entries else ((), (), ())
    tables = [torch.tensor(column, dtype=torch.int64) for column in (pooled, source)]
    return Weighted(*tables, torch.tensor(weight, dtype=torch.float32), num_pooled, num_sources)


@st.composite
def chains(draw):
    sizes = draw(st.tuples(*[st.integers(1, 6)] * 3))
    return [
        draw(st.one_of(partitions(start, end), weighted_maps(start, end)))
        for start, end in zip(sizes, sizes[1:], strict=False)
    ]


@given(chains())
def test_chained_maps_are_the_product_of_their_matrices(chain):
    first, then = chain
    both = compose(first, then)
    assert (both.num_sources, both.num_pooled) == (first.num_sources, then.num_pooled)
    if isinstance(both, Partition):  # a mean of unequal parts is no mean of means: what counts is who went where
        reached = (dense(then) > 0).double() @ (dense(first) > 0).double()
        torch.testing.assert_close((dense(both) > 0).double(), reached)
    else:
        torch.testing.assert_close(dense(both), dense(then) @ dense(first), rtol=1e-6, atol=1e-6)


@given(weighted_maps(4, 3))
def test_applying_a_map_is_multiplying_by_its_matrix(source_map):
    features_SD = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    expected_PD = dense(source_map).float() @ features_SD
    torch.testing.assert_close(source_map.apply(features_SD), expected_PD, rtol=0, atol=1e-5)


def test_two_partitions_stay_one_and_dropped_tokens_stay_dropped():
    both = compose(Partition(torch.tensor([0, -1, 1, 2]), 3), Partition(torch.tensor([1, -1, 0]), 2))
    assert isinstance(both, Partition)
    assert both.pooled_of_source_S.tolist() == [1, -1, -1, 0]


def test_a_partition_read_as_weights_is_the_mean_of_its_members():
    mean = Partition(torch.tensor([0, 1, 0, -1]), 2).weighted()
    assert mean.apply(torch.tensor([[2.0], [5.0], [4.0], [100.0]])).tolist() == [[3.0], [5.0]]


def test_double_entries_of_a_chain_are_added_up():
    shared = Weighted(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.ones(2), 2, 1)
    both = compose(shared, Weighted(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.full((2,), 0.5), 1, 2))
    assert (both.pooled_E.tolist(), both.source_E.tolist(), both.weight_E.tolist()) == ([0], [0], [1.0])


def test_the_identity_costs_nothing_and_opaque_swallows_everything():
    then = Weighted(torch.tensor([0]), torch.tensor([1]), torch.ones(1), 1, 2)
    assert compose(Partition(torch.arange(2), 2, is_identity=True), then) is then
    assert compose(Opaque(2, 7), then) == Opaque(1, 7)
    assert compose(then, Opaque(4, 1)) == Opaque(4, 2)


def test_maps_that_do_not_meet_are_refused():
    with pytest.raises(ValueError, match="to 3 tokens with a map from 2"):
        compose(Opaque(3, 5), Opaque(1, 2))


def test_an_encoders_output_is_annotated():
    tokens = token_set(frames_of_visual=(2, 1), grid=(2, 3))
    tokens.validate()
    assert (tokens.num_tokens, tokens.num_frames, tokens.num_visuals) == (18, 3, 2)
    assert tokens.token_offsets_of_visual.tolist() == [0, 12, 18]
    assert tokens.mass_S.tolist() == [1.0] * 18
    assert tokens.coordinate_S3[[0, 5, 6, 12]].tolist() == [[0, 0, 0], [0, 1, 2], [1, 0, 0], [0, 0, 0]]
    assert tokens.source_map.is_identity
    assert torch.equal(tokens.as_grid().flatten(0, 2), tokens.features_SD)


def ragged():
    tokens = token_set(frames_of_visual=(1, 1), grid=(1, 3))
    return replace(tokens, frame_offsets=torch.tensor([0, 2, 6]), grid=None)


def test_padded_view_of_ragged_tokens():
    tokens = ragged()
    padded_FND, keep_FN = tokens.padded()
    assert keep_FN.tolist() == [[True, True, False, False], [True] * 4]
    assert torch.equal(padded_FND[keep_FN], tokens.features_SD)
    assert padded_FND[0, 2:].abs().sum() == 0


def test_padded_view_of_nothing():
    empty = TokenSet.from_grid(
        torch.zeros(0, 4, 2), (2, 2), torch.tensor([0]), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    )
    empty.validate()
    assert [tuple(view.shape) for view in empty.padded()] == [(0, 0, 2), (0, 0)]


def test_ragged_tokens_are_no_grid():
    with pytest.raises(ValueError, match="no longer form a regular grid"):
        ragged().as_grid()


def test_new_features_keep_the_places():
    tokens = token_set()
    wider = tokens.with_features(torch.zeros(tokens.num_tokens, 9))
    assert wider.features_SD.shape == (36, 9) and wider.coordinate_S3 is tokens.coordinate_S3
    with pytest.raises(ValueError, match="35 features for a set of 36"):
        tokens.with_features(torch.zeros(35, 9))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("frame_offsets", torch.tensor([0, 12, 24, 35]), "frame_offsets must lie on the CPU and rise from 0 to 36"),
        ("frame_offsets", torch.tensor([0, 24, 12, 36]), "frame_offsets must lie"),
        ("visual_offsets", torch.tensor([1, 2, 3]), "visual_offsets must lie"),
        ("mass_S", torch.ones(35), "mass_S has 35 entries for 36"),
        ("coordinate_S3", torch.ones(37, 3), "coordinate_S3 has 37"),
        ("sample_of_visual", torch.tensor([0]), "sample_of_visual has 1 entries for 2"),
        ("frame_time_s_F", torch.zeros(2), "frame_time_s_F has 2 entries for 3"),
        ("source_map", Opaque(35, 36), "source_map has 35"),
        ("grid", (2, 2), r"grid \(2, 2\) but \[12, 12, 12\] tokens per frame"),
        ("features_SD", torch.full((36, 5), torch.nan), "NaN or infinity"),
    ],
)
def test_a_set_that_disagrees_with_itself_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(token_set(), **{field: value}).validate()


def test_frames_are_numbered_within_their_visual():
    assert frame_in_visual(torch.tensor([0, 2, 2, 5])).tolist() == [0, 1, 0, 1, 2]


def test_a_coarse_cell_lies_in_the_middle_of_its_patches():
    # 6 patches, 2 cells of 3: their middles are patches 1 and 4
    assert grid_coordinates(torch.tensor([7]), (1, 2), (1.0, 3.0)).tolist() == [[7, 0, 1], [7, 0, 4]]
