"""Embeddings that tell frames apart."""

import math

import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion import frame_time
from lightning_crosslmm.fusion.frame_time import LearnedNumber, SinusoidalTime


def test_the_time_of_a_frame_is_sines_of_seconds():
    time = SinusoidalTime(6, 0.02, num_periods=3)
    angles = [2 * math.pi * 7.5 / period_s for period_s in (0.4, math.sqrt(0.4 * 400), 400.0)]
    wave_C = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    embedded_FD = time(torch.tensor([7.5]), torch.tensor([3]))
    # 19 turns of the shortest period: float32 keeps the angle to about 1e-5
    torch.testing.assert_close(embedded_FD[0], time.out.weight @ wave_C, rtol=0, atol=1e-4)
    assert SinusoidalTime(512, 0.02).out.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_time_asks_for_seconds_and_number_for_the_place():
    time_s_F, number_F = torch.tensor([0.0, 1.25, 1.25, 3.0]), torch.tensor([0, 1, 2, 2])
    by_time, by_number = SinusoidalTime(6, 0.02)(time_s_F, number_F), LearnedNumber(6)(time_s_F, number_F)
    assert torch.equal(by_time[1], by_time[2]) and not torch.allclose(by_time[2], by_time[3])
    assert torch.equal(by_number[2], by_number[3]) and not torch.allclose(by_number[1], by_number[2])


def test_frame_numbers_start_nearly_orthogonal():
    codes = torch.nn.functional.normalize(LearnedNumber(128).weight[:8], dim=-1)
    assert (codes @ codes.T - torch.eye(8)).abs().max() < 0.4  # 4 standard deviations of 1/sqrt(128)


def test_more_frames_than_vectors_are_refused():
    with pytest.raises(UserError, match=r"knows 4 frames, a visual has 6"):
        LearnedNumber(6, num_frames=4)(torch.zeros(1), torch.tensor([5]))


@pytest.mark.parametrize(
    ("kind", "made"), [("none", type(None)), ("sinusoidal", SinusoidalTime), ("learned", LearnedNumber)]
)
def test_the_setting_names_the_embedding(kind, made):
    assert type(frame_time(kind, 6, 0.02)) is made
