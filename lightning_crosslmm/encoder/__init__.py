"""Encoders: from frames to source tokens. timm and transformers vision towers behind one small contract."""

from lightning_crosslmm.encoder.base import Encoder
from lightning_crosslmm.encoder.feature_cache import FeatureCache, Features
from lightning_crosslmm.encoder.reuse import Reuse, refuse_reuse
from lightning_crosslmm.encoder.timm import TimmEncoder
from lightning_crosslmm.encoder.transformers import TransformersEncoder

__all__ = ["Encoder", "FeatureCache", "Features", "Reuse", "TimmEncoder", "TransformersEncoder", "refuse_reuse"]
