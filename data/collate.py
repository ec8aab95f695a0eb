"""From samples to a batch: everything one after the other, boundaries beside it, no padding."""

from collections.abc import Iterable, Sequence
from itertools import chain
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from data.stream import Sample
from lightning_crosslmm.batch import IGNORED, SHARED_BYTES, Skipped, VideoBatch
from lightning_crosslmm.text import Text


def collate(items: Sequence[tuple[int, Sample | Skipped]], image_size: int) -> VideoBatch:
    """Put samples together.

    Samples that had to be left out leave no gap: their row is made of those that stay, and goes if none does. Where no
    sample stays at all, one token that asks and answers nothing stands for the batch, so that its process takes part in
    the step; it adds nothing to the loss and has no gradient.

    Args:
        items: (row, sample) with rows rising; what is reported instead of a sample is carried along.
        image_size: height and width of a frame in pixels.

    Returns:
        The batch, on the CPU.
    """
    kept = [(row, sample) for row, sample in items if isinstance(sample, Sample)]
    skipped = tuple(reported for _, reported in items if isinstance(reported, Skipped))
    rows, samples = zip(*kept or [(0, _blank(image_size))], strict=True)
    frames_per_visual = [count for sample in samples for count in sample.frames_per_visual]
    sample_of_visual = [number for number, sample in enumerate(samples) for _ in sample.frames_per_visual]
    first_answer = _offsets([len(sample.answer_kinds) for sample in samples]).tolist()
    answer = (
        number + first if number >= 0 else -1
        for sample, first in zip(samples, first_answer, strict=False)
        for number in sample.text.answer
    )
    return VideoBatch(
        frames_FCHW=_together([sample.frames_FCHW for sample in samples]),
        frame_time_s_F=torch.cat([sample.frame_time_s_F for sample in samples]),
        visual_offsets=_offsets(frames_per_visual),
        sample_of_visual=torch.tensor(sample_of_visual, dtype=torch.int64),
        ids_L=_numbers(chain.from_iterable(sample.text.ids for sample in samples)),
        labels_L=_numbers(chain.from_iterable(sample.text.labels for sample in samples)),
        answer_L=_numbers(answer),
        text_offsets=_offsets([len(sample.text.ids) for sample in samples]),
        row_of_sample=torch.unique_consecutive(torch.tensor(rows), return_inverse=True)[1],
        keys=tuple(sample.key for sample in samples),
        answer_kinds=tuple(kind for sample in samples for kind in sample.answer_kinds),
        questions=tuple(question for sample in samples for question in sample.questions),
        answer_facts=tuple(facts for sample in samples for facts in sample.answer_facts),
        skipped=skipped,
        picture_V4=torch.tensor(
            [each for sample in samples for each in sample.pictures or ((0,) * 4,) * len(sample.frames_per_visual)],
            dtype=torch.int64,
        ).view(-1, 4),
    )


def _together(parts_FCHW: Sequence[Tensor]) -> Tensor:
    """Join frames; many of them in a worker straight into memory that the training process maps, which saves a copy."""
    shape = (sum(map(len, parts_FCHW)), *parts_FCHW[0].shape[1:])
    if get_worker_info() is None or prod(shape) < SHARED_BYTES:
        return torch.cat(list(parts_FCHW))
    shared = torch.UntypedStorage._new_shared(prod(shape))
    return torch.cat(list(parts_FCHW), out=torch.empty(0, dtype=torch.uint8).set_(shared, 0, shape))


def _blank(image_size: int) -> Sample:
    no_frames_FCHW = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    return Sample("", no_frames_FCHW, torch.empty(0), (), Text([0], [IGNORED], [-1]), (), ())


def _numbers(numbers: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.fromiter(numbers, np.int64))  # torch takes four times as long to read a list


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
