"""The contract of a pooler, checked after each call: for one's own poolers, and slow.

Axis letters:
    S  pooled tokens    N  source tokens of the map    F  frames    V  visuals    E  entries of a weighted map
"""

from typing import Any

import torch
from torch import Tensor

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler.base import Pooler
from lightning_crosslmm.taps import Questions
from lightning_crosslmm.tokens import Opaque, Partition, TokenSet

MASS_TOLERANCE = 1e-4  # relative; sums of thousands of single-precision masses


def check_pooled(
    pooler: Pooler,
    given: TokenSet,
    result: Any,
    width: int,
    grid: tuple[int, int],
    questions: Questions | None = None,
) -> None:
    """Check what a pooler made of a set against all that `Pooler` promises; it waits for the accelerator.

    Args:
        pooler: whose class the message names.
        given: the set it was called with.
        result: what it gave.
        width: what its `connect` said.
        grid: the encoder's rows and columns.
        questions: if it was given some.

    Raises:
        UserError: names the class, what is wrong, and what would be right.
    """
    pooled = result
    if isinstance(result, tuple) and len(result) == 2 and questions is not None:
        pooled, question_QD = result
        shape = tuple(questions.features_QD.shape)
        if not isinstance(question_QD, Tensor) or tuple(question_QD.shape) != shape or not question_QD.isfinite().all():
            raise UserError(
                f"pooler {type(pooler).__name__}: the question it gives must be finite embeddings of {shape}"
            )
    wrong = (
        _type(given, pooled, width)
        or _boundaries(given, pooled)
        or _counts(pooler.tokens_per_frame(grid), pooled)
        or _places(pooled)
        or _map(given, pooled)
        or _mass(pooled)
    )
    if wrong:
        raise UserError(f"pooler {type(pooler).__name__}: {wrong}")


def _type(given: TokenSet, pooled: Any, width: int) -> str:
    if not isinstance(pooled, TokenSet):
        return (
            f"gives {type(pooled).__name__}; it must give a TokenSet, or a pair of one and the question's embeddings "
            f"if it needs a question"
        )
    features_SD = pooled.features_SD
    if features_SD.ndim != 2 or not features_SD.is_floating_point():
        return f"features_SD is {features_SD.dtype} of shape {tuple(features_SD.shape)}; it must be floating (S, D)"
    if features_SD.shape[1] != width:
        return f"gives tokens of width {features_SD.shape[1]}, connect() said {width}; they must agree"
    if features_SD.device != given.features_SD.device:
        return f"gives tokens on {features_SD.device}; they must stay on {given.features_SD.device}"
    return ""


def _boundaries(given: TokenSet, pooled: TokenSet) -> str:
    try:
        pooled.validate()
    except ValueError as error:
        return f"{error}; mend what forward() gives"
    for name in ("visual_offsets", "sample_of_visual", "frame_time_s_F"):
        before, after = getattr(given, name), getattr(pooled, name)
        if not torch.equal(before, after):
            return (
                f"changes {name} from {before.tolist()} to {after.tolist()}; frames and visuals stay as they are, "
                f"and a frame may end with no token"
            )
    return ""


def _counts(promised: int | None, pooled: TokenSet) -> str:
    counts_F = pooled.frame_offsets.diff()
    if promised is not None and (counts_F != promised).any():
        return (
            f"gives {counts_F.tolist()} tokens per frame, tokens_per_frame() said {promised}; "
            f"they must agree, or it must say None"
        )
    return ""


def _places(pooled: TokenSet) -> str:
    if pooled.coordinate_S3.shape != (pooled.num_tokens, 3) or not pooled.coordinate_S3.isfinite().all():
        return f"coordinate_S3 is {tuple(pooled.coordinate_S3.shape)} or not finite; it must be finite (S, 3)"
    if not (pooled.mass_S.isfinite() & (pooled.mass_S >= 0)).all():
        return (
            f"mass_S holds {float(pooled.mass_S.min())} or is not finite; it counts patches, 0 where a token has none"
        )
    return ""


def _map(given: TokenSet, pooled: TokenSet) -> str:
    source_map, num_sources = pooled.source_map, given.source_map.num_sources
    if source_map.num_sources != num_sources:
        return (
            f"source_map starts from {source_map.num_sources} tokens, there are {num_sources} patches; "
            f"chain it: source_map=compose(tokens.source_map, ...)"
        )
    if isinstance(source_map, Opaque):
        return ""
    if isinstance(source_map, Partition):
        source_E = (source_map.pooled_of_source_S != -1).nonzero().flatten()
        pooled_E = source_map.pooled_of_source_S[source_E]
    else:
        pooled_E, source_E = source_map.pooled_E, source_map.source_E
    for name, index_E, size in (("pooled", pooled_E, pooled.num_tokens), ("source", source_E, num_sources)):
        if ((index_E < 0) | (index_E >= size)).any():
            return f"source_map names a {name} token {_worst(index_E, size)}; there are 0 to {size - 1}"
    weighted = source_map.weighted()
    total_S = weighted.weight_E.new_zeros(pooled.num_tokens).index_add(0, weighted.pooled_E, weighted.weight_E)
    off_S = (total_S - (pooled.mass_S > 0).float()).abs().nan_to_num(torch.inf)  # a group may have found no patch
    if (off_S > MASS_TOLERANCE).any():
        token = int(off_S.argmax())
        return (
            f"weights of token {token} in source_map sum to {float(total_S[token]):.4g}, its mass is "
            f"{float(pooled.mass_S[token]):.4g}; they must sum to 1, or be none where the mass is 0"
        )
    return _crossing(given, pooled, pooled_E, source_E)


def _worst(index_E: Tensor, size: int) -> int:
    return int(index_E[((index_E < 0) | (index_E >= size)).nonzero()[0]])


def _crossing(given: TokenSet, pooled: TokenSet, pooled_E: Tensor, source_E: Tensor) -> str:
    """No token may hold a patch of another visual; asked only where each source token is a patch."""
    if given.source_map.num_sources != given.num_tokens:
        return ""
    visual_of_pooled_S, visual_of_source_N = (
        torch.repeat_interleave(torch.arange(each.num_visuals), each.token_offsets_of_visual.diff()).to(pooled_E.device)
        for each in (pooled, given)
    )
    crossing_E = visual_of_pooled_S[pooled_E] != visual_of_source_N[source_E]
    if not crossing_E.any():
        return ""
    entry = int(crossing_E.nonzero()[0])
    return (
        f"token {int(pooled_E[entry])} of visual {int(visual_of_pooled_S[pooled_E[entry]])} holds patch "
        f"{int(source_E[entry])} of visual {int(visual_of_source_N[source_E[entry]])}; visuals must not mix"
    )


def _mass(pooled: TokenSet) -> str:
    source_map = pooled.source_map
    if not isinstance(source_map, Partition):
        return ""
    # every patch has one owner, so a token's mass is no opinion: it counts its patches
    table_N = source_map.pooled_of_source_S
    counts_S = torch.bincount(table_N[table_N >= 0], minlength=pooled.num_tokens)
    off_S = (pooled.mass_S - counts_S).abs() > MASS_TOLERANCE * counts_S
    if not off_S.any():
        return ""
    token = int(off_S.nonzero()[0])
    return (
        f"token {token} has mass {float(pooled.mass_S[token]):.6g}, source_map gives it {int(counts_S[token])} "
        f"patches; mass_S must count them"
    )
