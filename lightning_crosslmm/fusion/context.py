"""What travels through the LLM beside the hidden states, as one argument: source tokens, and who reads which.

Axis letters:
    S  source tokens    E  their width    Q  queries of a branch    R T  rows and positions of the LLM batch
    D  LLM width
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_crosslmm.fusion.attention import Spans
from lightning_crosslmm.tokens import SourceMap


@dataclass(frozen=True)
class Queries:
    """The positions of a branch and the ranges they read.

    Args:
        position_Q: int64 on the model's device, index into the flattened (R*T) positions.
        spans: ranges of source tokens, one group after the other in the order of `position_Q`.
        weight: 1, or 0 for a blank query that keeps the branch's parameters in the graph of a rank without visuals.
    """

    position_Q: Tensor
    spans: Spans
    weight: float = 1.0


@dataclass(frozen=True)
class FusionContext:
    """Source tokens and visibility of one batch, for every fused layer.

    Args:
        source_SE: what keys and values are made from.
        v2v: queries of the pooled tokens, or None where there are none.
        t2v: queries of the text tokens, or None.
        row_spans: for text that follows the prompt: per row, the (start, end) of all its sources, or None for a row
            without.
        prompt_length: T of the prompt; positions from there on are generated text.
        keys_values: T2V keys and values by layer, filled at the prompt and read for every new token; None while
            training, because a tensor kept inside a checkpointed region would break its recomputation.
        looks: collects (layer, branch, attention weights per group) for pictures; None otherwise.
        source_map: from patches to source tokens, for pictures.
    """

    source_SE: Tensor
    v2v: Queries | None
    t2v: Queries | None
    row_spans: tuple[tuple[int, int] | None, ...] = ()
    prompt_length: int = 0
    keys_values: dict[int, tuple[Tensor, Tensor]] | None = None
    looks: list[tuple[int, str, list[Tensor]]] | None = field(default=None, repr=False)
    source_map: SourceMap | None = None

    def at(self, past_length: int, num_positions: int) -> "FusionContext":
        """Say who asks in this call of the LLM: the prompt, or `num_positions` new text tokens per row after it.

        Raises:
            ValueError: the call starts inside the prompt; the prompt must go through in one piece.
        """
        if past_length == 0 and num_positions == self.prompt_length:
            return self
        if past_length < self.prompt_length:
            raise ValueError(
                f"positions {past_length} to {past_length + num_positions} cut a prompt of "
                f"{self.prompt_length}; it must go through whole"
            )
        return replace(self, v2v=None, t2v=self._following(num_positions))

    def _following(self, num_positions: int) -> Queries | None:
        seeing = [(row, *span) for row, span in enumerate(self.row_spans) if span is not None]
        if not seeing:
            return None
        row_G, start_G, end_G = torch.tensor(seeing).unbind(dim=1)
        position_Q = (row_G[:, None] * num_positions + torch.arange(num_positions)).flatten()
        spans = Spans(torch.arange(len(seeing) + 1) * num_positions, start_G, end_G)
        return Queries(position_Q.to(self.source_SE.device), spans)
