import pytest
import torch
from torch.nn.functional import pixel_unshuffle

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import PixelShufflePooler, UniformPooler
from tests.tiny import token_set


def by_hand(tokens, ratio, windows):
    """Window by window, patch by patch, zeros where the grid has ended."""
    grid_FHWD = tokens.as_grid()
    wide = []
    for frame_HWD in grid_FHWD:
        for top in range(windows[0]):
            for left in range(windows[1]):
                parts = []
                for row in range(ratio * top, ratio * (top + 1)):
                    for column in range(ratio * left, ratio * (left + 1)):
                        inside = row < frame_HWD.shape[0] and column < frame_HWD.shape[1]
                        parts.append(frame_HWD[row, column] if inside else torch.zeros(frame_HWD.shape[2]))
                wide.append(torch.cat(parts))
    return torch.stack(wide)


@pytest.mark.parametrize(
    ("grid", "ratio", "odd", "windows"),
    [
        ((4, 6), 2, "pad", (2, 3)),
        ((5, 3), 2, "pad", (3, 2)),
        ((5, 3), 2, "crop", (2, 1)),
        ((7, 7), 3, "pad", (3, 3)),
        ((7, 7), 3, "crop", (2, 2)),
    ],
)
def test_it_is_a_loop_over_windows(grid, ratio, odd, windows):
    tokens = token_set((2, 1), grid)
    pooler = PixelShufflePooler(ratio, odd)
    pooled = pooler(tokens)
    assert torch.equal(pooled.features_SD, by_hand(tokens, ratio, windows))
    assert pooled.grid == windows and pooler.tokens_per_frame(grid) == windows[0] * windows[1]
    assert pooler.connect(5, 32, grid) == pooled.features_SD.shape[1]


def test_it_is_torchs_own_up_to_the_order_of_channels():
    tokens = token_set((2,), (4, 6))
    pictures_FDHW = tokens.as_grid().permute(0, 3, 1, 2)
    # torch's channels are (D, r, r), these are (r, r, D)
    expected = pixel_unshuffle(pictures_FDHW, 2).unflatten(1, (5, 4)).permute(0, 3, 4, 2, 1).flatten(3).flatten(0, 2)
    assert torch.equal(PixelShufflePooler(2)(tokens).features_SD, expected)


def test_a_window_stands_for_its_patches_and_those_it_has_not_for_nothing():
    tokens = token_set((1,), (3, 3))
    padded, cropped = PixelShufflePooler(2)(tokens), PixelShufflePooler(2, "crop")(tokens)
    assert padded.mass_S.tolist() == [4, 2, 2, 1]
    assert padded.coordinate_S3.tolist() == [[0, 0.5, 0.5], [0, 0.5, 2], [0, 2, 0.5], [0, 2, 2]]
    assert padded.source_map.pooled_of_source_S.tolist() == [0, 0, 1, 0, 0, 1, 2, 2, 3]
    assert cropped.mass_S.tolist() == [4]
    assert cropped.source_map.pooled_of_source_S.tolist() == [0, 0, -1, 0, 0, -1, -1, -1, -1]


@pytest.mark.parametrize("ratio", [0, 4])
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(UserError, match=f"pooler.ratio is {ratio}, the encoder gives 3x5 .* must be 1 to 3"):
        PixelShufflePooler(ratio).tokens_per_frame((3, 5))


def test_what_to_do_with_odd_grids_is_checked():
    with pytest.raises(UserError, match="pooler.odd is 'cropp'; right are pad, crop; did you mean 'crop'"):
        PixelShufflePooler(2, "cropp")


def test_it_needs_a_grid():
    with pytest.raises(UserError, match="PixelShufflePooler needs a regular grid"):
        PixelShufflePooler()(UniformPooler(3)(token_set()))
