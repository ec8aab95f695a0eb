"""Placement: pooled tokens at their marks, samples in rows, and who may see what.

All of it is arithmetic on counts, done on the CPU before the LLM runs; the model gets index tensors.

Axis letters:
    B  samples    V  visuals    L  text tokens with marks
    M  slots: text tokens and pooled tokens, all samples one after the other
    R T  rows and positions of the LLM batch    P  pooled tokens    Y  predicted tokens    G  groups of queries
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_crosslmm.batch import IGNORED, VISUAL_MARK, VideoBatch
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion import FusionContext, Held, Queries, Spans
from lightning_crosslmm.tokens import TokenSet


@dataclass(frozen=True)
class Layout:
    """Where everything stands in the LLM batch. All tensors int64 on the CPU.

    Args:
        num_rows: R.
        num_positions: T.
        text_ids_M: ids of the text slots, in order.
        text_position: flat position (row * T + column) of each text slot.
        pooled_position_P: flat position of each pooled token.
        sample_RT: the sample at each position, -1 where a row is padding.
        position_RT: position ids, from 0 in each sample.
        predict_position_Y: flat position whose output predicts a label.
        target_Y: the label.
        answer_Y: the answer it belongs to.
        v2v: ranges for the pooled tokens, in the order of `pooled_position_P`; None without visuals.
        t2v_position: flat position of each text token that sees a visual.
        t2v: ranges for them; None where no text sees any.
        row_spans: per row, the range of all its sources, or None; for text that follows (one sample per row).
        is_packed: whether some row holds more than one sample.
    """

    num_rows: int
    num_positions: int
    text_ids_M: Tensor
    text_position: Tensor
    pooled_position_P: Tensor
    sample_RT: Tensor
    position_RT: Tensor
    predict_position_Y: Tensor
    target_Y: Tensor
    answer_Y: Tensor
    v2v: Spans | None
    t2v_position: Tensor
    t2v: Spans | None
    row_spans: tuple[tuple[int, int] | None, ...]
    is_packed: bool


def place(
    batch: VideoBatch,
    pooled: TokenSet,
    source: TokenSet,
    *,
    scope: str = "all",
    window_frames: int | None = None,
    pad_left: bool = False,
    max_positions: int | None = None,
) -> Layout:
    """Lay a batch out in rows and say who sees which source tokens.

    Source: CrossLMM, arXiv:2505.17020v1, section 3.1 (I = [V; T]) and 3.3; Eqs. (6), (9) for what is read.
    Differs: the paper describes one video before the text. Here marks stand anywhere, and a text token sees only what
        was marked before it in its own sample, so that interleaved and packed samples leak nothing.

    Args:
        batch: samples with marks.
        pooled: pooled tokens of the batch's visuals.
        source: source tokens of the same visuals and frames.
        scope: what a pooled token sees: ``all``, ``frame`` or ``window``.
        window_frames: frames to either side for ``window``.
        pad_left: pad rows on the left, as generation wants.
        max_positions: the LLM's context length.

    Raises:
        UserError: a sample is longer than the LLM's context.
    """
    is_mark_L = batch.ids_L == VISUAL_MARK
    size_L = torch.ones_like(batch.ids_L)
    size_L[is_mark_L] = pooled.token_offsets_of_visual.diff()
    slot_of_M = torch.repeat_interleave(torch.arange(len(size_L)), size_L)
    sample_L = torch.repeat_interleave(torch.arange(batch.num_samples), batch.text_offsets.diff())
    sample_M, is_pooled_M = sample_L[slot_of_M], is_mark_L[slot_of_M]
    slots_B = torch.bincount(sample_M, minlength=batch.num_samples)
    flat_M, position_M, num_rows, num_positions = _positions(batch, slots_B, sample_M, pad_left)
    _check_length(batch, slots_B, max_positions)
    sample_RT = torch.full((num_rows * num_positions,), -1).index_copy(0, flat_M, sample_M)
    position_RT = torch.zeros_like(sample_RT).index_copy(0, flat_M, position_M)
    label_M = torch.where(is_pooled_M, IGNORED, batch.labels_L[slot_of_M])
    label_slot_Y = (label_M != IGNORED).nonzero().flatten()
    seen_L = is_mark_L.long().cumsum(0)  # visuals of the batch marked so far
    t2v_slot, t2v = _text_ranges(batch, source, sample_M, seen_L[slot_of_M], is_pooled_M)
    return Layout(
        num_rows=num_rows,
        num_positions=num_positions,
        text_ids_M=batch.ids_L[slot_of_M][~is_pooled_M],
        text_position=flat_M[~is_pooled_M],
        pooled_position_P=flat_M[is_pooled_M],
        sample_RT=sample_RT.view(num_rows, num_positions),
        position_RT=position_RT.view(num_rows, num_positions),
        predict_position_Y=flat_M[label_slot_Y - 1],
        target_Y=label_M[label_slot_Y],
        answer_Y=batch.answer_L[slot_of_M][label_slot_Y],
        v2v=pooled_ranges(pooled, source, scope, window_frames),
        t2v_position=flat_M[t2v_slot],
        t2v=t2v,
        row_spans=_row_spans(batch, source, num_rows),
        is_packed=num_rows < batch.num_samples,
    )


def _check_length(batch: VideoBatch, slots_B: Tensor, max_positions: int | None) -> None:
    longest = int(slots_B.argmax())
    if max_positions is not None and slots_B[longest] > max_positions:  # positions begin anew with each sample of a row
        raise UserError(
            f"sample '{batch.keys[longest]}' has {int(slots_B[longest])} tokens, the LLM's context is "
            f"{max_positions}; use fewer frames (data.sampling), a smaller pooler grid, or a shorter text"
        )


def _positions(batch: VideoBatch, slots_B: Tensor, sample_M: Tensor, pad_left: bool) -> tuple[Tensor, Tensor, int, int]:
    # flat position and position id of each slot; samples of a row stand one after the other in the order of the batch
    row_B = batch.row_of_sample
    num_rows = int(row_B.max()) + 1
    start_B = torch.zeros_like(slots_B)
    filled_R = torch.zeros(num_rows, dtype=torch.int64)
    for sample, (row, slots) in enumerate(zip(row_B.tolist(), slots_B.tolist(), strict=True)):
        start_B[sample] = filled_R[row]
        filled_R[row] += slots
    num_positions = int(filled_R.max())
    if pad_left:
        start_B = start_B + (num_positions - filled_R)[row_B]
    first_B = slots_B.cumsum(0) - slots_B
    position_M = torch.arange(len(sample_M)) - first_B[sample_M]
    flat_M = row_B[sample_M] * num_positions + start_B[sample_M] + position_M
    return flat_M, position_M, num_rows, num_positions


def _text_ranges(
    batch: VideoBatch, source: TokenSet, sample_M: Tensor, seen_M: Tensor, is_pooled_M: Tensor
) -> tuple[Tensor, Spans | None]:
    # a text slot reads from its sample's first visual to the last one marked before it
    visuals_B = torch.bincount(batch.sample_of_visual, minlength=batch.num_samples)
    before_B = visuals_B.cumsum(0) - visuals_B
    sees_M = ~is_pooled_M & (seen_M > before_B[sample_M])
    slot = sees_M.nonzero().flatten()
    if len(slot) == 0:
        return slot, None
    # consecutive slots of one sample that have seen the same visuals are one group
    pairs = torch.stack([sample_M[slot], seen_M[slot]])
    (sample_G, seen_G), count_G = pairs.unique_consecutive(dim=1, return_counts=True)
    offsets = source.token_offsets_of_visual
    return slot, Spans(_offsets(count_G), offsets[before_B[sample_G]], offsets[seen_G])


def pooled_ranges(pooled: TokenSet, source: TokenSet, scope: str, window_frames: int | None) -> Spans | None:
    """Say which source tokens each pooled token reads.

    Args:
        pooled: pooled tokens.
        source: source tokens of the same visuals and frames.
        scope: ``all`` frames of the visual, its own ``frame``, or a ``window`` of `window_frames` to either side, cut
            at the visual's ends.
        window_frames: see `scope`.

    Returns:
        One group per visual or per frame, or None where there is no pooled token.
    """
    if scope == "all":
        count_G = pooled.token_offsets_of_visual.diff()
        start_G, end_G = source.token_offsets_of_visual[:-1], source.token_offsets_of_visual[1:]
    else:
        reach = 0 if window_frames is None else window_frames
        count_G = pooled.frame_offsets.diff()
        visual_F = torch.repeat_interleave(torch.arange(pooled.num_visuals), pooled.visual_offsets.diff())
        frame_F = torch.arange(pooled.num_frames)
        first_F = torch.maximum(frame_F - reach, pooled.visual_offsets[visual_F])
        last_F = torch.minimum(frame_F + reach + 1, pooled.visual_offsets[visual_F + 1])
        start_G, end_G = source.frame_offsets[first_F], source.frame_offsets[last_F]
    asks_G = (count_G > 0) & (end_G > start_G)
    return Spans(_offsets(count_G[asks_G]), start_G[asks_G], end_G[asks_G]) if asks_G.any() else None


def fusion_context(
    layout: Layout,
    source: TokenSet,
    unit_SE: Tensor,
    shared: dict[int, dict[str, Held]],
    *,
    is_training: bool,
    t2v_cache: str | None,
) -> FusionContext:
    """Write for the fused layers who reads which source tokens.

    Args:
        layout: of the batch.
        source: its source tokens.
        unit_SE: their features as fused layers read them.
        shared: what groups of layers share; both as `FusionSources` gives them.
        is_training: a branch that nobody asks still takes part in the graph, with weight 0.
        t2v_cache: as in `Fusion` where text will follow, else None.
    """
    device = source.features_SD.device
    v2v = None if layout.v2v is None else Queries(layout.pooled_position_P.to(device), layout.v2v)
    t2v = None if layout.t2v is None else Queries(layout.t2v_position.to(device), layout.t2v)
    if is_training:
        everything = Spans(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([source.num_tokens]))
        blank = Queries(torch.zeros(1, dtype=torch.int64, device=device), everything, weight=0.0)
        v2v, t2v = v2v or blank, t2v or blank
    return FusionContext(
        source_SE=unit_SE,
        v2v=v2v,
        t2v=t2v,
        shared=shared,
        row_spans=layout.row_spans,
        prompt_length=layout.num_positions,
        t2v_cache=t2v_cache,
        source_map=source.source_map,
    )


def _row_spans(batch: VideoBatch, source: TokenSet, num_rows: int) -> tuple[tuple[int, int] | None, ...]:
    spans: list[tuple[int, int] | None] = [None] * num_rows
    offsets = source.token_offsets_of_visual.tolist()
    for visual, sample in enumerate(batch.sample_of_visual.tolist()):
        row = int(batch.row_of_sample[sample])
        before = spans[row]
        spans[row] = (offsets[visual] if before is None else before[0], offsets[visual + 1])
    return tuple(spans)


def _offsets(count_G: Tensor) -> Tensor:
    return torch.cat([count_G.new_zeros(1), count_G.cumsum(0)])
