"""Projectors: from the encoder's width to the LLM's."""

from lightning_crosslmm.projector.mlp import MLPProjector

__all__ = ["MLPProjector"]
