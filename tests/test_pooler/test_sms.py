import math

import numpy
import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import SmsPooler
from lightning_crosslmm.pooler.sms import KNEES, head_length
from lightning_crosslmm.taps import Taps
from tests.test_pooler.test_prumerge import GRID, N, given


def plain_head(curve, knee):
    """Length of the head of one falling curve, by its definition."""
    points = len(curve)
    if knee == "iqr":
        low, high = numpy.percentile(curve, 25), numpy.percentile(curve, 75)
        return sum(value > high + 1.5 * (high - low) for value in curve)
    if knee == "max_gap":
        return 1 + max(range(points - 1), key=lambda i: curve[i] - curve[i + 1])
    if knee == "max_second_difference":
        return max(range(1, points - 1), key=lambda i: curve[i - 1] - 2 * curve[i] + curve[i + 1])
    scaled = [(i / (points - 1), (value - curve[-1]) / (curve[0] - curve[-1])) for i, value in enumerate(curve)]
    # signed distance to the line from (0, 1) to (1, 0), positive below it
    return max(range(points), key=lambda i: (1 - scaled[i][0] - scaled[i][1]) / math.sqrt(2))


@pytest.mark.parametrize("knee", KNEES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_frame_keeps_the_head_of_its_curve_in_raster_order(knee, dtype):
    tokens, taps = given(dtype, frames=(3, 2))
    pooled = SmsPooler(knee=knee)(tokens, taps)
    pooled.validate()
    expected = []
    for frame, saliency_N in enumerate(taps.saliency_FN.double().tolist()):
        falling = sorted(range(N), key=lambda j: -saliency_N[j])
        count = max(1, plain_head([saliency_N[j] for j in falling], knee))
        expected += [frame * N + j for j in sorted(falling[:count])]
    assert torch.equal(pooled.features_SD, tokens.features_SD[expected])
    assert (pooled.source_map.pooled_of_source_S >= 0).nonzero().flatten().tolist() == expected
    assert len(set(pooled.frame_offsets.diff().tolist())) > 1


@pytest.mark.parametrize("knee", KNEES)
def test_a_clip_is_cut_as_one_curve(knee):
    tokens, taps = given(torch.float64, frames=(3, 2))
    taps.saliency_FN[1] *= 1e-3  # a frame that says little
    pooled = SmsPooler(knee=knee, scope="clip")(tokens, taps)
    pooled.validate()
    expected = []
    for start, end in ((0, 3), (3, 5)):
        saliency = taps.saliency_FN[start:end].flatten().tolist()
        falling = sorted(range(len(saliency)), key=lambda j: -saliency[j])
        count = max(end - start, plain_head([saliency[j] for j in falling], knee))
        expected += [start * N + j for j in sorted(falling[:count])]
    assert torch.equal(pooled.features_SD, tokens.features_SD[expected])


def test_a_frame_may_keep_nothing_in_a_clip():
    tokens, taps = given(torch.float32, frames=(2,))
    taps.saliency_FN[1] = 0
    pooled = SmsPooler(knee="iqr", scope="clip", max_tokens=4)(tokens, taps)
    pooled.validate()
    first, second = pooled.frame_offsets.diff().tolist()
    assert second == 0 and 2 <= first <= 8


@pytest.mark.parametrize("knee", KNEES)
def test_a_plain_step_is_cut_at_the_step(knee):
    curve_CX = torch.tensor([[9.0, 9.0, 9.0] + [1.0] * 17])
    assert head_length(curve_CX, knee).tolist() == [3]


@pytest.mark.parametrize("knee", KNEES)
@pytest.mark.parametrize("points", [1, 2])
def test_curves_too_short_to_bend_are_kept(knee, points):
    assert head_length(torch.ones(2, points), knee).tolist() == [points] * 2


def test_bounds_hold():
    tokens, taps = given(torch.float32)
    pooler = SmsPooler(knee="iqr", min_tokens=6, max_tokens=0.125)
    assert (pooler(tokens, taps).frame_offsets.diff() == 6).all() and pooler.tokens_per_frame(GRID) == 6
    flat = Taps(None, torch.ones(3, N))
    assert (SmsPooler(min_tokens=4)(tokens, flat).frame_offsets.diff() == 4).all()
    assert SmsPooler().tokens_per_frame(GRID) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": 0}, "pooler.min_tokens is 0, the encoder gives 48 tokens per frame; it must be 1 to 48"),
        ({"max_tokens": 49}, "pooler.max_tokens is 49"),
        ({"min_tokens": 9, "max_tokens": 8}, "pooler.min_tokens is 9 tokens, above pooler.max_tokens, 8"),
    ],
)
def test_bounds_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SmsPooler(**settings).tokens_per_frame(GRID)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"knee": "kneedel"}, "pooler.knee is 'kneedel'; right are kneedle, .* did you mean 'kneedle'"),
        ({"scope": "video"}, "pooler.scope is 'video'; right are frame, clip"),
    ],
)
def test_unknown_words_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SmsPooler(**settings)
