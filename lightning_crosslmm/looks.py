"""What the model made of pictures: which patches went into which tokens, and where both branches looked.

Axis letters:
    S  source tokens    N  patches    F  frames of a sample    H W  rows and columns of patches
    q n  queries and keys of a group    E  entries of a source map    P  pooled tokens
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.placement import Layout
from lightning_crosslmm.tokens import Opaque, SourceMap, TokenSet


@dataclass(frozen=True)
class Pooling:
    """What became of the patches of one sample. All tensors on the CPU.

    Args:
        pooler: name of its class.
        token_FHW: int64, the token that most of a patch went into, from 0 in each sample; -1 where it was dropped. None
            where tokens cannot be traced back to patches.
        strength_FHW: float32, 0 to 1, the patch's weight in that token against the heaviest patch of the token.
        holders_FHW: int64, how many tokens have a part of the patch.
        patches_P: int64, how many patches each token has a part of.
        mass_P: float32, how many patches each token stands for.
        tokens_F: int64, how many tokens stand at each frame.
    """

    pooler: str
    token_FHW: Tensor | None
    strength_FHW: Tensor
    holders_FHW: Tensor
    patches_P: Tensor
    mass_P: Tensor
    tokens_F: Tensor


@dataclass(frozen=True)
class Sight:
    """What the model made of the pictures of one prompt.

    Args:
        layers: (F, H, W) float32 on the CPU for each branch and number of a fused layer, ``("v2v", 2)``: the mean
            weight that pooled tokens gave each patch, or the weight that the last token before the answer gave it.
        pooling: None without pictures.
    """

    layers: Mapping[tuple[str, int], Tensor]
    pooling: Pooling | None

    def mean(self, branch: str) -> Tensor | None:
        """Average a branch, ``v2v`` or ``t2v``, over its layers; None where the model has none."""
        maps = [heat_FHW for (name, _), heat_FHW in self.layers.items() if name == branch]
        return torch.stack(maps).mean(dim=0) if maps else None


@dataclass(frozen=True)
class Look:
    """One sample, what was asked, and where the model looked before it answered.

    Args:
        key: of the sample.
        question: the text asked; empty where nothing was.
        answer: the model's.
        expected: the right one; None where nobody knows.
        frames_FCHW: uint8 frames of all visuals of the sample.
        v2v_FHW: float32, mean weight that its pooled tokens gave each patch; None without V2V.
        t2v_FHW: float32, weight that the last token before the answer gave each patch; None without T2V.
        frame_time_s_F: seconds from the start of the video; None where nobody told.
        sight: tokens, and attention layer by layer.
    """

    key: str
    question: str
    answer: str
    expected: str | None
    frames_FCHW: Tensor
    v2v_FHW: Tensor | None
    t2v_FHW: Tensor | None
    frame_time_s_F: Tensor | None = None
    sight: Sight = field(default_factory=lambda: Sight({}, None))


def attention_maps(model: CrossLMM, prompts: VideoBatch) -> list[dict[str, Tensor]]:
    """Run prompts and collect attention, averaged over heads, queries and fused layers.

    Args:
        model: its encoder gives a regular grid.
        prompts: one sample per row, each ending where its answer begins.

    Returns:
        Per sample, ``v2v`` and ``t2v`` as (F, H, W) float32 on the CPU, whichever the model has.
    """
    means = [{branch: sight.mean(branch) for branch in ("v2v", "t2v")} for sight in sights(model, prompts)]
    return [{branch: heat_FHW for branch, heat_FHW in mean.items() if heat_FHW is not None} for mean in means]


@torch.no_grad()
def sights(model: CrossLMM, prompts: VideoBatch) -> list[Sight]:
    """Run prompts and tell, for each, what became of its patches and where each fused layer looked.

    Args:
        model: its encoder gives a regular grid.
        prompts: one sample per row, each ending where its answer begins.
    """
    prompt = model.look(prompts)
    context = prompt.context
    heat: dict[tuple[str, int], Tensor] = {}
    if context is not None and context.source_map is not None:
        for layer, branch, weights in context.looks or []:
            heat_S = _collect(branch, weights, context.source_map.num_pooled, prompt.layout)
            heat[branch, layer] = _on_patches(heat_S, context.source_map)
    rows, columns = model.encoder.grid
    visuals = torch.searchsorted(prompts.sample_of_visual, torch.arange(prompts.num_samples + 1))
    bounds = prompts.visual_offsets[visuals].tolist()
    patches = rows * columns
    tracks = None if prompt.pooled is None else _Tracks(prompt.pooled, type(model.pooler).__name__, (rows, columns))
    found = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        layers = {
            name: heat_N[start * patches : end * patches].view(-1, rows, columns) for name, heat_N in heat.items()
        }
        found.append(Sight(layers, None if tracks is None else tracks.pooling(start, end)))
    return found


class _Tracks:
    """Where the patches of a batch went; those of a sample come from `pooling`."""

    def __init__(self, pooled: TokenSet, pooler: str, grid: tuple[int, int]) -> None:
        self.pooled, self.pooler, self.grid = pooled, pooler, grid
        self.is_traced = not isinstance(pooled.source_map, Opaque)
        num_patches, num_tokens = pooled.source_map.num_sources, pooled.source_map.num_pooled
        pooled_E = source_E = torch.zeros(0, dtype=torch.int64)
        weight_E = torch.zeros(0)
        if not isinstance(pooled.source_map, Opaque):
            shares = pooled.source_map.weighted()
            is_real_E = shares.weight_E > 0
            entries = (shares.pooled_E, shares.source_E, shares.weight_E.float())
            pooled_E, source_E, weight_E = (each[is_real_E].cpu() for each in entries)
        part_E = weight_E * pooled.mass_S.float().cpu()[pooled_E]  # how much of the patch is in this token
        most_N = torch.zeros(num_patches).scatter_reduce(0, source_E, part_E, "amax")
        is_most_E = part_E == most_N[source_E]
        owner_N = torch.full((num_patches,), num_tokens)
        owner_N = owner_N.scatter_reduce(0, source_E[is_most_E], pooled_E[is_most_E], "amin")  # of equals the first
        heaviest_P = torch.zeros(num_tokens).scatter_reduce(0, pooled_E, weight_E, "amax")
        is_owner_E = pooled_E == owner_N[source_E]
        self.strength_N = torch.zeros(num_patches)
        self.strength_N[source_E[is_owner_E]] = (weight_E / heaviest_P[pooled_E])[is_owner_E]
        self.owner_N = owner_N.where(owner_N < num_tokens, -1)
        self.holders_N = torch.bincount(source_E, minlength=num_patches)
        self.patches_P = torch.bincount(pooled_E, minlength=num_tokens)

    def pooling(self, start: int, end: int) -> Pooling:
        """Tell of the frames from `start` to `end`."""
        first, last = self.pooled.frame_offsets[[start, end]].tolist()
        size = self.grid[0] * self.grid[1]
        token_FHW, strength_FHW, holders_FHW = (
            each[start * size : end * size].view(-1, *self.grid)
            for each in (self.owner_N, self.strength_N, self.holders_N)
        )
        return Pooling(
            pooler=self.pooler,
            token_FHW=(token_FHW - first).where(token_FHW >= 0, -1) if self.is_traced else None,
            strength_FHW=strength_FHW,
            holders_FHW=holders_FHW,
            patches_P=self.patches_P[first:last],
            mass_P=self.pooled.mass_S[first:last].float().cpu(),
            tokens_F=self.pooled.frame_offsets[start : end + 1].diff(),
        )


def _on_patches(heat_S: Tensor, source_map: SourceMap | None) -> Tensor:
    # poolers inside the encoder leave merged source tokens, whose heat all their patches share
    if source_map is None or isinstance(source_map, Opaque):
        return heat_S
    shares = source_map.weighted()
    pooled_E, source_E, weight_E = (each.cpu() for each in (shares.pooled_E, shares.source_E, shares.weight_E))
    return heat_S.new_zeros(source_map.num_sources).index_add(0, source_E, heat_S[pooled_E] * weight_E.to(heat_S))


def _collect(branch: str, weights: list[Tensor], num_sources: int, layout: Layout) -> Tensor:
    spans = layout.v2v if branch == "v2v" else layout.t2v
    assert spans is not None, "a branch that looked has spans"
    heat_S = torch.zeros(num_sources)
    # each row's last text position, right before its answer
    row_Q = layout.t2v_position // layout.num_positions
    last_query = set((torch.bincount(row_Q, minlength=layout.num_rows).cumsum(0) - 1).tolist())
    for group, weights_qn in enumerate(weights):
        keys = slice(int(spans.key_start[group]), int(spans.key_end[group]))
        if branch == "v2v":
            heat_S[keys] += weights_qn.mean(dim=0).cpu()
        elif int(spans.query_offsets[group + 1]) - 1 in last_query:
            heat_S[keys] += weights_qn[-1].cpu()
    return heat_S
