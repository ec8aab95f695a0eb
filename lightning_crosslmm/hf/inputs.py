"""Tensors as transformers hands them over, padded and on one device, as a `VideoBatch`, and the way back.

Axis letters:
    B  texts    L  tokens of the longest    F  frames of all visuals    C H W  channels, pixel rows and columns
    V  visuals    M  tokens of all texts, padding left out
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_crosslmm.batch import IGNORED, VISUAL_MARK, VideoBatch, picture
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.placement import Layout

NS_PER_S = 10**9


@dataclass(frozen=True)
class Inputs:
    """What the processor makes and the model reads.

    Args:
        input_ids: (B, L) int64; a mark where a visual stands.
        attention_mask: (B, L), 1 where a token is real; None where all are.
        pixel_values: (F, C, H, W) uint8, frames of all visuals in the order of their marks; None without visuals.
        num_frames: (V,) int64, frames of each visual.
        frame_time_ns: (F,) int64, since the start of the frame's video. In whole numbers, because
            ``inputs.to(device, torch.bfloat16)`` is everyone's habit and would round seconds.
        answer_index: (B, L) int64, which answer of its text a token belongs to, -1 elsewhere; for poolers that read the
            question. None where no text holds an answer, or it lies in `labels` alone.
        labels: (B, L) int64, -100 where nothing is to be predicted.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    pixel_values: Tensor | None = None
    num_frames: Tensor | None = None
    frame_time_ns: Tensor | None = None
    answer_index: Tensor | None = None
    labels: Tensor | None = None

    def mask(self) -> Tensor:
        """Which places hold a token, on the CPU."""
        if self.attention_mask is None:
            return torch.ones(self.input_ids.shape, dtype=torch.bool)
        return self.attention_mask.bool().cpu()

    def batch(self, mark_ids: tuple[int, int], image_size: int) -> VideoBatch:
        """Take the padding off and bring boundaries to the CPU.

        Args:
            mark_ids: of images and of videos.
            image_size: pixels per side that the encoder expects.

        Raises:
            UserError: marks and visuals, or frames and their counts, disagree.
        """
        real_BL = self.mask()
        ids_M = self.input_ids.cpu()[real_BL]
        is_mark_M = torch.isin(ids_M, torch.tensor(mark_ids))
        lengths_B = real_BL.sum(1)
        sample_M = torch.repeat_interleave(torch.arange(len(lengths_B)), lengths_B)
        frames_FCHW, counts_V, times_ns_F = self._frames(image_size)
        if len(counts_V) != int(is_mark_M.sum()) or {int(counts_V.sum()), len(times_ns_F)} != {len(frames_FCHW)}:
            raise UserError(
                f"input_ids holds {int(is_mark_M.sum())} marks of visuals (ids {mark_ids[0]} and {mark_ids[1]}), "
                f"num_frames tells of {len(counts_V)} visuals with {int(counts_V.sum())} frames, pixel_values holds "
                f"{len(frames_FCHW)}; give every text of the batch together with its own videos and images"
            )
        pictures = [
            picture("image" if mark == mark_ids[0] else "video", image_size) for mark in ids_M[is_mark_M].tolist()
        ]
        labels_M = torch.full_like(ids_M, IGNORED) if self.labels is None else self.labels.cpu()[real_BL]
        return VideoBatch(
            frames_FCHW=frames_FCHW,
            frame_time_s_F=(times_ns_F.double() / NS_PER_S).float(),
            visual_offsets=_offsets(counts_V),
            sample_of_visual=sample_M[is_mark_M],
            ids_L=ids_M.masked_fill(is_mark_M, VISUAL_MARK),
            labels_L=labels_M.masked_fill(is_mark_M, IGNORED),
            answer_L=self._answers(real_BL, labels_M, sample_M),
            text_offsets=_offsets(lengths_B),
            row_of_sample=torch.arange(len(lengths_B)),
            keys=tuple(f"text {number}" for number in range(len(lengths_B))),
            answer_kinds=(),
            questions=(),
            picture_V4=torch.tensor(pictures, dtype=torch.int64).view(-1, 4),
        )

    def _frames(self, image_size: int) -> tuple[Tensor, Tensor, Tensor]:
        none = torch.zeros(0, dtype=torch.int64)
        if self.pixel_values is None:
            blank_FCHW = torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8, device=self.input_ids.device)
            return blank_FCHW, none, none
        if self.pixel_values.dtype != torch.uint8 or self.num_frames is None or self.frame_time_ns is None:
            raise UserError(
                f"pixel_values is {self.pixel_values.dtype}; it must be uint8 and come with num_frames and "
                "frame_time_ns, as the processor gives them"
            )
        return self.pixel_values, self.num_frames.cpu(), self.frame_time_ns.cpu()

    def _answers(self, real_BL: Tensor, labels_M: Tensor, sample_M: Tensor) -> Tensor:
        """Number the answers of all texts; without `answer_index` a stretch of labels is one."""
        if self.answer_index is not None:
            index_M = self.answer_index.cpu()[real_BL]
        else:
            index_M = torch.where(labels_M == IGNORED, -1, 0)
        before_M = torch.cat([index_M.new_full((1,), -1), index_M[:-1]])
        is_first_M = (index_M >= 0) & ((index_M != before_M) | (sample_M.diff(prepend=sample_M[:1]) > 0))
        return torch.where(index_M >= 0, is_first_M.long().cumsum(0) - 1, -1)


def place_of_tokens(batch: VideoBatch, layout: Layout) -> Tensor:
    """Say at which flat position of the LLM's rows each token of the texts stands: (M,) int64 on the CPU.

    A mark stands where the last pooled token before the next word does: what is computed there predicts that word.

    Args:
        batch: one sample per row.
        layout: of the batch, padded on the right.
    """
    is_mark_M = batch.ids_L == VISUAL_MARK
    filled_R = (layout.sample_RT >= 0).sum(1)
    end_B = (torch.arange(layout.num_rows) * layout.num_positions + filled_R)[batch.row_of_sample]
    sample_M = torch.repeat_interleave(torch.arange(batch.num_samples), batch.text_offsets.diff())
    place_M = end_B[sample_M]
    place_M[~is_mark_M] = layout.text_position
    next_M = place_M.flip(0).cummin(0).values.flip(0)  # positions rise, so the next word's is the least from here on
    return torch.where(is_mark_M, next_M.minimum(end_B[sample_M]) - 1, place_M)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
