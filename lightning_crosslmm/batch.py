"""The batch: what the data side hands to the model, flat, with boundaries.

Axis letters:
    F  frames of all visuals in the batch       C H W  channels, pixel rows, pixel columns
    V  visuals (videos and images)              B      samples (conversations)
    L  text tokens of all samples, marks included
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

VISUAL_MARK = -200
"""Stands in ``ids_L`` where a visual's pooled tokens go. Negative, so it can be no token of any vocabulary."""

IGNORED = -100
"""Stands in ``labels_L`` where nothing is to be predicted."""


SHARED_BYTES = 1 << 19
"""Frames of so many bytes or more reach the training process in shared memory, which costs more than to copy fewer."""


class Skipped(NamedTuple):
    """A damaged sample that was left out: where its shard lies, its key, and what is wrong with it."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class VideoBatch:
    """Samples with their frames and text, packed without padding.

    Only frames move to the accelerator. Text, boundaries and times stay on the CPU: the layout is computed there, so
    that nothing waits for the accelerator to tell a count, and what the model needs of it moves in one go.

    Args:
        frames_FCHW: uint8, frames of all visuals one after the other, already at the encoder's size. F may be 0.
        frame_time_s_F: float32, seconds from the start of the frame's video; 0 for an image.
        visual_offsets: (V+1,) int64, the frames of visual v are ``[v], [v+1]``. Visuals stand in the order of their
            marks.
        sample_of_visual: (V,) int64, not decreasing.
        ids_L: int64 token ids of all samples one after the other, ``VISUAL_MARK`` where a visual stands.
        labels_L: int64, the token's own id where it is part of an answer (no shift), ``IGNORED`` elsewhere.
        answer_L: int64, index into ``answer_kinds`` where a label stands, -1 elsewhere.
        text_offsets: (B+1,) int64, the text of sample b is ``[b], [b+1]``.
        row_of_sample: (B,) int64, row of the LLM batch; samples of one row are packed neighbours that never see each
            other.
        keys: B sample keys, for messages and records; "" for a stand-in where no sample is left.
        answer_kinds: the question type of each answer, "" where the data names none.
        questions: what each answer answers, for pictures and records.
        answer_facts: texts and numbers that the data tell of each answer, for metrics: its ``item``, its ``depth``.
        skipped: samples that should be here and are damaged.
        picture_V4: (V, 4) int64: of an image its height and width in pixels, before it was resized, and the rows and
            columns of the tiles that its frames show after the first, which shows the whole (0 0 for none); of a video
            four zeros. None where nobody told: then an image is a video of one frame.
    """

    frames_FCHW: Tensor
    frame_time_s_F: Tensor
    visual_offsets: Tensor
    sample_of_visual: Tensor
    ids_L: Tensor
    labels_L: Tensor
    answer_L: Tensor
    text_offsets: Tensor
    row_of_sample: Tensor
    keys: tuple[str, ...]
    answer_kinds: tuple[str, ...]
    questions: tuple[str, ...]
    answer_facts: tuple[Mapping[str, str | float], ...] = ()
    skipped: tuple[Skipped, ...] = ()
    picture_V4: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes by value, but for many frames: those in shared memory."""
        values = [getattr(self, field.name) for field in fields(self)]
        is_light = [isinstance(value, Tensor) and value.is_cpu and value.nbytes < SHARED_BYTES for value in values]
        return _arrived, (
            type(self),
            [value.numpy() if light else value for value, light in zip(values, is_light, strict=True)],
        )

    @property
    def num_samples(self) -> int:
        """How many conversations the batch holds."""
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Move the frames to a device."""
        return replace(self, frames_FCHW=self.frames_FCHW.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Put the frames into page-locked memory."""
        return replace(self, frames_FCHW=self.frames_FCHW.pin_memory())

    def validate(self) -> None:
        """Check that counts, marks, boundaries and dtypes fit together.

        Raises:
            ValueError: names the samples' keys and the two counts that disagree.
        """
        who = f"batch of {list(self.keys)}"
        _check_offsets(self.visual_offsets, len(self.frames_FCHW), f"{who}: visual_offsets and frames")
        _check_offsets(self.text_offsets, len(self.ids_L), f"{who}: text_offsets and ids")
        if self.frames_FCHW.dtype != torch.uint8 or self.frames_FCHW.ndim != 4:
            raise ValueError(
                f"{who}: frames must be uint8 (F, C, H, W), got {self.frames_FCHW.dtype} "
                f"{tuple(self.frames_FCHW.shape)}"
            )
        if len(self.frame_time_s_F) != len(self.frames_FCHW):
            raise ValueError(f"{who}: {len(self.frame_time_s_F)} frame times for {len(self.frames_FCHW)} frames")
        if len(self.text_offsets) - 1 != self.num_samples or len(self.row_of_sample) != self.num_samples:
            raise ValueError(
                f"{who}: {self.num_samples} keys, {len(self.text_offsets) - 1} texts, {len(self.row_of_sample)} rows"
            )
        if not (len(self.ids_L) == len(self.labels_L) == len(self.answer_L)):
            raise ValueError(
                f"{who}: {len(self.ids_L)} ids, {len(self.labels_L)} labels, {len(self.answer_L)} answer indices"
            )
        sample_L = torch.repeat_interleave(torch.arange(self.num_samples), self.text_offsets.diff())
        marks_B = torch.bincount(sample_L[self.ids_L == VISUAL_MARK], minlength=self.num_samples)
        visuals_B = torch.bincount(self.sample_of_visual, minlength=self.num_samples)
        if not torch.equal(marks_B, visuals_B):
            raise ValueError(f"{who}: marks per sample {marks_B.tolist()} but visuals per sample {visuals_B.tolist()}")
        first_L = self.text_offsets[:-1][self.text_offsets.diff() > 0]
        if (self.labels_L[first_L] != IGNORED).any():
            raise ValueError(f"{who}: a sample's first token is a label, and nothing stands before it to predict it")
        if (self.sample_of_visual.diff() < 0).any():
            raise ValueError(f"{who}: sample_of_visual decreases: {self.sample_of_visual.tolist()}")
        if self.picture_V4 is not None:
            frames_V, tiles_V = self.visual_offsets.diff(), self.picture_V4[:, 2:].prod(dim=1)
            if len(tiles_V) != len(frames_V):
                raise ValueError(f"{who}: {len(tiles_V)} pictures for {len(frames_V)} visuals")
            if ((self.picture_V4[:, 0] > 0) & (frames_V != 1 + tiles_V)).any():
                raise ValueError(f"{who}: {frames_V.tolist()} frames for images of 1 + {tiles_V.tolist()} tiles")


def _arrived(kind: Any, values: list[Any]) -> VideoBatch:
    return kind(*(torch.from_numpy(value) if hasattr(value, "__array_interface__") else value for value in values))


def picture(kind: str, image_size: int) -> tuple[int, int, int, int]:
    """Give a visual's entry in `VideoBatch.picture_V4`, that of an image as a square without tiles.

    Args:
        kind: ``image`` or ``video``.
        image_size: height and width of its frame in pixels.
    """
    return (image_size, image_size, 0, 0) if kind == "image" else (0, 0, 0, 0)


def prompts_for(batch: VideoBatch, answers: Sequence[int]) -> VideoBatch:
    """Cut a batch down to the prompts of some of its answers: each one's sample up to where the answer begins.

    Earlier turns stay, with their right answers; visuals that are marked later go.

    Args:
        batch: samples with labels.
        answers: numbers of answers in the batch; a sample may be asked several times.

    Returns:
        One sample per answer, each in a row of its own, without labels; ``answer_L`` still tells earlier answers.
    """
    sample_L = torch.repeat_interleave(torch.arange(batch.num_samples), batch.text_offsets.diff())
    ids, earlier, frames, times, frames_per_visual, sample_of_visual, keys = [], [], [], [], [], [], []
    visuals: list[int] = []
    for number, answer in enumerate(answers):
        end = int((batch.answer_L == answer).nonzero()[0])
        sample = int(sample_L[end])
        ids.append(batch.ids_L[batch.text_offsets[sample] : end])
        earlier.append(batch.answer_L[batch.text_offsets[sample] : end])
        marked = int((ids[-1] == VISUAL_MARK).sum())
        for visual in (batch.sample_of_visual == sample).nonzero().flatten()[:marked].tolist():
            of_visual = slice(int(batch.visual_offsets[visual]), int(batch.visual_offsets[visual + 1]))
            frames.append(batch.frames_FCHW[of_visual])
            times.append(batch.frame_time_s_F[of_visual])
            frames_per_visual.append(len(frames[-1]))
            sample_of_visual.append(number)
            visuals.append(visual)
        keys.append(batch.keys[sample])
    ids_L = torch.cat(ids)
    return VideoBatch(
        frames_FCHW=torch.cat([batch.frames_FCHW[:0], *frames]),
        frame_time_s_F=torch.cat([batch.frame_time_s_F[:0], *times]),
        visual_offsets=torch.tensor([0, *frames_per_visual]).cumsum(0),
        sample_of_visual=torch.tensor(sample_of_visual, dtype=torch.int64),
        ids_L=ids_L,
        labels_L=torch.full_like(ids_L, IGNORED),
        answer_L=torch.cat(earlier),
        text_offsets=torch.tensor([0, *map(len, ids)]).cumsum(0),
        row_of_sample=torch.arange(len(ids)),
        keys=tuple(keys),
        answer_kinds=(),
        questions=(),
        picture_V4=None if batch.picture_V4 is None else batch.picture_V4[visuals],
    )


def blank_prompt(batch: VideoBatch) -> VideoBatch:
    """Give a prompt of one token and no visual, for a process that computes along with others and has nothing to ask.

    Args:
        batch: tells device and size of the frames that are not there.
    """
    none = torch.zeros(0, dtype=torch.int64)
    one = torch.zeros(1, dtype=torch.int64)
    return VideoBatch(
        frames_FCHW=batch.frames_FCHW[:0],
        frame_time_s_F=batch.frame_time_s_F[:0],
        visual_offsets=one,
        sample_of_visual=none,
        ids_L=one,
        labels_L=one + IGNORED,
        answer_L=one - 1,
        text_offsets=torch.tensor([0, 1]),
        row_of_sample=one,
        keys=("",),
        answer_kinds=(),
        questions=(),
    )


def question_mask(batch: VideoBatch) -> Tensor:
    """Tell which tokens are a sample's question: its text before the first answer, visual marks left out.

    Later questions of a conversation are not part of it: they follow an answer, and no answer may be seen.

    Returns:
        (L,) bool on the CPU.
    """
    return _is_unanswered(batch) & (batch.ids_L != VISUAL_MARK)


def asked_visuals(batch: VideoBatch) -> Tensor:
    """Tell which visuals a sample's question has: those marked before its first answer.

    Returns:
        (V,) bool on the CPU.
    """
    return _is_unanswered(batch)[batch.ids_L == VISUAL_MARK]


def _is_unanswered(batch: VideoBatch) -> Tensor:
    sample_L = torch.repeat_interleave(torch.arange(batch.num_samples), batch.text_offsets.diff())
    answered_L = (batch.answer_L >= 0).long().cumsum(0)
    before_B = torch.cat([answered_L.new_zeros(1), answered_L])[batch.text_offsets[:-1]]
    return answered_L == before_B[sample_L]


def _check_offsets(offsets: Tensor, total: int, what: str) -> None:
    if offsets.device.type != "cpu" or offsets.dtype != torch.int64:
        raise ValueError(f"{what}: offsets must be int64 on the CPU, got {offsets.dtype} on {offsets.device}")
    if offsets[0] != 0 or offsets[-1] != total or (offsets.diff() < 0).any():
        raise ValueError(f"{what}: offsets {offsets.tolist()} must rise from 0 to {total}")
