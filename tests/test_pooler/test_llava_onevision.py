"""LLaVA-OneVision's pooling by hand; `test_onevision.py` holds it against transformers' own."""

from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import LlavaOnevisionPooler, check_pooled
from tests.tiny import token_set

WIDTH = 5


def pooled(frames, pictures=None, grid=(3, 4), max_tiles=9):
    tokens = token_set(frames, grid, WIDTH)
    tokens = replace(tokens, picture_V4=None if pictures is None else torch.tensor(pictures))
    pooler = LlavaOnevisionPooler(max_tiles)
    assert pooler.connect(WIDTH, WIDTH, grid) == WIDTH
    found = pooler(tokens)
    check_pooled(pooler, tokens, found, WIDTH, grid)
    return tokens, pooler, found


def test_a_video_is_halved_and_ends_with_a_newline():
    tokens, pooler, found = pooled([2, 1])
    assert found.frame_offsets.diff().tolist() == [4, 5, 5] and found.grid is None
    grid_FDHW = tokens.as_grid().permute(0, 3, 1, 2)
    expected_FDhw = torch.nn.functional.interpolate(grid_FDHW, size=(2, 2), mode="bilinear")
    expected_FND = expected_FDhw.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.features_SD[:8], expected_FND[:2].flatten(0, 1))
    assert torch.equal(found.features_SD[8], pooler.newline_D) and torch.equal(found.features_SD[13], pooler.newline_D)
    assert found.mass_S.tolist() == [3.0] * 8 + [0.0] + [3.0] * 4 + [0.0]
    assert found.coordinate_S3[8].tolist() == [1.0, 1.75, 3.5]


def test_the_map_says_what_each_token_is_made_of():
    tokens, _, found = pooled([2, 5], [[0, 0, 0, 0], [70, 100, 2, 2]], max_tiles=2)
    is_newline_P = found.mass_S == 0
    rebuilt_PD = found.source_map.apply(tokens.features_SD)
    torch.testing.assert_close(rebuilt_PD[~is_newline_P], found.features_SD[~is_newline_P])
    assert rebuilt_PD[is_newline_P].abs().max() == 0 and is_newline_P.sum() > 2


def test_an_image_without_tiles_stays_whole():
    tokens, pooler, found = pooled([1], [[30, 40, 0, 0]])
    assert torch.equal(found.features_SD[:12], tokens.features_SD) and found.num_tokens == 13
    assert torch.equal(found.features_SD[12], pooler.newline_D)


def test_tiles_become_one_mosaic_with_a_newline_behind_each_row():
    tokens, pooler, found = pooled([3], [[30, 80, 1, 2]])
    assert found.frame_offsets.diff().tolist() == [12, 27, 0]
    grid_FHWD = tokens.as_grid()
    expected_HWD = torch.cat([grid_FHWD[1], grid_FHWD[2]], dim=1)
    rows_HwD = found.features_SD[12:].view(3, 9, WIDTH)
    assert torch.equal(rows_HwD[:, :8], expected_HWD)
    assert all(torch.equal(row_wD[8], pooler.newline_D) for row_wD in rows_HwD)
    assert found.coordinate_S3[12].tolist() == [1.0, 0.0, 0.0]
    assert found.coordinate_S3[-1].tolist() == [1.0, 2.0, 8.0]


def test_padding_is_cut_off():
    tokens, _, found = pooled([5], [[20, 80, 2, 2]], grid=(4, 4))
    rows_HwD = found.features_SD[16:].view(2, 9, WIDTH)  # a quarter as high as wide: 2 of 8 rows
    tiles_FHWD = tokens.as_grid()
    assert torch.equal(rows_HwD[0, :8], torch.cat([tiles_FHWD[1, 3], tiles_FHWD[2, 3]]))
    assert torch.equal(rows_HwD[1, :8], torch.cat([tiles_FHWD[3, 0], tiles_FHWD[4, 0]]))


@pytest.mark.parametrize(("max_tiles", "side"), [(9, 8), (4, 8), (3, 6), (1, 4)])
def test_a_large_mosaic_shrinks(max_tiles, side):
    _, _, found = pooled([5], [[80, 80, 2, 2]], grid=(4, 4), max_tiles=max_tiles)
    assert found.frame_offsets.diff().tolist() == [16, side * (side + 1), 0, 0, 0]


def test_no_tiles_at_all_are_refused():
    with pytest.raises(UserError, match="pooler LlavaOnevisionPooler: pooler.max_tiles is 0; it must be 1 or more"):
        LlavaOnevisionPooler(0)
