"""Fusion: how LLM layers read source tokens. V2V lets pooled tokens do it, T2V text tokens; `none` neither."""

from lightning_crosslmm.fusion.attention import Spans, choose_backend, cross_attention
from lightning_crosslmm.fusion.block import FusionBlock
from lightning_crosslmm.fusion.context import FusionContext, Queries
from lightning_crosslmm.fusion.frame_time import frame_time
from lightning_crosslmm.fusion.plan import Fusion

__all__ = [
    "Fusion",
    "FusionBlock",
    "FusionContext",
    "Queries",
    "Spans",
    "choose_backend",
    "cross_attention",
    "frame_time",
]
