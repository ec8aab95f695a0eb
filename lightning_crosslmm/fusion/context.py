"""What travels through the LLM beside the hidden states, as one argument: source tokens, and who reads which.

Axis letters:
    S  source tokens    E  their width    Q  queries of a branch    R T  rows and positions of the LLM batch
    D  LLM width
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_crosslmm.fusion.attention import Spans
from lightning_crosslmm.fusion.cache import load, store
from lightning_crosslmm.fusion.keys import Held
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


@dataclass
class FusionContext:
    """Source tokens and visibility of one batch, for every fused layer; while answering, what is kept of them.

    Args:
        source_SE: source tokens of unit RMS, what keys and values are made from. Empty once the prompt has gone through
            and something smaller is kept.
        v2v: queries of the pooled tokens, or None where there are none.
        t2v: queries of the text tokens, or None.
        shared: what groups of layers share, by first layer and set of keys (`FusionSources`).
        row_spans: for text that follows the prompt: per row, the (start, end) of all its sources, or None for a row
            without.
        prompt_length: T of the prompt; positions from there on are generated text.
        t2v_cache: how what text reads is kept for the text that follows (see `Fusion`); None while training, because a
            tensor kept inside a checkpointed region would break its recomputation.
        kept: what is kept, by the first layer of a group.
        is_following: whether this call is of text that follows.
        looks: collects (layer, branch, attention weights per group) for pictures; None otherwise.
        source_map: from patches to source tokens, for pictures.
        followers: who asks in calls of so many new positions, so that each token need not work it out anew.
    """

    source_SE: Tensor
    v2v: Queries | None
    t2v: Queries | None
    shared: dict[int, dict[str, Held]] = field(default_factory=dict, repr=False)
    row_spans: tuple[tuple[int, int] | None, ...] = ()
    prompt_length: int = 0
    t2v_cache: str | None = None
    kept: dict[int, Held] = field(default_factory=dict, repr=False)
    is_following: bool = False
    looks: list[tuple[int, str, list[Tensor]]] | None = field(default=None, repr=False)
    source_map: SourceMap | None = None
    followers: dict[int, Queries | None] = field(default_factory=dict, repr=False)

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
        if num_positions not in self.followers:
            self.followers[num_positions] = self._following(num_positions)
        if self.keeps_keys:  # the prompt has gone through: nothing reads these again
            self.source_SE, self.shared = self.source_SE.new_empty(0, self.source_SE.shape[-1]), {}
        return replace(self, v2v=None, t2v=self.followers[num_positions], is_following=True)

    @property
    def keeps_keys(self) -> bool:
        """Whether fused layers keep something of their own, instead of the source tokens."""
        return self.t2v_cache not in (None, "recompute")

    def keep(self, group: int, make: Callable[[], Held]) -> Held:
        """Give what text reads in a group of layers: what was kept of it, or what `make` gives, kept from now on."""
        if group not in self.kept:
            held = make()
            self.kept[group] = store(held, self.t2v_cache or "")
            return held
        # the prompt itself reads what is exact, also in the second layer of a group
        return load(self.kept[group], self.t2v_cache or "", self.source_SE.dtype) if self.is_following else make()

    def cache_bytes(self) -> int:
        """Count the bytes that answering keeps of the source tokens, whatever the number of tokens that follow."""
        kept = (
            [self.source_SE]
            if self.t2v_cache == "recompute"
            else [each for held in self.kept.values() for each in held]
        )
        return sum(tensor.nbytes for tensor in kept)

    def _following(self, num_positions: int) -> Queries | None:
        seeing = [(row, *span) for row, span in enumerate(self.row_spans) if span is not None]
        if not seeing:
            return None
        row_G, start_G, end_G = torch.tensor(seeing).unbind(dim=1)
        position_Q = (row_G[:, None] * num_positions + torch.arange(num_positions)).flatten()
        spans = Spans(torch.arange(len(seeing) + 1) * num_positions, start_G, end_G)
        return Queries(position_Q.to(self.source_SE.device), spans)
