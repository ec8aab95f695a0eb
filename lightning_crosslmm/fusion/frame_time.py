"""Embeddings that tell frames apart: by their time in seconds, or by their number.

Axis letters:
    F  frames    E  width of what carries the embedding    C  sine and cosine channels
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from lightning_crosslmm.errors import UserError


class SinusoidalTime(nn.Module):
    """Embed the time of a frame: ``W [sin(2 pi t / p_c), cos(2 pi t / p_c)]``.

    The periods p_c reach from 0.4 s to 400 s in equal ratios.

    Source: the paper mentions no positions in its cross-attention; sines and cosines after Vaswani et al.,
        arXiv:1706.03762, section 3.5.
    Differs: of seconds and not of index, so that the frame rate can change between training and use.

    Args:
        width: E.
        init_std: standard deviation of W at the start.
        num_periods: C / 2.
    """

    def __init__(self, width: int, init_std: float, num_periods: int = 32) -> None:
        super().__init__()
        self.num_periods = num_periods
        self.out = nn.Linear(2 * num_periods, width, bias=False)
        nn.init.normal_(self.out.weight, std=init_std)

    def forward(self, time_s_F: Tensor, number_F: Tensor) -> Tensor:
        """Embed frames by their (F,) seconds as (F, E)."""
        shortest_s, longest_s = 0.4, 400.0
        exponent = torch.linspace(0, 1, self.num_periods, device=time_s_F.device)
        period_s = shortest_s * (longest_s / shortest_s) ** exponent
        angle_FC = 2 * math.pi * time_s_F[:, None] / period_s
        wave_FC = torch.cat([angle_FC.sin(), angle_FC.cos()], dim=-1)
        return self.out(wave_FC.to(self.out.weight.dtype))


class LearnedNumber(nn.Module):
    """Embed the number of a frame in its visual: one learned vector each, nearly orthogonal from the start.

    Source: none; the paper mentions no positions. A tiny model learns to tell frames apart several times sooner by
        these than by sines.

    Args:
        width: E.
        num_frames: most frames of a visual.
    """

    def __init__(self, width: int, num_frames: int = 1024) -> None:
        super().__init__()
        self.weight = nn.Embedding(num_frames, width).weight
        nn.init.normal_(self.weight, std=0.3)  # as loud as what a fresh projector says of the frame

    def forward(self, time_s_F: Tensor, number_F: Tensor) -> Tensor:
        """Embed frames by their (F,) numbers as (F, E).

        Raises:
            UserError: a visual has more frames than there are vectors.
        """
        if len(number_F) and int(number_F.max()) >= len(self.weight):
            raise UserError(
                f"fusion.frame_time=learned knows {len(self.weight)} frames, a visual has {int(number_F.max()) + 1}; "
                "use fusion.frame_time=sinusoidal or fewer frames (data.sampling)"
            )
        return embedding(number_F.to(self.weight.device), self.weight)


def frame_time(kind: str, width: int, init_std: float) -> nn.Module | None:
    """Build the embedding that `Fusion.frame_time` names."""
    makers = {
        "none": lambda: None,
        "sinusoidal": lambda: SinusoidalTime(width, init_std),
        "learned": lambda: LearnedNumber(width),
    }
    return makers[kind]()
