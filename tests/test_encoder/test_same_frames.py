import pytest
import torch

from lightning_crosslmm.encoder.same_frames import stand_ins


def noise(num_frames, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, 3, side, side), dtype=torch.uint8, generator=generator)


def plain(levels, side=8):
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, side, side)


def offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def slowly(frames_FCHW, visual_offsets, tolerance):
    """The definition, frame by frame."""
    found, starts = [], set(visual_offsets.tolist())
    kept = 0
    for number, frame in enumerate(frames_FCHW):
        is_like = number not in starts and (frame.double() - frames_FCHW[kept].double()).abs().mean() <= tolerance
        kept = kept if is_like else number
        found.append(next(k for k in range(kept + 1) if torch.equal(frames_FCHW[k], frames_FCHW[kept])))
    return found


@pytest.mark.parametrize("side", [8, 9, 15])  # 3 * 9 * 9 bytes are no whole number of words
def test_equal_frames_are_found_wherever_they_are(side):
    frames_FCHW = noise(4, side)[[0, 1, 0, 2, 1, 3, 3]]
    assert stand_ins(frames_FCHW, offsets(2, 5), 0).tolist() == [0, 1, 0, 3, 1, 5, 5]


def test_one_pixel_makes_another_frame():
    frames_FCHW = noise(1).repeat(3, 1, 1, 1)
    frames_FCHW[1, 2, 7, 7] ^= 1
    assert stand_ins(frames_FCHW, offsets(3), 0).tolist() == [0, 1, 0]


def test_frames_of_one_sum_are_compared():
    frames_FCHW = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    frames_FCHW[0, 0, 0, 0] = 2  # 1 x 2 in the first word of 8 bytes, 2 x 1 in the second
    frames_FCHW[1, 0, 1, 0] = 1
    frames_FCHW[2, 0, 1, 0] = 1
    assert stand_ins(frames_FCHW, offsets(3), 0).tolist() == [0, 1, 2]  # hidden behind the first, so encoded


def test_frames_may_lie_anywhere_in_memory():
    frames_FCHW = noise(2).flatten()[1:193].view(1, 3, 8, 8).expand(2, -1, -1, -1).transpose(2, 3)
    assert stand_ins(frames_FCHW, offsets(2), 1).tolist() == [0, 0]


def test_slow_drift_is_measured_from_the_frame_that_was_kept():
    assert stand_ins(plain(list(range(10, 18))), offsets(8), 2).tolist() == [0, 0, 0, 3, 3, 3, 6, 6]


def test_the_tolerance_is_a_mean_over_all_pixels():
    frames_FCHW = plain([100, 100, 100])[:].clone()
    frames_FCHW[1, 0, 0, 0] += 48  # a quarter, over 3 * 8 * 8 values
    frames_FCHW[2, 0, 0, 0] -= 49
    assert stand_ins(frames_FCHW, offsets(3), 0.25).tolist() == [0, 0, 2]


def test_near_frames_of_another_visual_do_not_stand_in_but_equal_ones_do():
    assert stand_ins(plain([10, 11, 11, 12, 10, 10]), offsets(2, 2, 2), 1).tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("tolerance", [0, 0.5, 1, 3.3, 255])
def test_it_is_the_definition(tolerance):
    generator = torch.Generator().manual_seed(1)
    frames_FCHW = torch.randint(0, 3, (40, 1, 2, 2), dtype=torch.uint8, generator=generator) * 2
    visual_offsets = offsets(5, 1, 20, 14)
    assert stand_ins(frames_FCHW, visual_offsets, tolerance).tolist() == slowly(frames_FCHW, visual_offsets, tolerance)
