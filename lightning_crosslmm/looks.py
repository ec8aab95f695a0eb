"""Where the model looked: attention of both branches as maps over the encoder's patches.

Axis letters:
    S  source tokens    N  patches    F  frames of a sample    H W  rows and columns of patches
    q n  queries and keys of a group    E  entries of a source map
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.placement import Layout
from lightning_crosslmm.tokens import Opaque, SourceMap


@dataclass(frozen=True)
class Look:
    """One sample, what was asked, and where the model looked before it answered.

    Args:
        key: of the sample.
        question: the text asked.
        answer: the model's.
        expected: the right one.
        frames_FCHW: uint8 frames of all visuals of the sample.
        v2v_FHW: float32, mean weight that its pooled tokens gave each patch; None without V2V.
        t2v_FHW: float32, weight that the last token before the answer gave each patch; None without T2V.
    """

    key: str
    question: str
    answer: str
    expected: str
    frames_FCHW: Tensor
    v2v_FHW: Tensor | None
    t2v_FHW: Tensor | None


@torch.no_grad()
def attention_maps(model: CrossLMM, prompts: VideoBatch) -> list[dict[str, Tensor]]:
    """Run prompts and collect attention, averaged over heads, queries and fused layers.

    Args:
        model: its encoder gives a regular grid.
        prompts: one sample per row, each ending where its answer begins.

    Returns:
        Per sample, ``v2v`` and ``t2v`` as (F, H, W) float32 on the CPU, whichever the model has.
    """
    prompt = model.look(prompts)
    context = prompt.context
    if context is None:
        return [{} for _ in prompts.keys]
    heat: dict[str, Tensor] = {}
    for _, branch, weights in context.looks or []:
        share_S = _collect(branch, weights, len(context.source_SE), prompt.layout) / len(model.fused_layers)
        heat[branch] = heat[branch] + share_S if branch in heat else share_S
    rows, columns = model.encoder.grid
    heat = {name: _on_patches(heat_S, context.source_map) for name, heat_S in heat.items()}
    visuals = torch.searchsorted(prompts.sample_of_visual, torch.arange(prompts.num_samples + 1))
    bounds = (prompts.visual_offsets[visuals] * rows * columns).tolist()
    return [
        {name: heat_N[start:end].view(-1, rows, columns) for name, heat_N in heat.items()}
        for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


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
