"""A made-up sample of a chosen size: what a cost is the cost of.

Axis letters:
    F  frames    C H W  channels, pixel rows and columns    L  text tokens with the mark
"""

from dataclasses import dataclass

import torch

from lightning_crosslmm.batch import IGNORED, VISUAL_MARK, VideoBatch
from lightning_crosslmm.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One video and a text after it.

    Args:
        num_frames: of the video, 1 or more.
        text_tokens: of the text, answer included, 2 or more.
        answer_tokens: at its end, the ones that are trained; 1 or more, fewer than `text_tokens`.

    Raises:
        UserError: a count out of its range.
    """

    num_frames: int
    text_tokens: int
    answer_tokens: int

    def __post_init__(self) -> None:
        """Check the counts."""
        if self.num_frames < 1:
            raise UserError(f"frames: {self.num_frames}; a sample has 1 or more (data.num_frames)")
        if not 1 <= self.answer_tokens < self.text_tokens:
            raise UserError(
                f"text_tokens={self.text_tokens}, answer_tokens={self.answer_tokens}: an answer has 1 token or more, "
                f"and the text one more than its answer"
            )

    def batch(self, image_size: int, num_samples: int = 1, device: str = "meta") -> VideoBatch:
        """Make samples of this size, all alike; their frames hold nothing.

        Args:
            image_size: pixels per side.
            num_samples: rows of the batch.
            device: of the frames.
        """
        frames, answer = self.num_frames, self.answer_tokens
        ids = torch.tensor([VISUAL_MARK] + [0] * self.text_tokens)
        labels = torch.tensor([IGNORED] * (1 + self.text_tokens - answer) + [0] * answer)
        answer_L = torch.where(labels == IGNORED, -1, 0)
        number_B = torch.arange(num_samples)
        answer_BL = answer_L + (answer_L >= 0) * number_B[:, None]
        return VideoBatch(
            frames_FCHW=torch.zeros(num_samples * frames, 3, image_size, image_size, dtype=torch.uint8, device=device),
            frame_time_s_F=torch.arange(frames).float().repeat(num_samples),
            visual_offsets=torch.arange(num_samples + 1) * frames,
            sample_of_visual=number_B,
            ids_L=ids.repeat(num_samples),
            labels_L=labels.repeat(num_samples),
            answer_L=answer_BL.flatten(),
            text_offsets=torch.arange(num_samples + 1) * len(ids),
            row_of_sample=number_B,
            keys=("",) * num_samples,
            answer_kinds=("",) * num_samples,
            questions=("",) * num_samples,
        )
