"""Virtual unmerging: where the patches of a batch would stand in the LLM if none had been merged.

Axis letters:
    B  samples    V  virtual tokens of a sample    L  text tokens with marks    X  virtual tokens of all samples
    S  patches    P  pooled tokens
"""

import torch

from lightning_crosslmm.batch import VISUAL_MARK, VideoBatch
from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.llm.virtual import MODES, Unmerging
from lightning_crosslmm.placement import Layout
from lightning_crosslmm.pooler import Pooler
from lightning_crosslmm.tokens import Partition, TokenSet


def check_unmerging(mode: str, pooler: Pooler) -> None:
    """Refuse to unmerge what was not merged.

    Raises:
        UserError: an unknown mode, or a pooler whose map does not lead every patch to one token.
    """
    if mode not in MODES:
        raise UserError(f"virtual_unmerging is '{mode}'; right are {', '.join(MODES)}{nearest(str(mode), MODES)}")
    if mode != "none" and not pooler.covers:
        raise UserError(
            f"virtual_unmerging={mode} puts every patch back into the token that holds it, and pooler "
            f"{type(pooler).__name__} keeps no such map; set virtual_unmerging=none, or choose a pooler that merges "
            f"(dymu, tome, folder)"
        )


def unmerge(
    batch: VideoBatch,
    pooled: TokenSet,
    layout: Layout,
    patches_per_frame: int,
    mode: str,
    max_positions: int | None,
) -> Unmerging:
    """Lay out the virtual tokens: text as it stands, and at each mark all patches of the visual in raster order.

    Source: Wang et al., "DyMU", arXiv:2504.17040, section 3.2 (virtual token unmerging), Eqs. (3) to (7).
    Differs: queries, keys and values are copied before they are turned, which is what the paper's identity expands to
        (and what its code does). The cache keeps one key per merged token and no position, from which ``expanded``
        makes all N for each new token: the paper's result to the last summand, in less memory and with more arithmetic.
        ``unique`` is ours: new tokens read each merged token once, at the mean place of its patches, with log(count) on
        its logit; exact where every token holds one patch. In both the prompt is read in full. Any number of
        visuals, samples and packed rows; the paper's code takes one image.

    Args:
        batch: samples with marks.
        pooled: its pooled tokens; their map leads every patch to one of them.
        layout: where they stand.
        patches_per_frame: of the encoder.
        mode: ``expanded`` or ``unique``.
        max_positions: the LLM's context length.

    Raises:
        UserError: a sample has more virtual tokens than the LLM's context.
    """
    source_map = pooled.source_map
    assert isinstance(source_map, Partition), "check_unmerging looked"
    is_mark_L = batch.ids_L == VISUAL_MARK
    size_L = torch.ones_like(batch.ids_L)
    size_L[is_mark_L] = pooled.visual_offsets.diff() * patches_per_frame
    sample_L = torch.repeat_interleave(torch.arange(batch.num_samples), batch.text_offsets.diff())
    is_patch_X, sample_X = is_mark_L.repeat_interleave(size_L), sample_L.repeat_interleave(size_L)
    length_B = torch.bincount(sample_X, minlength=batch.num_samples)
    longest = int(length_B.argmax())
    most = int(length_B[longest])
    if max_positions is not None and most > max_positions:
        raise UserError(
            f"sample '{batch.keys[longest]}' has {most} virtual tokens, the LLM's context is {max_positions}; use "
            "fewer frames (data.sampling), a shorter text, or virtual_unmerging=none"
        )
    device = source_map.pooled_of_source_S.device
    token_X = torch.empty(len(sample_X), dtype=torch.int64, device=device)
    token_X[(~is_patch_X).nonzero().flatten().to(device)] = layout.text_position.to(device)
    pooled_position_P = layout.pooled_position_P.to(device)
    token_X[is_patch_X.nonzero().flatten().to(device)] = pooled_position_P[source_map.pooled_of_source_S]
    place_X = torch.arange(len(sample_X)) - (length_B.cumsum(0) - length_B)[sample_X] + sample_X * most
    nobody = layout.num_rows * layout.num_positions
    token_BV = torch.full((batch.num_samples * most,), nobody, device=device).index_copy(0, place_X.to(device), token_X)
    return Unmerging(
        token_BV=token_BV.view(-1, most),
        length_B=length_B,
        row_B=batch.row_of_sample,
        shape=(layout.num_rows, layout.num_positions),
        is_exact=mode == "expanded",
    )


def check_room(unmerging: Unmerging | None, max_new_tokens: int, max_positions: int) -> None:
    """Refuse answers that would run past the LLM's context.

    Raises:
        UserError: virtual prompt and longest answer exceed it.
    """
    virtual = 0 if unmerging is None else int(unmerging.length_B.max())
    if unmerging is not None and virtual + max_new_tokens > max_positions:
        raise UserError(
            f"a prompt of {virtual} virtual tokens leaves room for {max_positions - virtual} in the LLM's context of "
            f"{max_positions}, decoding.max_new_tokens is {max_new_tokens}; shorten one of them, or set "
            "virtual_unmerging=none"
        )
