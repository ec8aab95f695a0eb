from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import AveragePooler, SlowFastPooler, TemporalMergePooler, UniformPooler
from lightning_crosslmm.tokens import Opaque, Partition, Weighted
from tests.poolers import dense
from tests.tiny import token_set

CLOSE = {"rtol": 0, "atol": 1e-6}  # means of at most 24 numbers of order 1, single precision
FRAMES, GRID = (5, 1, 3), (4, 6)


def window_means(picture_HWD, rows, columns):
    height, width = picture_HWD.shape[:2]
    means = []
    for row in range(rows):
        for column in range(columns):
            top, bottom = row * height // rows, -(-(row + 1) * height // rows)
            left, right = column * width // columns, -(-(column + 1) * width // columns)
            means.append(picture_HWD[top:bottom, left:right].flatten(0, 1).mean(dim=0))
    return means


@pytest.mark.parametrize(("every", "fine", "coarse"), [(2, (2, 3), (1, 1)), (3, (3, 3), (1, 2)), (9, (4, 6), (2, 1))])
def test_slowfast_is_a_loop_over_frames(every, fine, coarse):
    tokens = token_set(FRAMES, GRID)
    expected, counts = [], []
    for start, end in zip([0, 5, 6], [5, 6, 9], strict=True):
        for number, picture_HWD in enumerate(tokens.as_grid()[start:end]):
            means = window_means(picture_HWD, *(coarse if number % every else fine))
            expected, counts = [*expected, *means], [*counts, len(means)]
    pooler = SlowFastPooler(every, *fine, *coarse)
    pooled = pooler(tokens)
    pooled.validate()
    assert pooled.frame_offsets.diff().tolist() == counts and pooler.tokens_per_frame(GRID) is None
    torch.testing.assert_close(pooled.features_SD, torch.stack(expected), **CLOSE)
    torch.testing.assert_close(dense(pooled.source_map) @ tokens.features_SD, pooled.features_SD, **CLOSE)
    assert pooled.mass_S.sum().item() == pytest.approx(9 * 24)


def test_the_map_is_a_partition_while_windows_tile_and_drops_stay_dropped():
    tiled = SlowFastPooler(2, 2, 3)(token_set(FRAMES, GRID)).source_map
    assert isinstance(tiled, Partition)
    assert isinstance(SlowFastPooler(2, 3)(token_set(FRAMES, GRID)).source_map, Weighted)
    tokens = token_set((3,), (2, 2))
    lost = replace(tokens, source_map=Partition(torch.tensor([-1, *range(12)]), 12))
    assert SlowFastPooler(2, 2)(lost).source_map.pooled_of_source_S.tolist() == [-1, 0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8]
    opaque = replace(tokens, source_map=Opaque(12, 50))
    assert SlowFastPooler(2, 2)(opaque).source_map == Opaque(9, 50)


def merged_by_hand(tokens, length, threshold):
    """Anchor by anchor: who joins it, and the means; tokens in the order of frames."""
    means, counts = [], []
    for start, end in zip(tokens.visual_offsets[:-1].tolist(), tokens.visual_offsets[1:].tolist(), strict=True):
        pictures_FND = tokens.as_grid()[start:end].flatten(1, 2)
        for number in range(end - start):
            first, count = number - number % length, 0
            for place in range(pictures_FND.shape[1]):
                anchor = pictures_FND[first, place]
                members = [anchor]
                for other in range(first + 1, min(first + length, end - start)):
                    x = pictures_FND[other, place]
                    is_like = threshold is None or (x @ anchor) / (x.norm() * anchor.norm()) >= threshold
                    if other == number and not is_like:
                        members, count = [x], count + 1
                        means.append(x)
                    if number == first and is_like:
                        members.append(x)
                if number == first:
                    means.append(torch.stack(members).mean(dim=0))
                    count += 1
            counts.append(count)
    return torch.stack(means), counts


@pytest.mark.parametrize("length", [2, 3, 9])
@pytest.mark.parametrize("threshold", [None, 0.3, -0.5, 1.0])
def test_merging_is_a_loop_over_anchors(length, threshold):
    tokens = token_set(FRAMES, GRID)
    double = tokens.with_features(tokens.features_SD.double())
    pooled = TemporalMergePooler(length, threshold)(double)
    pooled.validate()
    expected, counts = merged_by_hand(double, length, threshold)
    assert pooled.frame_offsets.diff().tolist() == counts
    torch.testing.assert_close(pooled.features_SD, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(dense(pooled.source_map).double() @ double.features_SD, expected, rtol=0, atol=1e-6)
    single = TemporalMergePooler(length, threshold)(tokens)
    torch.testing.assert_close(single.features_SD, expected.float(), **CLOSE)


def test_frames_that_were_merged_away_keep_no_token_and_the_rest_lies_between_them():
    pooled = TemporalMergePooler(2)(token_set((3, 2), (2, 2)))
    assert pooled.frame_offsets.diff().tolist() == [4, 0, 4, 4, 0]
    assert pooled.coordinate_S3[::4, 0].tolist() == [0.5, 2.0, 0.5]
    assert pooled.mass_S[::4].tolist() == [2, 1, 2]


def test_a_clip_that_stands_still_becomes_one_frame():
    tokens = token_set((1,), (2, 2))
    still = token_set((4,), (2, 2)).with_features(tokens.features_SD.repeat(4, 1))
    pooled = TemporalMergePooler(4, threshold=0.999)(still)
    torch.testing.assert_close(pooled.features_SD, tokens.features_SD, **CLOSE)


def test_space_first_then_time():
    tokens = token_set(FRAMES, GRID)
    twice = TemporalMergePooler(2)(AveragePooler(2, 3)(tokens))
    once = TemporalMergePooler(2, rows=2, columns=3)(tokens)
    assert torch.equal(once.features_SD, twice.features_SD) and torch.equal(once.mass_S, twice.mass_S)
    assert TemporalMergePooler(1, rows=2).tokens_per_frame((4, 6)) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlowFastPooler(0, 2), "SlowFastPooler: pooler.every is 0; it must be 1 or more"),
        (lambda: SlowFastPooler(2, 5).tokens_per_frame((4, 6)), "SlowFastPooler asks .* pooler.rows must be 1 to 4"),
        (lambda: SlowFastPooler(2, 2, 2, 0).tokens_per_frame((4, 6)), "pooler.fast_rows must be 1 to 4"),
        (lambda: TemporalMergePooler(0), "TemporalMergePooler: pooler.frames is 0"),
        (lambda: TemporalMergePooler(2, threshold=1.5), "pooler.threshold is 1.5; .* between -1 and 1"),
        (lambda: TemporalMergePooler(2, columns=2), "pooler.columns is 2 without pooler.rows"),
        (lambda: TemporalMergePooler(2, rows=7).tokens_per_frame((4, 6)), "TemporalMergePooler asks for a grid of 7x7"),
        (lambda: SlowFastPooler(2, 2)(UniformPooler(3)(token_set())), "SlowFastPooler needs a regular grid"),
        (lambda: TemporalMergePooler(2)(UniformPooler(3)(token_set())), "TemporalMergePooler needs a regular grid"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(UserError, match=message):
        make()
