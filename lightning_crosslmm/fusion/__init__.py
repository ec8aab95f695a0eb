"""Fusion: how LLM layers read source tokens. V2V lets pooled tokens do it, T2V text tokens; `none` neither."""

from lightning_crosslmm.fusion.attention import Spans, choose_backend, cross_attention
from lightning_crosslmm.fusion.block import FusionBlock
from lightning_crosslmm.fusion.context import FusionContext, Queries
from lightning_crosslmm.fusion.frame_time import frame_time
from lightning_crosslmm.fusion.keys import Held
from lightning_crosslmm.fusion.plan import Fusion
from lightning_crosslmm.fusion.sources import FusionSources

__all__ = [
    "Fusion",
    "FusionBlock",
    "FusionContext",
    "FusionSources",
    "Held",
    "Queries",
    "Spans",
    "choose_backend",
    "cross_attention",
    "frame_time",
]
