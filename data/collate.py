"""From samples to a batch: everything one after the other, boundaries beside it, no padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data.stream import Sample
from lightning_crosslmm.batch import VideoBatch


def collate(samples: Sequence[Sample], samples_per_row: int = 1) -> VideoBatch:
    """Put samples together.

    Args:
        samples: at least one.
        samples_per_row: neighbours that share a row of the LLM's batch without seeing each other.

    Returns:
        The batch, on the CPU.
    """
    frames_per_visual = [count for sample in samples for count in sample.frames_per_visual]
    sample_of_visual = [number for number, sample in enumerate(samples) for _ in sample.frames_per_visual]
    first_answer = _offsets([len(sample.answer_kinds) for sample in samples]).tolist()
    answer = [
        number + first if number >= 0 else -1
        for sample, first in zip(samples, first_answer, strict=False)
        for number in sample.text.answer
    ]
    return VideoBatch(
        frames_FCHW=torch.cat([sample.frames_FCHW for sample in samples]),
        frame_time_s_F=torch.cat([sample.frame_time_s_F for sample in samples]),
        visual_offsets=_offsets(frames_per_visual),
        sample_of_visual=torch.tensor(sample_of_visual, dtype=torch.int64),
        ids_L=torch.tensor([number for sample in samples for number in sample.text.ids], dtype=torch.int64),
        labels_L=torch.tensor([number for sample in samples for number in sample.text.labels], dtype=torch.int64),
        answer_L=torch.tensor(answer, dtype=torch.int64),
        text_offsets=_offsets([len(sample.text.ids) for sample in samples]),
        row_of_sample=torch.arange(len(samples)) // samples_per_row,
        keys=tuple(sample.key for sample in samples),
        answer_kinds=tuple(kind for sample in samples for kind in sample.answer_kinds),
        questions=tuple(question for sample in samples for question in sample.questions),
    )


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
