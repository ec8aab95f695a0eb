"""Pixels of tokens and heat, from maps that are known."""

import torch

from lightning_crosslmm.looks import Pooling
from lightning_crosslmm.token_pictures import (
    DARK,
    HEAT,
    PICTURE_SIDE,
    TINT,
    colours_of_tokens,
    enlarge,
    paint_heat,
    paint_tokens,
)


def pooling_of(token_FHW, num_tokens=None, strength_FHW=None):
    """Each patch in one token, or in none."""
    token_FHW = torch.tensor(token_FHW)
    count = int(token_FHW.max()) + 1 if num_tokens is None else num_tokens
    patches_P = torch.bincount(token_FHW[token_FHW >= 0], minlength=count)
    strength_FHW = torch.ones(token_FHW.shape) if strength_FHW is None else torch.tensor(strength_FHW)
    held = (token_FHW >= 0).long()
    tokens_F = torch.tensor([count] + [0] * (len(token_FHW) - 1))
    return Pooling("Known", token_FHW, strength_FHW, held, patches_P, patches_P.float(), tokens_F)


# two patches merged across the top, one alone below, one dropped; in the next frame the first token goes on
KNOWN = pooling_of([[[0, 0], [1, -1]], [[0, 2], [2, 2]]])
GREY = torch.full((2, 3, 64, 64), 100, dtype=torch.uint8)


def test_small_frames_are_enlarged_by_a_whole_factor_and_large_ones_left():
    frames = torch.randint(0, 256, (2, 3, 60, 60), dtype=torch.uint8)
    large = enlarge(frames)
    assert large.shape == (2, 3, 300, 300) and torch.equal(large[..., ::5, ::5], frames)
    assert enlarge(torch.zeros(1, 3, 384, 384)).shape == (1, 3, 384, 384)


def test_merged_patches_are_tinted_single_ones_clear_and_dropped_ones_dark():
    colours, painted = colours_of_tokens(KNOWN), paint_tokens(GREY, KNOWN)
    assert painted.shape == (2, PICTURE_SIDE, PICTURE_SIDE, 3) and painted.dtype == torch.uint8
    quarter = PICTURE_SIDE // 4
    tint = ((1 - TINT) * 100 + TINT * colours.float()).round().to(torch.uint8)
    assert torch.equal(painted[0, quarter, quarter], tint[0]) and torch.equal(painted[0, quarter, 3 * quarter], tint[0])
    assert painted[0, 3 * quarter, quarter].tolist() == [100, 100, 100]
    assert painted[0, 3 * quarter, 3 * quarter].tolist() == [round(DARK * 100)] * 3
    assert torch.equal(painted[1, quarter, quarter], tint[0])  # one token, one colour, in all its frames
    assert torch.equal(painted[1, 3 * quarter, 3 * quarter], tint[2]) and not torch.equal(tint[0], tint[2])


def test_outlines_lie_where_tokens_end_and_nowhere_within():
    colours, painted = colours_of_tokens(KNOWN), paint_tokens(GREY, KNOWN)
    half, quarter = PICTURE_SIDE // 2, PICTURE_SIDE // 4
    assert torch.equal(painted[0, half - 1, quarter], colours[0]) and torch.equal(painted[0, 0, half], colours[0])
    assert not torch.equal(painted[0, quarter, half], colours[0])  # between two patches of one token
    assert painted[0, half, quarter].tolist() == [255, 255, 255] and colours[1].tolist() == [255, 255, 255]
    assert painted[0, half, 3 * quarter].tolist() == [round(DARK * 100)] * 3  # a dropped patch has no line


def test_patches_that_weigh_little_in_their_token_are_fainter():
    painted = paint_tokens(GREY[:1], pooling_of([[[0, 0]]], strength_FHW=[[[1.0, 0.0]]])).float()
    quarter = PICTURE_SIDE // 4
    strong, faint = ((painted[0, 2 * quarter, each] - 100).abs().sum().item() for each in (quarter, 3 * quarter))
    assert 0 < faint < 0.3 * strong


def test_tokens_that_touch_in_space_or_time_differ_in_colour():
    noise = torch.Generator().manual_seed(0)
    token_FHW = torch.randint(0, 60, (4, 12, 12), generator=noise)
    colours = colours_of_tokens(pooling_of(token_FHW.tolist(), 60))
    few = pooling_of([[[0, 0, 1, 1, 2, 2]] * 2, [[3, 3, 4, 4, 5, 5]] * 2])
    assert len({tuple(colour) for colour in colours_of_tokens(few).tolist()}) == 6
    rows = pooling_of([[[column // 2 + 40 * (row // 2) for column in range(80)] for row in range(20)]] * 1)
    tokens, chosen = rows.token_FHW, colours_of_tokens(rows)
    for axis in (1, 2):
        size = tokens.shape[axis] - 1
        one, other = tokens.narrow(axis, 0, size), tokens.narrow(axis, 1, size)
        assert (chosen[one] != chosen[other]).any(dim=-1)[one != other].all()
    assert len({tuple(colour) for colour in colours.tolist()}) == 24  # as many as there are, more tokens or not


def test_a_grid_that_does_not_divide_the_picture_is_painted_to_its_last_pixel():
    tokens = torch.arange(27 * 27).view(1, 27, 27).div(2, rounding_mode="floor")
    painted = paint_tokens(torch.zeros(1, 3, 384, 384, dtype=torch.uint8), pooling_of(tokens.tolist()))
    assert painted.shape == (1, 384, 384, 3) and painted[0, -1, -1].tolist() == [255, 255, 255]  # 729 is odd


def test_without_a_map_frames_stay_as_they_are():
    opaque = Pooling("Opaque", None, *[torch.zeros(0)] * 5)
    assert torch.equal(paint_tokens(GREY, opaque), enlarge(GREY).permute(0, 2, 3, 1))


def test_heat_is_brightest_at_the_largest_value_of_all_frames():
    heat = torch.zeros(2, 2, 2)
    heat[1, 0, 0], heat[0, 1, 1] = 4.0, 2.0
    painted = paint_heat(GREY, heat).float()
    assert painted.shape == (2, PICTURE_SIDE, PICTURE_SIDE, 3)
    assert painted[1, 0, 0].sum() > painted[0, -1, -1].sum() > painted[0, 0, 0].sum()
    assert painted[0, 0, 0].max() <= (1 - HEAT) * 100 + 4  # inferno begins at black
    assert torch.isfinite(paint_heat(GREY, torch.zeros(2, 2, 2)).float()).all()
