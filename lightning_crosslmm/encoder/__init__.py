"""Encoders: from frames to source tokens. timm and transformers vision towers behind one small contract."""

from lightning_crosslmm.encoder.base import Encoder
from lightning_crosslmm.encoder.timm import TimmEncoder
from lightning_crosslmm.encoder.transformers import TransformersEncoder

__all__ = ["Encoder", "TimmEncoder", "TransformersEncoder"]
