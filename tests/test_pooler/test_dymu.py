"""DyMU's merging: against the formulas, ragged frames, and thresholds that come from a file."""

import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import DymuPooler
from tests.slow_merging import FRAMES, above, assert_agree, in_tower, merge, through_tower, towers
from tests.tiny import tiny_encoder, tiny_model


def slow_dymu(encoder, frame_CHW, threshold, proportional):
    def after(block, tokens, keys, row):
        return merge(tokens, keys, above(threshold), encoder.num_prefix, not encoder.has_class_token)[0]

    return through_tower(encoder, frame_CHW, after, proportional)


@towers
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-6)])  # masses are float32
def test_it_is_the_formula(tower, proportional, dtype, tolerance):
    torch.manual_seed(0)
    encoder = tiny_encoder(**tower).to(dtype).eval()
    with torch.no_grad():
        pooled, _ = in_tower(DymuPooler(0.4, proportional, order="merged"), encoder, FRAMES)
        slow = [slow_dymu(encoder, frame_CHW, 0.4, proportional) for frame_CHW in FRAMES]
    assert len(set(pooled.frame_offsets.diff().tolist())) > 1  # else nothing was ragged
    assert_agree(pooled, slow, tolerance)


def test_nothing_above_the_threshold_is_the_plain_tower_to_the_last_bit():
    encoder = tiny_encoder().eval()
    pooled, _ = in_tower(DymuPooler(1.0), encoder, FRAMES)
    assert torch.equal(pooled.features_SD, encoder(FRAMES).flatten(0, 1))


def test_a_plain_picture_keeps_fewer_tokens():
    frames_FCHW = torch.cat([FRAMES[:1], torch.full((1, 3, 16, 16), 200, dtype=torch.uint8)])
    torch.manual_seed(0)
    rich, plain = in_tower(DymuPooler(0.8), tiny_encoder().eval(), frames_FCHW)[0].frame_offsets.diff().tolist()
    assert plain < rich


def test_everything_above_leaves_half_per_block():
    pooled, _ = in_tower(DymuPooler(-1.0), tiny_encoder().eval(), FRAMES)
    assert pooled.frame_offsets.diff().tolist() == [2, 2, 2]


@pytest.mark.parametrize("threshold", [1.1, -1.1])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(UserError, match=f"pooler.thresholds is {threshold}; right is a cosine from -1 to 1, or a file"):
        DymuPooler(threshold)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no_such.json' is no calibration file .*; write one with mode=calibrate"):
        tiny_model(pooler=DymuPooler(str(tmp_path / "no_such.json")))
